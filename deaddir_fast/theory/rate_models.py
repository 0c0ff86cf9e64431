"""The candidate descriptions of log curvature along a ray, each with its evidence.

Our choice of family: ``G(t) = c0 + b |t + t0|^alpha exp(h(t))`` with h analytic, h(0) = 0, and at
most one of the floor c0 and the offset t0 present, on a window of radii. Points outside the window
are left undescribed at a fixed cost each, so windows of different length compete on one footing (as
in Bayesian averaging over fit windows, Jay & Neil, Phys. Rev. D 103, 114502). Floor and offset
enter through their tangent at the best value found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deaddir_fast.theory.rate_evidence import (
    FAMILIES,
    Array,
    Integers,
    Posterior,
    bend_features,
    log_prior_bend,
    posterior,
)

MIN_POINTS = 5
# Families used to find windows, offsets and floors, before all are weighed.
ALL, SCOUTS = range(len(FAMILIES)), (1, 4, 6)
# Cost in nats of a point left out: a density three e-folds wide.
LEFT_OUT = 2.1
# Windows this many nats below the best scouted one, or beyond this many, are dropped.
KEEP, MOST = 8.0, 20
# Additive noise: prior share, where in the window it takes over, windows starting lower by up to.
ADDITIVE, CROSSINGS, LOWER = 0.1, (0.2, 0.4, 0.6, 0.8), 4
PRIOR = {"power": 0.76, "cut": 0.08, "offset": 0.08, "floor": 0.08}


@dataclass(frozen=True)
class Points:
    """What is fitted: log values y at radii t (ascending), relative weights w, all (n,).

    ``even``: each y is the mean over +t and -t, so the bend has even powers only.
    """

    t: Array
    y: Array
    w: Array
    even: bool
    rounding: float

    @property
    def x(self) -> Array:
        return np.log(self.t)


@dataclass(frozen=True)
class Candidates:
    """A batch of B designs of one model with their posteriors and log weights (B, G)."""

    model: str
    lo: Integers
    hi: Integers
    family: Integers
    w: Array
    weight: Array
    post: Posterior
    offset: float = 0.0

    def best(self) -> tuple[int, int]:
        """Index (design, bend ratio) of the largest weight."""
        flat = int(np.argmax(self.weight))
        return flat // self.weight.shape[1], flat % self.weight.shape[1]


def ends(n: int, count: int, start: int) -> Integers:
    """About ``count`` indices spread over start .. n-1, both ends included."""
    return np.unique(np.round(np.linspace(start, n - 1, min(count, n - start))).astype(int))


def designs(
    points: Points, pairs: list[tuple[int, int]], families: Sequence[int] = ALL
) -> tuple[Integers, Integers, Integers, Array, Array]:
    """Windows times families: lo, hi, family (B,), w (B, n), phi (B, n, J)."""
    lo = np.array([a for a, _ in pairs for _ in families])
    hi = np.array([b for _, b in pairs for _ in families])
    family = np.array([f for _ in pairs for f in families])
    index = np.arange(points.t.size)
    inside = (index >= lo[:, None]) & (index <= hi[:, None])
    w = np.where(inside, points.w, 0.0)
    phi = bend_features(points.t, points.t[hi], family, even=points.even)
    return lo, hi, family, w, phi


def weigh(points: Points, post: Posterior, w: Array, log_prior: float) -> Array:
    """Log weight (B, G) of each design and bend ratio, up to a common constant."""
    left_out = (w == 0).sum(axis=1)[:, None]
    return post.log_evidence + log_prior_bend(post.sigma) - LEFT_OUT * left_out + log_prior


def stack(columns: list[Array], batch: int) -> Array:
    """The same columns for every design, (batch, n, q)."""
    x = np.stack(columns, axis=-1)
    return np.broadcast_to(x, (batch, *x.shape))


def _power(
    points: Points,
    pairs: list[tuple[int, int]],
    count: int,
    families: Sequence[int],
    crossing: float = 0.0,
) -> list[Candidates]:
    """Power and bend on each window.

    ``crossing``: where in the window, as a share of its points, additive noise is as large as the
    relative noise; 0 for none. Rounding is additive: towards it the relative noise grows as 1/G.
    """
    out = []
    for model, chosen in (
        ("power", [p for p in pairs if p[0] == 0]),
        ("cut", [p for p in pairs if p[0] > 0]),
    ):
        if not chosen:
            continue
        lo, hi, family, w, phi = designs(points, chosen, families)
        if crossing > 0:
            # The running maximum: scatter about a constant must not weight itself away.
            trend = np.maximum.accumulate(points.y)
            level = trend[np.round(lo + crossing * (hi - lo)).astype(int)]
            excess = np.clip(level[:, None] - trend, -300.0, 300.0)
            w = w / np.hypot(1.0, np.exp(excess))
        y = np.broadcast_to(points.y, w.shape)
        x = stack([np.ones_like(points.x), points.x], len(lo))
        post = posterior(y, x, phi, w, 1, points.rounding)
        prior = PRIOR[model] * (1 - ADDITIVE if crossing == 0 else ADDITIVE / len(CROSSINGS))
        log_prior = float(np.log(prior / (count * len(families))))
        weight = weigh(points, post, w, log_prior)
        out.append(Candidates(model, lo, hi, family, w, weight, post))
    return out


def power_candidates(points: Points) -> list[Candidates]:
    """Power and analytic bend on windows: scouted coarsely, then around the best, then in full."""
    n = points.t.size
    his = ends(n, 7, MIN_POINTS - 1)
    los = np.unique(np.concatenate([[0], n - 1 - ends(n, 7, MIN_POINTS - 1)]))
    pairs = {(int(a), int(b)) for a in los for b in his if b - a + 1 >= MIN_POINTS}
    count = len(pairs)
    scores = _scout(points, pairs, count)
    step = max(1, n // 7)
    while step > 1:
        step = (step + 1) // 2
        lo, hi = max(scores, key=lambda p: scores[p])
        near = {
            (a, b)
            for a in (lo - step, lo, lo + step)
            for b in (hi - step, hi, hi + step)
            if a >= 0 and b < n and b - a + 1 >= MIN_POINTS
        } - set(scores)
        if near:
            scores |= _scout(points, near, count)
    top = max(scores.values())
    kept = sorted(scores, key=lambda p: -scores[p])[:MOST]
    kept = [p for p in kept if scores[p] > top - KEEP]
    found = _power(points, kept, count, ALL)
    # A curve that falls towards small radii may end in rounding, which a window that starts a
    # little lower describes by additive noise.
    lo, hi = kept[0]
    lower = {(a, hi) for a in range(max(0, lo - LOWER), lo + 1)} | set(kept[:LOWER])
    for crossing in CROSSINGS:
        found += _power(points, sorted(lower), count, SCOUTS, crossing)
    return found


def _scout(points: Points, pairs: set[tuple[int, int]], count: int) -> dict[tuple[int, int], float]:
    """Largest log weight of each window over the scouting families."""
    scores: dict[tuple[int, int], float] = {}
    for found in _power(points, sorted(pairs), count, SCOUTS):
        for a, b, weight in zip(found.lo, found.hi, found.weight.max(axis=1), strict=True):
            key = (int(a), int(b))
            scores[key] = max(scores.get(key, -np.inf), float(weight))
    return scores


def capped(free: Array, fixed: Array, log_density: float) -> Array:
    """Evidence over a nuisance parameter with a proper prior never exceeds its best value's."""
    return np.minimum(free + log_density, fixed)
