"""Does a vector of functions vanish somewhere on the unit sphere?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deaddir_fast.theory.threshold import Undecided

Array = NDArray[np.float64]

STARTS = 96
STEPS = 60
DIFFERENCE = 1e-6
ABSENT = 1e-3  # smallest value above this (relative): no zero
PRESENT = 1e-7  # below: a zero


def _normalised(points: Array) -> Array:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def smallest_on_sphere(function: Callable[[Array], Array], d: int, scale: float) -> bool:
    """Whether ``function`` ((q, d) points -> (q, g) values) has a real zero on the unit sphere.

    Levenberg–Marquardt from many starts at once (axes, diagonals and random points); our choice.

    Raises:
        Undecided: if the smallest value found is neither clearly zero nor clearly positive.
    """
    rng = np.random.default_rng(2)
    points = _normalised(
        np.concatenate([np.eye(d), np.ones((1, d)), rng.standard_normal((STARTS, d))])
    )
    values = function(points) / scale
    size = np.linalg.norm(values, axis=1)
    damping = np.full(len(points), 1e-2)
    for _ in range(STEPS):
        if size.min() <= PRESENT:
            return True
        slopes = np.stack(
            [
                (function(points + DIFFERENCE * e) - function(points - DIFFERENCE * e))
                / (2 * DIFFERENCE * scale)
                for e in np.eye(d)
            ],
            axis=2,
        )
        normal = slopes.transpose(0, 2, 1) @ slopes
        shift = damping * np.maximum(np.trace(normal, axis1=1, axis2=2), 1e-30)
        normal = normal + shift[:, None, None] * np.eye(d)
        gradient = np.einsum("qgd,qg->qd", slopes, values)
        step = np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
        trial = _normalised(points - step)
        found = function(trial) / scale
        better = np.linalg.norm(found, axis=1) < size
        points[better], values[better] = trial[better], found[better]
        size = np.linalg.norm(values, axis=1)
        damping = np.clip(np.where(better, damping * 0.2, damping * 4.0), 1e-10, 1e10)
    best = float(size.min())
    if best >= ABSENT:
        return False
    if best <= PRESENT:
        return True
    raise Undecided(
        f"the leading form is as small as {best:.1e} of its scale somewhere: zero or not is unclear"
    )
