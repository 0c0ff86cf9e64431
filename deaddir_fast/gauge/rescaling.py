"""Per-unit rescaling: diagonal groups acting on hidden units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State, spread


@dataclass(frozen=True, eq=False)
class Slot:
    """Where one parameter axis meets the units of a gauge.

    Attributes:
        parameter: name of the parameter.
        axis: the axis indexed by units.
        positions: (h, m) long; unit ``j`` owns the entries ``positions[j]`` of the axis.
        size: extent of the axis.
        exponent: the parameter scales as ``c_j ** exponent``; -1 for readers of the units.
        outer: axes before ``axis`` whose entries have units of their own (the experts of a
            parameter that stacks them); positions and size then refer to ``(*outer, axis)``
            flattened into one.
    """

    parameter: str
    axis: int
    positions: Tensor
    size: int
    exponent: int
    outer: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that positions index, flattened in this order."""
        return (*self.outer, self.axis)

    def broadcast(self, entries: Tensor, w: Tensor) -> Tensor:
        """View one value per entry so that it multiplies the parameter ``w``."""
        return entries.reshape([s if a in self.axes else 1 for a, s in enumerate(w.shape)])

    def unit_of(self) -> Tensor:
        """(size,) long: the unit that owns each entry, h where none does."""
        h, m = self.positions.shape
        owner = torch.full((self.size,), h)
        owner[self.positions.reshape(-1)] = torch.arange(h).repeat_interleave(m)
        return owner


@dataclass(frozen=True, eq=False)
class Rescaling(Gauge):
    """Unit ``j`` is multiplied by ``c_j``: its writers by c_j, its readers by 1/c_j.

    Elements have shape (h,): positive, or non-zero where no operation on the units has a kink.
    """

    slots: tuple[Slot, ...]
    positive: bool

    def _check_element(self, element: Tensor) -> Tensor:
        self._check_shape("element", element)
        good = element > 0 if self.positive else element != 0
        if not bool((good & element.isfinite()).all()):
            kind = "positive" if self.positive else "non-zero"
            raise _check.fail("element", element, f"finite {kind} scales for {self.name!r}")
        return element

    def identity(self) -> Tensor:
        """All ones."""
        return torch.ones(self.shape, dtype=torch.float64)

    def random_element(self, generator: torch.Generator | None = None) -> Tensor:
        """Log-uniform scales in [0.3, 3], with random signs where the group has them."""
        u = torch.rand(self.shape, dtype=torch.float64, generator=generator)
        scales = torch.exp(math.log(0.3) + u * math.log(10.0))
        if self.positive:
            return scales
        signs = torch.randint(0, 2, self.shape, generator=generator).to(torch.float64)
        return scales * (2 * signs - 1)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Product of the scales."""
        return first * second

    def exp(self, algebra: Tensor) -> Tensor:
        """Elementwise exponential."""
        return algebra.exp()

    def _act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        moved: dict[str, Tensor] = {}
        for slot in self.slots:
            w = moved.get(slot.parameter, state[slot.parameter])
            factor = spread(element**slot.exponent, slot.unit_of(), 1.0)
            moved[slot.parameter] = w * slot.broadcast(factor.to(w), w)
        return moved

    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        rates: dict[str, Tensor] = {}
        for slot in self.slots:
            w = state[slot.parameter]
            rate = slot.broadcast(spread(algebra * slot.exponent, slot.unit_of(), 0.0).to(w), w)
            rates[slot.parameter] = (
                rates[slot.parameter] + rate if slot.parameter in rates else rate
            )
        return {name: state[name] * rate for name, rate in rates.items()}
