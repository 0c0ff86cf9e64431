"""C++ kernels for the samples of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._cpu._launch import extension, kernel


def _directional_curvature(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    out = torch.empty(U.shape[0], dtype=accumulation(a, g, U))
    extension().directional_curvature(
        a.contiguous(), g.contiguous(), U.contiguous(), out, torch.get_num_threads()
    )
    return out


def _directional_curvature_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(v.shape[0], dtype=accumulation(a, g, v, w))
    extension().directional_curvature_rank1(
        a.contiguous(),
        g.contiguous(),
        v.contiguous(),
        w.contiguous(),
        out,
        torch.get_num_threads(),
    )
    return out


directional_curvature = kernel(_directional_curvature)
directional_curvature_rank1 = kernel(_directional_curvature_rank1)
