"""What is known of a data set: the card that the download stage leaves beside the files it brought."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fadeformer.errors import UserError
from fadeformer.io.atomic import read_json, write_json
from fadeformer.tasks import TASKS, Task

SPLITS = ("train", "val", "test")
CARD_FILE = "dataset.json"


@dataclass(frozen=True)
class DatasetCard:
    """One data set as it lies in `data/raw`.

    Attributes:
        name: as in `dataset.name`; of a user's own files own- and their name.
        file: the archive or folder of images, or the first of several.
        sha256: checksum of what was brought; of several files, of all of them.
        task: a key of `fadeformer.tasks.TASKS`.
        classes: name of each class or finding.
        size: side of an image, pixels; None where sizes differ.
        channels: 1 (grey) or 3 (colour); None where that differs.
        counts: images that there must be, where its authors say so: by split, of train_val together, or of all.
        licence: under which it may be used.
        note: what a reader of a result must know, such as that the images are synthetic.
        layout: in which the images and labels lie: a key of `fadeformer.data.manifest.TABLE_READERS`.
        files: name and SHA-256 of each file, where there are several.
        mirrors: whether a mirrored image keeps its label; not where left and right are classes.
    """

    name: str
    file: str
    sha256: str
    task: str
    classes: tuple[str, ...]
    size: int | None
    channels: int | None
    counts: dict[str, int] | None
    licence: str
    note: str
    layout: str = "npz"
    files: dict[str, str] = field(default_factory=dict)
    mirrors: bool = True

    @property
    def task_spec(self) -> Task:
        """The task by its name."""
        return TASKS[self.task]


def infer_task(multi_label: bool, classes: int, wanted: str | None, source: Path) -> str:
    """The task that a user's own labels ask for: a key of `fadeformer.tasks.TASKS`.

    Args:
        multi_label: whether there is one column of 0 and 1 for each finding.
        classes: how many classes or findings.
        wanted: `dataset.task`: grades in an order cannot be told from other classes; None for what is found.
        source: of the labels, for the message.

    Raises:
        UserError: the labels are not of that task.
    """
    found = "multi-label, binary-class" if multi_label else "binary-class" if classes == 2 else "multi-class"
    single = ("ordinal-regression", "multi-class")
    if wanted in (None, found) or (wanted in single and not multi_label):
        return "ordinal-regression" if wanted == "ordinal-regression" else found
    raise UserError(f"dataset.task is {wanted}, but the labels of {source} are {found}; set it to null")


def combined_digest(files: Mapping[str, str]) -> str:
    """SHA-256 of several files, from that of each by name."""
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in files.items()).encode()).hexdigest()


def write_card(facts: DatasetCard, folder: Path) -> None:
    """Leaves the card in `folder`."""
    write_json(folder / CARD_FILE, asdict(facts))


def read_card(folder: Path) -> DatasetCard:
    """Reads the card.

    Raises:
        UserError: there is none.
    """
    try:
        values = read_json(folder / CARD_FILE)
        return DatasetCard(**{**values, "classes": tuple(values["classes"])})
    except OSError as error:
        raise UserError(f"{folder / CARD_FILE}: not found; run `dvc repro download` first") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / CARD_FILE}: damaged, or of another version; run `dvc repro -f download`") from error
