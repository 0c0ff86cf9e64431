"""Watanabe's equations of state."""

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss

from deaddir_fast.theory.fluctuation import singular_fluctuation
from deaddir_fast.theory.quartet import quartet


@pytest.mark.parametrize("beta", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_equations_of_state(k, beta):
    q = quartet(Fraction(1, 2 * k), singular_fluctuation(k, beta=beta), beta)
    gap = 2 * beta * (q.gibbs_training - q.bayes_training)
    assert math.isclose(q.bayes_generalisation - q.bayes_training, gap, rel_tol=1e-12)
    assert math.isclose(q.gibbs_generalisation - q.gibbs_training, gap, rel_tol=1e-12)
    assert math.isclose(q.waic, q.bayes_generalisation, rel_tol=1e-12)
    assert math.isclose(q.functional_variance * beta, gap, rel_tol=1e-12)


def test_a_model_without_a_parameter_that_matters():
    assert set(vars(quartet(0, 0.0, 2.0)).values()) == {0.0}


def test_regular_model_at_unit_temperature():
    q = quartet(Fraction(5, 2), 2.5)
    assert (q.bayes_generalisation, q.bayes_training) == (2.5, -2.5)
    assert (q.gibbs_generalisation, q.gibbs_training) == (5.0, 0.0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_exact_conjugate_gaussian(beta):
    """One Gaussian mean with a flat prior: all four errors in closed form at finite n.

    Given the sample mean m ~ N(0, 1/n) the posterior is N(m, 1/(nβ)), the predictive density
    N(m, 1 + 1/(nβ)), and everything is a Gaussian integral.
    """
    n = 1e6
    v = 1 / (n * beta)
    s = 1 + v
    gibbs_generalisation = n * 0.5 * (1 / n + v)
    gibbs_training = n * 0.5 * (v - 1 / n)
    bayes_generalisation = n * (0.5 * np.log1p(v) + (1 + 1 / n) / (2 * s) - 0.5)
    bayes_training = n * (0.5 * np.log1p(v) + (1 - 1 / n) / (2 * s) - 0.5)
    # Var of x μ - μ²/2 over the posterior, summed over the sample, mean over data
    functional_variance = n * ((1 - 1 / n) * v + v * v / 2)
    q = quartet(0.5, singular_fluctuation(1, beta=beta), beta)
    assert abs(q.gibbs_generalisation - gibbs_generalisation) < 1e-5
    assert abs(q.gibbs_training - gibbs_training) < 1e-5
    assert abs(q.bayes_generalisation - bayes_generalisation) < 1e-5
    assert abs(q.bayes_training - bayes_training) < 1e-5
    assert abs(q.functional_variance - functional_variance) < 1e-5


def _exact(k, beta, n, low):
    """The quartet, WAIC and functional variance of x ~ N(t^k, 1) on [low, 1], times n.

    The posterior depends on the mean x̄ ~ N(0, 1/n) only, and given x̄ every x_i is N(x̄, 1 - 1/n):
    expectations over data sets are Gaussian integrals, and the one over t is a sum over a grid
    that is uniform in the logarithm of |t|.
    """
    t = np.exp(np.linspace(math.log(1e-13), 0, 4000))
    u, prior = t**k, t
    if low < 0:
        u, prior = np.concatenate([(-t) ** k, u]), np.tile(prior, 2)
    near = np.abs(u) * math.sqrt(n * beta) < 40  # beyond, the posterior is zero
    u, prior = u[near], prior[near]
    nodes, probability = hermegauss(24)
    probability = probability / probability.sum()
    rows, total = [], []
    for z in np.linspace(-7, 7, 113):
        mean = z / math.sqrt(n)
        exponent = n * beta * (mean * u - u * u / 2)
        w = prior * np.exp(exponent - exponent.max())
        w /= w.sum()
        m1, m2, m3, m4 = (w @ u**j for j in (1, 2, 3, 4))

        def predictive(x, w=w):
            return -np.log1p(np.expm1(x[:, None] * u - u * u / 2) @ w)

        seen = mean + math.sqrt(1 - 1 / n) * nodes
        spread = (mean**2 + 1 - 1 / n) * (m2 - m1**2) - mean * (m3 - m1 * m2) + (m4 - m2**2) / 4
        training = probability @ predictive(seen)
        rows.append(
            n
            * np.array(
                [
                    m2 / 2,
                    m2 / 2 - mean * m1,
                    probability @ predictive(nodes),
                    training,
                    training + beta * spread,
                    spread,
                ]
            )
        )
        total.append(math.exp(-z * z / 2))
    return np.array(total) @ np.array(rows) / sum(total)


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("k", "two_sided"), [(1, False), (2, True), (3, True)])
def test_exact_posteriors_of_data(k, two_sided, beta):
    """All six numbers at n = 10⁶, integrated over data sets, and the approach as n grows."""
    q = quartet(Fraction(1, 2 * k), singular_fluctuation(k, beta=beta, two_sided=two_sided), beta)
    expected = [
        q.gibbs_generalisation,
        q.gibbs_training,
        q.bayes_generalisation,
        q.bayes_training,
        q.waic,
        q.functional_variance,
    ]
    few, many = (
        np.abs(_exact(k, beta, n, -1.0 if two_sided else 0.0) - expected).max() for n in (1e4, 1e6)
    )
    assert many < 5e-6
    assert many < few / 50  # corrections of order 1/n


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((0.0, 0.5), ValueError, "rlct: "),
        ((-0.5, 0.0), ValueError, "rlct: "),
        ((0.5, -0.1), ValueError, "fluctuation: "),
        ((0.5, 0.5, 0.0), ValueError, "beta: "),
        (("x", 0.5), TypeError, "rlct: "),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name}"):
        quartet(*arguments)
