"""Common real zeros, with no coordinate zero, of the face polynomials of a Newton polyhedron.

On a compact face γ the generators restrict to f_γ = Σ_{v in γ} c_v x^v, quasi-homogeneous for the
weights of its normal cone, so that f_γ has as many effective variables as γ has dimensions: in one
orthant, x_i = ±e^{τ_i} for dim γ of the variables and ±1 for the others. Its zeros may run to
infinity, towards those of its faces. To have them all in one compact set, the space of τ is cut
along the normal fan of γ: where the monomial of the corner v0 is the largest, τ = −Σ s_j w_j with
s_j >= 0 and w_j the integer rays of a simplicial cone, and in y_j = e^{−s_j} in (0, 1]

    f_γ / x^{v0} = Σ_v c_v Π_j y_j^{<v − v0, w_j>},

a polynomial on the unit cube whose restrictions to y_j = 0 are those of the faces of γ (the charts
of the toric variety of γ; Khovanskii 1977). Two questions are answered on these closed cubes, each
with certainty or not at all, by bisection with interval bounds:

* is f_γ without zeros there (neither γ nor a face of it has one), and
* are the logarithmic derivatives y_j ∂f/∂y_j, as g vectors, independent wherever all g functions
  vanish? On y_J = 0 they are those of the face.

Existence of a zero is proved by a contraction (Newton–Kantorovich). Coefficients are intervals: the
given number ± its possible rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from deaddir_fast.theory.polyhedron import Vector, independent, simplicial_cones
from deaddir_fast.theory.threshold import Undecided

Array = NDArray[np.float64]

CELLS = 40_000  # per germ: cells looked at before giving up
BATCH = 512  # cells bounded at once
NARROW = 2.0**-11  # a cell this narrow that decides nothing holds a degenerate zero, or nearly so
ROUNDING = 1e-13  # of the arithmetic here, relative to the sum of absolute values
STARTS = 24  # points from which a zero is looked for
STEPS = 40


class Bounds(NamedTuple):
    """What was proved about the zeros in one set of cubes."""

    free: bool  # no zero at all
    regular: bool  # the differentials are independent at every zero


@dataclass(frozen=True)
class FaceSystem:
    """f_γ in effective variables, for one pattern of signs.

    Attributes:
        exponents: (v, e) integers: exponents of the effective variables.
        coefficients: (g, v), the signs of the orthant included.
        error: (v,) bound on the error of a coefficient.
    """

    exponents: NDArray[np.int64]
    coefficients: Array
    error: Array

    @classmethod
    def patterns(
        cls, exponents: NDArray[np.int64], coefficients: Array, error: Array
    ) -> Iterator[FaceSystem]:
        """The systems of all orthants that differ, scaled to coefficients of like size."""
        differences = (exponents - exponents[0]).T
        chosen = independent([tuple(int(v) for v in row) for row in differences], len(differences))
        effective = exponents[:, chosen]
        # Units of the variables: log|c_v| fitted by an affine function of v.
        size = np.abs(coefficients).max(0)
        design = np.column_stack([np.ones(len(size)), effective])
        fit = design @ np.linalg.lstsq(design, np.log(size), rcond=None)[0]
        seen = set()
        for signs in product((1, -1), repeat=exponents.shape[1]):
            pattern = np.prod(np.array(signs) ** (exponents % 2), axis=1)
            pattern = pattern * pattern[0]
            if pattern.tobytes() not in seen:
                seen.add(pattern.tobytes())
                scaled = np.exp(-fit)
                yield cls(effective, coefficients * pattern * scaled, error * scaled)

    @property
    def size(self) -> int:
        """e, effective variables."""
        return self.exponents.shape[1]

    def charts(self) -> Iterator[NDArray[np.int64]]:
        """(v, e) exponents in the coordinates y of every cube of the compactification."""
        if self.size == 0:
            yield self.exponents
            return
        points = [tuple(int(x) for x in row) for row in self.exponents]
        for corner in points:
            sides = [_minus(v, corner) for v in points if v != corner]
            if not _is_corner(corner, points):
                continue
            for rays in simplicial_cones(sides):
                yield (self.exponents - np.array(corner)) @ np.array(rays).T

    def find(self) -> bool:
        """Whether a zero in the open torus was found and proved to exist."""
        g, e = self.coefficients.shape[0], self.size
        if g > e:
            return False
        rng = np.random.default_rng(4)
        c, a = self.coefficients, self.exponents.astype(float)
        for start in range(STARTS):
            tau = rng.standard_normal(e) * (0.3 + 0.1 * start)
            for _ in range(STEPS):
                level = a @ tau
                p = np.exp(level - level.max())
                centred = a - (p @ a) / p.sum()
                values, slopes = c @ p, (c * p) @ centred
                if not np.isfinite(slopes).all():
                    break
                step = np.linalg.lstsq(slopes, -values, rcond=1e-9)[0]
                length = float(np.abs(step).max())
                tau = tau + step * min(1.0, 1.0 / max(length, 1e-300))
                if length < 1e-12:
                    break
            if np.isfinite(tau).all() and self._proved(tau):
                return True
        return False

    def _proved(self, tau: Array) -> bool:
        """Newton–Kantorovich at ``tau``: is there a zero nearby?"""
        c, a = self.coefficients, self.exponents.astype(float)
        level = a @ tau
        p = np.exp(level - level.max())
        a = a - (p @ a) / p.sum()  # multiplies f by a monomial: the same zeros
        slopes = (c * p) @ a
        values = np.linalg.svd(slopes, compute_uv=False)
        if values[-1] < 1e-9 * values[0] or values[-1] == 0:
            return False
        inverse = np.linalg.pinv(slopes)
        total = np.abs(c) @ p
        reach = np.abs(c @ p) + self.error @ p + ROUNDING * total
        turned = np.abs(a @ inverse)  # (v, g)
        for ball in 10.0 ** np.arange(-9, 0):
            spread = turned.sum(1) * ball
            if spread.max() > 1:
                break
            drift = (np.abs(c) * p * np.expm1(spread)) @ turned
            drift += ((self.error * p * np.exp(spread)) @ turned)[None]
            shrink = float(drift.sum(1).max()) + ROUNDING * float(
                (total[:, None] * turned.max()).sum()
            )
            if shrink < 0.5 and float(reach.max()) < 0.5 * ball:
                return True
        return False


def _minus(v: Vector, w: Vector) -> Vector:
    return tuple(a - b for a, b in zip(v, w, strict=True))


def _is_corner(point: Vector, points: list[Vector]) -> bool:
    """Whether a point is a vertex of the convex hull: the cone of its normals has an interior."""
    rows = np.array([_minus(point, v) for v in points if v != point], dtype=float)
    found = linprog(
        np.zeros(rows.shape[1]), A_ub=rows, b_ub=-np.ones(len(rows)), bounds=(None, None)
    )
    return bool(found.success)


@dataclass
class Search:
    """Bisection of cubes on a common budget."""

    budget: int = CELLS

    def bounds(self, system: FaceSystem, *, free: bool) -> Bounds:
        """What can be proved about the zeros of ``system`` and its faces.

        With ``free`` only absence of zeros is of use, and the search stops where that fails.

        Raises:
            Undecided: where zeros are degenerate or nearly so, or the budget is spent.
        """
        clear = True
        for exponents in system.charts():
            clear &= self._cube(system, exponents, free)
            if free and not clear:
                return Bounds(False, False)
        return Bounds(clear, True)

    def _cube(self, system: FaceSystem, exponents: NDArray[np.int64], free: bool) -> bool:
        """True: no zero in a cube. False: none that is not regular."""
        c, error = system.coefficients, system.error
        e = exponents.shape[1]
        stack: list[tuple[Array, Array]] = [(np.zeros((1, e)), np.ones((1, e)))]
        clear = True
        while stack:
            low, high = stack.pop()
            self.budget -= len(low)
            if self.budget < 0:
                raise Undecided("the zeros of the face polynomials are not resolved in the budget")
            small = np.prod(low[:, None, :] ** exponents[None], axis=2)
            large = np.prod(high[:, None, :] ** exponents[None], axis=2)
            middle, half = (large + small) / 2, (large - small) / 2
            slack = large @ error + ROUNDING * (large @ np.abs(c).max(0))
            values, radius = middle @ c.T, half @ np.abs(c).T + slack[:, None]
            open_ = (np.abs(values) <= radius).all(1)
            if open_.any():
                regular = np.zeros(len(low), dtype=bool)
                regular[open_] = _independent(
                    c, error, exponents, middle[open_], half[open_], large[open_]
                )
                if regular.any():
                    clear = False
                    if free:
                        return False
                open_ &= ~regular
            if not open_.any():
                continue
            low, high, small, large = low[open_], high[open_], small[open_], large[open_]
            if e == 0 or float((high - low).max(1).min()) < NARROW:
                raise Undecided("a face polynomial has a zero that is degenerate or nearly so")
            weight = np.abs(c).max(0)
            gain = np.stack(
                [(large - _with(low, high, j, exponents)) @ weight for j in range(e)],
                axis=1,
            )
            gain[(high - low) <= NARROW / 2] = -1
            axis = gain.argmax(1)
            rows = np.arange(len(low))
            centre = (low[rows, axis] + high[rows, axis]) / 2
            left, right = high.copy(), low.copy()
            left[rows, axis], right[rows, axis] = centre, centre
            lows, highs = np.concatenate([low, right]), np.concatenate([left, high])
            for start in range(0, len(lows), BATCH):
                stack.append((lows[start : start + BATCH], highs[start : start + BATCH]))
        return clear


def _with(low: Array, high: Array, j: int, exponents: NDArray[np.int64]) -> Array:
    """Monomials at the upper corner of cells, coordinate j at its lower end."""
    corner = high.copy()
    corner[:, j] = low[:, j]
    return np.prod(corner[:, None, :] ** exponents[None], axis=2)


def _independent(
    c: Array,
    error: Array,
    exponents: NDArray[np.int64],
    middle: Array,
    half: Array,
    large: Array,
) -> NDArray[np.bool_]:
    """Whether the logarithmic derivatives are independent throughout each cell.

    With L their matrix at the centre and R = Lᵀ(LLᵀ)⁻¹, all matrices of the cell have full rank if
    |L' − L| |R| has norm below 1.
    """
    g, e = c.shape[0], exponents.shape[1]
    if g > e:
        return np.zeros(len(middle), dtype=bool)
    slopes = np.einsum("nv,gv,ve->nge", middle, c, exponents)
    size = np.abs(c)
    radius = np.einsum("nv,gv,ve->nge", half, size, exponents)
    radius += ((large * (error + ROUNDING * size.max(0))) @ exponents)[:, None, :]
    gram = slopes @ slopes.transpose(0, 2, 1)
    scale = np.maximum(np.trace(gram, axis1=1, axis2=2), 1e-300)
    gram = gram / scale[:, None, None] + 1e-15 * np.eye(g)
    inverse = slopes.transpose(0, 2, 1) @ np.linalg.inv(gram) / scale[:, None, None]
    # With the small shift of the Gram matrix, R is a right inverse up to this much.
    off = np.abs(slopes @ inverse - np.eye(g)).sum(2).max(1)
    return (radius @ np.abs(inverse)).sum(2).max(1) + off < 1 - 1e-9
