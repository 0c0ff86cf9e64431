"""Directional curvature on a GPU: out_p = mean_n (sum_t g_nt^T U_p a_nt)^2.

The scores of `deaddir_fast.kernels.directional_scores`, squared and added in fp64 block by block.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.kernels.directional_scores import Block, score_blocks
from deaddir_fast.ops._blocks import accumulation


def directional_curvature(a: Tensor, g: Tensor, U: Tensor, **options: Any) -> Tensor:
    """Return mean_n (sum_t g^T U a)^2 for each direction.

    Args:
        a: (n, i) or (n, t, i).
        g: (n, o) or (n, t, o).
        U: (p, o, i).
        options: those of `score_blocks`.

    Returns:
        (p,), fp64 if any argument is, else fp32.
    """
    total = mean_square(score_blocks(a, g, U, **options), a.shape[0], U.shape[0], U.device)
    return total.to(accumulation(a, g, U))


def mean_square(found: Iterable[Block], n: int, p: int, device: torch.device) -> Tensor:
    """Return mean_n scores^2 (p,) in fp64; NaN for n = 0."""
    total = torch.zeros(p, dtype=torch.float64, device=device)
    for _, directions, scores in found:
        total[directions] += scores.square().sum(1)
    return total / n
