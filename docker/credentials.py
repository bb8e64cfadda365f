"""Passwords that a container is started with: it does not start where one is missing, short, or known to everybody."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

SHORTEST = 12  # characters, as MLflow asks of its accounts
# A password that consists of such words, digits and signs is known to everybody: password1234, Change-Me-2026!, ...
WORDS = (
    "admin", "administrator", "change", "default", "dummy", "example", "fadeformer", "guest", "iloveyou", "it", "key",
    "letmein", "me", "minio", "mlflow", "my", "none", "now", "null", "pass", "passw", "passwd", "password", "pg",
    "postgres", "postgresql", "prefect", "qwerty", "replace", "root", "rustfs", "seaweedfs", "secret", "super", "test",
    "the", "this", "todo", "trainer", "user", "welcome", "worker", "your",
)  # fmt: skip
KNOWN = re.compile(f"(?:{'|'.join(WORDS)})+")
COUNTED = "01234567890123456789", "98765432109876543210"  # 123456789012 and the like


def require(program: str, names: Iterable[str]) -> None:
    """Ends the process with one message unless each secret is there and good.

    A secret stands in the variable of its name, or in the file that NAME_FILE names, from which it is then taken.

    Args:
        program: what does not start, for people.
        names: of the variables.
    """
    wrong = [told for name in names if (told := _take(name))]
    if wrong:
        sys.exit(f"{program} does not start: {'; '.join(wrong)}")


def _take(name: str) -> str | None:
    """Puts a secret into its variable; tells what is wrong with it, never the secret itself."""
    file = os.environ.get(f"{name}_FILE")
    if file:
        try:
            os.environ[name] = Path(file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            return f"{name}_FILE names {file}, which cannot be read ({type(error).__name__})"
    value = os.environ.get(name, "")
    if not value:
        return f"{name} is missing; set it, or let {name}_FILE name a file that holds it"
    if name.endswith("AUTH_STRING"):
        user, _, value = value.partition(":")
        if not user or not value:
            return f"{name} is not of the form USER:PASSWORD"
    if _known(value):
        return f"{name} is a password that everybody knows; choose another, such as `openssl rand -hex 24` gives"
    if len(value) < SHORTEST:
        return f"{name} has fewer than {SHORTEST} characters"
    return None


def _known(password: str) -> bool:
    plain = password.lower().translate(str.maketrans("@$", "as"))
    for spelt in (plain, plain.replace("0", "o")):
        if KNOWN.fullmatch(re.sub("[^a-z]", "", spelt)):
            return True
    return len(set(password)) < 4 or any(password in digits for digits in COUNTED)
