"""Newton polyhedra against the simplex method and by their definition."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from deaddir_fast.theory import monomial_ideal
from deaddir_fast.theory.linear_program import rank
from deaddir_fast.theory.polyhedron import Polyhedron, cone_rays, independent, simplicial_cones


def random_support(rng: np.random.Generator, d: int, size: int) -> list[tuple[int, ...]]:
    out = []
    while len(out) < size:
        v = tuple(int(x) for x in rng.integers(0, 6, d) * (rng.random(d) < 0.6))
        if any(v):
            out.append(v)
    return out


def test_programme_agrees_with_the_simplex_method() -> None:
    """Rays of the normal fan by double description; λ, m by Bland's simplex: two algorithms."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        given = random_support(rng, int(rng.integers(1, 7)), int(rng.integers(1, 8)))
        hull = Polyhedron.of(given)
        assert (hull.rlct, hull.multiplicity) == tuple(monomial_ideal(given))


@pytest.mark.parametrize("d", [2, 3, 4])
def test_facets_by_definition(d: int) -> None:
    """Every normal supports the polyhedron; every d points and axes that do give a normal."""
    rng = np.random.default_rng(d)
    for _ in range(10):
        hull = Polyhedron.of(random_support(rng, d, 6))
        points = np.array(hull.generators)
        known = {w for w, _ in hull.normals}
        for w, n in hull.normals:
            assert (points @ np.array(w)).min() == n
        axes = np.eye(d, dtype=int)
        for size in range(1, d + 1):
            for corners in combinations(points, size):
                for free in combinations(axes, d - size):
                    rows = np.array([*(v - corners[0] for v in corners[1:]), *free])
                    if d > 1 and np.linalg.matrix_rank(rows) < d - 1:
                        continue
                    w = np.linalg.svd(rows.reshape(-1, d))[2][-1]
                    w = w if w.sum() > 0 else -w
                    if w.min() > -1e-9 and (points @ w).min() > w @ corners[0] - 1e-9:
                        smallest = w[w > 1e-9].min()
                        whole = next(
                            k * w / smallest
                            for k in range(1, 200)
                            if np.allclose(k * w / smallest, np.round(k * w / smallest), atol=1e-6)
                        )
                        assert tuple(round(float(x)) for x in whole) in known


def test_compact_faces_of_a_simplex() -> None:
    """Pure powers of d variables: one compact facet and all its faces."""
    hull = Polyhedron.of([(2, 0, 0), (0, 3, 0), (0, 0, 5), (1, 1, 1)])
    assert [f.dimension for f in hull.compact_faces] == [2, 1, 1, 1, 0, 0, 0]
    assert [f.corners for f in hull.maximal_faces] == [frozenset({0, 1, 3})]
    assert hull.normals[next(iter(hull.maximal_faces[0].rays))] == ((15, 10, 6), 30)


def test_no_compact_edge() -> None:
    hull = Polyhedron.of([(1, 1, 1)])
    assert [f.dimension for f in hull.compact_faces] == [0]


@pytest.mark.parametrize("seed", range(5))
def test_simplicial_cones_cover(seed: int) -> None:
    """Cones over random polygons: every vector inside lies in one of the pieces."""
    rng = np.random.default_rng(seed)
    d = 3 + seed % 2
    sides = [(*(int(x) for x in rng.integers(-4, 5, d - 1)), 6) for _ in range(7)]
    sides.append((*(0,) * (d - 1), 1))
    if len(independent(sides, d)) < d:
        return
    try:
        pieces = simplicial_cones([tuple(s) for s in sides])
    except IndexError:
        return
    rays = np.array(cone_rays([tuple(s) for s in sides]), dtype=float)
    for piece in pieces:
        assert rank([[*map(Fraction, r)] for r in piece]) == d
    for _ in range(50):
        inside = rng.random(len(rays)) @ rays
        assert any(
            np.linalg.solve(np.array(piece, dtype=float).T, inside).min() > -1e-9
            for piece in pieces
        )
