"""ATen operations that only move data, and those that change no entry but perhaps its sign."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

MOVES: set[Any] = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.unfold.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
SAME: set[Any] = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.neg.default,
}


def operands(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments of a node: nodes, numbers, lists of these."""
    return node.args
