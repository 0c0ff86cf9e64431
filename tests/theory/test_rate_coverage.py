"""The 95 % intervals of resolved rate fits, on synthetic curves whose rate is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from deaddir_fast.theory.rate import fit_rate

ORDINARY = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)


@dataclass
class Case:
    alpha: float
    radii: np.ndarray
    values: np.ndarray
    options: dict[str, Any]
    resolvable: bool
    kind: str


def bend(rng: np.random.Generator, top: float) -> Any:
    """A random analytic factor with value 1 at t = 0."""
    s = float(np.clip(rng.normal() * rng.choice([0.3, 1.0]), -0.8, 3.0)) / top
    q = float(rng.normal() * 0.3) / top**2
    form = rng.choice(["none", "polynomial", "linear", "exponential", "root", "pole"])
    if form == "polynomial":
        whole = np.linspace(-top, top, 99)
        q = q if np.all(1 + s * whole + q * whole**2 > 0.15) else abs(q)
        s = s if np.all(1 + s * whole + q * whole**2 > 0.15) else 0.3 * s
        s = s if np.all(1 + s * whole + q * whole**2 > 0.15) else 0.0
        return lambda t: 1 + s * t + q * t**2
    return {
        "none": lambda t: np.ones_like(t),
        "linear": lambda t: 1 + s * t,
        "exponential": lambda t: np.exp(s * t),
        "root": lambda t: np.sqrt(1 + (s * t) ** 2),
        "pole": lambda t: 1 / (1 + abs(s) * t),
    }[form]


def cases(count: int, seed: int) -> Iterator[Case]:
    """Powers under bends, offsets, floors, rounding and log-normal noise from 1e-12 to 0.2."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ordinary = rng.random() < 0.6
        alpha = float(rng.choice(ORDINARY)) if ordinary else float(rng.uniform(0.5, 10))
        points, decades = int(rng.integers(8, 41)), rng.uniform(1.0, 4.0)
        top = 10 ** rng.uniform(-1.2, 0.0)
        t = np.logspace(np.log10(top) - decades, np.log10(top), points)
        sigma = 10 ** rng.uniform(-12, np.log10(0.2))
        kind = str(rng.choice(["power", "offset", "floor", "rounding", "two sides"]))
        amplitude = 10 ** rng.uniform(-6, 6)
        factor = bend(rng, top)
        options: dict[str, Any] = {}
        t0 = c0 = 0.0
        if kind == "offset":
            t0 = min(t[0] * 10 ** rng.uniform(-1, 1), top / 12)
        if kind == "two sides":
            t = np.concatenate([-t[::-1], t])
            sign = rng.choice([-1.0, 1.0])
            inner = factor
            smallest = inner(sign * t).min()
            factor = inner if smallest > 0.1 else lambda t: np.ones_like(t)
            t = sign * t
        core = amplitude * np.abs(t + t0) ** alpha * factor(t)
        if kind == "floor" and alpha > 0:
            c0 = min(amplitude * (t[0] * 10 ** rng.uniform(-0.5, 1.2)) ** alpha, core[-1] / 4)
        values = (core + c0) * np.exp(sigma * rng.normal(size=t.size))
        if kind == "rounding":
            tiny = amplitude * 10 ** rng.uniform(-34, -24)
            values = values + tiny * rng.normal(size=t.size) ** 2
            c0 = 10 * tiny
            options["floor"] = c0
        r = np.abs(t)
        clean = (np.abs(np.log(factor(t))) < np.log(2)) & (r >= t0)
        if alpha > 0:
            clean &= core > c0
        span = np.log10(r[clean].max() / r[clean].min()) if clean.sum() >= 5 else 0.0
        yield Case(alpha, t, values, options, bool(span >= 1.1), kind)


def tally(count: int, seed: int) -> tuple[int, int, float]:
    """Resolved fits, those whose interval holds the truth, and the resolved share of resolvable."""
    resolved = covered = resolvable = found = 0
    for case in cases(count, seed):
        fit = fit_rate(case.radii, case.values, **case.options)
        resolvable += case.resolvable
        found += case.resolvable and fit.resolved
        if fit.resolved:
            resolved += 1
            covered += fit.interval[0] <= case.alpha <= fit.interval[1]
    return resolved, covered, found / resolvable


def test_intervals_cover_on_a_small_sample() -> None:
    resolved, covered, share = tally(150, seed=20)
    assert resolved >= 120
    assert share > 0.8
    # 95 % in 150: three binomial standard deviations to either side.
    assert 0.89 <= covered / resolved <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_intervals_cover(seed: int) -> None:
    resolved, covered, share = tally(2000, seed)
    assert 0.93 <= covered / resolved <= 0.97, (resolved, covered)
    assert share > 0.8
