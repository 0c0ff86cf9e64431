"""Uses of parameters that the taps of their layers do not see.

A weight may be multiplied by outside its module (an output layer written as F.linear(h,
embedding.weight), a module that is never called). Its layer would then miss part of its score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from deaddir_fast.nets.layers.base import Adapter, ForwardAdapter


class Uses(TorchFunctionMode):
    """Notes which parameters of layers are used where no tap sees it.

    Attributes:
        found: {parameter: name of the function that used it}.
        quiet: whether nothing is noted for now.
    """

    def __init__(self, model: nn.Module, adapters: Iterable[Adapter]) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.inside: dict[str, set[nn.Module]] = {}
        for adapter in adapters:
            for layer in adapter.layers:
                module = adapter.module if isinstance(adapter, ForwardAdapter) else layer.module
                for name in (layer.weight, layer.bias):
                    if name is not None:
                        self.inside.setdefault(name, set()).add(module)
        self.running: Counter[nn.Module] = Counter()
        self.found: dict[str, str] = {}
        self.quiet = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in () if self.quiet else pytree.tree_leaves((args, kwargs)):
            name = self.names.get(id(x))
            if name is None or name in self.found:
                continue
            where = self.inside.get(name)
            if where is None or any(self.running[module] for module in where):
                continue
            results = pytree.tree_leaves(out)
            # Asking for its shape or dtype is no use.
            if any(isinstance(r, Tensor) and r.is_floating_point() for r in results):
                self.found[name] = getattr(func, "__name__", str(func))
        return out


@contextmanager
def uses_outside(model: nn.Module, adapters: Iterable[Adapter]) -> Iterator[Uses]:
    """While open, watch the parameters of layers as the model runs."""
    uses = Uses(model, adapters)

    def enter(module: nn.Module, args: Any) -> None:
        uses.running[module] += 1

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        uses.running[module] -= 1

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave)
    try:
        with uses:
            yield uses
    finally:
        before.remove()
        after.remove()
