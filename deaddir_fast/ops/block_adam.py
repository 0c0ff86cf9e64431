"""The tangential step of DDCAdam on blocks of units, with their radial step given.

Index letters: o rows, i columns of each matrix of a list; b blocks, made of whole rows (dimension
0) or columns (1) of any of the matrices. With d = 1 - lr wd, and for the block b of an element
the norm rho_b of d w and its product q_b = <g, d w> with the gradient,

    w0 = d w,   t = rho_b (g - (q_b / rho_b^2) w0),   m, v <- Adam moments of t,
    u = m' / (sqrt(v') + eps),   u <- u - (<u, w0>_b / rho_b^2) w0,
    w <- exp(radial_b) w0 - lr reach_b u.

Everything that enters the moments is unchanged where a block is multiplied by a positive number,
and rho_b, reach_b move with it: so does the step. A block with rho_b = 0 is outside this chart
and takes an AdamW step: t = g, no projection, radial and reach read as 0 and 1.

Bound: the products <u, w0> need all of a block's moments before any of it moves. A block that fits
in a cache is finished there: w, m, v read and written and g read once, 28 bytes an element in fp32.
Others are streamed twice, w, m, v read again: 44 bytes. Rows of units are of the first kind, and
whole layers of the second. So are columns of tall matrices (C++: above 128 rows, Triton: 512): a
panel of them that fits in a cache is so narrow that memory reads it at a fraction of its rate.
About 25 FLOP an element. Bound by memory.

Source: "Dead Directions" (arXiv 2606.05957), DDCAdam: steps 1, 2, 6, 7 of a multiplicative pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._adam import check_matrices, check_step, scalars, store, update_moments
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.block_products import check_blocks


def reference_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    blocks: list[Tensor],
    dims: list[int],
    norms: Tensor,
    inner: Tensor,
    radial: Tensor,
    reach: Tensor,
    hyper: Tensor,
    maximize: bool,
    seed: int,
) -> None:
    """Take the step in plain torch."""
    inside = norms > 0
    rho = torch.where(inside, norms, 1)
    along = torch.where(inside, inner / rho.square(), 0)
    grow = torch.where(inside, radial, 0).exp()
    reach = torch.where(inside, reach, 1)
    overlap = torch.zeros_like(norms)
    decayed, directions = [], []
    for w, g, m, v, block, dim in zip(ws, gs, ms, vs, blocks, dims, strict=True):
        h = scalars(hyper, m.dtype)
        w0 = h.keep * w.to(m.dtype)
        gradient = -g.to(m.dtype) if maximize else g.to(m.dtype)
        tangent = at(rho, block, dim) * (gradient - at(along, block, dim) * w0)
        u = update_moments(tangent, m, v, h)
        overlap = overlap.index_add(0, block.long(), (u * w0).sum(1 - dim))
        decayed.append(w0)
        directions.append(u)
    back = torch.where(inside, overlap / rho.square(), 0)
    for k, (w, m, block, dim) in enumerate(zip(ws, ms, blocks, dims, strict=True)):
        lr = scalars(hyper, m.dtype).lr
        u = directions[k] - at(back, block, dim) * decayed[k]
        new = at(grow, block, dim) * decayed[k] - lr * at(reach, block, dim) * u
        store(w, new, seed, hyper[7], k)


def at(values: Tensor, block: Tensor, dim: int) -> Tensor:
    """The value of each element's block, broadcastable to the matrix."""
    chosen = values[block.long()]
    return chosen[:, None] if dim == 0 else chosen


def fake_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    blocks: list[Tensor],
    dims: list[int],
    norms: Tensor,
    inner: Tensor,
    radial: Tensor,
    reach: Tensor,
    hyper: Tensor,
    maximize: bool,
    seed: int,
) -> None:
    """Nothing is returned; ``ws``, ``ms`` and ``vs`` are written."""


def block_adam(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    blocks: Sequence[Tensor],
    dims: Sequence[int],
    norms: Tensor,
    inner: Tensor,
    radial: Tensor,
    reach: Tensor,
    hyper: Tensor,
    *,
    maximize: bool = False,
    seed: int = -1,
) -> None:
    """Tangential Adam step and given radial step of blocks of units, in place.

    Args:
        ws, gs, ms, vs, hyper, maximize, seed: as in ``scaled_adam``.
        blocks: k int32 vectors (o,) or (i,), the block in [0, b) of every row or column.
        dims: k numbers: 0 where rows belong to blocks, 1 where columns do.
        norms: (b,) norm of the decayed block (1 - lr wd) w, of the state's dtype.
        inner: (b,) product of the decayed block with its gradient (its negative, if ``maximize``).
        radial: (b,) change of the logarithm of the norm.
        reach: (b,) length that one unit of Adam's direction stands for; rho in the paper's step.
        The four vectors are those of all matrices together: blocks may span several.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, length, shape, dtype or device.
            Entries of the blocks are not read.
        RuntimeError: a parameter requires grad outside ``torch.no_grad()``.
    """
    dtype = check_step(ws, gs, ms, hyper, seed)
    check_matrices("vs", vs, ws, dtype)
    for name, value in (("norms", norms), ("inner", inner), ("radial", radial), ("reach", reach)):
        _check.tensor(name, value, ndim=1, dtypes=(dtype,))
        _check.size(name, value, 0, norms.shape[0], "one entry per block")
        if not value.is_contiguous() or value.device != hyper.device:
            raise _check.fail(name, value, f"a contiguous vector on {hyper.device}")
    check_blocks(ws, blocks, dims, norms.shape[0])
    call(
        "block_adam_",
        list(ws),
        list(gs),
        list(ms),
        list(vs),
        list(blocks),
        list(dims),
        norms,
        inner,
        radial,
        reach,
        hyper,
        maximize,
        seed,
    )
