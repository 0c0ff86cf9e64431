"""State of one parameter, and its matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets.sharded import spread
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.optim.layout import COLS, ROWS, Layout, local
from deaddir_fast.optim.plan import Entry


def new_state(p: Tensor, form: Entry, *, capturable: bool) -> dict[str, Any]:
    """Step count and moments of a parameter, zero.

    ``exp_avg`` has the parameter's shape; ``exp_avg_sq`` too, or one entry per group where
    rotating units share it. fp64 for fp64 parameters, else fp32. Of a sharded parameter both are
    DTensors, except a shared second moment of a convolution sharded along other axes than the
    first: a plain tensor then, of what this process holds.

    Args:
        p: the parameter.
        form: how one of its matrices is stepped.
        capturable: keep the step count on the device of the parameter.
    """
    dtype = accumulation(p)
    device = p.device if capturable else torch.device("cpu")
    first = _like(p, dtype)
    second = _like(p, dtype) if form.groups is None else _grouped(p, form, dtype)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": first,
        "exp_avg_sq": second,
    }


def _like(p: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(p.detach(), dtype=dtype, memory_format=torch.preserve_format)


def _grouped(p: Tensor, form: Entry, dtype: torch.dtype) -> Tensor:
    layout, sliced = form.layout, form.layout.index is not None
    assert form.groups is not None
    shape = ([local(p).shape[0]] if sliced else []) + [*form.groups]
    v = torch.zeros(shape, dtype=dtype, device=p.device)
    placed = _placements(p, form) if spread(p) else None
    if placed is None:
        return v
    from torch.distributed.tensor import DTensor

    given: Any = p
    whole = [p.shape[0]] if sliced else []
    for side, groups in ((ROWS, form.row_groups), (COLS, form.col_groups)):
        extent = math.prod(p.shape[a] for a in layout.axes(side))
        whole.append(extent if groups is None else form.groups[side])
    stride = [math.prod(whole[n + 1 :]) for n in range(len(whole))]
    return DTensor.from_local(
        v, given.device_mesh, placed, run_check=False, shape=torch.Size(whole), stride=(*stride,)
    )


def _placements(p: Any, form: Entry) -> list[Any] | None:
    """Where the parts of the second moment lie, or None where it is no evenly cut tensor."""
    from torch.distributed.tensor import Replicate, Shard

    sliced = form.layout.index is not None
    sides = ((ROWS, form.row_groups), (COLS, form.col_groups))
    placed: list[Any] = []
    for placement in p.placements:
        where: Any = Replicate()
        if placement.is_shard():
            if sliced and placement.dim == 0:
                where = Shard(0)
            for side, groups in sides:
                axes = form.layout.axes(side)
                if placement.dim in axes and groups is None:
                    if len(axes) > 1:
                        return None
                    where = Shard(side + sliced)
        placed.append(where)
    return placed


def restored(
    name: str, p: Tensor, saved: Mapping[str, Any], form: Entry, *, capturable: bool
) -> dict[str, Any]:
    """A copy of a saved state of a parameter, as this process would have made it.

    Args:
        name, p: the parameter.
        saved: what ``state_dict`` gave for it.
        form, capturable: as in :func:`new_state`.

    Raises:
        ValueError: a moment of another shape than this parameter has here.
    """
    out: dict[str, Any] = {}
    model = new_state(p, form, capturable=capturable) if "step" in saved else {}
    for key, value in saved.items():
        known: Any = model.get(key)
        if isinstance(value, Tensor) and known is None:
            out[key] = value.detach().to(p.device, copy=True)
        elif isinstance(value, Tensor):
            if value.shape != known.shape:
                raise ValueError(
                    f"state_dict: expected {key} of shape {tuple(known.shape)} for {name!r}, got "
                    f"{tuple(value.shape)}; it is the state of another model or of other gauges"
                )
            # In the memory layout and the dtype of this process, and spread like the parameter.
            out[key] = known.copy_(value.detach())
        else:
            out[key] = known.fill_(value) if isinstance(known, Tensor) else value
    return out


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
    parts = (p, state["exp_avg"], state["exp_avg_sq"])
    return tuple(local(t).data_ptr() if spread(t) else t.data_ptr() for t in parts)


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
