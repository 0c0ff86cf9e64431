"""A parameter as contiguous matrices: the form in which the optimizer steps see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.gauge.rescaling import Slot
from deaddir_fast.nets.sharded import spread

ROWS = 0
COLS = 1


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without its history."""
    t = t.detach()
    return t.to_local() if spread(t) else t  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Layout:
    """How a parameter, or one slice of it, is read as a matrix.

    The slowest axis in memory makes the rows, the others the columns; a vector is one row. A stack
    of matrices whose units are told apart by the first axis (experts) is read slice by slice.

    Attributes:
        name: of the parameter.
        index: the slice along the first axis, or None for all of the parameter.
        order: axes of what is read, from the slowest to the fastest in memory.
        shape: its extents in the whole parameter.
        held: extents of the part this process holds (those of ``shape`` unless it is sharded).
        start: where the held part begins, per axis.
        place: number of the slice within the held part.
    """

    name: str
    index: int | None
    order: tuple[int, ...]
    shape: tuple[int, ...]
    held: tuple[int, ...]
    start: tuple[int, ...]
    place: int = 0

    @property
    def rows(self) -> int:
        """Rows of the held matrix."""
        return self.held[self.order[0]] if len(self.order) > 1 else 1

    @property
    def cols(self) -> int:
        """Columns of the held matrix."""
        return math.prod(self.held[a] for a in self._inner)

    @property
    def _inner(self) -> tuple[int, ...]:
        return self.order[1:] if len(self.order) > 1 else self.order

    def axes(self, side: int) -> tuple[int, ...]:
        """Axes of the parameter behind the rows or the columns."""
        chosen = self._inner if side == COLS else self.order[:1] if len(self.order) > 1 else ()
        return tuple(a + (self.index is not None) for a in chosen)

    def covers(self, slot: Slot) -> bool:
        """Whether a slot of the parameter can be read on this matrix."""
        return slot.parameter == self.name and (not slot.outer or self.index is not None)

    def side(self, slot: Slot) -> int:
        """Whether the units of a slot run along rows (0) or along columns (1)."""
        return COLS if self._axis(slot) in self._inner else ROWS

    def _axis(self, slot: Slot) -> int:
        return slot.axis - (self.index is not None)

    def entries(self, slot: Slot) -> Tensor:
        """(rows,) or (cols,) long: the entry of the slot's axis behind every row or column."""
        axis = self._axis(slot)
        along = torch.arange(self.held[axis]) + self.start[axis]
        if slot.outer:
            assert self.index is not None
            along = along + self.index * self.shape[axis]
        if self.side(slot) == ROWS:
            return along
        view = [-1 if a == axis else 1 for a in self._inner]
        return along.reshape(view).expand([self.held[a] for a in self._inner]).reshape(-1)

    def beside(self, slot: Slot) -> Tensor:
        """(rows,) or (cols,) long: number of the combination of the other axes of that side."""
        axis = self._axis(slot)
        if self.side(slot) == ROWS:
            return torch.zeros(self.rows, dtype=torch.long)
        others = [1 if a == axis else self.held[a] for a in self._inner]
        number = torch.arange(math.prod(others)).reshape(others)
        return number.expand([self.held[a] for a in self._inner]).reshape(-1)

    def whole(self) -> Layout:
        """The layout without sharding."""
        return replace(self, held=self.shape, start=(0,) * len(self.shape))

    def within(self, side: int) -> Tensor:
        """(rows,) or (cols,) long: places of the held rows or columns in the whole matrix."""
        axes = self._inner if side == COLS else self.order[:1] if len(self.order) > 1 else ()
        place = torch.arange(math.prod(self.shape[a] for a in axes))
        place = place.reshape([self.shape[a] for a in axes])
        for dim, a in enumerate(axes):
            place = place.narrow(dim, self.start[a], self.held[a])
        return place.reshape(-1)

    def part(self, t: Tensor) -> Tensor:
        """The held part of what is read, in the parameter's own axes."""
        held = local(t)
        return held if self.index is None else held[self.place]

    def matrix(self, t: Tensor) -> Tensor:
        """The held part of a tensor of the parameter's shape as a contiguous matrix.

        A view where the tensor lies in memory like the parameter, else a copy.
        """
        if self.index is None and len(self.shape) == 2 and not spread(t) and self.order == (0, 1):
            # Most tensors, at every step.
            return (t.detach() if t.requires_grad else t).contiguous()
        return self.part(t).permute(self.order).reshape(self.rows, self.cols).contiguous()

    def write(self, t: Tensor, matrix: Tensor) -> None:
        """Put a matrix back into ``t``; nothing to do where it is a view."""
        part = self.part(t)
        if part.data_ptr() != matrix.data_ptr():
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            part.copy_(matrix.reshape([self.held[a] for a in self.order]).permute(back))


def _held(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not spread(parameter):
        return tuple(parameter.shape), (0,) * parameter.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    given: Any = parameter
    for placement in given.placements:
        if type(placement).__name__ not in ("Shard", "Replicate"):
            raise ValueError(
                f"params: expected DTensors with Shard or Replicate placements, got {placement}"
            )
    held, start = compute_local_shape_and_global_offset(
        given.shape, given.device_mesh, given.placements
    )
    return tuple(held), tuple(start)


def first_slice(name: str, parameter: Tensor) -> Layout:
    """The first slice of a stack as it would be held: for processes that hold none."""
    held, start = _held(parameter)
    axes = tuple(range(parameter.ndim - 1))
    return Layout(name, 0, axes, tuple(parameter.shape[1:]), held[1:], start[1:])


def layouts(name: str, parameter: Tensor, *, sliced: bool) -> list[Layout]:
    """The matrices a parameter is read as: one, or one per slice of the first axis.

    Raises:
        ValueError: a DTensor with a placement other than Shard and Replicate.
    """
    shape = tuple(parameter.shape)
    held, start = _held(parameter)
    part = local(parameter)
    if not sliced:
        return [Layout(name, None, _order(part), shape, held, start)]
    return [
        Layout(name, start[0] + n, _order(part[n]), shape[1:], held[1:], start[1:], n)
        for n in range(held[0])
    ]


def _order(part: Tensor) -> tuple[int, ...]:
    """Axes from the slowest to the fastest; those of a tensor with gaps as they come."""
    order = tuple(range(part.ndim))
    if part.is_contiguous():
        return order
    slowest = tuple(sorted(order, key=lambda a: (-part.stride()[a], a)))
    return slowest if part.permute(slowest).is_contiguous() else order


def shard_groups(parameter: Tensor, axes: Sequence[int] | None = None) -> list[Any]:
    """Process groups over which partial sums of a parameter's shards are added.

    Args:
        parameter: sharded or not.
        axes: those summed over; all of them by default.
    """
    if not spread(parameter):
        return []
    given: Any = parameter
    mesh = given.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(given.placements)
        if placement.is_shard() and mesh.size(dim) > 1 and (axes is None or placement.dim in axes)
    ]
