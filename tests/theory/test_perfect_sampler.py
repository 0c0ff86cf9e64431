"""Exact finite-n estimates of λ against quadrature."""

import math
from fractions import Fraction

import pytest
from scipy.integrate import quad

from deaddir_fast.theory.perfect_sampler import perfect_sampler


def _by_quadrature(k, c, a, n_beta, h):
    width = (n_beta * c) ** (-1 / (2 * k))
    end = min(a, width * 200 ** (1 / (2 * k)))
    points = [p * width for p in (0.2, 0.6, 1.0, 1.5) if p * width < end]

    def integral(weight):
        def integrand(t):
            x = n_beta * c * t ** (2 * k)
            return (t / width) ** h * x**weight * math.exp(-x)

        return quad(integrand, 0, end, points=points, epsabs=0, epsrel=1e-12, limit=500)[0]

    return integral(1) / integral(0)


@pytest.mark.parametrize(("k", "h"), [(1, 0), (2, 0), (3, 2), (5, 0), (2, 10)])
@pytest.mark.parametrize("n_beta", [1e-3, 0.5, 20.0, 39.0, 41.0, 60.0, 1e5])
def test_against_quadrature(k, h, n_beta):
    for c, a in ((1.0, 1.0), (0.5, 1.3)):
        expected = _by_quadrature(k, c, a, n_beta, h)
        assert math.isclose(perfect_sampler(k, c, a, n_beta, h=h), expected, rel_tol=1e-9)


def test_limits():
    assert perfect_sampler(2, 1.0, 1.0, 0.0) == 0.0
    assert perfect_sampler(2, 1.0, 1.0, 1e9) == 0.25
    assert perfect_sampler(1, 1.0, 1.0, 1e9, h=Fraction(1, 2)) == 0.75
    # <x> = x λ/(λ+1) for small x, to all digits
    assert math.isclose(perfect_sampler(2, 1.0, 1.0, 1e-20), 0.2e-20, rel_tol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((0, 1.0, 1.0, 1.0), ValueError, "k: "),
        ((1, 0.0, 1.0, 1.0), ValueError, "c: "),
        ((1, 1.0, -1.0, 1.0), ValueError, "a: "),
        ((1, 1.0, 1.0, -1.0), ValueError, "n_beta: "),
        ((1, 1.0, "x", 1.0), TypeError, "a: "),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name}"):
        perfect_sampler(*arguments)
    with pytest.raises(ValueError, match=r"^h: "):
        perfect_sampler(1, 1.0, 1.0, 1.0, h=1000)
