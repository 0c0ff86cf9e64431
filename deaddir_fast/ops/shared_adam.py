"""Scaled AdamW whose second moment is shared by groups of rows and columns.

Index letters: o rows, i columns of each matrix of a list; b groups of rows, a groups of columns.
As ``scaled_adam``, but v is (b, a): the moment of the mean of g~^2 over the elements of a group
of rows times a group of columns. Rotations within a group of rows (or columns) turn g~ and m with w
and leave v as it is, so that the step turns with w: per-head rotations of attention, and the
phases of rotary pairs.

Bound: g read twice, w and m read and written once: 24 bytes an element in fp32, plus v, which is
smaller than w by the size of a group; about 17 FLOP an element. Bound by memory.

Source: our choice; one second moment per block as in Adam-mini (Zhang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._adam import check_step, check_vectors, direction, scalars, store
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.scaled_adam import scale


def reference_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    row_groups: list[Tensor | None],
    col_groups: list[Tensor | None],
    hyper: Tensor,
    maximize: bool,
    seed: int,
) -> None:
    """Take the step in plain torch."""
    for k, (w, g, m, v) in enumerate(zip(ws, gs, ms, vs, strict=True)):
        h = scalars(hyper, m.dtype)
        s = scale(rows[k], cols[k])
        gradient = -g.to(m.dtype) if maximize else g.to(m.dtype)
        gradient = gradient if s is None else gradient * s
        m.copy_(m + h.rise1 * (gradient - m))
        mean = group_mean(gradient.square(), row_groups[k], col_groups[k], v.shape)
        v.copy_(h.fall2 * v + h.rise2 * mean)
        u = direction(m, spread(v, row_groups[k], col_groups[k]), h)
        step = h.lr * u if s is None else h.lr * s * u
        new = h.keep * w.to(m.dtype) - step
        store(w, new, seed, hyper[7], k)


def group_mean(
    x: Tensor, row_group: Tensor | None, col_group: Tensor | None, shape: torch.Size
) -> Tensor:
    """(b, a): means of x over groups of rows times groups of columns."""
    count = torch.ones_like(x)
    for dim, group in ((0, row_group), (1, col_group)):
        if group is not None:
            size = [*x.shape]
            size[dim] = shape[dim]
            x = x.new_zeros(size).index_add(dim, group.long(), x)
            count = count.new_zeros(size).index_add(dim, group.long(), count)
    return x / count


def spread(v: Tensor, row_group: Tensor | None, col_group: Tensor | None) -> Tensor:
    """(o, i): the entry of v that belongs to each element."""
    v = v if row_group is None else v[row_group.long()]
    return v if col_group is None else v[:, col_group.long()]


def fake_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    row_groups: list[Tensor | None],
    col_groups: list[Tensor | None],
    hyper: Tensor,
    maximize: bool,
    seed: int,
) -> None:
    """Nothing is returned; ``ws``, ``ms`` and ``vs`` are written."""


def shared_adam(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    row_groups: Sequence[Tensor | None],
    col_groups: Sequence[Tensor | None],
    hyper: Tensor,
    *,
    maximize: bool = False,
    seed: int = -1,
) -> None:
    """One AdamW step in scaled coordinates with a second moment shared by groups, in place.

    Args:
        ws, gs, ms, rows, cols, hyper, maximize, seed: as in ``scaled_adam``.
        vs: k matrices (b, a) of the state's dtype: rows are groups of rows of w, columns groups of
            columns. Written.
        row_groups: k int32 vectors (o,) with entries in [0, b), every group met at least once; or
            None, where b = o and every row is its own group.
        col_groups: k int32 vectors (i,) with entries in [0, a), or None.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, length, shape, dtype or device.
            Entries of the groups are not read.
        RuntimeError: a parameter requires grad outside ``torch.no_grad()``.
    """
    dtype = check_step(ws, gs, ms, hyper, seed)
    device = hyper.device
    heights, widths = [w.shape[0] for w in ws], [w.shape[1] for w in ws]
    check_vectors("rows", rows, heights, dtype, device)
    check_vectors("cols", cols, widths, dtype, device)
    check_vectors("row_groups", row_groups, heights, torch.int32, device)
    check_vectors("col_groups", col_groups, widths, torch.int32, device)
    if not isinstance(vs, (list, tuple)):
        raise _check.fail("vs", vs, "a list of tensors", TypeError)
    if len(vs) != len(ws):
        raise ValueError(f"vs: expected {len(ws)} tensors, got {len(vs)}")
    for k, v in enumerate(vs):
        name = f"vs[{k}]"
        _check.tensor(name, v, ndim=2, dtypes=(dtype,))
        if not v.is_contiguous() or v.device != device:
            raise _check.fail(name, v, f"a contiguous matrix on {device}")
        for dim, group in ((0, row_groups[k]), (1, col_groups[k])):
            if group is None:
                _check.size(name, v, dim, ws[k].shape[dim], "that of its parameter")
    call(
        "shared_adam_",
        list(ws),
        list(gs),
        list(ms),
        list(vs),
        list(rows),
        list(cols),
        list(row_groups),
        list(col_groups),
        hyper,
        maximize,
        seed,
    )
