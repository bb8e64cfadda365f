"""What to do about a failed check: one remedy for each check of data validation."""

from __future__ import annotations

from fadeformer.data.manifest import LEAKAGE_CHECKS, Manifest

FIX_COMMAND = "python -m pipelines.stages.validate --fix"
EXCLUDE = "leave the images out with split.exclude"
FETCH_AGAIN = "fetch the data set again, or use it as your own with dataset.name: folder or npz"
NEW_SPLIT = "add images, or make a new split with split.resplit: true"
REMEDIES = {
    "split_missing": f"put images into each of train, val and test, or {NEW_SPLIT.removeprefix('add images, or ')}",
    "published_counts": FETCH_AGAIN,
    "unreadable_image": f"replace or convert the files, or {EXCLUDE}",
    "blank_image": f"replace the files, or {EXCLUDE}",
    "unexpected_mode": FETCH_AGAIN,
    "unexpected_size": FETCH_AGAIN,
    "colliding_names": "rename one file of each pair",
    **dict.fromkeys(LEAKAGE_CHECKS, f"`{FIX_COMMAND}` proposes a split without leakage"),
    "same_image_two_labels": f"correct the labels, or {EXCLUDE}; `{FIX_COMMAND}` writes a list of them",
    "near_duplicate_two_labels": f"compare the pairs on the page and correct the labels, or {EXCLUDE}",
    "label_out_of_range": f"correct the labels or dataset.classes, or {EXCLUDE}",
    "class_missing": f"merge the class with another in the labels, {NEW_SPLIT}",
    "class_too_small": f"{NEW_SPLIT}; metrics of so few images are not reliable",
    "finding_without_images": f"{NEW_SPLIT}; a finding with so few images is left out of what selects the epoch",
    "label_shift": "check that the splits are of the same population, or make a new split with split.resplit: true",
}
# checks of single images, which a new split cannot correct; `--fix` lists their images for split.exclude
EXCLUDABLE_CHECKS = ("unreadable_image", "blank_image", "same_image_two_labels", "label_out_of_range")


def remedy(check: str, data: Manifest) -> str:
    """Return the remedy for a failed check of a manifest, a sentence part without a full stop."""
    if check == "patients_in_file_names" and data.name_pattern is not None:
        pattern = data.name_pattern.pattern.replace("'", "''")
        return (
            f"if these are patients or originals, set split.group_from: '{pattern}', and split.resplit: true for a new"
            f" split; to keep the images of a given split where possible, run `{FIX_COMMAND}` instead of the latter"
        )
    return REMEDIES[check]
