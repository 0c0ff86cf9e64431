"""C++ kernels for the samples of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._cpu._launch import extension, kernel


def _run(name: str, out: Tensor, *inputs: Tensor) -> Tensor:
    run = getattr(extension(), name)
    run(*(x.contiguous() for x in inputs), out, torch.get_num_threads())
    return out


def _directional_curvature(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    out = torch.empty(U.shape[0], dtype=accumulation(a, g, U))
    return _run("directional_curvature", out, a, g, U)


def _directional_curvature_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(v.shape[0], dtype=accumulation(a, g, v, w))
    return _run("directional_curvature_rank1", out, a, g, v, w)


def _directional_scores(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    out = torch.empty(U.shape[0], a.shape[0], dtype=accumulation(a, g, U))
    return _run("directional_scores", out, a, g, U)


def _directional_scores_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(v.shape[0], a.shape[0], dtype=accumulation(a, g, v, w))
    return _run("directional_scores_rank1", out, a, g, v, w)


directional_curvature = kernel(_directional_curvature)
directional_curvature_rank1 = kernel(_directional_curvature_rank1)
directional_scores = kernel(_directional_scores)
directional_scores_rank1 = kernel(_directional_scores_rank1)
