"""How log scales pass through the operations of a captured forward pass.

One rule per ATen operation: given the scales of the arguments, the scale of the result and the
equations under which the operation commutes with them. An operation without a rule is required
to see no scaling at all, so a missing rule can hide a symmetry but never invent one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from deaddir_fast.gauge.units import Scale, Term, Units, combined, compress, negated
from deaddir_fast.nets.graph import Capture
from deaddir_fast.nets.moves import MOVES, SAME, operands

aten = torch.ops.aten

_AXIS_MOVES = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
}
_STACK_MOVES = {aten.permute.default, aten.transpose.int, aten.view.default}
_KINKED = {aten.relu.default, aten.abs.default}
_COMPARE_SCALAR = {
    aten.gt.Scalar,
    aten.ge.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.eq.Scalar,
    aten.ne.Scalar,
}
_COMPARE = {
    aten.gt.Tensor,
    aten.ge.Tensor,
    aten.lt.Tensor,
    aten.le.Tensor,
    aten.eq.Tensor,
    aten.ne.Tensor,
    aten.maximum.default,
    aten.minimum.default,
}
_REDUCE = {aten.mean.dim, aten.sum.dim_IntList, aten.mean.default, aten.sum.default}
_EXTREME = {aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim}
# Spatial pooling and resizing: number of trailing axes worked on, and whether it has a kink.
_POOL: dict[Any, tuple[int, bool]] = {
    aten.max_pool2d_with_indices.default: (2, True),
    aten.max_pool3d_with_indices.default: (3, True),
    aten.adaptive_max_pool2d.default: (2, True),
    aten.avg_pool1d.default: (1, False),
    aten.avg_pool2d.default: (2, False),
    aten.avg_pool3d.default: (3, False),
    aten._adaptive_avg_pool2d.default: (2, False),
    aten._adaptive_avg_pool3d.default: (3, False),
    aten.upsample_nearest2d.vec: (2, False),
    aten.upsample_nearest2d.default: (2, False),
    aten.upsample_bilinear2d.vec: (2, False),
}
_ZERO_FILL = {
    aten.full.default,
    aten.full_like.default,
    aten.zeros.default,
    aten.zeros_like.default,
}


@dataclass
class Flow:
    """Values, scales and equations of one forward pass.

    Attributes:
        values: concrete value of every node on the example inputs.
        scales: log scale of every node; a list for nodes with several tensors.
        zeros: nodes that are literally zero, hence of any scale.
        units: the variables and their equations.
        first_use: place in the graph of the first sum or product each parameter enters.
        repeat: times the inputs have to be repeated for a choice among entries to reach all.
        unseen: some expert saw no input, so that nothing is known about its symmetries.
    """

    capture: Capture
    values: dict[fx.Node, Any] = field(default_factory=dict)
    scales: dict[fx.Node, Any] = field(default_factory=dict)
    zeros: set[fx.Node] = field(default_factory=set)
    units: Units = field(default_factory=Units)
    first_use: dict[str, int] = field(default_factory=dict)
    repeat: int = 1
    unseen: bool = False

    def value(self, arg: Any) -> Any:
        """Replace nodes in an argument by their values."""
        return fx.map_arg(arg, lambda n: self.values[n])

    def scale(self, arg: Any) -> Scale:
        """Scale of an argument: none for numbers and constants."""
        if not isinstance(arg, fx.Node):
            return []
        scale = self.scales[arg]
        return scale if not scale or isinstance(scale[0], Term) else [t for s in scale for t in s]

    def is_zero(self, arg: Any) -> bool:
        """Whether an argument is literally zero."""
        if isinstance(arg, fx.Node):
            return arg in self.zeros
        return isinstance(arg, (int, float)) and arg == 0

    def shape(self, arg: Any) -> tuple[int, ...]:
        """Shape of an argument, () for a number."""
        value = self.values[arg] if isinstance(arg, fx.Node) else arg
        return tuple(value.shape) if isinstance(value, Tensor) else ()


def _first_uses(graph: fx.Graph, names: tuple[str, ...]) -> dict[str, int]:
    nodes = list(graph.nodes)
    holders: dict[fx.Node, str] = dict(zip(nodes, names, strict=False))
    found: dict[str, int] = {}
    for place, node in enumerate(nodes[len(names) :]):
        for argument in node.all_input_nodes:
            if argument in holders:
                if node.target in MOVES | SAME:
                    holders[node] = holders[argument]
                else:
                    found.setdefault(holders[argument], place)
    return found


def _stacked(graph: fx.Graph, names: tuple[str, ...]) -> set[str]:
    """Parameters that are stacks of matrices, one for each entry of the first axis."""
    nodes = list(graph.nodes)
    holders: dict[fx.Node, str] = dict(zip(nodes, names, strict=False))
    found: set[str] = set()
    for node in nodes[len(names) :]:
        for argument in node.all_input_nodes:
            if argument in holders:
                if node.target in _STACK_MOVES | SAME:
                    holders[node] = holders[argument]
                elif rule_of(node.target) is grouped:
                    found.add(holders[argument])
    return found


def _spread_choice(run: Flow, node: fx.Node) -> tuple[Tensor, Tensor]:
    """A top-k choice that takes every entry in turn, overlapping from one row to the next.

    Which entries are chosen is data. A symmetry has to hold whatever it is, so that following
    the pass for a choice that reaches all of them forgoes nothing and overlooks none.
    """
    values, k = run.values[operands(node)[0]], operands(node)[1]
    dim = (operands(node)[2] if len(operands(node)) > 2 else -1) % values.ndim
    count = values.shape[dim]
    rows = max(values.numel() // count, 1)
    start = torch.arange(rows, device=values.device)[:, None]
    chosen = (start + torch.arange(k, device=values.device)) % count
    shape = [s for d, s in enumerate(values.shape) if d != dim]
    indices = chosen.reshape(*shape, k).movedim(-1, dim)
    run.repeat = max(run.repeat, -(-count // rows))
    return values.gather(dim, indices), indices


def flow(capture: Capture, inputs: Any, moving: Mapping[fx.Node, str] | None = None) -> Flow:
    """Run the forward pass on ``inputs`` (those of the capture), propagating scales.

    ``moving`` names constants that scale like parameters (running means of batch norms).
    """
    run = Flow(capture, first_use=_first_uses(capture.graph, capture.names))
    stacked = _stacked(capture.graph, capture.names)
    tensors = iter([*capture.parameters.items(), *((None, x) for x in capture.bind(inputs))])
    value: Any
    with torch.no_grad():
        for node in capture.graph.nodes:
            if node.op == "placeholder":
                name, value = next(tensors)
                run.values[node] = value
                run.scales[node] = []
                if name is not None and node.users and value.is_floating_point():
                    run.scales[node] = run.units.declare(name, value, name in stacked)
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(capture.module)
                run.values[node] = value
                label = (moving or {}).get(node)
                run.scales[node] = [] if label is None else run.units.declare(label, value)
            elif node.op == "output":
                for arg in node.all_input_nodes:
                    run.units.require_zero(run.scale(arg))
            else:
                if node.target is aten.topk.default and run.shape(operands(node)[0]):
                    value = _spread_choice(run, node)
                else:
                    value = node.target(*run.value(operands(node)), **run.value(node.kwargs))
                run.values[node] = value
                run.scales[node] = _apply(run, node)
    return run


def _apply(run: Flow, node: fx.Node) -> Any:
    target, args = node.target, operands(node)
    if target is operator.getitem:
        scale = run.scales[args[0]]
        several = scale and not isinstance(scale[0], Term)
        return scale[args[1]] if several else []
    if target in _ZERO_FILL:
        fill = args[1] if target in (aten.full.default, aten.full_like.default) else 0
        if fill == 0:
            run.zeros.add(node)
        return []
    if all(not run.scale(a) for a in node.all_input_nodes):
        if any(a in run.zeros for a in node.all_input_nodes) and target in MOVES | SAME:
            run.zeros.add(node)
        return []
    if target in SAME and run.values[node].is_floating_point():
        return run.scale(args[0])
    if target in MOVES:
        return move(run, node, run.scale(args[0]))
    rule = rule_of(target)
    if rule is not None:
        return rule(run, node)
    for a in node.all_input_nodes:
        run.units.require_zero(run.scale(a))
    return []


def _on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def move_ids(run: Flow, node: fx.Node, ids: np.ndarray) -> Any:
    """Apply the movement of ``node`` to full-size or axis-compressed ids of its first argument."""
    args = tree_map(_on_cpu, run.value(operands(node)))
    if node.target not in _AXIS_MOVES:
        ids = np.broadcast_to(ids, run.shape(operands(node)[0]))
    # Ids lie contiguously where the values may have been strided: a view becomes a reshape.
    target: Any = node.target
    target = aten.reshape.default if target is aten.view.default else target
    out = target(torch.from_numpy(np.array(ids)), *args[1:], **run.value(node.kwargs))
    if isinstance(out, Tensor):
        return compress(out.numpy())
    return [compress(o.numpy()) for o in out]


def move(run: Flow, node: fx.Node, scale: Scale) -> Any:
    """Move a scale along with the data; parts cut out of an axis no longer mix with the rest."""
    value = run.values[node]
    ndim = len(run.shape(operands(node)[0]))
    full = [
        Term(t.coefficient, t.ids.reshape((1,) * (ndim - t.ids.ndim) + t.ids.shape)) for t in scale
    ]
    if isinstance(value, Tensor):
        out = [Term(t.coefficient, move_ids(run, node, t.ids)) for t in full]
        if value.numel() < run.values[operands(node)[0]].numel():
            run.units.mark_members(out)
        return out
    parts: list[Scale] = [[] for _ in value]
    for t in full:
        for part, ids in zip(parts, move_ids(run, node, t.ids), strict=True):
            part.append(Term(t.coefficient, ids))
    for part in parts:
        run.units.mark_members(part)
    return parts


def _kinked(run: Flow, node: fx.Node) -> Scale:
    scale = run.scale(operands(node)[0])
    _elementwise(run, scale, len(run.shape(node)))
    run.units.mark_positive(scale)
    return scale


def _elementwise(run: Flow, scale: Scale, ndim: int) -> None:
    run.units.distinguish(scale, range(ndim), ndim)


def _clamp(run: Flow, node: fx.Node) -> Scale:
    bounds = [b for b in (*operands(node)[1:], *node.kwargs.values()) if b is not None]
    if any(b != 0 for b in bounds):
        return _opaque(run, node)
    return _kinked(run, node)


def _opaque(run: Flow, node: fx.Node) -> Scale:
    for a in node.all_input_nodes:
        run.units.require_zero(run.scale(a))
    return []


def _compare_scalar(run: Flow, node: fx.Node) -> Scale:
    if operands(node)[1] != 0:
        return _opaque(run, node)
    scale = run.scale(operands(node)[0])
    _elementwise(run, scale, len(run.shape(node)))
    if node.target not in (aten.eq.Scalar, aten.ne.Scalar):
        run.units.mark_positive(scale)
    return []


def _equal(run: Flow, a: Any, b: Any) -> Scale:
    if run.is_zero(a):
        return run.scale(b)
    if not run.is_zero(b):
        run.units.require_zero(run.scale(a) + negated(run.scale(b)))
    return run.scale(a) or run.scale(b)


def _add(run: Flow, node: fx.Node) -> Scale:
    return _equal(run, operands(node)[0], operands(node)[1])


def _compare(run: Flow, node: fx.Node) -> Scale:
    scale = _equal(run, operands(node)[0], operands(node)[1])
    both = run.scale(operands(node)[0]) + run.scale(operands(node)[1])
    _elementwise(run, both, len(run.shape(node)))
    run.units.mark_positive(both)
    return scale if node.target in (aten.maximum.default, aten.minimum.default) else []


def _where(run: Flow, node: fx.Node) -> Scale:
    condition, a, b = operands(node)
    run.units.require_zero(run.scale(condition))
    scale = _equal(run, a, b)
    ndim = len(run.shape(node))
    pad = ndim - len(run.shape(condition))
    axes = [i + pad for i, s in enumerate(run.shape(condition)) if s > 1]
    run.units.distinguish(run.scale(a) + run.scale(b), axes, ndim)
    return scale


def _product(run: Flow, node: fx.Node) -> Scale:
    a, b = operands(node)[:2]
    if run.is_zero(a) or run.is_zero(b):
        run.zeros.add(node)
        return []
    ndim = len(run.shape(node))
    for one, other in ((a, b), (b, a)):
        shape = run.shape(other)
        axes = [i + ndim - len(shape) for i, s in enumerate(shape) if s > 1]
        run.units.distinguish(run.scale(one), axes, ndim)
    second = run.scale(b)
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        second = negated(second)
    return combined(run.scale(a) + second)


def _power(exponent: Fraction | None) -> Callable[[Flow, fx.Node], Scale]:
    def rule(run: Flow, node: fx.Node) -> Scale:
        p = exponent
        if p is None:
            given = operands(node)[1]
            if not isinstance(given, (int, float)) or not float(2 * given).is_integer():
                return _opaque(run, node)
            p = Fraction(given)
        scale = run.scale(operands(node)[0])
        _elementwise(run, scale, len(run.shape(node)))
        if p.denominator != 1:
            run.units.mark_positive(scale)
        return [t.times(p) for t in scale] if p else []

    return rule


def _dims(node: fx.Node, ndim: int) -> list[int]:
    given = operands(node)[1] if len(operands(node)) > 1 else None
    if isinstance(given, int):
        given = [given]
    return [d % ndim for d in given] if given else list(range(ndim))


def _reduce(run: Flow, node: fx.Node) -> Any:
    ndim = len(run.shape(operands(node)[0]))
    dims = _dims(node, ndim) if ndim else []
    scale = run.units.require_constant(run.scale(operands(node)[0]), dims, ndim)
    value = run.values[node]
    out = value if isinstance(value, Tensor) else value[0]
    if out.ndim != ndim:
        scale = [
            Term(
                t.coefficient,
                t.ids.reshape((1,) * (ndim - t.ids.ndim) + t.ids.shape).squeeze(tuple(dims)),
            )
            for t in scale
        ]
    if node.target in _EXTREME:
        _elementwise(run, scale, out.ndim)
        run.units.mark_positive(scale)
    return scale if isinstance(value, Tensor) else [scale, []]


def _pool(run: Flow, node: fx.Node) -> Any:
    spatial, kink = _POOL[node.target]
    scale = run.scale(operands(node)[0])
    ndim = len(run.shape(operands(node)[0]))
    scale = run.units.require_constant(scale, range(ndim - spatial, ndim), ndim)
    if kink:
        _elementwise(run, scale, ndim)
        run.units.mark_positive(scale)
    return [scale, []] if not isinstance(run.values[node], Tensor) else scale


def _pad(run: Flow, node: fx.Node) -> Scale:
    if len(operands(node)) > 2 and operands(node)[2] != 0:
        return _opaque(run, node)
    ndim = len(run.shape(operands(node)[0]))
    padded = range(ndim - len(operands(node)[1]) // 2, ndim)
    return run.units.require_constant(run.scale(operands(node)[0]), padded, ndim)


def _cat(run: Flow, node: fx.Node) -> Scale:
    # An empty vector may stand for "nothing yet" among tensors of more axes.
    tensors = [t for t in operands(node)[0] if run.shape(t) != (0,)]
    dim = operands(node)[1] if len(operands(node)) > 1 else 0
    shapes = [run.shape(t) for t in tensors]
    out: Scale = []
    for i, tensor in enumerate(tensors):
        for term in run.scale(tensor):
            parts = [np.zeros(s, np.int64) for s in shapes]
            parts[i] = np.broadcast_to(term.ids, shapes[i])
            out.append(Term(term.coefficient, compress(np.concatenate(parts, dim))))
        run.units.mark_members(run.scale(tensor))
    return out


def _contract(run: Flow, a: Scale, b: Scale, extent: tuple[int, int]) -> Scale:
    """Scale of (..., M, K) times (..., K, O), given ids aligned to these."""
    left = [Term(t.coefficient, t.ids[..., None]) for t in a]
    right = [Term(t.coefficient, t.ids[..., None, :, :]) for t in b]
    inner = [t for t in left + right if t.ids.shape[-2] > 1]
    out = [t for t in left + right if t.ids.shape[-2] == 1]
    if min(extent) > 1:
        # A constant along K could be moved between the axes of a weight without changing it.
        run.units.require_zero(inner)
    else:
        out += run.units.require_constant(inner, [-2], max((t.ids.ndim for t in inner), default=2))
    return [Term(t.coefficient, t.ids.squeeze(-2)) for t in out]


def _aligned(scale: Scale, ndim: int) -> Scale:
    return [
        Term(t.coefficient, t.ids.reshape((1,) * (ndim - t.ids.ndim) + t.ids.shape)) for t in scale
    ]


def _matmul(run: Flow, node: fx.Node) -> Scale:
    bias = operands(node)[0] if node.target in (aten.addmm.default, aten.baddbmm.default) else None
    a, b = operands(node)[-2:]
    ndim = len(run.shape(a))
    if ndim == 3:
        run.units.distinguish(run.scale(a) + run.scale(b), [0], 3)
    sizes = (run.shape(a)[-2], run.shape(b)[-1])
    out = _contract(run, _aligned(run.scale(a), ndim), _aligned(run.scale(b), ndim), sizes)
    if bias is not None and node.kwargs.get("beta", 1) != 0:
        run.units.require_zero(out + negated(run.scale(bias)))
    return out


def grouped(run: Flow, node: fx.Node) -> Scale:
    """Rows (S, K), in groups of consecutive ones, times the matrix (K, O) of their group."""
    a, b = operands(node)[:2]
    ends: Any = operands(node)[2] if len(operands(node)) > 2 else node.kwargs.get("offs")
    given = [*operands(node)[3:], *(v for k, v in node.kwargs.items() if k != "offs")]
    if ends is None or any(x is not None for x in given) or len(run.shape(a)) != 2:
        return _opaque(run, node)
    rows, matrices = run.shape(a)[0], run.shape(b)[0]
    last = run.values[ends].cpu().numpy()
    group = np.searchsorted(last, np.arange(rows), side="right")
    if last[-1] != rows or np.unique(group).size < matrices:
        run.unseen = True
        return _opaque(run, node)
    run.units.distinguish(run.scale(b), [0], 3)
    left = [Term(t.coefficient, t.ids[:, None]) for t in _aligned(run.scale(a), 2)]
    right = [
        Term(t.coefficient, t.ids[group] if t.ids.shape[0] > 1 else t.ids)
        for t in _aligned(run.scale(b), 3)
    ]
    out = _contract(run, left, right, (2, run.shape(b)[-1]))
    return [Term(t.coefficient, compress(t.ids.squeeze(-2))) for t in out]


def _matvec(run: Flow, node: fx.Node) -> Scale:
    a, b = operands(node)[:2]
    right = [Term(t.coefficient, t.ids[..., None]) for t in _aligned(run.scale(b), 1)]
    out = _contract(run, _aligned(run.scale(a), 2), right, (run.shape(a)[0], 1))
    return [Term(t.coefficient, t.ids[..., 0]) for t in out]


def _convolution(run: Flow, node: fx.Node) -> Scale:
    x, w, bias = operands(node)[:3]
    transposed, groups = operands(node)[6], operands(node)[8]
    ndim = len(run.shape(x))
    spatial = range(2, ndim)
    inputs = run.units.require_constant(_aligned(run.scale(x), ndim), spatial, ndim)
    weight = _aligned(run.scale(w), ndim)
    kernel = [t for t in weight if any(t.ids.shape[a] > 1 for a in spatial)]
    if len(kernel) < len(weight):
        for term in kernel:
            run.units.require_zero([term])
    else:  # one channel in and out: the scale of the whole kernel
        weight, kernel = run.units.require_constant(weight, spatial, ndim), []
    a = [Term(t.coefficient, t.ids.reshape(t.ids.shape[:2])) for t in inputs]
    b = [Term(t.coefficient, t.ids.reshape(t.ids.shape[:2])) for t in weight if t not in kernel]
    outputs, per_group = run.shape(node)[1], run.shape(w)[1]
    if groups == 1:
        b = b if transposed else [Term(t.coefficient, t.ids.T) for t in b]
        out = _contract(run, a, b, (2, outputs))
    elif not transposed and per_group == 1:
        run.units.distinguish(a, [1], 2)
        repeat = outputs // groups
        out = [
            Term(t.coefficient, np.repeat(t.ids, repeat, 1) if t.ids.shape[1] > 1 else t.ids)
            for t in a
        ]
        out += [Term(t.coefficient, t.ids.T) for t in b]
    else:
        run.units.require_zero(a)
        if transposed:
            run.units.require_zero(b)
            b = []
        for term in b:
            if term.ids.shape[1] > 1:
                run.units.require_zero([term])
        out = [Term(t.coefficient, t.ids.T) for t in b if t.ids.shape[1] == 1]
    if bias is not None:
        run.units.require_zero(
            out + negated([Term(t.coefficient, t.ids.reshape(1, -1)) for t in run.scale(bias)])
        )
    return [Term(t.coefficient, t.ids.reshape(t.ids.shape + (1,) * (ndim - 2))) for t in out]


def _embedding(run: Flow, node: fx.Node) -> Scale:
    # A scale per vocabulary row would have to follow the token through the network.
    weight = run.scale(operands(node)[0])
    rows = [t for t in weight if t.ids.shape[0] > 1]
    run.units.require_zero(rows)
    ndim = len(run.shape(node))
    return [
        Term(t.coefficient, t.ids.reshape((1,) * (ndim - 1) + t.ids.shape[1:]))
        for t in weight
        if t.ids.shape[0] == 1
    ]


def rule_of(target: Any) -> Callable[[Flow, fx.Node], Any] | None:
    """The rule for an operation that neither moves data nor leaves them as they are."""
    if target in _RULES:
        return _RULES[target]
    schema = getattr(target, "_schema", None)
    return _RULES_BY_NAME.get(schema.name) if schema is not None else None


# Operations that other libraries register, known only once these are imported.
_RULES_BY_NAME: dict[str, Callable[[Flow, fx.Node], Any]] = {
    "transformers::grouped_mm_fallback": grouped,
}
_RULES: dict[Any, Callable[[Flow, fx.Node], Any]] = {
    **dict.fromkeys(_KINKED, _kinked),
    **dict.fromkeys(_COMPARE_SCALAR, _compare_scalar),
    **dict.fromkeys(_COMPARE, _compare),
    **dict.fromkeys(_REDUCE | _EXTREME, _reduce),
    **dict.fromkeys(_POOL, _pool),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar), _add),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _product),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.where.self: _where,
    aten.pow.Tensor_Scalar: _power(None),
    aten.sqrt.default: _power(Fraction(1, 2)),
    aten.rsqrt.default: _power(Fraction(-1, 2)),
    aten.reciprocal.default: _power(Fraction(-1)),
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    **dict.fromkeys(
        (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default), _matmul
    ),
    aten._grouped_mm.default: grouped,
    aten.mv.default: _matvec,
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
}
