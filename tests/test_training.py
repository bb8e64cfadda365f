"""The training loop: it learns, repeats itself to the bit, stops early, and tells of a loss that is not a number."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fadeformer import training
from fadeformer.arrays import Images
from fadeformer.augment import Augmentation
from fadeformer.errors import UserError
from fadeformer.models import create_model
from fadeformer.tasks import TASKS
from tests.test_augment import OFF

RECIPE = {
    "epochs": 2, "batch_size": 8, "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05,
    "schedule": "cosine", "plateau_factor": 0.5, "plateau_patience": 0, "early_stopping_patience": 10,
    "sampling": "weighted",
}  # fmt: skip


def some_images(count: int, classes: int, *, multi_label: bool = False, seed: int = 0) -> Images:
    """Random pixels, brighter in the rows that belong to a class."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 100, (count, 16, 16, 3), dtype=np.uint8)
    if multi_label:
        labels = (random.random((count, classes)) < 0.4).astype(np.int64)
        present = labels.astype(bool)
    else:
        labels = np.arange(count)[:, None] % classes
        present = labels == np.arange(classes)
    for i in range(count):
        for c in np.flatnonzero(present[i]):
            pixels[i, 4 * c : 4 * c + 3] += 120
    return Images(pixels, labels, pd.DataFrame({"split": ["train"] * count}))


def run(train: Images, val: Images, task: str, seed: int = 0, **changes: object) -> tuple[training.State, list]:
    classes = train.labels.shape[1] if TASKS[task].multi_label else int(train.labels.max()) + 1
    torch.manual_seed(seed)
    model = create_model(
        backbone="fadevit_nano", num_classes=classes, image_size=16, in_chans=3, pretrained=False, dropout=0.0,
        drop_path=0.0, fade={"num_heads": 4},
    )  # fmt: skip
    recipe = training.Recipe(**{**RECIPE, **changes})
    state = training.start(model, recipe)
    augmentation = Augmentation(**{**OFF, "horizontal_flip": 0.5})
    epochs = training.fit(
        state, train, val, task=TASKS[task], recipe=recipe, augmentation=augmentation, seed=seed,
        device=torch.device("cpu"), precision=torch.float32,
    )  # fmt: skip
    return state, list(epochs)


@pytest.mark.parametrize("task", list(TASKS))
def test_it_learns_eight_images_by_heart(task):
    train = some_images(8, 2 if task == "binary-class" else 3, multi_label=TASKS[task].multi_label)
    state, epochs = run(train, train, task, epochs=80, schedule="constant", early_stopping_patience=100)
    assert epochs[-1].train_loss < 0.2 * epochs[0].train_loss
    assert max(epoch.val_accuracy for epoch in epochs) == 1.0
    assert state.best_loss == min(epoch.val_loss for epoch in epochs)


def test_the_same_seed_gives_the_same_weights_to_the_bit():
    train, val = some_images(20, 3), some_images(9, 3, seed=1)
    (one, first), (two, second) = (run(train, val, "multi-class", seed=5) for _ in range(2))
    assert first == second
    assert all(torch.equal(one.best_weights[name], two.best_weights[name]) for name in one.best_weights)
    assert run(train, val, "multi-class", seed=6)[1] != first


@pytest.mark.parametrize(
    ("schedule", "expected"), [("cosine", [1e-3, 7.5e-4, 2.5e-4]), ("constant", [1e-3] * 3), ("plateau", [1e-3] * 3)]
)
def test_the_learning_rate_follows_its_schedule(schedule, expected):
    train = some_images(8, 3)
    _, epochs = run(train, train, "multi-class", epochs=3, schedule=schedule)
    assert [epoch.learning_rate for epoch in epochs] == pytest.approx(expected)


def test_a_plateau_lowers_the_learning_rate_and_training_stops_early():
    train = some_images(8, 3)
    wrong = Images(train.pixels, (train.labels + 1) % 3, train.index)  # the better it learns, the worse it validates
    state, epochs = run(train, wrong, "multi-class", epochs=40, schedule="plateau", early_stopping_patience=3)
    assert len(epochs) < 40
    assert len(epochs) == state.best_epoch + 3
    assert epochs[-1].learning_rate < epochs[0].learning_rate


def test_the_weights_kept_are_those_of_the_best_epoch():
    train = some_images(8, 3)
    wrong = Images(train.pixels, (train.labels + 1) % 3, train.index)
    state, _ = run(train, wrong, "multi-class", epochs=6)
    assert state.best_epoch < 6
    last = state.model.state_dict()
    assert any(not torch.equal(last[name], state.best_weights[name]) for name in last)


def test_weighted_sampling_draws_every_class_equally_often():
    labels = np.repeat([0, 1, 2], [900, 90, 10])[:, None]
    weights = training.sampling_weights(labels, TASKS["multi-class"])
    shares = [weights[labels[:, 0] == c].sum() for c in range(3)]
    assert shares == pytest.approx([shares[0]] * 3)


def test_an_image_with_findings_counts_by_its_rarest():
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [0, 0]])
    weights = training.sampling_weights(labels, TASKS["multi-label, binary-class"])
    assert weights == pytest.approx([1 / 3, 1 / 3, 1, 1 / 2, 1 / 2])


def test_uniform_sampling_sees_every_image_once(monkeypatch):
    train = some_images(20, 3)
    seen: list[int] = []
    original = Augmentation.__call__
    by_bytes = {image.tobytes(): i for i, image in enumerate(train.pixels)}

    def watch(self, images, generator):
        seen.extend(by_bytes[image.numpy().tobytes()] for image in images)
        return original(self, images, generator)

    monkeypatch.setattr(Augmentation, "__call__", watch)
    run(train, train, "multi-class", epochs=1, sampling="uniform")
    assert sorted(seen) == list(range(20))


def test_a_last_batch_of_one_image_is_left_out():
    train = some_images(17, 3)
    _, epochs = run(train, train, "multi-class", epochs=1)
    assert len(epochs) == 1


def test_a_loss_that_is_not_a_number_is_told():
    train = some_images(8, 3)
    with pytest.raises(
        UserError, match=r"training has diverged: .* epoch \d+.*; lower train\.learning_rate \(now 1e\+30\)"
    ):
        run(train, train, "multi-class", epochs=50, learning_rate=1e30, early_stopping_patience=100)


def test_an_optimiser_that_timm_does_not_know_is_told():
    with pytest.raises(UserError, match=r"train\.optimizer is 'adamv'"):
        training.start(nn.Linear(2, 2), training.Recipe(**{**RECIPE, "optimizer": "adamv"}))


def test_adam_decays_every_weight_as_published():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    state = training.start(model, training.Recipe(**{**RECIPE, "optimizer": "adam", "weight_decay": 1e-4}))
    assert type(state.optimizer) is torch.optim.Adam
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [1e-4]
