"""The workspace of a deployment run: a git clone of the project at one commit, with a DVC lock of its own.

Workspaces are in `.cache/runs/` of the home: `FADEFORMER_HOME`, or the project's folder if it is on this machine. They
share the home's DVC cache, its training checkpoints and, without an MLflow server, its store and ledger. A workspace is
named by its flow run, so a run that is scheduled again after a crash continues in it. The results of a run are saved as
a DVC experiment and pushed to the repository.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from fadeformer.errors import UserError
from fadeformer.io.atomic import write_json
from pipelines.config import check
from pipelines.tracking.locations import WORKSPACE_MARKER, WORKSPACES

LOCK_FILE = Path(".cache/run.lock")  # in a workspace, held by the run that works there
FINISHED_MARKER = Path(".cache/finished")  # in a workspace that is no longer needed: the next run removes it
MAX_STARTS = 5  # of one run, each but the first after a crash


def check_out(repository: str, revision: str) -> dict[str, str]:
    """Clone the repository for the current flow run, or find the clone of an earlier start; a pull step of Prefect.

    Workspaces of finished runs are removed.

    Args:
        repository: folder or address of the git repository.
        revision: commit, by its full hash.

    Returns:
        `directory`: the workspace, which is the current directory from then on.
    """
    from prefect.runtime import flow_run  # the stages do not import Prefect

    home = os.environ.get("FADEFORMER_HOME")
    if not flow_run.id:
        raise UserError("a workspace belongs to a run of a deployment; start one with `prefect deployment run`")
    if flow_run.run_count > MAX_STARTS:
        raise UserError(f"the run has crashed {MAX_STARTS} times; see its log. Its workspace {flow_run.id} is kept")
    if urlsplit(repository).password:
        raise UserError("the address of the repository contains a password; use git's credential helper instead")
    if not home and not Path(repository).is_dir():
        raise UserError(
            f"{repository} is not a folder of this machine; set FADEFORMER_HOME for this worker, to the folder for"
            " workspaces, checkpoints and DVC's cache"
        )
    runs = Path(home or repository).resolve() / WORKSPACES
    runs.mkdir(parents=True, exist_ok=True)
    for finished in runs.glob(f"*/{FINISHED_MARKER}"):
        shutil.rmtree(finished.parents[1], ignore_errors=True)  # another run that starts now may remove it too
    workspace = runs / str(flow_run.id)
    if not (workspace / WORKSPACE_MARKER).is_file():
        if workspace.exists():  # the process was killed while it cloned
            shutil.rmtree(workspace)
        _clone_repository(repository, revision, workspace)
    os.chdir(workspace)
    return {"directory": str(workspace)}


@contextmanager
def exclusive_lock() -> Iterator[None]:
    """Lock the workspace until this process and every dvc process that it starts have exited.

    An earlier start of this run may still be working: its heartbeats were lost, or only its flow was killed.
    """
    with LOCK_FILE.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("an earlier start of this run is still working; waiting until it has finished", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        check.repair_dvc_files()
        yield


def is_workspace() -> bool:
    """Return True if the current directory is a workspace."""
    return WORKSPACE_MARKER.is_file()


def restore_revision(revision: str) -> None:
    """Bring the files of the workspace to those of another commit, or of a DVC experiment by its name.

    `dvc exp apply` would need the results in DVC's cache; here `pull` and `dvc repro` bring those that are needed.

    Raises:
        UserError: the repository has neither.
    """
    _run_command("git", "fetch", "--quiet", "origin", "+refs/heads/*:refs/heads/*", "+refs/exps/*:refs/exps/*")
    newest = ("--sort=-creatordate", "--count=1", "--format=%(objectname)")
    experiment = _run_command("git", "for-each-ref", *newest, f"refs/exps/*/*/{revision}").strip()
    _run_command("git", "restore", f"--source={experiment or revision}", "--", ".")


def has_remote() -> bool:
    """Return True if DVC has a default remote, which results are pulled from and pushed to."""
    config = ConfigParser()
    config.read([".dvc/config", ".dvc/config.local"])
    return config.has_option("core", "remote")


def pull_results() -> None:
    """Fetch the results named by dvc.lock and DVC's run cache from the default remote, if there is one."""
    if has_remote():
        _run_command("dvc", "pull", "--run-cache", "--allow-missing")


def push_experiment(name: str, stages: Sequence[str] = ()) -> str:
    """Save parameters and results as a DVC experiment; push it, and the results to DVC's remote if there is one.

    Args:
        name: of the experiment; one of that name is replaced.
        stages: whose results to save; empty for all.
    """
    _run_command("dvc", "exp", "save", "--force", "--name", name, *stages)
    _run_command("dvc", "exp", "push", "--force", "--run-cache" if has_remote() else "--no-cache", "origin", name)
    return name


def _clone_repository(repository: str, commit: str, workspace: Path) -> None:
    from prefect.deployments.steps.pull import git_clone

    os.chdir(workspace.parent)  # Prefect clones into the current directory
    try:
        git_clone(repository, commit_sha=commit, clone_directory_name=workspace.name)
    except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        raise UserError(f"{repository}: cannot clone commit {commit}; push it, then run again ({error})") from error
    for key, value in (("name", "FadeFormer run"), ("email", "run@localhost")):
        _run_command("git", "config", f"user.{key}", value, cwd=workspace)  # the author of its experiments
    dvc = workspace.parents[len(WORKSPACES.parts)] / ".dvc"  # of the home
    if (dvc / "config.local").is_file():  # such as the address of a remote for this machine
        shutil.copy(dvc / "config.local", workspace / ".dvc")
    _run_command("dvc", "config", "--local", "cache.dir", str(dvc / "cache"), cwd=workspace)
    write_json(workspace / WORKSPACE_MARKER, {"repository": repository, "revision": commit})


def _run_command(*command: str, cwd: Path | None = None) -> str:
    """Run a command and return its output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"`{' '.join(command[:3])}` failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout
