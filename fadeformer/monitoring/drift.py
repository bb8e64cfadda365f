"""Are new images like those that a model was made with? Scores, distances and pixels column by column, features as one.

A column drifts where a two-sample Kolmogorov-Smirnov test (SciPy's) says so after Benjamini and Hochberg's correction
over all columns, and the largest distance of the two distribution functions is large enough to matter: among many
images the smallest difference is beyond chance. The features, which are many and go together, are compared by a
classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv:1610.06545): a logistic regression that is to tell new
images from known ones, judged on those that it has not been fitted to, by its AUC with DeLong's interval.
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

MIN_IMAGES = 20  # images that are compared
MAX_COMPONENTS = 50  # of the features, at most, that the logistic regression gets
NUM_FOLDS = 5
ALPHA = 0.01  # of the corrected p-values, and of the interval: who looks every week is not to be called for nothing
MIN_KS_DISTANCE = 0.1  # distance of the distribution functions from which a difference matters
MIN_CLASSIFIER_AUC = 0.6  # AUC from which features count as others; 0.5 cannot tell them apart


@dataclass(frozen=True)
class ColumnDrift:
    """How far one number of the images has moved.

    Attributes:
        name: of the column.
        reference: its median in the reference.
        new: its median in the new images.
        distance: largest difference of the two distribution functions, 0 to 1.
        p: corrected for all columns.
        drifted: whether the difference is beyond chance and matters.
    """

    name: str
    reference: float
    new: float
    distance: float
    p: float
    drifted: bool


@dataclass(frozen=True)
class DriftResult:
    """What has moved.

    Attributes:
        images: new ones that were compared.
        columns: those that moved furthest first.
        auc: of telling new images from known ones by their features.
        interval: of it.
        features_drifted: whether they can be told apart beyond chance, and well enough to matter.
    """

    images: int
    columns: tuple[ColumnDrift, ...]
    auc: float
    interval: tuple[float, float] | None
    features_drifted: bool

    @property
    def drifted(self) -> list[str]:
        """What has drifted, by name."""
        columns = [column.name for column in self.columns if column.drifted]
        return [*columns, *(["features"] if self.features_drifted else [])]


def detect_drift(known: pd.DataFrame, new: pd.DataFrame) -> DriftResult:
    """Compares new images with known ones.

    Args:
        known: of `fadeformer.monitoring.reference.build_reference`.
        new: the same columns of the new images; a row with a gap is an image that could not be read, and left out.

    Raises:
        UserError: either has too few images.
    """
    new = new[known.columns].dropna()
    for rows, what in ((known, "the model carries numbers of"), (new, "there are")):
        if len(rows) < MIN_IMAGES:
            raise UserError(f"{what} {len(rows)} images that can be compared, and {MIN_IMAGES} are needed")
    is_feature = known.columns.str.startswith(FEATURE_PREFIX)
    names = known.columns[~is_feature]
    tests = [ks_2samp(known[name], new[name]) for name in names]
    corrected = false_discovery_control([test.pvalue for test in tests])
    columns = [
        ColumnDrift(
            str(name), float(known[name].median()), float(new[name].median()), float(test.statistic), float(p),
            bool(p < ALPHA and test.statistic >= MIN_KS_DISTANCE),
        )
        for name, test, p in zip(names, tests, corrected, strict=True)
    ]  # fmt: skip
    columns.sort(key=lambda column: -column.distance)
    auc, interval = _classifier_two_sample_test(known.loc[:, is_feature], new.loc[:, is_feature])
    apart = interval is not None and interval[0] > 0.5 and auc >= MIN_CLASSIFIER_AUC
    return DriftResult(len(new), tuple(columns), auc, interval, apart)


def _classifier_two_sample_test(known: pd.DataFrame, new: pd.DataFrame) -> tuple[float, tuple[float, float] | None]:
    features = np.concatenate([known.to_numpy(np.float64), new.to_numpy(np.float64)])
    is_new = np.arange(len(features)) >= len(known)
    components = min(MAX_COMPONENTS, features.shape[1], len(features) // (2 * NUM_FOLDS))
    judge = make_pipeline(
        StandardScaler(), PCA(components, random_state=0), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    score = cross_val_predict(judge, features, is_new, cv=folds, method="predict_proba")[:, 1]
    found = delong.estimate_aucs([is_new], [score])
    return float(found.areas[0]), delong.mean_auc_interval(found, [0], 1 - ALPHA)
