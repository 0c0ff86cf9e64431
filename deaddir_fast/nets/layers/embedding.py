"""Embeddings: a is one-hot, so E[a aᵀ] is the diagonal of token frequencies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.nets.layers.base import Adapter, HookAdapter, Layer
from deaddir_fast.nets.layers.linear import names_of
from deaddir_fast.nets.layers.registry import Unsupported, register


class Embedding(Layer):
    """z = Wᵀ e_token: W is stored as (i, o), i the size of the vocabulary."""

    kind = "embedding"
    form = "diagonal"

    def rows(self, x: Tensor, n: int) -> Tensor:
        """(n, t, 1) indices."""
        return self.samples_first(x.unsqueeze(-1), n)

    def gradients(self, grad: Tensor, n: int, x: Tensor | None = None) -> Tensor:
        """(n, t, o); zero where the index is the padding index, whose row never moves."""
        g = self.per_sample(grad, n)
        if self.padding is not None and x is not None:
            g = g.masked_fill(self.rows(x, n) == self.padding, 0)
        return g if self.scale == 1.0 else g * self.scale

    def tokens(self, shape: tuple[int, ...], n: int) -> int:
        """Indices per sample."""
        return super().tokens((*shape, 1), n)

    @property
    def padding(self) -> int | None:
        """Index whose row gets no gradient."""
        found = getattr(self.module, "padding_idx", None)
        return found if found is None else int(found)

    @property
    def scale(self) -> float:
        """What the rows are multiplied by (Gemma, BART)."""
        return float(getattr(self.module, "embed_scale", None) or 1.0)

    def recompute(self, x: Tensor) -> Tensor:
        """The rows of W."""
        assert isinstance(self.module.weight, Tensor)
        z = F.embedding(x, self.module.weight)
        return z if self.scale == 1.0 else z * self.scale

    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, i)."""
        weight = u.get(self.weight)
        return None if weight is None else weight.mT

    def counts(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """(i,) how often each index occurs among the kept ones."""
        index = x if keep is None else x[keep]
        counts = torch.bincount(index.reshape(-1), minlength=self.inputs)
        if self.padding is not None:
            counts[self.padding] = 0
        return counts


@register(nn.Embedding)
def embedding(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of an nn.Embedding."""
    assert isinstance(module, nn.Embedding)
    weight, _ = names_of(own)
    if module.max_norm is not None:
        raise Unsupported("max_norm changes its weight in the forward pass")
    return HookAdapter(
        Embedding(name, module, weight, None, module.num_embeddings, module.embedding_dim)
    )
