"""Products and sums of even powers."""

import math
from fractions import Fraction

import numpy as np
import pytest

from deaddir_fast.theory.normal_crossing import additive, normal_crossing


@pytest.mark.parametrize(
    ("k", "h", "expected"),
    [
        (1, None, (Fraction(1, 2), 1)),
        ([1, 1], None, (Fraction(1, 2), 2)),
        ([1, 2], None, (Fraction(1, 4), 1)),
        ([1, 1, 1], None, (Fraction(1, 2), 3)),
        ([0, 3, 0], None, (Fraction(1, 6), 1)),
        ([1, 2], [0, 1], (Fraction(1, 2), 2)),
        ([2, 1], [Fraction(-1, 2), 0], (Fraction(1, 8), 1)),
    ],
)
def test_normal_crossing(k, h, expected):
    assert normal_crossing(k, h) == expected


def test_additive():
    assert additive([1, 2]) == (Fraction(3, 4), 1)
    assert additive([1, math.inf, 3]) == (Fraction(2, 3), 1)
    assert additive([2, 3], [1, 2]) == (Fraction(1, 2) + Fraction(1, 2), 1)
    assert additive([math.inf]) == (0, 1)
    assert additive(5) == (Fraction(1, 10), 1)


def test_results_are_exact_and_named():
    result = normal_crossing(np.array([3, 7]))
    assert isinstance(result.rlct, Fraction) and isinstance(result.multiplicity, int)
    rlct, multiplicity = result
    assert (rlct, multiplicity) == (result.rlct, result.multiplicity)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: normal_crossing([1, -1]), ValueError, r"k\[1\]"),
        (lambda: normal_crossing([1.0]), TypeError, r"k\[0\]"),
        (lambda: normal_crossing([True]), TypeError, r"k\[0\]"),
        (lambda: normal_crossing([]), ValueError, "k: "),
        (lambda: normal_crossing([0, 0]), ValueError, "k: "),
        (lambda: normal_crossing([1, 1], [0]), ValueError, "h: "),
        (lambda: normal_crossing([1], [-1]), ValueError, r"h\[0\]"),
        (lambda: normal_crossing([1], [0.5]), TypeError, r"h\[0\]"),
        (lambda: additive([1, 0]), ValueError, r"k\[1\]"),
        (lambda: additive([]), ValueError, "k: "),
        (lambda: additive([1, 2.5]), TypeError, r"k\[1\]"),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=f"^{name}"):
        call()
