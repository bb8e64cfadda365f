"""Numbers as text."""

import pytest

from fadeformer.io import formatting


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.97123, (0.9512, 0.9834), "0.97 (0.95 to 0.98)"), (0.97123, (0.9702, 0.9731), "0.971 (0.970 to 0.973)"),
        (0.5, None, "0.5000"), (None, None, "undefined"),
    ],
)  # fmt: skip
def test_digits_follow_interval_width(value, interval, text):
    assert formatting.format_with_interval(value, interval) == text
