"""The working copy of a deployment run: at its commit, beside others, and what it made comes back as an experiment."""

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fadeformer.errors import PassingError, UserError
from pipelines import places, working_copy

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
        "dvc init --quiet", "git add --all", "git commit --quiet -m begin",
    ):  # fmt: skip
        run(folder, *command.split())
    return folder


@pytest.fixture
def copy(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a copy and works in it."""

    def make(name: str, revision: str = "main") -> Path:
        folder = working_copy.make(str(repository), revision, name)
        monkeypatch.chdir(folder)
        return folder

    return make


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """DVC reports nothing of a project that does not tell it so itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_NO_ANALYTICS", "true")
        yield


def run(folder: Path, *command: str) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_copy_is_at_its_commit_and_belongs_to_the_project(copy, repository):
    commit = run(repository, "git", "rev-parse", "HEAD").strip()
    assert copy("one").parent == repository / ".cache" / "runs"
    assert working_copy.here()
    assert run(Path.cwd(), "git", "rev-parse", "HEAD").strip() == commit
    assert places.project() == repository


def test_a_run_that_is_started_again_finds_what_it_left(copy):
    (copy("again") / "half.txt").write_text("begun")
    assert (copy("again") / "half.txt").read_text() == "begun"


def test_one_process_at_a_time_works_in_a_copy(copy, capsys):
    copy("lost")
    ended = threading.Event()

    def second() -> bool:
        with working_copy.alone():
            return ended.is_set()

    with ThreadPoolExecutor(1) as other:
        with working_copy.alone():
            found = other.submit(second)
            printed = ""
            while "this run was begun before and still works" not in printed:
                printed += capsys.readouterr().out
                time.sleep(0.05)
            ended.set()
        assert found.result(60)


def test_a_copy_goes_once_its_run_has_ended_well_and_another_begins(copy, repository):
    left = copy("unfinished")
    ended = copy("ended")
    working_copy.end()
    copy("next")
    assert left.exists()
    assert not ended.exists()


def test_what_a_run_made_comes_back_as_an_experiment(copy, repository):
    folder = copy("kept")
    (folder / "params.yaml").write_text("seed: 2\n")
    run(folder, "dvc", "repro", "--quiet")
    assert working_copy.keep("tidy-name") == "tidy-name"
    assert "tidy-name" in run(repository, "dvc", "exp", "list", "--name-only")
    run(repository, "dvc", "exp", "apply", "tidy-name")
    assert (repository / "doubled.txt").read_text() == "seed: 2\n"  # by the cache they share
    run(repository, "git", "checkout", "--quiet", "--", "params.yaml")
    other = copy("of the experiment")
    working_copy.go_to("tidy-name")
    assert (other / "params.yaml").read_text() == "seed: 2\n"
    assert "is cached" in run(other, "dvc", "repro")
    assert (other / "doubled.txt").read_text() == "seed: 2\n"


def test_results_that_are_not_there_are_told_and_not_waited_for(copy):
    copy("without results")
    with pytest.raises(UserError, match=r"failed with status 3: .*doubled\.txt") as told:
        working_copy.keep("empty")
    assert not isinstance(told.value, PassingError)


def test_results_go_to_dvcs_remote_and_come_back_from_it(copy, repository, tmp_path):
    run(repository, "dvc", "remote", "add", "--local", "--default", "there", str(tmp_path / "remote"))
    try:
        folder = copy("pushed")
        assert working_copy.has_remote()
        working_copy.pull()  # of which nothing is there yet
        (folder / "params.yaml").write_text("seed: 3\n")
        run(folder, "dvc", "repro", "--quiet")
        working_copy.keep("pushed")
        shutil.rmtree(repository / ".dvc" / "cache")
        other = copy("pulled")
        working_copy.go_to("pushed")
        working_copy.pull()
        assert "Running stage" not in run(other, "dvc", "repro", "--pull")
        assert (other / "doubled.txt").read_text() == "seed: 3\n"
    finally:
        run(repository, "dvc", "remote", "remove", "--local", "there")
    copy("without")
    assert not working_copy.has_remote()


def test_a_remote_that_does_not_answer_may_pass_and_one_that_cannot_be_used_does_not(copy, monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "x")
    folder = copy("alone")
    run(folder, "dvc", "remote", "add", "--local", "--default", "down", "s3://bucket/dvc")
    run(folder, "dvc", "remote", "modify", "--local", "down", "endpointurl", "http://127.0.0.1:9")
    with pytest.raises(PassingError, match="Could not connect"):
        working_copy.pull()
    run(folder, "dvc", "remote", "add", "--local", "--default", "--force", "down", "oss://bucket/dvc")
    with pytest.raises(UserError, match="requires") as error:
        working_copy.pull()
    assert not isinstance(error.value, PassingError)


@pytest.mark.parametrize(
    ("address", "revision", "told"),
    [
        ("{}", "0" * 40, "push it, then run again"),
        ("https://example.org/x.git", "main", "FADEFORMER_HOME"),
        ("https://me:secret@example.org/x.git", "main", "credential helper"),
    ],
)
def test_what_cannot_be_copied_is_told(repository, address, revision, told):
    with pytest.raises(UserError, match=told) as error:
        working_copy.make(address.format(repository), revision, "refused")
    assert "secret" not in str(error.value)
    assert not list((repository / ".cache" / "runs").glob(".begun*"))


def test_an_experiment_that_is_not_there_is_told(copy):
    copy("searching")
    with pytest.raises(UserError, match="no experiment or commit nothing-of-it"):
        working_copy.go_to("nothing-of-it")


def test_a_copy_belongs_to_a_run(repository):
    with pytest.raises(UserError, match="prefect deployment run"):
        working_copy.check_out(str(repository), "main")
