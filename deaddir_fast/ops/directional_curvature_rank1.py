"""Fisher quadratic form of one linear layer along rank-one directions U = v w^T.

    out_p = mean_n ( sum_t (g_nt . v_p) (a_nt . w_p) )^2

Index letters: n samples, t tokens, i inputs, o outputs, p directions; a is (n, t, i), g is
(n, t, o), v is (p, o), w is (p, i).

Bound: 2 n t p (i + o) FLOP, n t (i + o) elements read: bound by memory for p below some tens.

Source: Dead Directions (arXiv 2606.05957), per-layer directions g_min a_min^T.
"""

from __future__ import annotations

from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.directional_scores_rank1 import by_sample, check


def reference(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Return the mean squared score along each direction in plain torch."""
    return by_sample(a, g, v, w).square().mean(0)


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
    check(a, g, v, w)
    return call("directional_curvature_rank1", a, g, v, w)
