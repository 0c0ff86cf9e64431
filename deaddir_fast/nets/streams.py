"""Streams of (a, g): forward and backward passes that hand over each layer's tensors.

The parameters are frozen meanwhile, so that the backward pass computes gradients with respect to
activations only: no weight gradients, and none of the activations that only they would need is
stored. Bound: one forward pass and, for each seed, one more of the same size (2 n t i o FLOP per
layer and pass), against two more for an ordinary backward pass. (Our choice.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.nets.graph import call_plainly
from deaddir_fast.nets.layers.base import Layer, slow_path
from deaddir_fast.nets.precision import ieee
from deaddir_fast.nets.sharded import spread_again
from deaddir_fast.nets.survey import Survey

#: on_input(layer, x): what a layer receives, in the forward pass.
OnInput = Callable[[Layer, Tensor], None]
#: on_gradient(layer, gradient of its output, x or None), in the backward pass.
OnGradient = Callable[[Layer, Tensor, Tensor | None], None]


class _Tap(torch.autograd.Function):
    """The identity; calls ``sink`` with the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        ctx.sink = sink
        ctx.through = ctx.needs_input_grad[0]
        return z.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.sink(grad)
        return (grad if ctx.through else None), None, None


class Streams:
    """Passes of one model that report to callbacks; a context manager.

    While it is open the model's parameters take no gradient and its layers are tapped; both are put
    back at the end, whatever happens.

    Args:
        model: in evaluation mode.
        survey: what it consists of.
        on_input: called in the forward pass for every use of every layer.
        on_gradient: called in the backward pass for every use of every layer that the output
            depends on, last layer first.
        keep: which layers' inputs are kept for ``on_gradient`` (norms always are: their scores
            need them).
    """

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        *,
        on_input: OnInput | None = None,
        on_gradient: OnGradient | None = None,
        keep: Callable[[Layer], bool] = lambda layer: False,
    ) -> None:
        self.model, self.survey, self.keep = model, survey, keep
        self.on_input, self.on_gradient = on_input, on_gradient
        self.samples = 0
        self._undo: list[Callable[[], None]] = []
        self._frozen: list[Tensor] = []
        self._anchor: Tensor | None = None
        self._cache: Any = None

    def __enter__(self) -> Streams:
        spread_again(self.model)
        self._frozen = [p for p in self.model.parameters() if p.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)
        # Key and value caches of language models would be built for nothing.
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "use_cache", None):
            self._cache, config.use_cache = config, False
        self._undo.append(slow_path())
        try:
            for adapter in self.survey.adapters:
                self._undo.append(adapter.attach(self._tap))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for stop in reversed(self._undo):
            stop()
        spread_again(self.model)
        for p in self._frozen:
            p.requires_grad_(True)
        if self._cache is not None:
            self._cache.use_cache = True
        self._undo, self._frozen, self._anchor, self._cache = [], [], None, None

    def _tap(self, layer: Layer, x: Tensor, z: Tensor) -> Tensor:
        if layer.name not in self.survey.layers:
            return z
        if self.on_input is not None:
            with torch.no_grad():
                self.on_input(layer, x)
        if self.on_gradient is None or self._anchor is None:
            return z
        kept = x.detach() if layer.kind in ("norm", "embedding") or self.keep(layer) else None
        version = x._version
        sink_of = self.on_gradient

        at, routes = 0, (layer.owners, layer.sources)

        def sink(grad: Tensor) -> None:
            if kept is not None and kept._version != version:
                raise RuntimeError(
                    f"{layer.name}: its input was changed in place after it was used; the model "
                    "would have to copy it first"
                )
            if layer.routed:
                layer.owners, layer.sources = routes  # those of this use
            with torch.no_grad():
                sink_of(layer, grad.movedim(at, 0) if at else grad, kept)

        if layer.layout == "shared":
            # One output for all samples: their gradients would arrive summed.
            z, at = layer.spread(z, self.samples)
        return _Tap.apply(z, self._anchor, sink)

    def forward(self, inputs: Any, samples: int) -> Tensor:
        """Run the model; returns its output, ready for :meth:`backward` if gradients are wanted."""
        self.samples = samples
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if self.on_gradient is None:
            with torch.no_grad(), ieee(device):
                return call_plainly(self.model, inputs)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        with torch.enable_grad(), ieee(device):
            return call_plainly(self.model, inputs)

    def backward(self, z: Tensor, seed: Tensor, *, last: bool = True) -> None:
        """Send ``seed``, a gradient of the shape of the output, backwards to every layer.

        Args:
            z: the output of :meth:`forward`.
            seed: of its shape.
            last: whether the stored activations may be freed.
        """
        assert self._anchor is not None
        if not z.requires_grad:
            return  # the output depends on none of the layers
        with ieee(z.device):
            torch.autograd.backward(z, seed, retain_graph=not last, inputs=[self._anchor])
