"""nn.Linear, and the transposed Conv1D of GPT-2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.nets.layers.base import Adapter, HookAdapter, Layer, stack_bias
from deaddir_fast.nets.layers.registry import Unsupported, register, register_look


class Linear(Layer):
    """z = W a + b on the last dimension; ``transposed`` where the weight is stored as (i, o)."""

    transposed = False

    def rows(self, x: Tensor, n: int) -> Tensor:
        """(n, t, i)."""
        return self.samples_first(x, n)

    def gradients(self, grad: Tensor, n: int, x: Tensor | None = None) -> Tensor:
        """(n, t, o)."""
        return self.per_sample(grad, n)

    def recompute(self, x: Tensor) -> Tensor:
        """W a + b."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return F.linear(x, weight.mT if self.transposed else weight, bias)

    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, width)."""
        weight = u.get(self.weight)
        if weight is not None and self.transposed:
            weight = weight.mT
        if self.bias is None:
            return weight
        return stack_bias(weight, u.get(self.bias), (self.outputs, self.inputs))


class Transposed(Linear):
    """A linear map whose weight is stored as (i, o)."""

    transposed = True


def names_of(own: Mapping[str, str], *, weight: str = "weight") -> tuple[str, str | None]:
    """Names of a module's weight and bias.

    Raises:
        Unsupported: the weight is computed from something else.
    """
    if weight not in own:
        raise Unsupported(f"its {weight} is not a parameter but computed from others")
    return own[weight], own.get("bias")


@register(nn.Linear)
def linear(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of an nn.Linear."""
    assert isinstance(module, nn.Linear)
    weight, bias = names_of(own)
    shape = (module.out_features, module.in_features)
    if tuple(module.weight.shape) != shape or not module.weight.is_floating_point():
        raise Unsupported(
            f"its weight is {tuple(module.weight.shape)} of {module.weight.dtype}, expected "
            f"{shape} of a floating-point type"
        )
    return HookAdapter(Linear(name, module, weight, bias, module.in_features, module.out_features))


def _is_conv1d(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and torch.is_tensor(weight)


@register_look(_is_conv1d)
def conv1d(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of the Conv1D of Hugging Face's GPT-2: a linear map with a transposed weight."""
    weight, bias = names_of(own)
    assert isinstance(module.weight, Tensor)
    i, o = module.weight.shape
    return HookAdapter(Transposed(name, module, weight, bias, i, o))
