"""Dataset card: metadata of a dataset that the download stage writes next to the raw files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fadeformer.data.decode import EIGHT_BITS, PixelRange
from fadeformer.errors import UserError
from fadeformer.io.atomic import read_json, write_json
from fadeformer.tasks import TASKS, Task

SPLITS = ("train", "val", "test")
CARD_FILE = "dataset.json"
# columns of the table of `fadeformer predict`, which has one more for each class
RESERVED_CLASS_NAMES = ("name", "decision", "ood_distance", "is_ood", "error")


@dataclass(frozen=True)
class DatasetCard:
    """Metadata of the dataset in `data/raw`.

    Attributes:
        name: `dataset.name`, or `own-` and the file name for the user's own files.
        file: archive or folder of the images; the first of several.
        sha256: SHA-256 of the file, or combined digest of several files.
        task: key of `fadeformer.tasks.TASKS`.
        classes: names of the classes or findings.
        size: image side, pixels; None if sizes differ.
        channels: 1 (grayscale) or 3 (RGB); None if mixed.
        counts: published number of images, if known: by split, for train_val, or in total.
        license: license of the data.
        note: caveat to report with every result, such as that the images are synthetic.
        layout: storage layout of images and labels: a key of `fadeformer.data.manifest.TABLE_READERS`.
        files: SHA-256 by file name, if there are several files.
        pixel_range: stored values that become black and white in images of more than 8 bits.
        mirrors: whether a horizontal flip keeps the label; False if left and right are classes.
    """

    name: str
    file: str
    sha256: str
    task: str
    classes: tuple[str, ...]
    size: int | None
    channels: int | None
    counts: dict[str, int] | None
    license: str
    note: str
    layout: str = "npz"
    files: dict[str, str] = field(default_factory=dict)
    mirrors: bool = True
    pixel_range: PixelRange = EIGHT_BITS

    @property
    def task_spec(self) -> Task:
        """Task definition by its name."""
        return TASKS[self.task]


def infer_task(multi_label: bool, classes: int, requested: str | None, source: Path) -> str:
    """Infer the task of a user's own labels: a key of `fadeformer.tasks.TASKS`.

    Args:
        multi_label: whether there is one binary column per finding.
        classes: number of classes or findings.
        requested: value of `dataset.task`, needed for ordinal grades; None to infer it from the labels.
        source: file of the labels, for the error message.

    Raises:
        UserError: the labels do not match the requested task.
    """
    inferred = "multi-label, binary-class" if multi_label else "binary-class" if classes == 2 else "multi-class"
    single = ("ordinal-regression", "multi-class")
    if requested in (None, inferred) or (requested in single and not multi_label):
        return "ordinal-regression" if requested == "ordinal-regression" else inferred
    raise UserError(f"dataset.task is {requested}, but the labels in {source} are {inferred}; set it to null")


def check_class_names(card: DatasetCard) -> None:
    """Raise a UserError if a class has the name of another column of a prediction table."""
    if clash := next((name for name in card.classes if name in RESERVED_CLASS_NAMES), None):
        raise UserError(
            f"the class name {clash!r} is reserved for a column of predictions, as are"
            f" {', '.join(name for name in RESERVED_CLASS_NAMES if name != clash)}; rename the class"
        )


def combined_digest(files: Mapping[str, str]) -> str:
    """Combined SHA-256 of several files, computed from their individual digests by name."""
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in files.items()).encode()).hexdigest()


def write_card(card: DatasetCard, folder: Path) -> None:
    """Write the card to `dataset.json` in a folder."""
    write_json(folder / CARD_FILE, asdict(card))


def read_card(folder: Path) -> DatasetCard:
    """Read the card from `dataset.json` in a folder.

    Raises:
        UserError: the file is missing, damaged or from another version.
    """
    try:
        values = read_json(folder / CARD_FILE)
        return DatasetCard(
            **{**values, "classes": tuple(values["classes"]), "pixel_range": PixelRange(*values["pixel_range"])}
        )
    except OSError as error:
        raise UserError(f"{folder / CARD_FILE}: not found; run `dvc repro download` first") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder / CARD_FILE}: corrupt or from another version; run `dvc repro -f download`"
        ) from error
