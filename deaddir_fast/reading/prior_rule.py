"""What a prior, given as a function, does to λ at a point whose flat-prior λ is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from deaddir_fast.reading.dead_space import EXACT_LIMIT, DeadSpace, flag_basis
from deaddir_fast.reading.local import LocalModel
from deaddir_fast.reading.prior import LogPrior, Power, evaluate, power
from deaddir_fast.reading.schur import relax_live, rounding_near
from deaddir_fast.theory.local_rlct import graded
from deaddir_fast.theory.threshold import LocalThreshold, Undecided

LINES = 12  # generic lines or curves along which the prior is measured, each on both sides
POINTS = 11  # radii on each
SMALLEST = 1e-6  # displacement of a coordinate, so that it is not lost in θ0
LIVE_SCALES = (1e-4, 1e-6, 1e-8)  # posterior widths at which the prior must not feel live shifts
FELT = 0.02  # change of the log prior that is felt at the last of them
EVEN = 1e-3  # relative difference of the prior between two sides that are the same


@dataclass(frozen=True)
class PriorRule:
    """How a prior changes λ.

    Attributes:
        shift: what it adds to the flat-prior λ; None where it is not decided.
        upper: a bound of λ under a prior that is not positive at the parameters; None where it is.
        single: (h, same on both sides) along the only singular direction, if it is such a prior.
        reason: why the prior cannot be used, or None.
        notes: what was measured.
    """

    shift: Fraction | None
    upper: Fraction | float | None
    single: tuple[Fraction, bool] | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()


def prior_rule(
    local: LocalModel, space: DeadSpace, found: LocalThreshold, log_prior: LogPrior
) -> PriorRule:
    """Apply a prior to the reading ``found`` of the singular part under a flat prior.

    A prior that is continuous and positive at θ0 changes nothing. Where it vanishes or diverges,
    K has to be comparable to Σ_b |v_b|^(2 k_b) + |live|²; if the prior is of degree H on generic
    curves v_b ~ τ^(1/k_b), live ~ τ, then λ = Σ_b dim_b/(2 k_b) + r/2 + H/2, by dominated
    convergence for H >= 0. A product ∏ |v_i|^h_i has H = Σ h_i/k_i, that is (h_i+1)/(2 k_i) for
    each direction (Watanabe 2009; the measurement is our choice).
    """
    generator = torch.Generator().manual_seed(23)
    d = local.space.dimension
    draws = torch.randn(LINES, d, dtype=torch.float64, generator=generator)
    draws = draws / draws.norm(dim=1, keepdim=True)
    lines = torch.cat([draws, space.rest.T[:LINES]])
    if _positive(local, log_prior, lines):
        note = f"prior: continuous and positive along {len(lines)} lines through the parameters"
        return PriorRule(Fraction(0), None, notes=(note,))
    radii = np.geomspace(0.1, SMALLEST, POINTS)
    radial = [
        power(radii, np.array([_at(local, log_prior, float(t) * u) for t in radii]))
        for line in draws
        for u in (line, -line)
    ]
    upper = _upper(radial, d)

    def flagged(reason: str) -> PriorRule:
        return PriorRule(None, upper, reason=f"prior not positive at the parameters: {reason}")

    if not found.decided:
        return flagged("λ is not resolved without it")
    if local.spectrum.rank == d:
        return _regular(radial, d, upper, flagged)
    if space.orbit.shape[1] or math.inf in (space.order, *_orders(space)):
        return flagged("a fibre runs through them, along which the prior may change")
    if d > EXACT_LIMIT:
        return flagged(f"decided up to {EXACT_LIMIT} parameters")
    return _on_dead_space(local, space, log_prior, upper, flagged)


def _orders(space: DeadSpace) -> list[float]:
    adapted = flag_basis(space)
    return [] if adapted is None else adapted[1]


def _positive(local: LocalModel, log_prior: LogPrior, lines: Tensor) -> bool:
    """Whether log φ tends to its finite value at θ0 along every line."""
    here = evaluate(log_prior, local.space, local.theta)
    if not math.isfinite(here):
        return False
    for line in lines:
        for u in (line, -line):
            change = [
                abs(evaluate(log_prior, local.space, local.theta + t * u) - here)
                for t in (1e-3, 1e-5, 1e-7)
            ]
            if not all(map(math.isfinite, change)):
                return False
            floor = 1e-9 * max(1.0, abs(here))
            falls = change[2] <= max(0.2 * change[1], floor) and change[1] <= max(
                0.2 * change[0], floor
            )
            if not falls:
                return False
    return True


def _at(local: LocalModel, log_prior: LogPrior, moved: Tensor) -> float:
    return evaluate(log_prior, local.space, local.theta + moved)


def _upper(radial: list[Power], d: int) -> Fraction | float:
    """Bound of λ: K <= C |θ - θ0|², and the prior on a cone around one of the lines."""
    known = [d + p.exact for p in radial if p.exact is not None and p.reason is None]
    return min(known) / 2 if known and min(known) > 0 else math.inf


def _degree(found: list[Power], directions: int) -> tuple[Fraction | None, str]:
    """The exponent all curves share, or None and why there is none that can be used."""
    for p in found:
        if p.reason:
            return None, p.reason
    values = {p.exact for p in found}
    if len(values) > 1:
        low, high = min(v for v in values if v is not None), max(v for v in values if v is not None)
        return None, f"its exponent depends on the side or direction, from {low} to {high}"
    degree = values.pop()
    if degree is not None and degree < 0 and directions > 1:
        return None, f"it diverges with exponent {degree}; decided for one direction only"
    if degree is not None and degree <= -1:
        return None, f"exponent {degree}: not integrable"
    return degree, ""


def _regular(
    radial: list[Power],
    d: int,
    upper: Fraction | float,
    flagged: Callable[[str], PriorRule],
) -> PriorRule:
    """All directions live: K ~ |θ - θ0|², a prior of degree h adds h/2."""
    h, why = _degree(radial, d)
    if h is None:
        return flagged(why)
    note = f"prior: degree {h} along {len(radial)} generic half-lines"
    return PriorRule(h / 2, upper, notes=(note,))


def _on_dead_space(
    local: LocalModel,
    space: DeadSpace,
    log_prior: LogPrior,
    upper: Fraction | float,
    flagged: Callable[[str], PriorRule],
) -> PriorRule:
    """The weighted degree of the prior on a dead space where K is a sum of powers of blocks."""
    adapted = flag_basis(space)
    try:
        sums = None if space.germ is None else graded(space.germ)
    except Undecided as undecided:
        return flagged(str(undecided))
    if adapted is None or sums is None:
        return flagged("K is not a sum of powers of coordinates")
    basis, orders = adapted
    top = max(orders)
    powers = torch.tensor([top / k for k in orders], dtype=torch.float64)
    mu = len(orders)
    generator = torch.Generator().manual_seed(29)
    draws = torch.randn(LINES, mu, dtype=torch.float64, generator=generator)
    draws = torch.sign(draws) * (0.3 + draws.abs())
    shapes = torch.cat([draws, -draws]) if mu > 1 else torch.tensor([[1.0], [-1.0]]).double()
    scale = min(space.radius, 1.0)
    live = local.spectrum.live.T

    def point(shape: Tensor, t: float) -> Tensor | None:
        """The relaxed displacement at v_i = s_i t^(top/k_i)."""
        start = local.theta + basis @ (scale * shape * t**powers)
        if not live.shape[0]:
            return start - local.theta
        there, _, _ = relax_live(local, start, live, rounding_near(local, start))
        return there - local.theta if bool(torch.isfinite(there).all()) else None

    felt = _feels_live(local, log_prior, point, shapes, top)
    if felt:
        return flagged(felt)
    radii = np.geomspace(0.1, SMALLEST ** (1 / float(powers.max())), POINTS)
    found, ends = [], []
    for shape in shapes:
        logs = []
        for t in radii:
            moved = point(shape, float(t))
            if moved is None:
                return flagged("a point of the dead space could not be relaxed")
            logs.append(_at(local, log_prior, moved))
        found.append(power(radii, np.array(logs)))
        ends.append(logs[-1])
    degree, why = _degree(found, mu)
    if degree is None:
        return flagged(why)
    shift = degree / (2 * int(top))
    note = f"prior: degree {degree} on {len(found)} generic curves v_i = s_i t^({top:g}/k_i)"
    even = abs(math.expm1(ends[0] - ends[1])) < EVEN if mu == 1 else False
    return PriorRule(shift, upper, (degree, even) if mu == 1 else None, notes=(note,))


def _feels_live(
    local: LocalModel,
    log_prior: LogPrior,
    point: Callable[[Tensor, float], Tensor | None],
    shapes: Tensor,
    top: float,
) -> str | None:
    """Whether live shifts of the width of the posterior change the prior at leading order."""
    live = local.spectrum.live
    if not live.shape[1]:
        return None
    generator = torch.Generator().manual_seed(31)
    for shape in shapes[:4]:
        for _ in range(2):
            eta = torch.randn(live.shape[1], dtype=torch.float64, generator=generator)
            change = math.inf
            for tau in LIVE_SCALES:
                moved = point(shape, tau ** (1 / top))
                if moved is None:
                    return "a point of the dead space could not be relaxed"
                here, there = (
                    _at(local, log_prior, moved + shift * (live @ eta)) for shift in (0.0, tau)
                )
                change = abs(there - here)
            if not change <= FELT:
                return "it varies along live directions within the width of the posterior"
    return None
