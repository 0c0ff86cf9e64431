"""Monomial ideals: λ and m from the Newton polyhedron, in exact arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

from deaddir_fast import _check
from deaddir_fast.theory.linear_program import Optimum, maximise
from deaddir_fast.theory.log_threshold import LogThreshold, orders, prior_exponents

Exponents = Sequence[Sequence[int]]


def minimal_generators(monomials: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Drop repeated monomials and those that another one divides."""
    kept: list[tuple[int, ...]] = []
    for v in sorted(set(monomials), key=sum):
        if not any(all(a <= b for a, b in zip(w, v, strict=True)) for w in kept):
            kept.append(v)
    return kept


def _checked(exponents: Exponents, h: object) -> tuple[list[tuple[int, ...]], tuple[Fraction, ...]]:
    if isinstance(exponents, str) or not hasattr(exponents, "__iter__"):
        raise _check.fail("exponents", exponents, "a sequence of exponent vectors", TypeError)
    monomials = [orders(f"exponents[{j}]", v, 0) for j, v in enumerate(exponents)]
    if not monomials:
        raise _check.fail("exponents", exponents, "at least one monomial")
    dim = len(monomials[0])
    for j, v in enumerate(monomials):
        if len(v) != dim:
            raise _check.fail(f"exponents[{j}]", v, f"{dim} entries, as in exponents[0]")
        if not any(v):
            raise _check.fail(f"exponents[{j}]", v, "a monomial that vanishes at 0")
    return minimal_generators(monomials), prior_exponents("h", h, dim)


def _solve(monomials: list[tuple[int, ...]], h: tuple[Fraction, ...]) -> Optimum:
    """Solve the dual: max ½ Σ y_j, Σ_j y_j v_j <= h + 1, y >= 0; the x of P are its prices."""
    rows = [[Fraction(v[i]) for v in monomials] for i in range(len(h))]
    return maximise([Fraction(1, 2)] * len(monomials), rows, [hi + 1 for hi in h])


def monomial_ideal(
    exponents: Exponents, h: int | Sequence[int | Fraction] | None = None
) -> LogThreshold:
    """λ and m of K ≍ Σ_j (s^v_j)² with prior ∏ |s_i|^h_i, at s = 0.

    With s_i = exp(-u_i) the volume of {K < ε} is the integral of exp(-Σ (h_i+1) u_i) over
    log(1/ε) times the polyhedron P = {x >= 0, <v_j, x> >= 1/2 for all j}. So λ is the linear
    program min Σ (h_i+1) x_i over P, and m - 1 the dimension of its optimal face (which is bounded
    because every h_i + 1 > 0). Exact for monomial ideals; for other analytic functions with these
    monomials only an upper bound of λ.

    Args:
        exponents: (n, d) non-negative exponent vectors v_j of the monomials of f, K = ½|f|².
        h: (d,) exponents > -1, integers or Fractions; flat prior if ``None``.

    Raises:
        TypeError, ValueError: naming ``exponents`` or ``h``; a constant monomial leaves no zero.
    """
    optimum = _solve(*_checked(exponents, h))
    return LogThreshold(optimum.value, optimum.dual_face + 1)


def newton_weights(
    exponents: Exponents, h: int | Sequence[int | Fraction] | None = None
) -> tuple[int, ...]:
    """Coprime integer weights w that attain ``monomial_ideal``.

    λ = Σ (h_i+1) w_i / (2 min_j <v_j, w>): along the curve s_i = c_i t^w_i with generic c the
    map f has order min_j <v_j, w>. Where the optimal face has positive dimension (m > 1) this is
    one of its vertices. Arguments and errors as in ``monomial_ideal``.
    """
    x = _solve(*_checked(exponents, h)).dual
    scale = lcm(*(v.denominator for v in x))
    whole = [int(v * scale) for v in x]
    shared = gcd(*whole)
    return tuple(v // shared for v in whole)
