"""Triton kernels for blocks of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import Kernel
from deaddir_fast.ops._triton._launch import problem


def _block_products(
    ws: list[Tensor], gs: list[Tensor], blocks: list[Tensor], dims: list[int], count: int
) -> Tensor:
    from deaddir_fast.kernels import block_products as kernel

    device = ws[0].device if ws else None
    out = torch.empty((2, count), dtype=accumulation(*ws), device=device)
    kernel.block_products(ws, gs, blocks, dims, out)
    return out


def _block_products_worthwhile(
    ws: list[Tensor], gs: list[Tensor], blocks: list[Tensor], dims: list[int], count: int
) -> bool:
    if not ws or not ws[0].is_cuda:  # the interpreter is for tests
        return False
    from deaddir_fast.kernels import block_products as kernel

    return kernel.worthwhile(ws)


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
    from deaddir_fast.kernels import block_adam as kernel

    kernel.block_adam(
        ws, gs, ms, vs, blocks, dims, norms, inner, radial, reach, hyper,
        maximize=maximize, seed=seed,
    )  # fmt: skip
    # written through raw pointers, which torch does not see
    torch.autograd.graph.increment_version([t for t in (*ws, *ms, *vs) if not t.is_inference()])


def _block_adam_worthwhile(
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
) -> bool:
    if not ws or not ws[0].is_cuda:
        return False
    from deaddir_fast.kernels import block_adam as kernel

    return kernel.worthwhile(ws)


block_products = Kernel("triton", _block_products, problem, _block_products_worthwhile)
block_adam_ = Kernel("triton", _block_adam_, problem, _block_adam_worthwhile)
