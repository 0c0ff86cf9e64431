"""Taylor polynomials of several functions: fits, substitutions, derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deaddir_fast.theory.germ import (
    Germ,
    count,
    evaluate_monomials,
    fit_germ,
    least_squares,
    monomials,
)
from deaddir_fast.theory.threshold import Undecided


def random_germ(d: int, top: int, rows: int, seed: int = 0) -> Germ:
    rng = np.random.default_rng(seed)
    return Germ(d, top, {q: rng.standard_normal((rows, count(d, q))) for q in range(1, top + 1)})


@pytest.mark.parametrize(("d", "degree"), [(1, 0), (1, 5), (2, 3), (3, 4), (5, 2)])
def test_monomials(d: int, degree: int) -> None:
    found = monomials(d, degree)
    assert len(found) == count(d, degree) == math.comb(d + degree - 1, degree)
    assert len(set(found)) == len(found)
    assert all(sum(e) == degree and len(e) == d for e in found)


def test_values_of_monomials() -> None:
    points = np.array([[2.0, -3.0, 0.5]])
    for exponent, value in zip(monomials(3, 4), evaluate_monomials(points, 4)[0], strict=True):
        assert value == math.prod(p**e for p, e in zip(points[0], exponent, strict=True))


def test_least_squares() -> None:
    rng = np.random.default_rng(0)
    design, exact = rng.standard_normal((9, 4)), rng.standard_normal((4, 2))
    np.testing.assert_allclose(least_squares(design, design @ exact), exact, rtol=1e-12)


@pytest.mark.parametrize(("d", "top"), [(1, 8), (2, 6), (3, 5), (4, 4)])
def test_fit_recovers_the_germ(d: int, top: int) -> None:
    exact = random_germ(d, top, 3)
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((count(d, top) + d + 4, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    values = {q: exact.evaluate(q, directions) for q in range(1, top + 1)}
    found, misfit = fit_germ(directions, values, top)
    assert misfit < 1e-12
    for q in range(1, top + 1):
        np.testing.assert_allclose(found.part(q), exact.part(q), rtol=0, atol=1e-8)


def test_misfit_of_a_kink() -> None:
    """|x| has degree 1 along every line and is no polynomial."""
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((12, 2))
    _, misfit = fit_germ(directions, {1: np.abs(directions[:, :1])}, 1)
    assert misfit > 1e-2


def test_substitution_is_composition() -> None:
    germ = random_germ(4, 4, 2)
    rng = np.random.default_rng(2)
    for e in (1, 2, 4):
        basis = np.linalg.qr(rng.standard_normal((4, 4)))[0][:, :e]
        inside = germ.substitute(basis)
        points = rng.standard_normal((7, e))
        assert inside.variables == e
        for q in range(1, 5):
            np.testing.assert_allclose(
                inside.evaluate(q, points), germ.evaluate(q, points @ basis.T), atol=1e-10
            )


def test_jacobian_against_differences() -> None:
    germ = random_germ(3, 4, 2)
    points = np.random.default_rng(3).standard_normal((5, 3))
    step = 1e-5
    for q in range(1, 5):
        exact = germ.jacobian(q, points)
        for index in range(3):
            shift = step * np.eye(3)[index]
            slope = germ.evaluate(q, points + shift) - germ.evaluate(q, points - shift)
            np.testing.assert_allclose(exact[:, :, index], slope / (2 * step), atol=1e-6)


def test_invariant_directions() -> None:
    """A germ of two rotated coordinates does not depend on the other two."""
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((4, 4)))[0]
    germ = random_germ(2, 3, 2).substitute(turn[:, :2].T)
    kept = germ.invariant_directions((1, 2, 3), 1e-10)
    assert kept.shape == (4, 2)
    np.testing.assert_allclose(turn[:, :2].T @ kept, 0.0, atol=1e-10)
    # x² alone: the linear part is missing, y and beyond are free.
    square = Germ(2, 2, {2: np.array([[1.0, 0.0, 0.0]])})
    np.testing.assert_allclose(np.abs(square.invariant_directions((2,), 1e-10)), [[0.0], [1.0]])


def test_absent() -> None:
    germ = Germ(1, 2, {1: np.array([[1.0]]), 2: np.array([[0.0]])}, noise=1e-12)
    assert germ.absent(np.array([1e-12]))
    assert not germ.absent(np.array([1e-6]))
    with pytest.raises(Undecided):
        germ.absent(np.array([3e-10]))


def test_planar_table() -> None:
    germ = random_germ(2, 4, 3)
    table = germ.planar()
    x, y = 0.3, -0.7
    powers = np.array([[x**i * y**j for j in range(5)] for i in range(5)])
    values = sum(germ.evaluate(q, np.array([[x, y]]))[0] for q in range(1, 5))
    np.testing.assert_allclose((table * powers).sum((1, 2)), values, rtol=1e-12)


def test_missing_degree_is_zero() -> None:
    germ = Germ(3, 4, {2: np.ones((2, 6))})
    assert germ.part(3).shape == (2, 10)
    assert not germ.part(3).any()
    assert germ.scale == 1.0
