"""Hyperplane arrangements against repeated blow-ups of points."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

from deaddir_fast.theory.arrangement import arrangement
from deaddir_fast.theory.normal_crossing import normal_crossing

HALF = Fraction(1, 2)


def _rank(normals):
    return int(np.linalg.matrix_rank(np.array(normals, dtype=float))) if normals else 0


def _combine(*parts):
    """Independent factors of a product: the smallest λ, and m added up over ties."""
    rlct = min(p[0] for p in parts)
    return rlct, sum(p[1] for p in parts if p[0] == rlct)


def _by_point_blow_ups(forms):
    """Blow up the origin; at every point of the exceptional space the rest is an arrangement of
    smaller rank in independent coordinates, times the exceptional coordinate."""
    forms = tuple(forms)
    rank = _rank([f[0] for f in forms])
    total = sum(k for _, k in forms)
    here = (Fraction(rank, 2 * total), 1)
    if rank == 1:
        return here
    best = [here]
    seen = set()
    for size in range(1, rank):
        for subset in itertools.combinations(range(len(forms)), size):
            chosen = [forms[j][0] for j in subset]
            through = tuple(
                j for j, f in enumerate(forms) if _rank([*chosen, f[0]]) == _rank(chosen)
            )
            if through not in seen:
                seen.add(through)
                best.append(_combine(here, _by_point_blow_ups(forms[j] for j in through)))
    rlct = min(b[0] for b in best)
    return rlct, max(b[1] for b in best if b[0] == rlct)


def _random_forms(rng, dim, count):
    normals = {}
    while len(normals) < count:
        v = tuple(rng.choice([-1, 0, 0, 1, 1, 2]) for _ in range(dim))
        if any(v):
            lead = next(x for x in v if x)
            normals.setdefault(tuple(Fraction(x, lead) for x in v), rng.choice([1, 1, 2, 3]))
    return list(normals.items())


@pytest.mark.parametrize(("dim", "largest", "trials"), [(2, 6, 60), (3, 6, 60), (4, 6, 15)])
def test_against_point_blow_ups(dim, largest, trials):
    rng = random.Random(dim)
    multiplicities = set()
    for _ in range(trials):
        forms = _random_forms(rng, dim, rng.randint(1, largest))
        result = arrangement([f[0] for f in forms], [f[1] for f in forms])
        assert tuple(result) == _by_point_blow_ups(forms), forms
        multiplicities.add(result.multiplicity)
    assert len(multiplicities) > 1


def test_known_arrangements():
    assert arrangement([(1, 0), (0, 1), (1, -1)]) == (Fraction(1, 3), 1)
    assert arrangement([(1, 0), (0, 1)]) == (HALF, 2)
    assert arrangement([(2, 0), (-3, 0), (0, 1)]) == (Fraction(1, 4), 1)  # x^2 y
    # x^2 y (x - y): the origin and the double line tie, and meet after one blow-up.
    assert arrangement([(1, 0), (0, 1), (1, -1)], [2, 1, 1]) == normal_crossing([2, 4], [0, 1])
    for n in (3, 4, 5):  # differences of n coordinates: (n-1) / (2 n(n-1)/2)
        braid = [
            [int(i == a) - int(i == b) for i in range(n)]
            for a, b in itertools.combinations(range(n), 2)
        ]
        assert arrangement(braid) == (Fraction(1, n), 1)


def test_coordinate_hyperplanes_are_a_normal_crossing():
    rng = random.Random(7)
    for _ in range(20):
        d = rng.randint(1, 6)
        k = [rng.randint(1, 3) for _ in range(d)]
        identity = [[int(i == j) for j in range(d)] for i in range(d)]
        assert arrangement(identity, k) == normal_crossing(k)


def test_general_position():
    """More hyperplanes than dimensions, any d of them independent: the origin wins."""
    for d, n in ((2, 3), (2, 5), (3, 4), (3, 6), (4, 5)):
        moments = [[t**p for p in range(d)] for t in range(1, n + 1)]
        assert arrangement(moments) == (Fraction(d, 2 * n), 1)


def test_invariant_under_linear_maps_and_order():
    rng = random.Random(8)
    for _ in range(20):
        forms = _random_forms(rng, 3, 5)
        lower = [[1, 0, 0], [rng.randint(-3, 3), 2, 0], [rng.randint(-3, 3), rng.randint(-3, 3), 5]]
        moved = [
            [sum((v[i] * lower[i][j] for i in range(3)), Fraction(0)) for j in range(3)]
            for v, _ in forms
        ]
        order = rng.sample(range(5), 5)
        assert arrangement([moved[i] for i in order], [forms[i][1] for i in order]) == arrangement(
            [f[0] for f in forms], [f[1] for f in forms]
        )


def test_independent_blocks_combine():
    three = [(1, 0), (0, 1), (1, -1)]
    both = [(*v, 0, 0) for v in three] + [(0, 0, *v) for v in three]
    assert arrangement(both) == (Fraction(1, 3), 2)
    assert arrangement([*both, (1, 1, 0, 0)]) == (Fraction(1, 4), 1)


@pytest.mark.parametrize(
    ("normals", "k", "error", "name"),
    [
        ([], None, ValueError, "normals: "),
        (3, None, TypeError, "normals: "),
        ([1, 2], None, TypeError, r"normals\[0\]: "),
        ([(1, 0), (1,)], None, ValueError, r"normals\[1\]: "),
        ([(1, 0), (0, 0)], None, ValueError, r"normals\[1\]: "),
        ([(1, 0.5)], None, TypeError, r"normals\[0\]\[1\]: "),
        ([(1, 0), (0, 1)], [1], ValueError, "k: "),
        ([(1, 0)], [0], ValueError, r"k\[0\]"),
    ],
)
def test_errors_name_the_argument(normals, k, error, name):
    with pytest.raises(error, match=f"^{name}"):
        arrangement(normals, k)
