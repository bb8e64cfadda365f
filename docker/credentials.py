"""Validation of the passwords of a container: it does not start if one is missing, short or common."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

MIN_LENGTH = 12  # characters; MLflow requires the same for its accounts
# A password of only such words, digits and punctuation is common: password1234, Change-Me-2026!, ...
COMMON_WORDS = (
    "admin", "administrator", "change", "default", "dummy", "example", "fadeformer", "guest", "iloveyou", "it", "key",
    "letmein", "me", "minio", "mlflow", "my", "none", "now", "null", "pass", "passw", "passwd", "password", "pg",
    "postgres", "postgresql", "prefect", "qwerty", "replace", "root", "rustfs", "seaweedfs", "secret", "super", "test",
    "the", "this", "todo", "trainer", "user", "welcome", "worker", "your",
)  # fmt: skip
COMMON_PATTERN = re.compile(f"(?:{'|'.join(COMMON_WORDS)})+")
DIGIT_SEQUENCES = "01234567890123456789", "98765432109876543210"  # contain 123456789012 etc.


def require(program: str, names: Iterable[str]) -> None:
    """Exit with one message unless all secrets are valid.

    A secret is in the environment variable NAME, or in the file named by NAME_FILE, from which it is loaded into NAME.

    Args:
        program: Name of the program for the message.
        names: Names of the variables.
    """
    problems = [problem for name in names if (problem := _load(name))]
    if problems:
        sys.exit(f"{program} does not start: {'; '.join(problems)}")


def _load(name: str) -> str | None:
    """Load a secret into its variable; return a problem without the secret itself, or None."""
    file = os.environ.get(f"{name}_FILE")
    if file:
        try:
            os.environ[name] = Path(file).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            return f"{name}_FILE names {file}, which cannot be read ({type(error).__name__})"
    value = os.environ.get(name, "")
    if not value:
        return f"{name} is missing; set it, or set {name}_FILE to a file that contains it"
    if name.endswith("AUTH_STRING"):
        user, _, value = value.partition(":")
        if not user or not value:
            return f"{name} does not have the form USER:PASSWORD"
    if _is_common(value):
        return f"{name} is a common password; choose another, for example with `openssl rand -hex 24`"
    if len(value) < MIN_LENGTH:
        return f"{name} has fewer than {MIN_LENGTH} characters"
    return None


def _is_common(password: str) -> bool:
    normalized = password.lower().translate(str.maketrans("@$", "as"))
    for spelling in (normalized, normalized.replace("0", "o")):
        if COMMON_PATTERN.fullmatch(re.sub("[^a-z]", "", spelling)):
            return True
    return len(set(password)) < 4 or any(password in digits for digits in DIGIT_SEQUENCES)
