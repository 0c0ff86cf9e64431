"""Fisher quadratic form of one linear layer along rank-one directions U = v w^T.

    out_p = mean_n ( sum_t (g_nt . v_p) (a_nt . w_p) )^2

Index letters: n samples, t tokens, i inputs, o outputs, p directions; a is (n, t, i), g is
(n, t, o), v is (p, o), w is (p, i).

Bound: 2 n t p (i + o) FLOP, n t (i + o) elements read: bound by memory for p below some tens.

Source: Dead Directions (arXiv 2606.05957), per-layer directions g_min a_min^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.directional_curvature import check_samples, with_tokens


def reference(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return the mean squared score along each direction in plain torch."""
    dtype = accumulation(a, g, v, w)
    a, g, v, w = with_tokens(a), with_tokens(g), v.to(dtype), w.to(dtype)
    n, t, i = a.shape
    each = t * (i + g.shape[2] + 3 * v.shape[0]) * dtype.itemsize
    parts = []
    for some in blocks(n, each):
        parts.append(((g[some].to(dtype) @ v.mT) * (a[some].to(dtype) @ w.mT)).sum(1))
    return torch.cat(parts).square().mean(0)


def fake(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return v.new_empty((v.shape[0],), dtype=accumulation(a, g, v, w))


def directional_curvature_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return mean_n (sum_t (g.v)(a.w))^2 for each direction v w^T.

    Args:
        a: (n, i) or (n, t, i), inputs of the layer.
        g: (n, o) or (n, t, o), scores with respect to its outputs.
        v: (p, o), output side.
        w: (p, i), input side.

    Returns:
        (p,); fp64 if any input is, else fp32 (16-bit inputs are summed in fp32). NaN for n = 0.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check_samples(a, g)
    _check.tensor("v", v, ndim=2)
    _check.tensor("w", w, ndim=2)
    _check.size("w", w, 0, v.shape[0], "one row for each row of v")
    _check.size("v", v, 1, g.shape[-1], "the outputs of g")
    _check.size("w", w, 1, a.shape[-1], "the inputs of a")
    _check.same_device(a=a, g=g, v=v, w=w)
    _check.no_gradient(a=a, g=g, v=v, w=w)
    return call("directional_curvature_rank1", a, g, v, w)
