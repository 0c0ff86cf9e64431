"""Watanabe's equations of state: the four errors of a singular model and their kin."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from deaddir_fast import _check


@dataclass(frozen=True)
class Quartet:
    """Leading coefficients: n times the expected excess over the loss or entropy of the truth.

    Attributes:
        gibbs_generalisation: λ/β + nu, the posterior mean of the test loss.
        gibbs_training: λ/β - nu, the posterior mean of the training loss.
        bayes_generalisation: (λ - nu)/β + nu, the test loss of the predictive distribution.
        bayes_training: (λ - nu)/β - nu, its training loss.
        waic: that of the widely applicable information criterion; equals bayes_generalisation.
        functional_variance: 2nu/β, the limit of E[V_n] itself.
    """

    gibbs_generalisation: float
    gibbs_training: float
    bayes_generalisation: float
    bayes_training: float
    waic: float
    functional_variance: float


def quartet(rlct: float | Fraction, fluctuation: float, beta: float = 1.0) -> Quartet:
    """Errors of Bayesian learning at inverse temperature β (Watanabe 2009, 2018; realizable case).

    Args:
        rlct: λ of the whole model, > 0 (0 with ``fluctuation`` 0: nothing to learn).
        fluctuation: nu(β) >= 0 at this same β, summed over independent directions.
        beta: inverse temperature > 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    nu = _check.positive("fluctuation", fluctuation, allow_zero=True)
    lam = _check.positive("rlct", rlct, allow_zero=nu == 0)
    beta = _check.positive("beta", beta)
    variance = 2 * nu / beta
    training = (lam - nu) / beta - nu
    return Quartet(
        gibbs_generalisation=lam / beta + nu,
        gibbs_training=lam / beta - nu,
        bayes_generalisation=(lam - nu) / beta + nu,
        bayes_training=training,
        waic=training + beta * variance,  # T_n + (β/n) V_n
        functional_variance=variance,
    )
