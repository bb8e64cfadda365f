"""MedMNIST AUC and accuracy, against the evaluator and the command line of the medmnist package."""

import math
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from fadeformer.data.sources.medmnist import DATASETS
from fadeformer.evaluation import medmnist_format
from fadeformer.evaluation.metrics import medmnist_accuracy, medmnist_auc
from tests.evaluation.test_metrics import random_predictions

TASKS = ("binary-class", "multi-class", "ordinal-regression", "multi-label, binary-class")
FLAGS = {"breastmnist": 28, "chestmnist": 64}


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    """Evaluator module of medmnist, whose import creates a folder in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        import medmnist
        from medmnist import evaluator
    assert medmnist.__version__ == "3.0.2"  # the version that fadeformer refers to
    return evaluator


def official(evaluator, labels, scores, task):
    """AUC (NaN where a class or finding lacks positives or negatives) and accuracy of medmnist."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about undefined AUCs
        return evaluator.getAUC(labels, scores, task), evaluator.getACC(labels, scores, task)


@pytest.mark.parametrize("task", TASKS)
def test_metrics_equal_the_medmnist_evaluator(evaluator, task):
    absent = 0
    for seed in range(50):
        classes = 2 if task == "binary-class" else max(3, 2 + seed % 4)
        p = random_predictions(
            task, classes, 20 + seed % 30, seed, coarse=seed % 2 == 0, absent=1 if seed % 10 == 0 else None
        )
        auc, accuracy = official(evaluator, p.labels, p.scores, task)
        result = medmnist_auc(p.labels, p.scores, task)
        assert (result is None) == math.isnan(auc)  # None in place of NaN
        absent += result is None
        if result is not None:
            assert abs(result - auc) < 1e-12
        assert abs(medmnist_accuracy(p.labels, p.scores, task) - accuracy) < 1e-12
    assert absent == 5


def test_positive_class_scores_suffice():
    p = random_predictions("binary-class", 2, 30, 0)
    for function in (medmnist_auc, medmnist_accuracy):
        assert function(p.labels, p.scores[:, 1], "binary-class") == function(p.labels, p.scores, "binary-class")
    assert isinstance(medmnist_auc(np.array([0, 1]), np.array([0.2, 0.7]), "binary-class"), float)


@pytest.mark.parametrize(("flag", "size"), FLAGS.items())
def test_medmnist_cli_reproduces_metrics_from_result_file(evaluator, flag, size, tmp_path):
    info = DATASETS[flag]
    p = random_predictions(info.task, len(info.classes), 80, 0)
    assert p.task.name == evaluator.INFO[flag]["task"]
    p.frame["id"] = [f"{flag}.npz/test/{i}" for i in range(80)]
    shuffled = type(p)(p.frame.sample(frac=1, random_state=0).reset_index(drop=True), p.task, p.classes)
    path = medmnist_format.write(shuffled, tmp_path, flag=flag, size=size, split="test", run="42")
    scores = pd.read_csv(path, index_col=0, header=None).sort_index().to_numpy()
    np.testing.assert_array_equal(scores, p.scores)
    root = tmp_path / ".medmnist"
    root.mkdir()
    size_suffix = "" if size == 28 else f"_{size}"
    np.savez(root / f"{flag}{size_suffix}.npz", test_labels=p.labels.astype(np.uint8))
    before = path.read_bytes()
    command = [sys.executable, "-m", "medmnist", "evaluate", str(path)]
    environment = {**os.environ, "HOME": str(tmp_path)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    auc, accuracy = map(float, re.findall(r"[01]\.[0-9]+", process.stdout))
    assert abs(auc - medmnist_auc(p.labels, p.scores, info.task)) < 1e-12
    assert abs(accuracy - medmnist_accuracy(p.labels, p.scores, info.task)) < 1e-12
    # medmnist writes its input to a file with its own name for it, which equals ours
    assert path.name == f"{flag}{size_suffix}_test_[AUC]{auc:.3f}_[ACC]{accuracy:.3f}@42.csv"
    assert sorted(tmp_path.glob("*.csv")) == [path]
    written = pd.read_csv(path, index_col=0, header=None)
    np.testing.assert_array_equal(written.to_numpy(), p.scores)
    assert path.read_bytes() == before


def test_undefined_auc_writes_no_result_file(tmp_path):
    p = random_predictions("multi-class", 4, 60, 0, absent=1)
    assert medmnist_format.write(p, tmp_path, flag="somemnist", size=28, split="test", run="42") is None
    assert list(tmp_path.iterdir()) == []
