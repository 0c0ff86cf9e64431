"""Truncated Taylor polynomials of several functions at a point: the germ of an ideal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations_with_replacement
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from deaddir_fast.theory.planar import absent

Array = NDArray[np.float64]


@lru_cache(maxsize=256)
def monomials(variables: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Exponent vectors of all monomials of one degree, in a fixed order."""
    out = []
    for chosen in combinations_with_replacement(range(variables), degree):
        exponent = [0] * variables
        for index in chosen:
            exponent[index] += 1
        out.append(tuple(exponent))
    return tuple(out)


def count(variables: int, degree: int) -> int:
    """Number of monomials of one degree."""
    return comb(variables + degree - 1, degree)


def least_squares(design: Array, values: Array) -> Array:
    """Solution of a well-posed overdetermined system by QR."""
    q, r = np.linalg.qr(design)
    return solve_triangular(r, q.T @ values)


def evaluate_monomials(points: Array, degree: int) -> Array:
    """(points, monomials) values of all monomials of one degree; ``points`` is (q, d)."""
    exponents = np.array(monomials(points.shape[1], degree)).reshape(-1, points.shape[1])
    return np.prod(points[:, None, :] ** exponents[None], axis=2)


@dataclass(frozen=True)
class Germ:
    """Generators f_1..f_g of an ideal in d variables, known up to degree ``top``.

    Attributes:
        variables: d.
        top: highest degree that is known; terms beyond are unknown, not zero.
        parts: degree -> (g, number of monomials) coefficients; a missing degree is zero.
        noise: rounding of the coefficients relative to the largest one.
    """

    variables: int
    top: int
    parts: Mapping[int, Array]
    noise: float = 1e-12

    @cached_property
    def scale(self) -> float:
        """Largest coefficient."""
        return max((float(np.abs(c).max(initial=0.0)) for c in self.parts.values()), default=0.0)

    def absent(self, coefficients: Array) -> bool:
        """Whether coefficients vanish: below 30 times the noise, relative to the largest one.

        Raises:
            Undecided: below 3000 times the noise, where neither zero nor presence is certain.
        """
        return absent(np.asarray(coefficients), np.asarray(self.noise * self.scale))

    def part(self, degree: int) -> Array:
        """Coefficients of one degree, zeros where absent."""
        if degree in self.parts:
            return self.parts[degree]
        rows = next((c.shape[0] for c in self.parts.values()), 0)
        return np.zeros((rows, count(self.variables, degree)))

    def terms(self) -> tuple[list[tuple[int, ...]], list[Array]]:
        """Exponents of the monomials that are present, and their (g,) coefficients.

        Raises:
            Undecided: where a coefficient is neither clearly zero nor clearly present.
        """
        exponents: list[tuple[int, ...]] = []
        columns: list[Array] = []
        for degree in sorted(self.parts):
            for column, exponent in enumerate(monomials(self.variables, degree)):
                values = self.parts[degree][:, column]
                if not self.absent(values):
                    exponents.append(exponent)
                    columns.append(values)
        return exponents, columns

    def evaluate(self, degree: int, points: Array) -> Array:
        """(q, g) values of the homogeneous part of one degree at (q, d) points."""
        return evaluate_monomials(points, degree) @ self.part(degree).T

    def substitute(self, basis: Array) -> Germ:
        """The germ in new coordinates x = basis @ y; ``basis`` is (d, e), e <= d restricts it."""
        new = basis.shape[1]
        parts: dict[int, Array] = {}
        rng = np.random.default_rng(0)
        for degree, coefficients in self.parts.items():
            size = count(new, degree)
            points = rng.standard_normal((2 * size + 4, new))
            points /= np.linalg.norm(points, axis=1, keepdims=True)
            values = evaluate_monomials(points @ basis.T, degree) @ coefficients.T
            solved = least_squares(evaluate_monomials(points, degree), values)
            parts[degree] = solved.T
        largest = max((float(np.abs(c).max(initial=0.0)) for c in parts.values()), default=0.0)
        # The rounding stays what it is, so relative to what is left it may grow.
        noise = min(1.0, self.noise * self.scale / largest) if largest > 0 else self.noise
        return Germ(new, self.top, parts, noise)

    def jacobian(self, degree: int, points: Array) -> Array:
        """(q, g, d) derivatives of the homogeneous part of one degree."""
        d = self.variables
        exponents = np.array(monomials(d, degree)).reshape(-1, d)
        out = np.zeros((points.shape[0], self.part(degree).shape[0], d))
        for index in range(d):
            lowered = exponents.copy()
            factor = lowered[:, index].astype(float)
            lowered[:, index] = np.maximum(lowered[:, index] - 1, 0)
            values = factor * np.prod(points[:, None, :] ** lowered[None], axis=2)
            out[:, :, index] = values @ self.part(degree).T
        return out

    def invariant_directions(self, degrees: tuple[int, ...], tolerance: float) -> Array:
        """(d, e) orthonormal basis of the u with ∂f/∂u = 0 in the given degrees."""
        rows = []
        rng = np.random.default_rng(1)
        for degree in degrees:
            if degree not in self.parts or degree == 0:
                continue
            points = rng.standard_normal((2 * count(self.variables, degree) + 4, self.variables))
            points /= np.linalg.norm(points, axis=1, keepdims=True)
            rows.append(self.jacobian(degree, points).reshape(-1, self.variables))
        if not rows:
            return np.eye(self.variables)
        _, values, axes = np.linalg.svd(np.concatenate(rows), full_matrices=True)
        padded = np.zeros(self.variables)
        padded[: len(values)] = values
        return axes[padded <= tolerance * padded.max(initial=0.0)].T

    def planar(self) -> Array:
        """(g, top+1, top+1) array of coefficients of x^i y^j; for two variables."""
        rows = next(iter(self.parts.values())).shape[0]
        out = np.zeros((rows, self.top + 1, self.top + 1))
        for degree, coefficients in self.parts.items():
            for column, (i, j) in enumerate(monomials(2, degree)):
                out[:, i, j] = coefficients[:, column]
        return out


def fit_germ(
    directions: Array, coefficients: Mapping[int, Array], top: int, noise: float = 1e-12
) -> tuple[Germ, float]:
    """Recover a germ from its homogeneous parts along lines.

    Args:
        directions: (p, d).
        coefficients: degree q -> (p, g) values of the degree-q part at each direction, i.e. the
            Taylor coefficients of t -> f(t u).
        top: highest degree given.
        noise: rounding of the coefficients relative to the largest one.

    Returns:
        the germ and the largest misfit relative to the largest coefficient. A misfit above
        rounding means that the functions are not analytic at the point (a kink).
    """
    parts: dict[int, Array] = {}
    misfit = 0.0
    d = directions.shape[1]
    for degree, values in coefficients.items():
        design = evaluate_monomials(directions, degree)
        solved = least_squares(design, values)
        misfit = max(misfit, float(np.abs(design @ solved - values).max(initial=0.0)))
        parts[degree] = solved.T
    germ = Germ(d, top, parts, noise)
    return germ, misfit / germ.scale if germ.scale > 0 else 0.0
