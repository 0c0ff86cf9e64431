"""Encoders without a head as modules that return one tensor, so that a likelihood can be put on it.

Both modules call the encoder ``transformer``: its parameters keep their names behind that prefix,
``transformer.encoder.layer.0.attention.self.query.weight`` and so on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")


class HiddenStates(nn.Module):
    """Last hidden states (n, t, d); zero at padding, which then carries no curvature."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments are the encoder's; ``attention_mask`` is (n, t) of 0 and 1."""
        hidden = self.transformer(*args, **kwargs).last_hidden_state
        mask = kwargs.get("attention_mask")
        return hidden if mask is None else hidden * mask.unsqueeze(-1).to(hidden.dtype)


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """One vector for each sample, as sentence-transformers pools.

    Args:
        hidden: (n, t, d).
        mask: (n, t), 1 at tokens and 0 at padding, which is on the right.
        how: one of ``POOLINGS``.

    Returns:
        (n, d).
    """
    if how == "cls":
        return hidden[:, 0]
    real = mask.unsqueeze(-1)
    if how == "max":
        return hidden.masked_fill(real == 0, -torch.inf).amax(1)
    if how == "lasttoken":
        real = real * (1 - F.pad(mask[:, 1:], (0, 1)).unsqueeze(-1))
    weight = real.to(hidden.dtype)
    if how == "weightedmean":
        steps = torch.arange(1, mask.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
        weight = weight * steps.unsqueeze(-1)
    total = (hidden * weight).sum(1)
    size = weight.sum(1)
    return total / (size.sqrt() if how == "mean_sqrt_len" else size)


class SentenceEmbedding(nn.Module):
    """Pooled hidden states, several poolings side by side, scaled to norm 1 if asked.

    Args:
        transformer: the encoder.
        poolings: which of ``POOLINGS``, in that order.
        normalize: whether to divide by the 2-norm.
    """

    def __init__(self, transformer: nn.Module, poolings: tuple[str, ...], normalize: bool) -> None:
        super().__init__()
        self.transformer = transformer
        self.poolings = poolings
        self.normalize = normalize

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """(n, t) ids, (n, t) mask -> (n, d·poolings)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        out = self.transformer(input_ids=input_ids, attention_mask=mask, **kwargs)
        pooled = [pool(out.last_hidden_state, mask, how) for how in self.poolings]
        embedding = torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0]
        return F.normalize(embedding, dim=1) if self.normalize else embedding

    def extra_repr(self) -> str:
        """What is done with the hidden states."""
        return f"poolings={self.poolings}, normalize={self.normalize}"
