"""Finite-sample estimates of λ against direct integration over parameters and data sets."""

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import gammainc

from deaddir_fast.theory import (
    fluctuation_limits,
    normal_crossing,
    perfect_sampler,
    sampled_estimate,
    singular_fluctuation,
)


def _over_data(powers, n, beta, a, low, h=0.0):
    """Estimates relative to truth and minimum of x ~ N(g(t), 1), one t on a grid of [low, a].

    L_n - L_n(w0) = g²/2 - g x̄ with x̄ ~ N(0, 1/n): all data sets are one Gaussian integral. The
    grid is uniform in a power of t that resolves the posterior; midpoints avoid t = 0.
    """
    k = powers
    fine = np.linspace(0, 1, 200_001)
    v = 0.5 * (fine[1:] + fine[:-1])
    t = a * v**3
    weight = v**2 * t**h
    if low < 0:
        t, weight = np.concatenate([-t, t]), np.concatenate([weight, weight])
    g = t**k
    truth = minimum = norm = 0.0
    for xi in np.linspace(-8, 8, 161):
        loss = n * beta * (g * g / 2 - g * xi / math.sqrt(n))
        w = weight * np.exp(-(loss - loss.min()))
        mean, probability = (w @ loss) / w.sum(), math.exp(-xi * xi / 2)
        truth += probability * mean
        minimum += probability * (mean - min(loss.min(), 0.0))
        norm += probability
    return truth / norm, minimum / norm


@pytest.mark.parametrize(
    ("k", "truth", "minimum"), [(2, 0.2294, 0.2656), (3, 0.1401, 0.2125)], ids=["even", "odd"]
)
def test_wbic_of_one_direction(k, truth, minimum):
    """x ~ N(t^k, 1), n = 1000, β = 1/log n: far from λ = 0.25 and 0.1667."""
    n = 1000
    direct = _over_data(k, n, 1 / math.log(n), 1.0, -1.0)
    found = [sampled_estimate(k, n, reference=r) for r in ("truth", "minimum")]
    np.testing.assert_allclose(found, direct, atol=2e-5)
    np.testing.assert_allclose(found, [truth, minimum], atol=6e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "beta", "a", "two_sided", "h"),
    [
        (1, 1.0, 1.0, False, 0),
        (2, 2.5, 0.7, True, 1),
        (3, 0.3, 0.4, True, 2),
        (3, 1.0, 1, False, 0),
    ],
)
def test_small_samples_in_a_small_box(k, beta, a, two_sided, h):
    """n = 20: the box cuts the posterior, and the minimum may lie on its edge."""
    direct = _over_data(k, 20, beta, a, -a if two_sided else 0.0, h)
    for reference, value in zip(("truth", "minimum"), direct, strict=True):
        found = sampled_estimate(
            k, 20, beta=beta, h=h, scale=a ** (2 * k) / 2, two_sided=two_sided, reference=reference
        )
        assert found == pytest.approx(value, abs=3e-5)


@pytest.mark.parametrize(
    ("k", "two_sided"), [(1, True), (1, False), (2, True), (3, True), (4, True)]
)
@pytest.mark.parametrize("beta", [0.05, 1.0, 8.0])
def test_limits_of_one_direction(k, two_sided, beta):
    """λ, λ - β nu(β), and β/2 or β/4 more at the empirical minimum."""
    n = 1e12
    found = {
        r: sampled_estimate(k, n, beta=beta, two_sided=two_sided, reference=r)
        for r in ("population", "truth", "minimum")
    }
    truth = 1 / (2 * k) - beta * singular_fluctuation(k, beta=beta, two_sided=two_sided)
    assert found["population"] == pytest.approx(1 / (2 * k), abs=1e-12)
    assert found["truth"] == pytest.approx(truth, abs=1e-9)
    gap = fluctuation_limits(k, two_sided=two_sided)[1]
    assert gap == (0.5 if two_sided and k % 2 else 0.25)
    assert found["minimum"] - found["truth"] == pytest.approx(beta * gap, abs=1e-9)


def test_a_regular_direction_at_its_minimum_is_right_at_every_temperature():
    for beta in (0.01, 1.0, 100.0):
        assert sampled_estimate(1, 1e9, beta=beta) == pytest.approx(0.5, abs=1e-10)


@pytest.mark.parametrize(("k", "h"), [(1, 0), (3, Fraction(1, 2)), (2, 80)])
@pytest.mark.parametrize("n_beta", [1e-3, 1.0, 30.0, 1e5])
def test_population_is_the_perfect_sampler(k, h, n_beta):
    found = sampled_estimate(k, n_beta, beta=1.0, h=h, scale=0.3, reference="population")
    assert found == pytest.approx(perfect_sampler(k, 0.3, 1.0, n_beta, h=h), rel=1e-11)


def test_population_of_a_crossing():
    """(xy)² in the unit box: u = xy has density -log u, and T <u²> follows by parts."""

    def mean(size):
        # I = ∫_0^1 -log(u) exp(-T u²) du and J = ∫_0^1 -log(u) T u² exp(-T u²) du; integrating J by
        # parts with -exp(-T u²)/2: J = ½ I - ½ ∫_0^1 exp(-T u²) du, the boundary terms vanishing.
        u = np.exp(-np.linspace(0, 60, 400_001))
        kernel = np.exp(-size * u * u)
        first = np.trapezoid(-np.log(u) * kernel * u, dx=60 / 400_000)
        plain = 0.5 * math.sqrt(math.pi / size) * gammainc(0.5, size)
        return 0.5 - 0.5 * plain / first

    for size, printed in ((145.0, 0.356), (1e6, 0.437)):
        found = sampled_estimate([1, 1], size, beta=1.0, scale=1.0, reference="population")
        assert found == pytest.approx(mean(size), abs=1e-8)
        assert found == pytest.approx(printed, abs=5e-4)
    # -dlog Z/dlog T with Z ~ T^(-λ) (log T)^(m-1): from below, by (m-1)/log T to leading order.
    for size in (1e8, 1e16):
        found = sampled_estimate([1, 1], size, beta=1.0, scale=1.0, reference="population")
        assert 0.8 < (0.5 - found) * math.log(size) < 1


def test_crossing_over_data_sets():
    """g = xy on the unit box: |g| has density -log|g|, the rest is done on a grid."""
    n, beta = 400, 0.7
    v = (np.arange(400_000) + 0.5) / 400_000
    u = v**2
    g = np.concatenate([-u, u])
    weight = np.tile(-np.log(u) * v, 2)
    nodes, weights = hermegauss(60)
    direct = 0.0
    for xi, p in zip(nodes, weights / weights.sum(), strict=True):
        loss = n * beta * (g * g / 2 - g * xi / math.sqrt(n))
        w = weight * np.exp(-(loss - loss.min()))
        direct += p * (w @ loss) / w.sum()
    assert sampled_estimate([1, 1], n, beta=beta, reference="truth") == pytest.approx(
        direct, abs=1e-5
    )


def test_flat_coordinates_do_not_enter():
    assert sampled_estimate([2, 0], 50, beta=1.0) == sampled_estimate(2, 50, beta=1.0)


def test_multiplicity_is_what_the_rate_of_convergence_shows():
    k = [1, 1, 1]
    rlct, multiplicity = normal_crossing(k)
    size = 1e30
    found = sampled_estimate(k, size, beta=1.0, scale=1.0, reference="population")
    assert (float(rlct) - found) * math.log(size) == pytest.approx(multiplicity - 1, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"k": 0, "n": 10}, ValueError, "k: "),
        ({"k": 1.5, "n": 10}, TypeError, "k: "),
        ({"k": 1, "n": 1}, ValueError, "n: "),
        ({"k": 1, "n": 0, "beta": 1}, ValueError, "n: "),
        ({"k": 1, "n": 10, "beta": 1e4}, ValueError, "beta: "),
        ({"k": 1, "n": 10, "beta": -1}, ValueError, "beta: "),
        ({"k": 1, "n": 10, "h": 1000}, ValueError, "h: "),
        ({"k": 1, "n": 10, "scale": 0}, ValueError, "scale: "),
        ({"k": 1, "n": 10, "two_sided": 1}, TypeError, "two_sided: "),
        ({"k": 1, "n": 10, "reference": "mean"}, ValueError, "reference: "),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name}"):
        sampled_estimate(**arguments)
