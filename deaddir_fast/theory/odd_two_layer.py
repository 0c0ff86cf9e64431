"""Two-layer networks with an odd activation at zero truth."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import LogThreshold


def odd_two_layer(hidden: int) -> LogThreshold:
    """λ and m of f(x) = Σ_j a_j φ(b_j x) at f = 0, one input, one output, no biases.

    φ is odd and analytic with no vanishing odd Taylor coefficient among those needed (tanh, for
    one), so that K ≍ Σ_n (Σ_j a_j b_j^(2n+1))². With i = floor(sqrt(hidden)):
    λ = (hidden + i² + i) / (4 i + 2), m = 2 where i² = hidden and 1 otherwise (Aoyagi & Watanabe
    2005, resolution of singularities for layered networks with tanh units).

    Args:
        hidden: number of units >= 1.

    Raises:
        TypeError, ValueError: naming ``hidden``.
    """
    hidden = _check.integer("hidden", hidden, 1)
    i = isqrt(hidden)
    return LogThreshold(Fraction(hidden + i * i + i, 4 * i + 2), 2 if i * i == hidden else 1)
