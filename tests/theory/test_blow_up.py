"""Bounds and values from one blow-up, against singularities whose (λ, m) is known."""

from fractions import Fraction

import numpy as np
import pytest

from deaddir_fast.theory import monomial_ideal
from deaddir_fast.theory.blow_up import blow_up, leading_rank
from deaddir_fast.theory.germ import Germ, count, monomials


def _germ(variables, top, *generators):
    """Each generator is {exponents: coefficient}."""
    parts = {}
    for degree in range(1, top + 1):
        names = {e: i for i, e in enumerate(monomials(variables, degree))}
        table = np.zeros((len(generators), count(variables, degree)))
        for row, generator in enumerate(generators):
            for exponents, value in generator.items():
                if sum(exponents) == degree:
                    table[row, names[exponents]] = value
        if table.any():
            parts[degree] = table
    return Germ(variables, top, parts)


def _turned(germ, seed):
    rng = np.random.default_rng(seed)
    return germ.substitute(np.linalg.qr(rng.standard_normal((germ.variables,) * 2))[0])


def _crossing(p, q):
    """All products a_i b_j."""
    d = p + q
    return [
        {tuple(int(v in (i, p + j)) for v in range(d)): 1.0} for i in range(p) for j in range(q)
    ]


CUBIC = {(3, 0, 0): 1.0, (0, 3, 0): 1.0, (0, 0, 3): 1.0}
QUARTIC = {(4, 0, 0): 1.0, (0, 4, 0): 1.0, (0, 0, 4): -1.0}
LINES = {(2, 1): 1.0, (1, 2): -1.0}


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(
    ("germ", "k", "rlct"),
    [
        (_germ(2, 3, LINES), 3, Fraction(1, 3)),  # three lines
        (_germ(3, 5, QUARTIC, {(5, 0, 0): 1.0}), 4, Fraction(3, 8)),  # any higher terms
        (_germ(3, 4, QUARTIC), 4, Fraction(3, 8)),
    ],
)
def test_decided_where_the_rank_is_large(germ, k, rlct, seed):
    germ = germ if seed is None else _turned(germ, seed)
    found = blow_up(germ, k, "")
    assert (found.rlct, found.multiplicity) == (rlct, 1)


def test_decided_where_the_leading_form_is_isolated():
    found = blow_up(_germ(3, 2, {(2, 0, 0): 1.0, (0, 2, 0): 1.0, (0, 0, 2): 1.0}), 2, "")
    assert (found.rlct, found.multiplicity) == (Fraction(3, 4), 1)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("p", "q"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (2, 4)])
def test_two_branches_that_cross(p, q, seed):
    """K = |a|²|b|²: λ = min(p, q)/2, m = 2 where they are equal; here the fibre is there."""
    exact = monomial_ideal([next(iter(g)) for g in _crossing(p, q)])
    germ = _germ(p + q, 2, *_crossing(p, q))
    found = blow_up(germ if seed is None else _turned(germ, seed), 2, "two branches")
    assert not found.decided
    assert found.lower == exact.rlct == Fraction(min(p, q), 2)
    assert found.attained == exact.multiplicity
    assert found.upper == Fraction(p + q, 4)
    assert found.rule == "two branches"


def test_cones():
    """Light cone (1/2, 1); cone over a cubic (1/2, 2)."""
    light = blow_up(_germ(3, 2, {(2, 0, 0): 1.0, (0, 2, 0): 1.0, (0, 0, 2): -1.0}), 2, "")
    assert (light.lower, light.attained) == (Fraction(1, 2), 1)
    cubic = blow_up(_germ(3, 3, CUBIC), 3, "")
    assert (cubic.lower, cubic.upper, cubic.attained) == (Fraction(1, 2), Fraction(1, 2), 2)


def test_the_bound_holds_whatever_the_higher_terms_are():
    """(ab, ac + b³): b = 0 is no branch any more; λ = 3/4 by the polyhedron, above the bound."""
    ideal = _germ(3, 3, {(1, 1, 0): 1.0}, {(1, 0, 1): 1.0}, {(0, 3, 0): 1.0})
    found = blow_up(ideal, 2, "")
    exact = monomial_ideal([(1, 1, 0), (1, 0, 1), (0, 3, 0)])
    assert found.lower <= exact.rlct <= found.upper


def test_no_rank_no_bound():
    """(x y)²: singular along its zeros; only 1/(2k) is left."""
    germ = _germ(3, 4, {(2, 2, 0): 1.0})
    assert leading_rank(germ, 4) == 0
    found = blow_up(germ, 4, "")
    assert found.lower == Fraction(1, 8)
    assert found.attained is None
