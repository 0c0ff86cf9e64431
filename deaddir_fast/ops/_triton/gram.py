"""Triton kernels for Gram matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import Kernel
from deaddir_fast.ops._triton._launch import problem
from deaddir_fast.ops.gram_packed import entries


def _worthwhile(x: Tensor, weight: Tensor | None) -> bool:
    if not x.is_cuda:  # the interpreter is for tests
        return False
    from deaddir_fast.kernels import gram as kernel

    return kernel.worthwhile(x, weight)


def _write(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    alpha: float,
    beta: float,
    *,
    packed: bool = False,
) -> None:
    from deaddir_fast.kernels import gram as kernel

    # The kernel writes rows of unit stride that do not overlap, with 32-bit offsets in a tile.
    direct = out.stride(-1) == 1 and (packed or out.shape[1] <= out.stride(0) < 2**24)
    target = out if direct or out.numel() == 0 else out.contiguous()
    kernel.gram(
        target,
        x,
        None if weight is None else weight.to(out.dtype),
        alpha,
        beta,
        packed=packed,
    )
    if target is not out:
        out.copy_(target)
    elif not out.is_inference():  # written through a raw pointer, which torch does not see
        torch.autograd.graph.increment_version(out)


def _gram(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    i = x.shape[1]
    out = x.new_empty((i, i), dtype=accumulation(x, weight))
    _write(out, x, weight, alpha, 0.0)
    return out


def _gram_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    _write(out, x, weight, alpha, beta)


def _gram_packed(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    out = x.new_empty((entries(x.shape[1]),), dtype=accumulation(x, weight))
    _write(out, x, weight, alpha, 0.0, packed=True)
    return out


def _gram_packed_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    _write(out, x, weight, alpha, beta, packed=True)


def _new(run: Callable[..., Tensor]) -> Kernel:
    return Kernel(
        "triton",
        run,
        lambda x, weight, alpha: problem(x),
        lambda x, weight, alpha: _worthwhile(x, weight),
    )


def _in_place(run: Callable[..., None]) -> Kernel:
    return Kernel(
        "triton",
        run,
        lambda out, x, weight, alpha, beta: problem(x),
        lambda out, x, weight, alpha, beta: _worthwhile(x, weight),
    )


gram = _new(_gram)
gram_ = _in_place(_gram_)
gram_packed = _new(_gram_packed)
gram_packed_ = _in_place(_gram_packed_)
