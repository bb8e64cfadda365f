"""Workspaces of deployment runs: clones at a commit, locking, and results as DVC experiments."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fadeformer.errors import UserError
from pipelines.orchestration import workspace
from pipelines.tracking import locations

STAGES = """
stages:
  double:
    cmd: cp params.yaml doubled.txt; cp params.yaml curve.csv
    params: [seed]
    deps: [source.txt]
    outs: [doubled.txt]
    plots: [curve.csv]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one stage, committed."""
    folder = tmp_path_factory.mktemp("origin")
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "params.yaml").write_text("seed: 1\n")
    (folder / "source.txt").write_text("text\n")
    (folder / ".gitignore").write_text("/doubled.txt\n/curve.csv\n/.cache\n")
    for command in (
        "git init --quiet --initial-branch=main", "git config user.name Test", "git config user.email t@example.org",
        "dvc init --quiet", "git add --all", "git commit --quiet -m first",
    ):  # fmt: skip
        run(folder, *command.split())
    return folder


@pytest.fixture
def check_out(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Checks out a workspace for a run of a given name, which becomes the current directory."""
    monkeypatch.chdir(repository)  # restored after the test

    def create(name: str, address: str = str(repository)) -> Path:
        monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", name)
        return Path(workspace.check_out(address, run(repository, "git", "rev-parse", "HEAD").strip())["directory"])

    return create


@pytest.fixture(scope="module", autouse=True)
def no_analytics() -> Iterator[None]:
    """Disable the usage statistics of DVC, which this project does not disable itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_NO_ANALYTICS", "true")
        yield


def run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_workspace_is_at_its_commit(check_out, repository):
    commit = run(repository, "git", "rev-parse", "HEAD").strip()
    assert check_out("one").parent == repository / ".cache" / "runs"
    assert workspace.is_workspace()
    assert run(Path.cwd(), "git", "rev-parse", "HEAD").strip() == commit
    assert locations.project_folder() == repository


def test_restarted_run_reuses_its_workspace(check_out):
    (check_out("again") / "partial.txt").write_text("partial")
    assert (check_out("again") / "partial.txt").read_text() == "partial"


FLOW = """
import subprocess, sys, time
from pipelines.orchestration import workspace

with workspace.exclusive_lock():
    print("locked", flush=True)
    dvc = "import pathlib, time; print('child', flush=True)\\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)"
    subprocess.run([sys.executable, "-c", dvc], close_fds=False)
"""


def test_second_start_waits_for_processes_of_the_first(check_out):
    folder = check_out("lost")
    command = [sys.executable, "-c", FLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert [first.stdout.readline(), first.stdout.readline()] == ["locked\n", "child\n"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
            assert "waiting until it has finished" in second.stdout.readline()
            first.kill()
            time.sleep(0.5)
            assert second.poll() is None
            (folder / "go").touch()
            assert second.stdout.readline() == "locked\n"


def test_next_run_removes_finished_workspaces(check_out, repository):
    unfinished = check_out("unfinished")
    finished = check_out("finished")
    workspace.FINISHED_MARKER.touch()
    check_out("next")
    assert unfinished.exists()
    assert not finished.exists()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_results_are_pushed_as_an_experiment(check_out, repository, monkeypatch, scheme):
    if scheme:  # from a git server, Prefect clones without the contents of other commits
        monkeypatch.setenv("FADEFORMER_HOME", str(repository))
        run(repository, "git", "config", "uploadpack.allowFilter", "true")
    name = f"tidy-name{len(scheme)}"
    folder = check_out(f"kept{scheme[:4]}", f"{scheme}{repository}")
    (folder / "params.yaml").write_text("seed: 2\n")
    run(folder, "dvc", "repro", "--quiet")
    assert workspace.push_experiment(name) == name
    assert name in run(repository, "dvc", "exp", "list", "--name-only")
    run(repository, "dvc", "exp", "apply", name)
    assert (repository / "doubled.txt").read_text() == "seed: 2\n"  # from the shared cache
    run(repository, "git", "checkout", "--quiet", "--", ".")
    (repository / "source.txt").write_text(f"changed {scheme}\n")
    run(repository, "git", "commit", "--quiet", "--all", "--message", "change a dependency")
    other = check_out(f"restored{scheme[:4]}", f"{scheme}{repository}")
    assert not scheme or run(other, "git", "config", "remote.origin.promisor") == "true\n"
    assert (other / "source.txt").read_text() == f"changed {scheme}\n"
    workspace.restore_revision(name)
    assert (other / "params.yaml").read_text() == "seed: 2\n"
    assert "Running stage" not in run(other, "dvc", "repro")
    assert (other / "doubled.txt").read_text() == "seed: 2\n"
    workspace.push_experiment(f"{name}-again")
    workspace.restore_revision("main")
    assert (other / "params.yaml").read_text() == "seed: 1\n"


def test_results_are_exchanged_with_the_remote(check_out, repository, tmp_path):
    run(repository, "dvc", "remote", "add", "--local", "--default", "storage", str(tmp_path / "remote"))
    try:
        folder = check_out("pushed")
        assert workspace.has_remote()
        workspace.pull_results()  # the remote is still empty
        (folder / "params.yaml").write_text("seed: 3\n")
        run(folder, "dvc", "repro", "--quiet")
        workspace.push_experiment("pushed")
        shutil.rmtree(repository / ".dvc" / "cache")
        other = check_out("pulled")
        workspace.restore_revision("pushed")
        workspace.pull_results()
        assert "Running stage" not in run(other, "dvc", "repro", "--pull")
        assert (other / "doubled.txt").read_text() == "seed: 3\n"
    finally:
        run(repository, "dvc", "remote", "remove", "--local", "storage")
    check_out("without")
    assert not workspace.has_remote()


@pytest.mark.parametrize(
    ("address", "starts", "message"),
    [
        ("{}", 1, "push it, then run again"),
        ("{}", 6, "has crashed 5 times"),
        ("https://example.org/x.git", 1, "FADEFORMER_HOME"),
        ("https://me:secret@example.org/x.git", 1, "credential helper"),
    ],
)
def test_invalid_workspace_is_rejected(repository, monkeypatch, address, starts, message):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "refused")
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__RUN_COUNT", str(starts))
    with pytest.raises(UserError, match=message) as error:
        workspace.check_out(address.format(repository), "0" * 40)
    assert "secret" not in str(error.value)


def test_workspace_needs_a_deployment_run(repository):
    with pytest.raises(UserError, match="prefect deployment run"):
        workspace.check_out(str(repository), "main")


def test_missing_experiment_is_reported(check_out):
    check_out("searching")
    with pytest.raises(UserError, match="could not resolve no-such-experiment"):
        workspace.restore_revision("no-such-experiment")
