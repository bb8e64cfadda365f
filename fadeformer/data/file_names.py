r"""Patients in file names: `person12_virus_30.png` and `person12_virus_31.png` may show the same person.

A file name is cut into tokens at its separators (`_`, `-`, `.`, spaces, brackets). Its first tokens are the stem of a
patient or an original if many names share them and differ in what follows. Not a stem: a counter, a part that all
names share, the name of a class, a year or a date. Names of several kinds (`person12_virus_30`, `IM-0115-0001`) are
distinguished by the letters of their first token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import pandas as pd

from fadeformer.errors import UserError

SEPARATOR = r"[\W_]+"
PART = r"[^\W_]+"
END = r"(?![^\W_])"  # no letter or digit follows
DATE = re.compile(r"(19|20)\d\d(\d{4})?")
# before the stem of an augmented copy, with or without the number of the copy
COPY_MARKS = (r"(?i:aug|augmented)[_-]\d+[_-]", r"(?i:aug|augmented)[\W_]+")
PATIENT = re.compile(rf"(?<![^\W_])((?i:patient|person|subject|subj|pat|case)){SEPARATOR}?\d+{END}")
MAX_KINDS = 20  # first tokens with more different letters are no kinds of names, but names of patients
MIN_STEMS = 10  # fewer can be patients only if they are numbered
MIN_NUMBERED_STEMS = 3
MIN_REPEATED = 0.1  # share of the images whose stem another name has, too
MAX_EXAMPLES = 3


class NamePattern(NamedTuple):
    """A regular expression that finds a patient or original in file names, and its images in two splits.

    Attributes:
        pattern: with one group, for `split.group_from`.
        is_in_two_splits: mask of the images whose stem is in two splits, by image.
        stems: number of these stems.
        examples: the first of these stems, each with a file name in two splits.
    """

    pattern: str
    is_in_two_splits: pd.Series
    stems: int
    examples: list[str]


def groups_from_names(names: pd.Series, pattern: str) -> pd.Series:
    """Return the group in each file name, matched by the only group of a regular expression; null without a match.

    Args:
        names: paths of the images. The pattern is searched in the file name, or if it has a `/`, in the path.
        pattern: value of `split.group_from`.

    Raises:
        UserError: no name matches.
    """
    texts = names if "/" in pattern else names.map(lambda name: PurePosixPath(name).name)
    groups = texts.astype(object).str.extract(pattern, expand=False)
    if groups.isna().all() and len(names):
        raise UserError(
            f"params.yaml: split.group_from {pattern!r} matches none of {len(names):,} file names, such as"
            f" {texts.iloc[0]}; correct it, or set it to null"
        )
    return groups.where(groups.notna(), None)


def find_pattern(names: pd.Series, labels: pd.Series, splits: pd.Series) -> NamePattern | None:
    """Find a pattern of file names by which images of the same patient or original are in two splits.

    Args:
        names: paths of the images.
        labels: their labels, as any text: a token that is one per class is no patient.
        splits: their splits.

    Returns:
        None if the names have no such pattern, or no stem is in two splits.
    """
    stems = names.map(lambda name: PurePosixPath(name).stem).astype(object)
    marked = [pattern for mark in COPY_MARKS if (pattern := _build_pattern(stems, labels, mark))]
    patterns = marked or [pattern for pattern in [_build_pattern(stems, labels, None)] if pattern]
    files = names.map(lambda name: PurePosixPath(name).name).astype(object)
    candidates = [(pattern, files.str.extract(pattern, expand=False)) for pattern in patterns]
    if not candidates:
        return None
    # of aug_17_0 and aug_0_17, the number of the copy has fewer values than that of the original
    pattern, groups = max(candidates, key=lambda candidate: candidate[1].nunique())
    crosses = splits.groupby(groups).transform("nunique").fillna(0) > 1
    if not crosses.any():
        return None
    crossing = pd.DataFrame({"group": groups, "split": splits, "name": names})[crosses]
    first = crossing.drop_duplicates(["group", "split"]).groupby("group", sort=False)["name"]
    examples = [f"{group}: {', '.join(paths.head(2))}" for group, paths in list(first)[:MAX_EXAMPLES]]
    return NamePattern(pattern, crosses, groups[crosses].nunique(), examples)


def _build_pattern(stems: pd.Series, labels: pd.Series, mark: str | None) -> str | None:
    """Build a pattern for file names that may start with a copy mark; None if no kind of names has repeated stems."""
    bodies = stems
    if mark:
        bodies = stems.str.replace(f"^{mark}", "", regex=True)
        if bodies.equals(stems):
            return None
    elif word := _patient_word(stems):
        return rf"(?<![^\W_])({word}{SEPARATOR}?\d+){END}"
    tokens = bodies.map(lambda body: re.findall(PART, body))
    kinds = tokens.map(lambda parts: re.sub(r"\d+", "#", parts[0]) if parts else "")
    if kinds.nunique() > MAX_KINDS:
        kinds = pd.Series("", index=stems.index)
    prefixes = [
        prefix
        for _, rows in kinds.groupby(kinds)
        if (prefix := _prefix_of_kind(bodies[rows.index], tokens[rows.index], stems[rows.index], labels[rows.index]))
    ]
    if not prefixes:
        return None
    return f"^{f'(?:{mark})?' if mark else ''}({'|'.join(dict.fromkeys(prefixes))}){END}"


def _patient_word(stems: pd.Series) -> str | None:
    """Return the word that numbers the patients inside most names, such as `patient`; None if there is none."""
    words = stems.map(lambda stem: match[1] if (match := PATIENT.search(stem, 1)) else None)
    if words.notna().mean() <= 0.5 or len(set(words.dropna())) > 1:
        return None
    numbers = stems.map(lambda stem: match[0] if (match := PATIENT.search(stem, 1)) else None)
    return (
        str(words.dropna().iloc[0]) if numbers.nunique() >= MIN_NUMBERED_STEMS and _is_shared(numbers, stems) else None
    )


def _prefix_of_kind(bodies: pd.Series, tokens: pd.Series, stems: pd.Series, labels: pd.Series) -> str | None:
    """Return a pattern of the first tokens that are a stem in names of one kind: the shortest one; None without."""
    fallback, previous = None, 1
    for count in range(1, int(tokens.map(len).max()) + 1):
        keys = tokens.map(lambda parts, count=count: tuple(parts[:count]) if len(parts) >= count else None)
        num_keys = keys.nunique()
        last = tokens.map(lambda parts, count=count: parts[count - 1] if len(parts) >= count else None).dropna()
        is_class = keys.groupby(labels).nunique().max() <= 1
        if num_keys <= previous or is_class or last.map(lambda token: DATE.fullmatch(token) is not None).all():
            previous = max(previous, num_keys)
            continue
        previous = num_keys
        if not _is_shared(keys, stems):
            continue
        if num_keys >= MIN_STEMS:
            return _prefix_pattern(bodies, tokens, count)
        if num_keys >= MIN_NUMBERED_STEMS and last.str.contains(r"\d").all():
            fallback = _prefix_pattern(bodies, tokens, count)
    return fallback


def _is_shared(keys: pd.Series, stems: pd.Series) -> bool:
    """Return True if enough names share their key with a different name (the same name is a counter's)."""
    return bool((stems.groupby(keys).transform("nunique").fillna(0) > 1).mean() >= MIN_REPEATED)


def _prefix_pattern(bodies: pd.Series, tokens: pd.Series, count: int) -> str:
    """Return a pattern of the first `count` tokens and the separators between them."""
    separators = bodies.map(lambda body: re.findall(SEPARATOR, body.lstrip("_-. ()")))
    parts = []
    for position in range(count):
        if position:
            between = separators.map(lambda parts, i=position - 1: parts[i] if len(parts) > i else None)
            parts.append(re.escape(between.dropna().iloc[0]) if len(set(between.dropna())) == 1 else SEPARATOR)
        parts.append(_token_pattern([row[position] for row in tokens if len(row) > position]))
    return "".join(parts)


def _token_pattern(values: Sequence[str]) -> str:
    """Return a pattern of tokens: the same letters around numbers, or any token."""
    if len(set(values)) == 1:
        return re.escape(values[0])
    shapes = {re.sub(r"\d+", "#", value) for value in values}
    return re.escape(shapes.pop()).replace(r"\#", r"\d+") if len(shapes) == 1 else PART
