"""Sums of squares of scaled rows or columns: out_o = sum_i (row_o w_oi col_i)^2, or over o.

Index letters: o rows, i columns of each matrix of a list; results of all matrices follow one
another in one vector. Dimension 0 gives one sum per row, 1 one per column.

These are the norms of the path-norm frame of an equivariant optimizer: with ``col`` the inverse
norms of the units a matrix reads and dimension 0, the sums are the squared norms of the units it
writes.

Bound: 3 o i FLOP and w read once (2 to 8 bytes an element): bound by memory.

Source: path norms of rectifier networks (Neyshabur et al. 2015, "Path-SGD"), one layer of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._adam import check_matrices, check_vectors
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import call


def reference(
    ws: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None], dims: list[int]
) -> Tensor:
    """Return the sums in plain torch."""
    dtype = accumulation(*ws)
    out = []
    for w, row, col, dim in zip(ws, rows, cols, dims, strict=True):
        scaled = w.to(dtype)
        scaled = scaled if row is None else scaled * row[:, None]
        scaled = scaled if col is None else scaled * col
        out.append(scaled.square().sum(1 - dim))
    return torch.cat(out) if out else torch.zeros(0, dtype=dtype)


def fake(
    ws: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None], dims: list[int]
) -> Tensor:
    """Shape and dtype of the result."""
    total = sum(w.shape[dim] for w, dim in zip(ws, dims, strict=True))
    dtype = accumulation(*ws)
    return ws[0].new_empty(total, dtype=dtype) if ws else torch.zeros(0, dtype=dtype)


def scaled_squares(
    ws: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    dims: Sequence[int],
) -> Tensor:
    """Sums of squares of the scaled rows (dimension 0) or columns (1) of each matrix.

    Args:
        ws: k contiguous (o, i) matrices of one dtype and device.
        rows: k vectors (o,) or None (ones), fp64 if ``ws`` is, else fp32.
        cols: k vectors (i,) or None.
        dims: k numbers, 0 or 1: the dimension that stays.

    Returns:
        One vector: the (o,) or (i,) sums of every matrix in order; fp64 or fp32. 16-bit matrices
        are summed in fp32. NaN and infinity propagate.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, length, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check_matrices("ws", ws, None)
    dtype = accumulation(*ws)
    device = ws[0].device if ws else torch.device("cpu")
    check_vectors("rows", rows, [w.shape[0] for w in ws], dtype, device)
    check_vectors("cols", cols, [w.shape[1] for w in ws], dtype, device)
    if len(dims) != len(ws) or any(d not in (0, 1) for d in dims):
        raise _check.fail("dims", list(dims), f"{len(ws)} numbers, each 0 or 1")
    for k, w in enumerate(ws):
        _check.no_gradient(**{f"ws[{k}]": w})
    return call("scaled_squares", list(ws), list(rows), list(cols), list(dims))
