"""Repair of damaged DVC files; merge conflicts are left to the user."""

import subprocess
from pathlib import Path

import pytest

from fadeformer.errors import UserError
from pipelines.config import check

STAGES = """
stages:
  first: {cmd: "echo first >> runs; cp source first", deps: [source], outs: [first]}
  second: {cmd: "echo second >> runs; cp first second", deps: [first], outs: [second]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose two stages have run, with dvc.lock committed; the test runs in it."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "source").write_text("text\n")
    for command in (
        "git init --quiet --initial-branch=main", "git config user.name Test", "git config user.email t@example.org",
        "dvc init --quiet", "dvc repro --quiet", "git add --all", "git commit --quiet -m first",
    ):  # fmt: skip
        subprocess.run(command.split(), check=True)
    return tmp_path


def repro() -> subprocess.CompletedProcess[str]:
    return subprocess.run(["dvc", "repro"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("committed", [True, False])
def test_repaired_dvc_files_do_not_rerun_stages(project, capsys, committed):
    if not committed:
        subprocess.run(["git", "rm", "--quiet", "--cached", "dvc.lock"], check=True)
    lock = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text(lock[: lock.index("    de") + 6])
    (project / ".dvc/tmp/rwlock").write_text('{"write": {"/pro')
    assert repro().returncode != 0
    check.repair_dvc_files()
    assert capsys.readouterr().out.splitlines() == [
        ".dvc/tmp/rwlock was damaged and is removed",
        f"dvc.lock was damaged and is {'restored from git' if committed else 'removed'}",
    ]
    process = repro()
    assert process.returncode == 0, process.stderr
    assert (project / "dvc.lock").read_text() == lock
    assert (project / "runs").read_text() == "first\nsecond\n"


@pytest.mark.parametrize(
    "lock", ["schema: '2.0'\nstages: {}\n", "<<<<<<< HEAD\nschema: '2.0'\n=======\n>>>>>>> other\n"]
)
def test_valid_and_conflicted_files_are_not_changed(tmp_path, monkeypatch, capsys, lock):
    monkeypatch.chdir(tmp_path)
    check.repair_dvc_files()
    assert not [*tmp_path.iterdir()]
    (tmp_path / "dvc.lock").write_text(lock)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/rwlock").write_text("{}")
    check.repair_dvc_files()
    assert (tmp_path / "dvc.lock").read_text() == lock
    assert (tmp_path / ".dvc/tmp/rwlock").read_text() == "{}"
    assert capsys.readouterr().out == ""


def test_folder_without_usable_git_is_refused(project):
    check.check_repository()
    (project / ".git/HEAD").unlink()
    with pytest.raises(UserError, match="git cannot use this repository: fatal: "):
        check.check_repository()
    (project / ".git").rename(project / "git")
    with pytest.raises(UserError, match=r"not a git repository .* git init && git add --all && git commit"):
        check.check_repository()
