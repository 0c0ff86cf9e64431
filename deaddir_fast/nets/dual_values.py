"""Values that flow through a captured graph: base, difference and derivative at every point.

A node that depends on the perturbed parameters is y(theta0) (shared by all points), the
difference y(theta0 + r u) - y(theta0) and the derivative d/dr y(theta0 + r u). Carrying the
difference itself, and never forming it by subtraction, is what keeps divergences of 1e-30
accurate. Where every radius is 0 the difference is zero at every point, and a single zero stands
for all of them. (Our choice; index letters: P points, S the shape of the node.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deaddir_fast.nets.weights import Points, Weight, no_difference


@dataclass(frozen=True)
class Dual:
    """A differentiable value: base (S), delta (P, *S), dot (P, *S)."""

    base: Tensor
    delta: Tensor
    dot: Tensor

    def at_points(self) -> Tensor:
        """The value at the points, (P, *S)."""
        return self.base + self.delta


@dataclass(frozen=True)
class Still(Dual):
    """A differentiable value at theta0 itself: delta is a zero (1, *S) that takes no memory.

    Rules may ignore it, or broadcast it with ``dot`` at the price of one more point: what they
    return as a difference is dropped.
    """

    def at_points(self) -> Tensor:
        """The value at all points, (1, *S)."""
        return self.base.unsqueeze(0)


def still(base: Tensor, dot: Tensor) -> Still:
    """A value at theta0 from its derivative (P, *S)."""
    return Still(base, no_difference(base), dot)


@dataclass(frozen=True)
class Discrete:
    """A value without derivative that may differ between points: base (S), point (P, *S)."""

    base: Tensor
    point: Tensor


Value = Tensor | Dual | Discrete | Weight


@dataclass
class Context:
    """What rules may need besides their arguments: the points, and where to leave notes."""

    points: Points
    notes: set[str] = field(default_factory=set)


def discrete(base: Tensor, point: Tensor) -> Tensor | Discrete:
    """A discrete value, or the constant it is when no point differs."""
    return base if bool((point == base).all()) else Discrete(base, point)


def lift(x: Tensor, ndim: int) -> Tensor:
    """(P, *S) -> (P, 1, ..., 1, *S) with ``ndim`` dimensions after P."""
    missing = ndim + 1 - x.ndim
    return x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:]) if missing > 0 else x


def fill(x: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast (P, *S) to (P, *shape)."""
    if x.shape[1:] == shape:
        return x
    return lift(x, len(shape)).expand(x.shape[0], *shape)


def to_dual(x: Dual | Discrete | Weight, dtype: torch.dtype | None = None) -> Dual:
    """Any moving value as a :class:`Dual` (weights become dense, discrete values steps)."""
    if isinstance(x, Weight):
        return (Still if x.points.still else Dual)(x.base, *x.dense())
    if isinstance(x, Discrete):
        kind = dtype or torch.get_default_dtype()
        base, point = x.base.to(kind), x.point.to(kind)
        delta = point - base
        return Dual(base, delta, torch.zeros_like(delta))
    return x
