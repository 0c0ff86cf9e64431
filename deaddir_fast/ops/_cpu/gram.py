"""C++ kernels for Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._cpu._launch import extension, kernel
from deaddir_fast.ops.gram_packed import entries


def _write(
    out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float, *, packed: bool
) -> None:
    target = out.contiguous()
    extension().gram(
        target,
        x.contiguous(),
        None if weight is None else weight.contiguous(),
        alpha,
        beta,
        packed,
        torch.get_num_threads(),
    )
    if target is not out:
        out.copy_(target)
    elif not out.is_inference():  # written through a raw pointer, which torch does not see
        torch.autograd.graph.increment_version(out)


def _gram(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    i = x.shape[1]
    out = torch.empty((i, i), dtype=accumulation(x, weight))
    _write(out, x, weight, alpha, 0.0, packed=False)
    return out


def _gram_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    _write(out, x, weight, alpha, beta, packed=False)


def _gram_packed(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    out = torch.empty((entries(x.shape[1]),), dtype=accumulation(x, weight))
    _write(out, x, weight, alpha, 0.0, packed=True)
    return out


def _gram_packed_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    _write(out, x, weight, alpha, beta, packed=True)


gram = kernel(_gram)
gram_ = kernel(_gram_)
gram_packed = kernel(_gram_packed)
gram_packed_ = kernel(_gram_packed_)
