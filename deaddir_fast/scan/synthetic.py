"""Inputs made up to look like given ones, to tell what holds on the data from what always holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets.survey import Survey

_KEPT = ("attention_mask", "token_type_ids", "position_ids", "cache_position")


def vocabulary(survey: Survey) -> int | None:
    """Size of the first embedding, which is that of the tokens."""
    sizes = [layer.inputs for layer in survey.layers.values() if layer.kind == "embedding"]
    return sizes[0] if sizes else None


def made_up_like(inputs: Any, survey: Survey, generator: torch.Generator) -> Any:
    """Inputs of the same shapes: random tokens, and normal numbers of the same mean and spread.

    Masks, positions and token types stay what they are. (Our choice.)
    """
    size = vocabulary(survey)

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype == torch.bool:
            return x
        if x.is_floating_point():
            wide = x.double()
            fresh = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
            spread = wide.std(correction=0) if x.numel() else wide.sum()
            return (wide.mean() + fresh * (spread if float(spread) > 0 else 1.0)).to(x.dtype)
        top = size if size is not None else int(x.max()) + 1
        drawn = torch.randint(0, max(top, 1), x.shape, generator=generator)
        return drawn.to(x.device, x.dtype)

    if isinstance(inputs, Mapping):
        return {k: v if k in _KEPT else pytree.tree_map(draw, v) for k, v in inputs.items()}
    return pytree.tree_map(draw, inputs)
