"""A process beside a stage's own, so that two loads of libraries take place at the same time.

Half of a short stage's time is Python reading libraries, one after the other, on one core. What needs torch needs
neither Prefect nor MLflow: it gets a process of its own, begun (`start`) before the stage itself loads anything, and is
asked by the name of a function. It ends with the stage, however that ends.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Literal

from tqdm import tqdm

from fadeformer.errors import UserError

OF_STAGE = {"evaluate": "pipelines.network"}  # the module that a stage has a process beside its own for
_started: dict[str, Beside] = {}


class Beside:
    """A process that has a module loaded and runs its functions, one after the other.

    Args:
        module: its full name.
        method: how the process begins; a fork where this one has libraries loaded and no threads yet, whose locks it
            would have without them.
    """

    def __init__(self, module: str, method: Literal["spawn", "fork"]) -> None:
        self.module = module
        context: Any = multiprocessing.get_context(method)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(module, theirs))
        self._process.start()
        theirs.close()  # so that its end is an end of file here

    def begin(self, function: str, *arguments: Any) -> None:
        """Asks for a function of the module; `result` gives what it returns."""
        self._connection.send((function, arguments))

    def result(self) -> Any:
        """Waits for what was asked for first.

        Raises:
            UserError: the process is gone.
            Exception: what the function raised.
        """
        try:
            value, error = self._connection.recv()
        except (EOFError, ConnectionResetError) as gone:
            self._process.join()
            raise UserError(
                f"the process of {self.module} ended with status {self._process.exitcode}; -9 most often means that"
                " memory ran out"
            ) from gone
        if error is not None:
            raise error
        return value

    def call(self, function: str, *arguments: Any) -> Any:
        """What a function of the module returns or raises."""
        self.begin(function, *arguments)
        return self.result()

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def start(module: str, method: Literal["spawn", "fork"] = "spawn") -> Beside:
    """Begins the process of a module, or finds the one that was begun."""
    if module not in _started:
        _started[module] = Beside(module, method)
    return _started[module]


def give_up() -> None:
    """Ends every process that was begun."""
    while _started:
        _started.popitem()[1].end()


def _serve(module: str, connection: Connection) -> None:
    """Runs what it is asked for until nobody asks any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which reach the stage as well, and it decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own, for several processes, would be left behind
    gc.disable()  # as in `pipelines.__main__`
    functions = import_module(module)
    gc.freeze()
    gc.enable()
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(functions, name)(*arguments), None
        except Exception as error:  # the stage raises it
            error.add_note(traceback.format_exc())
            answer = None, error
        connection.send(answer)


def _watch() -> None:
    """Ends this process as soon as the stage is gone: nobody would take what it makes."""
    stage = multiprocessing.parent_process()
    if stage is not None:
        stage.join()
        os._exit(1)
