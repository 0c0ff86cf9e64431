"""Weighted Gram matrix in packed storage: the lower triangle, row by row.

Index letters: n samples, i inputs; x is (n, i), the result has i (i + 1) / 2 entries, and entry
(r, c), c <= r, sits at r (r + 1) / 2 + c.

Half the memory of `gram` for factors that are only accumulated, stored or summed across devices.

Bound: n i^2 FLOP, n i + i^2 / 2 elements moved.

Source: packed storage of BLAS (spr, "U" column-major = "L" row-major).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.gram import check, product

#: Rows of the triangle multiplied at once: the full square is never stored.
ROWS = 256


def entries(i: int) -> int:
    """Return the number of entries of a packed (i, i) triangle."""
    return i * (i + 1) // 2


def reference(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    """Return the packed lower triangle of alpha x^T diag(weight) x in plain torch."""
    i = x.shape[1]
    pieces = []
    for start in range(0, max(1, i), ROWS):
        stop = min(i, start + ROWS)
        strip = product(x[:, start:stop], x[:, :stop], weight)
        row, column = torch.tril_indices(stop - start, stop, offset=start, device=x.device)
        pieces.append(strip[row, column])
    return torch.cat(pieces) * alpha


def reference_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    """Set out to beta out + the packed product in plain torch."""
    result = reference(x, weight, alpha)
    if beta != 0:
        result = out * beta + result
    out.copy_(result)


def fake(x: Tensor, weight: Tensor | None, alpha: float) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty((entries(x.shape[1]),), dtype=accumulation(x, weight))


def fake_(out: Tensor, x: Tensor, weight: Tensor | None, alpha: float, beta: float) -> None:
    """Nothing is returned; ``out`` is written."""


def gram_packed(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Packed lower triangle of beta out + alpha x^T diag(weight) x.

    Args:
        x: (n, i); fp64, fp32, bf16 or fp16. n = 0 gives a zero product.
        weight: (n,) of either sign; None means all ones.
        out: (i (i + 1) / 2,), updated in place; fp64 if x or weight is, else fp32. Not read if
            beta is 0.
        alpha: factor of the product.
        beta: factor of ``out``; needs ``out``.

    Returns:
        (i (i + 1) / 2,), row by row: ``out`` if given, else a new fp64 or fp32 tensor. 16-bit
        inputs are summed in fp32. NaN and infinity propagate.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    alpha, beta = check(x, weight, out, alpha, beta)
    if out is None:
        return call("gram_packed", x, weight, alpha)
    size = entries(x.shape[1])
    if out.shape != (size,):
        raise _check.fail("out", out, f"shape ({size},)")
    call("gram_packed_", out, x, weight, alpha, beta)
    return out
