"""C++ kernels for blocks of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._cpu._launch import extension, kernel


def _block_products(
    ws: list[Tensor], gs: list[Tensor], blocks: list[Tensor], dims: list[int], count: int
) -> Tensor:
    out = torch.empty((2, count), dtype=accumulation(*ws))
    extension().block_products(ws, gs, blocks, dims, out, torch.get_num_threads())
    return out


def _block_adam_(
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
    extension().block_adam(
        ws, gs, ms, vs, blocks, dims, norms, inner, radial, reach, hyper, maximize, seed,
        torch.get_num_threads(),
    )  # fmt: skip
    # written through raw pointers, which torch does not see
    torch.autograd.graph.increment_version([t for t in (*ws, *ms, *vs) if not t.is_inference()])


block_products = kernel(_block_products)
block_adam_ = kernel(_block_adam_)
