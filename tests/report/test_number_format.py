"""Number formats."""

import math

import numpy as np
import pytest

from gradproj.report.number_format import digits, exponent_of, in_cell, json_numbers, power, scaled


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.42, "+.42"),
        (-0.421, "-.42"),
        (1.0, "+1.0"),
        (9.96, "+10"),
        (-123.4, "-123"),
        (0.004, "0"),
        (math.nan, ""),
    ],
)
def test_numbers_in_cells_keep_their_sign_and_two_or_three_digits(value, shown):
    assert in_cell(value) == shown


def test_numbers_are_rounded_for_reading_and_json_has_no_nan():
    assert [digits(v) for v in (0, 1234.5, 0.0123456, 1.5e-7, math.nan, None)] == [
        "0", "1,234", "0.0123", "1.50e-07", "–", "–",
    ]  # fmt: skip
    assert [exponent_of([v]) for v in (0, 5, 0.02, 1e-7, 4e4)] == [0, 0, 0, -9, 3]
    assert scaled(1.234e-7, -9) == "+123.400"
    assert power(-9) == "10⁻⁹"
    assert json_numbers(np.array([[1, math.nan], [math.inf, 2]])) == [[1, None], [None, 2]]
