"""Names of metrics and parameters in MLflow."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from pipelines.tracking.runs import escape_name, flatten_metrics

NAMES = st.text(alphabet=st.one_of(st.sampled_from('_x003C/<>.:| "µé5'), st.characters()), min_size=1, max_size=12)


@given(NAMES)
def test_escaped_name_is_valid_and_unique(name):
    escaped = escape_name(f"test.class.{name}.auc")
    _validate_metric_name(escaped)
    _validate_param_name(escaped)
    unescaped = re.sub(r"_x([0-9A-F]{4,6})_", lambda match: chr(int(match[1], 16)), escaped)
    assert unescaped == f"test.class.{name}.auc"


@pytest.mark.parametrize("name", ["test.auc", "test.class.µ é 5-10 mm/a_b.auc", "seconds.fit"])
def test_allowed_name_is_unchanged(name):
    assert escape_name(name) == name


def test_similar_classes_have_metrics_each():
    metrics = flatten_metrics({"class": {"<5 mm": {"auc": 0.5}, ">5 mm": {"auc": 0.6}, "sex": True}})
    assert metrics == {"class._x003C_5 mm.auc": 0.5, "class._x003E_5 mm.auc": 0.6}
