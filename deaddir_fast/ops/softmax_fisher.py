"""Fisher quadratic form of a categorical output: the variance of a tangent under the softmax.

    out_pn = Var_{y ~ softmax(logits_n)} tangent_pny = dz^T (diag(p) - p p^T) dz

Index letters: n samples, c classes, p directions; logits is (n, c), tangent is (p, n, c).

The tangent is first taken relative to its value at the likeliest class, then to its mean, and
squares are summed: adding a constant over classes changes nothing, and a variance far below the
squared mean, or a class of probability nearly one, costs no digits. The textbook form
E[t^2] - E[t]^2 loses all of them.

Bound: about 6 p n c FLOP, p n c elements read: bound by memory.

Source: Dead Directions (arXiv 2606.05957), type-2 Fisher; the two passes are our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call


def reference(logits: Tensor, tangent: Tensor) -> Tensor:
    """Return the variance of each tangent in plain torch."""
    dtype = accumulation(logits, tangent)
    p, n, c = tangent.shape
    if n == 0:
        return tangent.new_empty((p, n), dtype=dtype)
    z = logits.to(dtype)
    probability = torch.softmax(z, 1)
    likeliest = z.argmax(1, keepdim=True)
    parts = []
    for some in blocks(p, 3 * n * c * dtype.itemsize):
        x = centred(tangent[some].to(dtype), probability, likeliest)
        parts.append((probability * x.square()).sum(-1))
    return torch.cat(parts)


def centred(value: Tensor, probability: Tensor, likeliest: Tensor) -> Tensor:
    """Subtract the mean over classes without losing digits to its size; (p, n, c)."""
    x = value - value.gather(-1, likeliest.expand(value.shape[0], -1, -1))
    for _ in range(2):  # the second pass removes the rounding of the first
        x = x - (probability * x).sum(-1, keepdim=True)
    return x


def fake(logits: Tensor, tangent: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return tangent.new_empty(tangent.shape[:2], dtype=accumulation(logits, tangent))


def softmax_fisher(logits: Tensor, tangent: Tensor) -> Tensor:
    """Return the variance of each tangent under softmax(logits).

    Args:
        logits: (n, c), c >= 1; -inf is a class of probability 0.
        tangent: (p, n, c), derivatives of the logits along p directions.

    Returns:
        (p, n), never negative; fp64 if any input is, else fp32 (16-bit inputs are summed in fp32).

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check("tangent", logits, tangent)
    return call("softmax_fisher", logits, tangent)


def check(argument: str, logits: Tensor, stacked: Tensor) -> None:
    """Check logits (n, c) and a stack (p, n, c) over them."""
    _check.tensor("logits", logits, ndim=2)
    _check.tensor(argument, stacked, ndim=3)
    if logits.shape[1] == 0:
        raise _check.fail("logits", logits, "at least one class")
    _check.size(argument, stacked, 1, logits.shape[0], "the samples of logits")
    _check.size(argument, stacked, 2, logits.shape[1], "the classes of logits")
    _check.same_device(**{"logits": logits, argument: stacked})
    _check.no_gradient(**{"logits": logits, argument: stacked})
