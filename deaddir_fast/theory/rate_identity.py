"""Orders from curvature and divergence together, without a fitted slope.

Where K ~ c t^(2k): ``t^2 F / (2 K) -> k^2`` and ``d log F / d log K -> 1 - 1/k`` as t -> 0.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from deaddir_fast.theory.rate_average import Average, Law, average
from deaddir_fast.theory.rate_evidence import Array, Mask, posterior
from deaddir_fast.theory.rate_models import (
    MIN_POINTS,
    Candidates,
    Points,
    designs,
    ends,
    stack,
    weigh,
)


def _reading(points: Points, columns: list[Array], target: int) -> Average | None:
    """Posterior of one coefficient beside an analytic bend, averaged over windows."""
    n = points.t.size
    if n < MIN_POINTS:
        return None
    last = n - MIN_POINTS
    los = sorted({0, last // 3, (2 * last) // 3, last})
    pairs = [
        (a, int(b)) for a in los for b in ends(n, 5, MIN_POINTS - 1) if b - a + 1 >= MIN_POINTS
    ]
    lo, hi, family, w, phi = designs(points, pairs)
    y = np.broadcast_to(points.y, w.shape)
    post = posterior(y, stack(columns, len(lo)), phi, w, target, points.rounding)
    found = Candidates("identity", lo, hi, family, w, weigh(points, post, w, 0.0), post)
    return average([found])


def _with_offset(root: Array, ratio: Array) -> Array:
    """Solve ``root = k (1+r)^(k-1) / ((1+r)^k - r^k)`` for k, r = t0/t > 0, by bisection."""
    low, high = np.full(root.shape, 1e-3), np.full(root.shape, 1e3)
    small = np.log(ratio / (1 + ratio))
    for _ in range(80):
        k = np.sqrt(low * high)
        below = k / ((1 + ratio) * -np.expm1(k * small)) < root
        low, high = np.where(below, k, low), np.where(below, high, k)
    return np.sqrt(low * high)


def pointwise(points: Points, log_kl: Array, law: Law, inside: Mask) -> list[Average]:
    """Readings of log k from ``t^2 F / (2K)`` at t -> 0, over the window.

    With an offset t0 > 0 there are two: K measured from the ray's start, and from the singular set.
    """
    log_f, keep = _above_floor(points, law, inside & np.isfinite(log_kl))
    t = points.t[keep]
    if t.size < MIN_POINTS:
        return []
    root = 0.5 * (2 * np.log(t) + log_f[keep] - math.log(2) - log_kl[keep])
    choices = [root]
    if law.model == "offset":
        choices.append(root + np.log(np.abs(1 + law.offset / t)))
        if law.offset > 0 and not law.even:
            choices[0] = np.log(_with_offset(np.exp(root), law.offset / t))
    out = []
    for y in choices:
        reading = _reading(replace(points, t=t, y=y, w=points.w[keep]), [np.ones_like(t)], 0)
        if reading is not None:
            out.append(reading)
    return out


def trajectory(points: Points, log_kl: Array, law: Law, inside: Mask) -> float:
    """Order from ``d log F / d log K``; NaN where it cannot be read."""
    log_f, keep = _above_floor(points, law, inside & np.isfinite(log_kl))
    t = points.t[keep]
    if t.size < MIN_POINTS:
        return math.nan
    columns = [np.ones_like(t), log_kl[keep]]
    reading = _reading(replace(points, t=t, y=log_f[keep], w=points.w[keep]), columns, 1)
    if reading is None:
        return math.nan
    return 1.0 / (1.0 - reading.value) if reading.value < 1.0 else math.inf


def _above_floor(points: Points, law: Law, keep: Mask) -> tuple[Array, Mask]:
    """Log curvature with the fitted floor taken off, where it stays positive."""
    if law.floor <= 0:
        return points.y, keep
    share = -np.expm1(math.log(law.floor) - points.y)
    ok = keep & (share > 0.2)
    return points.y + np.log(np.where(ok, share, 1.0)), ok
