"""Experts held as 3-D parameters (Mixtral, Qwen-MoE, OLMoE ...): two maps for each expert.

An expert sees only the rows that are routed to it. Its A is the mean over those, its G the sum over
them divided by the number of samples, so that A ⊗ G is K-FAC's expand form for a weight that a
sample uses a varying number of times. ``owners`` says which token each row came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.nets.layers.base import Adapter, ForwardAdapter, Tap
from deaddir_fast.nets.layers.linear import Linear, names_of
from deaddir_fast.nets.layers.registry import Unsupported, register_look


class Expert(Linear):
    """One expert's slice of a weight (experts, o, i)."""

    kind = "expert"
    routed = True
    key = "down_proj"
    index = 0

    def recompute(self, x: Tensor) -> Tensor:
        """W a."""
        return F.linear(x, getattr(self.module, self.key)[self.index])

    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, i): the slice of this expert."""
        weight = u.get(self.weight)
        return None if weight is None else weight[:, self.index]


class ExpertsAdapter(ForwardAdapter):
    """All experts of a module, in the order up, down of the first, of the second ..."""

    layers: tuple[Expert, ...]

    def run(
        self, tap: Tap, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """(tokens, d) from (tokens, d), and (tokens, k) experts and their weights."""
        module: Any = self.module
        count, k = len(self.layers) // 2, top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        # By expert, and by token within each; an index past the last expert stands for none.
        order = torch.argsort(chosen, stable=True)
        sizes = torch.bincount(chosen, minlength=count)[:count].tolist()
        total = torch.zeros_like(hidden_states)
        start = 0
        for e, size in enumerate(sizes):
            places = order[start : start + size]
            start += size
            if not size:
                continue
            owners = places // k
            up, down = self.layers[2 * e : 2 * e + 2]
            for layer in (up, down):
                layer.owners, layer.source = owners, hidden_states
                layer.sources = len(hidden_states)
            x = hidden_states[owners]
            z = tap(up, x, up.recompute(x))
            if up.key == "up_proj":
                h = module.act_fn(z)
            elif hasattr(module, "_apply_gate"):
                h = module._apply_gate(z)
            else:
                gate, value = z.chunk(2, dim=-1)
                h = module.act_fn(gate) * value
            z = tap(down, h, down.recompute(h))
            z = z * top_k_weights.reshape(-1)[places].unsqueeze(-1)
            total = total.index_add(0, owners, z.to(total.dtype))
            for layer in (up, down):
                layer.source = None  # not kept alive
        return total


def _is_experts(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


@register_look(_is_experts)
def experts(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of a module with parameters gate_up_proj (or up_proj) and down_proj."""
    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
    up, down = getattr(module, first, None), module.down_proj
    assert isinstance(down, Tensor)
    if not isinstance(up, Tensor) or up.ndim != 3:
        raise Unsupported("experts without a weight gate_up_proj or up_proj (experts, o, i)")
    if any("bias" in key for key in own) or getattr(module, "has_bias", False):
        raise Unsupported("experts with biases")
    if getattr(module, "has_post_expert_norm", False):
        raise Unsupported("experts with a norm of their own")
    count, d, m = down.shape
    if tuple(up.shape) != (count, m * (2 if first == "gate_up_proj" else 1), d):
        raise Unsupported(
            f"experts whose weights are transposed: {tuple(up.shape)} and {tuple(down.shape)}"
        )
    weights = [names_of(own, weight=key)[0] for key in (first, "down_proj")]
    layers: list[Expert] = []
    for e in range(count):
        for key, weight, (o, i) in zip(
            (first, "down_proj"), weights, (up.shape[1:], down.shape[1:]), strict=True
        ):
            layer = Expert(f"{name}.{e}.{key.removesuffix('_proj')}", module, weight, None, i, o)
            layer.key, layer.index = key, e
            layers.append(layer)
    return ExpertsAdapter(module, tuple(layers))
