"""nn.MultiheadAttention: three projections and a fourth, of which torch calls none as a module.

While it is tapped its forward is ours: the same operations with the projections apart. Where query,
key and value are one tensor they share the inputs a.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.nets.layers.base import Adapter, ForwardAdapter, Tap, stack_bias
from deaddir_fast.nets.layers.linear import Linear, names_of
from deaddir_fast.nets.layers.registry import Unsupported, register


class Projection(Linear):
    """Rows ``at`` of a weight (and of a bias) that several projections share."""

    at = slice(None)
    key = "weight"
    bias_key = "bias"

    def _own(self) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self.module, self.bias_key)
        weight = getattr(self.module, self.key)[self._rows]
        return weight, None if bias is None else bias[self.at]

    @property
    def _rows(self) -> slice:
        return self.at if self.key == "in_proj_weight" else slice(None)

    def recompute(self, x: Tensor) -> Tensor:
        """W a + b."""
        return F.linear(x, *self._own())

    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, width): the rows of this projection."""
        weight, bias = u.get(self.weight), None if self.bias is None else u.get(self.bias)
        if weight is not None:
            weight = weight[:, self._rows]
        if self.bias is None:
            return weight
        bias = None if bias is None else bias[:, self.at]
        return stack_bias(weight, bias, (self.outputs, self.inputs))


class AttentionAdapter(ForwardAdapter):
    """The maps q, k, v and out_proj of an nn.MultiheadAttention."""

    module: nn.MultiheadAttention

    def run(
        self,
        tap: Tap,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What torch's forward computes, with its arguments."""
        module = self.module
        *projections, last = self.layers
        batched = query.ndim == 3
        second = batched and not module.batch_first

        def batch_first(z: Tensor) -> Tensor:
            return z.transpose(0, 1) if second else z if batched else z.unsqueeze(0)

        given = zip(projections, (query, key, value), strict=True)
        q, k, v = (batch_first(tap(layer, x, layer.recompute(x))) for layer, x in given)
        n, t, width = q.shape
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask: needed with is_causal, which is a hint about it")
        # As a hint it takes the place of the mask where nothing else has to be masked.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _mask(attn_mask, key_padding_mask, n, module.num_heads, q.dtype)
        if module.bias_k is not None and module.bias_v is not None:
            k = torch.cat([k, module.bias_k.expand(n, 1, width)], 1)
            v = torch.cat([v, module.bias_v.expand(n, 1, width)], 1)
        if module.add_zero_attn:
            k, v = (F.pad(z, (0, 0, 0, 1)) for z in (k, v))
        if mask is not None:
            # What is added to the keys is seen by all queries.
            mask = F.pad(mask, (0, k.shape[1] - key.shape[-3 if second else -2]))
        q, k, v = (z.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        drop = module.dropout if module.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * module.head_dim**-0.5) @ k.mT
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, drop) if drop else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, drop, causal)
        mixed = mixed.transpose(1, 2).reshape(n, t, width)
        mixed = mixed.transpose(0, 1) if second else mixed if batched else mixed.squeeze(0)
        return tap(last, mixed, last.recompute(mixed)), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to the scores; True stands for what is not seen."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _mask(
    attention: Tensor | None, padding: Tensor | None, n: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """(n or 1, heads or 1, t or 1, s) from (t, s) or (n heads, t, s), and (n, s)."""
    total: Tensor | None = None
    if attention is not None:
        total = _added(attention, dtype)
        total = total.unflatten(0, (n, heads)) if total.ndim == 3 else total[None, None]
    if padding is not None:
        padding = _added(padding, dtype).reshape(n, 1, 1, -1)
        total = padding if total is None else total + padding
    return total


@register(nn.MultiheadAttention)
def attention(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of an nn.MultiheadAttention."""
    assert isinstance(module, nn.MultiheadAttention)
    if type(module).forward is not nn.MultiheadAttention.forward or "forward" in vars(module):
        raise Unsupported("its forward is not that of nn.MultiheadAttention")
    if type(module.out_proj).forward is not nn.Linear.forward:
        raise Unsupported("its out_proj is not a plain linear map")
    width = module.embed_dim
    packed = module.in_proj_weight is not None
    keys = ("in_proj_weight",) * 3 if packed else tuple(f"{p}_proj_weight" for p in "qkv")
    bias = own.get("in_proj_bias")
    if bias is None and module.in_proj_bias is not None:
        raise Unsupported("its in_proj_bias is not a parameter but computed from others")
    layers: list[Any] = []
    sizes = (width, module.kdim, module.vdim)
    for j, (letter, key, inputs) in enumerate(zip("qkv", keys, sizes, strict=True)):
        weight, _ = names_of(own, weight=key)
        layer = Projection(f"{name}.{letter}", module, weight, bias, inputs, width)
        layer.at = slice(j * width, (j + 1) * width)
        layer.key, layer.bias_key = key, "in_proj_bias"
        layers.append(layer)
    weight, _ = names_of(own, weight="out_proj.weight")
    last = own.get("out_proj.bias")
    layers.append(Linear(f"{name}.out_proj", module.out_proj, weight, last, width, width))
    return AttentionAdapter(module, tuple(layers))
