"""Weighted Gram matrix: C = beta C + alpha x^T diag(weight) x.

Index letters: n samples (or samples times tokens), i inputs; x is (n, i), C is (i, i).

The Kronecker factors A = E[a a^T] and G = E[g g^T] of a layer are Gram matrices; alpha = 1/n and
beta < 1 give their running averages in one pass.

Bound: n i^2 FLOP for one triangle (2 n i^2 for a full product), n i + i^2 elements moved. With
n >> i the intensity is about i FLOP an element: bound by arithmetic for i above some hundreds.

Source: the rank-k update of BLAS (syrk) with a weight and both triangles stored; factors as in
Martens & Grosse 2015 (K-FAC).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call


def reference(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    """Return alpha x^T diag(weight) x in plain torch."""
    return mirror(product(x, x, weight)) * alpha


def reference_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    """Set out to beta out + alpha x^T diag(weight) x in plain torch."""
    result = reference(x, weight, alpha)
    if beta != 0:
        result = mirror(out) * beta + result
    out.copy_(result)


def product(left: Tensor, right: Tensor, weight: Tensor | None) -> Tensor:
    """Return left^T diag(weight) right for (n, j) and (n, i), widened block by block of rows."""
    dtype = accumulation(left, right, weight)
    total: Tensor | None = None
    width = left.shape[1] + right.shape[1]
    for rows in blocks(left.shape[0], width * dtype.itemsize):
        a, b = left[rows].to(dtype), right[rows].to(dtype)
        if weight is not None:
            a = a * weight[rows, None].to(dtype)
        total = a.mT @ b if total is None else torch.addmm(total, a.mT, b)
    assert total is not None
    return total


def mirror(square: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one: symmetric to the last bit."""
    return square.tril() + square.tril(-1).mT


def fake(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty((x.shape[1], x.shape[1]), dtype=accumulation(x, weight))


def fake_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    """Nothing is returned; ``out`` is written."""


def gram(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Weighted Gram matrix beta out + alpha x^T diag(weight) x.

    Args:
        x: (n, i); fp64, fp32, bf16 or fp16. n = 0 gives a zero product.
        weight: (n,) of either sign; None means all ones.
        out: (i, i), updated in place; fp64 if x or weight is, else fp32. Only its lower triangle
            is read, and nothing is read if beta is 0.
        alpha: factor of the product.
        beta: factor of ``out``; needs ``out``.

    Returns:
        (i, i), exactly symmetric: ``out`` if given, else a new fp64 or fp32 tensor. 16-bit inputs
        are summed in fp32. NaN and infinity propagate.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    alpha, beta = check(x, weight, out, alpha, beta)
    if out is None:
        return call("gram", x, weight, alpha)
    i = x.shape[1]
    if out.shape != (i, i):
        raise _check.fail("out", out, f"shape ({i}, {i})")
    call("gram_", out, x, weight, alpha, beta)
    return out


def _alias(one: Tensor, other: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a trace has no memory
        return False
    return torch._C._is_alias_of(one, other)  # type: ignore[attr-defined] # not in the stubs


def check(
    x: Tensor, weight: Tensor | None, out: Tensor | None, alpha: float, beta: float
) -> tuple[float, float]:
    """Check the arguments that the full and the packed form share."""
    _check.tensor("x", x, ndim=2)
    if weight is not None:
        _check.tensor("weight", weight, ndim=1)
        _check.size("weight", weight, 0, x.shape[0], "one weight for each row of x")
    alpha, beta = _check.real("alpha", alpha), _check.real("beta", beta)
    if out is not None:
        _check.tensor("out", out, dtypes=(accumulation(x, weight),))
        for name, source in (("x", x), ("weight", weight)):
            if source is not None and _alias(out, source):
                raise _check.fail("out", out, f"a tensor that shares no memory with {name}")
    elif beta != 0:
        raise _check.fail("beta", beta, "0 where no out is given")
    _check.same_device(x=x, weight=weight, out=out)
    _check.no_gradient(x=x, weight=weight, out=out)
    return alpha, beta
