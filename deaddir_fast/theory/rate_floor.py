"""Floor + power: a constant c0 under the power law (our choice of estimator)."""

from __future__ import annotations

import numpy as np

from deaddir_fast.theory.rate_evidence import Array, bend_features, posterior
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


def floor_candidates(points: Points, powers: list[Candidates]) -> Candidates | None:
    """Floor + power: a constant c0 under the power, on windows that keep every small radius."""
    n = points.t.size
    if n < MIN_POINTS + 1 or points.y.max() - points.y.min() < np.log(1.3):
        return None
    pairs = [(0, int(b)) for b in ends(n, 6, MIN_POINTS)]
    lo, hi, family, w, phi = designs(points, pairs)
    scout = designs(points, pairs[-3:], SCOUTS)
    best: Candidates | None = None
    for lin, log_c in _starts(points, powers):
        state = _solve(points, lin, log_c, scout[3], scout[4])
        if state is None:
            continue
        lin, log_c = state
        share = 1.0 / (1.0 + np.exp(np.clip(log_c - lin, -700, 700)))
        if share.max() < 0.3 or share.min() > 0.9999:
            continue
        target, x, bent = _tangent(points, lin, log_c, share, phi)
        yb = np.broadcast_to(target, w.shape)
        free = posterior(yb, x, bent, w, 1, points.rounding)
        fixed = posterior(yb - (1.0 - share) * log_c, x[..., :2], bent, w, 1, points.rounding)
        log_prior = float(np.log(PRIOR["floor"] / len(lo)))
        log_density = -float(np.log(10.0 + points.y.max() - points.y.min()))
        weight = capped(
            weigh(points, free, w, log_prior),
            weigh(points, fixed, w, log_prior),
            log_density,
        )
        if best is None or weight.max() > best.weight.max():
            best = Candidates("floor", lo, hi, family, w, weight, free)
    return best


def _tangent(
    points: Points, lin: Array, log_c: float, share: Array, phi: Array
) -> tuple[Array, Array, Array]:
    """Linearise ``log(c0 + exp(lin))``: target (n,), x (B, n, 3), phi (B, n, J)."""
    now = np.logaddexp(lin, log_c)
    target = points.y - now + share * lin + (1.0 - share) * log_c
    x = stack([share, share * points.x, 1.0 - share], phi.shape[0])
    return target, x, phi * share[:, None]


def _starts(points: Points, powers: list[Candidates]) -> list[tuple[Array, float]]:
    """Power laws read above the floor: the best with a floor near the lowest values, and below."""
    t = points.t
    laws = []
    for chosen in powers:
        design, ratio = chosen.best()
        a, alpha = chosen.post.beta[design, ratio, :2]
        laws.append(a + alpha * points.x)
        if chosen.model == "cut":
            at = slice(design, design + 1)
            phi = bend_features(t, t[chosen.hi[at]], chosen.family[at], even=points.even)[0]
            laws.append(laws[-1] + phi @ chosen.post.bend[design, ratio])
    for size in {3, max(3, t.size // 3), max(3, t.size // 2)}:
        alpha = np.polyfit(points.x[-size:], points.y[-size:], 1)[0]
        for lift in (1.0, 1.5, 3.0):
            laws.append(points.y[-1] + lift * alpha * (points.x - points.x[-1]))
    lowest = float(points.y.min())
    starts = []
    for depths in ((0.01, 0.1, 0.3, 0.7, 1.5), (2.5, 4.0, 6.0, 9.0)):
        scored = []
        for lin in laws:
            for log_c in (lowest - depth for depth in depths):
                residual = points.w * np.abs(points.y - np.logaddexp(lin, log_c))
                if lin[-1] - lin[0] > 0.2:
                    scored.append((float(np.log(residual + 1e-4).sum()), lin, log_c))
        if scored:
            starts.append(min(scored, key=lambda s: s[0])[1:])
    return starts


def _solve(
    points: Points, lin: Array, log_c: float, w: Array, phi: Array
) -> tuple[Array, float] | None:
    """Gauss-Newton with the bend prior; the design settles in the first few steps."""
    design: int | None = None
    ratio = 0
    best = np.inf
    for step in range(30):
        share = 1.0 / (1.0 + np.exp(np.clip(log_c - lin, -700, 700)))
        if share.max() <= 0.2 or share.min() > 0.999999:
            return None
        target, x, bent = _tangent(points, lin, log_c, share, phi)
        if design is None or step < 8:
            free = posterior(np.broadcast_to(target, w.shape), x, bent, w, 1, points.rounding)
            weight = weigh(points, free, w, 0.0)
            if step < 4:  # without a bend first: a bend of any size could pose as the floor
                weight = weight[:, :1]
            design, ratio = (int(i) for i in np.unravel_index(weight.argmax(), weight.shape))
            at = design
        else:
            one = slice(design, design + 1)
            free = posterior(target[None], x[one], bent[one], w[one], 1, points.rounding)
            at = 0
        beta, bend = free.beta[at, ratio], free.bend[at, ratio]
        move = beta[0] + beta[1] * points.x + phi[design] @ bend - lin
        down = float(beta[2]) - log_c
        largest = max(float(np.abs(move * share).max()), abs(down))
        damp = min(1.0, 1.5 / max(largest, 1e-300))
        lin = lin + damp * move
        log_c = log_c + damp * down
        if not np.isfinite(lin).all() or log_c < points.y.min() - 30:
            return None
        if step >= 8 and (largest < 1e-13 or (largest < 1e-7 and largest >= best)):
            break
        best = min(best, largest)
    return lin, float(log_c)
