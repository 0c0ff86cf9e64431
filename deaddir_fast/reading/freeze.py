"""``freeze_probe``: turn one unit of a real model down to t and measure every layer's rates."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn

from deaddir_fast import _check
from deaddir_fast.gauge.verify import at_rest
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.graph import batch_size, slice_batch
from deaddir_fast.nets.rays import ray_curvature
from deaddir_fast.rates.predict import LayerRate, Rates, predict
from deaddir_fast.rates.unit import BIAS, LinearUse, Unit, check_unit, locate
from deaddir_fast.rates.walk import Walk, walk
from deaddir_fast.theory.rate import RateFit, fit_rate

CHUNK = 64  # samples of one pass
EXACT = 64  # output entries per sample up to which every one is propagated back
PROBES = 16  # random covectors beyond that
TOLERANCE = 0.05  # of a slope that agrees
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
        verdicts: the same keys: ``"agrees"``, ``"agrees at finite t"`` (with norm statistics not
            showing yet), ``"differs: …"`` or ``"unresolved: …"`` (a floor, no window).
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
        lines = [f"{'layer':<28} {'':<9} {'measured':>16} {'predicted':>9}  verdict"]
        for layer in self.layers:
            for quantity, fit in layer.fits.items():
                lines.append(
                    f"{layer.name:<28} {quantity:<9} {fit.slope:>8.3f} ± {fit.stderr:<5.1g} "
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


def _evaluate(
    run: Walk, state: Mapping[str, Tensor], inputs: Any, watched: Sequence[fx.Node]
) -> tuple[Tensor, dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
    """Outputs, values, and for each watched node a zero added to it, whose gradient is its own."""
    values: dict[fx.Node, Any] = {}
    handles: dict[fx.Node, Tensor] = {}
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
        if node in watched:
            handles[node] = torch.zeros_like(values[node], requires_grad=True)
            values[node] = values[node] + handles[node]
    return values[run.output], values, handles


def _covectors(output: Tensor, seed: int) -> tuple[list[Tensor], bool]:
    """Covectors e with mean e eᵀ = 1 on each sample's outputs, and whether the mean is exact."""
    n, entries = output.shape[0], output[0].numel()
    if entries <= EXACT:
        eye = torch.eye(entries, dtype=output.dtype, device=output.device)
        scale = 1.0
        return [scale * e.expand(n, entries).reshape(output.shape) for e in eye], True
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(PROBES, *output.shape, dtype=torch.float64, generator=generator)
    draws = draws.to(output.device, output.dtype) / PROBES**0.5
    return list(draws), False


def _moments(
    run: Walk, unit: Unit, state: Mapping[str, Tensor], inputs: Any, likelihood: Any, seed: int
) -> tuple[list[float], list[float], bool]:
    """Sums over samples of a² (mean over tokens) and g² (sum over tokens) at the unit."""
    watched = [u.output for u in unit.uses]
    output, values, handles = _evaluate(run, state, inputs, watched)
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


def _own_directions(run: Walk, unit: Unit) -> tuple[dict[str, Tensor], list[int]]:
    """For every layer whose unit has both sides, the direction of its own weights."""
    chosen = [
        k
        for k, u in enumerate(unit.uses)
        if bool(u.inside.any()) and bool(u.outside.any()) and u.parameter in unit.scaled
    ]
    directions: dict[str, Tensor] = {}
    for row, k in enumerate(chosen):
        name = unit.uses[k].parameter
        value = run.capture.parameters[name]
        if name not in directions:
            directions[name] = torch.zeros(len(chosen), *value.shape, dtype=torch.float64)
        directions[name][row].reshape(-1)[unit.scaled[name]] = 1.0
    return directions, chosen


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
        model: any module in evaluation mode, left as it is.
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
    twin = copy.deepcopy(model).double()
    inputs = _double(inputs)
    with at_rest(twin):
        rates = predict(twin, inputs, unit=checked, bias=bias, isolate=isolate)
        parts = [slice_batch(inputs, s, min(s + CHUNK, n)) for s in range(0, n, CHUNK)]
        runs: dict[int, tuple[Walk, Unit]] = {}
        for part in parts:
            if batch_size(part) not in runs:
                run = walk(twin, part)
                runs[batch_size(part)] = run, locate(run, checked, bias=bias, isolate=isolate)
        run, where = next(iter(runs.values()))
        directions, own = _own_directions(run, where)
        layers = len(where.uses)
        forward, backward, fisher = (torch.zeros(layers, len(scales)).double() for _ in range(3))
        exact = True
        names = dict(twin.named_parameters())
        whole = {name: value.detach().clone() for name, value in names.items()}
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("freeze probe", total=len(scales))
            for j, scale in enumerate(scales.tolist()):
                state = scaled_state(whole, where, scale)
                for part in parts:
                    own_run, own_unit = runs[batch_size(part)]
                    a, g, exact = _moments(own_run, own_unit, state, part, metric, seed)
                    forward[:, j] += torch.tensor(a) / n
                    backward[:, j] += torch.tensor(g) / n
                if own:
                    with torch.no_grad():
                        for name, value in state.items():
                            names[name].copy_(value)
                    rays = ray_curvature(twin, inputs, directions, [0.0], likelihood=metric)
                    fisher[own, j] = rays.fisher[:, 0]
                bar.advance(task)
    measured = [
        _layer(rates.layers[k], scales, forward[k], backward[k], fisher[k], k in own)
        for k in range(layers)
    ]
    notes = list(rates.notes)
    if not exact:
        notes.append(f"gradients from {PROBES} random covectors per sample, the same at every t")
    return FreezeProbe(scales, tuple(measured), rates, n, exact, tuple(notes))


def _double(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


def _layer(
    rate: LayerRate, t: Tensor, forward: Tensor, backward: Tensor, fisher: Tensor, own: bool
) -> FrozenLayer:
    curves = {"forward": forward, "backward": backward, "fisher": fisher}
    sides = {"forward": rate.input_side, "backward": rate.output_side, "fisher": own}
    apparent = {
        "forward": 2 * rate.apparent[0],
        "backward": 2 * rate.apparent[2],
        "fisher": 2 * (rate.apparent[0] + rate.apparent[2]),
    }
    fits, verdicts = {}, {}
    for quantity in QUANTITIES:
        if not sides[quantity]:
            continue
        fit = fit_rate(t, curves[quantity])
        predicted = float(getattr(rate, f"{quantity}_slope"))
        fits[quantity] = fit
        verdicts[quantity] = _verdict(fit, curves[quantity], predicted, apparent[quantity])
    return FrozenLayer(rate, forward, backward, fisher, fits, verdicts)


def _verdict(fit: RateFit, values: Tensor, predicted: float, apparent: float) -> str:
    if math.isnan(predicted):
        return "no prediction"
    if math.isinf(predicted):
        return "agrees" if not bool(values.any()) else "differs: nothing was to arrive here"
    if not bool(values.any()):
        return "unresolved: exactly zero at every t (a ReLU that the unit never passes?)"
    if fit.verdict != "resolved":
        return fit.verdict
    slack = max(TOLERANCE, 2 * fit.stderr)
    if abs(fit.slope - predicted) <= slack:
        return "agrees"
    if abs(fit.slope - apparent) <= slack:
        return "agrees at finite t"
    return f"differs: {fit.slope:.3f} measured, {predicted:g} predicted"
