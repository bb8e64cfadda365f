"""Entry point of the trainer image: brings the code into the working copy, then replaces itself with a command.

    worker [OPTION ...]   a Prefect worker for the pool FADEFORMER_POOL (default: local)
    server [OPTION ...]   a Prefect server
    COMMAND ...           any other command, such as `dvc repro`, in the working copy

The root file system can be read-only: only the working copy and /tmp are written to. The working copy is a git
repository: a clone of FADEFORMER_REPOSITORY, or by default a new one with the code of the image. In the latter that
code has its own branch, `image`, and the code of a newer image is merged into local changes.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import credentials

CODE = Path(os.environ.get("FADEFORMER_CODE", "/opt/fadeformer"))  # the code in the image
BRANCH = "image"
AUTHOR = {
    f"GIT_{role}_{key}": f"image{value}"
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", ""), ("EMAIL", "@localhost"))
}
# Fixed dates: the same code has the same commit hash on every machine.
FIXED_DATES = {"GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z"}


def main() -> None:
    """Run the command in the arguments; exit with one message and status 1 if a setting is missing."""
    command = sys.argv[1:]
    if not command:
        sys.exit("usage: {worker | server | COMMAND} [ARGUMENT ...]")
    Path.home().mkdir(parents=True, exist_ok=True)  # it is in /tmp, which is empty when a container starts
    if command[0] == "server":
        credentials.require("Prefect's server", _server_secret_names())
        all_interfaces = "0.0.0.0"  # noqa: S104  a container's ports are published explicitly
        _exec("prefect", "server", "start", "--host", all_interfaces, *command[1:])
    if command[0] == "worker" and not os.environ.get("PREFECT_API_URL"):
        sys.exit("the worker does not start: PREFECT_API_URL is missing; set it to the server's address, with /api")
    credentials.require("the worker" if command[0] == "worker" else command[0], _client_secret_names())
    update_working_copy(CODE, Path.cwd())
    os.environ["PWD"] = str(Path.cwd())  # prefect.yaml refers to it; a shell would have set it
    if command[0] == "worker":
        pool = os.environ.get("FADEFORMER_POOL", "local")
        _exec("prefect", "worker", "start", "--pool", pool, "--type", "process", "--with-healthcheck", *command[1:])
    _exec(*command)


def _server_secret_names() -> list[str]:
    database = os.environ.get("PREFECT_SERVER_DATABASE_DRIVER", "").startswith("postgresql")
    return ["PREFECT_SERVER_API_AUTH_STRING", *(["PREFECT_SERVER_DATABASE_PASSWORD"] if database else [])]


def _client_secret_names() -> list[str]:
    """Return the secrets for the configured servers; the pipeline also works without any server."""
    secrets = ["PREFECT_API_AUTH_STRING"] if os.environ.get("PREFECT_API_URL") else []
    if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        secrets.append("MLFLOW_TRACKING_PASSWORD")
    return secrets


def update_working_copy(code: Path, work: Path) -> None:
    """Create the working copy, or merge the image's code into it unless it is a clone.

    Uses a lock, so that two containers can start with the same volume.

    Args:
        code: Code of the image, without git history.
        work: Working copy.
    """
    if not os.access(work, os.W_OK | os.X_OK):
        sys.exit(f"{work} is not writable for user {os.getuid()}; mount a volume there that belongs to this user")
    folder = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        repository = os.environ.get("FADEFORMER_REPOSITORY")
        is_new = not (work / ".git").exists() or not _commit(work, "HEAD")
        if is_new:
            _git(work, "init", "--quiet", "--initial-branch=main")
        if is_new and repository:
            _clone(repository, work)
        elif is_new or _commit(work, f"refs/heads/{BRANCH}"):
            _merge(code, work)
    finally:
        os.close(folder)


def _clone(repository: str, work: Path) -> None:
    """Clone into a folder that may contain files, such as lost+found of a volume; `git clone` needs an empty one."""
    _git(work, "config", "remote.origin.url", repository)
    _git(work, "config", "remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*")
    _git(work, "fetch", "--quiet", "origin")
    _git(work, "remote", "set-head", "origin", "--auto")
    branch = _git(work, "rev-parse", "--abbrev-ref", "origin/HEAD").removeprefix("origin/")
    _git(work, "checkout", "--quiet", "-B", branch, "--track", f"origin/{branch}")


def _merge(code: Path, work: Path) -> None:
    """Commit the image's code to its branch if it has changed, and merge that branch."""
    previous = _commit(work, f"refs/heads/{BRANCH}")
    git = work / ".git"
    environment = {"GIT_DIR": str(git), "GIT_WORK_TREE": str(code), "GIT_INDEX_FILE": str(git / "image.index")}
    _git(code, "add", "--all", "--force", ".", **environment)
    tree = _git(code, "write-tree", **environment)
    if previous and _git(work, "rev-parse", f"{previous}^{{tree}}") == tree:
        return
    parents = ["-p", previous] if previous else []
    commit = _git(work, "commit-tree", tree, *parents, "-m", "The code of the image", **AUTHOR, **FIXED_DATES)
    merged = _try(work, "merge", "--quiet", "--no-edit", commit, **AUTHOR)
    if merged.returncode != 0:
        _try(work, "merge", "--abort")
        sys.exit(
            f"{work} has changes that conflict with this image's code ({_last_line(merged)}); commit them and run"
            f" `git merge {commit[:12]}` there, or start with an empty volume"
        )
    _git(work, "update-ref", f"refs/heads/{BRANCH}", commit)


def _commit(work: Path, name: str) -> str:
    """Return the hash of a revision, or an empty string."""
    return _try(work, "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}").stdout.strip()


def _git(folder: Path, *arguments: str, **environment: str) -> str:
    process = _try(folder, *arguments, **environment)
    if process.returncode != 0:
        sys.exit(f"`git {arguments[0]}` failed in {folder}: {_last_line(process)}")
    return process.stdout.strip()


def _try(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def _last_line(process: subprocess.CompletedProcess[str]) -> str:
    return next(
        (line for line in reversed((process.stderr + process.stdout).splitlines()) if line.strip()), "no message"
    )


def _exec(*command: str) -> None:
    # A stopping worker sends itself SIGINT, which background processes of a shell ignore by default.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606  replaces this process, so that signals reach the command
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main()
