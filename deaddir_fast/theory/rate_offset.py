"""Offset: the ray starts a distance t0 from the singular set (our choice of estimator)."""

from __future__ import annotations

import numpy as np

from deaddir_fast.theory.rate_evidence import Array, posterior
from deaddir_fast.theory.rate_models import (
    MIN_POINTS,
    PRIOR,
    SCOUTS,
    Candidates,
    Points,
    capped,
    designs,
    ends,
    stack,
    weigh,
)

# An offset is looked for up to this share of the largest radius: beyond, no decade of rate is left.
LARGEST = 0.1
# One scouting family is enough to place t0 roughly.
ROUGH = (4,)


def _shape(points: Points, t0: float) -> tuple[Array, Array]:
    """Log distance from the singular point and its derivative in log abs(t0)."""
    t = points.t
    if points.even:
        gap = t**2 - t0**2
        return 0.5 * np.log(np.abs(gap)), -(t0**2) / gap
    return np.log(np.abs(t + t0)), t0 / (t + t0)


def offset_candidates(points: Points) -> Candidates | None:
    """Power of ``abs(t + t0)``, t0 of either sign, on windows that keep every small radius."""
    t, n = points.t, points.t.size
    if n < MIN_POINTS + 1:
        return None
    pairs = [(0, int(b)) for b in ends(n, 6, MIN_POINTS)]
    lo, hi, family, w, phi = designs(points, pairs)
    y = np.broadcast_to(points.y, w.shape)
    sides = 1 if points.even else 2
    log_density = -float(np.log(sides * np.log(100 * LARGEST * t[-1] / t[0])))
    log_prior = float(np.log(PRIOR["offset"] / len(lo)))
    best: Candidates | None = None
    for t0, slope in _starts(points, pairs):
        t0, slope = _solve(points, pairs, t0, slope)
        base, slide = _shape(points, t0)
        x = stack([np.ones_like(t), base, slope * slide], len(lo))
        if abs(slope) < 1e-3 or not np.isfinite(x).all():
            continue
        free = posterior(y, x, phi, w, 1, points.rounding)
        fixed = posterior(y, x[..., :2], phi, w, 1, points.rounding)
        weight = capped(
            weigh(points, free, w, log_prior), weigh(points, fixed, w, log_prior), log_density
        )
        if best is None or weight.max() > best.weight.max():
            best = Candidates("offset", lo, hi, family, w, weight, free, offset=t0)
    return best


def _starts(points: Points, pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """The two best offsets, with their slopes, on a coarse grid."""
    t = points.t
    between = np.sqrt(t[1:] * t[:-1])
    between = between[between < LARGEST * t[-1]]
    grid = np.concatenate([t[0] * np.array([0.03, 0.15, 0.5, 0.8]), between[:: -(-t.size // 12)]])
    grid = grid if points.even else np.concatenate([grid, -grid])
    _, _, _, w, phi = designs(points, pairs[-2:], ROUGH)
    each = len(w)
    x = np.concatenate([stack([np.ones_like(t), _shape(points, t0)[0]], each) for t0 in grid])
    w, phi = np.tile(w, (len(grid), 1)), np.tile(phi, (len(grid), 1, 1))
    post = posterior(np.broadcast_to(points.y, w.shape), x, phi, w, 1, points.rounding)
    weight = weigh(points, post, w, 0.0).reshape(len(grid), -1)
    slopes = post.mean.reshape(len(grid), -1)
    order = np.argsort(-weight.max(axis=1))[:2]
    return [(float(grid[i]), float(slopes[i, weight[i].argmax()])) for i in order]


def _solve(
    points: Points, pairs: list[tuple[int, int]], t0: float, slope: float
) -> tuple[float, float]:
    """Gauss-Newton in log abs(t0), on the best scouted design at each step."""
    t = points.t
    _, _, _, w, phi = designs(points, pairs[-3:], SCOUTS)
    y = np.broadcast_to(points.y, w.shape)
    for _ in range(15):
        base, slide = _shape(points, t0)
        x = stack([np.ones_like(t), base, slope * slide], len(w))
        if abs(slope) < 1e-3 or not np.isfinite(x).all():
            break
        free = posterior(y, x, phi, w, 1, points.rounding)
        weight = weigh(points, free, w, 0.0)
        design, ratio = np.unravel_index(int(weight.argmax()), weight.shape)
        slope = float(free.mean[design, ratio])
        move = float(np.clip(free.beta[design, ratio, 2], -0.7, 0.7))
        new = t0 * float(np.exp(move))
        # A point that changes sides of the singular point would change the model's branch.
        branch = points.even or t0 < 0
        if not 1e-2 * t[0] < abs(new) < LARGEST * t[-1] or (
            branch and (t > abs(new)).sum() != (t > abs(t0)).sum()
        ):
            break
        t0 = new
        if abs(move) < 1e-10:
            break
    return t0, slope
