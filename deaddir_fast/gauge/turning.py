"""Which rescalings of pairs of units are part of a complex rescaling: rotary embeddings.

The walk for scales finds that a rotary embedding ties two units of the queries, and the same two
of the keys, to one scale. Here these units are followed from the rows of the weights through data
movement, sums and products with constants, each entry of a tensor being a combination of at most
two of them, to the product of queries and keys. Where the two entries of a pair are then
(a x - b y, b x + a y) on both sides, whatever a and b at each position, the embedding multiplies
complex numbers, and any complex factor commutes with it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from deaddir_fast.gauge.complex import ComplexRescaling
from deaddir_fast.gauge.rescaling import Rescaling, Slot
from deaddir_fast.gauge.scaling import MOVES, SAME, Flow, operands
from deaddir_fast.gauge.units import Term

aten = torch.ops.aten

# Cosines and sines may come from a computation in fp32.
_ROUNDING = 1e-6
_PRODUCT = {aten.bmm.default: 0, aten.baddbmm.default: 1}
_SCALED = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True)
class _Mixed:
    """A tensor each entry of which is a combination of at most two units.

    ``ids`` (2, *shape) hold the variables of their rows, the lower one first, 0 for none;
    ``factors`` (2, *shape) what they are multiplied by.
    """

    ids: Tensor
    factors: Tensor

    def each(self, move: Any) -> _Mixed:
        """The tensor after its data were moved."""
        return _Mixed(*(torch.stack([move(x) for x in y]) for y in (self.ids, self.factors)))


@dataclass(frozen=True)
class _Offset:
    """A bias: variables of its entries, to be identified with the rows it is added to."""

    ids: Tensor


@dataclass
class _Walk:
    run: Flow
    wanted: np.ndarray  # variables to follow
    marks: dict[fx.Node, Any] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)  # nodes that see no parameter
    failed: set[int] = field(default_factory=set)
    same: dict[int, int] = field(default_factory=dict)  # bias entry -> row it is added to
    pairs: dict[int, tuple[int, int]] = field(default_factory=dict)  # unit -> (real, imaginary)

    def fail(self, *args: Any) -> None:
        for arg in args:
            if isinstance(arg, (list, tuple)):
                self.fail(*arg)
                continue
            mark = self.marks.get(arg) if isinstance(arg, fx.Node) else arg
            if isinstance(mark, (_Mixed, _Offset)):
                self.failed |= set(mark.ids.unique().tolist())
            elif isinstance(mark, list):
                self.fail(*mark)

    def pair(self, real: int, imaginary: int) -> None:
        """Record a pair; one seen otherwise before is no pair."""
        for unit in (real, imaginary):
            if self.pairs.setdefault(unit, (real, imaginary)) != (real, imaginary):
                self.failed |= {real, imaginary, *self.pairs[unit]}


def turned(run: Flow, rescaling: Rescaling) -> list[tuple[ComplexRescaling | Rescaling, Any]]:
    """The rescaling, with the units that allow it acting by complex numbers.

    Returns:
        (claim, weaker claim or None): one or two, together on all units of ``rescaling``.
    """
    slots = rescaling.slots
    if rescaling.positive or any(
        s.outer or abs(s.exponent) != 1 or s.positions.shape[1] % 2 for s in slots
    ):
        return [(rescaling, None)]
    variables = [_variables(run, s) for s in slots]
    wanted = np.zeros(len(run.units.parameter), bool)
    for v in variables:
        wanted[v] = True
    walk = _followed(run, wanted)
    ordered = [_paired(walk, v) for v in variables]
    good = [all(o[j] is not None for o in ordered) for j in range(rescaling.shape[0])]
    found: list[tuple[ComplexRescaling | Rescaling, Any]] = []
    chosen = [j for j, yes in enumerate(good) if yes]
    if chosen:
        pairs = tuple(
            replace(s, positions=torch.tensor([_entries(run, o[j]) for j in chosen]))
            for s, o in zip(slots, ordered, strict=True)
        )
        claim = ComplexRescaling(
            name=rescaling.name.replace("rescaling", "complex rescaling", 1),
            group=f"(C^*)^{len(chosen)}",
            parameters=rescaling.parameters,
            shape=(len(chosen), 2),
            likelihood=None,
            slots=pairs,
        )
        found.append((claim, _part(rescaling, chosen)))
    rest = [j for j, yes in enumerate(good) if not yes]
    if rest:
        found.append((_part(rescaling, rest), None))
    return found


def _part(rescaling: Rescaling, units: list[int]) -> Rescaling:
    return replace(
        rescaling,
        group=f"(R^*)^{len(units)}",
        shape=(len(units),),
        slots=tuple(replace(s, positions=s.positions[units]) for s in rescaling.slots),
    )


def _parameters(run: Flow) -> dict[str, fx.Node]:
    nodes = (n for n in run.capture.graph.nodes if n.op == "placeholder")
    return dict(zip(run.capture.names, nodes, strict=False))


def _axis(run: Flow, node: fx.Node, axis: int) -> Term:
    ndim = len(run.shape(node))
    return next(t for t in run.scales[node] if t.support(ndim) <= {axis})


def _variables(run: Flow, slot: Slot) -> np.ndarray:
    """(h, m) variables of the entries of a slot."""
    term = _axis(run, _parameters(run)[slot.parameter], slot.axis)
    return term.ids.reshape(-1)[slot.positions.numpy()]


def _entries(run: Flow, variables: Iterable[int] | None) -> list[int]:
    return [run.units.index[v] for v in variables or ()]


def _paired(walk: _Walk, variables: np.ndarray) -> list[list[int] | None]:
    """For each unit its variables as (real, imaginary) pairs, None where they are none."""
    # Entries of a bias pair as the rows do that they are added to.
    rows = [[walk.same.get(v, v) for v in unit] for unit in variables.tolist()]
    found: list[list[int] | None] = []
    for unit, row in zip(variables.tolist(), rows, strict=True):
        at = dict(zip(row, unit, strict=True))
        pairs = {walk.pairs.get(r) for r in row}
        fine = not walk.failed & {*row, *unit} and None not in pairs and len(at) == len(unit)
        members = [r for pair in sorted(p for p in pairs if p) for r in pair]
        found.append([at[r] for r in members] if fine and set(members) == set(row) else None)
    return found


def _followed(run: Flow, wanted: np.ndarray) -> _Walk:
    walk = _Walk(run, wanted)
    parameters = set(_parameters(run).values())
    for node in run.capture.graph.nodes:
        if node.op == "placeholder" and node in parameters:
            mark = _seed(walk, node)
        elif node.op == "output":
            walk.fail(*node.all_input_nodes)
            continue
        else:
            if all(a in walk.constant for a in node.all_input_nodes):
                walk.constant.add(node)
            mark = _step(walk, node) if node.op == "call_function" else None
        if mark is not None:
            walk.marks[node] = mark
    return walk


def _seed(walk: _Walk, node: fx.Node) -> Any:
    shape = walk.run.shape(node)
    terms = [t for t in walk.run.scales[node] if walk.wanted[t.ids].any()]
    if not terms:
        return None
    ids = [np.broadcast_to(np.where(walk.wanted[t.ids], t.ids, 0), shape) for t in terms]
    if len(terms) > 1:  # both sides of one matrix
        walk.failed |= {int(i) for x in ids for i in np.unique(x)}
        return None
    first = torch.from_numpy(np.array(ids[0]))
    if len(shape) == 1:
        return _Offset(first)
    return _single(first)


def _single(first: Tensor) -> _Mixed:
    ids = torch.stack([torch.zeros_like(first), first])
    return _Mixed(ids, (ids > 0).to(torch.float64))


def _step(walk: _Walk, node: fx.Node) -> Any:
    target, args = node.target, operands(node)
    marked = [a for a in node.all_input_nodes if a in walk.marks]
    if not marked:
        return None
    mark = walk.marks.get(args[0]) if isinstance(args[0], fx.Node) else None
    if target is operator.getitem and isinstance(mark, list):
        return mark[args[1]]
    if len(marked) == 1 and mark is not None and target in MOVES:
        return _move(walk, node, mark)
    if len(marked) == 1 and mark is not None and target in SAME:
        if target is aten.neg.default:
            return replace(mark, factors=-mark.factors) if isinstance(mark, _Mixed) else None
        return mark
    if target in _SCALED and len(marked) == 1:
        return _scaled(walk, node, marked[0])
    if target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        return _sum(walk, node)
    if target is aten.cat.default and all(isinstance(walk.marks[a], _Mixed) for a in marked):
        return _cat(walk, node)
    if target in (aten.mm.default, aten.addmm.default) and not node.kwargs:
        return _rows(walk, node)
    if target in _PRODUCT and all(
        isinstance(a, fx.Node) and isinstance(walk.marks.get(a), _Mixed) for a in args[-2:]
    ):
        if target is aten.baddbmm.default:
            walk.fail(args[0])
        _meet(walk, walk.marks[args[-2]], walk.marks[args[-1]])
        return None
    walk.fail(*marked)
    return None


def _move(walk: _Walk, node: fx.Node, mark: Any) -> Any:
    rest = [walk.run.value(a) for a in operands(node)[1:]]
    rest = [[x.cpu() if isinstance(x, Tensor) else x for x in a] if isinstance(a, list) else a
            for a in rest]  # fmt: skip
    target: Any = node.target
    target = aten.reshape.default if target is aten.view.default else target

    def move(x: Tensor) -> Any:
        return target(x, *rest, **node.kwargs)

    if isinstance(mark, _Offset):
        moved = move(mark.ids)
        return _Offset(moved) if isinstance(moved, Tensor) else [_Offset(x) for x in moved]
    parts = [[move(x) for x in y] for y in (mark.ids, mark.factors)]
    if isinstance(parts[0][0], Tensor):
        return _Mixed(*(torch.stack(p) for p in parts))
    return [
        _Mixed(torch.stack([parts[0][0][i], parts[0][1][i]]),
               torch.stack([parts[1][0][i], parts[1][1][i]]))
        for i in range(len(parts[0][0]))
    ]  # fmt: skip


def _scaled(walk: _Walk, node: fx.Node, marked: fx.Node) -> Any:
    a, b = operands(node)[:2]
    other = b if marked is a else a
    mark = walk.marks[marked]
    divided = node.target in (aten.div.Tensor, aten.div.Scalar)
    fixed = other in walk.constant if isinstance(other, fx.Node) else True
    if not isinstance(mark, _Mixed) or not fixed or (divided and marked is b):
        walk.fail(marked)
        return None
    value = walk.run.value(other)
    value = value.detach().cpu().to(torch.float64) if isinstance(value, Tensor) else float(value)
    factors = mark.factors / value if divided else mark.factors * value
    return _Mixed(mark.ids.expand(factors.shape), factors)


def _sum(walk: _Walk, node: fx.Node) -> Any:
    a, b = operands(node)[:2]
    left = walk.marks.get(a) if isinstance(a, fx.Node) else None
    right = walk.marks.get(b) if isinstance(b, fx.Node) else None
    if node.target is aten.add.Tensor:
        if isinstance(left, _Mixed) and isinstance(right, _Offset):
            return _shifted(walk, left, right)
        if isinstance(right, _Mixed) and isinstance(left, _Offset):
            return _shifted(walk, right, left)
    if not isinstance(left, _Mixed) or not isinstance(right, _Mixed):
        walk.fail(a, b)
        return None
    if node.target is aten.sub.Tensor:
        right = replace(right, factors=-right.factors)
    return _merged(walk, left, right)


def _merged(walk: _Walk, left: _Mixed, right: _Mixed) -> _Mixed | None:
    shape = torch.broadcast_shapes(left.ids.shape, right.ids.shape)
    ids = torch.cat([left.ids.expand(shape), right.ids.expand(shape)])
    factors = torch.cat([left.factors.expand(shape), right.factors.expand(shape)])
    order = ids.argsort(dim=0, stable=True)
    ids, factors = ids.gather(0, order), factors.gather(0, order)
    for i in (1, 2, 3):  # equal variables gather in the last place that has them
        equal = (ids[i] == ids[i - 1]) & (ids[i] > 0)
        factors[i] = torch.where(equal, factors[i] + factors[i - 1], factors[i])
        ids[i - 1] = torch.where(equal, 0, ids[i - 1])
        factors[i - 1] = torch.where(equal, 0.0, factors[i - 1])
    order = ids.argsort(dim=0, stable=True)
    ids, factors = ids.gather(0, order), factors.gather(0, order)
    if ids[:2].any():
        walk.fail(left, right)
        return None
    return _Mixed(ids[2:], factors[2:])


def _shifted(walk: _Walk, mark: _Mixed, offset: _Offset) -> _Mixed | None:
    """Rows and the entries of the bias added to them act as one."""
    shape = torch.broadcast_shapes(mark.ids.shape[1:], offset.ids.shape)
    rows, entries = mark.ids[1].expand(shape), offset.ids.expand(shape)
    plain = (mark.ids[0] == 0).all() and ((mark.factors[1] == 1) | (mark.ids[1] == 0)).all()
    if not plain or ((rows > 0) != (entries > 0)).any():
        walk.fail(mark, offset)
        return None
    for entry, row in torch.stack([entries, rows]).flatten(1).unique(dim=1).T.tolist():
        if walk.same.setdefault(entry, row) != row:
            walk.failed |= {entry, row, walk.same[entry]}
    return mark


def _cat(walk: _Walk, node: fx.Node) -> _Mixed:
    tensors = operands(node)[0]
    dim = operands(node)[1] if len(operands(node)) > 1 else 0
    parts = []
    for t in tensors:
        none = torch.zeros(2, *walk.run.shape(t))
        parts.append(walk.marks.get(t) or _Mixed(none.to(torch.int64), none.to(torch.float64)))
    dim = dim if dim < 0 else dim + 1
    return _Mixed(
        torch.cat([p.ids for p in parts], dim), torch.cat([p.factors for p in parts], dim)
    )


def _rows(walk: _Walk, node: fx.Node) -> _Mixed | None:
    """Inputs times a weight, as it is: each output is a row of it at work."""
    x, w = operands(node)[-2:]
    mark = walk.marks.get(w)
    out = None
    if isinstance(mark, _Mixed):
        single = (mark.ids[0] == 0).all() and (mark.ids[1] == mark.ids[1, :1]).all()
        if single and ((mark.factors[1] == 1) | (mark.ids[1] == 0)).all():
            out = _single(mark.ids[1, :1].expand(walk.run.shape(node)))
    walk.fail(x, *(() if out is not None else (w,)))
    if node.target is aten.addmm.default:
        bias = walk.marks.get(operands(node)[0])
        if out is not None and isinstance(bias, _Offset):
            return _shifted(walk, out, bias)
        if bias is not None or (out is not None and walk.run.scale(operands(node)[0])):
            walk.fail(bias, out)
            return None
    return out


def _meet(walk: _Walk, a: _Mixed, b: _Mixed) -> None:
    """Queries (B, M, K) meet keys (B, K, N): sums over K of products of units."""
    left = a.ids.permute(1, 3, 0, 2), a.factors.permute(1, 3, 0, 2)  # (B, K, 2, positions)
    right = b.ids.permute(1, 2, 0, 3), b.factors.permute(1, 2, 0, 3)
    for side in (left, right):
        if (side[0] != side[0][..., :1]).any():
            walk.fail(a, b)
            return
    for i in range(left[0].shape[0]):
        _pair_up(walk, *((ids[i, ..., 0].numpy(), f[i].numpy()) for ids, f in (left, right)))


def _pair_up(
    walk: _Walk, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]
) -> None:
    """Find pairs of entries that mix the same two units; ids (K, 2), factors (K, 2, positions)."""
    at: dict[tuple[int, ...], list[int]] = {}
    for k, key in enumerate(np.concatenate([left[0], right[0]], 1).tolist()):
        at.setdefault(tuple(key), []).append(k)
    full = [(key, ks) for key, ks in at.items() if all(key) and len(ks) == 2]
    walk.failed |= {v for key, ks in at.items() if not (all(key) and len(ks) == 2) for v in key}
    if not full:
        return
    rows = np.array([ks for _, ks in full])
    straight, swapped = [], []
    for _, factors in (left, right):
        m = factors[rows]  # (pairs, entry, unit, positions)
        largest = _ROUNDING * np.abs(m).max((1, 2, 3), initial=0.0)

        def small(x: np.ndarray, bound: np.ndarray = largest) -> np.ndarray:
            return np.abs(x).max(1) <= bound

        straight.append(small(m[:, 0, 0] - m[:, 1, 1]) & small(m[:, 0, 1] + m[:, 1, 0]))
        swapped.append(small(m[:, 0, 1] - m[:, 1, 0]) & small(m[:, 0, 0] + m[:, 1, 1]))
    for g, (key, _) in enumerate(full):
        for side, (low, high) in enumerate((key[:2], key[2:])):
            if straight[side][g]:
                walk.pair(low, high)
            elif swapped[side][g]:
                walk.pair(high, low)
            else:
                walk.failed |= set(key)
