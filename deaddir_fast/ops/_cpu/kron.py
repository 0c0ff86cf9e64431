"""C++ kernels for Kronecker factors."""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._cpu._launch import extension, kernel
from deaddir_fast.ops.kron_quadratic import cholesky_factors
from deaddir_fast.ops.kron_solve import eigenproblem


def _product(
    left: Tensor,
    right: Tensor,
    U: Tensor,
    *,
    left_transposed: bool = False,
    right_transposed: bool = False,
    denominator: Tensor | None = None,
) -> Tensor:
    out = torch.empty(U.shape, dtype=accumulation(left, right, U))
    extension().kron_matvec(
        out,
        left.contiguous(),
        right.contiguous(),
        U.contiguous(),
        left_transposed,
        right_transposed,
        denominator,
        torch.get_num_threads(),
    )
    return out


def _kron_matvec(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    return _product(G, A, U)


def _kron_solve(A: Tensor, G: Tensor, U: Tensor, damping: float) -> Tensor:
    result = accumulation(A, G, U)
    if U.numel() == 0:
        return torch.empty(U.shape, dtype=result)
    P, Q, denominator = eigenproblem(A, G, U, damping)
    p, o, i = U.shape
    parts = []
    for some in blocks(p, 3 * o * i * torch.float64.itemsize):
        rotated = _product(Q, P, U[some], left_transposed=True, denominator=denominator)
        parts.append(_product(Q, P, rotated, right_transposed=True).to(result))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _kron_quadratic(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    out = torch.empty(U.shape[0], dtype=accumulation(A, G, U))
    factors = cholesky_factors(A, G, U)
    a, g = (A, G) if factors is None else factors
    extension().kron_quadratic(
        a.contiguous(),
        g.contiguous(),
        U.contiguous(),
        out,
        factors is not None,
        torch.get_num_threads(),
    )
    return out


def _kron_quadratic_rank1(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(v.shape[0], dtype=accumulation(A, G, v, w))
    extension().kron_quadratic_rank1(
        A.contiguous(),
        G.contiguous(),
        v.contiguous(),
        w.contiguous(),
        out,
        torch.get_num_threads(),
    )
    return out


kron_matvec = kernel(_kron_matvec)
kron_solve = kernel(_kron_solve)
kron_quadratic = kernel(_kron_quadratic)
kron_quadratic_rank1 = kernel(_kron_quadratic_rank1)
