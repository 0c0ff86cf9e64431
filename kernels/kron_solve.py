"""Rotations of the damped Kronecker system on a GPU: Q [(Q^T U P) / denominator] P^T, in fp64.

Four products of `deaddir_fast.kernels._product`; the division is the epilogue of the second one.
"""

import torch
from torch import Tensor

from deaddir_fast.kernels._case import Case
from deaddir_fast.kernels._product import Config, Product, cases, store, width, write_shared
from deaddir_fast.kernels.kron_matvec import WORKSPACE
from deaddir_fast.ops._blocks import blocks


def kron_solve(
    out: Tensor,
    P: Tensor,
    Q: Tensor,
    denominator: Tensor,
    U: Tensor,
    *,
    config: Config | None = None,
) -> None:
    """Set out to Q [(Q^T U P) / denominator] P^T.

    Args:
        out: (p, o, i), contiguous, fp64 or fp32.
        P: (i, i), fp64.
        Q: (o, o), fp64.
        denominator: (o, i), fp64.
        U: (p, o, i).
        config: overrides `choose`.
    """
    p, o, i = U.shape
    if out.numel() == 0:
        return
    wide = torch.float64
    P, transposed = store(P, wide), store(P.mT, wide)
    Q, denominator = store(Q, wide), store(denominator, wide)
    for some in blocks(p, 3 * o * width(i) * wide.itemsize, WORKSPACE):
        one = store(U[some], wide)
        left = Q.expand(len(one), -1, -1)
        two, three = one.new_empty(one.shape), one.new_empty(one.shape)
        write_shared(two, one, P, i, config=config)
        Product(left, two, o, i, o, left_transposed=True, config=config).write(three, denominator)
        Product(left, three, o, i, o, config=config).write(two)
        write_shared(out[some], two, transposed, i, config=config)


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    wide = torch.float64
    return [
        *cases(wide, "Q^T U divided", epilogue="divide", left_transposed=True),
        *cases(wide, "U P^T", out_stored=False),
        *cases(wide, "U P^T to fp32", out=torch.float32, out_stored=False),
    ]
