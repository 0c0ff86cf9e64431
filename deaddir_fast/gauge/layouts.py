"""Which unit spaces index the axes of every tensor of a forward pass.

One rule per ATen operation. An operation without a rule freezes all spaces it meets, so a missing
rule can hide a permutation but never invent one. The rules ask less than those for scales: any
elementwise function passes, sums and norms over an axis do not see its order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from deaddir_fast.gauge.scaling import Flow
from deaddir_fast.gauge.spaces import (
    Axis,
    Space,
    factors,
    freeze,
    segment,
    split,
    touch,
    unify,
    whole,
)
from deaddir_fast.nets.moves import MOVES, SAME, operands

aten = torch.ops.aten

# Per axis its factors, or None: all entries along it are equal (an axis of extent 1 among them).
Layout = tuple[Axis | None, ...]

_REDUCE = {
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.prod.default,
    aten.prod.dim_int,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.default,
    aten.all.dim,
    aten.linalg_vector_norm.default,
}
# Pooling and resizing: how many trailing axes they work on.
_POOL: dict[Any, int] = {
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten._adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool3d.default: 3,
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest2d.default: 2,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bilinear2d.default: 2,
}
_SOFTMAX = {aten._softmax.default, aten._log_softmax.default}
_LIKE = {
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}


@dataclass
class Layouts:
    """Layouts of all nodes.

    Attributes:
        run: the forward pass with its values.
        blank: constants to be taken as equal along every axis: running statistics, whose
            permutation is made up for elsewhere.
        of: layout of each node, a list for nodes with several tensors.
        parameters: layout of each parameter that is used.
        readers: (parameter, axis factors) of every contraction with a parameter.
        origin: the parameter whose data a node moves.
        both: (parameter, axis) that write what they may read elsewhere: tables of embeddings,
            kernels of depthwise convolutions.
    """

    run: Flow
    blank: Collection[fx.Node] = ()
    of: dict[fx.Node, Any] = field(default_factory=dict)
    parameters: dict[str, Layout] = field(default_factory=dict)
    readers: list[tuple[str, Axis]] = field(default_factory=list)
    both: set[tuple[str, int]] = field(default_factory=set)
    origin: dict[fx.Node, str] = field(default_factory=dict)
    _constant: set[fx.Node] = field(default_factory=set)

    def layout(self, arg: Any) -> Layout:
        """Layout of an argument, () for a number."""
        return self.of[arg] if isinstance(arg, fx.Node) else ()

    def layouts(self, arg: Any) -> list[Layout]:
        """Layouts of all tensors of an argument."""
        if not isinstance(arg, fx.Node):
            return []
        found = self.of[arg]
        return found if isinstance(found, list) else [found]

    def freeze(self, *args: Any) -> None:
        """Freeze all axes of arguments."""
        for arg in args:
            for layout in self.layouts(arg):
                for axis in layout:
                    freeze(axis or ())

    def walk(self) -> None:
        """Lay out every node of the graph."""
        names = iter(self.run.capture.names)
        for node in self.run.capture.graph.nodes:
            if node.op == "placeholder":
                name = next(names, None)
                value = self.run.values[node]
                if name is None:
                    self.of[node] = _fixed(value)
                    continue
                self.of[node] = tuple(None if s == 1 else [Space(s)] for s in value.shape)
                self.origin[node] = name
                if node.users:
                    self.parameters[name] = self.of[node]
            elif node.op == "output":
                self.freeze(*node.all_input_nodes)
            elif node.op == "get_attr" or all(a in self._constant for a in node.all_input_nodes):
                self._constant.add(node)
                self.of[node] = self._uniform(node)
            else:
                self.of[node] = self._apply(node)

    def _uniform(self, node: fx.Node) -> Any:
        """Layout of a constant: axes along which it varies are fixed."""
        value = self.run.values[node]
        if node in self.blank:
            return tuple(None for _ in value.shape)
        if isinstance(value, (list, tuple)):
            return [_varying(v) if isinstance(v, Tensor) else () for v in value]
        return _varying(value) if isinstance(value, Tensor) else ()

    def _apply(self, node: fx.Node) -> Any:
        target, args = node.target, operands(node)
        if target in {*MOVES, *SAME, operator.getitem} and args[0] in self.origin:
            self.origin[node] = self.origin[args[0]]
        if target is operator.getitem:
            found = self.of[args[0]]
            return found[args[1]] if isinstance(found, list) else self.opaque(node)
        if target in _LIKE:
            return self._uniform(node)
        if target in SAME:
            return self.layout(args[0])
        if target in MOVES:
            rule = _MOVE_RULES.get(target)
            return self.opaque(node) if rule is None else rule(self, node)
        rule = _RULES.get(target)
        if rule is None and torch.Tag.pointwise in getattr(target, "tags", ()):
            rule = _pointwise
        out = self.opaque(node) if rule is None else rule(self, node)
        for layout in out if isinstance(out, list) else [out]:
            for axis in layout:
                touch(axis or ())
        for arg in node.all_input_nodes:
            for layout in self.layouts(arg):
                for axis in layout:
                    touch(axis or ())
        return out

    def opaque(self, node: fx.Node) -> Any:
        """Freeze everything that goes into a node; what comes out is fixed."""
        self.freeze(*node.all_input_nodes)
        value = self.run.values[node]
        if isinstance(value, (list, tuple)):
            return [_fixed(v) if isinstance(v, Tensor) else () for v in value]
        return _fixed(value) if isinstance(value, Tensor) else ()

    def shape(self, arg: Any) -> tuple[int, ...]:
        """Shape of an argument, () for a number."""
        return self.run.shape(arg)

    def reads(self, arg: Any, axis: Axis | None) -> None:
        """Note that a contraction runs over an axis of a parameter."""
        if arg in self.origin and axis is not None:
            self.readers.append((self.origin[arg], axis))


def _place(extent: int) -> Axis | None:
    return None if extent <= 1 else [Space(extent, fixed=True)]


def _fixed(value: Tensor) -> Layout:
    return tuple(_place(s) for s in value.shape)


def _varying(value: Tensor) -> Layout:
    return tuple(
        None if s <= 1 or bool((value == value.narrow(a, 0, 1)).all()) else _place(s)
        for a, s in enumerate(value.shape)
    )


def _padded(layout: Layout, ndim: int) -> Layout:
    return (None,) * (ndim - len(layout)) + layout


def _joined(axes: list[Axis | None]) -> Axis | None:
    """Unify axes that run along one another."""
    given = [a for a in axes if a is not None]
    for other in given[1:]:
        unify(given[0], other)
    return given[0] if given else None


def _pointwise(walk: Layouts, node: fx.Node) -> Layout:
    ndim = len(walk.shape(node))
    inputs = [_padded(walk.layout(a), ndim) for a in node.all_input_nodes]
    return tuple(_joined([x[i] for x in inputs]) for i in range(ndim))


def _softmax(walk: Layouts, node: fx.Node) -> Layout:
    return walk.layout(operands(node)[0])


def _dims(given: Any, ndim: int) -> set[int]:
    if given is None or given == []:
        return set(range(ndim))
    return {d % ndim for d in ([given] if isinstance(given, int) else given)} if ndim else set()


def _dim(node: fx.Node, position: int) -> int:
    given: Any = node.kwargs.get("dim", 0)
    return operands(node)[position] if len(operands(node)) > position else given


def _reduce(walk: Layouts, node: fx.Node) -> Any:
    x = operands(node)[0]
    layout, ndim = walk.layout(x), len(walk.shape(x))
    if node.target is aten.linalg_vector_norm.default:
        given = operands(node)[2] if len(operands(node)) > 2 else node.kwargs.get("dim")
    else:
        given = operands(node)[1] if len(operands(node)) > 1 else node.kwargs.get("dim")
    dims = _dims(given, ndim)
    value = walk.run.values[node]
    several = not isinstance(value, Tensor)
    first = value[0] if several else value
    if several and any(u.target is operator.getitem and operands(u)[1] for u in node.users):
        return walk.opaque(node)  # which entry was the largest is a matter of order
    kept = tuple(None if d in dims else axis for d, axis in enumerate(layout))
    if first.ndim != ndim:
        kept = tuple(axis for d, axis in enumerate(layout) if d not in dims)
    return [kept, tuple(None for _ in kept)] if several else kept


def _pool(walk: Layouts, node: fx.Node) -> Any:
    spatial = _POOL[node.target]
    layout = walk.layout(operands(node)[0])
    for axis in layout[len(layout) - spatial :]:
        freeze(axis or ())
    value = walk.run.values[node]
    several = not isinstance(value, Tensor)
    shape = (value[0] if several else value).shape
    out = layout[: len(layout) - spatial] + tuple(_place(s) for s in shape[-spatial:])
    return [out, out] if several else out


def _pad(walk: Layouts, node: fx.Node) -> Layout:
    layout, pads = walk.layout(operands(node)[0]), operands(node)[1]
    out = list(layout)
    for i in range(len(pads) // 2):
        if pads[2 * i] or pads[2 * i + 1]:
            axis = len(layout) - 1 - i
            freeze(layout[axis] or ())
            out[axis] = _place(walk.shape(node)[axis])
    return tuple(out)


def _cat(walk: Layouts, node: fx.Node) -> Layout:
    tensors = operands(node)[0]
    ndim = len(walk.shape(node))
    dim = _dim(node, 1) % ndim
    inputs = [t for t in tensors if len(walk.shape(t)) == ndim]  # others are empty
    out = [None if i == dim else _joined([walk.layout(t)[i] for t in inputs]) for i in range(ndim)]
    parts = [
        Space(walk.shape(t)[dim]) if axis is None else whole(axis)
        for t in inputs
        for axis in [walk.layout(t)[dim]]
        if walk.shape(t)[dim]
    ]
    out[dim] = parts if len(parts) == 1 else [Space(walk.shape(node)[dim], parts=parts)]
    return tuple(out)


def _matmul(walk: Layouts, node: fx.Node) -> Layout:
    a, b = operands(node)[-2:]
    left, right = walk.layout(a), walk.layout(b)
    walk.reads(a, left[-1])
    walk.reads(b, right[-2])
    _joined([left[-1], right[-2]])
    batch = tuple(_joined([x, y]) for x, y in zip(left[:-2], right[:-2], strict=True))
    out: Layout = (*batch, left[-2], right[-1])
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        bias = _padded(walk.layout(operands(node)[0]), len(out))
        out = tuple(_joined([x, y]) for x, y in zip(out, bias, strict=True))
    return out


def _matvec(walk: Layouts, node: fx.Node) -> Layout:
    a, b = operands(node)[:2]
    left, right = walk.layout(a), walk.layout(b)
    walk.reads(a, left[-1])
    walk.reads(b, right[0])
    _joined([left[-1], right[0]])
    return left[:-1]


def _convolution(walk: Layouts, node: fx.Node) -> Layout:
    x, w, bias = operands(node)[:3]
    transposed, groups = operands(node)[6], operands(node)[8]
    data, kernel = walk.layout(x), walk.layout(w)
    for axis in (*data[2:], *kernel[2:]):
        freeze(axis or ())
    inside, outside = (kernel[0], kernel[1]) if transposed else (kernel[1], kernel[0])
    if groups > 1:
        # Channels are groups x channels of a group; one axis of the kernel has both factors.
        group = Space(groups)
        per = [walk.shape(w)[0] // groups, walk.shape(w)[1]]
        first: Axis = [group, *([Space(per[0])] if per[0] > 1 else [])]
        second: Axis = [group, *(kernel[1] or [])]
        if kernel[0] is not None:
            unify(kernel[0], first)
        inside, outside = (first, second) if transposed else (second, first)
        if w in walk.origin:
            walk.both.add((walk.origin[w], 0))
    walk.reads(w, inside)
    _joined([data[1], inside])
    if bias is not None:
        outside = _joined([outside, walk.layout(bias)[0]])
    return (data[0], outside, *(_place(s) for s in walk.shape(node)[2:]))


def _embedding(walk: Layouts, node: fx.Node) -> Layout:
    weight, indices = operands(node)[:2]
    walk.freeze(indices)
    rows, features = walk.layout(weight)
    if weight in walk.origin:
        walk.both.add((walk.origin[weight], 1))
    freeze(rows or ())
    return (*(_place(s) for s in walk.shape(indices)), features)


def _lstm(walk: Layouts, node: fx.Node) -> Any:
    """One layer and direction, kept whole on some CPUs: four gates of h units each."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = operands(node)[:7]
    if operands(node)[9] != 2:  # not an LSTM
        return walk.opaque(node)
    units: Axis | None = _place(walk.shape(w_hh)[1]) and [Space(walk.shape(w_hh)[1])]
    gates: Axis = [Space(4, fixed=True), *(units or ())]
    for w in (w_ih, w_hh):
        unify(walk.layout(w)[0] or (), gates)
        walk.reads(w, walk.layout(w)[1])
    for b in (b_ih, b_hh):
        if len(walk.shape(b)) == 1:
            _joined([walk.layout(b)[0], gates])
    _joined([walk.layout(x)[-1], walk.layout(w_ih)[1]])
    _joined([walk.layout(w_hh)[1], units, walk.layout(h0)[-1], walk.layout(c0)[-1]])
    for arg in (x, h0, c0):
        for axis in walk.layout(arg)[:-1]:
            freeze(axis or ())
    outputs = walk.run.values[node][:3]  # the fourth is scratch
    return [(*(_place(s) for s in v.shape[:-1]), units) for v in outputs]


def _view(walk: Layouts, node: fx.Node) -> Layout:
    before = walk.shape(operands(node)[0])
    flat: list[tuple[Space | None, int]] = []
    for axis, extent in zip(walk.layout(operands(node)[0]), before, strict=True):
        if axis is not None:
            flat += [(f, f.size) for f in factors(axis)]
        elif extent != 1:
            flat.append((None, extent))
    flat.reverse()
    out: list[Axis | None] = []
    for extent in walk.shape(node):
        items: list[tuple[Space | None, int]] = []
        need = extent
        while need > 1 and flat:
            space, n = flat.pop()
            if n > need and n % need == 0:
                if space is None:
                    flat.append((None, n // need))
                else:
                    parts = split(space.root(), need)
                    if parts is None:
                        return walk.opaque(node)
                    flat.append((parts[1], n // need))
                    space = parts[0]
                n = need
            if n == 0 or need % n:
                return walk.opaque(node)
            items.append((space, n))
            need //= n
        known = any(space is not None for space, _ in items)
        out.append([s or Space(n) for s, n in items] if known else None)
    return tuple(out)


def _permute(walk: Layouts, node: fx.Node) -> Layout:
    layout = walk.layout(operands(node)[0])
    if node.target is aten.permute.default:
        return tuple(layout[d] for d in operands(node)[1])
    out = list(layout)
    one, other = (0, 1) if node.target is aten.t.default else operands(node)[1:3]
    if len(out) > 1:
        out[one], out[other] = out[other], out[one]
    return tuple(out)


def _expand(walk: Layouts, node: fx.Node) -> Layout:
    return _padded(walk.layout(operands(node)[0]), len(walk.shape(node)))


def _repeat(walk: Layouts, node: fx.Node) -> Layout:
    ndim = len(walk.shape(node))
    layout = _padded(walk.layout(operands(node)[0]), ndim)
    return tuple(
        axis if times == 1 or axis is None else [Space(times), *axis]
        for axis, times in zip(layout, operands(node)[1], strict=True)
    )


def _unsqueeze(walk: Layouts, node: fx.Node) -> Layout:
    ndim = len(walk.shape(node))
    dim = operands(node)[1] % ndim
    layout = walk.layout(operands(node)[0])
    return (*layout[:dim], None, *layout[dim:])


def _squeeze(walk: Layouts, node: fx.Node) -> Layout:
    shape = walk.shape(operands(node)[0])
    dims = _dims(operands(node)[1] if len(operands(node)) > 1 else None, len(shape))
    layout = walk.layout(operands(node)[0])
    return tuple(a for d, a in enumerate(layout) if d not in dims or shape[d] != 1)


def _segments(walk: Layouts, node: fx.Node, dim: int, bounds: list[tuple[int, int]]) -> Any:
    """The parts of an axis between bounds; None where they cannot be told."""
    axis = walk.layout(operands(node)[0])[dim]
    if axis is None:
        return [None for _ in bounds]
    found = [segment(axis, *b) for b in bounds]
    return None if any(f is None for f in found) else [f or None for f in found]


def _slice(walk: Layouts, node: fx.Node) -> Layout:
    given = list(operands(node))
    x, dim, start, stop, step = given + [None, 0, None, None, 1][len(given) :]
    shape = walk.shape(x)
    dim %= len(shape)
    layout = walk.layout(x)
    start, stop, step = slice(start, stop, step).indices(shape[dim])
    if (start, stop, step) == (0, shape[dim], 1):
        return layout
    found = _segments(walk, node, dim, [(start, stop)]) if step == 1 and stop > start else None
    if found is None:
        freeze(layout[dim] or ())
        found = [_place(walk.shape(node)[dim])]
    return (*layout[:dim], found[0], *layout[dim + 1 :])


def _slice_scatter(walk: Layouts, node: fx.Node) -> Layout:
    """A tensor with a part of one axis replaced."""
    given = list(operands(node))
    x, part, dim, start, stop, step = given + [None, None, 0, None, None, 1][len(given) :]
    shape, layout, new = walk.shape(x), walk.layout(x), walk.layout(part)
    dim %= len(shape)
    start, stop, step = slice(start, stop, step).indices(shape[dim])
    axis, inside = layout[dim], new[dim]
    if step != 1 or axis is None:
        return walk.opaque(node)
    around = [segment(axis, *b) for b in ((0, start), (stop, shape[dim])) if b[0] < b[1]]
    if any(not f for f in around):
        return walk.opaque(node)
    between = [Space(stop - start)] if inside is None else inside
    pieces = [*around[: start > 0], between, *around[start > 0 :]]
    parts = [whole(piece) for piece in pieces if piece]
    out = [None if d == dim else _joined([layout[d], new[d]]) for d in range(len(layout))]
    out[dim] = parts if len(parts) == 1 else [Space(shape[dim], parts=parts)]
    return tuple(out)


def _split(walk: Layouts, node: fx.Node) -> Any:
    x, sizes = operands(node)[:2]
    dim = _dim(node, 2)
    shape, layout = walk.shape(x), walk.layout(x)
    dim %= len(shape)
    if isinstance(sizes, int):
        sizes = [min(sizes, shape[dim] - at) for at in range(0, shape[dim], sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    found = _segments(walk, node, dim, [(e - s, e) for e, s in zip(ends, sizes, strict=True)])
    if found is None:
        return walk.opaque(node)
    return [(*layout[:dim], part, *layout[dim + 1 :]) for part in found]


def _select(walk: Layouts, node: fx.Node) -> Any:
    """One entry of an axis: its outermost factors are told apart."""
    args = operands(node)
    layout = walk.layout(args[0])
    dim = (args[1] if len(args) > 1 else 0) % len(layout)
    freeze(layout[dim] or ())
    kept = (*layout[:dim], *layout[dim + 1 :])
    if node.target is aten.unbind.int:
        return [kept for _ in walk.run.values[node]]
    return kept


def _index(walk: Layouts, node: fx.Node) -> Layout:
    """Rows picked by index tensors on leading axes; the other axes stay."""
    x, indices = operands(node)[:2]
    picked = [i for i, index in enumerate(indices) if index is not None]
    if picked != list(range(len(picked))):
        return walk.opaque(node)
    layout = walk.layout(x)
    walk.freeze(*(indices[i] for i in picked))
    for axis in layout[: len(picked)]:
        freeze(axis or ())
    rest = layout[len(picked) :]
    shape = walk.shape(node)
    return (*(_place(s) for s in shape[: len(shape) - len(rest)]), *rest)


def _index_select(walk: Layouts, node: fx.Node) -> Layout:
    x, dim, index = operands(node)[:3]
    layout = list(walk.layout(x))
    dim %= len(layout)
    walk.freeze(index)
    freeze(layout[dim] or ())
    layout[dim] = _place(walk.shape(node)[dim])
    return tuple(layout)


_MOVE_RULES: dict[Any, Callable[[Layouts, fx.Node], Any]] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.slice.Tensor: _slice,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _split),
    **dict.fromkeys((aten.select.int, aten.unbind.int), _select),
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
}
_RULES: dict[Any, Callable[[Layouts, fx.Node], Any]] = {
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_POOL, _pool),
    **dict.fromkeys(_SOFTMAX, _softmax),
    **dict.fromkeys(
        (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default), _matmul
    ),
    aten.mv.default: _matvec,
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
    aten.mkldnn_rnn_layer.default: _lstm,
}
