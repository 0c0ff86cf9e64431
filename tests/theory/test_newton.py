"""Newton non-degenerate ideals: known singularities, volumes by quadrature, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import pytest

from deaddir_fast.theory import monomial_ideal
from deaddir_fast.theory.germ import Germ, count, monomials
from deaddir_fast.theory.newton import newton_bound, nondegenerate
from deaddir_fast.theory.threshold import Undecided

Q = Fraction
Terms = Mapping[tuple[int, ...], float]
Array = np.ndarray


def germ(*functions: Terms, top: int = 6) -> Germ:
    d = len(next(iter(functions[0])))
    parts = {q: np.zeros((len(functions), count(d, q))) for q in range(1, top + 1)}
    for row, terms in enumerate(functions):
        for exponent, c in terms.items():
            parts[sum(exponent)][row, monomials(d, sum(exponent)).index(exponent)] = c
    return Germ(d, top, parts, 1e-14)


# f = x² + q(y, z): (name, terms, q, λ, m). Rational double points (A, D, E) have a resolution in
# which f is reduced and every divisor offers 1 or more, so λ = 1/2; the umbrella has a double line.
SURFACES: list[tuple[str, Terms, Callable[[Array, Array], Array], Fraction, int]] = [
    ("cone", {(2, 0, 0): 1, (0, 2, 0): 1, (0, 0, 2): -1}, lambda y, z: y**2 - z**2, Q(1, 2), 1),
    ("A3", {(2, 0, 0): 1, (0, 2, 0): -1, (0, 0, 4): 1}, lambda y, z: z**4 - y**2, Q(1, 2), 1),
    ("D4", {(2, 0, 0): 1, (0, 2, 1): 1, (0, 0, 3): -1}, lambda y, z: y**2 * z - z**3, Q(1, 2), 1),
    ("D5", {(2, 0, 0): 1, (0, 2, 1): 1, (0, 0, 4): 1}, lambda y, z: y**2 * z + z**4, Q(1, 2), 1),
    ("E6", {(2, 0, 0): 1, (0, 3, 0): 1, (0, 0, 4): 1}, lambda y, z: y**3 + z**4, Q(1, 2), 1),
    ("E7", {(2, 0, 0): 1, (0, 3, 0): 1, (0, 1, 3): 1}, lambda y, z: y**3 + y * z**3, Q(1, 2), 1),
    ("E8", {(2, 0, 0): 1, (0, 3, 0): 1, (0, 0, 5): 1}, lambda y, z: y**3 + z**5, Q(1, 2), 1),
    ("umbrella", {(2, 0, 0): 1, (0, 2, 1): -1}, lambda y, z: -(y**2) * z, Q(1, 2), 2),
    ("elliptic", {(2, 0, 0): 1, (0, 4, 0): 1, (0, 0, 4): -1}, lambda y, z: y**4 - z**4, Q(1, 2), 2),
    (
        "definite",
        {(2, 0, 0): 1, (0, 4, 0): 1, (0, 0, 6): 1},
        lambda y, z: y**4 + z**6,
        Q(11, 24),
        1,
    ),
    ("low", {(2, 0, 0): 1, (0, 4, 0): 1, (0, 0, 6): -1}, lambda y, z: y**4 - z**6, Q(11, 24), 1),
]


@pytest.mark.parametrize(("name", "f", "q", "rlct", "m"), SURFACES, ids=[s[0] for s in SURFACES])
def test_surfaces(
    name: str, f: Terms, q: Callable[[Array, Array], Array], rlct: Fraction, m: int
) -> None:
    found = nondegenerate(germ(f))
    assert (found.rlct, found.multiplicity) == (rlct, m)


def volume(q: Callable[[Array, Array], Array], delta: Array) -> Array:
    """vol{|x² + q(y, z)| < δ} in the unit cube: x in closed form, (y, z) by stratified sampling.

    One random point in every cell of a logarithmic grid.
    """
    rng = np.random.default_rng(0)
    edges = np.concatenate([[0.0], np.logspace(-9, 0, 1201)])
    edges = np.concatenate([-edges[::-1], edges[1:]])
    width = np.diff(edges)
    area = np.outer(width, width)
    y = edges[:-1, None] + width[:, None] * rng.random(area.shape)
    z = edges[None, :-1] + width[None] * rng.random(area.shape)
    values = q(y, z)
    out = []
    for d in delta:
        high = np.sqrt(np.clip(d - values, 0, 1))
        low = np.sqrt(np.clip(-d - values, 0, 1))
        out.append(float((2 * (high - low) * area).sum()))
    return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "f", "q", "rlct", "m"), SURFACES, ids=[s[0] for s in SURFACES])
def test_volumes(
    name: str, f: Terms, q: Callable[[Array, Array], Array], rlct: Fraction, m: int
) -> None:
    """V δ^(−2λ) against log(1/δ) for m = 2; for m = 1 against the next exponent, 1/2 or P."""
    delta = np.logspace(-3, -7, 13)
    scaled = volume(q, delta) / delta ** (2 * float(rlct))
    gap = 2 * abs(float(monomial_ideal(list(f))[0]) - 0.5)

    def misfit(shape: Array) -> float:
        design = np.column_stack([np.ones_like(delta), shape])
        return float(np.linalg.norm(scaled - design @ np.linalg.lstsq(design, scaled)[0]))

    logarithm, power = misfit(np.log(delta)), misfit(delta ** (gap or 0.5))
    if m == 2:
        assert logarithm < 0.2 * power
    else:
        assert power < 0.2 * logarithm or np.ptp(scaled) < 0.05 * scaled[-1], (power, logarithm)


def test_volumes_quick() -> None:
    """The same for the two that differ in m alone."""
    delta = np.array([1e-3, 1e-6])
    cone = volume(SURFACES[0][2], delta) / delta
    umbrella = volume(SURFACES[7][2], delta) / delta
    assert cone[1] / cone[0] < 1.1
    assert umbrella[1] / umbrella[0] > 1.4


@pytest.mark.parametrize(
    ("functions", "rlct", "m"),
    [
        # a regular plane and one it crosses: (x, y)-coordinates make it x·w
        ([{(1, 1, 0): 1, (1, 0, 1): -1}], Q(1, 2), 2),
        ([{(2, 1, 0): 1, (2, 0, 1): -1}], Q(1, 4), 1),
        ([{(1, 2, 0): 1, (1, 0, 2): -1}], Q(1, 2), 3),  # x (y − z)(y + z): three planes
        ([{(1, 2, 0): 1, (1, 0, 2): 1}], Q(1, 2), 2),  # x (y² + z²)
        # x·(u, v): one plane or a line of codimension 2, crossing normally; 1/2 < 2/2
        ([{(1, 1, 0, 0): 1, (1, 0, 1, 0): -1}, {(1, 0, 1, 0): 1, (1, 0, 0, 1): -1}], Q(1, 2), 1),
        # two quadrics in R⁴ whose common zeros are regular: min(4/4, 2/2), a tie
        (
            [
                {(2, 0, 0, 0): 1, (0, 2, 0, 0): 1, (0, 0, 2, 0): -1, (0, 0, 0, 2): -1},
                {(2, 0, 0, 0): 1, (0, 2, 0, 0): 2, (0, 0, 2, 0): -3, (0, 0, 0, 2): -0.5},
            ],
            Q(1),
            2,
        ),
        # the same two without common zeros: isolated
        (
            [
                {(2, 0, 0, 0): 1, (0, 2, 0, 0): 1, (0, 0, 2, 0): -1, (0, 0, 0, 2): -1},
                {(2, 0, 0, 0): 1, (0, 2, 0, 0): 2, (0, 0, 2, 0): 3, (0, 0, 0, 2): 0.5},
            ],
            Q(1),
            1,
        ),
    ],
)
def test_ideals(functions: list[Terms], rlct: Fraction, m: int) -> None:
    found = nondegenerate(germ(*functions))
    assert (found.rlct, found.multiplicity) == (rlct, m)


def test_degenerate_is_refused() -> None:
    for function in (
        {(2, 0, 0): 1, (1, 1, 0): -2, (0, 2, 0): 1, (0, 0, 3): 1},  # (x − y)² + z³
        {(2, 0, 0): 1, (1, 1, 0): -2, (0, 2, 0): 1 + 1e-9, (0, 0, 3): 1},
        {(2, 2, 0): 1, (1, 1, 1): -2, (0, 0, 2): 1},  # (xy − z)²
    ):
        with pytest.raises(Undecided):
            nondegenerate(germ(function))


def test_scales_of_the_variables() -> None:
    """Units change nothing."""
    s = (30.0, 0.01, 2.0)
    for f, rlct, m in [(SURFACES[0][1], Q(1, 2), 1), (SURFACES[7][1], Q(1, 2), 2)]:
        scaled = {v: c * np.prod(np.array(s) ** v) for v, c in f.items()}
        found = nondegenerate(germ(scaled))
        assert (found.rlct, found.multiplicity) == (rlct, m)


def test_unknown_terms() -> None:
    """With pure powers of all variables nothing is assumed; without them zeros are."""
    assert not nondegenerate(germ(SURFACES[0][1])).rests_on_zeros
    umbrella = nondegenerate(germ(SURFACES[7][1]))
    assert umbrella.rests_on_zeros
    planes = [(f.basis.tolist(), f.order) for f in umbrella.fibres]
    assert planes == [([[0], [1], [0]], 1), ([[0], [0], [1]], 2)]  # y: x² − z, z: x² − y²


def test_bound_holds_in_any_coordinates() -> None:
    """Monomial ideals turned at random: the bound stays above λ, and meets it unturned."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        d = int(rng.integers(2, 5))
        corners = [tuple(int(x) for x in rng.integers(0, 3, d)) for _ in range(4)]
        corners = [c for c in corners if 0 < sum(c) <= 6] + [(2,) + (0,) * (d - 1)]
        exact = germ(*({c: 1.0} for c in corners))
        rlct = monomial_ideal(corners)[0]
        pure = [tuple(7 * int(i == j) for j in range(d)) for i in range(d)]
        assert newton_bound(exact)[0] == monomial_ideal(corners + pure)[0] >= rlct
        turned = exact.substitute(np.linalg.qr(rng.standard_normal((d, d)))[0])
        assert newton_bound(turned)[0] >= rlct
