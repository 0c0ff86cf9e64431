"""The numerical check every claimed symmetry has to pass before it is returned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deaddir_fast.gauge.base import Gauge
from deaddir_fast.nets.graph import call_model, readable_attention, recorded

# Rounding allowed, in units of the working precision. A false claim misses by far more, since
# elements are of order one and the point is generic.
_SLACK = 2.0**20
_FEW = 5  # units; the random cycles of more seldom meet their like


class _NoNarrowing(TorchDispatchMode):
    """Casts to floating-point numbers, and new tensors of a given type, give fp64.

    Many models compute norms, positions or scores in fp32 whatever their own precision is.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation with its ``dtype`` widened."""
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with its plain attention path; every flag is put back.

    Experts of a Hugging Face model run as one grouped matrix product, which can be followed.
    """
    flags = [(m, m.training) for m in model.modules()]
    configs: dict[int, Any] = {id(c): c for m, _ in flags for c in [getattr(m, "config", None)]}
    experts = [
        (c, c._experts_implementation)
        for c in configs.values()
        if hasattr(c, "_experts_implementation")
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in flags:
            module.training = False
        for config, _ in experts:
            config._experts_implementation = "grouped_mm"
        torch.backends.mha.set_fastpath_enabled(False)
        with readable_attention():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training
        for config, implementation in experts:
            config._experts_implementation = implementation


class Verifier:
    """Evaluates a model in fp64 where it allows that, at its own parameters and near them.

    The second point makes the check meaningful where the first is special (a layer that starts
    at zero makes many changes invisible). All claims are checked together, at one point after
    the other: true symmetries compose to one, so a forward pass before and one after, and a
    backward pass, serve them all. Besides the model this takes at most four copies of its
    parameters in fp64 (both points, and one of them acted on, of which two overlap for a
    moment, or its gradient) and the activations of the pass.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        def wide(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        self._model = model
        own = {k: v.detach() for k, v in model.named_parameters()}
        buffers = {k: v.detach() for k, v in model.named_buffers()}
        self._draw = torch.Generator().manual_seed(1)
        # Some models fail in fp64 without their casts, some with them.
        for mode in (_NoNarrowing, nullcontext, None):
            self._precision = mode or nullcontext
            change = wide if mode else (lambda x: x)
            self._buffers = {k: change(v) for k, v in buffers.items()}
            self._inputs = pytree.tree_map(change, inputs)
            state = {k: change(v) for k, v in own.items()}
            try:
                output = self.evaluate(state).detach()
            except (RuntimeError, TypeError):
                if mode is None:
                    raise
                continue
            break
        self._points = [state, {k: self._near(v) for k, v in state.items()}]
        self._outputs = [output, self.evaluate(self._points[1]).detach()]
        self._tolerance = min(1e-3, _SLACK * torch.finfo(output.dtype).eps)

    def _near(self, w: Tensor) -> Tensor:
        if not w.is_floating_point():
            return w
        noise = torch.randn(w.shape, generator=self._draw).to(w)
        size = w.square().mean().sqrt() if w.numel() else 1.0
        return noise.mul_(0.3 * size + 0.05).add_(w)

    def evaluate(self, state: dict[str, Tensor]) -> Tensor:
        """The model's output at other parameters."""
        # As in the capture: Hugging Face experts run in fp64 only where they are traceable.
        with recorded(), self._precision():
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
        for p in range(len(self._points)):
            for categorical in (False, True):
                chosen = [
                    i
                    for i, g in enumerate(gauges)
                    if reasons[i] is None and (g.likelihood == "categorical") == categorical
                ]
                for together in (chosen, *_telling_apart(gauges, chosen)):
                    tried = [i for i in together if reasons[i] is None]
                    found = self._changes(p, [gauges[i] for i in tried])
                    for i, reason in zip(tried, found, strict=True):
                        reasons[i] = reason
                chosen = [i for i in chosen if reasons[i] is None]
                found = self._slopes(p, [gauges[i] for i in chosen])
                for i, reason in zip(chosen, found, strict=True):
                    reasons[i] = reason
        return reasons

    def _changes(self, p: int, gauges: Sequence[Gauge]) -> list[str | None]:
        """What random elements of gauges of one likelihood do to the outputs, if anything.

        They act one after the other; where that changes the outputs, the halves are tried apart.
        """
        if not gauges:
            return []
        before, moved = self._outputs[p], self._points[p]
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
            *self._changes(p, gauges[:half]),
            *self._changes(p, gauges[half:]),
        ]

    def _slopes(self, p: int, gauges: Sequence[Gauge]) -> list[str | None]:
        """What random tangents of gauges of one likelihood do to the outputs, if anything."""
        if not gauges:
            return []
        state = self._points[p]
        categorical = gauges[0].likelihood == "categorical"
        gradient = self._gradient(state, self._outputs[p], categorical)
        return [self._slope(g, state, gradient) for g in gauges]

    def _slope(self, gauge: Gauge, state: dict[str, Tensor], gradient: _Gradient) -> str | None:
        if not math.prod(gauge.algebra_shape):
            return None
        algebra = torch.randn(gauge.algebra_shape, dtype=torch.float64, generator=self._draw)
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
        """For each gauge whether it moves any parameter at a generic point.

        Tried is a random tangent; of a finite group, which has none, a random element.
        """
        return [self._moves(g) for g in gauges]

    def _moves(self, gauge: Gauge) -> bool:
        state = self._points[1]
        if gauge.dimension:
            x = torch.randn(gauge.algebra_shape, dtype=torch.float64, generator=self._draw)
            return any(bool(v.any()) for v in gauge.velocity(state, x).values())
        after = gauge.act(state, gauge.random_element(self._draw))
        return any(not torch.equal(after[k], state[k]) for k in gauge.parameters)


def _telling_apart(gauges: Sequence[Gauge], chosen: Sequence[int]) -> list[list[int]]:
    """Sets of permutations of few units: of any two, some set holds one and not the other.

    Two false claims with few elements can undo each other by chance: swaps that only together
    are one of the model's.
    """
    few = [i for i in chosen if not gauges[i].dimension and gauges[i].shape[-1] <= _FEW]
    bits = range(max(len(few) - 1, 0).bit_length())
    return [[i for n, i in enumerate(few) if n >> bit & 1] for bit in bits]


@dataclass(frozen=True)
class _Gradient:
    of: dict[str, Tensor]
    norm: float
