"""Fisher quadratic form of one linear layer along full-rank directions, from its samples.

    out_p = mean_n ( sum_t g_nt^T U_p a_nt )^2

Index letters: n samples, t tokens, i inputs, o outputs, p directions; a is (n, t, i) inputs,
g is (n, t, o) gradients of log p(y | x) with respect to the outputs, U is (p, o, i).

This is u^T F u exactly, for whatever Fisher the g stand for, where `kron_quadratic` assumes that
a and g are independent. It is a sum of squares: no cancellation between samples.

Bound: 2 n t p o i FLOP factor by factor, or 2 n o i (t + p) with the gradient sum_t g a^T of each
sample formed first, which wins where both t and p exceed one; inputs read once.

Source: Dead Directions (arXiv 2606.05957), uFu along a direction; the contraction is our choice.
"""

from __future__ import annotations

from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.directional_scores import by_sample, check


def reference(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Return the mean squared score along each direction in plain torch."""
    return by_sample(a, g, U).square().mean(0)


def fake(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return U.new_empty((U.shape[0],), dtype=accumulation(a, g, U))


def directional_curvature(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    """Return mean_n (sum_t g^T U a)^2 for each direction.

    Args:
        a: (n, i) or (n, t, i), inputs of the layer.
        g: (n, o) or (n, t, o), scores with respect to its outputs.
        U: (p, o, i), directions in the weight.

    Returns:
        (p,); fp64 if any input is, else fp32 (16-bit inputs are summed in fp32). NaN for n = 0.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check(a, g, U)
    return call("directional_curvature", a, g, U)
