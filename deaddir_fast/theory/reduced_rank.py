"""Reduced-rank regression: two linear layers, globally and at every stratum of the fibre."""

from __future__ import annotations

from fractions import Fraction

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import LogThreshold


def reduced_rank_regression(inputs: int, outputs: int, hidden: int, rank: int) -> LogThreshold:
    """λ and m of y = B A x + noise where the true product B A has rank ``rank``.

    A is (hidden, inputs), B is (outputs, hidden), K ≍ |B A - C|², and the value is the one at the
    deepest points of the fibre, those with rank A = rank B = rank. Aoyagi & Watanabe, Neural
    Networks 18 (2005) 924-933, all four cases.

    Args:
        inputs, outputs, hidden: widths >= 0.
        rank: of the truth, 0 <= rank <= min(inputs, outputs, hidden).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    m = _check.integer("inputs", inputs, 0)
    n = _check.integer("outputs", outputs, 0)
    h = _check.integer("hidden", hidden, 0)
    r = _check.integer("rank", rank, 0)
    if r > min(m, n, h):
        raise _check.fail("rank", rank, f"at most min(inputs, outputs, hidden) = {min(m, n, h)}")
    if n + r <= m + h and m + r <= n + h and h + r <= m + n:
        s = 2 * (h + r) * (m + n) + 2 * m * n - (h + r) ** 2 - m**2 - n**2
        if (m + h + n + r) % 2 == 0:
            return LogThreshold(Fraction(s, 8), 1)
        return LogThreshold(Fraction(s + 1, 8), 2)
    if m + h < n + r:
        return LogThreshold(Fraction(h * m - h * r + n * r, 2), 1)
    if n + h < m + r:
        return LogThreshold(Fraction(h * n - h * r + m * r, 2), 1)
    return LogThreshold(Fraction(m * n, 2), 1)


def reduced_rank_local(
    inputs: int, outputs: int, hidden: int, rank: int, rank_a: int, rank_b: int
) -> LogThreshold:
    """λ and m of K ≍ |B A - C|² at a given point (A, B) of the fibre B A = C.

    Our derivation. In bases where A = diag(1_r, 1_a, 0) and B = diag(1_r, 0, 1_b, 0), with
    r = rank C, rank A = r + a, rank B = r + b, the differential of B A has rank
    (r+a) N + (r+b) M - (r+a)(r+b); what it leaves is a product of free blocks of widths
    M-r-a, H-r-a-b, N-r-b, a reduced-rank problem with zero truth. So λ is half that rank plus the
    λ of the remaining problem, and m is its m. Where a block is empty the fibre is smooth there
    and λ is half its codimension.

    Args:
        inputs, outputs, hidden: widths M, N, H >= 0; A is (H, M), B is (N, H).
        rank: r, the rank of C = B A.
        rank_a, rank_b: the ranks of A and of B themselves, between r and their widths, with
            rank_a + rank_b - hidden <= rank (Sylvester).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    m = _check.integer("inputs", inputs, 0)
    n = _check.integer("outputs", outputs, 0)
    h = _check.integer("hidden", hidden, 0)
    r = _check.integer("rank", rank, 0)
    if r > min(m, n, h):
        raise _check.fail("rank", rank, f"at most min(inputs, outputs, hidden) = {min(m, n, h)}")
    p = _check.integer("rank_a", rank_a, r)
    if p > min(m, h):
        raise _check.fail("rank_a", rank_a, f"at most min(inputs, hidden) = {min(m, h)}")
    q = _check.integer("rank_b", rank_b, r)
    if q > min(n, h):
        raise _check.fail("rank_b", rank_b, f"at most min(outputs, hidden) = {min(n, h)}")
    if p + q - h > r:
        raise _check.fail(
            "rank_b", rank_b, f"at most hidden + rank - rank_a = {h + r - p} (Sylvester's bound)"
        )
    rest = reduced_rank_regression(m - p, n - q, h + r - p - q, 0)
    return LogThreshold(Fraction(p * n + q * m - p * q, 2) + rest.rlct, rest.multiplicity)
