"""What a process of the training makes out of params.yaml."""

import numpy as np
import pytest
import torch

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.errors import UserError
from fadeformer.models.factory import create_model
from fadeformer.tasks import TASKS
from pipelines.stages import train_worker

MIRRORED = {"task": "multi-class", "classes": ["a", "b", "c"], "mirrors": True}


def meta(**changes: object) -> ArrayMetadata:
    return ArrayMetadata({**MIRRORED, **changes}, 28, 3, {}, "published", 0, [0.1, 0.2, 0.3], [0.4, 0.5, 0.0], "squash")


def with_train(wanted, **changes: object):
    return wanted.model_copy(update={"train": wanted.train.model_copy(update=changes)})


def weights(wanted, labels: list[list[int]], task: str = "multi-class", **changes: object) -> list[float]:
    about = meta(task=task)
    return train_worker.resolve_class_weights(
        with_train(wanted, **changes), about, TASKS[task], np.array(labels)
    ).tolist()


def test_classes_weigh_as_asked(config):
    labels = [[0], [0], [0], [1], [2], [2]]
    assert weights(config, labels, class_weights="none") == [1, 1, 1]
    assert weights(config, labels, class_weights="auto") == pytest.approx([2 / 3, 2, 1])
    assert weights(config, labels, class_weights={"b": 3.0}) == [1, 3, 1]


def test_findings_weigh_by_how_many_lack_them(config):
    labels = [[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    found = weights(config, labels, "multi-label, binary-class", class_weights="auto")
    assert found == pytest.approx([1 / 3, 3, 1])


def test_a_weight_of_no_class_is_told(config):
    with pytest.raises(UserError, match=r"train\.class_weights names d, but the classes are a, b, c"):
        weights(config, [[0]], class_weights={"d": 2.0})


@pytest.mark.parametrize(
    ("normalize", "backbone", "mean", "std"),
    [
        ("imagenet", "vit_base_patch16_224", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("backbone", "vit_base_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("backbone", "fadevit_nano", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("data", "fadevit_nano", (0.1, 0.2, 0.3), (0.4, 0.5, 1e-6)),
    ],
)
def test_normalization_follows_the_config(config, normalize, backbone, mean, std):
    with torch.device("meta"):
        model = create_model(
            backbone=backbone, num_classes=3, image_size=224 if "224" in backbone else 28, in_chans=3, pretrained=False,
            dropout=0.0, drop_path=0.0, fade={"num_heads": 4},
        )  # fmt: skip
    found = train_worker.resolve_normalization(config.model.model_copy(update={"normalize": normalize}), meta(), model)
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std)


@pytest.mark.parametrize(("mirrors", "share"), [(True, 0.5), (False, 0.0)])
def test_left_and_right_are_mirrored_only_where_they_mean_the_same(config, mirrors, share):
    assert train_worker.build_augmentation(config, meta(mirrors=mirrors)).horizontal_flip == share


def test_on_a_cpu_there_is_one_process_unless_more_are_asked_for(config):
    cpu = with_train(config, device="cpu")
    assert train_worker.device_count(cpu) == 1
    assert train_worker.device_count(with_train(cpu, devices=3)) == 3


def test_more_gpus_than_there_are_is_told(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_worker.device_count(config) == 2
    with pytest.raises(UserError, match=r"train\.devices is 3, but this machine has 2 GPU\(s\); set it to auto"):
        train_worker.device_count(with_train(config, devices=3))


@pytest.mark.parametrize(("told", "count"), [(None, 1), ("2", 2), ("2:4", 2)])
def test_machines_are_those_of_torchrun(monkeypatch, told, count):
    monkeypatch.delenv("PET_NNODES", raising=False)
    if told:
        monkeypatch.setenv("PET_NNODES", told)
    assert train_worker.node_count() == count
