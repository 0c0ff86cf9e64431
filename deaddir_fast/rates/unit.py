"""One unit of a network: where it lives in every tensor, and the weights that carry it.

A unit is a channel that runs through the network: entry j of the input, of every hidden layer, of
every residual stream. Each linear map sees it on its input side (the entries that hold it there)
and on its output side (entry j of its outputs; of each part where a fused map is split into parts).
Its weights are scaled by t; the couplings between the unit and the live units are cut where a map
has the unit on both sides, so that nothing live leaks into it: the setting in which rates are
stated ("Dead Directions", the known-t sweep; which couplings are cut is our choice).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from deaddir_fast import _check
from deaddir_fast.rates.ops import (
    ADDITIONS,
    BIASED_MATRIX,
    GETITEM,
    JOINS,
    MATRIX,
    MAX_POOLS,
    MOVES,
    ONE_ARGUMENT,
    SAME,
    SCATTERS,
    SOFTMAX,
    aten,
    bilinear,
    factors,
    operands,
)
from deaddir_fast.rates.walk import Walk, floating

BIAS = ("scale", "zero", "keep")


@dataclass
class LinearUse:
    """One use of a weight: z = W a.

    Attributes:
        name: of the layer, the parameter's name without ".weight".
        parameter: name of the weight.
        node: its matrix product or convolution; the bias, if any, may come later.
        output: the node that holds z with its bias.
        input: the node of a.
        inside: (i,) bool, input entries that hold the unit.
        outside: (o,) bool, output entries that hold it.
        axis: feature axis of a and z: 1 in a convolution, -2 where the weight is the left factor.
    """

    name: str
    parameter: str
    node: fx.Node
    output: fx.Node
    input: fx.Node
    inside: Tensor
    outside: Tensor
    axis: int


@dataclass
class Unit:
    """The unit in a captured model.

    Attributes:
        uses: linear maps in order of use.
        scaled: parameter -> bool, entries multiplied by t.
        cut: parameter -> bool, entries set to zero.
        masks: node -> bool, entries of its value that hold the unit (absent where none do).
        stacks: parameters that are stacks of matrices.
        notes: what could not be followed.
    """

    uses: list[LinearUse] = field(default_factory=list)
    scaled: dict[str, Tensor] = field(default_factory=dict)
    cut: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[fx.Node, Any] = field(default_factory=dict)
    stacks: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def mark(self, table: dict[str, Tensor], name: str, numbers: Tensor, like: Tensor) -> None:
        """Record entries of a parameter; in a stack of matrices (experts), the same in each."""
        if name not in table:
            table[name] = torch.zeros(like.numel(), dtype=torch.bool)
        table[name][numbers.reshape(-1)] = True
        if like.ndim == 3 and name in self.stacks:
            each = table[name].reshape(like.shape).any(0, keepdim=True)
            table[name] = each.expand(like.shape).reshape(-1).clone()


def check_unit(unit: Any) -> int | dict[str, int | None]:
    """An index >= 0, or {layer name: index or None}."""
    if isinstance(unit, Mapping):
        if not unit:
            raise _check.fail("unit", unit, "at least one layer")
        checked: dict[str, int | None] = {}
        for name, index in unit.items():
            if not isinstance(name, str):
                raise _check.fail("unit", unit, "a mapping from layer names", TypeError)
            checked[name] = None if index is None else _check.integer(f"unit[{name!r}]", index, 0)
        return checked
    return _check.integer("unit", unit, 0)


def locate(
    run: Walk,
    unit: int | dict[str, int | None],
    *,
    bias: str = "scale",
    isolate: bool = True,
    need: bool = True,
    entering: Sequence[Tensor | None] | None = None,
) -> Unit:
    """Follow a unit through a captured model and say which weights carry it.

    Args:
        run: the walk of the model.
        unit: index of the channel everywhere, or {layer: output index} for some layers only (None:
            the unit ends there, its column is scaled); other layers are left alone.
        bias: what happens to the unit's biases: scaled by t, set to zero, or kept.
        isolate: cut the couplings between the unit and the live units.
        need: refuse a model in which no weight carries the unit.
        entering: masks of the unit in the inputs, where they are known; by default entry j of the
            feature axis.

    Raises:
        ValueError: naming ``unit``: a layer that does not exist, or an index no layer has.
    """
    found = Unit()
    for node, held in zip(run.sources, entering or (), strict=False):
        if held is not None:
            found.masks[node] = held
    wanted = unit if isinstance(unit, dict) else None
    for node in run.nodes:
        if node in run.sources and isinstance(unit, int) and entering is None:
            _enter(run, found, node, unit)
        elif node.op == "placeholder":
            continue
        elif node.op == "call_function":
            if _is_use(run, node):
                _linear(run, found, node, unit, bias, isolate)
            else:
                mask = _mask(run, found, node, unit)
                if mask is not None:
                    found.masks[node] = mask
                _late_bias(run, found, node, bias)
    if wanted is not None:
        names = {u.name for u in found.uses}
        for name in wanted:
            if name not in names:
                raise _check.fail("unit", name, f"one of the linear layers {sorted(names)}")
    if need and not found.scaled:
        raise _check.fail("unit", unit, "a channel that some linear layer has")
    return found


def _enter(run: Walk, found: Unit, node: fx.Node, unit: int) -> None:
    """Mark the unit in a real-valued input."""
    value = run.values[node]
    if not floating(value) or value.ndim < 2:
        return
    convolved = any(u.target is aten.convolution.default for u in node.users)
    axis = 1 if convolved or value.ndim >= 4 else value.ndim - 1
    if unit < value.shape[axis]:
        mask = torch.zeros(value.shape, dtype=torch.bool)
        mask.select(axis, unit).fill_(True)
        found.masks[node] = mask


def _is_use(run: Walk, node: fx.Node) -> bool:
    if node.target is not aten.convolution.default and node.target not in MATRIX | BIASED_MATRIX:
        return False
    left, right, _ = factors(node)
    if node.target is aten.convolution.default:
        return right in run.parameter
    return (left in run.parameter) != (right in run.parameter)


def _linear(run: Walk, found: Unit, node: fx.Node, unit: Any, bias: str, isolate: bool) -> None:
    left, right, offset = factors(node)
    convolution = node.target is aten.convolution.default
    flipped = not convolution and left in run.parameter
    weight, source = (left, right) if flipped else (right, left)
    parameter, numbers = run.parameter[weight]
    name = parameter.removesuffix(".weight")
    tensor = run.capture.parameters[parameter]
    if tensor.ndim == 3 and not convolution:
        found.stacks.add(parameter)
    value, a = run.values[node], run.values[source]
    axis = 1 if convolution else -2 if flipped and a.ndim > 1 else -1
    inputs, outputs = a.shape[axis], value.shape[axis]
    inside = torch.zeros(inputs, dtype=torch.bool)
    mask = found.masks.get(source)
    if mask is not None:
        inside = mask.movedim(axis, 0).reshape(inputs, -1).any(1)
    outside = torch.zeros(outputs, dtype=torch.bool)
    chosen = isinstance(unit, int) or name in unit
    index = unit if isinstance(unit, int) else unit.get(name)
    if isinstance(unit, int) and _selects(run, node):
        index = None  # scores of experts are no channels
    if index is not None:
        for part in _parts(run, node, axis % value.ndim):
            if index < len(part):
                outside[part[index]] = True
        if isinstance(unit, dict) and not bool(outside.any()):
            raise _check.fail(f"unit[{name!r}]", index, f"an index below {outputs}")
    use = LinearUse(name, parameter, node, node, source, inside, outside, axis)
    found.uses.append(use)
    if bool(outside.any()):
        shape = [1] * value.ndim
        shape[axis] = outputs
        found.masks[node] = outside.reshape(shape).expand(value.shape).clone()
    if not chosen:
        return
    if convolution:
        rows, columns = _convolution_roles(node, use, numbers)
    else:
        across, down = (
            outside.expand(numbers.mT.shape if flipped else numbers.shape),
            inside[:, None],
        )
        rows, columns = across, down.expand(across.shape)
        rows, columns = (rows.mT, columns.mT) if flipped else (rows, columns)
    both = rows & columns
    if bool(both.any()) and isolate:
        found.mark(found.scaled, parameter, numbers[both], tensor)
        found.mark(found.cut, parameter, numbers[rows ^ columns], tensor)
        if not bool(tensor.reshape(-1)[numbers[both].reshape(-1)].any()):
            found.notes.append(f"{name}: the weights that carry the unit are zero")
    elif bool((rows | columns).any()):
        found.mark(found.scaled, parameter, numbers[rows | columns], tensor)
    if isinstance(offset, fx.Node) and offset in run.parameter:
        owner, entries = run.parameter[offset]
        entries = entries.expand(*entries.shape[:-1], outputs)[..., outside]
        _set_bias(run, found, owner, entries, bias)


def _convolution_roles(node: fx.Node, use: LinearUse, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of a kernel write the unit, and which read it."""
    transposed, groups = bool(operands(node)[6]), int(operands(node)[8])
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    o, i = numbers.shape[out_axis], numbers.shape[in_axis]
    if transposed:  # (i, o / groups, ...): input channel c feeds outputs of its own group
        group = torch.arange(i) // (i // groups)
        written = group[:, None] * o + torch.arange(o)[None, :]
        rows, columns = use.outside[written], use.inside[:, None].expand(i, o)
    else:  # (o, i / groups, ...)
        group = torch.arange(o) // (o // groups)
        read = group[:, None] * i + torch.arange(i)[None, :]
        rows, columns = use.outside[:, None].expand(o, i), use.inside[read]
    tail = (1,) * (numbers.ndim - 2)
    return (
        rows.reshape(*rows.shape, *tail).expand(numbers.shape),
        columns.reshape(*columns.shape, *tail).expand(numbers.shape),
    )


def _set_bias(run: Walk, found: Unit, name: str, entries: Tensor, bias: str) -> None:
    if bias == "keep" or entries.numel() == 0:
        return
    like = run.capture.parameters[name]
    found.mark(found.scaled if bias == "scale" else found.cut, name, entries, like)


def _late_bias(run: Walk, found: Unit, node: fx.Node, bias: str) -> None:
    """A bias added after the product: z + b with b a vector parameter."""
    if node.target is not aten.add.Tensor:
        return
    for one, other in (node.args[:2], node.args[1::-1]):
        if not isinstance(one, fx.Node) or one not in run.parameter:
            continue
        use = _use_behind(found, other)
        owner, entries = run.parameter[one]
        if use is None or run.capture.parameters[owner].ndim != 1 or use.output is not use.node:
            continue
        use.output = node
        mask = found.masks.get(node)
        if mask is not None:
            entries = torch.broadcast_to(entries, mask.shape)[mask].unique()
            _set_bias(run, found, owner, entries, bias)


def _use_behind(found: Unit, node: Any) -> LinearUse | None:
    while isinstance(node, fx.Node) and node.target in MOVES | SAME:
        node = node.args[0]
    return next((u for u in found.uses if u.node is node), None)


def _parts(run: Walk, node: fx.Node, axis: int) -> list[Tensor]:
    """Output entries of a map, cut into the parts it is split into (one part if it is not)."""
    value = run.values[node]
    shape = [1] * value.ndim
    shape[axis] = value.shape[axis]
    whole = torch.arange(value.shape[axis])
    seen: dict[tuple[int, ...], None] = {}
    frontier = [(node, whole.reshape(shape).expand(value.shape))]
    while frontier:
        at, numbers = frontier.pop()
        for user in at.users:
            if user.target is aten.add.Tensor and any(a in run.parameter for a in user.args[:2]):
                frontier.append((user, numbers))  # a bias
                continue
            moved = user.target in MOVES | SAME and user.args[0] is at
            if moved and isinstance(run.values[user], Tensor):
                frontier.append((user, run.linear(user)(numbers)))
            elif moved:
                pieces = run.linear(user)(numbers)
                for item in user.users:
                    if item.target is GETITEM:
                        frontier.append((item, pieces[item.args[1]]))
            else:
                seen[tuple(numbers.unique().tolist())] = None
    parts = [torch.tensor(p) for p in seen]
    if sum(len(p) for p in parts) == len(whole) and len(torch.cat(parts).unique()) == len(whole):
        return parts
    return [whole]


def _selects(run: Walk, node: fx.Node) -> bool:
    """Whether the outputs only feed a softmax or a top-k whose result is used further on."""
    frontier, ends = [node], []
    while frontier:
        for user in frontier.pop().users:
            biased = user.target is aten.add.Tensor and any(a in run.parameter for a in user.args)
            if user.target in MOVES | SAME or biased:
                frontier.append(user)
            else:
                ends.append(user)
    chosen = [u for u in ends if u.target in SOFTMAX or u.target is aten.topk.default]
    return bool(ends) and len(chosen) == len(ends) and run.output not in chosen


def _mask(run: Walk, found: Unit, node: fx.Node, unit: Any) -> Any:
    """Entries of a node's value that hold the unit, or None."""
    target, args = node.target, operands(node)
    if target is aten.embedding.default:
        return _embedded(run, node, unit)
    masks = found.masks
    arguments = [a for a in node.all_input_nodes if a in masks]
    if not arguments:
        return None
    if target is GETITEM:
        whole = masks[args[0]]
        return whole[args[1]] if isinstance(whole, tuple) else None
    value = run.values[node]
    if target in ONE_ARGUMENT or target in MAX_POOLS:
        first = args[0]
        if first not in masks:
            return None
        if target in MAX_POOLS:
            mask = masks[first]
            where = mask.flatten(2).any(-1)
            full = where.reshape(*where.shape, *[1] * (mask.ndim - 2)).expand(value[0].shape)
            return (full.clone(), torch.zeros_like(full))
        return _held(run.linear(node), masks[first], value)
    if target in JOINS:
        parts = [masks.get(a, torch.zeros(run.values[a].shape, dtype=torch.bool)) for a in args[0]]
        joined: Any = target
        return _some(joined(parts, *args[1:]))
    product = bilinear(node)
    if product is not None:
        left, right, _ = factors(node)
        live = [
            (~masks[f]).double() if f in masks else torch.ones(run.values[f].shape).double()
            for f in (left, right)
        ]
        return _some(product(*live) == 0)
    if target in SOFTMAX or not isinstance(value, Tensor):
        return None
    if target in SCATTERS:
        base, added = (args[k] for k in SCATTERS[target])
        # Routed rows: channels stay where they are.
        held = [
            masks[m].reshape(-1, masks[m].shape[-1]).any(0) for m in (base, added) if m in masks
        ]
        return _some(held[0].expand(value.shape).clone()) if held else None
    if target is aten.where.self or target in ADDITIONS or _elementwise(run, arguments, value):
        mask = torch.zeros(value.shape, dtype=torch.bool)
        for a in arguments:
            mask = mask | masks[a]
        return _some(mask)
    return None


def _elementwise(run: Walk, arguments: list[fx.Node], value: Tensor) -> bool:
    """Whether the result has the broadcast shape of its arguments."""
    try:
        shape = torch.broadcast_shapes(*(run.values[a].shape for a in arguments), value.shape)
    except RuntimeError:
        return False
    return bool(shape == value.shape)


def _held(linear: Any, mask: Any, value: Any) -> Any:
    """Entries of the result all of whose terms hold the unit."""
    live, any_term = linear((~mask).double()), linear(torch.ones(mask.shape).double())
    if isinstance(value, (tuple, list)):
        return tuple((x == 0) & (y > 0) for x, y in zip(live, any_term, strict=True))
    return _some((live == 0) & (any_term > 0))


def _some(mask: Tensor) -> Tensor | None:
    return mask if bool(mask.any()) else None


def _embedded(run: Walk, node: fx.Node, unit: Any) -> Tensor | None:
    value = run.values[node]
    if not isinstance(unit, int) or unit >= value.shape[-1]:
        return None
    mask = torch.zeros(value.shape, dtype=torch.bool)
    mask[..., unit] = True
    return mask
