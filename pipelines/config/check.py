"""`python -m pipelines.config.check`: validate params.yaml before DVC removes any output.

It also checks that the folder is a git repository, which DVC requires without saying how to get one, and repairs
DVC's own files if a kill has truncated them, since DVC cannot read them then.
"""

import subprocess
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fadeformer.config import schema
from fadeformer.errors import UserError
from pipelines import paths, runner

DVC_LOCK, DVC_RWLOCK = Path("dvc.lock"), Path(".dvc/tmp/rwlock")


def main() -> str:
    """Check the git repository, repair DVC's files and check params.yaml."""
    check_repository()
    repair_dvc_files()
    config = schema.load_params(paths.PARAMS)
    return f"{paths.PARAMS} is valid: {config.dataset.name}, {config.model.backbone}, seed {config.seed}"


def check_repository() -> None:
    """Raise a UserError if the working directory is not the root of a git repository, or git refuses to use it."""
    if not Path(".git").exists():  # a file in a worktree
        raise UserError(
            "this folder is not a git repository (a ZIP download is none), but DVC needs one; clone the project, or run"
            " git init && git add --all && git commit --message 'Import'"
        )
    process = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if process.returncode:  # for example if another user owns the folder, as with a volume of a container
        raise UserError(f"git cannot use this repository: {process.stderr.strip()}")


def repair_dvc_files() -> None:
    """Restore a damaged dvc.lock from git, or remove it; remove a damaged list of DVC's processes."""
    if DVC_RWLOCK.is_file() and not _is_mapping(DVC_RWLOCK.read_text(errors="replace")):
        DVC_RWLOCK.unlink()
        print(f"{DVC_RWLOCK} was damaged and is removed")
    if DVC_LOCK.is_file() and not _is_mapping(DVC_LOCK.read_text(errors="replace")):
        DVC_LOCK.unlink()
        subprocess.run(["git", "checkout", "--quiet", "--", DVC_LOCK], capture_output=True, check=False)
        print(f"{DVC_LOCK} was damaged and is {'restored from git' if DVC_LOCK.exists() else 'removed'}")


def _is_mapping(text: str) -> bool:
    """Return True for a YAML or JSON mapping, and for a merge conflict, which the user has to resolve."""
    try:
        return "<<<<<<< " in text or isinstance(YAML(typ="safe").load(text), dict)
    except YAMLError:
        return False


if __name__ == "__main__":
    runner.run("check", main)
