"""Score of each sample of one linear layer along rank-one directions U = v w^T.

    out_pn = sum_t (g_nt . v_p) (a_nt . w_p)

Index letters: n samples, t tokens, i inputs, o outputs, p directions; a is (n, t, i), g is
(n, t, o), v is (p, o), w is (p, i).

`directional_curvature_rank1` is the mean square over samples, without the scores.

Bound: 2 n t p (i + o) FLOP, n t (i + o) elements read: bound by memory for p below some tens.

Source: Dead Directions (arXiv 2606.05957), per-layer directions g_min a_min^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.directional_scores import check_samples, with_tokens


def reference(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return the score of each sample along each direction in plain torch."""
    return by_sample(a, g, v, w).mT.contiguous()


def by_sample(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return the scores (n, p)."""
    dtype = accumulation(a, g, v, w)
    a, g, v, w = with_tokens(a), with_tokens(g), v.to(dtype), w.to(dtype)
    n, t, i = a.shape
    each = t * (i + g.shape[2] + 3 * v.shape[0]) * dtype.itemsize
    parts = []
    for some in blocks(n, each):
        parts.append(((g[some].to(dtype) @ v.mT) * (a[some].to(dtype) @ w.mT)).sum(1))
    return torch.cat(parts)


def fake(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return v.new_empty((v.shape[0], a.shape[0]), dtype=accumulation(a, g, v, w))


def directional_scores_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return sum_t (g.v)(a.w) for each direction v w^T and sample.

    Args:
        a: (n, i) or (n, t, i), inputs of the layer.
        g: (n, o) or (n, t, o), scores with respect to its outputs.
        v: (p, o), output side.
        w: (p, i), input side.

    Returns:
        (p, n); fp64 if any input is, else fp32 (16-bit inputs are summed in fp32).

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check(a, g, v, w)
    return call("directional_scores_rank1", a, g, v, w)


def check(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> None:
    """Check samples of a layer and rank-one directions in its weight."""
    check_samples(a, g)
    _check.tensor("v", v, ndim=2)
    _check.tensor("w", w, ndim=2)
    _check.size("w", w, 0, v.shape[0], "one row for each row of v")
    _check.size("v", v, 1, g.shape[-1], "the outputs of g")
    _check.size("w", w, 1, a.shape[-1], "the inputs of a")
    _check.same_device(a=a, g=g, v=v, w=w)
    _check.no_gradient(a=a, g=g, v=v, w=w)
