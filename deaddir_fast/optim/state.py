"""State of one parameter, and its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets.sharded import spread
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.optim.layout import Layout, local
from deaddir_fast.optim.plan import Entry


def new_state(p: Tensor, entries: list[Entry], *, capturable: bool) -> dict[str, Any]:
    """Step count and moments of a parameter, zero.

    ``exp_avg`` has the parameter's shape; ``exp_avg_sq`` too, or one entry per group where
    rotating units share it. fp64 for fp64 parameters, else fp32.
    """
    dtype = accumulation(p)
    device = p.device if capturable else torch.device("cpu")
    first = _like(p, dtype)
    grouped = bool(entries) and entries[0].groups is not None
    second = _grouped(p, entries, dtype) if grouped else _like(p, dtype)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": first,
        "exp_avg_sq": second,
    }


def _like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(p.detach(), dtype=dtype, memory_format=torch.preserve_format)


def _grouped(p: Tensor, entries: list[Entry], dtype: torch.dtype) -> Tensor:
    shape = entries[0].groups
    assert shape is not None
    sliced = entries[0].layout.index is not None
    full = (len(entries), *shape) if sliced else shape
    v = torch.zeros(full, dtype=dtype, device=p.device)
    if not spread(p) or sliced or entries[0].row_groups is not None or entries[0].split:
        return v
    from torch.distributed.tensor import DTensor

    given: Any = p
    return DTensor.from_local(
        v,
        given.device_mesh,
        given.placements,
        run_check=False,
        shape=torch.Size((p.shape[0], shape[1])),
        stride=(shape[1], 1),
    )


@dataclass
class Matrices:
    """The matrices of a parameter and of its moments, in the order of its entries.

    Attributes:
        key: addresses they were made from.
        views: whether all of them are views; else they are copies, to be written back.
    """

    key: tuple[int, ...]
    ws: list[Tensor]
    ms: list[Tensor]
    vs: list[Tensor]
    views: bool

    def write(self, p: Tensor, state: dict[str, Any], entries: list[Entry]) -> None:
        """Write copies back."""
        for n, entry in enumerate(entries):
            layout = entry.layout
            layout.write(p, self.ws[n])
            layout.write(state["exp_avg"], self.ms[n])
            if entry.groups is None:
                layout.write(state["exp_avg_sq"], self.vs[n])


def addresses(p: Tensor, state: dict[str, Any]) -> tuple[int, ...]:
    """What the matrices of a parameter depend on."""
    return tuple(local(t).data_ptr() for t in (p, state["exp_avg"], state["exp_avg_sq"]))


def matrices(p: Tensor, state: dict[str, Any], entries: list[Entry]) -> Matrices:
    """The matrices of a parameter and its moments."""
    ws = [e.layout.matrix(p) for e in entries]
    ms = [e.layout.matrix(state["exp_avg"]) for e in entries]
    vs = [_second(state["exp_avg_sq"], e) for e in entries]
    views = all(
        _is_view(e.layout, t, x)
        for t, xs in ((p, ws), (state["exp_avg"], ms))
        for e, x in zip(entries, xs, strict=True)
    ) and all(
        e.groups is not None or _is_view(e.layout, state["exp_avg_sq"], x)
        for e, x in zip(entries, vs, strict=True)
    )
    return Matrices(addresses(p, state), ws, ms, vs, views)


def _second(v: Tensor, entry: Entry) -> Tensor:
    if entry.groups is None:
        return entry.layout.matrix(v)
    held = local(v)
    return held if entry.layout.index is None else held[entry.layout.place]


def _is_view(layout: Layout, t: Tensor, matrix: Tensor) -> bool:
    return layout.part(t).data_ptr() == matrix.data_ptr()
