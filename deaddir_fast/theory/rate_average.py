"""Model-averaged readings: the mixture over candidate designs, and its best member as a curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deaddir_fast.theory.rate_evidence import Array, bend_features, mixture_quantile
from deaddir_fast.theory.rate_models import Candidates, Points

NEGLIGIBLE = 1e-5
# Quantiles of the interval and of one standard error about the median.
LEVELS = (0.025, 0.5, 0.975, 0.15865525393145707, 0.8413447460685429)


@dataclass(frozen=True)
class Average:
    """Median, standard error and 95 % interval of the target coefficient; weight of each model."""

    value: float
    stderr: float
    interval: tuple[float, float]
    weights: dict[str, float]


def average(candidates: list[Candidates]) -> Average:
    """Quantiles of the posterior mixture over every design of every model."""
    top = max(float(c.weight.max()) for c in candidates)
    mean, spread, dof, weight = [], [], [], []
    models: dict[str, float] = {}
    for c in candidates:
        relative = np.exp(c.weight - top)
        keep = relative > NEGLIGIBLE
        mean.append(c.post.mean[keep])
        spread.append(c.post.spread[keep])
        dof.append(np.broadcast_to(c.post.dof[:, None], keep.shape)[keep])
        weight.append(relative[keep])
        models[c.model] = models.get(c.model, 0.0) + float(relative.sum())
    total = sum(models.values())
    all_weight = np.concatenate(weight)
    low, middle, high, left, right = mixture_quantile(
        np.concatenate(mean),
        np.concatenate(spread),
        np.concatenate(dof),
        all_weight / all_weight.sum(),
        LEVELS,
    )
    return Average(
        middle, 0.5 * (right - left), (low, high), {m: v / total for m, v in models.items()}
    )


@dataclass(frozen=True)
class Law:
    """``c0 + amplitude abs(t + t0)^slope exp(h(t))`` of the single best design, h up to ``top``."""

    model: str
    slope: float
    log_amplitude: float
    offset: float
    floor: float
    bend: Array
    family: int
    top: float
    even: bool
    residual: float
    lo: int
    hi: int
    w: Array

    def subleading(self, t: Array) -> Array:
        """h(t); beyond the fitted range NaN."""
        phi = bend_features(t, np.array([self.top]), np.array([self.family]), even=self.even)[0]
        return np.where(t <= self.top * (1 + 1e-9), phi @ self.bend, np.nan)

    def log_leading(self, t: Array) -> Array:
        """Logarithm of the power term alone."""
        with np.errstate(divide="ignore"):
            if self.even:
                distance = 0.5 * np.log(np.abs(t**2 - self.offset**2))
            else:
                distance = np.log(np.abs(t + self.offset))
        return self.log_amplitude + self.slope * distance

    def residuals(self, points: Points) -> Array:
        """Log values minus the fitted ones; above the fitted range against the leading term."""
        log_power = self.log_leading(points.t) + np.nan_to_num(self.subleading(points.t))
        log_floor = np.log(self.floor) if self.floor > 0 else -np.inf
        return points.y - np.logaddexp(log_power, log_floor)

    def first_bend(self) -> float:
        """Coefficient of t (of t^2 when the sides +t and -t were averaged) in h."""
        small = np.array([1e-5 * self.top])
        return float(self.subleading(small)[0] / small[0] ** (2 if self.even else 1))


def best_law(points: Points, candidates: list[Candidates]) -> Law:
    """The design of largest weight, at its posterior mean."""
    chosen = max(candidates, key=lambda c: float(c.weight.max()))
    at, ratio = chosen.best()
    beta = chosen.post.beta[at, ratio]
    offset, floor = chosen.offset, 0.0
    if chosen.model == "offset":
        offset *= float(np.exp(np.clip(beta[2], -1.0, 1.0)))
    if chosen.model == "floor":
        floor = float(np.exp(beta[2]))
    return Law(
        chosen.model,
        float(beta[1]),
        float(beta[0]),
        offset,
        floor,
        chosen.post.bend[at, ratio],
        int(chosen.family[at]),
        float(points.t[chosen.hi[at]]),
        points.even,
        float(chosen.post.sigma[at, ratio]),
        int(chosen.lo[at]),
        int(chosen.hi[at]),
        chosen.w[at],
    )
