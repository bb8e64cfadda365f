"""Validation of params.yaml: messages contain the key and the closest valid one."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fadeformer.config import schema
from fadeformer.errors import UserError
from tests.conftest import ROOT

DEFAULTS = schema.load_params(ROOT / "params.yaml").as_nested_dict()


def test_former_key_names_are_accepted():
    values = with_value("evaluate.bootstrap_draws", 100)
    with pytest.warns(FutureWarning, match=r"p.yaml: evaluate.bootstrap_draws is now called .*bootstrap_resamples"):
        assert schema.parse_params(values, "p.yaml").evaluate.bootstrap_resamples == 100


def with_value(path: str, value: object) -> dict:
    values = copy.deepcopy(DEFAULTS)
    section = values
    *parents, last = path.split(".")
    for parent in parents:
        section = section[parent]
    section[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.lerning_rate", 1e-3, "unknown key train.lerning_rate; did you mean train.learning_rate?"),
        ("trian", {}, "unknown key trian; did you mean train?"),
        (
            "model.fade.k",
            3,
            "unknown key model.fade.k; valid keys: K, after_blocks, alpha, dropout, num_heads, variant",
        ),
        ("model.fade.variant", "difusion", "model.fade.variant is 'difusion', but should be"),
        ("model.fade.variant", "difusion", "did you mean diffusion?"),
        ("model.fade.after_blocks", [1], "after_blocks is [1]; the published variant follows the last block: set"),
        ("model.fade.after_blocks", ["first"], "after_blocks is [first]; it must list block numbers from 1, or last"),
        ("model.fade.after_blocks", [0], "after_blocks is [0]; it must list block numbers from 1, or last"),
        ("model.fade.after_blocks", [], "after_blocks is []; it must list block numbers"),
        (
            "model.weights",
            "models/best_model.pth",
            "model.weights is models/best_model.pth, but training recreates models/",
        ),
        ("train.epochs", "12", "train.epochs is '12', but should be a valid integer (the YAML has it as text"),
        ("train.epochs", True, "train.epochs is True, but should be a valid integer"),
        ("train.epochs", 0, "train.epochs is 0, but should be greater than or equal to 1"),
        ("train.learning_rate", "1e-3", "is '1e-3', but should be a valid number (the YAML has it as text"),
        ("dataset.name", "retinamist", "did you mean retinamnist?"),
        ("dataset.root", "", "dataset.root is '', but should"),
        ("dataset.root", "~/scans", "dataset.root is ~/scans, but DVC does not expand ~; write /"),
        ("model.weights", "~/a.pth", "model.weights is ~/a.pth, but DVC does not expand ~; write /"),
        ("split.exclude", "~/a.csv", "split.exclude is ~/a.csv, but DVC does not expand ~; write /"),
        ("split.group_from", "(", "split.group_from is '(', which is not a regular expression"),
        ("dataset.classes", ["a", "b", "a"], "dataset.classes has a duplicate name"),
        ("promote.model_name", "fadenet-{datset}", "promote.model_name is 'fadenet-{datset}', but should"),
        ("promote.min_auc", 2, "promote.min_auc is 2, but should be less than or equal to 1"),
        ("augment.erasing_scale", [0.3, 0.1], "the smaller fraction comes first"),
        ("train.devices", "two", "train.devices is 'two', but should be 'auto' or a valid integer"),
        ("train.devices", 0, "train.devices is 0, but should be 'auto' or greater than or equal to 1"),
        ("train.class_weights", "auot", "train.class_weights is 'auot', but should be 'none' or 'auto' or a valid"),
        ("train.class_weights", "auot", "; did you mean auto?"),
        ("train.class_weights", {"mel": -1}, "train.class_weights.mel is -1, but should be greater than or equal to 0"),
        ("train.class_weights", {"mel": "x"}, "train.class_weights.mel is 'x', but should be a valid number"),
        ("evaluate.prevalence", 0, "evaluate.prevalence.0 is 0, but should be greater than 0"),
        ("evaluate.prevalence", [0.1, 1.0], "evaluate.prevalence.1 is 1.0, but should be less than 1"),
        ("evaluate.prevalence", {"mel": 10}, "evaluate.prevalence.mel.0 is 10, but should be less than 1"),
        ("train.precision", "fp32", "train.precision is 'fp32', but should be 'auto', 32, 'bf16' or 16"),
        ("train.monitor", "acuracy", "did you mean accuracy?"),
        ("train.warmup_epochs", 20, "train.warmup_epochs (20) leave no epoch of train.epochs (20)"),
        ("augment.horizontal_flip", "never", "augment.horizontal_flip is 'never', but should be a valid number or"),
        ("augment.horizontal_flip", 2, "augment.horizontal_flip is 2, but should be less than or equal to 1 or 'auto'"),
        ("model", 3, "model is 3, but should be a section with the keys backbone, pretrained"),
    ],
)
def test_invalid_values_are_reported_by_key(path, value, message):
    with pytest.raises(UserError) as error:
        schema.parse_params(with_value(path, value), "params.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("params.yaml: ")


def test_unpublished_medmnist_size_is_rejected():
    values = with_value("dataset.name", "bloodmnist")
    values["dataset"]["size"] = 32
    with pytest.raises(UserError, match="published at 28, 64, 128 and 224"):
        schema.parse_params(values, "params.yaml")


def test_all_invalid_keys_are_reported_together():
    values = with_value("train.epochs", 0)
    del values["seed"]
    with pytest.raises(UserError) as error:
        schema.parse_params(values, "params.yaml")
    assert "key seed is missing" in str(error.value)
    assert "train.epochs is 0" in str(error.value)


@given(st.sampled_from(sorted(schema.load_params(ROOT / "params.yaml").as_flat_dict())))
def test_no_key_has_a_default(path):
    values = copy.deepcopy(DEFAULTS)
    section = values
    *parents, last = path.split(".")
    for parent in parents:
        section = section[parent]
    del section[last]
    with pytest.raises(UserError, match=f"key {path} is missing"):
        schema.parse_params(values, "params.yaml")


def test_integers_are_accepted_as_floats():
    assert schema.parse_params(with_value("promote.min_auc", 1), "params.yaml").promote.min_auc == 1.0


def test_every_params_key_has_a_comment(config):
    lines = (ROOT / "params.yaml").read_text().splitlines()
    for path in config.as_flat_dict():
        last = path.split(".")[-1]
        assert any(line.strip().startswith(f"{last}:") and "#" in line for line in lines), f"{path} has no comment"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("", "must be a mapping with the keys"),
        ("- 1", "must be a mapping with the keys"),
    ],
)
def test_yaml_without_mapping_is_rejected(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        schema.load_params(tmp_path / "params.yaml")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="run from the project's folder"):
        schema.load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None), (0.1, [0.1]), ([0.01, 0.1], [0.01, 0.1]),
        ({"mel": 0.1, "nevus": [0.2]}, {"mel": [0.1], "nevus": [0.2]}),
    ],
)  # fmt: skip
def test_prevalence_is_number_list_or_mapping(value, expected):
    config = schema.parse_params(with_value("evaluate.prevalence", value), "params.yaml")
    assert config.evaluate.prevalence == expected
