"""Quadratic form of a Kronecker-factored block along U = v w^T: (w^T A w) (v^T G v).

Index letters: p directions, o outputs, i inputs; A is (i, i), G is (o, o), v is (p, o), w (p, i).

Bound: 2 p (i^2 + o^2) FLOP, i^2 + o^2 elements read.

Source: Dead Directions (arXiv 2606.05957), the K-FAC block along a rank-one direction.
"""

from __future__ import annotations

from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.kron_matvec import check_factor


def reference(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return (w^T A w)(v^T G v) in plain torch, each factor clamped at 0."""
    dtype = accumulation(A, G, v, w)
    return _form(A.to(dtype), w.to(dtype)) * _form(G.to(dtype), v.to(dtype))


def _form(square: Tensor, rows: Tensor) -> Tensor:
    return ((rows @ square) * rows).sum(1).clamp(min=0)


def fake(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return v.new_empty((v.shape[0],), dtype=accumulation(A, G, v, w))


def kron_quadratic_rank1(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return (w^T A w)(v^T G v) for each direction v w^T.

    Args:
        A: (i, i), positive semi-definite.
        G: (o, o), positive semi-definite.
        v: (p, o), output side.
        w: (p, i), input side.

    Returns:
        (p,), never negative; fp64 if any input is, else fp32 (16-bit inputs are summed in fp32).

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    _check.tensor("v", v, ndim=2)
    _check.tensor("w", w, ndim=2)
    _check.size("w", w, 0, v.shape[0], "one row for each row of v")
    check_factor("A", A, w.shape[1], "the last dimension of w")
    check_factor("G", G, v.shape[1], "the last dimension of v")
    _check.same_device(A=A, G=G, v=v, w=w)
    _check.no_gradient(A=A, G=G, v=v, w=w)
    return call("kron_quadratic_rank1", A, G, v, w)
