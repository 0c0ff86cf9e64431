"""The singular fluctuation against parabolic cylinder functions, identities and real posteriors."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gamma, pbdv

from deaddir_fast.theory.fluctuation import fluctuation_limits, singular_fluctuation
from deaddir_fast.theory.quartet import quartet

FLAT = {  # flat prior, both sides, to the digits of an independent tabulation
    0.5: ["0.5", "0.157063236808", "0.226302530493"],
    1.0: [
        "0.5",
        "0.172973267434",
        "0.278366474400",
        "0.137855714857",
        "0.206135249963",
        "0.116661032372",
        "0.167386",
        "0.102108",
    ],
    2.0: ["0.5", "0.193105121983", "0.345758962782"],
}


@pytest.mark.parametrize("beta", FLAT)
def test_table(beta):
    for k, printed in enumerate(FLAT[beta], start=1):
        digits = len(printed.partition(".")[2])
        assert abs(singular_fluctuation(k, beta=beta) - float(printed)) < 0.51 * 10**-digits


def _mean(z, rlct, both):
    """E s under |s|^(2λ-1) exp(z s - s²) from ∫_0^∞ = Γ(a) 2^(-a/2) e^(z²/8) D_{-a}(-z/√2)."""

    def moment(order, z):
        a = 2 * rlct + order
        return gamma(a) * 2 ** (-a / 2) * pbdv(-a, -z / math.sqrt(2))[0]

    if both:
        return (moment(1, z) - moment(1, -z)) / (moment(0, z) + moment(0, -z))
    return moment(1, z) / moment(0, z)


def _gaussian_expectation(f, beta):
    def integrand(x):
        return f(math.sqrt(2 * beta) * x) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    pieces = [
        quad(integrand, a, a + 1, epsabs=1e-12, epsrel=1e-12, limit=200)[0] for a in range(-8, 8)
    ]
    return math.fsum(pieces)


@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize(
    ("k", "h", "two_sided"),
    [
        (1, 0, True),
        (1, 0, False),
        (2, 0, True),
        (3, 0, True),
        (3, 0, False),
        (3, 4, True),
        (5, 0, True),
        (6, 1, True),
        (11, 0, True),
        (12, 0, True),
        (12, Fraction(-1, 2), True),
    ],
)
def test_parabolic_cylinder_and_riccati(k, h, two_sided, beta):
    """Var = λ + m (Z/2 - m), integrated by another quadrature; and Stein: nu = E[Z m] / (2β)."""
    rlct = float(Fraction(h + 1) / (2 * k))
    both = two_sided and k % 2 == 1

    def riccati(z):
        m = _mean(z, rlct, both)
        return rlct + m * (z / 2 - m)

    nu = singular_fluctuation(k, beta=beta, h=h, two_sided=two_sided)
    assert abs(nu - _gaussian_expectation(riccati, beta)) < 1e-8
    stein = _gaussian_expectation(lambda z: z * _mean(z, rlct, both), beta) / (2 * beta)
    assert abs(nu - stein) < 1e-8


def test_regular_direction_is_one_half_at_every_temperature():
    for beta in (1e-3, 0.1, 1.0, 7.0, 1e3):
        assert abs(singular_fluctuation(1, beta=beta) - 0.5) < 1e-12


def test_depends_on_threshold_and_sign_only():
    """At λ = 1/2 with both signs it is the regular value; with one sign another number."""
    assert abs(singular_fluctuation(3, h=2) - 0.5) < 1e-12
    one_sign = singular_fluctuation(1, two_sided=False)
    assert abs(one_sign - 0.202182) < 1e-6
    assert abs(singular_fluctuation(2, h=1) - one_sign) < 1e-13
    assert abs(singular_fluctuation(4, h=3, two_sided=False) - one_sign) < 1e-13
    assert singular_fluctuation(3) > singular_fluctuation(2)  # parity, not order, decides


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(("k", "h"), [(1, 0), (2, 0), (3, 0), (7, 2), (12, 0)])
def test_limits(k, h, two_sided):
    cold, hot = fluctuation_limits(k, h=h, two_sided=two_sided)
    assert abs(singular_fluctuation(k, beta=1e-9, h=h, two_sided=two_sided) - cold) < 1e-8
    # nu = E[Z m] / (2β) with Z m = Z²/2 + 2λ - 1 for Z >> 1 and, with one sign, -2λ for Z << -1.
    beta = 1e4
    rlct = (h + 1) / (2 * k)
    next_term = (rlct - 0.5 if hot == 0.5 else -0.25) / beta
    value = singular_fluctuation(k, beta=beta, h=h, two_sided=two_sided)
    assert abs(value - hot - next_term) < 5 * beta**-1.5
    assert hot == (0.5 if two_sided and k % 2 else 0.25)


def test_large_threshold():
    """λ = 80: two narrow bumps at s = ±sqrt(λ - ½), against direct quadrature."""
    rlct, beta = 80, 2.0

    def variance(z):
        mode = math.sqrt(rlct - 0.5)
        s = np.linspace(-mode - 14 - abs(z), mode + 14 + abs(z), 4001)
        with np.errstate(divide="ignore"):
            log_weight = (2 * rlct - 1) * np.log(np.abs(s)) + z * s - s * s
        w = np.exp(log_weight - log_weight.max())
        w /= w.sum()
        return float(w @ s**2 - (w @ s) ** 2)

    x = np.linspace(-8, 8, 801)
    density = np.exp(-x * x / 2)
    direct = density @ [variance(2.0 * xi) for xi in x] / density.sum()
    assert abs(singular_fluctuation(1, beta=beta, h=2 * rlct - 1) - direct) < 1e-8


@pytest.mark.parametrize(("k", "beta"), [(1, 1.0), (2, 1.0), (3, 1.0), (2, 0.5), (3, 2.0)])
def test_posteriors_of_real_data(k, beta):
    """Data from N(0, 1), model N(t^k, 1) on [-1, 1]: errors and functional variance of samples."""
    rng = np.random.default_rng(10 * k + int(beta))
    n, datasets = 20_000, 400
    u = np.linspace(-1, 1, 2001) ** k
    powers = np.stack([u, u**2, u**3, u**4])
    rows = []
    for _ in range(datasets):
        x = rng.standard_normal(n)
        total, squares = x.sum(), (x * x).sum()
        exponent = beta * (total * u - n * u * u / 2)
        w = np.exp(exponent - exponent.max())
        w /= w.sum()
        m1, m2, m3, m4 = powers @ w
        # log p(x|t) = x u - u²/2 + const: its posterior variance, summed over the sample
        spread = squares * (m2 - m1**2) - total * (m3 - m1 * m2) + n * (m4 - m2**2) / 4
        rows.append((n * m2 / 2, n * m2 / 2 - total * m1, spread))
    rows = np.array(rows)
    mean, error = rows.mean(0), rows.std(0) / math.sqrt(datasets)
    expected = quartet(1 / (2 * k), singular_fluctuation(k, beta=beta), beta)
    assert abs(mean[0] - expected.gibbs_generalisation) < 4 * error[0] + 0.005
    assert abs(mean[1] - expected.gibbs_training) < 4 * error[1] + 0.005
    assert abs(mean[2] - expected.functional_variance) < 4 * error[2] + 0.005
    assert error.max() < 0.15  # the comparison means something


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"k": 0}, ValueError, "k: "),
        ({"k": 2.0}, TypeError, "k: "),
        ({"k": 1, "beta": 0}, ValueError, "beta: "),
        ({"k": 1, "beta": float("nan")}, ValueError, "beta: "),
        ({"k": 1, "beta": 1e7}, ValueError, "beta: "),
        ({"k": 1, "h": -1}, ValueError, "h: "),
        ({"k": 1, "h": 0.5}, TypeError, "h: "),
        ({"k": 1, "h": 1000}, ValueError, "h: "),
        ({"k": 1, "two_sided": 1}, TypeError, "two_sided: "),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name}"):
        singular_fluctuation(**arguments)
