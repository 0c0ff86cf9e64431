"""How a shift of a bias passes through the forward pass, and which later bias takes it back.

The same walk as for scales, for translations: each entry of each bias is a "unit" whose shift
is followed through data movement and sums to the linear maps that read it. A unit survives when
every reader has a bias of its own to absorb the shift, or when a softmax cannot see it.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from deaddir_fast.gauge.batch_norm import NormReader, Site
from deaddir_fast.gauge.scaling import MOVES, SAME, Flow, move_ids, operands
from deaddir_fast.gauge.shift import Reader, Translation
from deaddir_fast.gauge.units import Term, Units, compress

aten = torch.ops.aten

_ADD = {aten.add.Tensor, aten.sub.Tensor}
_SAME = SAME - {aten.neg.default}
# Averages over the trailing axes: how many.
_AVERAGES: dict[Any, int] = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
}
_MATMUL = {aten.mm.default, aten.addmm.default, aten.bmm.default}


@dataclass
class _Moved:
    """Units that shift a tensor: ids (0 for none), broadcastable to its shape."""

    ids: np.ndarray


@dataclass
class _Pending:
    """Output of a linear map that read shifted units and has met no bias yet.

    ``rows`` are the variables of the weight's output axis, arranged along the output; ``pairs``
    the (unit, variable of the weight's input axis) that met in the sum. An axis of extent 1 has
    no variables of its own: -1 stands for its only entry.
    """

    rows: np.ndarray
    pairs: frozenset[tuple[int, int]]


@dataclass
class _RowConstant:
    """Attention scores moved by the same amount for all keys (the last axis)."""

    units: frozenset[int]


@dataclass
class _Walk:
    run: Flow
    names: dict[fx.Node, str]
    norms: dict[fx.Node, Site] = field(default_factory=dict)
    marks: dict[fx.Node, Any] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    centred: set[int] = field(default_factory=set)
    orders: dict[tuple[int, ...], int] = field(default_factory=dict)  # rows of a bias, numbered
    # unit -> {(weight, in axis, out axis, bias, number of its rows): input positions}
    readers: dict[int, dict[tuple, list[int]]] = field(default_factory=lambda: defaultdict(dict))

    def units_in(self, mark: Any) -> set[int]:
        if isinstance(mark, list):
            return set().union(*(self.units_in(m) for m in mark)) if mark else set()
        if isinstance(mark, _Moved):
            return set(np.unique(mark.ids).tolist()) - {0}
        if isinstance(mark, _Pending):
            return {u for u, _ in mark.pairs}
        return set(mark.units) if isinstance(mark, _RowConstant) else set()

    def fail(self, *args: Any) -> None:
        for arg in args:
            if isinstance(arg, fx.Node):
                self.failed |= self.units_in(self.marks.get(arg))

    def bias(self, arg: Any) -> tuple[str, np.ndarray] | None:
        """Name and variables (aligned to its shape) of a bias used only here."""
        if not isinstance(arg, fx.Node):
            return None
        source, ids = arg, None
        while source.op == "call_function" and source.target in MOVES | _SAME:
            if len(source.users) != 1 or not isinstance(operands(source)[0], fx.Node):
                return None
            source = operands(source)[0]
        name = self.names.get(source)
        if name is None or len(source.users) != 1 or self.run.values[source].ndim != 1:
            return None
        scale = self.run.scales[arg]
        if len(scale) != 1 or not isinstance(scale[0], Term):
            return None
        ids = scale[0].ids
        distinct = np.unique(ids).size == ids.size == self.run.values[source].numel()
        return (name, ids) if distinct else None

    def absorb(self, mark: _Pending, arg: Any) -> None:
        """A pending shift meets an addend: its readers are complete if that is a fitting bias."""
        units, found = self.run.units, self.bias(arg)
        rows = mark.rows.reshape(-1)
        if found is None or np.squeeze(found[1]).shape != np.squeeze(mark.rows).shape:
            self.failed |= self.units_in(mark)
            return
        name, ids = found
        ndim = max(ids.ndim, mark.rows.ndim)
        shapes = [(1,) * (ndim - a.ndim) + a.shape for a in (ids, mark.rows)]
        if shapes[0] != shapes[1]:
            self.failed |= self.units_in(mark)
            return
        order = np.empty(rows.size, np.int64)
        order[[units.index[v] for v in ids.reshape(-1)]] = [_entry(units, v) for v in rows]
        number = self.orders.setdefault(tuple(order.tolist()), len(self.orders))
        for unit, column in sorted(mark.pairs):
            known = rows[0] if rows[0] > 0 else column
            weight, axis = units.parameter[known], units.axis[known]
            in_axis = units.axis[column] if column > 0 else 1 - axis
            out_axis = axis if rows[0] > 0 else 1 - axis
            key = (weight, in_axis, out_axis, name, number)
            self.readers[unit].setdefault(key, []).append(_entry(units, column))

    def normalise(self, site: Site) -> None:
        """Shifted channels enter a batch norm, whose own bias takes the shift back."""
        z = operands(site.centred)[0]
        mark = self.marks.get(z)
        if mark is None:
            return
        shape = (1,) * (len(self.run.shape(z)) - len(site.shape)) + site.shape
        if not isinstance(mark, _Moved) or np.broadcast_shapes(mark.ids.shape, shape) != shape:
            self.fail(z)
            return
        key = (site.norm.gamma, -1, -1, site.norm.beta, -1)
        for channel, unit in enumerate(np.broadcast_to(mark.ids, shape).reshape(-1).tolist()):
            if unit:
                self.readers[unit].setdefault(key, []).append(channel)

    def fresh(self, arg: Any) -> _Moved | None:
        """The addend's own units start here."""
        found = self.bias(arg)
        return None if found is None else _Moved(found[1])


def _entry(units: Units, variable: int) -> int:
    return units.index[variable] if variable > 0 else 0


def translations(
    run: Flow, names: dict[fx.Node, str], norms: Collection[Site] = ()
) -> list[Translation]:
    """Translation gauges of the biases.

    Args:
        run: the forward pass.
        names: names of the parameters' placeholders.
        norms: batch norms with constant statistics.
    """
    walk = _Walk(run, names, {site.centred: site for site in norms})
    for node in run.capture.graph.nodes:
        if node.op == "call_function":
            mark = _step(walk, node)
            if mark is not None:
                walk.marks[node] = mark
        elif node.op == "output":
            walk.fail(*node.all_input_nodes)
    return _collect(walk)


def _step(walk: _Walk, node: fx.Node) -> Any:
    target, args = node.target, operands(node)
    marked = [a for a in node.all_input_nodes if a in walk.marks]
    if node in walk.norms:
        return walk.normalise(walk.norms[node])
    if target in _ADD:
        return _sum(walk, node)
    if target in _MATMUL:
        return _matmul(walk, node)
    if target is aten.convolution.default:
        return _convolution(walk, node)
    if not marked:
        return None
    if target is aten.cat.default:
        return _cat(walk, node)
    mark = walk.marks.get(args[0]) if isinstance(args[0], fx.Node) else None
    if target is operator.getitem and isinstance(mark, list):
        return mark[args[1]]
    if len(marked) == 1 and mark is not None:
        if target in _SAME:
            return mark
        if target in MOVES:
            return _move(walk, node, mark)
        if target is aten.mean.dim and isinstance(mark, _Moved):
            return _mean(walk, node, mark)
        if target in _AVERAGES and isinstance(mark, _Moved):
            return _average(walk, node, mark)
        if isinstance(mark, _RowConstant):
            if target in (aten.mul.Scalar, aten.mul.Tensor, aten.div.Tensor, aten.div.Scalar):
                number = isinstance(args[1], (int, float)) or walk.run.values[args[1]].ndim == 0
                if number:
                    return mark
            if target is aten._softmax.default and args[1] in (-1, len(walk.run.shape(node)) - 1):
                return None  # absorbed
            if target is aten.eq.Scalar and abs(args[1]) == float("inf"):
                return None  # a finite shift makes nothing infinite
        if isinstance(mark, _Moved) and target is aten.mul.Scalar:
            return mark if _single_use_scaled(walk, node) else None
    walk.fail(*marked)
    return None


def _single_use_scaled(walk: _Walk, node: fx.Node) -> bool:
    """A factor on the way to scores does no harm: what matters there is only that they shift."""
    frontier = [node]
    while frontier:
        at = frontier.pop()
        for user in at.users:
            if user.target in MOVES | _SAME:
                frontier.append(user)
            elif user.target is not aten.bmm.default or operands(user)[1] is not at:
                walk.fail(operands(node)[0])
                return False
    return True


def _move(walk: _Walk, node: fx.Node, mark: Any) -> Any:
    run = walk.run
    ndim = len(run.shape(operands(node)[0]))

    def shift(ids: np.ndarray) -> Any:
        return move_ids(run, node, ids.reshape((1,) * (ndim - ids.ndim) + ids.shape))

    if isinstance(mark, _Moved):
        out = shift(mark.ids)
        return [_Moved(o) for o in out] if isinstance(out, list) else _Moved(out)
    if isinstance(mark, _Pending):
        out = shift(mark.rows)
        if isinstance(out, list) or np.unique(out).size != np.unique(mark.rows).size:
            walk.fail(operands(node)[0])
            return None
        return _Pending(out, mark.pairs)
    before, after = run.shape(operands(node)[0]), run.shape(node)
    if isinstance(mark, _RowConstant) and before[-1:] == after[-1:] and _keeps_last(node):
        return mark
    walk.fail(operands(node)[0])
    return None


def _keeps_last(node: fx.Node) -> bool:
    return node.target in (aten.view.default, aten.expand.default, aten._unsafe_view.default)


def _cat(walk: _Walk, node: fx.Node) -> Any:
    # An empty vector may stand for "nothing yet" among tensors of more axes.
    tensors = [t for t in operands(node)[0] if walk.run.shape(t) != (0,)]
    if len(tensors) == 1:
        return walk.marks.get(tensors[0])
    dim = operands(node)[1] if len(operands(node)) > 1 else 0
    marks = [walk.marks.get(t) for t in tensors]
    if not all(m is None or isinstance(m, _Moved) for m in marks):
        walk.fail(*tensors)
        return None
    parts = [
        np.broadcast_to(0 if m is None else m.ids, walk.run.shape(t))
        for t, m in zip(tensors, marks, strict=True)
    ]
    return _Moved(compress(np.concatenate(parts, dim)))


def _mean(walk: _Walk, node: fx.Node, mark: _Moved) -> Any:
    ndim = len(walk.run.shape(operands(node)[0]))
    ids = mark.ids.reshape((1,) * (ndim - mark.ids.ndim) + mark.ids.shape)
    dims = tuple(d % ndim for d in operands(node)[1])
    if any(ids.shape[d] > 1 for d in dims):
        walk.fail(operands(node)[0])
        return None
    return _Moved(ids if len(walk.run.shape(node)) == ndim else ids.squeeze(dims))


def _average(walk: _Walk, node: fx.Node, mark: _Moved) -> Any:
    spatial = _AVERAGES[node.target]
    padding = operands(node)[3] if len(operands(node)) > 3 else 0
    ids = mark.ids
    if (any(padding) if isinstance(padding, (list, tuple)) else padding) or any(
        s > 1 for s in ids.shape[-spatial:]
    ):
        walk.fail(operands(node)[0])
        return None
    return mark


def _sum(walk: _Walk, node: fx.Node) -> Any:
    a, b = operands(node)[:2]
    left = walk.marks.get(a) if isinstance(a, fx.Node) else None
    right = walk.marks.get(b) if isinstance(b, fx.Node) else None
    if node.target is aten.sub.Tensor and _equal(left, right):
        # What centres its input does not see a shift of all of it.
        walk.centred |= walk.units_in(left)
        return None
    plain = node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1
    if not plain or (left is not None and right is not None):
        walk.fail(a, b)
        return None
    mark, other = (left, b) if right is None else (right, a)
    if mark is None:
        return walk.fresh(b) or walk.fresh(a)
    if isinstance(mark, _Pending):
        walk.absorb(mark, other)
        return walk.fresh(other)
    found = walk.fresh(other)
    if found is not None:
        walk.failed |= walk.units_in(found)  # two biases on one sum: left to the first
    return mark


def _equal(a: Any, b: Any) -> bool:
    """Whether two shifts are the same at every entry."""
    if not isinstance(a, _Moved) or not isinstance(b, _Moved):
        return False
    shape = np.broadcast_shapes(a.ids.shape, b.ids.shape)
    return bool((np.broadcast_to(a.ids, shape) == np.broadcast_to(b.ids, shape)).all())


def _matmul(walk: _Walk, node: fx.Node) -> Any:
    a, b = operands(node)[-2:]
    bias = operands(node)[0] if node.target is aten.addmm.default else None
    left, right = walk.marks.get(a), walk.marks.get(b)
    if bias is not None:
        walk.fail(bias)
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            walk.fail(a, b)
            return None
    out: Any = None
    if left is not None and right is None and isinstance(left, _Moved):
        out = _read(walk, a, left.ids, b)
    elif right is not None and left is None and isinstance(right, _Moved):
        out = _attend(walk, node, right.ids)
    else:
        both_attend = node.target is aten.bmm.default and isinstance(left, _Moved)
        if both_attend and isinstance(right, _Moved):
            walk.fail(a)
            out = _attend(walk, node, right.ids)
        else:
            walk.fail(a, b)
    if bias is None:
        return out
    if isinstance(out, _Pending):
        walk.absorb(out, bias)
    elif out is not None:
        walk.failed |= walk.units_in(out)
    return walk.fresh(bias)


def _axis_variables(walk: _Walk, weight: fx.Node, axis: int) -> np.ndarray | None:
    """(size,) variables of one axis of a weight operand; -1 for an axis of extent 1."""
    shape = walk.run.shape(weight)
    scale = walk.run.scales[weight]
    if not scale or not all(isinstance(t, Term) for t in scale):
        return None
    found = [t.ids for t in scale if t.support(len(shape)) == {axis}]
    if len(found) == 1:
        return found[0].reshape(-1)
    return np.array([-1]) if not found and shape[axis] == 1 and len(scale) == 1 else None


def _pending(
    walk: _Walk, ids: np.ndarray, weight: fx.Node, in_axis: int, out_axis: int
) -> _Pending | None:
    columns = _axis_variables(walk, weight, in_axis)
    rows = _axis_variables(walk, weight, out_axis)
    if columns is None or rows is None or columns[0] == rows[0]:
        return None
    units = np.broadcast_to(ids.reshape(-1), columns.shape)
    pairs = ((int(u), int(c)) for u, c in zip(units, columns, strict=True) if u)
    return _Pending(rows, frozenset(pairs))


def _read(walk: _Walk, a: fx.Node, ids: np.ndarray, w: fx.Node) -> _Pending | None:
    """Shifted units times a weight: pairs them with the variables of its input axis."""
    ndim = len(walk.run.shape(w))
    ids = ids.reshape((1,) * (len(walk.run.shape(a)) - ids.ndim) + ids.shape)
    pending = None
    if ids.size == ids.shape[-1]:
        pending = _pending(walk, ids, w, ndim - 2, ndim - 1)
    if pending is None:
        walk.fail(a)
        return None
    return _Pending(pending.rows.reshape((1,) * (ids.ndim - 1) + (-1,)), pending.pairs)


def _attend(walk: _Walk, node: fx.Node, ids: np.ndarray) -> Any:
    """Shifted units as the right factor of a batched product: keys or values of attention."""
    a, b = operands(node)[-2:]
    ids = ids.reshape((1,) * (len(walk.run.shape(b)) - ids.ndim) + ids.shape)
    if ids.ndim == 3 and ids.shape[1] == 1 and _from_softmax(a):
        total = walk.run.values[a].sum(-1)
        if torch.allclose(total, torch.ones_like(total)):
            return _Moved(ids)
    elif ids.ndim == 3 and ids.shape[2] == 1:
        return _RowConstant(frozenset(walk.units_in(_Moved(ids))))
    walk.fail(b)
    return None


def _from_softmax(node: fx.Node) -> bool:
    while node.op == "call_function" and node.target is not aten._softmax.default:
        if node.target is aten.where.self:
            node = operands(node)[2]
        elif node.target in (aten.view.default, aten.expand.default, aten.clone.default):
            node = operands(node)[0]
        else:
            return False
    return node.op == "call_function" and operands(node)[1] in (-1, 2, 3)


def _convolution(walk: _Walk, node: fx.Node) -> Any:
    x, w, bias = operands(node)[:3]
    padding, transposed, groups = operands(node)[4], operands(node)[6], operands(node)[8]
    mark = walk.marks.get(x)
    if mark is not None:
        ndim = len(walk.run.shape(w))
        pending = None
        if isinstance(mark, _Moved) and not transposed and groups == 1 and not any(padding):
            ids = mark.ids.reshape((1,) * (ndim - mark.ids.ndim) + mark.ids.shape)
            if ids.size == ids.shape[1]:
                pending = _pending(walk, ids, w, 1, 0)
        if pending is None:
            walk.fail(x)
        elif bias is None:
            rows = pending.rows.reshape((1, -1) + (1,) * (ndim - 2))
            return _Pending(rows, pending.pairs)
        else:
            walk.absorb(pending, bias)
    walk.fail(bias)
    found = walk.fresh(bias)
    if found is None:
        return None
    return _Moved(compress(found.ids.reshape((1, -1) + (1,) * (len(walk.run.shape(x)) - 2))))


def _collect(walk: _Walk) -> list[Translation]:
    units = walk.run.units
    seen: set[int] = set()
    for mark in walk.marks.values():
        seen |= walk.units_in(mark)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for unit in sorted(seen - walk.failed):
        read = walk.readers.get(unit, {})
        key: tuple = tuple(sorted((k, len(p)) for k, p in read.items()))
        key = key or ("mean" if unit in walk.centred else "softmax",)
        groups[(units.parameter[unit], key)].append(unit)
    order = list(walk.run.capture.names)
    orders = [torch.tensor(rows) for rows in walk.orders]
    found = []
    for (source, key), members in groups.items():
        readers = tuple(
            _reader(walk, k, orders, [sorted(walk.readers[u][k]) for u in members])
            for k, _ in (key if members[0] in walk.readers else ())
        )
        moved = sorted({source, *(r.bias for r in readers)}, key=order.index)
        targets = sorted({r.bias for r in readers}, key=order.index) or key
        found.append(
            Translation(
                name=f"translation: {source} -> {', '.join(targets)}",
                group=f"R^{len(members)}",
                parameters=tuple(moved),
                shape=(len(members),),
                likelihood=None,
                source=source,
                entries=torch.tensor([units.index[u] for u in members]),
                readers=readers,
            )
        )
    return found


def _reader(
    walk: _Walk, key: tuple, orders: list[Tensor], entries: list[list[int]]
) -> Reader | NormReader:
    weight, in_axis, out_axis, bias, number = key
    positions = torch.tensor(entries)
    if in_axis < 0:
        norm = next(s.norm for s in walk.norms.values() if s.norm.gamma == weight)
        return NormReader(weight, bias, positions, norm.scale)
    return Reader(weight, bias, in_axis, out_axis, positions, orders[number])
