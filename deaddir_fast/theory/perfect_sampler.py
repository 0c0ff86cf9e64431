"""What an exact sampler reports for one direction, to judge SGLD estimates of λ by."""

from __future__ import annotations

import math
from fractions import Fraction

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import prior_exponent

LARGEST_RLCT = 100  # keeps the series below the overflow threshold


def perfect_sampler(k: int, c: float, a: float, n_beta: float, *, h: int | Fraction = 0) -> float:
    """Return n β <K> under exp(-n β K) for one direction K = c t^(2k) on [-a, a], prior |t|^h.

    Exactly λ - x^λ e^(-x) / gamma(λ, x) with λ = (h+1)/(2k), x = n β c a^(2k) and gamma the lower
    incomplete gamma function: a sampler without any error reports this, not λ, at finite n β.

    Args:
        k: KL order >= 1.
        c, a: coefficient and half-width of the domain, > 0 (the one-sided domain [0, a] agrees).
        n_beta: sample count times inverse temperature, >= 0.
        h: prior exponent > -1, an integer or a Fraction.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    k = _check.integer("k", k, 1)
    rlct = float((prior_exponent("h", h) + 1) / (2 * k))
    if rlct > LARGEST_RLCT:
        raise _check.fail("h", h, f"(h + 1) / (2 k) at most {LARGEST_RLCT}")
    c, a = _check.positive("c", c), _check.positive("a", a)
    x = _check.positive("n_beta", n_beta, allow_zero=True) * c * a ** (2 * k)
    if x > 40 + 4 * rlct:  # the upper incomplete gamma function is below 1e-16 of the whole
        return rlct - math.exp(rlct * math.log(x) - x - math.lgamma(rlct))
    # gamma(λ, x) = x^λ e^-x M / λ with M = Σ x^n / ((λ+1) ... (λ+n)): positive terms, and M - 1 is
    # summed by itself, so that small x keeps its leading digits.
    term, rest, n = 1.0, 0.0, 0
    while term > 1e-17 * rest or n == 0:
        n += 1
        term *= x / (rlct + n)
        rest += term
    return rlct * rest / (1 + rest)
