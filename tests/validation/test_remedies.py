"""Remedies of the checks of data validation."""

from fadeformer.config.schema import SeverityParams
from pipelines.validation import remedies


def test_every_check_has_a_remedy():
    with_pattern = {"patients_in_file_names"}
    assert remedies.REMEDIES.keys() | with_pattern == SeverityParams.model_fields.keys()
    assert set(remedies.EXCLUDABLE_CHECKS) <= remedies.REMEDIES.keys()
