"""Scale and shift of normalisation layers: z = γ x̂ + β, whose Fisher block is held whole.

The score of a sample is s = (Σ_t x̂ ⊙ g, Σ_t g). As a layer it has a = 1 and g = s, so that A ⊗ G
with A = 1 and G = mean s sᵀ is the exact block, not an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from deaddir_fast.nets.layers.base import Adapter, HookAdapter, Layer
from deaddir_fast.nets.layers.linear import names_of
from deaddir_fast.nets.layers.registry import Unsupported, register, register_look

_BatchNorm = nn.modules.batchnorm._BatchNorm
_PLAIN = {
    nn.LayerNorm.forward, nn.RMSNorm.forward, nn.GroupNorm.forward, _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
}  # fmt: skip


class Norm(Layer):
    """A scale γ (and a shift β) on normalised features.

    ``outputs`` is the number of its parameters, γ before β; ``inputs`` is 1. ``channel`` says in
    which dimension of the module's tensors the features are (-1 or 1), ``extent`` how many
    trailing dimensions they take.
    """

    kind = "norm"
    form = "one"
    channel = -1
    extent = 1

    def normalised(self, x: Tensor) -> Tensor:
        """x̂: what γ multiplies."""
        module: Any = self.module
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, None, None, module.eps)
        if isinstance(module, _BatchNorm):
            mean, variance = module.running_mean, module.running_var
            return F.batch_norm(x, mean, variance, None, None, False, 0.0, module.eps)
        # z is affine in γ: its slope there is x̂, whether the module multiplies by γ or by 1 + γ.
        weight = module.weight
        names = {"weight": torch.ones_like(weight)}
        if self.bias is not None:
            names["bias"] = torch.zeros_like(weight)
        self.busy = True
        try:
            one = functional_call(module, names, (x,))
            names["weight"] = torch.zeros_like(weight)
            return one - functional_call(module, names, (x,))
        finally:
            self.busy = False

    def _features_last(self, x: Tensor) -> Tensor:
        x = x.movedim(self.channel, -1) if self.channel != -1 else x
        return x.flatten(x.ndim - self.extent) if self.extent > 1 else x

    def rows(self, x: Tensor, n: int) -> Tensor:
        """(n, 1, 1) ones."""
        return x.new_ones(n, 1, 1)

    def gradients(self, grad: Tensor, n: int, x: Tensor | None = None) -> Tensor:
        """(n, 1, o) scores, summed over tokens (fp32 for 16-bit gradients)."""
        if x is None:
            raise RuntimeError(f"{self.name}: its scores need its inputs")
        wide = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
        g = self.per_sample(self._features_last(grad), n).to(wide)
        x_hat = self.samples_first(self._features_last(self.normalised(x)), n).to(wide)
        score = torch.einsum("ntd,ntd->nd", x_hat, g)
        if self.bias is not None:
            score = torch.cat([score, g.sum(1)], 1)
        return score.unsqueeze(1)

    def recompute(self, x: Tensor) -> Tensor:
        """γ x̂ + β, or for a norm written outside torch the affine function of γ that it is."""
        module: Any = self.module
        x_hat = self.normalised(x)
        zero = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        scale, shift = module.weight, module.bias if self.bias is not None else None
        if self.channel != -1:
            spread = (-1,) + (1,) * (x.ndim - 2)
            scale = scale.reshape(spread)
            shift = None if shift is None else shift.reshape(spread)
        z = scale * x_hat
        if type(module).forward not in _PLAIN:
            # Some multiply by 1 + γ: what is left at γ = β = 0 belongs to the output.
            self.busy = True
            try:
                z = z + functional_call(module, zero, (x,))
            finally:
                self.busy = False
        return z if shift is None else z + shift

    def tokens(self, shape: tuple[int, ...], n: int) -> int:
        """One row: the score is summed over positions."""
        return 1

    @property
    def width(self) -> int:
        """a is the number 1."""
        return 1

    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, 1)."""
        scale = u.get(self.weight)
        shift = None if self.bias is None else u.get(self.bias)
        if scale is None and shift is None:
            return None
        features = self.outputs if self.bias is None else self.outputs // 2
        some = scale if scale is not None else shift
        assert some is not None
        parts = [scale if scale is not None else some.new_zeros(len(some), features)]
        if self.bias is not None:
            parts.append(shift if shift is not None else some.new_zeros(len(some), features))
        return torch.cat([part.reshape(len(some), -1) for part in parts], 1).unsqueeze(-1)


class ChannelNorm(Norm):
    """Features in dimension 1 (group and batch norm)."""

    channel = 1


def _build(kind: type[Norm], name: str, module: nn.Module, own: Mapping[str, str]) -> Norm:
    weight, bias = names_of(own)
    assert isinstance(module.weight, Tensor)
    size = module.weight.numel()
    return kind(name, module, weight, bias, 1, size * (1 if bias is None else 2))


@register(nn.LayerNorm, nn.RMSNorm)
def layer_norm(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of an nn.LayerNorm or nn.RMSNorm."""
    layer = _build(Norm, name, module, own)
    assert isinstance(module.weight, Tensor)
    layer.extent = module.weight.ndim
    return HookAdapter(layer)


@register(nn.GroupNorm)
def group_norm(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of an nn.GroupNorm."""
    return HookAdapter(_build(ChannelNorm, name, module, own))


@register(_BatchNorm)
def batch_norm(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of a batch norm in evaluation mode."""
    if module.running_mean is None:
        raise Unsupported("without running statistics its output depends on the whole batch")
    return HookAdapter(_build(ChannelNorm, name, module, own))


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm", "T5Norm"))
    return named and isinstance(weight, Tensor) and weight.ndim == 1 and not list(module.children())


@register_look(_is_norm)
def other_norm(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of a norm written outside torch (the RMSNorm of Llama, T5, Gemma ...)."""
    return HookAdapter(_build(Norm, name, module, own))
