"""Triton kernels for the samples of one layer."""

from __future__ import annotations

from torch import Tensor

from deaddir_fast.ops._dispatch import Kernel
from deaddir_fast.ops._triton._launch import problem


def _directional_curvature(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    from deaddir_fast.kernels import directional_curvature as kernel

    return kernel.directional_curvature(a, g, U)


def _directional_scores(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    from deaddir_fast.kernels import directional_scores as kernel

    return kernel.directional_scores(a, g, U)


def _worthwhile(a: Tensor, g: Tensor, U: Tensor) -> bool:
    if not a.is_cuda:  # the interpreter is for tests
        return False
    from deaddir_fast.kernels import directional_scores as kernel

    return kernel.worthwhile(a, g, U)


def _directional_curvature_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    from deaddir_fast.kernels import directional_curvature_rank1 as kernel

    return kernel.directional_curvature_rank1(a, g, v, w)


def _directional_scores_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    from deaddir_fast.kernels import directional_scores_rank1 as kernel

    return kernel.directional_scores_rank1(a, g, v, w)


def _worthwhile_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> bool:
    if not a.is_cuda:
        return False
    from deaddir_fast.kernels import directional_scores_rank1 as kernel

    return kernel.worthwhile(a, g, v, w)


directional_curvature = Kernel("triton", _directional_curvature, problem, _worthwhile)
directional_curvature_rank1 = Kernel(
    "triton", _directional_curvature_rank1, problem, _worthwhile_rank1
)
directional_scores = Kernel("triton", _directional_scores, problem, _worthwhile)
directional_scores_rank1 = Kernel("triton", _directional_scores_rank1, problem, _worthwhile_rank1)
