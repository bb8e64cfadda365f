"""What the trainer's image starts with: it lays the code into the working copy, then becomes the command it was given.

    worker [OPTION ...]   a Prefect worker of the pool FADEFORMER_POOL (local)
    server [OPTION ...]   Prefect's server
    COMMAND ...           anything else, such as `dvc repro`, in the working copy

The image's root can be read-only: all that is written goes to the working copy and to /tmp. The working copy is a git
repository: a clone of FADEFORMER_REPOSITORY, or else one that is made of the image's own code. That code is a branch of
it, `image`, so that a newer image is merged into what was changed there.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import credentials

CODE = Path(os.environ.get("FADEFORMER_CODE", "/opt/fadeformer"))  # as the image was built with
BRANCH = "image"
WHO = {
    f"GIT_{role}_{key}": f"image{value}"
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", ""), ("EMAIL", "@localhost"))
}
# The same code is the same commit wherever it is laid, so that the commit names it on any machine.
ALWAYS = {"GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z"}


def main() -> None:
    """Does what the arguments say; ends with one message and status 1 where something is missing."""
    command = sys.argv[1:]
    if not command:
        sys.exit("usage: {worker | server | COMMAND} [ARGUMENT ...]")
    Path.home().mkdir(parents=True, exist_ok=True)  # in /tmp, which is empty when a container starts
    if command[0] == "server":
        credentials.require("Prefect's server", _secrets_of_the_server())
        everywhere = "0.0.0.0"  # noqa: S104  in a container, whose ports are published by choice
        _become("prefect", "server", "start", "--host", everywhere, *command[1:])
    if command[0] == "worker" and not os.environ.get("PREFECT_API_URL"):
        sys.exit("the worker does not start: PREFECT_API_URL is missing; set it to the server's address, with /api")
    credentials.require("the worker" if command[0] == "worker" else command[0], _secrets_of_the_client())
    lay(CODE, Path.cwd())
    os.environ["PWD"] = str(Path.cwd())  # which a shell would have set; prefect.yaml names it
    if command[0] == "worker":
        pool = os.environ.get("FADEFORMER_POOL", "local")
        _become("prefect", "worker", "start", "--pool", pool, "--type", "process", "--with-healthcheck", *command[1:])
    _become(*command)


def _secrets_of_the_server() -> list[str]:
    database = os.environ.get("PREFECT_SERVER_DATABASE_DRIVER", "").startswith("postgresql")
    return ["PREFECT_SERVER_API_AUTH_STRING", *(["PREFECT_SERVER_DATABASE_PASSWORD"] if database else [])]


def _secrets_of_the_client() -> list[str]:
    """Of the servers that are named; without any the pipeline keeps all in its own folder, and needs none."""
    secrets = ["PREFECT_API_AUTH_STRING"] if os.environ.get("PREFECT_API_URL") else []
    if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        secrets.append("MLFLOW_TRACKING_PASSWORD")
    return secrets


def lay(code: Path, work: Path) -> None:
    """Makes the working copy where there is none, and brings the image's code into one that an image has made.

    A clone is left as it is. Of two containers that start on one volume the second waits for the first.

    Args:
        code: of the image, without git's history.
        work: the working copy.
    """
    if not os.access(work, os.W_OK | os.X_OK):
        sys.exit(f"{work} cannot be written by user {os.getuid()}; mount a volume there that belongs to this user")
    folder = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        repository = os.environ.get("FADEFORMER_REPOSITORY")
        new = not (work / ".git").exists() or not _commit(work, "HEAD")
        if new:
            _git(work, "init", "--quiet", "--initial-branch=main")
        if new and repository:
            _clone(repository, work)
        elif new or _commit(work, f"refs/heads/{BRANCH}"):
            _merge(code, work)
    finally:
        os.close(folder)


def _clone(repository: str, work: Path) -> None:
    """As `git clone` does, which refuses a folder that holds anything, such as a volume's lost+found."""
    _git(work, "config", "remote.origin.url", repository)
    _git(work, "config", "remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*")
    _git(work, "fetch", "--quiet", "origin")
    _git(work, "remote", "set-head", "origin", "--auto")
    branch = _git(work, "rev-parse", "--abbrev-ref", "origin/HEAD").removeprefix("origin/")
    _git(work, "checkout", "--quiet", "-B", branch, "--track", f"origin/{branch}")


def _merge(code: Path, work: Path) -> None:
    """Commits the image's code to its branch if it is another than before, and merges that."""
    before = _commit(work, f"refs/heads/{BRANCH}")
    git = work / ".git"
    aside = {"GIT_DIR": str(git), "GIT_WORK_TREE": str(code), "GIT_INDEX_FILE": str(git / "image.index")}
    _git(code, "add", "--all", "--force", ".", **aside)
    tree = _git(code, "write-tree", **aside)
    if before and _git(work, "rev-parse", f"{before}^{{tree}}") == tree:
        return
    parents = ["-p", before] if before else []
    after = _git(work, "commit-tree", tree, *parents, "-m", "The code of the image", **WHO, **ALWAYS)
    merged = _try(work, "merge", "--quiet", "--no-edit", after, **WHO)
    if merged.returncode != 0:
        _try(work, "merge", "--abort")
        sys.exit(
            f"{work} has changes that do not go together with this image's code ({_last_line(merged)}); commit them and"
            f" `git merge {after[:12]}` there, or start with an empty volume"
        )
    _git(work, "update-ref", f"refs/heads/{BRANCH}", after)


def _commit(work: Path, name: str) -> str:
    """The commit of a name, or an empty text."""
    return _try(work, "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}").stdout.strip()


def _git(folder: Path, *words: str, **environment: str) -> str:
    done = _try(folder, *words, **environment)
    if done.returncode != 0:
        sys.exit(f"`git {words[0]}` failed in {folder}: {_last_line(done)}")
    return done.stdout.strip()


def _try(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["git", *words]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return next((line for line in reversed((done.stderr + done.stdout).splitlines()) if line.strip()), "no message")


def _become(*command: str) -> None:
    # A worker that is told to end sends itself this signal, which a shell has what it starts in the background ignore.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606  in place of this process, so that signals reach it
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main()
