"""Drift detection: compare scores, OOD distances, pixel statistics and features of new images with the reference data.

A column drifts if a two-sample Kolmogorov-Smirnov test is significant after the Benjamini-Hochberg correction over all
columns, and the KS distance is large enough to be relevant: with many images the smallest difference is significant.
The features, which are many and correlated, are compared by a classifier two-sample test (Lopez-Paz and Oquab 2017,
arXiv:1610.06545): the cross-validated AUC of a logistic regression that separates new images from the reference, with a
DeLong interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, ks_2samp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fadeformer.errors import UserError
from fadeformer.evaluation.intervals import delong
from fadeformer.monitoring.reference import FEATURE_PREFIX

MIN_IMAGES = 20  # on either side of the comparison
MAX_COMPONENTS = 50  # principal components of the features in the logistic regression
NUM_FOLDS = 5
ALPHA = 0.01  # for the corrected p-values and the AUC interval; limits false alarms in weekly checks
MIN_KS_DISTANCE = 0.1  # smaller differences are ignored even if significant
MIN_CLASSIFIER_AUC = 0.6  # of the two-sample test; 0.5 means indistinguishable


@dataclass(frozen=True)
class ColumnDrift:
    """Drift of one column.

    Attributes:
        name: of the column.
        reference: median of the reference.
        new: median of the new images.
        distance: KS distance, the largest difference of the two distribution functions, in [0, 1].
        p: p-value, corrected for the number of columns.
        drifted: whether the difference is significant and large enough to be relevant.
    """

    name: str
    reference: float
    new: float
    distance: float
    p: float
    drifted: bool


@dataclass(frozen=True)
class DriftResult:
    """Result of a drift check.

    Attributes:
        images: number of new images that were compared.
        columns: by decreasing KS distance.
        auc: AUC of the classifier two-sample test on the features.
        interval: confidence interval of `auc`.
        features_drifted: whether `auc` is significantly above 0.5 and large enough to be relevant.
    """

    images: int
    columns: tuple[ColumnDrift, ...]
    auc: float
    interval: tuple[float, float] | None
    features_drifted: bool

    @property
    def drifted(self) -> list[str]:
        """Names of the drifted columns; `features` if the features drifted."""
        columns = [column.name for column in self.columns if column.drifted]
        return [*columns, *(["features"] if self.features_drifted else [])]


def detect_drift(reference: pd.DataFrame, new: pd.DataFrame) -> DriftResult:
    """Compare new images with the reference data.

    Args:
        reference: output of `fadeformer.monitoring.reference.build_reference`.
        new: the same columns of the new images; rows with missing values (unreadable images) are dropped.

    Raises:
        UserError: either table has fewer than `MIN_IMAGES` images.
    """
    new = new[reference.columns].dropna()
    for rows, source in ((reference, "the reference data of the model"), (new, "the input")):
        if len(rows) < MIN_IMAGES:
            raise UserError(f"{source} has {len(rows)} usable images; at least {MIN_IMAGES} are needed")
    is_feature = reference.columns.str.startswith(FEATURE_PREFIX)
    names = reference.columns[~is_feature]
    tests = [ks_2samp(reference[name], new[name]) for name in names]
    corrected = false_discovery_control([test.pvalue for test in tests])
    columns = [
        ColumnDrift(
            str(name), float(reference[name].median()), float(new[name].median()), float(test.statistic), float(p),
            bool(p < ALPHA and test.statistic >= MIN_KS_DISTANCE),
        )
        for name, test, p in zip(names, tests, corrected, strict=True)
    ]  # fmt: skip
    columns.sort(key=lambda column: -column.distance)
    auc, interval = _classifier_two_sample_test(reference.loc[:, is_feature], new.loc[:, is_feature])
    features_drifted = interval is not None and interval[0] > 0.5 and auc >= MIN_CLASSIFIER_AUC
    return DriftResult(len(new), tuple(columns), auc, interval, features_drifted)


def _classifier_two_sample_test(reference: pd.DataFrame, new: pd.DataFrame) -> tuple[float, tuple[float, float] | None]:
    features = np.concatenate([reference.to_numpy(np.float64), new.to_numpy(np.float64)])
    is_new = np.arange(len(features)) >= len(reference)
    components = min(MAX_COMPONENTS, features.shape[1], len(features) // (2 * NUM_FOLDS))
    classifier = make_pipeline(
        StandardScaler(), PCA(components, random_state=0), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    score = cross_val_predict(classifier, features, is_new, cv=folds, method="predict_proba")[:, 1]
    estimates = delong.estimate_aucs([is_new], [score])
    return float(estimates.areas[0]), delong.mean_auc_interval(estimates, [0], 1 - ALPHA)
