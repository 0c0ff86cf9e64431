"""``prior_exponents``: how a prior vanishes or diverges along lines through the parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.nets.rays import check_radii
from deaddir_fast.nets.space import ParameterSpace
from deaddir_fast.nets.weights import RankOne, check_directions

LogPrior = Callable[[dict[str, Tensor]], Any]
Array = NDArray[np.float64]

RADII = tuple(10 ** (-j / 2) for j in range(2, 13))  # 0.1 to 1e-6
LAST = 4  # slopes at the smallest radii that have to agree
CONVERGED = 1e-4  # to this, after the linear term of the slope is extrapolated away,
REACHED = 1e-2  # and the last slope itself lies this close
SNAP = 1e-6  # beyond the spread, a rational exponent may be off by this
DENOMINATOR = 12  # exponents are looked for among fractions with at most this denominator


@dataclass(frozen=True)
class Power:
    """Exponent of a positive function of t as t -> 0, or why it is none.

    Attributes:
        value: the exponent; NaN where the function is no power.
        error: spread of the estimates at the smallest radii.
        exact: the exponent as a fraction with a denominator of at most 12, or None.
        reason: why there is no (exact) exponent, or None.
    """

    value: float
    error: float
    exact: Fraction | None
    reason: str | None


def power(radii: Array, logs: Array) -> Power:
    """Exponent h of φ ~ C t^h (1 + O(t)) from log φ at falling radii, at least six of them."""
    nan = float("nan")
    bad = np.flatnonzero(~np.isfinite(logs))
    if bad.size:
        at, value = float(radii[bad[0]]), float(logs[bad[0]])
        where = "at every radius" if bad.size == logs.size else f"at radius {at:.1e}"
        return Power(nan, nan, None, f"not finite: the log prior is {value:g} {where}")
    steps = -np.diff(np.log(radii))
    slopes = -np.diff(logs) / steps
    # The slope over a step goes like h + a t; two neighbours give h without the linear term.
    ratio = np.exp(-steps[1:])
    limits = (slopes[1:] - ratio * slopes[:-1]) / (1 - ratio)
    last = limits[-LAST:]
    rounding = 8 * np.finfo(float).eps * float(np.abs(logs).max()) / float(steps.min())
    error = float(np.ptp(last)) + rounding
    value = float(last[-1])
    if error > CONVERGED or abs(float(slopes[-1]) - value) > REACHED:
        return Power(
            nan,
            nan,
            None,
            f"not a power: the slope of the log prior runs from {slopes[-LAST]:.4g} to "
            f"{slopes[-1]:.4g} over the smallest radii",
        )
    exact = Fraction(value).limit_denominator(DENOMINATOR)
    if abs(float(exact) - value) > error + SNAP:
        return Power(
            value,
            error,
            None,
            f"exponent {value:.6g}: no fraction with a denominator of at most {DENOMINATOR}",
        )
    return Power(value, error, exact, None)


def evaluate(log_prior: LogPrior, space: ParameterSpace, theta: Tensor) -> float:
    """log φ at (d,) parameters.

    Raises:
        TypeError, ValueError: naming ``log_prior``.
    """
    value = log_prior(space.directions(theta.clone()))
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise _check.fail("log_prior", value, "a function that returns one number", ValueError)
        value = value.detach().item()
    if isinstance(value, (bool, complex)) or not isinstance(value, (int, float)):
        raise _check.fail("log_prior", value, "a function that returns one number", TypeError)
    return float(value)


@dataclass(frozen=True)
class PriorExponents:
    """Exponents h of φ(θ0 + t u) ~ C |t|^h along p directions, side by side.

    Attributes:
        exponents: (p,) h where both sides agree, else NaN; as measured.
        fractions: per direction h as an exact fraction (denominator at most 12), or None.
        plus, minus: (p,) h for t > 0 and t < 0, NaN where φ is no power there.
        errors: (p,) spread of the estimates at the smallest radii, the larger of both sides.
        radii: (r,) the distances used, falling.
        verdicts: per direction ``"resolved"`` or why not: not finite, not a power, both sides
            differ, not rational. An exponent <= -1 is integrable only together with others.
    """

    exponents: Tensor
    fractions: tuple[Fraction | None, ...]
    plus: Tensor
    minus: Tensor
    errors: Tensor
    radii: Tensor
    verdicts: tuple[str, ...]


def both_sides(plus: Power, minus: Power) -> str:
    """The verdict over two sides of a line."""
    if plus.reason or minus.reason:
        if plus.reason == minus.reason:
            return f"unresolved: {plus.reason}"
        return f"unresolved: t > 0: {_say(plus)}; t < 0: {_say(minus)}"
    if plus.exact != minus.exact:
        return f"unresolved: both sides differ: {plus.exact} for t > 0, {minus.exact} for t < 0"
    return "resolved"


def _say(side: Power) -> str:
    return side.reason or f"exponent {side.exact}"


def prior_exponents(
    model: nn.Module,
    log_prior: LogPrior,
    directions: Mapping[str, Tensor | RankOne],
    *,
    radii: Any = None,
) -> PriorExponents:
    """Measure h = d log φ / d log |t| of a prior along lines θ0 + t u as t -> 0.

    A direction of KL order k contributes (h+1)/(2k) to λ where the prior vanishes like |t|^h
    along it ("Dead Directions", arXiv 2606.05957; Watanabe 2009); curvature does not see the
    prior. Slopes between neighbouring radii are extrapolated to t = 0 (our choice); a logarithm,
    an essential singularity or noise does not converge and is refused. Where a prior is a product
    over several directions, it vanishes on the axes: place θ0 at a generic point of the other
    factors to read one of them.

    Args:
        model: holds θ0, its parameters; read in fp64 on a copy.
        log_prior: {parameter name: tensor} in fp64 -> log φ, one number, up to a constant.
        directions: {parameter name: (p, *shape)}, missing parameters count as 0; scaled to unit
            global norm.
        radii: (r,) at least six positive distances; 0.1 to 1e-6 by default.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if not isinstance(model, nn.Module):
        raise _check.fail("model", model, "a torch.nn.Module", TypeError)
    if not callable(log_prior):
        raise _check.fail("log_prior", log_prior, "a function of {name: tensor}", TypeError)
    double = copy.deepcopy(model).double()
    state = {k: v.detach() for k, v in double.named_parameters()}
    space = ParameterSpace.of(double)
    checked = check_directions(directions, state)
    named = {
        k: u.dense(state[k].shape) if isinstance(u, RankOne) else u
        for k, u in checked.slices.items()
    }
    theta = torch.cat([state[k].reshape(-1) for k in space.names])
    vectors = space.vectors(named, checked.count, theta)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    grid = check_radii(RADII if radii is None else radii).sort(descending=True).values.unique()
    grid = grid.flip(0)
    if grid.numel() < 6 or float(grid.min()) <= 0:
        raise _check.fail("radii", radii, "at least six positive distances")
    sides = []
    for sign in (1.0, -1.0):
        logs = [
            [evaluate(log_prior, space, theta + sign * float(t) * u) for t in grid] for u in vectors
        ]
        sides.append([power(grid.numpy(), np.array(row)) for row in logs])
    plus, minus = sides
    verdicts = tuple(both_sides(a, b) for a, b in zip(plus, minus, strict=True))
    agreed = [
        (a.value + b.value) / 2 if _close(a, b) else math.nan
        for a, b in zip(plus, minus, strict=True)
    ]
    return PriorExponents(
        exponents=torch.tensor(agreed, dtype=torch.float64),
        fractions=tuple(
            a.exact if v == "resolved" else None for a, v in zip(plus, verdicts, strict=True)
        ),
        plus=torch.tensor([a.value for a in plus], dtype=torch.float64),
        minus=torch.tensor([b.value for b in minus], dtype=torch.float64),
        errors=torch.tensor(
            [max(a.error, b.error) for a, b in zip(plus, minus, strict=True)], dtype=torch.float64
        ),
        radii=grid,
        verdicts=verdicts,
    )


def _close(a: Power, b: Power) -> bool:
    """Whether two measured exponents are the same (False for NaN)."""
    return abs(a.value - b.value) <= a.error + b.error + SNAP
