"""``predict``: which powers of t the layers of a network carry when a unit is turned down to t."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.gauge.inputs import made_up
from deaddir_fast.gauge.verify import at_rest
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.graph import batch_size, slice_batch
from deaddir_fast.rates.orders import Orders
from deaddir_fast.rates.primitives import WIDTH, chain, example
from deaddir_fast.rates.propagate import propagate
from deaddir_fast.rates.tropical import INF
from deaddir_fast.rates.unit import BIAS, LinearUse, Unit, check_unit, locate
from deaddir_fast.rates.walk import Walk, walk

TRACED = 2  # samples the dataflow is followed on
TRIED = (0.0, 1.0, 2.0, 3.0)  # orders of the signal a block is tried with


@dataclass(frozen=True)
class LayerRate:
    """Orders of one linear map z = W a in the unit's scale t.

    Amplitude orders: the unit's entry of a is of size t^forward, its entry of z t^forward_out, and
    the gradient of the log-likelihood there t^backward. Second moments have twice these slopes.
    NaN where an operation without a rule stands in the way; inf where nothing ever arrives.

    Attributes:
        name: of the layer.
        forward, forward_out, backward: orders as t → 0.
        apparent: (forward, forward_out, backward) while the small coefficients of norm statistics
            (means over d channels) do not show yet: what a sweep at moderate t measures.
        input_side, output_side: whether the layer has the unit among its inputs and outputs.
    """

    name: str
    forward: float
    forward_out: float
    backward: float
    apparent: tuple[float, float, float]
    input_side: bool
    output_side: bool

    @property
    def forward_slope(self) -> float:
        """Slope of A = E[a²] at the unit."""
        return 2 * self.forward

    @property
    def backward_slope(self) -> float:
        """Slope of G = E[g²] at the unit."""
        return 2 * self.backward

    @property
    def kfac_slope(self) -> float:
        """Slope of (wᵀAw)(vᵀGv) for the unit's weight v wᵀ."""
        return 2 * (self.forward + self.backward)

    @property
    def fisher_slope(self) -> float:
        """Slope of the exact uᵀFu = E[(g a)²]: the same order, whatever g and a have in common."""
        return self.kfac_slope

    @property
    def duality(self) -> tuple[float, float]:
        """Forward plus backward slope, with layer inputs and with layer outputs as activations.

        A linear chain of depth L gives 2(L-1) and 2L at every layer.
        """
        return self.kfac_slope, 2 * (self.forward_out + self.backward)


@dataclass(frozen=True)
class BlockRate:
    """What one block of a chain does to orders.

    Attributes:
        name: of the block.
        degree, weight: the unit of order k leaves with order degree·k + weight; NaN where no such
            law holds (see ``forward``).
        forward: order after the block for orders 0, 1, 2, 3 before it.
        added: what it adds to the unit's order in its place in the chain.
        own_backward: order of the gradient before the block, for a live signal and a live gradient.
        backward: the same in its place in the chain: what the block adds to the gradient's order.
    """

    name: str
    degree: float
    weight: float
    forward: tuple[float, ...]
    added: float
    own_backward: float
    backward: float


@dataclass(frozen=True)
class Rates:
    """The rate calculus of a network with one unit turned down.

    Attributes:
        layers: linear maps in order of use.
        blocks: blocks of a chain (children of an ``nn.Sequential``); empty for other models.
        forward: order of the unit at the output; inf where it has none.
        backward: order of the gradient at the unit of the input.
        additive: whether both are the sums over blocks; None where there are no blocks.
        reasons: why not.
        kernels: exact null vectors of A or G that are no dead directions: leave them out of a
            smallest eigenvalue.
        unit: the unit.
        notes: operations without a rule, weights that are zero.
    """

    layers: tuple[LayerRate, ...]
    blocks: tuple[BlockRate, ...]
    forward: float
    backward: float
    additive: bool | None
    reasons: tuple[str, ...]
    kernels: tuple[str, ...]
    unit: int | dict[str, int | None]
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> LayerRate:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {[x.name for x in self.layers]}")

    def __str__(self) -> str:
        width = max([len("layer"), *(len(x.name) for x in self.layers)])
        lines = [f"{'layer':<{width}} {'A':>5} {'G':>5} {'A⊗G':>5} {'in+out':>7}"]
        for x in self.layers:
            numbers = (x.forward_slope, x.backward_slope, x.kfac_slope, x.duality[1])
            lines.append(f"{x.name:<{width}} " + " ".join(f"{v:>5g}" for v in numbers))
        if self.additive is not None:
            lines.append("additive" if self.additive else "not additive")
        return "\n".join([*lines, *(f"  {r}" for r in (*self.reasons, *self.kernels, *self.notes))])


def parameter_orders(run: Walk, unit: Unit) -> dict[str, Tensor]:
    """Orders of all parameter entries: scaled ones 1, cut and zero ones inf, the others 0."""
    found = {}
    for name, value in run.capture.parameters.items():
        orders = torch.where(value == 0, INF, 0.0).double().reshape(-1).cpu()
        if name in unit.scaled:
            orders = orders + unit.scaled[name]
        if name in unit.cut:
            orders[unit.cut[name]] = INF
        found[name] = orders.reshape(value.shape)
    return found


def _least(orders: Any, mask: Tensor | None) -> float:
    """Smallest order among the masked entries; 0 (live) without a mask."""
    if not isinstance(orders, Tensor):
        return math.nan
    if mask is None:
        return 0.0
    return float(orders[mask].min())


def _features(orders: Any, use: LinearUse, held: Tensor) -> float:
    """Smallest order over the features that hold the unit; all of them if none does."""
    if not isinstance(orders, Tensor):
        return math.nan
    rows = orders.movedim(use.axis, -1)
    return float(rows[..., held].min() if bool(held.any()) else rows.min())


def _layer(found: Orders, use: LinearUse) -> tuple[float, float, float]:
    """(forward, forward_out, backward) of one linear map."""
    gradient = found.gradient.get(use.output)
    return (
        _features(found.value.get(use.input), use, use.inside),
        _features(found.value.get(use.output), use, use.outside),
        INF if gradient is None else _features(gradient, use, use.outside),
    )


def trace(
    model: nn.Module, inputs: Any, unit: int | dict[str, int | None], bias: str, isolate: bool
) -> tuple[Walk, Unit]:
    """Capture a model on a few samples and follow the unit."""
    n = batch_size(inputs)
    if n == 0:
        raise _check.fail("inputs", inputs, "at least one sample")
    run = walk(model, slice_batch(inputs, 0, min(n, TRACED)))
    return run, locate(run, unit, bias=bias, isolate=isolate)


def predict(
    blocks: Any,
    inputs: Any = None,
    *,
    unit: int | Mapping[str, int | None] = 0,
    bias: str = "scale",
    isolate: bool = True,
    likelihood: Any = None,
) -> Rates:
    """Rates of every layer when the weights of one unit are scaled by t, all else live.

    Orders are followed through the dataflow exactly, entry by entry: a sum takes the smaller
    order, a product adds them, a function acts by its first Taylor term at 0; gradients go the same
    way in reverse, through every route there is (values, gates, attention scores, norm statistics,
    skips). Coefficients are generic: what cancels identically is not seen. From these follow the
    known rates ("Dead Directions", arXiv 2606.05957): a linear chain has A ~ t^{2(l-1)} and
    G ~ t^{2(L-l)}; blocks of degree q and weight e take order k to qk + e, so that rates add only
    where every q is 1; a skip keeps the shortest path; attention's scores cap the gradient's slope
    at min(4k, 4p+8); LayerNorm mixes channels and restarts the forward rate.

    Args:
        blocks: a module; or a list (or comma-separated string) of primitives and modules, see
            ``deaddir_fast.theory.primitives``.
        inputs: a batch, samples leading (in fp64 for a list); if None made up from a module's
            first layer, or (2, 3, 4) numbers (2 samples, 3 tokens) for a list of primitives.
        unit: channel index in every layer, or {layer name: output index} (None: the unit ends at
            that layer's input).
        bias: the unit's biases: ``"scale"`` by t, set to ``"zero"``, or ``"keep"``.
        isolate: cut the couplings between the unit and the live units in maps that have it on both
            sides, the setting in which the rates are stated; otherwise its whole rows and columns
            are scaled and live signals leak in.
        likelihood: name or ``Likelihood`` of the head, for its exact null vector
            (``"categorical"`` has one); the rates of the unit's entries are those of any head.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: for more than 64 different orders within one tensor.
    """
    if bias not in BIAS:
        raise _check.fail("bias", bias, f"one of {', '.join(map(repr, BIAS))}")
    checked = check_unit(unit)
    head = None if likelihood is None else likelihoods.get(likelihood)
    given = isinstance(blocks, nn.Module)
    model = blocks if given else chain(blocks)
    if inputs is None:
        if not given and isinstance(checked, int) and checked >= WIDTH:
            raise _check.fail("unit", unit, f"an index below {WIDTH} for a list of primitives")
        inputs = made_up(model) if given else example(model)
    with at_rest(model):
        run, where = trace(model, inputs, checked, bias, isolate)
        orders = parameter_orders(run, where)
        exact = propagate(run, orders, where.masks, leaks=True)
        calm = propagate(run, orders, where.masks, leaks=False)
        pieces, reasons = _blocks(model, inputs, checked, bias, isolate)
    layers = tuple(
        LayerRate(
            use.name,
            *_layer(exact, use),
            apparent=_layer(calm, use),
            input_side=bool(use.inside.any()),
            output_side=bool(use.outside.any()),
        )
        for use in where.uses
    )
    unknown = tuple(dict.fromkeys(exact.unknown))
    notes = list(where.notes) + [
        f"no rule for {u}: orders behind it are not known" for u in unknown
    ]
    return Rates(
        layers=layers,
        blocks=tuple(pieces),
        forward=_at_output(run, exact, where),
        backward=_at_input(run, exact, where),
        additive=None if not pieces else not reasons,
        reasons=tuple(reasons),
        kernels=tuple(_kernels(model, head, layers)),
        unit=checked,
        notes=tuple(notes),
    )


def _kernels(
    model: nn.Module, head: likelihoods.Likelihood | None, layers: tuple[LayerRate, ...]
) -> Iterator[str]:
    """Exact null vectors: that of a centred LayerNorm output, and that of a softmax head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            gain = module.weight
            dead = [] if gain is None else torch.nonzero(gain == 0).flatten().tolist()
            vector = f"e_i at γ_i = 0 (i = {dead})" if dead else "γ⁻¹" if gain is not None else "1"
            where = name or "the LayerNorm"
            yield f"{where}: covariance of its output has the null vector {vector}"
    if head is not None and head.name == "categorical" and layers:
        yield (
            "softmax head: G of the logits has the null vector 1; p unit weights below them it is "
            "(t^p, …, t^p, 1), the last entry the unit's, so that deflating it removes the dead "
            "direction itself: read the unit's entry of G"
        )


def _at_output(run: Walk, found: Orders, unit: Unit) -> float:
    mask = unit.masks.get(run.output)
    return INF if mask is None else _least(found.value[run.output], mask)


def _at_input(run: Walk, found: Orders, unit: Unit) -> float:
    best = INF
    for node in run.sources:
        if node in unit.masks and node in found.gradient:
            best = min(best, _least(found.gradient[node], unit.masks[node]))
    return best


def _blocks(
    model: nn.Module, inputs: Any, unit: int | dict[str, int | None], bias: str, isolate: bool
) -> tuple[list[BlockRate], list[str]]:
    """Every child of a chain by itself, and where the chain is not the sum of its blocks."""
    if not isinstance(model, nn.Sequential) or not isinstance(unit, int):
        return [], []
    x = slice_batch(inputs, 0, min(batch_size(inputs), TRACED))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return [], []
    parts = []
    for name, block in model.named_children():
        with torch.no_grad():
            after = block(x)
        if not isinstance(after, Tensor):
            return [], []
        parts.append((f"{name} ({type(block).__name__})", block, x))
        x = after
    return _chained(parts, unit, bias, isolate)


def _chained(
    parts: Sequence[tuple[str, nn.Module, Tensor]], unit: int, bias: str, isolate: bool
) -> tuple[list[BlockRate], list[str]]:
    runs, entering = [], None
    for _, block, x in parts:
        run = walk(block, x)
        where = locate(run, unit, bias=bias, isolate=isolate, need=False, entering=entering)
        entering = [where.masks.get(run.output)]
        runs.append((run, where, parameter_orders(run, where)))

    def forward(k: int, order: float) -> float:
        run, where, orders = runs[k]
        return _at_output(
            run, propagate(run, orders, where.masks, leaks=True, entering=order), where
        )

    def backward(k: int, order: float, gradient: float) -> float:
        run, where, orders = runs[k]
        found = propagate(run, orders, where.masks, leaks=True, entering=order, leaving=gradient)
        held = any(node in where.masks for node in run.sources)
        return _at_input(run, found, where) if held else 0.0  # what enters is live

    reached = [0.0]
    for k in range(len(parts)):
        reached.append(forward(k, reached[-1]) if math.isfinite(reached[-1]) else reached[-1])
    gradient = 0.0
    pieces: list[BlockRate] = []
    for k in reversed(range(len(parts))):
        tried = tuple(forward(k, p) for p in TRIED)
        steps = [b - a for a, b in pairwise(tried)]
        affine = all(s == steps[0] for s in steps)
        before = backward(k, reached[k], gradient) if math.isfinite(gradient) else gradient
        pieces.append(
            BlockRate(
                parts[k][0],
                steps[0] if affine else math.nan,
                tried[0] if affine else math.nan,
                tried,
                reached[k + 1] - reached[k],
                backward(k, 0.0, 0.0),
                before - gradient,
            )
        )
        gradient = before
    pieces.reverse()
    return pieces, [r for p in pieces for r in _reasons(p)]


def _reasons(block: BlockRate) -> Iterator[str]:
    """Why a block does not add its own orders in its place in the chain."""
    own = block.forward[0]
    if math.isfinite(block.added) and block.added != own:
        if math.isnan(block.degree):
            orders = ", ".join(f"{v:g}" for v in block.forward)
            yield f"{block.name}: orders 0, 1, 2, 3 become {orders}: no law qk + e"
        elif block.degree == 0:
            yield (
                f"{block.name}: order {block.weight:g} whatever enters "
                "(a bias, a norm's mean or a constant term)"
            )
        else:
            yield (
                f"{block.name}: degree {block.degree:g}: order k becomes "
                f"{block.degree:g}k + {block.weight:g}"
            )
    if block.backward != block.own_backward and math.isfinite(block.own_backward):
        yield (
            f"{block.name}: adds {block.backward:g} to the gradient's order in its place, "
            f"{block.own_backward:g} by itself (gates, scores or norms read the forward signal)"
        )
