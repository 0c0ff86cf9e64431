"""Triton kernels for Kronecker factors."""

from __future__ import annotations

from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import Kernel
from deaddir_fast.ops._triton._launch import problem
from deaddir_fast.ops.kron_solve import eigenproblem


def _kron_matvec(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    from deaddir_fast.kernels import kron_matvec as kernel

    out = U.new_empty(U.shape, dtype=accumulation(A, G, U))
    kernel.kron_matvec(out, A, G, U)
    return out


def _kron_matvec_worthwhile(A: Tensor, G: Tensor, U: Tensor) -> bool:
    if not U.is_cuda:  # the interpreter is for tests
        return False
    from deaddir_fast.kernels import kron_matvec as kernel

    return kernel.worthwhile(A, G, U)


def _kron_solve(A: Tensor, G: Tensor, U: Tensor, damping: float) -> Tensor:
    from deaddir_fast.kernels import kron_solve as kernel

    out = U.new_empty(U.shape, dtype=accumulation(A, G, U))
    if U.numel() > 0:
        P, Q, denominator = eigenproblem(A, G, U, damping)
        kernel.kron_solve(out, P, Q, denominator, U)
    return out


def _kron_solve_worthwhile(A: Tensor, G: Tensor, U: Tensor, damping: float) -> bool:
    # The vendor's fp64 products are hard to beat, and the division is a small part.
    return False


def _kron_quadratic(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    from deaddir_fast.kernels import kron_quadratic as kernel

    return kernel.kron_quadratic(A, G, U, accumulation(A, G, U))


def _kron_quadratic_worthwhile(A: Tensor, G: Tensor, U: Tensor) -> bool:
    if not U.is_cuda:
        return False
    from deaddir_fast.kernels import kron_quadratic as kernel

    return kernel.worthwhile(A, G, U)


def _kron_quadratic_rank1(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> Tensor:
    from deaddir_fast.kernels import kron_quadratic_rank1 as kernel

    return kernel.kron_quadratic_rank1(A, G, v, w, accumulation(A, G, v, w))


def _kron_quadratic_rank1_worthwhile(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> bool:
    if not v.is_cuda:
        return False
    from deaddir_fast.kernels import kron_quadratic_rank1 as kernel

    return kernel.worthwhile(A, G, v, w)


kron_matvec = Kernel("triton", _kron_matvec, problem, _kron_matvec_worthwhile)
kron_solve = Kernel("triton", _kron_solve, problem, _kron_solve_worthwhile)
kron_quadratic = Kernel("triton", _kron_quadratic, problem, _kron_quadratic_worthwhile)
kron_quadratic_rank1 = Kernel(
    "triton", _kron_quadratic_rank1, problem, _kron_quadratic_rank1_worthwhile
)
