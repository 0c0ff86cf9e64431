"""Fisher quadratic form of a linear read-out followed by a softmax, in tiles of classes.

    z = W h + bias,   dz_p = W dh_p + dW_p h,   out_pn = Var_{y ~ softmax(z_n)} dz_pny

Index letters: n samples, d features, c classes, p directions; h is (n, d), dh is (p, n, d), W is
(c, d), dW is (p, c, d).

Language models have c above 1e5: the n c logits are never stored. Tiles of classes are merged by
the running maximum and the pairwise update of mean and spread (Chan, Golub & LeVeque 1983), whose
terms are all positive; the mean is kept relative to the tangent at the likeliest class so far, as
in `softmax_fisher`.

Bound: 2 n c d (1 + p) FLOP, and 2 n c d p more with dW; W read once for each block of samples.

Source: Dead Directions (arXiv 2606.05957), type-2 Fisher; online softmax of Milakov & Gimelshein
2018; the merge is our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call

#: Classes in one tile.
TILE = 1024


def reference(h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None) -> Tensor:
    """Return the variances in plain torch."""
    dtype = accumulation(h, dh, W, bias, dW)
    p, n, _ = dh.shape
    tile = min(TILE, W.shape[0])
    parts = [
        _rows(h[some].to(dtype), dh[:, some].to(dtype), W, bias, dW, tile)
        for some in blocks(n, 3 * (p + 1) * tile * dtype.itemsize)
    ]
    return torch.cat(parts, 1)


def _rows(
    h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None, tile: int
) -> Tensor:
    top = h.new_full((h.shape[0],), -torch.inf)  # largest logit so far
    mass = h.new_zeros((h.shape[0],))  # sum of e^(z - top)
    anchor = h.new_zeros(dh.shape[:2])  # tangent at the class of the largest logit
    offset = anchor  # mean of the tangent, minus the anchor
    spread = anchor  # sum of e^(z - top) (tangent - mean)^2
    for start in range(0, W.shape[0], tile):
        z, tangent = _tile(h, dh, W, bias, dW, slice(start, start + tile))
        new_top, best = z.max(1)
        weight = torch.exp(z - _finite(new_top)[:, None])
        new_mass = weight.sum(1)
        share = weight / _nonzero(new_mass)[:, None]
        new_anchor = tangent.gather(2, best[None, :, None].expand(dh.shape[0], -1, 1))
        x = tangent - new_anchor
        new_offset = (share * x).sum(2)
        new_spread = (weight * (x - new_offset[..., None]).square()).sum(2)

        joint = torch.maximum(top, new_top)
        old_scale = torch.exp(top - _finite(joint))
        new_scale = torch.exp(new_top - _finite(joint))
        old_mass, new_mass = mass * old_scale, new_mass * new_scale
        mass = old_mass + new_mass
        old_part, new_part = old_mass / _nonzero(mass), new_mass / _nonzero(mass)
        step = (new_anchor[..., 0] - anchor) + (new_offset - offset)
        spread = spread * old_scale + new_spread * new_scale + step.square() * old_mass * new_part
        keep = top >= new_top
        offset = torch.where(keep, offset + step * new_part, new_offset - step * old_part)
        anchor = torch.where(keep, anchor, new_anchor[..., 0])
        top = joint
    return spread / mass


def _tile(
    h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None, classes: slice
) -> tuple[Tensor, Tensor]:
    columns = W[classes].to(h.dtype).mT
    z = h @ columns
    if bias is not None:
        z = z + bias[classes].to(h.dtype)
    tangent = dh @ columns
    if dW is not None:
        tangent = tangent + h @ dW[:, classes].to(h.dtype).mT
    return z, tangent


def _finite(top: Tensor) -> Tensor:
    """Replace the maximum of an all -inf tile, so that its weights are 0 and not NaN."""
    return torch.where(top == -torch.inf, torch.zeros_like(top), top)


def _nonzero(mass: Tensor) -> Tensor:
    return torch.where(mass == 0, torch.ones_like(mass), mass)


def fake(h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None) -> Tensor:
    """Shape and dtype of the result."""
    return dh.new_empty(dh.shape[:2], dtype=accumulation(h, dh, W, bias, dW))


def linear_softmax_fisher(
    h: Tensor,
    dh: Tensor,
    W: Tensor,
    *,
    bias: Tensor | None = None,
    dW: Tensor | None = None,
) -> Tensor:
    """Return the variance of W dh + dW h under softmax(W h + bias).

    Args:
        h: (n, d), features.
        dh: (p, n, d), their derivatives along p directions.
        W: (c, d), read-out weight, c >= 1.
        bias: (c,); it has no tangent of its own. -inf is a class of probability 0.
        dW: (p, c, d), derivative of W along the directions; None means 0.

    Returns:
        (p, n), never negative; fp64 if any input is, else fp32 (16-bit inputs are summed in fp32).

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    _check.tensor("h", h, ndim=2)
    _check.tensor("dh", dh, ndim=3)
    _check.tensor("W", W, ndim=2)
    n, d = h.shape
    _check.size("dh", dh, 1, n, "the samples of h")
    _check.size("dh", dh, 2, d, "the features of h")
    _check.size("W", W, 1, d, "the features of h")
    if W.shape[0] == 0:
        raise _check.fail("W", W, "at least one class")
    if bias is not None:
        _check.tensor("bias", bias, ndim=1)
        _check.size("bias", bias, 0, W.shape[0], "the classes of W")
    if dW is not None:
        _check.tensor("dW", dW, ndim=3)
        _check.size("dW", dW, 0, dh.shape[0], "the directions of dh")
        _check.size("dW", dW, 1, W.shape[0], "the classes of W")
        _check.size("dW", dW, 2, d, "the features of h")
    _check.same_device(h=h, dh=dh, W=W, bias=bias, dW=dW)
    _check.no_gradient(h=h, dh=dh, W=W, bias=bias, dW=dW)
    return call("linear_softmax_fisher", h, dh, W, bias, dW)
