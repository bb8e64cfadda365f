"""`fadeformer COMMAND`: what is done with models once they are made; `dvc repro` makes them."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module

from pipelines import runner

COMMANDS = {  # module of pipelines.cli: what it does
    "drift": "whether new images are like those that a model was made with",
    "export": "a model as one ONNX graph or torch.export program",
    "predict": "predict images on the disk by a model",
    "promote": "judge a model again, promote it by force, or take a champion back",
    "registry": "what was decided about models",
    "serve": "a model over HTTP, with limits for requests from strangers",
    "sweep": "search the values of params.yaml that train best",
    "tables": "train a grid of sets, networks and seeds, and write its tables",
}


def main(words: list[str] | None = None) -> None:
    """Runs the command that the arguments name; only its own module is imported."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser("fadeformer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, told in COMMANDS.items():
        command = commands.add_parser(name, help=told, description=told)
        if name == wanted:
            module = import_module(f"pipelines.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    runner.run(arguments.command, partial(arguments.run, arguments))


if __name__ == "__main__":
    main()
