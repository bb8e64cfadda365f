"""Drift detection: compare scores, OOD distances, pixel statistics and features of new images with the reference data.

Two families of columns are compared, pixel statistics and the outputs of the model, because they have different
reference images (`fadeformer.monitoring.reference`). In each family every column is compared by its Kolmogorov-Smirnov
distance, and the features, which are many and correlated, by a classifier; permutations of whole groups adjust the
p-values for all of them (`fadeformer.monitoring.group_tests`). A column drifts if its p-value, times the number of
families (Bonferroni), is below `ALPHA` and the difference is large enough to be relevant: with many images the smallest
difference is significant. So at most `ALPHA` of the checks of images without drift raise an alarm.

With fewer than `MIN_GROUPS` groups on either side a family is not assessed: no difference could be significant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from fadeformer.errors import UserError
from fadeformer.monitoring import group_tests
from fadeformer.monitoring.reference import FEATURE_PREFIX, GROUP, IMAGE_PREFIX, IMAGES_PER_GROUP

MIN_IMAGES = 20  # on either side of the comparison
MIN_GROUPS = 8  # on either side; with 7 and 7 even complete separation would not be significant among 16 columns
ALPHA = 0.01  # false alarms per check of images without drift, as a check may run every week
MIN_KS_DISTANCE = 0.1  # smaller differences are ignored even if significant
MIN_CLASSIFIER_AUC = 0.6  # of the two-sample test; 0.5 means indistinguishable
CONFIRMATION_SHARE = 0.2  # of the presumed number of groups: so small a subset has few images of the same group
SAMPLING_SEED = 0  # of this subset
PIXELS, OUTPUTS = "pixel statistics", "scores, OOD distance and features"  # families
FEATURES = "features"  # name of the test of all features in messages

Status = Literal["drifted", "no drift", "not assessed"]


@dataclass(frozen=True)
class ColumnDrift:
    """Drift of one column.

    Attributes:
        name: of the column.
        reference: median of the reference.
        new: median of the new images.
        distance: KS distance, the largest difference of the two distribution functions, in [0, 1]; each group counts
            the same. None if not assessed for lack of groups.
        p: p-value, corrected for all comparisons. None if not assessed for lack of groups.
        status: of the column.
    """

    name: str
    reference: float
    new: float
    distance: float | None
    p: float | None
    status: Status


@dataclass(frozen=True)
class FeatureDrift:
    """Drift of all features together.

    Attributes:
        auc: cross-validated AUC of a classifier that separates new images from the reference; each group counts the
            same. None if not assessed for lack of groups.
        p: p-value, corrected for all comparisons. None if not assessed for lack of groups.
        status: of the features.
    """

    auc: float | None
    p: float | None
    status: Status


@dataclass(frozen=True)
class Family:
    """A family of comparisons on the same images.

    Attributes:
        name: `PIXELS` or `OUTPUTS`.
        images: number of reference images.
        groups: number of reference groups.
        problem: why it is not assessed; empty if it is.
    """

    name: str
    images: int
    groups: int
    problem: str


@dataclass(frozen=True)
class DriftResult:
    """Result of a drift check.

    Attributes:
        images: number of new images that were compared.
        groups: number of their groups.
        has_groups: whether their groups are known; otherwise each image counts as its own group.
        families: of comparisons.
        columns: by decreasing KS distance.
        features: all features together.
        unconfirmed: names of the columns that differ only if each image is of another group.
    """

    images: int
    groups: int
    has_groups: bool
    families: tuple[Family, ...]
    columns: tuple[ColumnDrift, ...]
    features: FeatureDrift
    unconfirmed: tuple[str, ...] = ()

    @property
    def drifted(self) -> list[str]:
        """Names of the drifted columns; `features` if the features drifted."""
        names = [column.name for column in self.columns if column.status == "drifted"]
        return [*names, *([FEATURES] if self.features.status == "drifted" else [])]

    @property
    def unchanged(self) -> list[str]:
        """Names of the columns that have not drifted; `features` if the features have not."""
        names = [column.name for column in self.columns if column.status == "no drift"]
        return [*names, *([FEATURES] if self.features.status == "no drift" else [])]

    @property
    def not_assessed(self) -> list[str]:
        """Comparisons that were not assessed, each with the reason."""
        problems = [f"{family.name} ({family.problem})" for family in self.families if family.problem]
        if self.unconfirmed:
            problems.append(
                f"{', '.join(self.unconfirmed)} (the difference is significant only if each image is of another group;"
                " give the groups)"
            )
        return problems


def detect_drift(reference: pd.DataFrame, new: pd.DataFrame, *, has_groups: bool) -> DriftResult:
    """Compare new images with the reference data.

    If the groups of the new images are unknown, each image is its own group. A difference is then reported only if it
    is also significant in a random subset that has few images of the same group if the new images are grouped like the
    reference. Otherwise it may be that of a few groups, and is not assessed.

    Args:
        reference: output of `fadeformer.monitoring.reference.build_reference`.
        new: the same columns of the new images; rows with missing values (unreadable images) are dropped.
        has_groups: whether the column `group` of `new` is known. Otherwise it is ignored.

    Raises:
        UserError: either table has fewer than `MIN_IMAGES` images.
    """
    new = new[reference.columns] if has_groups else new[reference.columns.drop(GROUP)]
    new = new.dropna()
    for rows, source in ((reference, "the reference data of the model"), (new, "the input")):
        if len(rows) < MIN_IMAGES:
            raise UserError(f"{source} has {len(rows)} usable images; at least {MIN_IMAGES} are needed")
    if not has_groups:
        new = new.assign(**{GROUP: np.arange(len(new))})
    result = replace(_compare(reference, new), has_groups=has_groups)
    images_per_group = reference.attrs[IMAGES_PER_GROUP]
    if has_groups or images_per_group == 1 or not result.drifted:
        return result
    size = max(1, round(CONFIRMATION_SHARE * len(new) / images_per_group))
    subset = new.sample(size, random_state=SAMPLING_SEED)
    return _keep_confirmed(result, _compare(reference, subset).drifted)


def _keep_confirmed(result: DriftResult, confirmed: list[str]) -> DriftResult:
    """Mark what drifted but is not confirmed as not assessed."""
    unconfirmed = tuple(name for name in result.drifted if name not in confirmed)
    columns = tuple(
        replace(column, status="not assessed") if column.name in unconfirmed else column for column in result.columns
    )
    features = replace(result.features, status="not assessed") if FEATURES in unconfirmed else result.features
    return replace(result, columns=columns, features=features, unconfirmed=unconfirmed)


def _compare(reference: pd.DataFrame, new: pd.DataFrame) -> DriftResult:
    names = reference.columns.drop(GROUP)
    is_pixel = names.str.startswith(IMAGE_PREFIX)
    families, columns = [], []
    features = FeatureDrift(None, None, "not assessed")
    for family_name, family_names in ((PIXELS, names[is_pixel]), (OUTPUTS, names[~is_pixel])):
        rows = reference[[*family_names, GROUP]].dropna()
        is_feature = family_names.str.startswith(FEATURE_PREFIX)
        problem = _find_problem(rows[GROUP].nunique(), new[GROUP].nunique())
        families.append(Family(family_name, len(rows), rows[GROUP].nunique(), problem))
        column_names = list(family_names[~is_feature])
        if problem:
            columns += [_column(name, rows, new, None, None) for name in column_names]
            continue
        compared, auc, p = _test_family(rows, new, column_names, list(family_names[is_feature]))
        columns += compared
        if auc is not None and p is not None:
            features = FeatureDrift(auc, p, _status(p, auc >= MIN_CLASSIFIER_AUC))
    columns.sort(key=lambda column: -(column.distance or 0.0))
    return DriftResult(len(new), new[GROUP].nunique(), True, tuple(families), tuple(columns), features)


def _find_problem(reference_groups: int, new_groups: int) -> str:
    """Return why groups are too few to compare; empty if they are not."""
    few = [
        f"{count} {source}"
        for count, source in ((reference_groups, "in the reference"), (new_groups, "in the new images"))
        if count < MIN_GROUPS
    ]
    return f"too few groups: {' and '.join(few)}, at least {MIN_GROUPS} are needed" if few else ""


def _test_family(
    reference: pd.DataFrame, new: pd.DataFrame, names: list[str], feature_names: list[str]
) -> tuple[list[ColumnDrift], float | None, float | None]:
    """Test columns and features together; return the columns, and the AUC and p-value of the features, if any."""
    rows = pd.concat([reference, new], ignore_index=True)
    is_new = np.arange(len(rows)) >= len(reference)
    groups = pd.factorize(pd.MultiIndex.from_arrays([is_new, rows[GROUP]]))[0].astype(np.int64)
    assignments = group_tests.permute_groups(group_tests.group_means(is_new[:, None], groups)[:, 0] > 0)
    tests = [group_tests.studentized_ks(rows[name].to_numpy(np.float64), groups, assignments) for name in names]
    statistics = [statistic for statistic, _ in tests]
    auc = None
    if feature_names:
        features = rows[feature_names].to_numpy(np.float64)
        statistic, scores = group_tests.classifier_statistics(features, groups, assignments)
        statistics.append(statistic)
        auc = float(roc_auc_score(is_new, scores, sample_weight=1 / np.bincount(groups)[groups]))
    p_values = np.minimum(2 * group_tests.max_t_p_values(statistics), 1)  # two families
    columns = [
        _column(name, reference, new, distance, float(p))
        for name, (_, distance), p in zip(names, tests, p_values[: len(names)], strict=True)
    ]
    return columns, auc, float(p_values[-1]) if feature_names else None


def _column(
    name: str, reference: pd.DataFrame, new: pd.DataFrame, distance: float | None, p: float | None
) -> ColumnDrift:
    medians = float(reference[name].median()), float(new[name].median())
    if distance is None or p is None:
        return ColumnDrift(name, *medians, None, None, "not assessed")
    return ColumnDrift(name, *medians, distance, p, _status(p, distance >= MIN_KS_DISTANCE))


def _status(p: float, is_relevant: bool) -> Status:
    return "drifted" if p < ALPHA and is_relevant else "no drift"
