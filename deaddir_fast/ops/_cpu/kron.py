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


#: A factorisation in fp64 takes the time of this many multiply-adds of a product for each of its
#: own, and the checks before it that of a small product (measured).
FACTORISATION, CHECKS = 8, 5e7


def pays(p: int, o: int, i: int) -> bool:
    """Whether half the products save more than the Cholesky factors cost."""
    return p * o * i * (o + i) > FACTORISATION * (o**3 + i**3) / 3 + CHECKS


def _kron_quadratic(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    total = accumulation(A, G, U)
    out = torch.empty(U.shape[0], dtype=total)
    factors = cholesky_factors(A, G) if pays(*U.shape) else None
    a, g = (A, G) if factors is None else (factor.to(total) for factor in factors)
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
