"""Rotations of the damped Kronecker system on a GPU: Q [(Q^T U P) / denominator] P^T, in fp64.

Four products of `deaddir_fast.kernels._product`; the division is the epilogue of the second one.
"""

import torch
from torch import Tensor

from deaddir_fast.kernels._case import Case
from deaddir_fast.kernels._product import Config, cases, dense, product
from deaddir_fast.kernels.kron_matvec import WORKSPACE, rows
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
    P, Q, denominator = P.contiguous(), Q.contiguous(), denominator.contiguous()
    for some in blocks(p, 3 * o * i * torch.float64.itemsize, WORKSPACE):
        u = dense(rows(U[some].double()))
        b = len(out[some])
        one = u.new_empty((b, o, i))
        two = torch.empty_like(one)
        wide, tall = P.expand(len(u), i, i), Q.expand(b, o, o)
        product(one.view(u.shape), u, wide, config=config)
        product(two, tall.mT, one, divisor=denominator, config=config)
        product(one, tall, two, config=config)
        flat = rows(one)
        product(rows(out[some]), flat, P.expand(1, i, i).mT, config=config)


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    wide = torch.float64
    return [
        *cases(wide, "divided", epilogue="divide", left_transposed=True),
        *cases(wide, "transposed", right_transposed=True),
        *cases(wide, "transposed, rounded", right_transposed=True, out=torch.float32),
    ]
