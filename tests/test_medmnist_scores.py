"""MedMNIST's official AUC and accuracy, against its evaluator (3.0.2) written out, ties and absent classes too."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from fadeformer import medmnist_results
from fadeformer.metrics import medmnist_accuracy, medmnist_auc
from tests.test_metrics import made

TASKS = ("binary-class", "multi-class", "ordinal-regression", "multi-label, binary-class")


def official(labels, scores, task):
    """By the evaluator's rules, one curve after the other."""
    labels, scores = labels.squeeze(), scores.squeeze()
    if task == "binary-class":
        return roc_auc_score(labels, scores[:, -1]), accuracy_score(labels, scores[:, -1] > 0.5)
    if task == "multi-label, binary-class":
        columns = range(labels.shape[1])
        return (
            sum(roc_auc_score(labels[:, c], scores[:, c]) for c in columns) / len(columns),
            sum(accuracy_score(labels[:, c], scores[:, c] > 0.5) for c in columns) / len(columns),
        )
    area = sum(roc_auc_score((labels == c).astype(float), scores[:, c]) for c in range(scores.shape[1]))
    return area / scores.shape[1], accuracy_score(labels, scores.argmax(axis=-1))


@pytest.mark.parametrize("task", TASKS)
def test_official_numbers_are_equal_to_the_last_bits(task):
    absent = 0
    for seed in range(200):
        classes = 2 if task == "binary-class" else max(3, 2 + seed % 4)
        p = made(task, classes, 20 + seed % 30, seed, coarse=seed % 2 == 0, absent=1 if seed % 10 == 0 else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class without positives
            area, share = official(p.labels, p.scores, task)
        found = medmnist_auc(p.labels, p.scores, task)
        assert (found is None) == math.isnan(area)
        absent += found is None
        if found is not None:
            assert abs(found - area) < 1e-12
        assert abs(medmnist_accuracy(p.labels, p.scores, task) - share) < 1e-12
    assert absent == 20


def test_scores_of_the_positive_class_alone_are_enough():
    p = made("binary-class", 2, 30, 0)
    for function in (medmnist_auc, medmnist_accuracy):
        assert function(p.labels, p.scores[:, 1], "binary-class") == function(p.labels, p.scores, "binary-class")
    assert isinstance(medmnist_auc(np.array([0, 1]), np.array([0.2, 0.7]), "binary-class"), float)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("size", "of_size"), [(28, ""), (224, "_224")])
def test_the_result_file_reads_back_to_the_official_numbers(task, size, of_size, tmp_path):
    p = made(task, 2 if task == "binary-class" else 4, 60, 0)
    p.frame["id"] = [f"somemnist.npz/test/{i}" for i in range(60)]
    shuffled = type(p)(p.frame.sample(frac=1, random_state=0).reset_index(drop=True), p.task, p.classes)
    path = medmnist_results.write(shuffled, tmp_path, flag="somemnist", size=size, split="test", run="42")
    flag, *sizes, split = path.name.split("_[")[0].split("_")
    assert (flag, "".join(f"_{s}" for s in sizes), split) == ("somemnist", of_size, "test")
    scores = pd.read_csv(path, index_col=0, header=None).sort_index().to_numpy()  # as the evaluator reads it
    np.testing.assert_array_equal(scores, p.scores)
    area, share = official(p.labels, scores, task)
    assert f"_[AUC]{area:.3f}_[ACC]{share:.3f}@42.csv" in path.name


def test_there_is_no_result_file_without_an_official_auc(tmp_path):
    p = made("multi-class", 4, 60, 0, absent=1)
    assert medmnist_results.write(p, tmp_path, flag="somemnist", size=28, split="test", run="42") is None
    assert list(tmp_path.iterdir()) == []
