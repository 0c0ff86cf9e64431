"""Squared norms of blocks of units and their products with the gradient.

Index letters: o rows, i columns of each matrix of a list; b blocks. A block is made of whole rows
(dimension 0) or whole columns (1) of any of the matrices: the incoming weights and the bias of a
unit, its outgoing weights, or all of a layer.

Bound: 4 FLOP an element, w and g read once: 8 bytes an element in fp32. Bound by memory.

Source: radial part of the gradient in the cone over the sphere of a block, "Dead Directions"
(arXiv 2606.05957), DDCAdam.
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
    ws: list[Tensor], gs: list[Tensor], blocks: list[Tensor], dims: list[int], count: int
) -> Tensor:
    """Return the sums in plain torch."""
    dtype = accumulation(*ws)
    device = ws[0].device if ws else None
    out = torch.zeros(2, count, dtype=dtype, device=device)
    for w, g, block, dim in zip(ws, gs, blocks, dims, strict=True):
        x, y = w.to(dtype), g.to(dtype)
        sums = torch.stack([(x * x).sum(1 - dim), (x * y).sum(1 - dim)])
        out = out.index_add(1, block.long(), sums)
    return out


def fake(
    ws: list[Tensor], gs: list[Tensor], blocks: list[Tensor], dims: list[int], count: int
) -> Tensor:
    """Shape and dtype of the result."""
    dtype = accumulation(*ws)
    return ws[0].new_empty(2, count, dtype=dtype) if ws else torch.zeros(2, count, dtype=dtype)


def check_blocks(
    ws: Sequence[Tensor], blocks: Sequence[Tensor], dims: Sequence[int], count: int
) -> None:
    """Check the division of matrices into blocks; entries of ``blocks`` are not read."""
    _check.integer("count", count, 0)
    if len(dims) != len(ws) or any(d not in (0, 1) for d in dims):
        raise _check.fail("dims", list(dims), f"{len(ws)} numbers, each 0 or 1")
    device = ws[0].device if ws else torch.device("cpu")
    lengths = [w.shape[d] for w, d in zip(ws, dims, strict=True)]
    check_vectors("blocks", blocks, lengths, torch.int32, device)
    for k, block in enumerate(blocks):
        if block is None:
            raise _check.fail(f"blocks[{k}]", block, "an int32 vector", TypeError)


def block_products(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    blocks: Sequence[Tensor],
    dims: Sequence[int],
    count: int,
) -> Tensor:
    """Per block the sum of w^2 and the sum of g w.

    Args:
        ws: k contiguous (o, i) matrices of one dtype and device.
        gs: k matrices of the same shapes and dtype.
        blocks: k int32 vectors (o,) or (i,), the block in [0, count) of every row or column.
        dims: k numbers: 0 where rows belong to blocks, 1 where columns do.
        count: number of blocks; those met by no matrix get zeros.

    Returns:
        (2, count): squared norms, then inner products; fp64 for fp64, else fp32.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, length, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check_matrices("ws", ws, None)
    check_matrices("gs", gs, ws)
    check_blocks(ws, blocks, dims, count)
    for k, (w, g) in enumerate(zip(ws, gs, strict=True)):
        _check.no_gradient(**{f"ws[{k}]": w, f"gs[{k}]": g})
        if g.dtype != w.dtype or g.device != w.device:
            raise _check.fail(f"gs[{k}]", g, f"{w.dtype} on {w.device}")
    return call("block_products", list(ws), list(gs), list(blocks), list(dims), count)
