"""Linear factors of products of linear forms, and coordinates made of them."""

from __future__ import annotations

import numpy as np
import pytest

from deaddir_fast.theory.germ import Germ, count, evaluate_monomials, least_squares
from deaddir_fast.theory.linear_factors import factor_coordinates, initial_forms, linear_factors

Array = np.ndarray


def product(normals: Array, powers: list[int], extra: Array | None = None) -> tuple[int, Array]:
    """Degree and coefficients of Π (n_j · x)^k_j, times |x|² where ``extra`` is given."""
    d, degree = normals.shape[1], sum(powers) + (0 if extra is None else 2)
    rng = np.random.default_rng(5)
    points = rng.standard_normal((3 * count(d, degree), d))
    values = np.prod((points @ normals.T) ** np.array(powers), axis=1)
    if extra is not None:
        values = values * (points**2 @ extra)
    design = evaluate_monomials(points, degree)
    return degree, least_squares(design, values[:, None]).T


@pytest.mark.parametrize("definite", [False, True])
@pytest.mark.parametrize("powers", [[1], [1, 2], [3, 1, 1], [2, 2]])
@pytest.mark.parametrize("d", [2, 3, 4])
def test_factors_are_found(d: int, powers: list[int], definite: bool) -> None:
    rng = np.random.default_rng(d)
    normals = rng.standard_normal((len(powers), d))
    degree, form = product(normals, powers, np.ones(d) if definite else None)
    found = linear_factors(degree, form, d, 1e-13)
    assert len(found) == len(powers)
    for n in normals / np.linalg.norm(normals, axis=1, keepdims=True):
        assert max(abs(float(n @ m)) for m in found) > 1 - 1e-10


def test_no_factor() -> None:
    """A cone over a smooth cubic has real zeros and no plane in it."""
    rng = np.random.default_rng(0)
    assert linear_factors(3, rng.standard_normal((1, count(3, 3))), 3, 1e-14) == []


def test_initial_forms_of_mixed_generators() -> None:
    """Two generators of degrees 2 and 3, mixed: their leading forms come apart again."""
    d = 3
    _, quadric = product(np.eye(3)[:2], [1, 1])
    _, cubic = product(np.eye(3)[2:], [3])
    zero2, zero3 = np.zeros_like(quadric), np.zeros_like(cubic)
    mix = np.array([[0.6, 0.8], [0.8, -0.6]])
    parts = {2: mix @ np.vstack([quadric, zero2]), 3: mix @ np.vstack([zero3, cubic])}
    (two, first), (three, second) = initial_forms(Germ(d, 4, parts, 1e-14))
    assert (two, three) == (2, 3)
    assert abs(float((first @ quadric.T).item())) == pytest.approx(1.0)
    assert abs(float((second @ cubic.T).item())) == pytest.approx(1.0)


def test_coordinates_of_a_crossing() -> None:
    """In them a product of three linear forms is one monomial."""
    normals = np.random.default_rng(1).standard_normal((3, 3))
    degree, form = product(normals, [1, 2, 1])
    germ = Germ(3, 6, {degree: form}, 1e-14)
    basis = next(factor_coordinates(germ))
    turned = germ.substitute(basis).part(degree)[0]
    assert int((np.abs(turned) > 1e-10 * np.abs(turned).max()).sum()) == 1
