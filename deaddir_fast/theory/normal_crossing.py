"""The two elementary normal forms: a product and a sum of even powers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import LogThreshold, orders, prior_exponents


def normal_crossing(
    k: int | Sequence[int], h: int | Sequence[int | Fraction] | None = None
) -> LogThreshold:
    """λ and m of K ≍ ∏ s_i^(2 k_i) with prior (or Jacobian) ∏ |s_i|^h_i, at s = 0.

    λ = min (h_i + 1) / (2 k_i) and m the number of i that attain it (Watanabe 2009, theorem 2.4).

    Args:
        k: (d,) non-negative orders; 0 for a coordinate that K does not contain.
        h: (d,) exponents > -1, integers or Fractions; flat prior if ``None``.

    Raises:
        TypeError, ValueError: naming ``k`` or ``h``; all orders 0 leaves K without a zero.
    """
    k = orders("k", k, 0)
    h = prior_exponents("h", h, len(k))
    if not any(k):
        raise _check.fail("k", k, "at least one order >= 1 (K has no zero otherwise)")
    ratios = [(hi + 1) / (2 * ki) for ki, hi in zip(k, h, strict=True) if ki]
    return LogThreshold(min(ratios), ratios.count(min(ratios)))


def additive(
    k: float | Sequence[float], h: int | Sequence[int | Fraction] | None = None
) -> LogThreshold:
    """λ and m of K ≍ Σ s_i^(2 k_i) with prior ∏ |s_i|^h_i: λ = Σ (h_i + 1) / (2 k_i), m = 1.

    This is the smooth-fibre sum (Dead Directions, arXiv 2606.05957): an order-k normal direction
    contributes 1/(2k), a regular one 1/2, a direction along the fibre (order ``inf``) nothing.

    Args:
        k: (d,) orders, integers >= 1 or ``math.inf``.
        h: (d,) exponents > -1, integers or Fractions; flat prior if ``None``.

    Raises:
        TypeError, ValueError: naming ``k`` or ``h``.
    """
    given: tuple[Any, ...] = tuple(k) if hasattr(k, "__iter__") else (k,)
    if not given:
        raise _check.fail("k", k, "at least one entry")
    checked = [
        None if v == math.inf else _check.integer(f"k[{i}]", v, 1) for i, v in enumerate(given)
    ]
    h = prior_exponents("h", h, len(given))
    terms = ((hi + 1) / (2 * ki) for ki, hi in zip(checked, h, strict=True) if ki is not None)
    return LogThreshold(sum(terms, Fraction(0)), 1)
