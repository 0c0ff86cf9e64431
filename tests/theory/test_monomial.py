"""The exact linear program against floating point, vertex enumeration and volumes."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog

from deaddir_fast.theory.linear_program import cone_dimension, maximise, rank
from deaddir_fast.theory.monomial import monomial_ideal, newton_weights
from deaddir_fast.theory.normal_crossing import additive, normal_crossing

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        ([(2, 0), (1, 1), (0, 4)], (HALF, 2)),  # x^4 + x^2 y^2 + y^8
        ([(1, 1), (0, 3)], (HALF, 2)),  # x^2 y^2 + y^6
        ([(1, 0, 0), (0, 1, 1)], (Fraction(1), 2)),  # (x, yz)
        ([(2, 0), (0, 3)], (Fraction(5, 12), 1)),  # the monomials of the cusp
        ([(2, 0), (0, 4)], (Fraction(3, 8), 1)),  # the monomials of the tacnode
        ([(1, 1)], (HALF, 2)),
        ([(1, 1, 1)], (HALF, 3)),
        ([(1, 1, 0), (0, 1, 1), (1, 0, 1)], (Fraction(3, 4), 1)),
        ([(5,)], (Fraction(1, 10), 1)),
    ],
)
def test_known_ideals(exponents, expected):
    assert monomial_ideal(exponents) == expected


def _random_ideal(rng, dims=(1, 2, 3, 4), largest=4):
    d = rng.choice(dims)
    count = rng.randint(1, 5)
    ideal = []
    while len(ideal) < count:
        v = tuple(rng.randint(0, largest) for _ in range(d))
        if any(v):
            ideal.append(v)
    return ideal, [rng.choice([0, 0, 0, 1, 2, Fraction(-1, 2)]) for _ in range(d)]


def _solve_square(rows, rhs):
    """Gauss-Jordan over the rationals; None if singular."""
    n = len(rows)
    m = [[Fraction(v) for v in row] + [Fraction(b)] for row, b in zip(rows, rhs, strict=True)]
    for c in range(n):
        p = next((i for i in range(c, n) if m[i][c]), None)
        if p is None:
            return None
        m[c], m[p] = m[p], m[c]
        m[c] = [v / m[c][c] for v in m[c]]
        for i in range(n):
            if i != c and m[i][c]:
                m[i] = [u - m[i][c] * v for u, v in zip(m[i], m[c], strict=True)]
    return tuple(row[-1] for row in m)


def _by_vertices(ideal, h):
    """λ and m from all vertices of the polyhedron: the optimal face is their convex hull."""
    d = len(h)
    sides = [(v, HALF) for v in ideal]
    sides += [(tuple(int(i == j) for j in range(d)), Fraction(0)) for i in range(d)]
    best, attained = None, set()
    for chosen in itertools.combinations(sides, d):
        x = _solve_square([s[0] for s in chosen], [s[1] for s in chosen])
        if x is None or any(
            sum(a * b for a, b in zip(v, x, strict=True)) < bound for v, bound in sides
        ):
            continue
        value = sum(((hi + 1) * xi for hi, xi in zip(h, x, strict=True)), Fraction(0))
        if best is None or value < best:
            best, attained = value, {x}
        elif value == best:
            attained.add(x)
    first, *others = attained
    spread = np.array([[float(a - b) for a, b in zip(x, first, strict=True)] for x in others])
    return best, 1 + (int(np.linalg.matrix_rank(spread)) if others else 0)


def test_against_linprog_and_vertex_enumeration():
    rng = random.Random(1)
    ties = 0
    for _ in range(200):
        ideal, h = _random_ideal(rng)
        result = monomial_ideal(ideal, h)
        c = [float(v) + 1 for v in h]
        reference = linprog(c, A_ub=-np.array(ideal), b_ub=[-0.5] * len(ideal), bounds=(0, None))
        assert abs(float(result.rlct) - reference.fun) < 1e-9
        assert result == _by_vertices(ideal, h)
        ties += result.multiplicity > 1
    assert ties > 20  # the multiplicity was really exercised


def test_weights_attain_the_threshold():
    rng = random.Random(2)
    for _ in range(200):
        ideal, h = _random_ideal(rng, (2, 3, 4, 6), 6)
        w = newton_weights(ideal, h)
        order = min(sum(a * b for a, b in zip(v, w, strict=True)) for v in ideal)
        weight = sum(((hi + 1) * wi for hi, wi in zip(h, w, strict=True)), Fraction(0))
        assert weight / (2 * order) == monomial_ideal(ideal, h).rlct
        assert np.gcd.reduce(w) == 1
    assert newton_weights([(2, 0), (0, 3)]) == (3, 2)


def test_contains_normal_crossings_and_sums():
    rng = random.Random(3)
    for _ in range(50):
        d = rng.randint(1, 5)
        k = [rng.randint(1, 4) for _ in range(d)]
        h = [rng.randint(0, 3) for _ in range(d)]
        assert monomial_ideal([k], h) == normal_crossing(k, h)
        powers = [[k[i] if i == j else 0 for j in range(d)] for i in range(d)]
        assert monomial_ideal(powers, h) == additive(k, h)


def test_sum_of_independent_ideals_adds():
    """λ adds over independent coordinates, and m - 1 adds."""
    rng = random.Random(4)
    for _ in range(50):
        (f, hf), (g, hg) = _random_ideal(rng), _random_ideal(rng)
        both = [(*v, *(0,) * len(hg)) for v in f] + [(*(0,) * len(hf), *v) for v in g]
        joint = monomial_ideal(both, hf + hg)
        one, two = monomial_ideal(f, hf), monomial_ideal(g, hg)
        assert joint.rlct == one.rlct + two.rlct
        assert joint.multiplicity == one.multiplicity + two.multiplicity - 1


def _log_volume(ideal, t, step):
    """log vol{Σ s^2v < e^-t} in the unit cube, by quadrature over u = -log s but the last."""
    v = np.array(ideal, dtype=float)
    d = v.shape[1]
    top = t + 40.0
    axis = (np.arange(int(top / step)) + 0.5) * step
    outer = np.stack(np.meshgrid(*[axis] * (d - 1), indexing="ij"), -1).reshape(-1, d - 1)

    def inside(last):
        terms = -2 * (outer @ v[:, :-1].T + last[:, None] * v[:, -1])
        peak = terms.max(1)
        return peak + np.log(np.exp(terms - peak[:, None]).sum(1)) < -t

    low, high = np.zeros(len(outer)), np.full(len(outer), top)
    low, high = np.where(inside(low), -1.0, low), np.where(inside(high), high, np.inf)
    for _ in range(45):
        middle = np.where(np.isfinite(high), 0.5 * (low + high), 0.0)
        found = inside(np.maximum(middle, 0))
        high = np.where(np.isfinite(high) & found, middle, high)
        low = np.where(np.isfinite(high) & ~found, middle, low)
    depth = outer.sum(1) + np.maximum(high, 0)
    best = depth.min()
    return -best + np.log(np.exp(-(depth - best)).sum()) + (d - 1) * np.log(step)


@pytest.mark.parametrize(
    ("ideal", "t", "step"),
    [
        ([(2, 0), (1, 1), (0, 4)], 400.0, 0.05),
        ([(1, 1), (0, 3)], 400.0, 0.05),
        ([(2, 0), (0, 3)], 400.0, 0.05),
        ([(3, 1), (1, 2)], 400.0, 0.05),
        ([(1, 0, 0), (0, 1, 1)], 60.0, 0.6),
        ([(1, 1, 0), (0, 1, 1), (1, 0, 1)], 60.0, 0.6),
        ([(2, 1, 1), (1, 2, 0)], 60.0, 0.6),
    ],
)
def test_volume_law(ideal, t, step):
    """log V(2t) - log V(t) = -λ t + (m-1) log 2 + O(1/t), where V(t) = vol{K < e^-t}."""
    rlct, m = monomial_ideal(ideal)
    change = _log_volume(ideal, 2 * t, step) - _log_volume(ideal, t, step)
    assert abs(change + float(rlct) * t - (m - 1) * np.log(2)) < 8 / t + 0.01


def test_many_monomials_in_eight_dimensions():
    """Permuting coordinates and adding divisible monomials changes nothing."""
    rng = random.Random(5)
    ideal = [[rng.randint(0, 6) for _ in range(8)] for _ in range(40)]
    result = monomial_ideal(ideal)
    order = rng.sample(range(8), 8)
    permuted = [[v[i] for i in order] for v in ideal]
    grown = permuted + [[a + rng.randint(0, 2) for a in v] for v in permuted]
    assert monomial_ideal(grown) == result


def test_linear_program_duality_and_degeneracy():
    one = Fraction(1)
    optimum = maximise([one, one], [[one, 2 * one], [3 * one, one]], [4 * one, 6 * one])
    assert optimum.value == Fraction(14, 5)
    assert optimum.primal == (Fraction(8, 5), Fraction(6, 5))
    assert sum(y * b for y, b in zip(optimum.dual, (4, 6), strict=True)) == optimum.value
    with pytest.raises(ValueError, match="unbounded"):
        maximise([one], [[-one]], [one])
    # x = y inside the positive quadrant is a ray; x >= 0, y >= 0, x + y <= 0 is a point.
    assert cone_dimension([[one, -one], [-one, one]], 2) == 1
    assert cone_dimension([[-one, -one]], 2) == 0
    assert cone_dimension([], 3) == 3
    assert rank([[1, 2, 3], [2, 4, 6], [0, 0, 1]]) == 2


@pytest.mark.parametrize(
    ("exponents", "h", "error", "name"),
    [
        ([], None, ValueError, "exponents: "),
        (3, None, TypeError, "exponents: "),
        ([(1, 0), (1,)], None, ValueError, r"exponents\[1\]: "),
        ([(1, -1)], None, ValueError, r"exponents\[0\]\[1\]"),
        ([(1, 0), (0, 0)], None, ValueError, r"exponents\[1\]: "),
        ([(1, 0)], [0], ValueError, "h: "),
    ],
)
def test_errors_name_the_argument(exponents, h, error, name):
    with pytest.raises(error, match=f"^{name}"):
        monomial_ideal(exponents, h)
