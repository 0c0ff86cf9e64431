"""Damped Kronecker system: (G (x) A + damping I) vec X = vec U, exact in the eigenbasis.

Index letters: p directions, o outputs, i inputs; A is (i, i), G is (o, o), U and X are (p, o, i).

With A = P diag(m) P^T and G = Q diag(l) Q^T the matrix is diagonal in the basis Q (x) P:
X = Q [ (Q^T U P) / (l_o m_i + damping) ] P^T. No factored damping, no approximation.

Everything is computed in fp64, whatever the inputs: the division amplifies rounding by the
condition number, and a dead direction is where that number is large.

Bound: about 9 (o^3 + i^3) FLOP for the eigenvectors, 4 p o i (o + i) for the rotations.

Source: George et al. 2018 (EKFAC) for the basis; exact damping is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.kron_matvec import check


def reference(A: Tensor, G: Tensor, U: Tensor, damping: float) -> Tensor:
    """Solve in the eigenbasis, in fp64."""
    result = accumulation(A, G, U)
    p, o, i = U.shape
    if U.numel() == 0:
        return U.new_empty(U.shape, dtype=result)
    P, Q, denominator = eigenproblem(A, G, U, damping)
    parts = []
    for some in blocks(p, 4 * o * i * torch.float64.itemsize):
        rotated = (Q.mT @ U[some].double() @ P) / denominator
        parts.append((Q @ rotated @ P.mT).to(result))
    return torch.cat(parts).contiguous()


def eigenproblem(A: Tensor, G: Tensor, U: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonalise the system for directions U, and refuse it where it is singular.

    Args:
        A: (i, i), symmetric; not empty.
        G: (o, o), symmetric; not empty.
        U: (p, o, i).
        damping: at least 0.

    Returns:
        P (i, i), Q (o, o) and the denominator l_o m_i + damping (o, i), in fp64, with
        A = P diag(m) P^T and G = Q diag(l) Q^T. NaN where a factor is not finite.
    """
    _, o, i = U.shape
    m, P = _eigenbasis("A", A)
    l, Q = _eigenbasis("G", G)
    scale = l.abs().amax() * m.abs().amax()
    denominator = l[:, None] * m + damping
    resolution = max(o, i) * torch.finfo(torch.float64).eps * scale
    smallest = denominator.abs().amin()
    # NaN factors make both sides NaN, the comparison false, and the result NaN.
    if smallest <= resolution:
        raise ValueError(
            f"damping: G (x) A + damping I is singular to working precision (eigenvalue of "
            f"size {float(smallest):.3g}, resolved above {float(resolution):.3g}); expected a "
            f"larger damping, got {damping:.3g}"
        )
    return P, Q, denominator


def _eigenbasis(argument: str, factor: Tensor) -> tuple[Tensor, Tensor]:
    wide = factor.double()
    largest = wide.abs().amax()
    if not torch.isfinite(largest):
        nan = torch.full_like(wide, float("nan"))
        return nan[0], nan
    asymmetry = (wide - wide.mT).abs().amax()
    # Rounding of separately computed halves is far below this; a wrong matrix is far above.
    if asymmetry > torch.finfo(factor.dtype).eps ** 0.5 * largest:
        raise _check.fail(
            argument,
            factor,
            f"a symmetric matrix (entries differ from the transpose by {float(asymmetry):.3g})",
        )
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    return values, vectors


def fake(A: Tensor, G: Tensor, U: Tensor, damping: float) -> Tensor:
    """Shape and dtype of the result."""
    return U.new_empty(U.shape, dtype=accumulation(A, G, U))


def kron_solve(A: Tensor, G: Tensor, U: Tensor, damping: float) -> Tensor:
    """Solve (G (x) A + damping I) vec X = vec U for each direction.

    Args:
        A: (i, i), symmetric.
        G: (o, o), symmetric.
        U: (p, o, i).
        damping: finite, at least 0.

    Returns:
        X: (p, o, i); fp64 if any input is, else fp32, rounded once from fp64. NaN where a factor
        is not finite.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device; a factor
            that is not symmetric; a damping so small that the system is singular to working
            precision.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check(A, G, U)
    damping = _check.positive("damping", damping, allow_zero=True)
    return call("kron_solve", A, G, U, damping)
