"""Groups of rows or columns given by a map: in what order to add their members, and in what pieces.

The members of each group, in order, are cut into pieces of a bounded number of members, so that
neither a large group nor uneven ones leave the device idle; a group without members has one empty
piece. Few large groups are added with the members of one piece side by side ("together"), many
small ones with pieces side by side ("each"). All of it is computed on the host from the map, once,
and put on the device:

    order (n): members, sorted by group; begin, end (pieces): the members of a piece in that order;
    first (groups + 1): the pieces of a group; count (groups): its members.

The order of additions therefore depends on the map alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deaddir_fast.kernels import _lists as lists


@dataclass(frozen=True)
class Axis:
    """How members of one dimension lie on the lanes of a program.

    Attributes:
        lanes: lanes of the tile in this dimension.
        each: members of a piece at most, where pieces lie side by side.
        together: the same where members lie side by side.
        large: groups of so many members on average are taken together.
    """

    lanes: int
    each: int
    together: int
    large: int


@dataclass(frozen=True)
class Layout:
    """The division of one dimension, without its tensor.

    Attributes:
        n: members. groups, pieces: their numbers.
        together: members lie side by side, not pieces.
        runs: members of a piece are neighbours in the matrix.
        even: pieces begin and end at multiples of 8.
    """

    n: int
    groups: int
    pieces: int
    together: bool
    runs: bool
    even: bool

    @property
    def split(self) -> bool:
        """Whether a group has more than one piece."""
        return self.pieces > self.groups


def alone(n: int) -> Layout:
    """Every member is its own group."""
    return Layout(n, n, n, together=False, runs=True, even=False)


def divide(group: np.ndarray, groups: int, axis: Axis) -> tuple[Layout, np.ndarray]:
    """The layout of a map and the int32 numbers for the device.

    Raises:
        ValueError: an entry is no group.
    """
    n = len(group)
    if n and not (0 <= group.min() and group.max() < groups):
        raise ValueError(
            f"groups: expected entries in [0, {groups}), got {group.min()} to {group.max()}"
        )
    order = np.argsort(group, kind="stable")
    count = np.bincount(group, minlength=groups)
    together = n >= axis.large * groups
    span = axis.together if together else axis.each
    each = np.maximum(1, -(-count // span))
    first = np.concatenate([[0], np.cumsum(each)])
    owner = np.repeat(np.arange(groups), each)
    starts = np.concatenate([[0], np.cumsum(count)])
    begin = starts[owner] + (np.arange(first[-1]) - first[owner]) * span
    end = np.minimum(begin + span, starts[owner + 1])
    layout = Layout(
        n=n,
        groups=groups,
        pieces=int(first[-1]),
        together=bool(together),
        runs=bool((order == np.arange(n)).all()),
        even=bool((begin % 8 == 0).all() and (end % 8 == 0).all()),
    )
    return layout, np.concatenate([order, begin, end, first, count]).astype(np.int32)


@dataclass(frozen=True)
class _Known:
    source: weakref.ref[Tensor]
    version: int
    address: int
    layout: Layout
    numbers: Tensor


_known: dict[tuple[int, int, Axis], _Known] = {}


def grouping(group: Tensor | None, n: int, groups: int, axis: Axis) -> tuple[Layout, Tensor | None]:
    """The layout of a map and its numbers on the map's device; None for None.

    The map is read (and waited for) when it is first met, and again after torch has written to
    it; a write that torch does not count, through ``.data`` or a raw pointer, is not noticed.
    What belongs to a map is forgotten with it.
    """
    if group is None:
        return alone(n), None
    name = (id(group), groups, axis)
    found = _known.get(name)
    counted = not group.is_inference()
    if (
        found is not None
        and found.source() is group
        and counted
        and found.version == group._version
        and found.address == group.data_ptr()
    ):
        return found.layout, found.numbers
    lists.refuse_capture(group.device)
    layout, numbers = divide(group.detach().cpu().numpy(), groups, axis)
    device = torch.from_numpy(numbers).to(group.device)
    if counted:
        forget = weakref.ref(group, lambda _: _known.pop(name, None))
        _known[name] = _Known(forget, group._version, group.data_ptr(), layout, device)
    return layout, device
