"""The sources by name. Each ends in the same: files in a folder, and a card that says what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fadeformer.datasets import facts, medmnist, npz, phantom
from fadeformer.datasets.facts import Facts
from fadeformer.files import checksum


def fetch(
    *,
    name: str,
    size: int,
    mirror: str | None,
    root: str,
    classes: list[str] | None,
    images: int,
    seed: int,
    downloads: Path,
    folder: Path,
) -> Facts:
    """Brings a data set into `folder`, with its card.

    Args:
        name: phantom, npz, or a MedMNIST flag.
        size: MedMNIST, phantom: side of an image, pixels.
        mirror: MedMNIST: folder or URL that holds the archives; None for the published address.
        root: npz: the user's own archive.
        classes: npz: names of the classes, if any.
        images: phantom: how many.
        seed: phantom: of the drawing.
        downloads: where verified downloads stay.
        folder: an empty folder.

    Raises:
        UserError: the data cannot be had, or are not what they should be.
    """
    if name == "phantom":
        found = _draw_phantom(images, size, seed, folder)
    elif name == "npz":
        found = npz.fetch(Path(root), classes, folder)
    else:
        found = medmnist.fetch(name, size, mirror, downloads, folder)
    facts.write(found, folder)
    return found


def _draw_phantom(images: int, size: int, seed: int, folder: Path) -> Facts:
    archive = folder / "phantom.npz"
    np.savez(archive, **phantom.draw(images, size, seed))  # type: ignore[arg-type]
    return Facts(
        name="phantom",
        file=archive.name,
        sha256=checksum(archive, "sha256"),
        task="multi-class",
        classes=phantom.CLASSES,
        size=size,
        channels=3,
        counts=None,
        licence="MIT, as this project",
        note="Synthetic: every image is drawn by a program. Results on it say nothing about patients.",
    )
