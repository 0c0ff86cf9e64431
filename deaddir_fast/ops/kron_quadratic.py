"""Quadratic form of a Kronecker-factored Fisher block: vec(U)^T (G (x) A) vec(U) = tr(U^T G U A).

Index letters: p directions, o outputs, i inputs; A is (i, i), G is (o, o), U is (p, o, i).

The reference is sum_oi (G U)_oi (U A^T)_oi: two products, no third one, nothing factorised. A
rounded Gram matrix has eigenvalues a little below 0, so its Cholesky factor may not exist. Where
both factors have one, compiled kernels take the sum of squares |L_G^T U L_A|^2 instead where that
pays: the zeros of the triangles halve the work.

Accuracy: absolute error of order eps |A| |G| |U|^2 with eps the rounding of the dtype. (A sum of
squares errs less where the value is small, but which form is taken depends on sizes and factors:
do not count on it.) A value at that level is not resolved; use fp64 factors, or
`directional_curvature` on the samples, whose relative error does not grow as the direction dies.

Bound: 2 p o i (o + i) FLOP, or half of it by Cholesky factors; p o i elements read.

Source: K-FAC (Martens & Grosse 2015); Dead Directions (arXiv 2606.05957) reads layer rates off it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.kron_matvec import check


def reference(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    """Return tr(U^T G U A) in plain torch, clamped at 0."""
    dtype = accumulation(A, G, U)
    p, o, i = U.shape
    A, G = A.to(dtype), G.to(dtype)
    parts = []
    for some in blocks(p, 4 * o * i * dtype.itemsize):
        u = U[some].to(dtype)
        parts.append(((G @ u) * (u @ A.mT)).sum((1, 2)))
    return torch.cat(parts).clamp(min=0)


def cholesky_factors(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return lower triangular L_A, L_G in fp64 with A = L_A L_A^T and G = L_G L_G^T.

    None where there are none: a factor is not exactly symmetric, not finite or only semi-definite.
    Waits for the device.
    """
    found = []
    for square in (A, G):
        if not torch.equal(square, square.mT):  # nor is NaN
            return None
        factor, failed = torch.linalg.cholesky_ex(square.double())
        if not bool((failed == 0) & factor.isfinite().all()):
            return None
        found.append(factor)
    return found[0], found[1]


def fake(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return U.new_empty((U.shape[0],), dtype=accumulation(A, G, U))


def kron_quadratic(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    """Return tr(U^T G U A) for each direction.

    Args:
        A: (i, i), positive semi-definite.
        G: (o, o), positive semi-definite.
        U: (p, o, i).

    Returns:
        (p,), never negative (a value rounded below 0 is 0); fp64 if any input is, else fp32
        (16-bit inputs are summed in fp32). NaN propagates.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check(A, G, U)
    return call("kron_quadratic", A, G, U)
