"""Thresholds of germs in several variables: right, or bounds that contain the truth."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest

from deaddir_fast.theory import monomial_ideal
from deaddir_fast.theory.germ import Germ, count, monomials
from deaddir_fast.theory.local_rlct import local_threshold
from deaddir_fast.theory.polyhedron import Polyhedron

Q = Fraction
Terms = Mapping[tuple[int, ...], float]


def germ(*functions: Terms, top: int = 6) -> Germ:
    """Polynomials {exponent: coefficient} as a germ."""
    d = len(next(iter(functions[0])))
    parts = {q: np.zeros((len(functions), count(d, q))) for q in range(1, top + 1)}
    for row, terms in enumerate(functions):
        for exponent, c in terms.items():
            q = sum(exponent)
            parts[q][row, monomials(d, q).index(exponent)] = c
    return Germ(d, top, parts, 1e-14)


def turned(given: Germ, seed: int = 0) -> Germ:
    rng = np.random.default_rng(seed)
    return given.substitute(np.linalg.qr(rng.standard_normal((given.variables,) * 2))[0])


def axis(d: int, i: int, power: int) -> tuple[int, ...]:
    return tuple(power * int(i == j) for j in range(d))


def check(given: Germ, rlct: Fraction, multiplicity: int, *, needed: bool) -> None:
    found = local_threshold(given)
    assert found.lower <= rlct <= found.upper
    if found.decided:
        assert (found.rlct, found.multiplicity) == (rlct, multiplicity), found.rule
    else:
        assert not needed, found.rule


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(
    "powers", [(3,), (2, 3), (2, 3, 4), (1, 2, 5), (3, 3, 2), (2, 2, 2, 3), (1, 1, 3, 3)]
)
def test_generators_of_powers(powers: tuple[int, ...], rotate: bool) -> None:
    """(x_1^k_1, …): λ = Σ 1/(2 k_i)."""
    d = len(powers)
    given = germ(*({axis(d, i, k): 1.0} for i, k in enumerate(powers)))
    check(
        turned(given) if rotate else given, sum((Q(1, 2 * k) for k in powers), Q(0)), 1, needed=True
    )


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("powers", [(2, 4, 4), (2, 2, 4), (4, 4, 4), (2, 6, 6)])
def test_sum_of_even_powers(powers: tuple[int, ...], rotate: bool) -> None:
    """One equation with an isolated quasi-homogeneous zero: the same λ."""
    given = germ({axis(3, i, k): 1.0 + i for i, k in enumerate(powers)})
    check(
        turned(given) if rotate else given, sum((Q(1, 2 * k) for k in powers), Q(0)), 1, needed=True
    )


@pytest.mark.parametrize("d", [2, 3, 4])
def test_quadratic_cones(d: int) -> None:
    """Definite: λ = d/4. Indefinite: a regular equation off 0, 1/2, with a tie in the plane."""
    for positive in range(1, d + 1):
        given = germ({axis(d, i, 2): (1.0 + i) * (1 if i < positive else -1) for i in range(d)})
        definite = positive == d
        rlct = Q(d, 4) if definite else Q(1, 2)
        check(turned(given, positive), rlct, 2 if d == 2 and not definite else 1, needed=True)


IDEALS = [
    [(1, 0, 0), (0, 1, 1)],
    [(1, 1, 1)],
    [(1, 1, 0), (0, 0, 3)],
    [(1, 1, 0), (0, 1, 1), (1, 0, 1)],
    [(2, 1, 1)],
    [(2, 0, 0), (0, 1, 2), (0, 3, 0)],
    [(1, 1, 0, 0), (0, 0, 1, 1)],
]


@pytest.mark.parametrize("corners", IDEALS, ids=str)
def test_monomial_ideals(corners: list[tuple[int, ...]]) -> None:
    rlct, multiplicity = monomial_ideal(corners)
    given = germ(*({c: 1.0} for c in corners))
    check(given, Q(rlct), multiplicity, needed=True)
    check(turned(given), Q(rlct), multiplicity, needed=False)


@pytest.mark.parametrize(
    ("function", "rlct", "multiplicity"),
    [
        ({(2, 0, 0): 1.0, (0, 2, 1): -1.0}, Q(1, 2), 2),  # Whitney umbrella
        ({(3, 0, 0): 1.0, (0, 3, 0): 1.0, (0, 0, 3): 1.0}, Q(1, 2), 2),  # cubic cone: 3/6 = 1/2
        ({(2, 0, 1): 1.0, (0, 2, 1): 1.0}, Q(1, 2), 2),  # (x² + y²) z
        ({(4, 0, 0): 1.0, (2, 2, 0): 1.0, (2, 0, 2): 1.0}, Q(1, 4), 1),  # x² |v|²
        ({(3, 0, 0): 1.0, (0, 2, 0): 1.0, (0, 0, 2): 1.0}, Q(1, 2), 1),  # A2: 1/3 + 1/2 + 1/2 > 1
        ({(4, 0, 0): 1.0, (0, 4, 0): 1.0, (0, 0, 4): -1.0}, Q(3, 8), 1),
    ],
    ids=["umbrella", "cubic", "plane and axis", "doubled plane", "A2", "quartic cone"],
)
def test_surfaces(function: Terms, rlct: Fraction, multiplicity: int) -> None:
    check(germ(function), rlct, multiplicity, needed=False)
    check(turned(germ(function)), rlct, multiplicity, needed=False)


def test_two_quadrics() -> None:
    """A complete intersection of two quadrics in R⁴: min(4/4, 2/2) = 1 on a tie, m = 2."""
    first = {axis(4, 0, 2): 1.0, axis(4, 1, 2): 1.0, axis(4, 2, 2): -1.0, axis(4, 3, 2): -1.0}
    second = {(1, 1, 0, 0): 1.0, (0, 0, 1, 1): 2.0, axis(4, 0, 2): 1.0, axis(4, 2, 2): -0.5}
    check(germ(first, second, top=3), Q(1), 2, needed=False)


def test_cylinder_over_a_cusp() -> None:
    """Variables that do not occur are dropped, in any coordinates."""
    check(turned(germ({(2, 0, 0, 0): 1.0, (0, 3, 0, 0): -1.0}, top=4)), Q(5, 12), 1, needed=True)


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize(
    "s", [(10.0, 1.0, 0.1), (1e2, 1.0, 1e-2), (1e3, 1.0, 1e-2), (1e4, 1, 1e-4)]
)
def test_scales_of_the_variables(power: int, s: tuple[float, float, float]) -> None:
    """λ does not depend on units; what drops below the stated rounding is said to be a zero."""
    given = germ({axis(3, i, power): s[i] ** power for i in range(3)})
    found = local_threshold(given)
    rlct = Q(3, 2 * power)
    smallest = (s[2] / s[0]) ** power
    if smallest > 3000 * given.noise:
        assert found.lower <= rlct <= found.upper
        assert not found.decided or (found.rlct, found.multiplicity) == (rlct, 1)
    elif found.decided and found.rlct != rlct:
        assert found.rests_on_zeros


def test_flat() -> None:
    found = local_threshold(Germ(3, 4, {2: np.zeros((1, 6))}))
    assert not found.decided
    assert (found.lower, found.upper) == (0, Q(3, 10))


def test_prior_exponent() -> None:
    for h in (1, 3):
        assert local_threshold(germ({(3,): 1.0}), prior_exponent=h).rlct == Q(1 + h, 6)
        ball = germ({axis(3, i, 2): 1.0 for i in range(3)})
        assert local_threshold(ball, prior_exponent=h).rlct == Q(3 + h, 4)


def test_compact_faces() -> None:
    support = [(4, 0), (1, 1), (0, 4), (2, 2), (2, 1), (5, 0)]
    assert Polyhedron.of(support).on_compact_faces(support) == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
