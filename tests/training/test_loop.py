"""The training loop: it learns, repeats itself to the bit, goes on where it was stopped, and tells what fails."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from fadeformer.data.arrays import SplitArrays
from fadeformer.data.normalization import IMAGENET
from fadeformer.errors import StageInterrupted, UserError
from fadeformer.models.factory import create_model
from fadeformer.tasks import TASKS
from fadeformer.training import loop
from fadeformer.training.augmentation import Augmentation
from fadeformer.training.checkpoints import CheckpointManager
from fadeformer.training.distributed import create_fabric
from fadeformer.training.state import COST_FIELDS, EpochResult, Recipe, TrainingState, create_training_state
from tests.training.test_augmentation import OFF

RECIPE = Recipe(
    epochs=2, batch_size=8, accumulate=1, optimizer="adamw", learning_rate=1e-3, weight_decay=0.05, layer_decay=1.0,
    schedule="cosine", warmup_epochs=0, plateau_factor=0.5, plateau_patience=0, probe_epochs=0, label_smoothing=0.0,
    clip=None, ema=0.0, monitor="loss", early_stopping_patience=10, sampling="weighted", focal_gamma=0.0,
)  # fmt: skip
CPU = torch.device("cpu")


def some_images(count: int, classes: int, *, multi_label: bool = False, seed: int = 0) -> SplitArrays:
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
    return SplitArrays(
        pixels, labels, pd.DataFrame({"split": ["train"] * count, "id": [f"image {i}" for i in range(count)]})
    )


def network(
    classes: int, *, seed: int = 0, backbone: str = "fadevit_nano", dropout: float = 0.0, drop_path: float = 0.0
):
    torch.manual_seed(seed)
    return create_model(
        backbone=backbone, num_classes=classes, image_size=16, in_chans=3, pretrained=False, dropout=dropout,
        drop_path=drop_path, fade={"num_heads": 4},
    )  # fmt: skip


def fitted(
    state: TrainingState,
    train: SplitArrays,
    val: SplitArrays,
    task: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    head: str = "auto",
    augment: dict[str, object] | None = None,
    fabric=None,
    **options: Callable[..., object],
):
    """Epochs of `fit`, one by one."""
    kind = TASKS[task].with_head(head)
    classes = train.labels.shape[1] if kind.multi_label else int(train.labels.max()) + 1
    augmentation = Augmentation(**{**OFF, "horizontal_flip": 0.5, **(augment or {})})
    return loop.fit(
        state, train, val, task=kind, recipe=recipe, class_weights=np.ones(classes), augmentation=augmentation,
        normalization=IMAGENET, seed=seed, fabric=fabric or create_fabric(CPU), **options,
    )  # fmt: skip


def run(
    train: SplitArrays, val: SplitArrays, task: str, seed: int = 0, head: str = "auto", **changes: object
) -> tuple[TrainingState, list[EpochResult]]:
    kind = TASKS[task].with_head(head)
    classes = train.labels.shape[1] if kind.multi_label else int(train.labels.max()) + 1
    recipe = replace(RECIPE, **changes)
    state = create_training_state(network(classes - kind.num_omitted_outputs, seed=seed), recipe)
    return state, list(fitted(state, train, val, task, recipe, seed=seed, head=head))


def results(epochs: list[EpochResult]) -> list[EpochResult]:
    """Without what they cost."""
    return [replace(epoch, **dict.fromkeys(COST_FIELDS, 0.0)) for epoch in epochs]


@pytest.mark.parametrize("task", list(TASKS))
def test_it_learns_eight_images_by_heart(task):
    train = some_images(8, 2 if task == "binary-class" else 3, multi_label=TASKS[task].multi_label)
    state, epochs = run(
        train, train, task, epochs=80, schedule="constant", early_stopping_patience=100, sampling="uniform"
    )
    assert epochs[-1].train_loss < 0.2 * epochs[0].train_loss
    assert max(epoch.val_accuracy for epoch in epochs) == 1.0
    assert -state.best_score == min(epoch.val_loss for epoch in epochs)


def test_the_same_seed_gives_the_same_weights_to_the_bit():
    train, val = some_images(20, 3), some_images(9, 3, seed=1)
    (one, first), (two, second) = (run(train, val, "multi-class", seed=5) for _ in range(2))
    assert results(first) == results(second)
    assert all(torch.equal(one.best_weights[name], two.best_weights[name]) for name in one.best_weights)
    assert results(run(train, val, "multi-class", seed=6)[1]) != results(first)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("cosine", [1e-3, 7.5e-4, 2.5e-4]), ("constant", [1e-3] * 3), ("plateau", [1e-3] * 3)]
)
def test_the_learning_rate_follows_its_schedule(schedule, expected):
    train = some_images(8, 3)
    _, epochs = run(train, train, "multi-class", epochs=3, schedule=schedule)
    assert [epoch.learning_rate for epoch in epochs] == pytest.approx(expected)


def test_a_plateau_lowers_the_learning_rate_training_stops_early_and_the_weights_are_those_of_the_best_epoch():
    train = some_images(8, 3)
    wrong = SplitArrays(
        train.images, (train.labels + 1) % 3, train.index
    )  # the better it learns, the worse it validates
    state, epochs = run(train, wrong, "multi-class", epochs=40, schedule="plateau", early_stopping_patience=3)
    assert len(epochs) < 40
    assert len(epochs) == state.best_epoch + 3
    assert epochs[-1].learning_rate < epochs[0].learning_rate
    last = state.model.state_dict()
    assert any(not torch.equal(last[name], state.best_weights[name]) for name in last)


def test_a_loss_that_is_not_a_number_is_told():
    train = some_images(8, 3)
    with pytest.raises(
        UserError, match=r"training has diverged: .* epoch \d+.*; lower train\.learning_rate \(now 1e\+30\)"
    ):
        run(train, train, "multi-class", epochs=50, learning_rate=1e30, early_stopping_patience=100)


EVERYTHING = {
    "epochs": 3, "ema": 0.9, "schedule": "plateau", "warmup_epochs": 0.5, "label_smoothing": 0.1, "clip": 1.0,
    "focal_gamma": 1.0, "layer_decay": 0.8, "probe_epochs": 1, "accumulate": 2, "monitor": "accuracy",
}  # fmt: skip
CHANGES = {"mixup": 0.4, "cutmix": 0.4, "rotation": 10.0, "randaugment_operations": 1, "erasing": 0.5}
STEPS = 9  # three epochs of 20 images by 8


def asked_after(calls: int) -> Callable[[], int]:
    """Asks to stop from the so-manieth time on that it is called."""
    left = iter(range(calls))
    return lambda: 0 if next(left, None) is not None else 15


def complete(folder, train, val, recipe, **options):
    """A training from the last checkpoint in a folder to its end, or until it is asked to stop."""
    state = create_training_state(network(3, dropout=0.1, drop_path=0.1), recipe)
    checkpoints = CheckpointManager(folder, minutes=1e-9)
    if (found := checkpoints.load_latest()) is not None:
        state.load_state_dict(found)
    for _ in fitted(
        state, train, val, "multi-class", recipe, checkpoints=checkpoints, augment=CHANGES, **options
    ):  # fmt: skip
        pass
    return state


def test_a_training_stopped_anywhere_goes_on_to_the_bit(tmp_path):
    """Asked to stop after every step, before every batch of validation and everywhere between, again and again."""
    train, val = some_images(20, 3), some_images(9, 3, seed=1)
    recipe = replace(RECIPE, **EVERYTHING)
    whole = complete(tmp_path / "whole", train, val, recipe)
    assert whole.step == STEPS
    stopped = 0
    for calls in range(1, 200):
        try:
            pieces = complete(tmp_path / "pieces", train, val, recipe, pending_signal=asked_after(calls % 3))
        except StageInterrupted:
            stopped += 1
        else:
            break
    assert stopped >= STEPS
    assert results(pieces.history) == results(whole.history)
    assert (pieces.best_score, pieces.best_epoch) == (whole.best_score, whole.best_epoch)
    for name, weights in whole.best_weights.items():
        assert torch.equal(pieces.best_weights[name], weights), name
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(pieces.model.state_dict()[name], weights), name


def test_a_finished_training_is_not_trained_again(tmp_path):
    train, recipe = some_images(20, 3), replace(RECIPE, **EVERYTHING)
    first = complete(tmp_path, train, train, recipe)
    again = complete(tmp_path, train, train, recipe)
    assert again.step == first.step
    assert results(again.history) == results(first.history)


def test_checkpoints_come_within_an_epoch_and_the_last_two_are_kept(tmp_path):
    train = some_images(20, 3)
    complete(tmp_path, train, train, replace(RECIPE, epochs=2))
    assert [path.name for path in CheckpointManager(tmp_path, 1).paths] == ["step-00000006.pt", "step-00000005.pt"]


def poison(train: SplitArrays, row: int, monkeypatch) -> None:
    """Plants a NaN: the normalised image of one row has it."""
    target = torch.from_numpy(train.images[row])
    original = Augmentation.__call__

    def poisoned(self, images: Tensor, draws: Tensor, normalisation) -> Tensor:
        batch = original(self, images, draws, normalisation)
        batch[(images == target).flatten(1).all(dim=1)] = torch.nan
        return batch

    monkeypatch.setattr(Augmentation, "__call__", poisoned)


def test_a_planted_nan_is_told_with_step_and_image_and_the_last_good_checkpoint_is_kept(tmp_path, monkeypatch):
    train = some_images(20, 3)
    recipe = replace(RECIPE, epochs=3, sampling="uniform")
    clean = complete(tmp_path / "clean", train, train, replace(recipe, epochs=1))
    poison(train, 13, monkeypatch)
    state = create_training_state(network(3, backbone="vit_tiny_patch16_224"), recipe)
    with pytest.raises(
        UserError, match=r"the loss is nan at epoch 1, batch \d, step \d, on the images image 13;"
    ) as told:
        for _ in fitted(
            state, train, train, "multi-class", recipe, checkpoints=CheckpointManager(tmp_path / "none", 1)
        ):
            pass
    assert "train.learning_rate" in str(told.value)
    assert "checkpoint" not in str(told.value)  # there was none yet
    before = CheckpointManager(tmp_path / "clean", 1).paths[0]
    state = create_training_state(network(3, dropout=0.1, drop_path=0.1), recipe)
    state.load_state_dict(CheckpointManager(tmp_path / "clean", 1).load_latest())
    with pytest.raises(UserError, match=rf"the loss is nan at epoch 2, .*the last good checkpoint is {before}"):
        for _ in fitted(
            state, train, train, "multi-class", recipe, checkpoints=CheckpointManager(tmp_path / "clean", 1)
        ):  # fmt: skip
            pass
    kept = CheckpointManager(tmp_path / "clean", 1).load_latest()
    assert all(torch.equal(kept["model"][name], value) for name, value in clean.model.state_dict().items())


def test_outputs_that_are_not_finite_on_val_are_told(monkeypatch):
    train, val = some_images(8, 3), some_images(9, 3, seed=1)

    def broken(model, pixels, *_, **__):
        logits = np.zeros((len(pixels), 3))
        logits[4] = np.inf
        return logits

    monkeypatch.setattr(loop, "predict_distributed", broken)
    with pytest.raises(UserError, match="outputs on val are not finite after epoch 1, on the images image 4;"):
        run(train, val, "multi-class")


def test_too_little_memory_is_told_with_the_batch_size_and_a_remedy(monkeypatch):
    def greedy(self, images, draws, normalisation):
        return torch.empty(2**50)

    monkeypatch.setattr(Augmentation, "__call__", greedy)
    with pytest.raises(
        UserError, match=r"out of memory with train\.batch_size 8 and train\.accumulate 1; set train\.accumulate to 2"
    ):
        run(some_images(8, 3), some_images(8, 3), "multi-class")


def test_a_val_without_two_classes_cannot_choose_by_auc():
    train = some_images(9, 3)
    only = SplitArrays(train.images[::3], train.labels[::3], train.index[::3])
    with pytest.raises(UserError, match=r"train\.monitor is auc, .* set train\.monitor to loss"):
        run(train, only, "multi-class", monitor="auc")


@pytest.mark.parametrize("monitor", ["accuracy", "auc"])
def test_the_epoch_is_chosen_by_what_is_asked(monitor):
    train, val = some_images(30, 3), some_images(15, 3, seed=1)
    state, epochs = run(train, val, "multi-class", epochs=6, monitor=monitor, learning_rate=3e-5)
    values = [getattr(epoch, f"val_{monitor}") for epoch in epochs]
    assert len(set(values)) > 1
    assert state.best_score == max(values)
    assert state.best_epoch == 1 + values.index(max(values))


def test_while_probing_only_what_is_new_learns():
    train = some_images(20, 3)
    recipe = replace(RECIPE, epochs=2, probe_epochs=1, weight_decay=0.1)
    state = create_training_state(network(3), recipe)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    epochs = fitted(state, train, train, "multi-class", recipe)
    next(epochs)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"attn", "classifier"}
    next(epochs)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"patch_embed", "blocks", "norm"} <= {name.split(".")[0] for name in changed}


def test_the_mean_of_the_weights_is_what_is_judged_and_kept():
    train = some_images(20, 3)
    recipe = replace(RECIPE, ema=0.9, monitor="loss")
    state = create_training_state(network(3), recipe)
    steps = [dict(state.model.state_dict())]
    original = state.ema.update

    def noted(model, step):
        steps.append({name: value.clone() for name, value in model.state_dict().items()})
        original(model, step=step)

    state.ema.update = noted
    epochs = fitted(state, train, train, "multi-class", recipe)
    mean = {name: value.clone() for name, value in steps[0].items()}
    next(epochs)
    for number, weights in enumerate(steps[1:]):
        decay = state.ema.get_decay(number)
        for name, value in weights.items():
            mean[name] = mean[name] * decay + value * (1 - decay) if value.is_floating_point() else value
    assert state.best_epoch == 1
    for name, value in mean.items():
        torch.testing.assert_close(state.best_weights[name], value, atol=1e-6, rtol=1e-5)
    assert not torch.equal(state.best_weights["classifier.weight"], state.model.state_dict()["classifier.weight"])


def test_a_clipped_step_is_no_longer_than_asked():
    train, recipe = some_images(8, 3), replace(RECIPE, epochs=1, optimizer="sgd", learning_rate=1.0, weight_decay=0.0)
    moved = {}
    for clip in (None, 0.01):
        state = create_training_state(network(3), replace(recipe, clip=clip))
        before = torch.cat([value.detach().flatten().clone() for value in state.model.parameters()])
        list(fitted(state, train, train, "multi-class", replace(recipe, clip=clip)))
        moved[clip] = (
            (torch.cat([value.detach().flatten() for value in state.model.parameters()]) - before).norm().item()
        )
    assert moved[0.01] == pytest.approx(0.019, rel=1e-3)  # the gradient, and 0.9 of it as Nesterov's momentum
    assert moved[None] > 0.04


def test_history_tells_what_an_epoch_cost():
    _, epochs = run(some_images(20, 3), some_images(9, 3), "multi-class")
    for epoch in epochs:
        assert 0 < epoch.device_seconds <= epoch.train_seconds
        assert epoch.val_seconds > 0
        assert epoch.memory_mib > 100


def test_a_step_in_four_parts_is_the_same_step():
    """Of a network without batch normalization and dropout, up to rounding."""
    train, val = some_images(18, 3), some_images(9, 3, seed=1)
    recipe = replace(
        RECIPE, batch_size=9, optimizer="sgd", learning_rate=0.02, weight_decay=0.0, label_smoothing=0.1, clip=5.0
    )
    histories, weights = [], []
    for accumulate in (1, 4):
        state = create_training_state(network(3, backbone="vit_tiny_patch16_224"), recipe)
        state.model.attn.dropout.p = 0.0
        before = state.model.classifier.weight.detach().clone()
        changed = replace(recipe, accumulate=accumulate)
        histories.append(results(list(fitted(state, train, val, "multi-class", changed, augment={"rotation": 10.0}))))
        weights.append(dict(state.model.named_parameters()))
        assert not torch.allclose(state.model.classifier.weight, before, atol=1e-3)
    for one, other in zip(*histories, strict=True):
        for name, value in vars(one).items():
            assert getattr(other, name) == pytest.approx(value, abs=1e-5), name
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_parts_of_a_step_have_dropout_masks_of_their_own(monkeypatch):
    """They do not repeat the mask of the first part."""
    kept: list[Tensor] = []
    train, recipe = some_images(8, 3), replace(RECIPE, epochs=1, accumulate=2)
    state = create_training_state(network(3, backbone="vit_tiny_patch16_224"), recipe)
    dropout = state.model.attn.dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda _, x, y: kept.append(y != 0) if dropout.training else None)
    list(fitted(state, train, train, "multi-class", recipe))
    assert len(kept) == 2
    assert not torch.equal(*kept)


def test_a_cumulative_head_learns_grades():
    train = some_images(9, 3)
    state, epochs = run(
        train, train, "ordinal-regression", head="cumulative", epochs=80, schedule="constant", sampling="uniform",
        early_stopping_patience=100,
    )  # fmt: skip
    assert state.model.get_classifier().out_features == 2
    assert max(epoch.val_accuracy for epoch in epochs) == 1.0
