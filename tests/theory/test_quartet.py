"""Watanabe's equations of state."""

import math
from fractions import Fraction

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((0.0, 0.5), ValueError, "rlct: "),
        ((0.5, -0.1), ValueError, "fluctuation: "),
        ((0.5, 0.5, 0.0), ValueError, "beta: "),
        (("x", 0.5), TypeError, "rlct: "),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name}"):
        quartet(*arguments)
