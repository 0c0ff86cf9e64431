"""Deep linear networks of any depth."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import LogThreshold, orders


def deep_linear(widths: Sequence[int], rank: int) -> LogThreshold:
    """λ and m of a product of matrices of widths H_0, ..., H_L whose true value has rank ``rank``.

    K ≍ |W_L ... W_1 - C|². Aoyagi, Neural Networks 172 (2024) 106132: with the excess widths
    M_j = H_j - rank, one set of q+1 layers decides; it consists of the smallest excesses, all
    below the others, with sum S >= q max (inside) and S < q min (outside). With
    a = S - (ceil(S/q) - 1) q:
    λ = (rank (H_0 + H_L) - rank²)/2 + a(q-a)/(4q) - (q-1) S²/(4q) + ½ Σ_{i<j} M_i M_j over the
    set, m = a (q-a) + 1.

    Args:
        widths: (L+1,) widths >= 0, L >= 1, input first; the order of the hidden ones is irrelevant.
        rank: of the truth, 0 <= rank <= min(widths).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    h = orders("widths", widths, 0)
    if len(h) < 2:
        raise _check.fail("widths", widths, "at least two widths (one layer)")
    r = _check.integer("rank", rank, 0)
    if r > min(h):
        raise _check.fail("rank", rank, f"at most min(widths) = {min(h)}")
    excess = sorted(v - r for v in h)
    # S >= q max (inside) holds for the two smallest, and passes on to one more layer exactly when
    # S < q min (outside) fails; so the first q that satisfies the latter is the one.
    q, total = 1, excess[0] + excess[1]
    while q + 1 < len(excess) and total >= q * excess[q + 1]:
        q += 1
        total += excess[q]
    chosen = excess[: q + 1]
    a = total - (-(-total // q) - 1) * q
    regular = Fraction(r * (h[0] + h[-1]) - r * r, 2)
    pairs = Fraction(sum(u * v for u, v in combinations(chosen, 2)), 2)
    rlct = regular + Fraction(a * (q - a), 4 * q) - Fraction((q - 1) * total * total, 4 * q) + pairs
    return LogThreshold(rlct, a * (q - a) + 1)
