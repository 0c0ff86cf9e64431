"""Scores of a layer along directions in its weight, from what goes in and what comes back.

Index letters as everywhere: p directions, n samples; a score is Σ_t g_ntᵀ U_p a_nt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.nets.layers.embedding import Embedding
from deaddir_fast.ops.directional_scores import directional_scores
from deaddir_fast.ops.directional_scores_rank1 import directional_scores_rank1


@dataclass(frozen=True)
class Slices:
    """Directions in one layer: dense, or v wᵀ.

    Attributes:
        u: (p, o, i), (p, groups, o, i) with groups; None where ``v`` and ``w`` are given.
        v, w: (p, o) and (p, i).
        bias: (p, o) of the bias, or None.
    """

    u: Tensor | None
    v: Tensor | None = None
    w: Tensor | None = None
    bias: Tensor | None = None

    @property
    def low(self) -> bool:
        """Whether they are of rank one."""
        return self.u is None

    def outputs(self, start: int, stop: int) -> Slices:
        """The part in some outputs."""
        return Slices(
            None if self.u is None else self.u[:, start:stop].contiguous(),
            None if self.v is None else self.v[:, start:stop].contiguous(),
            self.w,
            None if self.bias is None else self.bias[:, start:stop],
        )

    def inputs(self, start: int, stop: int) -> Slices:
        """The part in some inputs, without the bias."""
        return Slices(
            None if self.u is None else self.u[:, :, start:stop].contiguous(),
            self.v,
            None if self.w is None else self.w[:, start:stop].contiguous(),
        )


def from_matrix(layer: Layer, u: Tensor) -> Slices:
    """From ``layer.directions``: (p, o, width), with the trailing column of the bias."""
    if layer.kind == "norm" or layer.bias is None:
        return Slices(u)
    return Slices(u[..., :-1], bias=u[..., -1])


def scores(layer: Layer, x: Tensor, grad: Tensor, n: int, u: Slices) -> Tensor:
    """(p, n) scores of each sample.

    Args:
        layer: of a survey, with known layout.
        x: what its module received.
        grad: gradient of what it returned.
        n: number of samples.
        u: directions, in the dtype of x and grad.

    Raises:
        ValueError: which rows belong to which sample is not known.
    """
    g = layer.gradients(grad, n, x)
    if layer.kind == "norm":
        assert u.u is not None
        return u.u[:, :, 0].to(g.dtype) @ g[:, 0].mT
    if isinstance(layer, Embedding):
        return _embedding(layer, x, g, n, u)
    if layer.routed or layer.layout == "unknown":
        return _routed(layer, x, g, n, u)
    parts = [out for out in _pieces(layer, x, g, n, u)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if u.bias is not None:
        total = total + of_bias(u.bias, g)
    return total


def of_bias(bias: Tensor, g: Tensor) -> Tensor:
    """(p, n) what the bias adds to the scores."""
    summed = g.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
    return bias.flatten(1).to(summed.dtype) @ summed.flatten(1).mT


def _pieces(layer: Layer, x: Tensor, g: Tensor, n: int, u: Slices) -> list[Tensor]:
    found = []
    for a, cut in layer.pieces(x, n):
        some = g if cut is None else g[cut.samples, cut.positions]
        part = contract(a, some, u)
        if cut is not None and part.shape[1] != n:
            whole = part.new_zeros(part.shape[0], n)
            whole[:, cut.samples] = part
            part = whole
        found.append(part)
    return found


def contract(a: Tensor, g: Tensor, u: Slices) -> Tensor:
    """(p, n) scores from rows (n, t, ...), without the bias."""
    if a.ndim == 4:
        # Groups: the gradient of each, then its product with the directions.
        assert u.u is not None
        gradient = torch.einsum("ntgo,ntgi->ngoi", g, a)
        return u.u.flatten(1).to(gradient.dtype) @ gradient.flatten(1).mT
    if u.low:
        assert u.v is not None and u.w is not None
        return directional_scores_rank1(a, g, u.v, u.w)
    assert u.u is not None
    return directional_scores(a, g, u.u)


def _embedding(layer: Embedding, x: Tensor, g: Tensor, n: int, u: Slices) -> Tensor:
    index = layer.rows(x, n)[..., 0]
    assert u.u is not None
    return torch.stack([(one.mT[index].to(g.dtype) * g).sum((1, 2)) for one in u.u])


def _routed(layer: Layer, x: Tensor, g: Tensor, n: int, u: Slices) -> Tensor:
    if n == 1:
        owner = torch.zeros(g.shape[:2].numel(), dtype=torch.long, device=g.device)
    else:
        found = layer.samples_of(n) if layer.routed else None
        if found is None:
            raise ValueError(
                f"model: which rows of {layer.name} belong to which sample is not known; leave it "
                "out of the directions, or give one sample at a time"
            )
        owner = found
    a, g = layer.rows(x, n).flatten(0, 1), g.flatten(0, 1)
    each = contract(a, g, u) if len(a) else g.new_zeros(_count(u), 0)
    if u.bias is not None:
        each = each + u.bias.to(each.dtype) @ g.to(each.dtype).mT
    return each.new_zeros(each.shape[0], n).index_add_(1, owner, each)


def _count(u: Slices) -> int:
    some = u.u if u.u is not None else u.v
    assert some is not None
    return len(some)
