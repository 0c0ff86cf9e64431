"""Shifts of all features alike, which a norm that subtracts their mean, or a softmax, cannot see.

One vector added to all output rows of a map moves every output of it by one number, the same for
all features. The walk follows such shifts from each axis of each parameter ("moves alike along
this axis") through movements of data, sums and linear maps. They vanish in x − mean(x) and in a
softmax over that axis; anything else that reads them rules the symmetry out.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from deaddir_fast.gauge.layouts import aten
from deaddir_fast.gauge.scaling import Flow
from deaddir_fast.gauge.shift import ClassShift
from deaddir_fast.nets.moves import MOVES, SAME, operands

_Source = tuple[str, int]  # parameter, axis along which all its entries move alike
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_NORM, _SOFTMAX = "mean of LayerNorm", "softmax"


@dataclass
class _Mean:
    """The mean of a node over its shifted axes."""

    of: fx.Node
    sources: set[_Source]


@dataclass
class _Walk:
    run: Flow
    # Axis along which each source moves all entries of a node alike; lists for several tensors.
    marks: dict[fx.Node, Any] = field(default_factory=dict)
    failed: set[_Source] = field(default_factory=set)
    absorbed: dict[_Source, dict[str, None]] = field(default_factory=dict)
    partner: dict[str, _Source] = field(default_factory=dict)

    def marked(self, arg: Any) -> dict[_Source, int]:
        found = self.marks.get(arg) if isinstance(arg, fx.Node) else None
        return found if isinstance(found, dict) else {}

    def sources(self, arg: Any) -> set[_Source]:
        found = self.marks.get(arg) if isinstance(arg, fx.Node) else None
        if isinstance(found, _Mean):
            return found.sources
        parts = found if isinstance(found, list) else [found or {}]
        return {s for part in parts for s in part}

    def fail(self, *args: Any) -> None:
        for arg in args:
            self.failed |= self.sources(arg)

    def absorb(self, sources: set[_Source], by: str) -> None:
        for source in sources:
            self.absorbed.setdefault(source, {})[by] = None

    def ndim(self, arg: Any) -> int:
        return len(self.run.shape(arg))

    def join(self, *marks: dict[_Source, int]) -> dict[_Source, int]:
        """Shifts of a sum: what moves along two axes at once moves alike along neither."""
        out: dict[_Source, int] = {}
        for mark in marks:
            for source, axis in mark.items():
                if out.setdefault(source, axis) != axis:
                    self.failed.add(source)
        return out


def mean_shifts(run: Flow) -> list[ClassShift]:
    """The writers of centred streams: one gauge for each map, table or bias."""
    walk = _Walk(run)
    names = iter(run.capture.names)
    for node in run.capture.graph.nodes:
        if node.op == "placeholder":
            name = next(names, None)
            if name is not None and node.users and run.values[node].is_floating_point():
                shape = run.shape(node)
                walk.marks[node] = {(name, a): a for a, s in enumerate(shape) if s > 1}
        elif node.op == "output":
            walk.fail(*node.all_input_nodes)
        elif node.op == "call_function" and any(walk.sources(a) for a in node.all_input_nodes):
            mark = _step(walk, node)
            if mark:
                walk.marks[node] = mark
    return _collect(walk)


def _step(walk: _Walk, node: fx.Node) -> Any:
    target, args = node.target, operands(node)
    if target is operator.getitem:
        found = walk.marks[args[0]]
        if isinstance(found, list):
            return found[args[1]]
    elif target in SAME:
        return walk.marks[args[0]]
    elif target in MOVES:
        return _move(walk, node)
    elif target is aten.cat.default:
        return _cat(walk, node)
    elif target in _SUMS:
        return _sum(walk, node)
    elif target in _SCALES:
        return _scaled(walk, node)
    elif target is aten.mean.dim:
        return _mean(walk, node)
    elif target in (aten._softmax.default, aten._log_softmax.default):
        return _softmax(walk, node)
    elif target in (aten.mm.default, aten.bmm.default, aten.addmm.default):
        return _matmul(walk, node)
    elif target is aten.convolution.default:
        return _convolution(walk, node)
    elif target is aten.embedding.default:
        return _kept(walk, node, args[0], {1: walk.ndim(node) - 1})
    walk.fail(*node.all_input_nodes)
    return None


def _kept(walk: _Walk, node: fx.Node, arg: Any, places: dict[int, int]) -> dict[_Source, int]:
    """Marks of ``arg`` along the axes in ``places``, moved there; the others of it fail."""
    walk.fail(*(a for a in node.all_input_nodes if a is not arg))
    mark = walk.marked(arg)
    walk.failed |= walk.sources(arg) - mark.keys()
    walk.failed |= {s for s, axis in mark.items() if axis not in places}
    return {s: places[axis] for s, axis in mark.items() if axis in places}


def _move(walk: _Walk, node: fx.Node) -> Any:
    target, args = node.target, operands(node)
    x = args[0]
    before, n = walk.run.shape(x), walk.ndim(x)
    places = {a: a for a in range(n)}
    if target in _VIEWS:
        after = walk.run.shape(node)
        starts = {math.prod(after[:b]): b for b in reversed(range(len(after))) if after[b] > 1}
        places = {}
        for a, extent in enumerate(before):
            b = starts.get(math.prod(before[:a]))
            if b is not None and after[b] == extent:
                places[a] = b
    elif target is aten.permute.default:
        places = {d % n: i for i, d in enumerate(args[1])}
    elif target in (aten.t.default, aten.transpose.int):
        if n > 1:
            one, other = (0, 1) if target is aten.t.default else (d % n for d in args[1:3])
            places.update({one: other, other: one})
    elif target is aten.expand.default:
        places = {a: a + walk.ndim(node) - n for a in range(n)}
    elif target is aten.unsqueeze.default:
        dim = args[1] % (n + 1)
        places = {a: a + (a >= dim) for a in range(n)}
    elif target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
        given = args[1] if len(args) > 1 else range(n)
        dims = {d % n for d in ([given] if isinstance(given, int) else given)}
        gone = sorted(d for d in dims if before[d] == 1)
        places = {a: a - sum(d < a for d in gone) for a in range(n) if a not in gone}
    elif target in (aten.select.int, aten.unbind.int):
        dim = (args[1] if len(args) > 1 else 0) % n
        places = {a: a - (a > dim) for a in range(n) if a != dim}
    elif target is aten.index.Tensor:
        picked = [i for i, index in enumerate(args[1]) if index is not None]
        if picked != list(range(len(picked))):
            places = {}
        places = {a: a + walk.ndim(node) - n for a in places if a >= len(picked)}
    elif target not in (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default):
        places = {}
    kept = _kept(walk, node, x, places)
    value = walk.run.values[node]
    return kept if isinstance(value, Tensor) else [kept for _ in value]


def _cat(walk: _Walk, node: fx.Node) -> Any:
    tensors = [t for t in operands(node)[0] if walk.run.shape(t) != (0,)]
    n = walk.ndim(node)
    dim = (operands(node)[1] if len(operands(node)) > 1 else 0) % n
    across = {a: a for a in range(n) if a != dim or len(tensors) == 1}
    return walk.join(*(_only(walk, t, across) for t in tensors))


def _only(walk: _Walk, arg: Any, places: dict[int, int]) -> dict[_Source, int]:
    mark = walk.marked(arg)
    walk.failed |= walk.sources(arg) - mark.keys()
    walk.failed |= {s for s, axis in mark.items() if axis not in places}
    return {s: places[axis] for s, axis in mark.items() if axis in places}


def _aligned(walk: _Walk, node: fx.Node, arg: Any) -> dict[_Source, int]:
    offset = walk.ndim(node) - walk.ndim(arg)
    return _only(walk, arg, {a: a + offset for a in range(walk.ndim(arg))})


def _sum(walk: _Walk, node: fx.Node) -> Any:
    a, b = operands(node)[:2]
    centre = walk.marks.get(b) if isinstance(b, fx.Node) else None
    if isinstance(centre, _Mean):
        if centre.of is not a or node.target is not aten.sub.Tensor or node.kwargs:
            walk.fail(a, b)
            return None
        walk.absorb(centre.sources, _NORM)
        return {s: axis for s, axis in walk.marked(a).items() if s not in centre.sources}
    left, right = _aligned(walk, node, a), _aligned(walk, node, b)
    for one, other in ((left, right), (right, left)):
        _pair(walk, one, other)
    return walk.join(left, right)


def _pair(walk: _Walk, bias: dict[_Source, int], mark: dict[_Source, int]) -> None:
    """A vector that is added to the output of one map is the bias of it."""
    ((name, _), axis) = next(iter(bias.items())) if len(bias) == 1 else (("", 0), -1)
    maps = [s for s, at in mark.items() if at == axis]
    if name and walk.run.capture.parameters[name].ndim == 1 and len(maps) == len(mark) == 1:
        walk.partner.setdefault(name, maps[0])


def _scaled(walk: _Walk, node: fx.Node) -> Any:
    a, b = operands(node)[:2]
    division = node.target in (aten.div.Tensor, aten.div.Scalar)
    if (walk.sources(b) and division) or (walk.sources(a) and walk.sources(b)):
        walk.fail(a, b)
        return None
    x, factor = (a, b) if walk.sources(a) else (b, a)
    shape = walk.run.shape(factor)
    full = (1,) * (walk.ndim(node) - len(shape)) + shape
    offset = walk.ndim(node) - walk.ndim(x)
    places = {i: i + offset for i in range(walk.ndim(x)) if full[i + offset] == 1}
    return _only(walk, x, places)


def _mean(walk: _Walk, node: fx.Node) -> Any:
    x, dims = operands(node)[:2]
    n, mark = walk.ndim(x), walk.marked(x)
    over = {d % n for d in ([dims] if isinstance(dims, int) else dims or range(n))}
    if walk.ndim(node) != n or len(mark) != len(walk.sources(x)):
        walk.fail(x)
        return None
    inside = {s for s, axis in mark.items() if axis in over}
    if not inside:
        return mark
    walk.failed |= mark.keys() - inside
    return _Mean(x, inside)


def _softmax(walk: _Walk, node: fx.Node) -> Any:
    x, dim = operands(node)[:2]
    mark = walk.marked(x)
    unseen = {s for s, axis in mark.items() if axis == dim % walk.ndim(x)}
    walk.failed |= walk.sources(x) - unseen
    walk.absorb(unseen, _SOFTMAX)
    return None


def _matmul(walk: _Walk, node: fx.Node) -> Any:
    a, b = operands(node)[-2:]
    last = walk.ndim(node) - 1
    walk.fail(a)
    out = _only(walk, b, {last: last})
    if node.target is aten.addmm.default:
        bias = _aligned(walk, node, operands(node)[0])
        _pair(walk, bias, out)
        out = walk.join(out, bias)
    return out


def _convolution(walk: _Walk, node: fx.Node) -> Any:
    x, w, bias = operands(node)[:3]
    transposed, groups = operands(node)[6], operands(node)[8]
    walk.fail(x)
    out = _only(walk, w, {int(transposed): 1} if groups == 1 else {})
    if bias is not None:
        own = _only(walk, bias, {0: 1})
        _pair(walk, own, out)
        out = walk.join(out, own)
    return out


def _collect(walk: _Walk) -> list[ClassShift]:
    parameters = walk.run.capture.parameters
    alive = {s: by for s, by in walk.absorbed.items() if s not in walk.failed}
    biases = {
        source: name
        for name, source in walk.partner.items()
        if source in alive and alive.get((name, 0)) == alive[source]
    }
    carried = {(name, 0) for name in biases.values()}
    found = []
    for (weight, axis), by in alive.items():
        if (weight, axis) in carried:
            continue
        bias = biases.get((weight, axis))
        shape = parameters[weight].shape
        features = math.prod(s for a, s in enumerate(shape) if a != axis)
        dimension = features + (bias is not None)
        found.append(
            ClassShift(
                name=f"translation: {weight.removesuffix('.weight')} -> {', '.join(by)}",
                group=f"R^{dimension}",
                parameters=(weight,) if bias is None else (weight, bias),
                shape=(dimension,),
                likelihood=None,
                weight=weight,
                bias=bias,
                class_axis=axis,
            )
        )
    order = {name: i for i, name in enumerate(walk.run.capture.names)}
    return sorted(found, key=lambda g: order[g.weight])
