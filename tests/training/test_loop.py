"""Training loop: learning, reproducibility, bitwise resume, and error messages."""

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


def random_split(count: int, classes: int, *, multi_label: bool = False, seed: int = 0) -> SplitArrays:
    """Return random images in which some pixel rows are brighter for each class."""
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


def create_network(
    classes: int, *, seed: int = 0, backbone: str = "fadevit_nano", dropout: float = 0.0, drop_path: float = 0.0
):
    torch.manual_seed(seed)
    return create_model(
        backbone=backbone, num_classes=classes, image_size=16, in_chans=3, pretrained=False, dropout=dropout,
        drop_path=drop_path, fade={"num_heads": 4},
    )  # fmt: skip


def fit_epochs(
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
    """Iterate over the epochs of `fit`."""
    task_object = TASKS[task].with_head(head)
    classes = train.labels.shape[1] if task_object.multi_label else int(train.labels.max()) + 1
    augmentation = Augmentation(**{**OFF, "horizontal_flip": 0.5, **(augment or {})})
    return loop.fit(
        state, train, val, task=task_object, recipe=recipe, class_weights=np.ones(classes), augmentation=augmentation,
        normalization=IMAGENET, seed=seed, fabric=fabric or create_fabric(CPU), **options,
    )  # fmt: skip


def train_model(
    train: SplitArrays, val: SplitArrays, task: str, seed: int = 0, head: str = "auto", **changes: object
) -> tuple[TrainingState, list[EpochResult]]:
    task_object = TASKS[task].with_head(head)
    classes = train.labels.shape[1] if task_object.multi_label else int(train.labels.max()) + 1
    recipe = replace(RECIPE, **changes)
    state = create_training_state(create_network(classes - task_object.num_omitted_outputs, seed=seed), recipe)
    return state, list(fit_epochs(state, train, val, task, recipe, seed=seed, head=head))


def without_costs(epochs: list[EpochResult]) -> list[EpochResult]:
    """Remove times and memory."""
    return [replace(epoch, **dict.fromkeys(COST_FIELDS, 0.0)) for epoch in epochs]


@pytest.mark.parametrize("task", list(TASKS))
def test_overfits_eight_images(task):
    train = random_split(8, 2 if task == "binary-class" else 3, multi_label=TASKS[task].multi_label)
    state, epochs = train_model(
        train, train, task, epochs=80, schedule="constant", early_stopping_patience=100, sampling="uniform"
    )
    assert epochs[-1].train_loss < 0.2 * epochs[0].train_loss
    assert max(epoch.val_accuracy for epoch in epochs) == 1.0
    assert -state.best_score == min(epoch.val_loss for epoch in epochs)


def test_same_seed_gives_identical_weights():
    train, val = random_split(20, 3), random_split(9, 3, seed=1)
    (first_state, first_epochs), (second_state, second_epochs) = (
        train_model(train, val, "multi-class", seed=5) for _ in range(2)
    )
    assert without_costs(first_epochs) == without_costs(second_epochs)
    assert all(
        torch.equal(first_state.best_weights[name], second_state.best_weights[name])
        for name in first_state.best_weights
    )
    assert without_costs(train_model(train, val, "multi-class", seed=6)[1]) != without_costs(first_epochs)


@pytest.mark.parametrize(
    ("schedule", "expected"), [("cosine", [1e-3, 7.5e-4, 2.5e-4]), ("constant", [1e-3] * 3), ("plateau", [1e-3] * 3)]
)
def test_learning_rate_follows_schedule(schedule, expected):
    train = random_split(8, 3)
    _, epochs = train_model(train, train, "multi-class", epochs=3, schedule=schedule)
    assert [epoch.learning_rate for epoch in epochs] == pytest.approx(expected)


def test_plateau_early_stopping_and_best_weights():
    train = random_split(8, 3)
    # with wrong labels in val, validation loss increases as training improves
    val = SplitArrays(train.images, (train.labels + 1) % 3, train.index)
    state, epochs = train_model(train, val, "multi-class", epochs=40, schedule="plateau", early_stopping_patience=3)
    assert len(epochs) < 40
    assert len(epochs) == state.best_epoch + 3
    assert epochs[-1].learning_rate < epochs[0].learning_rate
    last = state.model.state_dict()
    assert any(not torch.equal(last[name], state.best_weights[name]) for name in last)


def test_divergence_raises():
    train = random_split(8, 3)
    with pytest.raises(
        UserError, match=r"training has diverged: .* epoch \d+.*; lower train\.learning_rate \(now 1e\+30\)"
    ):
        train_model(train, train, "multi-class", epochs=50, learning_rate=1e30, early_stopping_patience=100)


ALL_OPTIONS = {
    "epochs": 3, "ema": 0.9, "schedule": "plateau", "warmup_epochs": 0.5, "label_smoothing": 0.1, "clip": 1.0,
    "focal_gamma": 1.0, "layer_decay": 0.8, "probe_epochs": 1, "accumulate": 2, "monitor": "accuracy",
}  # fmt: skip
AUGMENTATION = {"mixup": 0.4, "cutmix": 0.4, "rotation": 10.0, "randaugment_operations": 1, "erasing": 0.5}
STEPS = 9  # three epochs of 20 images by 8


def signal_after(calls: int) -> Callable[[], int]:
    """Return a function that reports SIGTERM after this number of calls."""
    remaining_calls = iter(range(calls))
    return lambda: 0 if next(remaining_calls, None) is not None else 15


def train_to_end(folder, train, val, recipe, **options):
    """Train from the latest checkpoint of a folder to the end, or until a signal stops it."""
    state = create_training_state(create_network(3, dropout=0.1, drop_path=0.1), recipe)
    checkpoints = CheckpointManager(folder, minutes=1e-9)
    if (saved := checkpoints.load_latest()) is not None:
        state.load_state_dict(saved)
    for _ in fit_epochs(
        state, train, val, "multi-class", recipe, checkpoints=checkpoints, augment=AUGMENTATION, **options
    ):  # fmt: skip
        pass
    return state


def test_resume_is_bitwise_identical(tmp_path):
    """Stop repeatedly: after every step, before every validation batch, and in between."""
    train, val = random_split(20, 3), random_split(9, 3, seed=1)
    recipe = replace(RECIPE, **ALL_OPTIONS)
    reference = train_to_end(tmp_path / "reference", train, val, recipe)
    assert reference.step == STEPS
    stopped = 0
    for calls in range(1, 200):
        try:
            resumed = train_to_end(tmp_path / "resumed", train, val, recipe, pending_signal=signal_after(calls % 3))
        except StageInterrupted:
            stopped += 1
        else:
            break
    assert stopped >= STEPS
    assert without_costs(resumed.history) == without_costs(reference.history)
    assert (resumed.best_score, resumed.best_epoch) == (reference.best_score, reference.best_epoch)
    for name, weights in reference.best_weights.items():
        assert torch.equal(resumed.best_weights[name], weights), name
    for name, weights in reference.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weights), name


def test_finished_run_is_not_trained_again(tmp_path):
    train, recipe = random_split(20, 3), replace(RECIPE, **ALL_OPTIONS)
    first = train_to_end(tmp_path, train, train, recipe)
    again = train_to_end(tmp_path, train, train, recipe)
    assert again.step == first.step
    assert without_costs(again.history) == without_costs(first.history)


def test_checkpoints_within_epoch(tmp_path):
    train = random_split(20, 3)
    train_to_end(tmp_path, train, train, replace(RECIPE, epochs=2))
    assert [path.name for path in CheckpointManager(tmp_path, 1).paths] == ["step-00000006.pt", "step-00000005.pt"]


def plant_nan(train: SplitArrays, row: int, monkeypatch) -> None:
    """Make augmentation return NaN for the image of one row."""
    target = torch.from_numpy(train.images[row])
    original = Augmentation.__call__

    def poisoned(self, images: Tensor, draws: Tensor, normalization) -> Tensor:
        batch = original(self, images, draws, normalization)
        batch[(images == target).flatten(1).all(dim=1)] = torch.nan
        return batch

    monkeypatch.setattr(Augmentation, "__call__", poisoned)


def test_nan_error_names_image_and_checkpoint(tmp_path, monkeypatch):
    train = random_split(20, 3)
    recipe = replace(RECIPE, epochs=3, sampling="uniform")
    clean = train_to_end(tmp_path / "clean", train, train, replace(recipe, epochs=1))
    plant_nan(train, 13, monkeypatch)
    state = create_training_state(create_network(3, backbone="vit_tiny_patch16_224"), recipe)
    with pytest.raises(
        UserError, match=r"the loss is nan at epoch 1, batch \d, step \d, on the images image 13;"
    ) as error_info:
        for _ in fit_epochs(
            state, train, train, "multi-class", recipe, checkpoints=CheckpointManager(tmp_path / "none", 1)
        ):
            pass
    assert "train.learning_rate" in str(error_info.value)
    assert "checkpoint" not in str(error_info.value)  # there is none
    checkpoint_path = CheckpointManager(tmp_path / "clean", 1).paths[0]
    state = create_training_state(create_network(3, dropout=0.1, drop_path=0.1), recipe)
    state.load_state_dict(CheckpointManager(tmp_path / "clean", 1).load_latest())
    with pytest.raises(
        UserError, match=rf"the loss is nan at epoch 2, .*the last good checkpoint is {checkpoint_path}"
    ):
        for _ in fit_epochs(
            state, train, train, "multi-class", recipe, checkpoints=CheckpointManager(tmp_path / "clean", 1)
        ):  # fmt: skip
            pass
    checkpoint = CheckpointManager(tmp_path / "clean", 1).load_latest()
    assert all(torch.equal(checkpoint["model"][name], value) for name, value in clean.model.state_dict().items())


def test_nonfinite_validation_outputs_raise(monkeypatch):
    train, val = random_split(8, 3), random_split(9, 3, seed=1)

    def nonfinite_logits(model, pixels, *_, **__):
        logits = np.zeros((len(pixels), 3))
        logits[4] = np.inf
        return logits

    monkeypatch.setattr(loop, "predict_distributed", nonfinite_logits)
    with pytest.raises(UserError, match="outputs on val are not finite after epoch 1, on the images image 4;"):
        train_model(train, val, "multi-class")


def test_out_of_memory_error_suggests_settings(monkeypatch):
    def allocate_too_much(self, images, draws, normalization):
        return torch.empty(2**50)

    monkeypatch.setattr(Augmentation, "__call__", allocate_too_much)
    with pytest.raises(
        UserError, match=r"out of memory with train\.batch_size 8 and train\.accumulate 1; set train\.accumulate to 2"
    ):
        train_model(random_split(8, 3), random_split(8, 3), "multi-class")


def test_monitor_auc_needs_two_classes_in_val():
    train = random_split(9, 3)
    one_class = SplitArrays(train.images[::3], train.labels[::3], train.index[::3])
    with pytest.raises(UserError, match=r"train\.monitor is auc, .* set train\.monitor to loss"):
        train_model(train, one_class, "multi-class", monitor="auc")


@pytest.mark.parametrize("monitor", ["accuracy", "auc"])
def test_best_epoch_maximizes_monitored_metric(monitor):
    train, val = random_split(30, 3), random_split(15, 3, seed=1)
    state, epochs = train_model(train, val, "multi-class", epochs=6, monitor=monitor, learning_rate=3e-5)
    values = [getattr(epoch, f"val_{monitor}") for epoch in epochs]
    assert len(set(values)) > 1
    assert state.best_score == max(values)
    assert state.best_epoch == 1 + values.index(max(values))


@pytest.mark.parametrize("monitor", ["loss", "auc"])
def test_rare_findings_do_not_select_the_epoch(monitor):
    train, val = random_split(30, 3, multi_label=True), random_split(30, 3, multi_label=True, seed=1)
    val.labels[:, 2] = 1
    val.labels[:2, 2] = 0  # two negatives
    swapped = SplitArrays(val.images, val.labels.copy(), val.index)
    swapped.labels[[0, 1, 2, 3], 2] = [1, 1, 0, 0]
    options = {"epochs": 4, "monitor": monitor, "learning_rate": 3e-5}
    first, second = (train_model(train, split, "multi-label, binary-class", **options) for split in (val, swapped))
    assert first[0].best_epoch == second[0].best_epoch
    assert without_costs(first[1]) == without_costs(second[1])


def test_probe_epochs_freeze_backbone():
    train = random_split(20, 3)
    recipe = replace(RECIPE, epochs=2, probe_epochs=1, weight_decay=0.1)
    state = create_training_state(create_network(3), recipe)
    initial = {name: value.clone() for name, value in state.model.state_dict().items()}
    epochs = fit_epochs(state, train, train, "multi-class", recipe)
    next(epochs)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, initial[name])}
    assert {name.split(".")[0] for name in changed} == {"attn", "classifier"}
    next(epochs)
    changed = {name for name, value in state.model.state_dict().items() if not torch.equal(value, initial[name])}
    assert {"patch_embed", "blocks", "norm"} <= {name.split(".")[0] for name in changed}


def test_probe_epochs_keep_head_dropout():
    train = random_split(20, 3)
    modes = []
    network = create_network(3, dropout=0.5, drop_path=0.5)
    network.classifier.register_forward_hook(
        lambda *_: modes.append((network.dropout.training, network.attn.training, network.blocks.training))
    )
    state = create_training_state(network, replace(RECIPE, epochs=2, probe_epochs=1))
    next(fit_epochs(state, train, train, "multi-class", replace(RECIPE, epochs=2, probe_epochs=1)))
    assert modes == [(True, True, False)] * 3 + [(False, False, False)] * 3  # train, then val


def test_ema_weights_are_evaluated_and_saved():
    train = random_split(20, 3)
    recipe = replace(RECIPE, ema=0.9, monitor="loss")
    state = create_training_state(create_network(3), recipe)
    steps = [dict(state.model.state_dict())]
    original = state.ema.update

    def recording_update(model, step):
        steps.append({name: value.clone() for name, value in model.state_dict().items()})
        original(model, step=step)

    state.ema.update = recording_update
    epochs = fit_epochs(state, train, train, "multi-class", recipe)
    average = {name: value.clone() for name, value in steps[0].items()}
    next(epochs)
    for number, weights in enumerate(steps[1:]):
        decay = state.ema.get_decay(number)
        for name, value in weights.items():
            average[name] = average[name] * decay + value * (1 - decay) if value.is_floating_point() else value
    assert state.best_epoch == 1
    for name, value in average.items():
        torch.testing.assert_close(state.best_weights[name], value, atol=1e-6, rtol=1e-5)
    assert not torch.equal(state.best_weights["classifier.weight"], state.model.state_dict()["classifier.weight"])


def test_gradient_clipping_limits_step():
    train, recipe = random_split(8, 3), replace(RECIPE, epochs=1, optimizer="sgd", learning_rate=1.0, weight_decay=0.0)
    step_norms = {}
    for clip in (None, 0.01):
        state = create_training_state(create_network(3), replace(recipe, clip=clip))
        initial = torch.cat([value.detach().flatten().clone() for value in state.model.parameters()])
        list(fit_epochs(state, train, train, "multi-class", replace(recipe, clip=clip)))
        step_norms[clip] = (
            (torch.cat([value.detach().flatten() for value in state.model.parameters()]) - initial).norm().item()
        )
    assert step_norms[0.01] == pytest.approx(0.019, rel=1e-3)  # gradient plus 0.9 of it by Nesterov momentum
    assert step_norms[None] > 0.04


def test_history_has_time_and_memory():
    _, epochs = train_model(random_split(20, 3), random_split(9, 3), "multi-class")
    for epoch in epochs:
        assert 0 < epoch.device_seconds <= epoch.train_seconds
        assert epoch.val_seconds > 0
        assert epoch.memory_mib > 100


def test_gradient_accumulation_matches_full_batch():
    """Up to rounding, without batch normalization and dropout."""
    train, val = random_split(18, 3), random_split(9, 3, seed=1)
    recipe = replace(
        RECIPE, batch_size=9, optimizer="sgd", learning_rate=0.02, weight_decay=0.0, label_smoothing=0.1, clip=5.0
    )
    histories, weights = [], []
    for accumulate in (1, 4):
        state = create_training_state(create_network(3, backbone="vit_tiny_patch16_224"), recipe)
        state.model.attn.dropout.p = 0.0
        initial = state.model.classifier.weight.detach().clone()
        changed = replace(recipe, accumulate=accumulate)
        histories.append(
            without_costs(list(fit_epochs(state, train, val, "multi-class", changed, augment={"rotation": 10.0})))
        )
        weights.append(dict(state.model.named_parameters()))
        assert not torch.allclose(state.model.classifier.weight, initial, atol=1e-3)
    for full_batch, accumulated in zip(*histories, strict=True):
        for name, value in vars(full_batch).items():
            assert getattr(accumulated, name) == pytest.approx(value, abs=1e-5), name
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_micro_batches_have_different_dropout_masks(monkeypatch):
    """The mask of the first micro-batch is not repeated."""
    masks: list[Tensor] = []
    train, recipe = random_split(8, 3), replace(RECIPE, epochs=1, accumulate=2)
    state = create_training_state(create_network(3, backbone="vit_tiny_patch16_224"), recipe)
    dropout = state.model.attn.dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda _, x, y: masks.append(y != 0) if dropout.training else None)
    list(fit_epochs(state, train, train, "multi-class", recipe))
    assert len(masks) == 2
    assert not torch.equal(*masks)


def test_cumulative_head_overfits_grades():
    train = random_split(9, 3)
    state, epochs = train_model(
        train, train, "ordinal-regression", head="cumulative", epochs=80, schedule="constant", sampling="uniform",
        early_stopping_patience=100,
    )  # fmt: skip
    assert state.model.get_classifier().out_features == 2
    assert max(epoch.val_accuracy for epoch in epochs) == 1.0
