"""A Kronecker-factored matrix times vectors: (G (x) A) vec U = vec(G U A).

Index letters: p directions, o outputs, i inputs; A is (i, i), G is (o, o), U is (p, o, i).

Bound: 2 p o i (o + i) FLOP; p o i elements read and written, the factors once.

Source: K-FAC (Martens & Grosse 2015), row-major vec. A is symmetric there, so U A = U A^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call


def reference(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    """Return G U A in plain torch."""
    dtype = accumulation(A, G, U)
    p, o, i = U.shape
    A, G = A.to(dtype), G.to(dtype)
    parts = [G @ (U[some].to(dtype) @ A) for some in blocks(p, 3 * o * i * dtype.itemsize)]
    return torch.cat(parts).contiguous()


def fake(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return U.new_empty(U.shape, dtype=accumulation(A, G, U))


def kron_matvec(A: Tensor, G: Tensor, U: Tensor) -> Tensor:
    """Return G U A for each direction.

    Args:
        A: (i, i).
        G: (o, o).
        U: (p, o, i).

    Returns:
        (p, o, i); fp64 if any input is, else fp32 (16-bit inputs are summed in fp32).

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check(A, G, U)
    return call("kron_matvec", A, G, U)


def check(A: Tensor, G: Tensor, U: Tensor) -> None:
    """Check factors and full-rank directions."""
    _check.tensor("U", U, ndim=3)
    check_factor("A", A, U.shape[2], "the last dimension of U")
    check_factor("G", G, U.shape[1], "the middle dimension of U")
    _check.same_device(A=A, G=G, U=U)
    _check.no_gradient(A=A, G=G, U=U)


def check_factor(argument: str, factor: Tensor, size: int, why: str) -> None:
    """Check one square factor against the directions it multiplies."""
    _check.tensor(argument, factor, ndim=2)
    for dim in (0, 1):
        _check.size(argument, factor, dim, size, why)
