"""Training process: settings that are derived from params.yaml."""

import numpy as np
import pytest
import torch

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.errors import UserError
from fadeformer.models.factory import create_model
from fadeformer.tasks import TASKS
from pipelines.stages import train_worker

MIRRORED = {"task": "multi-class", "classes": ["a", "b", "c"], "mirrors": True}


def array_metadata(**changes: object) -> ArrayMetadata:
    return ArrayMetadata({**MIRRORED, **changes}, 28, 3, {}, "published", 0, [0.1, 0.2, 0.3], [0.4, 0.5, 0.0], "squash")


def with_train(config, **changes: object):
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def class_weights_of(config, labels: list[list[int]], task: str = "multi-class", **changes: object) -> list[float]:
    metadata = array_metadata(task=task)
    setting = with_train(config, **changes).train.class_weights
    return train_worker.resolve_class_weights(setting, metadata, TASKS[task], np.array(labels)).tolist()


def test_class_weights_follow_the_setting(config):
    labels = [[0], [0], [0], [1], [2], [2]]
    assert class_weights_of(config, labels, class_weights="none") == [1, 1, 1]
    assert class_weights_of(config, labels, class_weights="auto") == pytest.approx([2 / 3, 2, 1])
    assert class_weights_of(config, labels, class_weights={"b": 3.0}) == [1, 3, 1]


def test_multi_label_weights_are_negatives_per_positive(config):
    labels = [[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    result = class_weights_of(config, labels, "multi-label, binary-class", class_weights="auto")
    assert result == pytest.approx([1 / 3, 3, 1])


def test_weight_of_unknown_class_is_reported(config):
    with pytest.raises(UserError, match=r"train\.class_weights names d, but the classes are a, b, c"):
        class_weights_of(config, [[0]], class_weights={"d": 2.0})


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
    result = train_worker.resolve_normalization(
        config.model.model_copy(update={"normalize": normalize}), array_metadata(), model
    )
    assert result.mean == pytest.approx(mean)
    assert result.std == pytest.approx(std)


@pytest.mark.parametrize(("mirrors", "probability"), [(True, 0.5), (False, 0.0)])
def test_horizontal_flip_depends_on_mirror_symmetry(config, mirrors, probability):
    assert train_worker.build_augmentation(config, array_metadata(mirrors=mirrors)).horizontal_flip == probability


def test_cpu_defaults_to_one_process(config):
    cpu = with_train(config, device="cpu")
    assert train_worker.device_count(cpu) == 1
    assert train_worker.device_count(with_train(cpu, devices=3)) == 3


def test_too_many_gpus_are_reported(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_worker.device_count(config) == 2
    with pytest.raises(UserError, match=r"train\.devices is 3, but this machine has 2 GPU\(s\); set it to auto"):
        train_worker.device_count(with_train(config, devices=3))


@pytest.mark.parametrize(("nnodes", "count"), [(None, 1), ("2", 2), ("2:4", 2)])
def test_node_count_comes_from_torchrun(monkeypatch, nnodes, count):
    monkeypatch.delenv("PET_NNODES", raising=False)
    if nnodes:
        monkeypatch.setenv("PET_NNODES", nnodes)
    assert train_worker.node_count() == count
