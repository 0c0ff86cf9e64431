"""Hyperplane arrangements: products of powers of linear forms."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from numbers import Rational
from typing import Any

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import LogThreshold, orders

Vector = tuple[Fraction, ...]
Flat = frozenset[int]


def _vector(argument: str, value: Any) -> Vector:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise _check.fail(argument, value, "a vector of integers or Fractions", TypeError)
    entries = []
    for i, v in enumerate(value):
        if isinstance(v, bool) or not (isinstance(v, Rational) or hasattr(v, "__index__")):
            raise _check.fail(f"{argument}[{i}]", v, "an integer or a Fraction", TypeError)
        entries.append(Fraction(v) if isinstance(v, Rational) else Fraction(v.__index__()))
    return tuple(entries)


def _monic(v: Vector) -> Vector:
    """Scale so that the first non-zero entry is 1; parallel normals become equal."""
    lead = next(x for x in v if x)
    return tuple(x / lead for x in v)


def _coordinates(basis: Sequence[Vector], v: Vector) -> Vector | None:
    """Express ``v`` in independent ``basis`` vectors; ``None`` if it is not in their span."""
    count = len(basis)
    rows = [[*(b[i] for b in basis), v[i]] for i in range(len(v))]
    for column in range(count):
        pivot = next(i for i in range(column, len(rows)) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = rows[column][column]
        rows[column] = [x / scale for x in rows[column]]
        for i, row in enumerate(rows):
            if i != column and row[column]:
                factor = row[column]
                rows[i] = [x - factor * y for x, y in zip(row, rows[column], strict=True)]
    if any(row[-1] for row in rows[count:]):
        return None
    return tuple(row[-1] for row in rows[:count])


def _basis(normals: Sequence[Vector], members: Sequence[int]) -> list[int]:
    """Choose the first members that span all of them."""
    chosen: list[int] = []
    for j in members:
        if _coordinates([normals[i] for i in chosen], normals[j]) is None:
            chosen.append(j)
    return chosen


def _closure(normals: Sequence[Vector], basis: Sequence[int]) -> Flat:
    """All hyperplanes that contain the intersection of those in ``basis``."""
    vectors = [normals[i] for i in basis]
    return frozenset(j for j, v in enumerate(normals) if _coordinates(vectors, v) is not None)


def _flats(normals: Sequence[Vector]) -> dict[Flat, int]:
    """Every flat except the whole space, with its codimension."""
    found: dict[Flat, int] = {}
    layer = {frozenset((j,)) for j in range(len(normals))}
    codimension = 1
    while layer:
        found.update(dict.fromkeys(layer, codimension))
        deeper: set[Flat] = set()
        for flat in layer:
            basis = _basis(normals, sorted(flat))
            for j in set(range(len(normals))) - flat:
                if not any(flat < known and j in known for known in deeper):
                    deeper.add(_closure(normals, [*basis, j]))
        layer, codimension = deeper, codimension + 1
    return found


def _irreducible(normals: Sequence[Vector], flat: Flat) -> bool:
    """Whether the hyperplanes of a flat cannot be split into two sets of independent variables.

    In terms of a basis among them, that is connectedness of the graph that joins each other
    normal to the basis elements it contains.
    """
    basis = _basis(normals, sorted(flat))
    parts = [{i} for i in basis]
    for j in flat - set(basis):
        coefficients = _coordinates([normals[i] for i in basis], normals[j])
        assert coefficients is not None  # j is in the flat
        touched = {i for i, c in zip(basis, coefficients, strict=True) if c}
        joined = [p for p in parts if p & touched]
        parts = [p for p in parts if not p & touched] + [set().union(*joined)]
    return len(parts) == 1


def _largest_nested(
    normals: Sequence[Vector], candidates: Sequence[Flat], irreducible: set[Flat]
) -> int:
    """Size of the largest nested set: antichains in it never join to an irreducible flat."""

    def allowed(chosen: list[Flat], new: Flat) -> bool:
        apart = [f for f in chosen if not (f <= new or new <= f)]
        for size in range(1, len(apart) + 1):
            for group in combinations(apart, size):
                if any(a <= b or b <= a for a, b in combinations(group, 2)):
                    continue
                union = sorted(new.union(*group))
                if _closure(normals, _basis(normals, union)) in irreducible:
                    return False
        return True

    def search(chosen: list[Flat], start: int, best: int) -> int:
        best = max(best, len(chosen))
        for i in range(start, len(candidates)):
            if len(chosen) + len(candidates) - i <= best:
                break
            if allowed(chosen, candidates[i]):
                best = search([*chosen, candidates[i]], i + 1, best)
        return best

    return search([], 0, 0)


def arrangement(
    normals: Sequence[Sequence[int | Fraction]], k: int | Sequence[int] | None = None
) -> LogThreshold:
    """λ and m of K ≍ ∏_j <n_j, w>^(2 k_j) at w = 0, for hyperplanes in any position.

    λ is the smallest codim X / (2 Σ_{j : X inside hyperplane j} k_j) over the irreducible flats X
    (intersections of hyperplanes whose normals do not split into independent blocks). Blowing
    these up, smallest first, gives normal crossings (De Concini & Procesi 1995): the exceptional
    divisor of X has Jacobian exponent codim X - 1 and order Σ k_j. Divisors meet exactly when
    their flats form a nested set, so m is the size of the largest nested set of flats that attain
    λ (our reading of that model; every real divisor in it passes over w = 0). For hyperplanes in
    general position this is the normal crossing rule; for three lines in the plane it gives 1/3,
    not 1/2.

    Args:
        normals: (n, d) non-zero normals, integers or Fractions; parallel ones are one hyperplane.
            All flats are enumerated, so this is for n up to a dozen or two.
        k: (n,) orders >= 1; all 1 if ``None``.

    Raises:
        TypeError, ValueError: naming ``normals`` or ``k``.
    """
    if isinstance(normals, str) or not hasattr(normals, "__iter__"):
        raise _check.fail("normals", normals, "a sequence of normals", TypeError)
    vectors = [_vector(f"normals[{j}]", v) for j, v in enumerate(normals)]
    if not vectors:
        raise _check.fail("normals", normals, "at least one normal")
    for j, v in enumerate(vectors):
        if len(v) != len(vectors[0]):
            raise _check.fail(f"normals[{j}]", v, f"{len(vectors[0])} entries, as in normals[0]")
        if not any(v):
            raise _check.fail(f"normals[{j}]", v, "a non-zero normal")
    powers = (1,) * len(vectors) if k is None else orders("k", k, 1)
    if len(powers) != len(vectors):
        raise _check.fail("k", k, f"{len(vectors)} entries, one for each normal")
    merged: dict[Vector, int] = {}
    for v, power in zip(vectors, powers, strict=True):
        merged[_monic(v)] = merged.get(_monic(v), 0) + power
    distinct, order = list(merged), list(merged.values())

    value = {
        flat: Fraction(codimension, 2 * sum(order[j] for j in flat))
        for flat, codimension in _flats(distinct).items()
        if _irreducible(distinct, flat)
    }
    rlct = min(value.values())
    attaining = sorted((f for f, v in value.items() if v == rlct), key=lambda f: sorted(f))
    return LogThreshold(rlct, _largest_nested(distinct, attaining, set(value)))
