"""The numerical check every claimed symmetry has to pass before it is returned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deaddir_fast.gauge.base import Gauge
from deaddir_fast.nets.graph import call_model, readable_attention

# Rounding allowed, in units of the working precision. A false claim misses by far more, since
# elements are of order one and the point is generic.
_SLACK = 2.0**20
_COTANGENTS = 3


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with its plain attention path; every flag is put back."""
    flags = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in flags:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with readable_attention():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


class _Wide(TorchDispatchMode):
    """Casts of fp64 numbers to a narrower type are left out: norms often cast to fp32."""

    used = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            wanted = kwargs.get("dtype")
            if wanted not in (None, torch.float64) and wanted.is_floating_point:
                self.used = True
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


class Verifier:
    """Evaluates a model in fp64 where it allows that, at its own parameters and near them.

    The second point makes the check meaningful where the first is special (a layer that starts
    at zero makes many changes invisible).
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        self._model = model
        own = {k: v.detach() for k, v in model.named_parameters()}
        buffers = dict(model.named_buffers())
        try:
            self._buffers = {k: wide(v.detach()) for k, v in buffers.items()}
            self._inputs = pytree.tree_map(wide, inputs)
            state = {k: wide(v) for k, v in own.items()}
            with _Wide() as mode:
                call_model(self._model, {**self._buffers, **state}, self._inputs)
            self._casts = mode.used
        except (RuntimeError, TypeError):  # casts inside the forward pass
            self._buffers = {k: v.detach() for k, v in buffers.items()}
            self._inputs, self._casts, state = inputs, False, own
        self._draw = torch.Generator().manual_seed(1)
        self._points = [state, {k: self._near(v) for k, v in state.items()}]
        self._outputs = [self.evaluate(s).detach() for s in self._points]
        self._tolerance = min(1e-3, _SLACK * torch.finfo(self._outputs[0].dtype).eps)
        self._gradients: dict[bool, list[list[dict[str, Tensor]]]] = {}

    def _near(self, w: Tensor) -> Tensor:
        if not w.is_floating_point():
            return w
        noise = torch.randn(w.shape, dtype=torch.float64, generator=self._draw).to(w)
        size = w.square().mean().sqrt() if w.numel() else 1.0
        return w + noise * (0.3 * size + 0.05)

    def evaluate(self, state: dict[str, Tensor]) -> Tensor:
        """The model's output at other parameters."""
        with _Wide() if self._casts else nullcontext():
            return call_model(self._model, {**self._buffers, **state}, self._inputs)

    def _cotangents(self, categorical: bool) -> list[list[dict[str, Tensor]]]:
        """Gradients of random linear functionals of the outputs, per point."""
        if categorical not in self._gradients:
            self._gradients[categorical] = [
                [self._gradient(s, z, categorical) for _ in range(_COTANGENTS)]
                for s, z in zip(self._points, self._outputs, strict=True)
            ]
        return self._gradients[categorical]

    def _gradient(
        self, state: dict[str, Tensor], z: Tensor, categorical: bool
    ) -> dict[str, Tensor]:
        w = torch.randn(z.shape, dtype=torch.float64, generator=self._draw).to(z)
        if categorical:
            w = w - w.mean(-1, keepdim=True)
        leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in state.items()}
        moving = {k: v for k, v in leaves.items() if v.requires_grad}
        with torch.enable_grad():
            total = (w * self.evaluate(leaves)).sum()
            grads = torch.autograd.grad(total, list(moving.values()), allow_unused=True)
        return {k: g for k, g in zip(moving, grads, strict=True) if g is not None}

    def objection(self, gauge: Gauge) -> str | None:
        """Why the claim is false, or None.

        Checks at both points that a random element leaves the outputs as they are (up to a
        constant over classes for a categorical gauge) and that a random combination of all
        tangents is null: the pairing of J (tangent) with random cotangents vanishes relative to
        the parts it is summed from and to gradient times tangent, whose rounding it carries. The
        same few backward passes serve all gauges.
        """
        for point in range(len(self._points)):
            error = self._change([gauge], point, gauge.likelihood == "categorical")
            if not error <= self._tolerance:
                return f"a random element changes the outputs by {error:.1e} of their size"
        return self.tangent_objection(gauge)

    def tangent_objection(self, gauge: Gauge) -> str | None:
        """The second half of ``objection``: whether the tangents are null."""
        if math.prod(gauge.algebra_shape) == 0:
            return None
        categorical = gauge.likelihood == "categorical"
        for state, gradients in zip(self._points, self._cotangents(categorical), strict=True):
            algebra = torch.randn(gauge.algebra_shape, dtype=torch.float64, generator=self._draw)
            tangent = gauge.velocity(state, algebra)
            for gradient in gradients:
                parts = [tangent[k] * gradient[k] for k in tangent if k in gradient]
                total = sum(float(p.sum()) for p in parts)
                length = sum(float(v.norm()) for v in tangent.values())
                slope = sum(float(g.norm()) for g in gradient.values())
                size = max(sum(float(p.abs().sum()) for p in parts), length * slope)
                if not abs(total) <= self._tolerance * max(size, 1e-30):
                    return (
                        f"its tangents move the outputs by {abs(total) / size:.1e} of their parts"
                    )
        return None

    def _change(self, gauges: Sequence[Gauge], point: int, categorical: bool) -> float:
        """Change of the outputs, relative to their size, by a random element of every gauge."""
        state, before = dict(self._points[point]), self._outputs[point]
        for gauge in gauges:
            state = gauge.act(state, gauge.random_element(self._draw))
        after = self.evaluate(state).detach()
        change = after - before
        if categorical:
            change = change - change.mean(-1, keepdim=True)
        size = max(float(before.abs().max()), float(after.abs().max()), 1e-30)
        return float(change.abs().max()) / size

    def joint_objection(self, gauges: Sequence[Gauge]) -> bool:
        """Whether a random element of one of these gauges may change the outputs.

        Elements are tried together, in about 2 + log2 of their number evaluations: all of
        them at both points, then subsets that hold one and not the other of any two gauges, so
        that errors of two that undo each other show. None may be categorical.
        """
        if not gauges:
            return False
        trials = [(list(gauges), point) for point in range(len(self._points))]
        for bit in range(max(len(gauges) - 1, 0).bit_length()):
            subset = [g for i, g in enumerate(gauges) if i >> bit & 1]
            trials.append((subset, bit % len(self._points)))
        return not all(self._change(g, p, False) <= self._tolerance for g, p in trials)

    def moves(self, gauge: Gauge) -> bool:
        """Whether a random combination of tangents moves any parameter at a generic point."""
        algebra = torch.randn(gauge.algebra_shape, dtype=torch.float64, generator=self._draw)
        return any(bool(v.any()) for v in gauge.velocity(self._points[1], algebra).values())
