"""MedMNIST's official AUC and accuracy, against medmnist's own evaluator and its command line."""

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
from tests.evaluation.test_metrics import made

TASKS = ("binary-class", "multi-class", "ordinal-regression", "multi-label, binary-class")
FLAGS = {"breastmnist": 28, "chestmnist": 64}


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory):
    """medmnist's module; when it is imported it makes a folder in the home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        import medmnist
        from medmnist import evaluator
    assert medmnist.__version__ == "3.0.2"  # of which fadeformer speaks
    return evaluator


def official(evaluator, labels, scores, task):
    """Its AUC, NaN where a class or finding lacks positives or negatives, and its accuracy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of that
        return evaluator.getAUC(labels, scores, task), evaluator.getACC(labels, scores, task)


@pytest.mark.parametrize("task", TASKS)
def test_official_numbers_are_equal_to_the_last_bits(evaluator, task):
    absent = 0
    for seed in range(50):
        classes = 2 if task == "binary-class" else max(3, 2 + seed % 4)
        p = made(task, classes, 20 + seed % 30, seed, coarse=seed % 2 == 0, absent=1 if seed % 10 == 0 else None)
        area, share = official(evaluator, p.labels, p.scores, task)
        found = medmnist_auc(p.labels, p.scores, task)
        assert (found is None) == math.isnan(area)  # ours has no NaN
        absent += found is None
        if found is not None:
            assert abs(found - area) < 1e-12
        assert abs(medmnist_accuracy(p.labels, p.scores, task) - share) < 1e-12
    assert absent == 5


def test_scores_of_the_positive_class_alone_are_enough():
    p = made("binary-class", 2, 30, 0)
    for function in (medmnist_auc, medmnist_accuracy):
        assert function(p.labels, p.scores[:, 1], "binary-class") == function(p.labels, p.scores, "binary-class")
    assert isinstance(medmnist_auc(np.array([0, 1]), np.array([0.2, 0.7]), "binary-class"), float)


@pytest.mark.parametrize(("flag", "size"), FLAGS.items())
def test_the_result_file_gives_our_numbers_on_medmnist_s_command_line(evaluator, flag, size, tmp_path):
    of = DATASETS[flag]
    p = made(of.task, len(of.classes), 80, 0)
    assert p.task.name == evaluator.INFO[flag]["task"]
    p.frame["id"] = [f"{flag}.npz/test/{i}" for i in range(80)]
    shuffled = type(p)(p.frame.sample(frac=1, random_state=0).reset_index(drop=True), p.task, p.classes)
    path = medmnist_format.write(shuffled, tmp_path, flag=flag, size=size, split="test", run="42")
    scores = pd.read_csv(path, index_col=0, header=None).sort_index().to_numpy()
    np.testing.assert_array_equal(scores, p.scores)
    root = tmp_path / ".medmnist"
    root.mkdir()
    of_size = "" if size == 28 else f"_{size}"
    np.savez(root / f"{flag}{of_size}.npz", test_labels=p.labels.astype(np.uint8))
    before = path.read_bytes()
    command = [sys.executable, "-m", "medmnist", "evaluate", str(path)]
    environment = {**os.environ, "HOME": str(tmp_path)}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    area, share = map(float, re.findall(r"[01]\.[0-9]+", told.stdout))
    assert abs(area - medmnist_auc(p.labels, p.scores, of.task)) < 1e-12
    assert abs(share - medmnist_accuracy(p.labels, p.scores, of.task)) < 1e-12
    # it writes what it read under the name that it gives such a file: ours
    assert path.name == f"{flag}{of_size}_test_[AUC]{area:.3f}_[ACC]{share:.3f}@42.csv"
    assert sorted(tmp_path.glob("*.csv")) == [path]
    written = pd.read_csv(path, index_col=0, header=None)
    np.testing.assert_array_equal(written.to_numpy(), p.scores)
    assert path.read_bytes() == before


def test_there_is_no_result_file_without_an_official_auc(tmp_path):
    p = made("multi-class", 4, 60, 0, absent=1)
    assert medmnist_format.write(p, tmp_path, flag="somemnist", size=28, split="test", run="42") is None
    assert list(tmp_path.iterdir()) == []
