"""The working copy of a deployment run: the project at one commit, with a workspace and a DVC lock of its own.

Copies lie in `.cache/runs/` of a home: the project itself where it lies on this machine, else `FADEFORMER_HOME`. They
share its DVC cache, its checkpoints of trainings that were begun and, without an MLflow server, its store and ledger. A
copy is named by its Prefect run, so that a run that is started again, after its worker was killed, finds it again. What
a run made is saved as a DVC experiment, and pushed to where the copy came from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from fadeformer.errors import PassingError, UserError
from fadeformer.files import read_json, write_json
from pipelines import check
from pipelines.places import COPY, RUNS

LOCK = Path(".cache/alone.lock")  # in a copy, of the process that works there
ENDED = Path(".cache/ended")  # in a copy whose run has ended well: the next one removes it
MOST = 5  # starts of one run, each but the first after a crash
PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
SAVE_AND_PUSH = """
import json, sys
from dvc.cli import main
save, push = json.loads(sys.argv[1])
sys.exit(main(save) and 3 or main(push))
"""  # in one process, as DVC takes seconds to begin
NOT_SAVED = "failed with status 3:"  # the first of the two
# What the same attempt would end with once more: a remote that is not there, may not be used, or lacks a package.
IN_VAIN = re.compile(
    r"access ?denied|forbidden|\b40[13]\b|no ?such ?bucket|credential|SignatureDoesNotMatch|InvalidAccessKey"
    r"|permission denied|is supported, but requires|does not (appear to be|exist)",
    re.IGNORECASE,
)


def check_out(repository: str, revision: str) -> dict[str, str]:
    """Prefect's pull step: makes the working copy of the present run, or finds it, and works in it from then on.

    Args:
        repository: folder or address of the git repository.
        revision: commit, branch or tag.

    Returns:
        `directory`: the copy.

    Raises:
        UserError: there is no such repository or commit, this machine has no home for copies, or the run has crashed
            too often.
    """
    from prefect.runtime import flow_run  # the stages know no Prefect

    if not flow_run.id:
        raise UserError("a working copy belongs to a run of a deployment; start one with `prefect deployment run`")
    if flow_run.run_count > MOST:
        raise UserError(f"the run has crashed {MOST} times; its log tells where, and what it left is kept")
    copy = make(repository, revision, str(flow_run.id))
    os.chdir(copy)
    return {"directory": str(copy)}


def make(repository: str, revision: str, name: str) -> Path:
    """Makes a copy, or finds it; removes those whose runs have ended well."""
    runs = _home(repository) / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    copy = runs / name
    with FileLock(runs / ".lock"):
        for other in runs.iterdir():
            if other != copy and (other / ENDED).exists():
                shutil.rmtree(other)
        if not copy.exists():
            begun = Path(tempfile.mkdtemp(dir=runs, prefix=".begun."))
            try:
                _clone(repository, revision, begun)
                begun.rename(copy)
            finally:
                shutil.rmtree(begun, ignore_errors=True)
    return copy


@contextmanager
def alone() -> Iterator[None]:
    """No other process works in the copy meanwhile: one whose heartbeats were lost is taken for dead, and may live.

    DVC files that a kill has damaged are repaired.
    """
    lock = FileLock(LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("this run was begun before and still works; what it leaves undone is done here, once it has ended")
        lock.acquire()
    try:
        check.repair()
        yield
    finally:
        lock.release()


def here() -> bool:
    """Whether this process works in a copy."""
    return COPY.is_file()


def go_to(what: str) -> None:
    """Brings the copy to another commit, or to a DVC experiment by its name.

    Raises:
        UserError: the repository has neither.
    """
    _git("fetch", "--quiet", "origin", "+refs/heads/*:refs/remotes/origin/*", "+refs/exps/*:refs/exps/*")
    experiments = _git("for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{what}").split()
    if len(experiments) > 1:
        raise UserError(f"{what} names several experiments; name one by its commit: {', '.join(experiments)}")
    if experiments:  # git has its plots too, which in a workspace are DVC's alone
        _git("checkout", "--quiet", "--force", "--detach", f"{experiments[0]}^")
        _git("checkout", "--quiet", experiments[0], "--", ".")
        _git("reset", "--quiet")
        return
    for candidate in (what, f"origin/{what}"):
        if _git("rev-parse", "--quiet", "--verify", f"{candidate}^{{commit}}", check=False).strip():
            _git("checkout", "--quiet", "--force", "--detach", candidate)
            return
    origin = repository()
    raise UserError(f"{origin} has no experiment or commit {what}; `dvc exp list {origin}` tells what there is")


def repository() -> str:
    """Where the copy came from."""
    return str(read_json(COPY)["repository"])


def has_remote() -> bool:
    """Whether DVC has a default remote, which results are pulled from and pushed to."""
    return _has_remote(Path.cwd())


@cache
def _has_remote(copy: Path) -> bool:
    """Asked once, as DVC takes seconds to begin, and a run asks before each stage."""
    return bool(_run("dvc", "config", "core.remote", cwd=copy, check=False).strip())


def pull() -> None:
    """Brings what the copy's dvc.lock and DVC's run cache name from the default remote, if there is one.

    Raises:
        PassingError: it does not answer.
    """
    if has_remote():
        with _passing():
            _run("dvc", "pull", "--run-cache", "--allow-missing")


def keep(name: str, stages: Sequence[str] = ()) -> str:
    """Saves parameters and results as a DVC experiment, pushes it, and the results to DVC's remote if there is one.

    Args:
        name: of the experiment; one of that name is replaced.
        stages: whose results there are; not given: those of all.

    Raises:
        PassingError: a remote does not answer.
    """
    save = ["exp", "save", "--force", "--name", name, *stages]
    push = ["exp", "push", "--force", "--run-cache" if has_remote() else "--no-cache", "origin", name]
    with _passing():
        _run(sys.executable, "-c", SAVE_AND_PUSH, json.dumps([save, push]), called="dvc exp save, dvc exp push")
    return name


def end() -> None:
    """Notes that the run of this copy has ended well."""
    ENDED.touch()


def _home(repository: str) -> Path:
    if PASSWORD.search(repository):
        raise UserError("the repository's address holds a password; leave it to git's credential helper")
    named = os.environ.get("FADEFORMER_HOME")
    if named:
        return Path(named).resolve()
    folder = Path(repository)
    if folder.is_dir():
        return folder.resolve()
    raise UserError(
        f"{repository} is no folder of this machine; set FADEFORMER_HOME for this worker, to the folder that is to hold"
        " working copies, checkpoints and DVC's cache"
    )


def _clone(repository: str, revision: str, folder: Path) -> None:
    home = _home(repository)
    _git("clone", "--quiet", "--no-checkout", repository, str(folder), cwd=home)
    found = _git("rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}", cwd=folder, check=False).strip()
    if not found:
        raise UserError(f"{repository} has no commit {revision}; push it, then run again")
    _git("checkout", "--quiet", "--detach", found, cwd=folder)
    for key, fallback in (("user.name", "FadeFormer run"), ("user.email", "run@localhost")):  # whose experiments are
        if not _git("config", key, cwd=folder, check=False).strip():
            _git("config", key, fallback, cwd=folder)
    settings = home / ".dvc" / "config.local"
    if settings.is_file():  # such as a remote's address on this machine
        shutil.copy(settings, folder / ".dvc" / settings.name)
    _run("dvc", "config", "--local", "cache.dir", str(home / ".dvc" / "cache"), cwd=folder)
    write_json(folder / COPY, {"repository": repository, "revision": found})


@contextmanager
def _passing() -> Iterator[None]:
    """What reaches for a remote in the block may go well next time."""
    try:
        yield
    except UserError as error:
        raise error if NOT_SAVED in str(error) or IN_VAIN.search(str(error)) else PassingError(str(error)) from error


def _git(*words: str, cwd: Path | None = None, check: bool = True) -> str:
    return _run("git", *words, cwd=cwd, check=check)


def _run(*command: str, cwd: Path | None = None, check: bool = True, called: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        cause = next((line for line in told if line.startswith(("ERROR", "fatal"))), told[-1] if told else "")
        raise UserError(f"`{called or ' '.join(command[:3])}` failed with status {done.returncode}: {cause}")
    return done.stdout
