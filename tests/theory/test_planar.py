"""Plane germs with known thresholds: right, or undecided with bounds that hold."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from numpy.polynomial import polynomial
from numpy.typing import NDArray

from deaddir_fast.theory import monomial_ideal
from deaddir_fast.theory.planar import planar_threshold

Array = NDArray[np.float64]
TOP = 10
Q = Fraction


def poly(terms: dict[tuple[int, int], float], top: int = TOP) -> Array:
    """{(i, j): c} -> (top+1, top+1) coefficients of c x^i y^j."""
    out = np.zeros((top + 1, top + 1))
    for (i, j), c in terms.items():
        out[i, j] = c
    return out


def times(*factors: Array) -> Array:
    """Product modulo degree TOP + 1."""
    out = poly({(0, 0): 1.0})
    i, j = np.indices(out.shape)
    for factor in factors:
        full = np.zeros_like(out)
        for a, b in zip(*np.nonzero(factor), strict=True):
            full[a:, b:] += factor[a, b] * out[: TOP + 1 - a, : TOP + 1 - b]
        out = np.where(i + j <= TOP, full, 0.0)
    return out


X, Y = poly({(1, 0): 1}), poly({(0, 1): 1})


def line(a: float, b: float) -> Array:
    return poly({(1, 0): a, (0, 1): b})


def warped(f: Array, seed: int, bend: float) -> Array:
    """f after a random rotation and, with ``bend``, a random non-linear change of coordinates."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((2, 2)))[0]
    images = []
    for row in turn:
        image = line(*row)
        for degree in (2, 3):
            for i in range(degree + 1):
                image[i, degree - i] = bend * rng.standard_normal()
        images.append(image)
    powers = [[poly({(0, 0): 1.0})], [poly({(0, 0): 1.0})]]
    for kept, image in zip(powers, images, strict=True):
        for _ in range(TOP):
            kept.append(times(kept[-1], image))
    out = np.zeros_like(f)
    for i, j in zip(*np.nonzero(f), strict=True):
        out += f[i, j] * times(powers[0][i], powers[1][j])
    return out


CUSP = poly({(0, 2): 1, (3, 0): -1})
OTHER_CUSP = poly({(2, 0): 1, (0, 3): -1})
UP, DOWN = poly({(0, 1): 1, (2, 0): -1}), poly({(0, 1): 1, (2, 0): 1})
PUISEUX = times(CUSP, CUSP) - poly({(5, 1): 1})

# λ of K = ½f² is half the real log canonical threshold of f.
GERMS: dict[str, tuple[list[Array], Fraction, int]] = {
    "x": ([X], Q(1, 2), 1),
    "xy": ([times(X, Y)], Q(1, 2), 2),
    "x²y": ([times(X, X, Y)], Q(1, 4), 1),
    "x²y²": ([times(X, X, Y, Y)], Q(1, 4), 2),
    "three lines": ([times(X, Y, line(1, -1))], Q(1, 3), 1),
    "four lines": ([times(X, Y, line(1, -1), line(1, 2))], Q(1, 4), 1),
    "lines 2,1,1": ([times(X, X, Y, line(1, -1))], Q(1, 4), 2),
    "lines 3,1": ([times(X, X, X, line(1, -1))], Q(1, 6), 1),
    "node": ([poly({(0, 2): 1, (2, 0): -1, (3, 0): -1})], Q(1, 2), 2),
    "circle": ([poly({(2, 0): 1, (0, 2): 1})], Q(1, 2), 1),
    "x⁴+y⁴": ([poly({(4, 0): 1, (0, 4): 1})], Q(1, 4), 1),
    "x²+y⁶": ([poly({(2, 0): 1, (0, 6): 1})], Q(1, 3), 1),
    "cusp": ([CUSP], Q(5, 12), 1),
    "cusp²": ([times(CUSP, CUSP)], Q(5, 24), 1),
    "cusp and tangent": ([times(CUSP, Y)], Q(5, 18), 1),
    "cusp and normal": ([times(CUSP, X)], Q(5, 16), 1),
    "two cusps": ([times(CUSP, OTHER_CUSP)], Q(1, 4), 2),
    # Characteristic pairs (2,3), (2,·): multiplicity 4, first exponent 6: lct = 1/4 + 1/6.
    "two Puiseux pairs": ([PUISEUX], Q(5, 24), 1),
    "tacnode": ([times(UP, DOWN)], Q(3, 8), 1),
    # Curves over the tacnode offer 2/(2·3), 3/(2·6); the double branch 1/4 ties with the second.
    "tacnode 2,1": ([times(UP, UP, DOWN)], Q(1, 4), 2),
    "parabola²": ([times(UP, UP)], Q(1, 4), 1),
    "y³−x⁴": ([poly({(0, 3): 1, (4, 0): -1})], Q(7, 24), 1),
    "y³−x⁵": ([poly({(0, 3): 1, (5, 0): -1})], Q(4, 15), 1),
    "y²−x⁷": ([poly({(0, 2): 1, (7, 0): -1})], Q(9, 28), 1),
    "(y−x², x⁴)": ([UP, times(X, X, X, X)], Q(5, 8), 1),
}
for _corners in (
    [(2, 0), (0, 3)],
    [(4, 0), (1, 1), (0, 4)],
    [(2, 1), (1, 2)],
    [(2, 2), (5, 0), (0, 5)],
    [(4, 0), (2, 1), (1, 3), (0, 6)],
    [(3, 2), (2, 3)],
    [(5, 0), (3, 1), (1, 3), (0, 6)],
):
    _rlct, _multiplicity = monomial_ideal(_corners)
    GERMS[f"monomials {_corners}"] = (
        [poly({corner: 1.0}) for corner in _corners],
        Q(_rlct),
        _multiplicity,
    )


@pytest.mark.parametrize("name", GERMS)
@pytest.mark.parametrize("bend", [None, 0.0, 0.3], ids=["straight", "rotated", "warped"])
def test_known_germs(name: str, bend: float | None) -> None:
    """λ and m are invariant under a change of coordinates and of generators."""
    generators, rlct, multiplicity = GERMS[name]
    f = np.stack(generators if bend is None else [warped(g, 1, bend) for g in generators])
    mixed = np.tensordot(np.random.default_rng(2).standard_normal((len(f) + 2, len(f))), f, 1)
    for coefficients in (f, 1e6 * mixed):
        found = planar_threshold(coefficients)
        assert found.lower <= rlct <= found.upper
        if found.decided:
            assert (found.rlct, found.multiplicity) == (rlct, multiplicity)
        else:
            raise AssertionError(found.rule)


@pytest.mark.parametrize("name", GERMS)
@pytest.mark.parametrize("scales", [(30.0, 1.0), (1.0, 0.03), (10.0, 0.1), (1e3, 0.1)])
def test_units_of_the_variables(name: str, scales: tuple[float, float]) -> None:
    """Exact coefficients in other units: right, or undecided with bounds that hold."""
    generators, rlct, multiplicity = GERMS[name]
    i, j = np.indices(generators[0].shape)
    found = planar_threshold(np.stack(generators) * scales[0] ** i * scales[1] ** j, noise=0.0)
    assert found.lower <= rlct <= found.upper
    if found.decided:
        assert (found.rlct, found.multiplicity) == (rlct, multiplicity)


@pytest.mark.parametrize("eps", [10.0**-k for k in range(1, 14)])
def test_small_coefficients(eps: float) -> None:
    """A small coefficient is seen or the germ is undecided."""
    for f, rlct in (
        (poly({(2, 0): 1, (0, 2): eps}), Q(1, 2)),
        (poly({(2, 0): 1, (0, 4): -eps}), Q(3, 8)),
        (poly({(0, 2): 1, (3, 0): -eps}), Q(5, 12)),
        (poly({(3, 0): 1, (0, 2): eps}), Q(5, 12)),
    ):
        found = planar_threshold(f[None])
        assert found.lower <= rlct <= found.upper
        if found.decided:
            assert (found.rlct, found.multiplicity) == (rlct, 1)


@pytest.mark.parametrize("noise", [0.0, 1e-15])
@pytest.mark.parametrize("eps", [10.0**-k for k in range(1, 6)])
def test_small_angles(eps: float, noise: float) -> None:
    """Branches a small angle apart; ε² is far above rounding, so one must not take them for one."""
    for f, rlct, multiplicity in (
        (times(X, Y, line(1, -eps)), Q(1, 3), 1),
        (times(X, line(1, -eps)), Q(1, 2), 2),
        (times(X, X, Y, line(1, -eps)), Q(1, 4), 2),
        (times(UP, poly({(0, 1): 1, (2, 0): -1 - eps})), Q(3, 8), 1),
    ):
        found = planar_threshold(f[None], noise=noise)
        assert found.lower <= rlct <= found.upper
        if found.decided:
            assert (found.rlct, found.multiplicity) == (rlct, multiplicity)
        else:
            assert eps < 1e-2


def test_order_beyond_what_is_known() -> None:
    """Truncated too early: undecided, or a decision that says that it rests on zeros."""
    short = TOP // 2
    for corners in ([(2, 0), (0, TOP)], [(3, 0), (0, TOP - 1)], [(2, 2), (TOP, 0), (0, TOP)]):
        rlct = Q(monomial_ideal(corners)[0])
        kept = [poly({c: 1.0}, short) for c in corners if sum(c) <= short]
        found = planar_threshold(np.stack(kept))
        assert not found.decided or found.rests_on_zeros
        assert found.decided or found.lower <= rlct <= found.upper


def test_flat_germ() -> None:
    found = planar_threshold(np.zeros((2, 5, 5)))
    assert not found.decided
    assert (found.lower, found.upper) == (0, Q(2, 10))
    assert "flat to order 4" in found.rule


def test_prior_exponent() -> None:
    """A prior r^h adds h to the Jacobian of the first blow-up: (2 + h)/(2k) on isolated forms."""
    for h in (1, 2, 5):
        found = planar_threshold(poly({(4, 0): 1, (0, 4): 1})[None], prior_exponent=h)
        assert found.rlct == Q(2 + h, 8)
        # xy with r^h: the branches still offer 1/2 each and meet no more than one curve.
        found = planar_threshold(times(X, Y)[None], prior_exponent=h)
        assert (found.rlct, found.multiplicity) == (Q(1, 2), 1)


def test_product_of_polynomials() -> None:
    """The helper above against numpy."""
    got = times(line(1, 2), line(3, -1))[:3, :3]
    want = np.zeros((3, 3))
    for i, j, c in ((2, 0, 3), (1, 1, 5), (0, 2, -2)):
        want[i, j] = c
    np.testing.assert_array_equal(got, want)
    assert polynomial.polyval2d(0.3, 0.7, got) == pytest.approx((0.3 + 1.4) * (0.9 - 0.7))
