"""The numerical check every claimed symmetry has to pass before it is returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deaddir_fast.gauge.base import Gauge
from deaddir_fast.nets.graph import call_model, readable_attention, recorded

# Rounding allowed, in units of the working precision. A false claim misses by far more, since
# elements are of order one and the point is generic.
_SLACK = 2.0**20
_POINTS = 2


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


class Verifier:
    """Evaluates a model in fp64 where it allows that, at its own parameters and near them.

    The second point makes the check meaningful where the first is special (a layer that starts
    at zero makes many changes invisible). All claims are checked together, at one point after
    the other: true symmetries compose to one, so a forward pass before and one after, and a
    backward pass, serve them all. Besides the model this takes at most four copies of its
    parameters in fp64 (the model's own, the point, the point acted on or its gradient, and the
    largest tangent) and the activations of the pass.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        self._model = model
        own = {k: v.detach() for k, v in model.named_parameters()}
        buffers = dict(model.named_buffers())
        self._outputs: dict[int, Tensor] = {}
        try:
            self._buffers = {k: wide(v.detach()) for k, v in buffers.items()}
            self._inputs = pytree.tree_map(wide, inputs)
            self._own = {k: wide(v) for k, v in own.items()}
            self._output(0, self._own)
        except (RuntimeError, TypeError):  # casts inside the forward pass
            self._buffers = {k: v.detach() for k, v in buffers.items()}
            self._inputs, self._own = inputs, own
            self._output(0, self._own)
        self._draw = torch.Generator().manual_seed(1)
        self._tolerance = min(1e-3, _SLACK * torch.finfo(self._outputs[0].dtype).eps)

    def _point(self, i: int) -> dict[str, Tensor]:
        """The model's own parameters, or the point near them; made anew on every call."""
        if i == 0:
            return self._own
        draw = torch.Generator().manual_seed(2)
        return {k: _near(v, draw) for k, v in self._own.items()}

    def _output(self, i: int, state: dict[str, Tensor]) -> Tensor:
        if i not in self._outputs:
            self._outputs[i] = self.evaluate(state).detach()
        return self._outputs[i]

    def evaluate(self, state: dict[str, Tensor]) -> Tensor:
        """The model's output at other parameters."""
        # As in the capture: Hugging Face experts run in fp64 only where they are traceable.
        with recorded():
            return call_model(self._model, {**self._buffers, **state}, self._inputs)

    def _gradient(self, state: dict[str, Tensor], z: Tensor, categorical: bool) -> _Gradient:
        """Gradient of a random linear functional of the outputs."""
        w = torch.randn(z.shape, dtype=torch.float64, generator=self._draw).to(z)
        if categorical:
            w = w - w.mean(-1, keepdim=True)
        leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in state.items()}
        moving = {k: v for k, v in leaves.items() if v.requires_grad}
        with torch.enable_grad():
            total = (w * self.evaluate(leaves)).sum()
            grads = torch.autograd.grad(total, list(moving.values()), allow_unused=True)
        found = {k: g for k, g in zip(moving, grads, strict=True) if g is not None}
        return _Gradient(found, sum(float(g.norm()) for g in found.values()))

    def objection(self, gauge: Gauge) -> str | None:
        """Why the claim is false, or None."""
        return self.objections([gauge])[0]

    def objections(self, gauges: Sequence[Gauge]) -> list[str | None]:
        """For each claim why it is false, or None.

        Checks at both points that random elements leave the outputs as they are (up to a
        constant over classes for a categorical gauge) and that a random combination of each
        gauge's tangents is null: the pairing of J (tangent) with a random cotangent vanishes
        relative to the parts it is summed from and to gradient times tangent, whose rounding it
        carries.
        """
        reasons: list[str | None] = [None] * len(gauges)
        for categorical in (False, True):
            chosen = [
                i for i, g in enumerate(gauges) if (g.likelihood == "categorical") == categorical
            ]
            for p in range(_POINTS):
                state = self._point(p)
                open_ = [i for i in chosen if reasons[i] is None]
                for i, reason in zip(
                    open_, self._changes(p, state, [gauges[i] for i in open_]), strict=True
                ):
                    reasons[i] = reason
                open_ = [i for i in open_ if reasons[i] is None]
                if open_:
                    gradient = self._gradient(state, self._output(p, state), categorical)
                    for i in open_:
                        reasons[i] = self._slope(gauges[i], state, gradient)
        return reasons

    def _changes(
        self, p: int, state: dict[str, Tensor], gauges: Sequence[Gauge]
    ) -> list[str | None]:
        """What random elements of gauges of one likelihood do to the outputs, if anything.

        They act one after the other; where that changes the outputs, the halves are tried apart.
        """
        if not gauges:
            return []
        before = self._output(p, state)
        moved = state
        for gauge in gauges:
            moved = gauge.act(moved, gauge.random_element(self._draw))
        after = self.evaluate(moved).detach()
        del moved
        change = after - before
        if gauges[0].likelihood == "categorical":
            change = change - change.mean(-1, keepdim=True)
        size = max(float(before.abs().max()), float(after.abs().max()), 1e-30)
        error = float(change.abs().max()) / size
        if error <= self._tolerance:
            return [None] * len(gauges)
        if len(gauges) == 1:
            return [f"a random element changes the outputs by {error:.1e} of their size"]
        half = len(gauges) // 2
        return [
            *self._changes(p, state, gauges[:half]),
            *self._changes(p, state, gauges[half:]),
        ]

    def _slope(self, gauge: Gauge, state: dict[str, Tensor], gradient: _Gradient) -> str | None:
        algebra = torch.randn(gauge.shape, dtype=torch.float64, generator=self._draw)
        tangent = gauge.velocity(state, algebra)
        total = parts = length = 0.0
        for name, v in tangent.items():
            length += float(v.norm())
            if name in gradient.of:
                product = v * gradient.of[name]
                total += float(product.sum())
                parts += float(product.abs().sum())
        size = max(parts, length * gradient.norm)
        if abs(total) <= self._tolerance * max(size, 1e-30):
            return None
        return f"its tangents move the outputs by {abs(total) / size:.1e} of their parts"

    def moves(self, gauges: Sequence[Gauge]) -> list[bool]:
        """For each gauge whether a random tangent moves any parameter at a generic point."""
        state = self._point(1)
        algebras = [torch.randn(g.shape, dtype=torch.float64, generator=self._draw) for g in gauges]
        return [
            any(bool(v.any()) for v in g.velocity(state, x).values())
            for g, x in zip(gauges, algebras, strict=True)
        ]


@dataclass(frozen=True)
class _Gradient:
    of: dict[str, Tensor]
    norm: float


def _near(w: Tensor, draw: torch.Generator) -> Tensor:
    if not w.is_floating_point():
        return w
    noise = torch.randn(w.shape, dtype=torch.float64, generator=draw).to(w)
    size = w.square().mean().sqrt() if w.numel() else 1.0
    return w + noise * (0.3 * size + 0.05)
