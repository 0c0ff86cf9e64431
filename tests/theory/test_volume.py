"""Volume laws against their closed special cases, phase-type distributions and sampling."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.linalg import expm

from deaddir_fast.theory.normal_crossing import normal_crossing
from deaddir_fast.theory.volume import volume_law


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tied", [1, 2, 4])
def test_tied_orders(k, tied):
    law = volume_law([k] * tied)
    for epsilon in (0.7, 1e-2, 1e-9, 1e-40):
        delta = epsilon ** (1 / (2 * k))
        expected = delta * sum((-math.log(delta)) ** j / math.factorial(j) for j in range(tied))
        assert math.isclose(law(epsilon), expected, rel_tol=1e-12)


def test_two_distinct_orders():
    for k1, k2 in ((2, 1), (3, 1), (5, 4)):
        a, b = 2 * k1, 2 * k2
        for epsilon in (0.5, 1e-3, 1e-12):
            expected = (a * epsilon ** (1 / a) - b * epsilon ** (1 / b)) / (a - b)
            assert math.isclose(volume_law([k1, k2])(epsilon), expected, rel_tol=1e-11)


@pytest.mark.parametrize(
    ("k", "h"),
    [
        ([1, 2, 2, 3], None),
        ([1, 1, 2], [0, 1, 3]),
        ([4, 0, 1], [Fraction(-1, 2), 5, 2]),
        (list(range(1, 9)), None),
        ([6, 7, 7, 8], [1, 0, 2, 1]),
    ],
)
def test_against_the_phase_type_distribution(k, h):
    """log 1/K is a sum of exponentials: a chain of states left one after the other."""
    exponents = h or [0] * len(k)
    rates = [float((hi + 1) / (2 * ki)) for ki, hi in zip(k, exponents, strict=True) if ki]
    generator = np.diag([-r for r in rates]) + np.diag(rates[:-1], 1)
    law = volume_law(k, h)
    for epsilon in (0.999, 0.5, 1e-3, 1e-12):
        survival = expm(generator * -math.log(epsilon))[0]
        assert math.isclose(law(epsilon), survival.sum(), rel_tol=1e-11)
        leaving = survival[-1] * rates[-1]  # -dV/dt
        assert math.isclose(
            law.log_slope(epsilon), leaving / survival.sum(), rel_tol=1e-9, abs_tol=1e-14
        )
        assert math.isclose(law.density(epsilon), leaving / epsilon, rel_tol=1e-9, abs_tol=1e-14)


def test_sampling():
    rng = np.random.default_rng(0)
    k, h = [1, 2, 2], [0, 1, 0]
    s = rng.random((1_000_000, 3)) ** (1 / (1 + np.array(h)))  # density (h+1) s^h
    value = np.prod(s ** (2 * np.array(k)), 1)
    law = volume_law(k, h)
    for epsilon in (0.3, 1e-2, 1e-4):
        p = law(epsilon)
        assert abs((value < epsilon).mean() - p) < 5 * math.sqrt(p * (1 - p) / len(s))


def test_leading_term_is_the_threshold():
    for k, h in (([1, 1], None), ([1, 2, 2], None), ([2, 1], [1, 0]), ([3, 0, 1], [0, 0, 4])):
        law = volume_law(k, h)
        assert law.threshold == normal_crossing(k, h)
        rlct, m = law.threshold
        epsilon = 1e-300
        assert abs(law.log_slope(epsilon) - (float(rlct) - (m - 1) / -math.log(epsilon))) < 1e-3
    # K < ε is nearly certain near ε = 1: ∏ λ_i t^7 / 7! for eight coordinates, deep cancellation
    law, t = volume_law(list(range(1, 9))), 1e-6
    first = t**7 / math.factorial(7) / math.prod(2 * k for k in range(1, 9))
    assert math.isclose(law.log_slope(math.exp(-t)), first, rel_tol=1e-5)
    assert volume_law([2])(3.0) == 1.0
    assert volume_law([2])(1.0) == 1.0
    assert volume_law([2]).density(3.0) == 0.0
    assert volume_law([2]).density(1.0) == 0.25  # λ ε^(λ-1) from below


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: volume_law([0, 0]), ValueError, "k: "),
        (lambda: volume_law([1, -2]), ValueError, r"k\[1\]"),
        (lambda: volume_law([1], [0, 0]), ValueError, "h: "),
        (lambda: volume_law([1])(0.0), ValueError, "epsilon: "),
        (lambda: volume_law([1]).density(-1.0), ValueError, "epsilon: "),
        (lambda: volume_law([1]).log_slope(1.0), ValueError, "epsilon: "),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=f"^{name}"):
        call()
