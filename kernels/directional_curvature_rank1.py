"""Directional curvature along rank-one directions on a GPU: mean_n (sum_t (g.v_p)(a.w_p))^2.

The scores of `deaddir_fast.kernels.directional_scores_rank1`, squared and added in fp64 block by
block.
"""

from typing import Any

from torch import Tensor

from deaddir_fast.kernels.directional_curvature import mean_square
from deaddir_fast.kernels.directional_scores_rank1 import score_blocks
from deaddir_fast.ops._blocks import accumulation


def directional_curvature_rank1(
    a: Tensor, g: Tensor, v: Tensor, w: Tensor, **options: Any
) -> Tensor:
    """Return mean_n (sum_t (g.v)(a.w))^2 for each direction v w^T.

    Args:
        a: (n, i) or (n, t, i).
        g: (n, o) or (n, t, o).
        v: (p, o).
        w: (p, i).
        options: those of `score_blocks`.

    Returns:
        (p,), fp64 if any argument is, else fp32.
    """
    total = mean_square(score_blocks(a, g, v, w, **options), a.shape[0], v.shape[0], v.device)
    return total.to(accumulation(a, g, v, w))
