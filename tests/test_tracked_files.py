"""Files under version control contain no secrets and no local paths."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "a local path": r"(?<![\w.$}])/(?:home|Users)/(?!\.)\w+|(?<![\w.$}])/root/\w+|[A-Z]:\\\\?Users\\",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_\w{36,}|\bgithub_pat_\w{22,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a Slack token": r"\bxox[abposr]-[\w-]{10,}",
    "a signed token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a URL with a password": r"\b[a-z+0-9]+://[^\s:/@{}$<>\"'()]+:(?!\$|\{)[^\s/@{}$<>\"'()]{6,}@",
}
CONTAINER_USERS = ("fadeformer", "prefect", "mlflow")  # users whose home directories are in container images
TEST_CREDENTIALS = re.compile(r"//\w+:secret@")  # credentials of test servers


def tracked_texts() -> dict[Path, str]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            texts[Path(name)] = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
    return texts


def find_forbidden(texts: dict[Path, str]) -> list[str]:
    matches = []
    for path, text in texts.items():
        for number, line in enumerate(text.splitlines(), start=1):
            for name, pattern in FORBIDDEN.items():
                matches += [
                    f"{path}:{number}: {name}: {match[0]}"
                    for match in re.finditer(pattern, line)
                    if not match[0].endswith(CONTAINER_USERS) and not TEST_CREDENTIALS.search(match[0])
                ]
    return matches


def test_tracked_files_contain_no_secrets_or_local_paths():
    texts = tracked_texts()
    assert len(texts) > 200
    assert find_forbidden(texts) == []


@pytest.mark.parametrize(
    "line",  # with a bar, so that this file is not reported
    [
        "data: /ho|me/anna/scans", "open('/Us|ers/anna/x.png')", "see /ro|ot/project", r"C:\Us|ers\anna",
        "-----BEGIN RSA| PRIVATE KEY-----", "key = AKIA|IOSFODNN7EXAMPLE", f"ghp_{'a1' * 18}", f"hf_{'aB' * 17}",
        "xoxb-|1234567890-abc", f"eyJ{'a' * 12}.eyJ{'b' * 12}.{'c' * 12}", "postgresql:|//me:hunter2222@db/mlflow",
    ],
)  # fmt: skip
def test_forbidden_text_is_found(line):
    assert len(find_forbidden({Path("a.txt"): line.replace("|", "")})) == 1


@pytest.mark.parametrize(
    "line", ["postgresql://mlflow:${PASSWORD}@db", "https://prefect.example.org/home/", "$HOME/x", "~/x", "/app/home/x"]
)
def test_allowed_text_is_not_reported(line):
    assert find_forbidden({Path("a.txt"): line}) == []


@pytest.mark.parametrize(
    ("name", "is_ignored"),
    [
        ("data/own/scans/a/0.png", True),
        ("data/own/scans.dvc", False),
        ("data/own/.gitignore", False),
        ("data/own/hospital/scans.dvc", False),
        ("data/weights/model.pth", True),
        ("data/weights/model.pth.dvc", False),
        ("data/adopted/proposed-1.csv", True),
        ("data/excluded/proposed-1.csv", True),
    ],
)
def test_git_ignores_own_data_but_not_dvc_files(name, is_ignored):
    assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False).returncode == (not is_ignored)
