"""Presets and overrides change values of params.yaml and nothing else."""

import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from fadeformer.config import schema
from fadeformer.errors import UserError
from pipelines.config import overrides, presets
from pipelines.orchestration import flows
from tests.conftest import ROOT


def comments(text: str) -> list[str]:
    return re.findall(r"#.*", text)


def test_paper_preset_is_the_published_configuration(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["preset", "paper"])
    presets.main()
    flat = schema.load_params(tmp_path / "params.yaml").as_flat_dict()
    published = {
        "seed": 42, "preprocess.image_size": 224, "model.backbone": "vit_base_patch16_224", "model.pretrained": True,
        "model.dropout": 0.5, "model.fade.num_heads": 8, "model.fade.K": 3, "model.fade.alpha": 0.5,
        "model.fade.dropout": 0.1, "augment.horizontal_flip": 0.5, "augment.rotation": 15.0, "augment.scale": 0.0,
        "augment.translate": 0.0, "augment.border": "zeros", "augment.brightness": 0.15,
        "augment.contrast": 0.15, "augment.saturation": 0.15,
        "augment.erasing": 0.4, "augment.erasing_scale": [0.02, 0.12], "train.epochs": 25, "train.batch_size": 32,
        "train.optimizer": "adam", "train.learning_rate": 1e-4, "train.weight_decay": 1e-4,
        "train.schedule": "plateau", "train.plateau_factor": 0.5, "train.plateau_patience": 2,
        "train.early_stopping_patience": 6, "train.sampling": "weighted",
    }  # fmt: skip
    assert {key: flat[key] for key in published} == published


def test_preset_keeps_comments_and_nulls(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    overrides.apply_overrides(path, YAML(typ="safe").load(ROOT / "pipelines/config/presets/paper.yaml"))
    assert comments(path.read_text()) == comments((ROOT / "params.yaml").read_text())
    assert "mirror: null" in path.read_text()


def test_unknown_preset_lists_the_available_ones(monkeypatch):
    monkeypatch.setattr("sys.argv", ["preset", "papper"])
    with pytest.raises(UserError, match="available presets: paper"):
        presets.main()


def test_invalid_override_does_not_change_the_file(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    for changes in ({"train": {"epochs": 0}}, {"train": {"epoch": 1}}):
        with pytest.raises(UserError):
            overrides.apply_overrides(path, changes)
        assert path.read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_temporary_overrides_are_restored_after_an_error(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)

    def fail() -> None:
        with overrides.temporary_overrides(path, {"train": {"epochs": 3}}):
            assert schema.load_params(path).train.epochs == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_edit_during_the_run_is_kept(tmp_path, capsys):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    with overrides.temporary_overrides(path, {"train": {"epochs": 3}}):
        overrides.apply_overrides(path, {"promote": {"min_auc": 0.5}})
    assert schema.load_params(path).promote.min_auc == 0.5
    assert "was edited during the run" in capsys.readouterr().out


def test_invalid_yaml_is_reported_before_any_change(tmp_path):
    (tmp_path / "params.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not valid YAML"):
        overrides.apply_overrides(tmp_path / "params.yaml", {})


@given(epochs=st.integers(1, 1000), dropout=st.floats(0, 0.99))
def test_explicit_values_are_the_filled_in_fields(epochs, dropout):
    assert overrides.explicit_values(flows.TrainOverrides(epochs=epochs)) == {"epochs": epochs}
    assert overrides.explicit_values(flows.ModelOverrides(fade={"dropout": dropout})) == {"fade": {"dropout": dropout}}


@pytest.mark.parametrize("values", [{"epochs": 0}, {"epoch": 1}, {"schedule": "linear"}])
def test_deployment_form_rejects_invalid_values(values):
    with pytest.raises(ValidationError):
        flows.TrainOverrides(**values)


def test_form_with_default_values_changes_nothing(tmp_path):
    """Prefect's page sends every visible value."""
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    defaults = {
        name: field["default"] for name, field in flows.pipeline.parameters.properties.items() if "default" in field
    }
    sent = flows.pipeline.validate_parameters(defaults)
    assert {"seed", "dataset", "train", "promote"} <= {name for name, value in sent.items() if value is not None}
    changes = {
        name: overrides.explicit_values(value)
        for name, value in sent.items()
        if name not in ("seed", "stage_timeout_hours")
    }
    assert changes["train"]["epochs"] == schema.load_params(path).train.epochs
    assert changes["model"]["fade"]["K"] == schema.load_params(path).model.fade.K
    overrides.apply_overrides(path, {**changes, "seed": sent["seed"]})
    assert schema.load_params(path) == schema.load_params(ROOT / "params.yaml")
