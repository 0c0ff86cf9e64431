"""Score of each sample of one linear layer along full-rank directions.

    out_pn = sum_t g_nt^T U_p a_nt

Index letters: n samples, t tokens, i inputs, o outputs, p directions; a is (n, t, i) inputs,
g is (n, t, o) gradients of log p(y | x) with respect to the outputs, U is (p, o, i).

The derivative of log p(y_n | x_n) along a direction that lies in this layer. Along one that spans
several layers it is the sum of their scores, and the Fisher quadratic form is the mean square of
that sum. `directional_curvature` is the mean square over samples of one layer, without the scores.

Bound: 2 n t p o i FLOP factor by factor, or 2 n o i (t + p) with the gradient sum_t g a^T of each
sample formed first, which wins where both t and p exceed one; inputs read once.

Source: Dead Directions (arXiv 2606.05957), uFu along a direction; the contraction is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call


def reference(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Return the score of each sample along each direction in plain torch."""
    return by_sample(a, g, U).mT.contiguous()


def by_sample(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Return the scores (n, p)."""
    dtype = accumulation(a, g, U)
    a, g = with_tokens(a), with_tokens(g)
    n, t, i = a.shape
    p, o, _ = U.shape
    directions = U.to(dtype)
    gradient_first = t * p > t + p
    parts = []
    for some in blocks(n, (o * i if gradient_first else 2 * t * p * o) * dtype.itemsize):
        x, y = a[some].to(dtype), g[some].to(dtype)
        m = x.shape[0]
        if gradient_first:
            gradient = (y.mT @ x).reshape(m, o * i)
            scores = gradient @ directions.reshape(p, o * i).mT
        else:
            mapped = x.reshape(m * t, i) @ directions.reshape(p * o, i).mT
            scores = (mapped.reshape(m, t, p, o) * y[:, :, None]).sum((1, 3))
        parts.append(scores)
    return torch.cat(parts)


def with_tokens(x: Tensor) -> Tensor:
    """Return (n, t, i), with one token where there is no token dimension."""
    return x[:, None] if x.ndim == 2 else x


def fake(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return U.new_empty((U.shape[0], a.shape[0]), dtype=accumulation(a, g, U))


def directional_scores(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Return sum_t g^T U a for each direction and sample.

    Args:
        a: (n, i) or (n, t, i), inputs of the layer.
        g: (n, o) or (n, t, o), scores with respect to its outputs.
        U: (p, o, i), directions in the weight.

    Returns:
        (p, n); fp64 if any input is, else fp32 (16-bit inputs are summed in fp32).

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check(a, g, U)
    return call("directional_scores", a, g, U)


def check(a: Tensor, g: Tensor, U: Tensor) -> None:
    """Check samples of a layer and full-rank directions in its weight."""
    _check.tensor("U", U, ndim=3)
    check_samples(a, g)
    _check.size("U", U, 1, g.shape[-1], "the outputs of g")
    _check.size("U", U, 2, a.shape[-1], "the inputs of a")
    _check.same_device(a=a, g=g, U=U)
    _check.no_gradient(a=a, g=g, U=U)


def check_samples(a: Tensor, g: Tensor) -> None:
    """Check that inputs and scores of a layer belong to the same samples and tokens."""
    _check.tensor("a", a, ndim=(2, 3))
    _check.tensor("g", g, ndim=(2, 3))
    if g.ndim != a.ndim:
        raise _check.fail("g", g, f"{a.ndim} dimensions, as a has")
    _check.size("g", g, 0, a.shape[0], "the samples of a")
    if a.ndim == 3:
        _check.size("g", g, 1, a.shape[1], "the tokens of a")
