"""Linear programs in exact rational arithmetic, small and dense."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

Row = list[Fraction]


class Optimum(NamedTuple):
    """Solution of max cᵀx, Ax <= b, x >= 0, and how much freedom its dual has.

    Attributes:
        value: the optimum.
        primal: (n,) a vertex that attains it.
        dual: (m,) an optimal price of each row (a vertex of the dual's optimal face).
        dual_face: dimension of the set of all optimal prices.
    """

    value: Fraction
    primal: tuple[Fraction, ...]
    dual: tuple[Fraction, ...]
    dual_face: int


def _pivot(rows: list[Row], objective: Row, r: int, q: int) -> None:
    """Bring column ``q`` to the unit vector of row ``r``."""
    inverse = 1 / rows[r][q]
    pivot = rows[r] = [v * inverse if v else v for v in rows[r]]
    support = [j for j, v in enumerate(pivot) if v]
    for row in (*rows[:r], *rows[r + 1 :], objective):
        factor = row[q]
        if factor:
            for j in support:
                row[j] -= factor * pivot[j]


def _solve(rows: list[Row], objective: Row, basis: list[int]) -> None:
    """Primal simplex from a feasible tableau, by Bland's rule, which cannot cycle."""
    width = len(objective) - 1
    while True:
        q = next((j for j in range(width) if objective[j] < 0), None)
        if q is None:
            return
        candidates = [
            (rows[i][-1] / rows[i][q], basis[i], i) for i in range(len(rows)) if rows[i][q] > 0
        ]
        if not candidates:
            raise ValueError("the linear program is unbounded")
        r = min(candidates)[2]
        _pivot(rows, objective, r, q)
        basis[r] = q


def _tableau(
    c: Sequence[Fraction], a: Sequence[Sequence[Fraction]], b: Sequence[Fraction]
) -> tuple[list[Row], Row, list[int]]:
    m, n = len(a), len(c)
    rows = [
        [Fraction(v) for v in a[i]]
        + [Fraction(1 if j == i else 0) for j in range(m)]
        + [Fraction(b[i])]
        for i in range(m)
    ]
    objective = [-Fraction(v) for v in c] + [Fraction(0)] * (m + 1)
    return rows, objective, list(range(n, n + m))


def rank(matrix: Sequence[Sequence[Fraction]]) -> int:
    """Rank by elimination."""
    rows = [list(map(Fraction, row)) for row in matrix]
    found = 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for i in range(found + 1, len(rows)):
            if rows[i][column]:
                factor = rows[i][column] / rows[found][column]
                rows[i] = [u - factor * v for u, v in zip(rows[i], rows[found], strict=True)]
        found += 1
    return found


def cone_dimension(matrix: Sequence[Sequence[Fraction]], size: int) -> int:
    """Dimension of {x in R^size : x >= 0, matrix x >= 0}.

    One program finds every inequality that can hold strictly: maximise Σ s_i with s_i <= 1 below
    the i-th left side; in a cone a slack that can be positive can be made 1. The others hold with
    equality throughout, and the dimension is what they leave.
    """
    unit = [[Fraction(int(i == j)) for j in range(size)] for i in range(size)]
    sides = unit + [list(map(Fraction, row)) for row in matrix]
    count = len(sides)
    slack = [[Fraction(int(i == j)) for j in range(count)] for i in range(count)]
    below = [[-v for v in sides[i]] + slack[i] for i in range(count)]
    capped = [[Fraction(0)] * size + slack[i] for i in range(count)]
    c = [Fraction(0)] * size + [Fraction(1)] * count
    rows, objective, basis = _tableau(
        c, below + capped, [Fraction(0)] * count + [Fraction(1)] * count
    )
    _solve(rows, objective, basis)
    strict = {
        column - size
        for row, column in zip(rows, basis, strict=True)
        if size <= column < size + count and row[-1] > 0
    }
    return size - rank([side for i, side in enumerate(sides) if i not in strict])


def maximise(
    c: Sequence[Fraction], a: Sequence[Sequence[Fraction]], b: Sequence[Fraction]
) -> Optimum:
    """Solve max cᵀx subject to Ax <= b, x >= 0, where b >= 0 so that x = 0 is feasible.

    Args:
        c: (n,) objective; a: (m, n) rows; b: (m,) non-negative bounds.

    Raises:
        ValueError: if the program is unbounded.
    """
    m, n = len(a), len(c)
    rows, objective, basis = _tableau(c, a, b)
    _solve(rows, objective, basis)
    primal = [Fraction(0)] * n
    for row, column in zip(rows, basis, strict=True):
        if column < n:
            primal[column] = row[-1]
    # The optimal prices are {objective row + Σ t_i row_i : t_i >= 0 on basic variables at zero},
    # and only entries that are zero now can leave the positive orthant near t = 0.
    degenerate = [row for row in rows if row[-1] == 0]
    nonbasic = set(range(n + m)) - set(basis)
    tight = [j for j in nonbasic if objective[j] == 0]
    face = cone_dimension([[row[j] for row in degenerate] for j in tight], len(degenerate))
    return Optimum(objective[-1], tuple(primal), tuple(objective[n : n + m]), face)
