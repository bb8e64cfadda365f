"""What git knows holds no secret, no machine's name, and no path of anybody's machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.$}])/(?:home|Users)/(?!\.)\w+|(?<![\w.$}])/root/\w+|[A-Z]:\\\\?Users\\",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY",
    "a key of Amazon": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\bgh[pousr]_\w{36,}|\bgithub_pat_\w{22,}",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "a token of Slack": r"\bxox[abposr]-[\w-]{10,}",
    "a signed token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "an address with a password": r"\b[a-z+0-9]+://[^\s:/@{}$<>\"'()]+:(?!\$|\{)[^\s/@{}$<>\"'()]{6,}@",
}
OF_IMAGES = ("fadeformer", "prefect", "mlflow")  # users, whose homes are in images alone
OF_TESTS = re.compile(r"//\w+:secret@")  # such as a test shows to a server


def tracked() -> dict[Path, str]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            texts[Path(name)] = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
    return texts


def offending(texts: dict[Path, str]) -> list[str]:
    found = []
    for path, text in texts.items():
        for number, line in enumerate(text.splitlines(), start=1):
            for what, pattern in FORBIDDEN.items():
                found += [
                    f"{path}:{number}: {what}: {match[0]}"
                    for match in re.finditer(pattern, line)
                    if not match[0].endswith(OF_IMAGES) and not OF_TESTS.search(match[0])
                ]
    return found


def test_no_tracked_file_holds_a_secret_or_a_path_of_a_machine():
    texts = tracked()
    assert len(texts) > 200
    assert offending(texts) == []


@pytest.mark.parametrize(
    "line",  # with a bar, so that the search does not find this file
    [
        "data: /ho|me/anna/scans", "open('/Us|ers/anna/x.png')", "see /ro|ot/project", r"C:\Us|ers\anna",
        "-----BEGIN RSA| PRIVATE KEY-----", "key = AKIA|IOSFODNN7EXAMPLE", f"ghp_{'a1' * 18}", f"hf_{'aB' * 17}",
        "xoxb-|1234567890-abc", f"eyJ{'a' * 12}.eyJ{'b' * 12}.{'c' * 12}", "postgresql:|//me:hunter2222@db/mlflow",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(line):
    assert len(offending({Path("a.txt"): line.replace("|", "")})) == 1


@pytest.mark.parametrize(
    "line", ["postgresql://mlflow:${PASSWORD}@db", "https://prefect.example.org/home/", "$HOME/x", "~/x", "/app/home/x"]
)
def test_and_nothing_else(line):
    assert offending({Path("a.txt"): line}) == []
