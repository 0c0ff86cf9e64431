"""``freeze_probe``: turn one unit of a real model down to t and measure every layer's rates."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from deaddir_fast import _check
from deaddir_fast.gauge.verify import at_rest
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.graph import batch_size, slice_batch
from deaddir_fast.rates.predict import LayerRate, Rates, predict
from deaddir_fast.rates.unit import BIAS, LinearUse, Unit, check_unit, locate
from deaddir_fast.rates.walk import Walk, walk
from deaddir_fast.theory.rate import RateFit, fit_rate

CHUNK = 64  # samples of one pass
EXACT = 64  # output entries per sample up to which every one is propagated back
PROBES = 16  # random covectors beyond that
TOLERANCE = 0.05  # of a slope that agrees
NUDGE = 4 * torch.finfo(torch.float64).eps  # relative change of every weight, and what it may
FLOOR = 0.01  # change a value by, relative, before that is called rounding
DEEP = (1e-4, 1e-3)  # times the smallest t: where small leading coefficients show
QUANTITIES = ("forward", "backward", "fisher")


@dataclass(frozen=True)
class FrozenLayer:
    """Measured and predicted rates of one linear map z = W a at the unit.

    Attributes:
        rate: predicted orders.
        forward: (r,) E[a²] at the unit, mean over samples and tokens.
        backward: (r,) E[g²] at the unit, mean over samples of the sum over tokens.
        fisher: (r,) exact uᵀFu, u the unit's own weight direction in this layer.
        fits: {"forward" | "backward" | "fisher": RateFit}; absent where the layer has no such side.
        verdicts: the same keys: ``"agrees"``; ``"agrees as t → 0: …"`` (steeper in the sweep,
            where a small leading coefficient does not show yet, but as predicted far below it);
            ``"differs: …"``; or ``"unresolved: …"`` (no window, or a floor: values that the
            last digits of the weights change by more than 1 % are rounding and are not fitted).
    """

    rate: LayerRate
    forward: Tensor
    backward: Tensor
    fisher: Tensor
    fits: dict[str, RateFit]
    verdicts: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.rate.name

    def predicted(self, quantity: str) -> float:
        """Predicted slope of a quantity."""
        return float(getattr(self.rate, f"{quantity}_slope"))


@dataclass(frozen=True)
class FreezeProbe:
    """A known-t sweep of one unit.

    Attributes:
        t: (r,) scales of the unit's weights.
        layers: measured and predicted rates, in order of use.
        rates: the whole prediction.
        samples: number of inputs.
        exact: whether gradients are exact expectations over labels (else random covectors).
        notes: what limits the numbers.
    """

    t: Tensor
    layers: tuple[FrozenLayer, ...]
    rates: Rates
    samples: int
    exact: bool
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> FrozenLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {[x.name for x in self.layers]}")

    @property
    def agrees(self) -> bool:
        """Whether every resolved slope agrees with its prediction."""
        return not any(
            v.startswith("differs") for layer in self.layers for v in layer.verdicts.values()
        )

    def __str__(self) -> str:
        width = max([len("layer"), *(len(x.name) for x in self.layers)])
        lines = [f"{'layer':<{width}} {'':<9} {'measured':>16} {'predicted':>9}  verdict"]
        for layer in self.layers:
            for quantity, fit in layer.fits.items():
                slope = f"{round(fit.slope, 3) + 0.0:>8.3f} ± {fit.stderr:<5.1g}"  # no "-0"
                lines.append(
                    f"{layer.name:<{width}} {quantity:<9} {slope} "
                    f"{layer.predicted(quantity):>9g}  {layer.verdicts[quantity]}"
                )
        return "\n".join([*lines, *self.notes])


def _check_t(t: Any) -> Tensor:
    if t is None:
        return torch.logspace(-3, -0.5, 16, dtype=torch.float64)
    try:
        values = torch.as_tensor(t, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise _check.fail("t", t, "a sequence of positive numbers", TypeError) from None
    if values.ndim != 1 or values.numel() == 0:
        raise _check.fail("t", t, "a non-empty one-dimensional sequence")
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise _check.fail("t", t, "finite positive numbers")
    return values


def scaled_state(parameters: Mapping[str, Tensor], unit: Unit, t: float) -> dict[str, Tensor]:
    """Parameters with the unit's weights multiplied by t and its couplings cut."""
    state = {}
    for name, value in parameters.items():
        flat = value.clone().reshape(-1)
        if name in unit.scaled:
            flat[unit.scaled[name].to(flat.device)] *= t
        if name in unit.cut:
            flat[unit.cut[name].to(flat.device)] = 0.0
        state[name] = flat.reshape(value.shape)
    return state


def _nudged(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every weight changed in its last digits; zeros stay zeros."""
    generator = torch.Generator().manual_seed(seed)
    nudged = {}
    for name, value in state.items():
        draw = torch.randn(value.shape, dtype=torch.float64, generator=generator)
        nudged[name] = value * (1 + NUDGE * draw.to(value.device))
    return nudged


def _evaluate(
    run: Walk, state: Mapping[str, Tensor], inputs: Any, added: Mapping[fx.Node, Tensor]
) -> dict[fx.Node, Any]:
    """Values of all nodes, with something added to some of them."""
    values: dict[fx.Node, Any] = {}
    given = iter([*(state[n] for n in run.capture.names), *run.capture.bind(inputs)])
    for node in run.capture.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(run.capture.module)
        elif node.op != "output":
            args = fx.map_arg(node.args, lambda n: values[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
        if node in added:
            values[node] = values[node] + added[node]
    return values


def _covectors(output: Tensor, seed: int) -> tuple[list[Tensor], bool]:
    """Covectors e with mean e eᵀ = 1 on each sample's outputs, and whether the mean is exact."""
    n, entries = output.shape[0], output[0].numel()
    if entries <= EXACT:
        eye = torch.eye(entries, dtype=output.dtype, device=output.device)
        return [e.expand(n, entries).reshape(output.shape) for e in eye], True
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(PROBES, *output.shape, dtype=torch.float64, generator=generator)
    draws = draws.to(output.device, output.dtype) / PROBES**0.5
    return list(draws), False


def _moments(
    run: Walk, unit: Unit, state: Mapping[str, Tensor], inputs: Any, likelihood: Any, seed: int
) -> tuple[list[float], list[float], bool]:
    """Sums over samples of a² (mean over tokens) and g² (sum over tokens) at the unit."""
    watched = [u.output for u in unit.uses]
    # The gradient at a value is that of a zero added to it.
    handles = {w: torch.zeros_like(run.values[w], requires_grad=True) for w in watched}
    values = _evaluate(run, state, inputs, handles)
    output = values[run.output]
    n = output.shape[0]
    vectors, exact = _covectors(output, seed)
    backward = [0.0] * len(unit.uses)
    for e in vectors:
        total = (likelihood.whiten(output.detach(), output) * e).sum()
        grads = torch.autograd.grad(
            total, [handles[w] for w in watched], retain_graph=True, allow_unused=True
        )
        for k, (use, g) in enumerate(zip(unit.uses, grads, strict=True)):
            if g is not None:
                held = _held(use, use.outside)
                backward[k] += float(g.movedim(use.axis, -1)[..., held].square().sum())
    forward = []
    for use in unit.uses:
        a = values[use.input].detach().movedim(use.axis, -1)
        rows = a.numel() // a.shape[-1]
        forward.append(float(a[..., _held(use, use.inside)].square().sum()) * n / rows)
    return forward, backward, exact


def _held(use: LinearUse, mask: Tensor) -> Tensor:
    return mask if bool(mask.any()) else torch.ones_like(mask)


def _own_curvature(
    run: Walk, unit: Unit, state: Mapping[str, Tensor], inputs: Any, likelihood: Any
) -> list[float]:
    """Sum over samples of uᵀFu for each layer's own weights u; NaN where it has none."""
    found = []
    for use in unit.uses:
        if not _has_own(use, unit):
            found.append(math.nan)
            continue
        base = state[use.parameter]
        tangent = unit.scaled[use.parameter].to(base).reshape(base.shape)

        def output(weight: Tensor, name: str = use.parameter) -> Tensor:
            return _evaluate(run, {**state, name: weight}, inputs, {})[run.output]

        with torch.no_grad():
            moved = torch.func.jvp(output, (base,), (tangent / tangent.norm(),))
            found.append(float(likelihood.fisher(moved[0], moved[1]).sum()))
    return found


def _has_own(use: LinearUse, unit: Unit) -> bool:
    return bool(use.inside.any() and use.outside.any()) and use.parameter in unit.scaled


def freeze_probe(
    model: nn.Module,
    inputs: Any,
    unit: int | Mapping[str, int | None] = 0,
    t: Any = None,
    *,
    likelihood: Any = "categorical",
    bias: str = "scale",
    isolate: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> FreezeProbe:
    """Scale a unit's weights by t, sweep t, and lay measured rates beside predicted ones.

    The weights of one channel through the whole network are multiplied by t on an fp64 copy, all
    else frozen; couplings to live channels are cut (``isolate``). For every linear map the second
    moments of the unit's input and of its output gradient, and the exact Fisher curvature of its
    own weight, are measured at each t and fitted by ``fit_rate``; ``predict`` gives the rates the
    architecture should have ("Dead Directions", arXiv 2606.05957: known-t sweeps).

    Args:
        model: any module, read in evaluation mode and left as it is.
        inputs: tensor, tuple or dict; samples lead.
        unit: channel index in every layer, or {layer name: output index}.
        t: (r,) positive scales; 16 from 1e-3 to 0.3 by default.
        likelihood: as in ``dead_directions``.
        bias: ``"scale"``, ``"zero"`` or ``"keep"`` the unit's biases.
        isolate: cut the couplings between the unit and live units.
        seed: of the random covectors used where a sample has more than 64 outputs.
        progress: show a progress bar.

    Returns:
        FreezeProbe; print it for a table.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(model, nn.Module):
        raise _check.fail("model", model, "a torch.nn.Module", TypeError)
    if bias not in BIAS:
        raise _check.fail("bias", bias, f"one of {', '.join(map(repr, BIAS))}")
    checked, scales, metric = check_unit(unit), _check_t(t), likelihoods.get(likelihood)
    n = batch_size(inputs)
    if n == 0:
        raise _check.fail("inputs", inputs, "at least one sample")
    _check_finite(model, inputs)
    twin = copy.deepcopy(model).double()
    inputs = _double(inputs)
    with at_rest(twin):
        rates = predict(twin, inputs, unit=checked, bias=bias, isolate=isolate, likelihood=metric)
        parts = [slice_batch(inputs, s, min(s + CHUNK, n)) for s in range(0, n, CHUNK)]
        runs: dict[int, tuple[Walk, Unit]] = {}
        for part in parts:
            if batch_size(part) not in runs:
                run = walk(twin, part)
                runs[batch_size(part)] = run, locate(run, checked, bias=bias, isolate=isolate)
        run, where = next(iter(runs.values()))
        own = [_has_own(u, where) for u in where.uses]
        layers = len(where.uses)
        deep = [float(scales.min()) * d for d in DEEP]
        points = len(scales) + len(deep)
        # As it is and nudged: forward, backward and Fisher.
        curves = torch.zeros(2, 3, layers, points, dtype=torch.float64)
        exact = True
        whole = {name: value.detach() for name, value in twin.named_parameters()}
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("freeze probe", total=len(scales) + len(deep))
            for j, scale in enumerate([*scales.tolist(), *deep]):
                state = scaled_state(whole, where, scale)
                for copy_, weights in enumerate((state, _nudged(state, seed))):
                    for part in parts:
                        own_run, own_unit = runs[batch_size(part)]
                        a, g, exact = _moments(own_run, own_unit, weights, part, metric, seed)
                        f = _own_curvature(own_run, own_unit, weights, part, metric)
                        curves[copy_, :, :, j] += torch.tensor([a, g, f], dtype=torch.float64) / n
                bar.advance(task)
    values, steady = curves[0], (curves[1] - curves[0]).abs() <= FLOOR * curves[0]
    measured = [
        _layer(rates.layers[k], scales, deep, values[:, k], steady[:, k], own[k])
        for k in range(layers)
    ]
    notes = list(rates.notes)
    if not exact:
        notes.append(f"gradients from {PROBES} random covectors per sample, the same at every t")
    return FreezeProbe(scales, tuple(measured), rates, n, exact, tuple(notes))


def _check_finite(model: nn.Module, inputs: Any) -> None:
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"model: parameter {name!r} has entries that are not finite")
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor) and not bool(torch.isfinite(x).all()):
            raise ValueError("inputs: expected finite numbers, some are not")


def _double(inputs: Any) -> Any:
    return pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


def _layer(
    rate: LayerRate, t: Tensor, deep: list[float], curves: Tensor, steady: Tensor, own: bool
) -> FrozenLayer:
    """Fits and verdicts; ``curves`` and ``steady`` (above rounding) are (3, r + deep)."""
    sides = {"forward": rate.input_side, "backward": rate.output_side, "fisher": own}
    swept = curves[:, : len(t)]
    clear = torch.where(steady, curves, torch.nan)
    fits, verdicts = {}, {}
    for quantity, values, kept in zip(QUANTITIES, swept, clear, strict=True):
        if not sides[quantity]:
            continue
        # t = 0 is exact and rounding is left out: neither an offset nor a floor remains.
        fit = fit_rate(t, kept[: len(t)], pure=True)
        predicted = float(getattr(rate, f"{quantity}_slope"))
        fits[quantity] = fit
        verdict = _verdict(fit, values, predicted, _slope(deep, kept[len(t) :]))
        lost = int(kept[: len(t)].isnan().sum())
        if lost and verdict.startswith("unresolved"):
            verdict = f"unresolved: at the rounding floor at {lost} of {len(t)} t"
        verdicts[quantity] = verdict
    return FrozenLayer(rate, swept[0], swept[1], swept[2], fits, verdicts)


def _slope(t: list[float], values: Tensor) -> float:
    """Log-log slope between two points; NaN where a value is not positive and normal."""
    low, high = (float(v) for v in values)
    if not min(low, high) >= torch.finfo(torch.float64).tiny or math.isnan(high):
        return math.nan
    return math.log(high / low) / math.log(t[1] / t[0])


def _verdict(fit: RateFit, values: Tensor, predicted: float, deep: float) -> str:
    if math.isnan(predicted):
        return "no prediction"
    if math.isinf(predicted):
        return "agrees" if not bool(values.any()) else "differs: nothing was to arrive here"
    if not bool(values.any()):
        return "unresolved: exactly zero at every t (a ReLU that the unit never passes?)"
    resolved = fit.verdict == "resolved"
    if resolved and abs(fit.slope - predicted) <= TOLERANCE:
        return "agrees"
    if abs(deep - predicted) <= TOLERANCE:
        swept = f"slope {fit.slope:.2f}" if resolved else "no single slope"
        return f"agrees as t → 0: {swept} in the sweep"
    if not resolved:
        return fit.verdict
    return f"differs: {fit.slope:.3f} measured, {predicted:g} predicted"
