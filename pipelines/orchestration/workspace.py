"""The workspace of a deployment run: a git clone of the project at one commit, with its own DVC lock.

Workspaces are in `.cache/runs/` of the home folder: `FADEFORMER_HOME`, or the project's folder if it is on this
machine. They share the DVC cache and the training checkpoints of the home folder and, without an MLflow server, its
MLflow store and ledger. A workspace is named after the id of its flow run, so a run that is rescheduled after a crash
continues in it. The results of a run are saved as a DVC experiment and pushed to the repository.
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

LOCK_FILE = Path(".cache/run.lock")  # relative to the workspace; held by the run that uses it
FINISHED_MARKER = Path(".cache/finished")  # marks a workspace that the next run can delete
MAX_STARTS = 5  # per run: the first start and restarts after a crash


def check_out(repository: str, revision: str) -> dict[str, str]:
    """Clone the repository for the current flow run, or reuse the clone of an earlier start; a Prefect pull step.

    Also changes the current directory to the workspace, and deletes the workspaces of finished runs.

    Args:
        repository: Folder or URL of the git repository.
        revision: Full commit hash.

    Returns:
        The workspace under the key `directory`.
    """
    from prefect.runtime import flow_run  # the stages do not import Prefect

    home = os.environ.get("FADEFORMER_HOME")
    if not flow_run.id:
        raise UserError("a workspace needs a deployment run; start one with `prefect deployment run`")
    if flow_run.run_count > MAX_STARTS:
        raise UserError(f"the run has crashed {MAX_STARTS} times; see its log. Its workspace {flow_run.id} was kept")
    if urlsplit(repository).password:
        raise UserError("the repository URL contains a password; use git's credential helper instead")
    if not home and not Path(repository).is_dir():
        raise UserError(
            f"{repository} is not a folder on this machine; set FADEFORMER_HOME for this worker, to the folder for"
            " workspaces, checkpoints and DVC's cache"
        )
    runs = Path(home or repository).resolve() / WORKSPACES
    runs.mkdir(parents=True, exist_ok=True)
    for finished in runs.glob(f"*/{FINISHED_MARKER}"):
        shutil.rmtree(finished.parents[1], ignore_errors=True)  # another run may be deleting it too
    workspace = runs / str(flow_run.id)
    if not (workspace / WORKSPACE_MARKER).is_file():
        if workspace.exists():  # left by a process that was killed while cloning
            shutil.rmtree(workspace)
        _clone_repository(repository, revision, workspace)
    os.chdir(workspace)
    return {"directory": str(workspace)}


@contextmanager
def exclusive_lock() -> Iterator[None]:
    """Lock the workspace until this process and every dvc process that it starts have exited; repair files of DVC.

    An earlier start of the same run may still be active, because its heartbeats were lost or only its flow was killed.
    """
    with LOCK_FILE.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("an earlier start of this run is still active; waiting until it has finished", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        check.repair_dvc_files()
        yield


def is_workspace() -> bool:
    """Return True if the current directory is a workspace."""
    return WORKSPACE_MARKER.is_file()


def restore_revision(revision: str) -> None:
    """Restore the files of a commit, or of the newest DVC experiment with that name, in the workspace.

    `dvc exp apply` would need all results in DVC's cache; here `pull_results` and `dvc repro` fetch only those needed.

    Raises:
        UserError: The repository has no such commit or experiment.
    """
    _run_command("git", "fetch", "--quiet", "origin", "+refs/heads/*:refs/heads/*", "+refs/exps/*:refs/exps/*")
    newest = ("--sort=-creatordate", "--count=1", "--format=%(objectname)")
    experiment = _run_command("git", "for-each-ref", *newest, f"refs/exps/*/*/{revision}").strip()
    _run_command("git", "restore", f"--source={experiment or revision}", "--", ".")


def has_remote() -> bool:
    """Return True if DVC has a default remote to exchange results with."""
    config = ConfigParser()
    config.read([".dvc/config", ".dvc/config.local"])
    return config.has_option("core", "remote")


def pull_results() -> None:
    """Pull the results listed in dvc.lock and DVC's run cache from the default remote, if there is one."""
    if has_remote():
        _run_command("dvc", "pull", "--run-cache", "--allow-missing")


def push_experiment(name: str, stages: Sequence[str] = ()) -> str:
    """Save parameters and results as a DVC experiment and push it; push the results if DVC has a remote.

    Args:
        name: Name of the experiment; an existing one is replaced.
        stages: Stages whose results to save; empty for all.

    Returns:
        The name.
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
        _run_command("git", "config", f"user.{key}", value, cwd=workspace)  # author of its experiments
    dvc = workspace.parents[len(WORKSPACES.parts)] / ".dvc"  # of the home folder
    if (dvc / "config.local").is_file():  # settings of this machine, such as the URL of a remote
        shutil.copy(dvc / "config.local", workspace / ".dvc")
    _run_command("dvc", "config", "--local", "cache.dir", str(dvc / "cache"), cwd=workspace)
    write_json(workspace / WORKSPACE_MARKER, {"repository": repository, "revision": commit})


def _run_command(*command: str, cwd: Path | None = None) -> str:
    """Run a command and return its output."""
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise UserError(f"`{' '.join(command[:3])}` failed with status {process.returncode}: {process.stderr.strip()}")
    return process.stdout
