"""Error rates of the drift check: false alarms without drift, and how often planted drift is found.

    python benchmarks/simulations/drift.py [--sets 200] [--table TABLE]

Images of a patient are correlated (intraclass correlation 0.8). Each set has a reference of val and of three times as
many patients of train, and new images, with 4 pixel statistics, 2 scores, the OOD distance and 32 features. The table
`phantom` draws slides of the demo data set with their stains: 280 slides of train and 40 of val against 80 of test, 5
images each, as in `params.yaml`. Its shift multiplies every pixel of the new images. Every share is in %, with its
Monte Carlo standard error in brackets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import numpy as np
import pandas as pd

from fadeformer.data.sources.phantom import generate
from fadeformer.monitoring import drift, reference

CORRELATION = 0.8  # of images of a patient
PIXELS = tuple(f"{reference.IMAGE_PREFIX}{name}" for name in ("brightness", "contrast", "sharpness", "red"))
OUTPUTS = ("score benign", "score malignant", reference.OOD_DISTANCE)
FEATURES = tuple(f"{reference.FEATURE_PREFIX}{index}" for index in range(32))
SHARED = 0.5  # weight of a factor that all columns share, so that they are correlated
TRAIN_PATIENTS = 3  # per patient of val
DESIGNS = (  # images per patient and patients, of val and of the new images
    (1, 200, 1, 200), (5, 100, 5, 100), (25, 40, 25, 40),
    (1, 40, 1, 40), (5, 20, 5, 20), (25, 10, 25, 10),
    (25, 80, 1, 20), (1, 400, 25, 10), (25, 10, 1, 400),
)  # fmt: skip
SHIFTS = (0.5, 1.0)  # standard deviations of a column over all images
POOL_SLIDES, DEMO_SLIDES = 4000, {"train": 280, "val": 40, "test": 80}
BRIGHTNESS = (1.0, 0.95, 0.9, 0.88, 0.85)  # factor of the pixels of the new images


def simulate(
    patients: int, images: int, rng: np.random.Generator, *, brighter: float = 0.0, features: float = 0.0
) -> pd.DataFrame:
    """Simulate the columns of images of several patients, shifted by standard deviations of a column.

    Args:
        patients: number of patients.
        images: per patient.
        rng: random generator.
        brighter: shift of the brightness.
        features: shift of three features.
    """
    names = (*PIXELS, *OUTPUTS, *FEATURES)
    groups = np.repeat(np.arange(patients), images)

    def draw(columns: int) -> np.ndarray:
        of_patient, of_image = rng.normal(size=(patients, columns)), rng.normal(size=(len(groups), columns))
        return np.sqrt(CORRELATION) * of_patient[groups] + np.sqrt(1 - CORRELATION) * of_image

    values = SHARED * draw(1) + np.sqrt(1 - SHARED**2) * draw(len(names))
    table = pd.DataFrame(values, columns=list(names))
    table[PIXELS[0]] += brighter
    table[list(FEATURES[:3])] += features
    return table.assign(**{reference.GROUP: groups})


def simulate_check(
    design: tuple[int, int, int, int], seed: int, *, has_groups: bool = True, ignored: bool = False, **shift: float
) -> drift.DriftResult:
    """Simulate a reference and new images, and compare them.

    Args:
        design: images per patient and patients, of val and of the new images.
        seed: of all random numbers.
        has_groups: whether the patients of the new images are known.
        ignored: count every image as another patient, on both sides.
        shift: for `simulate`.
    """
    images, patients, new_images, new_patients = design
    rng = np.random.default_rng(seed)
    val = simulate(patients, images, rng)
    train = simulate(TRAIN_PATIENTS * patients, images, rng)
    train = train.sample(min(len(train), reference.MAX_IMAGES), random_state=seed)
    train.loc[:, [*OUTPUTS, *FEATURES]] = np.nan
    train[reference.GROUP] += patients
    table = pd.concat([val, train], ignore_index=True)
    table.attrs = {reference.IMAGES_PER_GROUP: float(images)}
    new = simulate(new_patients, new_images, rng, **shift)
    if ignored:
        table[reference.GROUP], new[reference.GROUP] = np.arange(len(table)), np.arange(len(new))
    return drift.detect_drift(table, new, has_groups=has_groups)


@cache
def phantom_pool() -> tuple[np.ndarray, np.ndarray]:
    """Return images and slides of a large phantom."""
    arrays = generate.draw_dataset(POOL_SLIDES * generate.IMAGES_PER_SLIDE, 28, 1)
    return tuple(np.concatenate([arrays[f"{split}_{kind}"] for split in DEMO_SLIDES]) for kind in ("images", "groups"))


def phantom_check(factor: float, seed: int) -> drift.DriftResult:
    """Compare slides like those of the demo's test split with slides like those of its train and val."""
    images, groups = phantom_pool()
    chosen = np.random.default_rng(seed).permutation(np.unique(groups))
    tables = []
    for name, count in DEMO_SLIDES.items():
        slides, chosen = chosen[:count], chosen[count:]
        rows = np.isin(groups, slides)
        pixels = images[rows] * factor if name == "test" else images[rows]
        table = pd.DataFrame(reference.pixel_statistics(np.rint(pixels).astype(np.uint8)))
        table[reference.OOD_DISTANCE] = np.nan if name == "train" else 0.0
        tables.append(table.assign(**{reference.GROUP: groups[rows]}))
    table = pd.concat(tables[:2], ignore_index=True)
    table.attrs = {reference.IMAGES_PER_GROUP: float(generate.IMAGES_PER_SLIDE)}
    return drift.detect_drift(table, tables[2], has_groups=True)


def format_share(count: int, sets: int) -> str:
    """Format a share in % with its Monte Carlo standard error."""
    share = count / sets
    return f"{100 * share:.1f} ({100 * np.sqrt(share * (1 - share) / sets):.1f})"


def count_results(check: Callable[[int], drift.DriftResult], sets: int) -> tuple[int, int]:
    """Return the number of results with drift, and of those without drift where a column was not confirmed."""
    results = [check(seed) for seed in range(sets)]
    return sum(bool(result.drifted) for result in results), sum(
        bool(result.unconfirmed) and not result.drifted for result in results
    )


def describe(design: tuple[int, int, int, int]) -> str:
    """Describe the patients and images of val and of the new images as table cells."""
    images, patients, new_images, new_patients = design
    return f"| {patients} x {images} | {new_patients} x {new_images} |"


def print_false_alarms(sets: int) -> None:
    print("| val: patients x images | new | false alarms, % |\n| --- | --- | --- |")
    for design in DESIGNS:
        alarms, _ = count_results(lambda seed, design=design: simulate_check(design, seed), sets)
        print(f"{describe(design)} {format_share(alarms, sets)} |", flush=True)


def print_ignored_patients(sets: int) -> None:
    print("| val: patients x images | new | false alarms if patients are ignored, % |\n| --- | --- | --- |")
    for design in DESIGNS[:3]:
        alarms, _ = count_results(lambda seed, design=design: simulate_check(design, seed, ignored=True), sets)
        print(f"{describe(design)} {format_share(alarms, sets)} |", flush=True)


def print_unknown_groups(sets: int) -> None:
    print("| val: patients x images | new, groups unknown | false alarms, % | not assessed, % |")
    print("| --- | --- | --- | --- |")
    for design in DESIGNS[:3]:
        alarms, unconfirmed = count_results(
            lambda seed, design=design: simulate_check(design, seed, has_groups=False), sets
        )
        print(f"{describe(design)} {format_share(alarms, sets)} | {format_share(unconfirmed, sets)} |", flush=True)


def print_found(sets: int) -> None:
    names = [f"{column} {shift} SD" for column in ("brightness", "three features") for shift in SHIFTS]
    print(f"| val: patients x images | new | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}")
    for design in DESIGNS[:3]:
        cells = []
        for column in ("brighter", "features"):
            for shift in SHIFTS:
                found, _ = count_results(
                    lambda seed, design=design, column=column, shift=shift: simulate_check(
                        design, seed, **{column: shift}
                    ),
                    sets,
                )
                cells.append(format_share(found, sets))
        print(f"{describe(design)} {' | '.join(cells)} |", flush=True)


def print_phantom(sets: int) -> None:
    print("| pixels of the new images | drift reported, % |\n| --- | --- |")
    for factor in BRIGHTNESS:
        found, _ = count_results(lambda seed, factor=factor: phantom_check(factor, seed), sets)
        change = "unchanged" if factor == 1 else f"{100 * (1 - factor):.0f} % darker"
        print(f"| {change} | {format_share(found, sets)} |", flush=True)


TABLES = {
    "false_alarms": print_false_alarms,
    "ignored_patients": print_ignored_patients,
    "unknown_groups": print_unknown_groups,
    "found": print_found,
    "phantom": print_phantom,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200, help="simulated checks per cell")
    parser.add_argument("--table", choices=TABLES, help="one table only")
    arguments = parser.parse_args()
    for name in [arguments.table] if arguments.table else TABLES:
        TABLES[name](arguments.sets)
        print()


if __name__ == "__main__":
    main()
