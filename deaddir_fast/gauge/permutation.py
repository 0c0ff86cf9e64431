"""Permutations of hidden units: finite groups, whose orbits have no tangents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State
from deaddir_fast.gauge.rescaling import Slot


@dataclass(frozen=True, eq=False)
class Permutation(Gauge):
    """Units change places, with everything that writes and reads them.

    Elements are long tensors of shape (h,), or (blocks, h) where the units of each block permute
    on their own: the unit that comes to place j was at place ``element[j]``. The units of a slot
    are numbered block by block; exponents tell writers (+1) from readers (-1) and do nothing.

    The group is finite: ``dimension`` is 0, an algebra element has shape (0,), its exponential is
    the identity and there are no tangents.
    """

    slots: tuple[Slot, ...]

    @property
    def dimension(self) -> int:
        """Zero."""
        return 0

    @property
    def algebra_shape(self) -> tuple[int, ...]:
        """The algebra has the zero vector alone."""
        return (0,)

    def _check_element(self, element: Tensor) -> Tensor:
        if not isinstance(element, Tensor) or element.dtype != torch.long:
            raise _check.fail("element", element, "a torch.int64 tensor", TypeError)
        if tuple(element.shape) != self.shape:
            raise _check.fail("element", element, f"shape {self.shape} for {self.name!r}")
        places = torch.arange(self.shape[-1], device=element.device).expand(self.shape)
        if not torch.equal(element.sort(-1).values, places):
            raise _check.fail("element", element, f"permutations for {self.name!r}")
        return element

    def identity(self) -> Tensor:
        """0, 1, 2, ... in every block."""
        return torch.arange(self.shape[-1]).repeat(*self.shape[:-1], 1).reshape(self.shape)

    def random_element(self, generator: torch.Generator | None = None) -> Tensor:
        """A random cycle through all units of each block: no unit keeps its place."""
        rows = []
        for _ in range(self._blocks):
            order = torch.randperm(self.shape[-1], generator=generator)
            row = torch.empty_like(order)
            row[order] = order.roll(-1)
            rows.append(row)
        return torch.stack(rows).reshape(self.shape)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """``first[second]``, block by block."""
        return first.gather(-1, second)

    def exp(self, algebra: Tensor) -> Tensor:
        """The identity: the algebra is zero."""
        self._check_algebra(algebra)
        return self.identity()

    @property
    def _blocks(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    def _act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        h = self.shape[-1]
        first = torch.arange(0, self._blocks * h, h)[:, None]
        unit = (element.cpu().reshape(-1, h) + first).reshape(-1)
        moved: dict[str, Tensor] = {}
        for slot in self.slots:
            w = moved.get(slot.parameter, state[slot.parameter])
            source = torch.arange(slot.size)
            source[slot.positions] = slot.positions[unit]
            axis = slot.axis if w.ndim else 0
            moved[slot.parameter] = w.index_select(axis, source.to(w.device))
        return moved

    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        return {k: torch.zeros_like(state[k]) for k in self.parameters}

    def tangents(self, state: State) -> dict[str, Tensor]:
        """{name: (0, *shape)} for the parameters the gauge moves."""
        self._check_state(state)
        return {k: state[k].new_zeros(0, *state[k].shape) for k in self.parameters}
