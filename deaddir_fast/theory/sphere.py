"""Does a vector of functions vanish somewhere on the unit sphere?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from deaddir_fast.theory.threshold import Undecided

Array = NDArray[np.float64]

STARTS = 48
ABSENT = 1e-3  # smallest value above this (relative): no zero
PRESENT = 1e-7  # below: a zero


def smallest_on_sphere(function: Callable[[Array], Array], d: int, scale: float) -> bool:
    """Whether ``function`` ((q, d) points -> (q, g) values) has a real zero on the unit sphere.

    Least squares from many starts (random points, axes and diagonals); our choice. Coordinates are
    free and the point is normalised inside, so the search is on the sphere.

    Raises:
        Undecided: if the smallest value found is neither clearly zero nor clearly positive.
    """
    rng = np.random.default_rng(2)
    starts = np.concatenate([np.eye(d), rng.standard_normal((STARTS, d)), np.ones((1, d))])
    values = np.linalg.norm(
        function(starts / np.linalg.norm(starts, axis=1, keepdims=True)), axis=1
    )
    best = np.inf

    def residual(x: Array) -> Array:
        norm = float(np.linalg.norm(x))
        return np.append(function((x / norm)[None])[0] / scale, norm - 1)

    for start in starts[np.argsort(values)]:
        x = start / np.linalg.norm(start)
        found = least_squares(residual, x, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=200)
        best = min(best, float(np.linalg.norm(residual(found.x)[:-1])))
        if best <= PRESENT:
            return True
    if best >= ABSENT:
        return False
    raise Undecided(
        f"the leading form is as small as {best:.1e} of its scale somewhere: zero or not is unclear"
    )
