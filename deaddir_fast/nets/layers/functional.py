"""Modules that hold a matrix themselves and multiply by it: routers, low-rank updates, heads.

Which product is a layer is seen while the module's own forward runs: F.linear(x, W), x @ W.T or
x @ W. A matrix that is used in any other way is no layer, and the survey says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from deaddir_fast.nets.layers.base import Adapter, ForwardAdapter, Tap, Verify
from deaddir_fast.nets.layers.linear import Linear
from deaddir_fast.nets.layers.registry import Unsupported, register_look

_TURNED = {
    torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.t, torch.t,  # type: ignore[attr-defined]
}  # fmt: skip
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}


class Matrix(Linear):
    """z = W a, or z = Wᵀ a once such a product has been seen."""

    key = "weight"
    seen = False

    def orient(self, transposed: bool) -> None:
        """Fix which dimension of the weight is that of the inputs."""
        if self.seen and transposed != self.transposed:
            self.misused = "it is multiplied from both sides"
        if transposed and not self.seen:
            self.inputs, self.outputs = self.outputs, self.inputs
        if not self.seen:
            self.transposed = transposed
        self.seen = True

    def recompute(self, x: Tensor) -> Tensor:
        """W a."""
        weight = getattr(self.module, self.key)
        return x @ (weight if self.transposed else weight.mT)


class _Watch(TorchFunctionMode):
    def __init__(self, tap: Tap, layers: dict[int, Matrix]) -> None:
        super().__init__()
        self.tap, self.layers = tap, layers
        self.turned: dict[int, tuple[Matrix, Tensor]] = {}

    def _product(self, func: Any, args: tuple[Any, ...]) -> tuple[Matrix, bool] | None:
        if len(args) < 2 or not isinstance(args[1], Tensor):
            return None
        known = self.layers.get(id(args[1]))
        if func is torch.nn.functional.linear:
            return None if known is None else (known, False)
        if func in _MATMUL:
            if known is not None:
                return known, True
            turned = self.turned.get(id(args[1]))
            return None if turned is None else (turned[0], False)
        return None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        held = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        mine = [self.layers[id(x)] for x in held if id(x) in self.layers]
        mine += [self.turned[id(x)][0] for x in held if id(x) in self.turned]
        if not mine:
            return out
        found = self._product(func, args)
        simple = len(args) == 2 and not any(v is not None for v in kwargs.values())
        if found is not None and simple and len(mine) == 1 and args[0].ndim > 1:
            layer, transposed = found
            layer.orient(transposed)
            return self.tap(layer, args[0], out)
        if func in _TURNED and id(held[0]) in self.layers:
            self.turned[id(out)] = self.layers[id(held[0])], out
            return out
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(out)):
            what = getattr(func, "__name__", str(func))
            for layer in mine:
                layer.misused = f"it is used by {what}, not as a linear map of rows"
        return out


class MatrixAdapter(ForwardAdapter):
    """Runs the module's own forward and looks at the products in it."""

    def attach(self, tap: Tap, verify: Verify | None = None) -> Callable[[], None]:
        """There is nothing to verify: the forward is the module's."""
        return super().attach(tap)

    def run(self, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        layers = {}
        for layer in self.layers:
            assert isinstance(layer, Matrix)
            layers[id(getattr(self.module, layer.key))] = layer
        with _Watch(tap, layers):
            return type(self.module).forward(self.module, *args, **kwargs)


def _holds_matrix(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.") and any(
        p.ndim == 2 and p.is_floating_point() for p in module.parameters(recurse=False)
    )


@register_look(_holds_matrix, last=True)
def matrices(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of a module of any other type that holds matrices itself."""
    if "forward" in vars(module):
        raise Unsupported("its forward is not that of its class")
    layers = []
    for key, p in module.named_parameters(recurse=False):
        if p.ndim == 2 and p.is_floating_point() and key in own:
            o, i = p.shape
            layer = Matrix(f"{name}.{key}" if name else key, module, own[key], None, i, o)
            layer.key = key
            layers.append(layer)
    return MatrixAdapter(module, tuple(layers))
