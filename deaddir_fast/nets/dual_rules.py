"""Rules that carry base, difference and derivative through ATen operations.

A rule takes the context, the operation and its arguments, some of which move (:class:`Dual`,
:class:`Discrete`, :class:`Weight`), and returns the moved result or ``NotImplemented``; the
interpreter then falls back to a plain difference and says so. Every rule is exact in the
difference: bilinear operations expand it, linear ones pass it on, piecewise ones compare at the
point and are exact on each piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets import dual_elementwise
from deaddir_fast.nets.dual_values import (
    Context,
    Discrete,
    Dual,
    Value,
    discrete,
    fill,
    lift,
    to_dual,
)
from deaddir_fast.nets.weights import Run, Weight

aten = torch.ops.aten

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def _rule(*packets: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        for name in packets:
            RULES[getattr(aten, name)] = rule
        return rule

    return add


def moving(x: Any) -> bool:
    """Whether a value depends on the point."""
    return isinstance(x, (Dual, Discrete, Weight))


def bases(tree: Any) -> Any:
    """The same arguments at theta0."""
    return pytree.tree_map(lambda x: x.base if moving(x) else x, tree)


def _base(op: Any, args: Any, kwargs: Any) -> Any:
    return op(*bases(args), **bases(kwargs))


# Linear operations ----------------------------------------------------------------------------


def _each(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pick: str) -> Any:
    """Apply ``op`` point by point to the parts named by ``pick``, batched by vmap."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    at, parts = [], []
    for i, x in enumerate(leaves):
        if isinstance(x, Discrete):
            at.append(i)
            parts.append(x.point)
        elif isinstance(x, Dual):
            at.append(i)
            parts.append(getattr(x, pick) if pick != "value" else x.at_points())

    def call(*values: Tensor) -> Any:
        filled = list(leaves)
        for i, v in zip(at, values, strict=True):
            filled[i] = v
        a, k = pytree.tree_unflatten(filled, spec)
        return op(*a, **k)

    return torch.vmap(call)(*parts)


def _pack(base: Any, delta: Any, dot: Any) -> Any:
    if isinstance(base, Tensor):
        return Dual(base, delta, dot)
    return tuple(Dual(b, d, t) for b, d, t in zip(base, delta, dot, strict=True))


@_rule(
    *("sum", "mean", "cumsum", "select", "slice", "squeeze", "unsqueeze", "diagonal", "flip"),
    *("roll", "repeat", "split_with_sizes", "split", "unbind", "index", "gather", "index_select"),
    *("tril", "triu", "avg_pool2d", "avg_pool3d", "avg_pool1d", "_adaptive_avg_pool2d"),
    *("_adaptive_avg_pool3d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d"),
    *("replication_pad2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest1d"),
    *("unfold", "im2col", "pixel_shuffle", "pixel_unshuffle", "expand_copy", "trace"),
)
def linear(ctx: Context, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in the first argument; the others may select (indices), also point by point."""
    x = args[0]
    if not isinstance(x, Dual):
        if not isinstance(x, Tensor):
            return NotImplemented
        # Only the selection moves: a constant is read elsewhere.
        x = Dual(
            x,
            x.new_zeros(()).expand(ctx.points.count, *x.shape),
            x.new_zeros(()).expand(ctx.points.count, *x.shape),
        )
    if not x.base.is_floating_point():
        return NotImplemented
    base = _base(op, args, kwargs)
    rest = args[1:]
    delta = _each(op, (x, *rest), kwargs, "delta")
    dot = _each(op, (x, *rest), kwargs, "dot")
    if any(isinstance(leaf, Discrete) for leaf in pytree.tree_leaves((rest, kwargs))):
        jump = _each(op, (x.base, *rest), kwargs, "value") - base
        delta = delta + jump
    return _pack(base, delta, dot)


def _with_zeros(x: Any) -> Any:
    return torch.zeros_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x


@_rule("cat", "stack", "scatter_add", "index_add", "select_scatter", "slice_scatter", "index_put")
@_rule("diagonal_scatter", "dot", "scatter")
def jointly_linear(ctx: Context, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in all floating-point tensor arguments together: constants count as zero."""
    if op in (aten.dot.default, aten.scatter.value):
        return NotImplemented
    leaves = pytree.tree_leaves((args, kwargs))
    if any(isinstance(x, Discrete) for x in leaves):
        return NotImplemented
    base = _base(op, args, kwargs)
    zeroed = pytree.tree_map(_with_zeros, (args, kwargs))
    return Dual(base, _each(op, *zeroed, "delta"), _each(op, *zeroed, "dot"))


@_rule("view", "_unsafe_view", "reshape")
def _view(ctx: Context, op: Any, x: Any, shape: Any) -> Any:
    if isinstance(x, Weight):
        base = x.base.reshape(shape)
        if base.shape == x.base.shape:
            return x
        x = to_dual(x)
    base = x.base.reshape(shape)
    parts = [t.reshape(t.shape[0], *base.shape) for t in _tensors(x)]
    return type(x)(base, *parts)


def _tensors(x: Dual | Discrete) -> tuple[Tensor, ...]:
    return (x.delta, x.dot) if isinstance(x, Dual) else (x.point,)


@_rule("permute", "t", "transpose")
def _permute(ctx: Context, op: Any, x: Any, *dims: Any) -> Any:
    base = op(x.base, *dims)
    n = base.ndim
    if op is aten.permute.default:
        order = [d % n for d in dims[0]]
    else:
        a, b = (d % n for d in dims) if dims else (0, n - 1)
        order = list(range(n))
        order[a], order[b] = order[b], order[a]
    if isinstance(x, Weight):
        if order == list(range(n)):
            return x
        if n == 2 and not x.lead:
            return x.transposed(base)
        x = to_dual(x)
    shifted = [0, *(d + 1 for d in order)]
    return type(x)(base, *(t.permute(shifted) for t in _tensors(x)))


@_rule("expand")
def _expand(ctx: Context, op: Any, x: Any, shape: Any, **kwargs: Any) -> Any:
    base = op(x.base, shape, **kwargs)
    if isinstance(x, Weight):
        if base.shape == x.base.shape:
            return x
        if base.shape[-x.base.ndim :] == x.base.shape and not x.lead:
            return x.expanded(base)
        x = to_dual(x)
    return type(x)(base, *(fill(t, base.shape) for t in _tensors(x)))


@_rule("clone", "alias", "detach", "lift_fresh_copy")
def _same(ctx: Context, op: Any, x: Any, **kwargs: Any) -> Any:
    return x


@_rule("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "new_empty")
def _shape_only(ctx: Context, op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if any(moving(a) for a in args) else op(x.base, *args, **kwargs)


@_rule("_to_copy")
def _to_copy(ctx: Context, op: Any, x: Any, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype") or x.base.dtype
    if dtype == x.base.dtype and kwargs.get("device") in (None, x.base.device):
        return x
    base = op(x.base, **kwargs)
    if isinstance(x, Weight):
        x = to_dual(x)
    if isinstance(x, Discrete):
        return to_dual(x, dtype) if dtype.is_floating_point else Discrete(base, x.point.to(dtype))
    if not dtype.is_floating_point:
        return NotImplemented
    if torch.finfo(dtype).eps > torch.finfo(x.base.dtype).eps:
        name = str(dtype).removeprefix("torch.")
        ctx.notes.add(f"the model computes partly in {name}: readings have its precision")
    return Dual(base, x.delta.to(dtype), x.dot.to(dtype))


@_rule("constant_pad_nd")
def _pad(ctx: Context, op: Any, x: Any, pad: Any, value: Any = 0) -> Any:
    return Dual(op(x.base, pad, value), op(x.delta, pad, 0), op(x.dot, pad, 0))


# Arithmetic -----------------------------------------------------------------------------------


def _operands(*xs: Any) -> list[Any] | None:
    """Operands with discrete values as steps of the dtype of the others; None if none is dual."""
    floats = [x.base if isinstance(x, Dual) else x for x in xs if isinstance(x, (Dual, Tensor))]
    dtypes = [x.dtype for x in floats if x.is_floating_point()]
    if dtypes:
        xs = tuple(to_dual(x, dtypes[0]) if isinstance(x, Discrete) else x for x in xs)
    return list(xs) if any(isinstance(x, (Dual, Weight)) for x in xs) else None


def _parts(x: Any) -> tuple[Any, Any, Any]:
    return (x.base, x.delta, x.dot) if isinstance(x, Dual) else (x, None, None)


def _sum(a: Tensor | None, b: Tensor | None, alpha: Any, shape: torch.Size) -> Tensor:
    if a is None:
        assert b is not None
        return fill(b if alpha == 1 else b * alpha, shape)
    if b is None:
        return fill(a, shape)
    return torch.add(lift(a, len(shape)), lift(b, len(shape)), alpha=alpha)


def _add(ctx: Context, op: Any, a: Any, b: Any, alpha: Any) -> Any:
    operands = _operands(a, b)
    if operands is None:
        return NotImplemented
    a, b = operands
    (a0, da, ta), (b0, db, tb) = _parts(a), _parts(b)
    base = torch.add(a0, b0, alpha=alpha) if isinstance(a0, Tensor) else a0 + alpha * b0
    return Dual(base, _sum(da, db, alpha, base.shape), _sum(ta, tb, alpha, base.shape))


@_rule("add")
def _add_rule(ctx: Context, op: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return _add(ctx, op, a, b, alpha)


@_rule("sub")
def _sub_rule(ctx: Context, op: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return _add(ctx, op, a, b, -alpha)


@_rule("rsub")
def _rsub(ctx: Context, op: Any, a: Any, b: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return NotImplemented
    minus = -a if isinstance(a, (Tensor, int, float)) else _neg(ctx, op, a)
    return minus if minus is NotImplemented else _add(ctx, op, minus, b, 1)


@_rule("neg")
def _neg(ctx: Context, op: Any, x: Any) -> Any:
    if not isinstance(x, Dual):
        return NotImplemented
    return Dual(-x.base, -x.delta, -x.dot)


def product(form: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Dual:
    """A bilinear form of two values, at least one moving; ``form`` broadcasts leading P."""
    (a0, da, ta), (b0, db, tb) = _parts(a), _parts(b)
    base = form(a0, b0)
    if da is None:
        return Dual(base, form(a0, db), form(a0, tb))
    if db is None:
        return Dual(base, form(da, b0), form(ta, b0))
    b1 = b0 + db
    delta = form(da, b1).add_(form(a0, db))
    dot = form(ta, b1).add_(form(a0 + da, tb))
    return Dual(base, delta, dot)


@_rule("mul")
def _mul(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    operands = _operands(a, b)
    if operands is None:
        return NotImplemented
    a, b = operands
    if a is b:
        return _elementwise(dual_elementwise.STEPS["square"], torch.mul(a.base, a.base), a)
    base = op(*bases((a, b)))
    n = base.ndim
    raised = [
        Dual(x.base, lift(x.delta, n), lift(x.dot, n)) if isinstance(x, Dual) else x for x in (a, b)
    ]
    out = product(torch.mul, *raised)
    return Dual(base, fill(out.delta, base.shape), fill(out.dot, base.shape))


@_rule("div")
def _div(ctx: Context, op: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return NotImplemented
    operands = _operands(a, b)
    if operands is None:
        return NotImplemented
    a, b = operands
    if not isinstance(b, Dual):
        base = op(a.base, b)
        n = base.ndim
        return Dual(base, *(fill(lift(t, n) / b, base.shape) for t in (a.delta, a.dot)))
    (a0, da, ta), (b0, db, tb) = _parts(a), _parts(b)
    base = op(a0, b0)
    n = base.ndim
    db, tb = lift(db, n), lift(tb, n)
    b1 = b0 + db
    # (a0 + da) / (b0 + db) - y = (da - y db) / (b0 + db)
    delta = -base * db if da is None else lift(da, n) - base * db
    delta = delta.div_(b1) if delta.shape[1:] == base.shape else delta / b1
    moved = (base + delta) * tb
    dot = -moved if ta is None else lift(ta, n) - moved
    return Dual(base, fill(delta, base.shape), fill(dot / b1, base.shape))


@_rule("addcmul")
def _addcmul(ctx: Context, op: Any, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    if not moving(a) and not moving(b):
        return _add(ctx, op, x, a * b, value)
    return _add(ctx, op, x, _mul(ctx, aten.mul.Tensor, a, b), value)


# Matrix products ------------------------------------------------------------------------------


def _stacked(a: Any, b: Any) -> Tensor:
    """Batched matrix product (b, m, i), (b, i, o), either with points in front."""
    if a.ndim == 4 and b.ndim == 4:
        return torch.matmul(a, b)
    if a.ndim == 4:
        p, n, m, i = a.shape
        wide = a.permute(1, 0, 2, 3).reshape(n, p * m, i)
        return torch.bmm(wide, b).view(n, p, m, -1).permute(1, 0, 2, 3)
    if b.ndim == 4:
        p, n, i, o = b.shape
        wide = b.permute(1, 2, 0, 3).reshape(n, i, p * o)
        return torch.bmm(a, wide).view(n, -1, p, o).permute(2, 0, 1, 3)
    return torch.bmm(a, b)


def _rows(a: Any, b: Any) -> Tensor:
    """Matrix product (m, i), (i, o), either with points in front."""
    if a.ndim == 3 and b.ndim == 3:
        return torch.bmm(a, b)
    return torch.matmul(a, b)


def _weight_product(x: Any, w: Weight, bias: tuple[Tensor, Tensor] | None) -> Any:
    x0, dx, tx = _parts(x)
    return w.product(x0, dx, tx, bias)


@_rule("mm")
def _mm(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    operands = _operands(a, b)
    if operands is None:
        return NotImplemented
    a, b = operands
    if isinstance(b, Weight):
        a = to_dual(a) if isinstance(a, Weight) else a
        return Dual(op(*bases((a, b))), *_weight_product(a, b, None))
    a, b = (to_dual(x) if isinstance(x, Weight) else x for x in (a, b))
    return product(_rows, a, b)


@_rule("addmm")
def _addmm(ctx: Context, op: Any, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    base = _base(op, (c, a, b), {})
    vector = isinstance(c, Dual) and c.base.ndim == 1 and c.base.shape == base.shape[-1:]
    if isinstance(b, Weight):
        a = to_dual(a) if isinstance(a, Weight) else a
        bias = (c.delta, c.dot) if vector else None
        delta, dot = _weight_product(a, b, bias)
    elif moving(a) or moving(b):
        moved = _mm(ctx, aten.mm.default, a, b)
        delta, dot, bias = moved.delta, moved.dot, None
    else:
        return Dual(base, fill(c.delta, base.shape), fill(c.dot, base.shape))
    if isinstance(c, Weight):
        c = to_dual(c)
    if isinstance(c, Dual) and bias is None:
        delta, dot = delta + lift(c.delta, 2), dot + lift(c.dot, 2)
    return Dual(base, delta, dot)


@_rule("bmm")
def _bmm(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    operands = _operands(a, b)
    if operands is None:
        return NotImplemented
    a, b = operands
    if isinstance(b, Weight) and len(b.lead) == 1 and len(b.shape) == 2:
        a = to_dual(a) if isinstance(a, Weight) else a
        base = op(*bases((a, b)))
        x0, dx, tx = _parts(a)
        x0 = x0.flatten(0, 1)
        dx, tx = (None if t is None else t.flatten(1, 2) for t in (dx, tx))
        moved = b.product(x0, dx, tx)
        return Dual(base, *(t.unflatten(1, base.shape[:2]) for t in moved))
    a, b = (to_dual(x) if isinstance(x, Weight) else x for x in (a, b))
    return product(_stacked, a, b)


@_rule("baddbmm")
def _baddbmm(
    ctx: Context, op: Any, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    if alpha != 1 or beta != 1:
        return NotImplemented
    if not moving(a) and not moving(b):
        return _add(ctx, op, torch.bmm(a, b), to_dual(c), 1)
    c = to_dual(c) if isinstance(c, Weight) else c
    return _add(ctx, op, _bmm(ctx, aten.bmm.default, a, b), c, 1)


@_rule("embedding")
def _embedding(ctx: Context, op: Any, w: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(index, Discrete):
        return NotImplemented
    if isinstance(w, Weight):
        if w.flip or w.lead or len(w.shape) != 2:
            w = to_dual(w)
        else:
            return Dual(op(w.base, index), *w.gather(index))
    return Dual(op(w.base, index), w.delta[:, index], w.dot[:, index])


# Convolution ----------------------------------------------------------------------------------


class _Conv:
    """A convolution as a bilinear map that takes points in front of the samples."""

    def __init__(self, op: Any, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args
        self.transposed, self.groups = args[3], args[5]

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        return self.op(x, w, None, *self.args)

    def points(self, x: Tensor, w: Tensor) -> Tensor:
        """(P, n, c, ...) with one kernel for all points."""
        y = self(x.flatten(0, 1), w)
        return y.unflatten(0, x.shape[:2])


def _conv_rank_one(
    ctx: Context, conv: _Conv, w: Weight, run: Run, x: Any, out: list[Tensor]
) -> None:
    assert run.v is not None and run.w is not None
    x0, dx, tx = _parts(x)
    points, shape = ctx.points, w.shape[1:]
    along = (1,) * len(shape[1:])
    for d in range(run.stop - run.start):
        at = points.part(run.start + d, run.start + d + 1)
        kernel = run.w[d].view(1, *shape)
        value = points.value[at].view(-1, 1, 1, *along)
        tangent = points.tangent[at].view(-1, 1, 1, *along)
        s = conv(x0, kernel).unsqueeze(0)
        v = run.v[d].view(-1, *along)
        if dx is None:
            out[0][at] += (value * s) * v
            out[1][at] += (tangent * s) * v
        else:
            s = s + conv.points(dx[at], kernel)
            out[0][at] += (value * s) * v
            out[1][at] += (tangent * s + value * conv.points(tx[at], kernel)) * v


def _conv_full(ctx: Context, conv: _Conv, w: Weight, run: Run, x: Any, out: list[Tensor]) -> None:
    x0, dx, tx = _parts(x)
    points = ctx.points
    kernels = run.dense()
    for d in range(run.stop - run.start):
        kernel = kernels[d].view(w.shape)
        start = (run.start + d) * points.r
        still = conv(x0, kernel)
        for j in range(start, start + points.r):
            value, tangent = points.value[j], points.tangent[j]
            if dx is None:
                out[0][j] += value * still
                out[1][j] += tangent * still
            else:
                moved = still + conv(dx[j], kernel)
                out[0][j] += value * moved
                out[1][j] += tangent * moved + value * conv(tx[j], kernel)


@_rule("convolution")
def _convolution(ctx: Context, op: Any, x: Any, w: Any, bias: Any, *args: Any) -> Any:
    base = _base(op, (x, w, bias, *args), {})
    conv = _Conv(op, args)
    x0, dx, tx = _parts(x)
    if isinstance(x, (Discrete, Weight)) or x0.ndim != len(args[0]) + 2:
        return NotImplemented
    w0 = w.base if moving(w) else w
    if dx is not None:
        out = [conv.points(dx, w0), conv.points(tx, w0)]
    else:
        out = [base.new_zeros(ctx.points.count, *base.shape) for _ in range(2)]
    if isinstance(w, Weight):
        for run in w.runs:
            low = run.u is None and conv.groups == 1 and not conv.transposed
            (_conv_rank_one if low else _conv_full)(ctx, conv, w, run, x, out)
    elif isinstance(w, Dual):
        for j in range(ctx.points.count):
            kernel, slope = w.delta[j], w.dot[j]
            moved = x0 if dx is None else x0 + dx[j]
            out[0][j] += conv(moved, kernel)
            out[1][j] += conv(moved, slope)
            if tx is not None:
                out[1][j] += conv(tx[j], kernel)
    if isinstance(bias, Dual):
        ones = (1,) * len(args[0])
        out = [
            y + b.view(-1, 1, b.shape[1], *ones)
            for y, b in zip(out, (bias.delta, bias.dot), strict=True)
        ]
    return Dual(base, *out)


# Smooth functions -----------------------------------------------------------------------------


def _elementwise(step: dual_elementwise.Step, base: Tensor, x: Dual) -> Dual:
    delta, slope = step(x.base, x.delta, base)
    return Dual(base, delta, slope.mul_(x.dot) if slope.shape == x.dot.shape else slope * x.dot)


def _step_rule(name: str) -> Rule:
    step = dual_elementwise.STEPS[name]

    def rule(ctx: Context, op: Any, x: Any) -> Any:
        if not isinstance(x, Dual):
            return NotImplemented
        if name in ("abs", "sqrt"):
            _note_kink(ctx, name, x.base, x.dot)
        return _elementwise(step, op(x.base), x)

    return rule


for _name in dual_elementwise.STEPS:
    RULES[getattr(aten, _name)] = _step_rule(_name)


@_rule("pow")
def _pow(ctx: Context, op: Any, x: Any, exponent: Any) -> Any:
    if op is aten.pow.Scalar and isinstance(exponent, Dual) and x > 0:
        rate = math.log(x)
        y = op(x, exponent.base)
        delta = y * torch.expm1(rate * exponent.delta)
        return Dual(y, delta, rate * (y + delta) * exponent.dot)
    if not isinstance(x, Dual) or not isinstance(exponent, (int, float)):
        return NotImplemented
    if exponent == 1:
        return x
    step = dual_elementwise.power(float(exponent))
    return NotImplemented if step is None else _elementwise(step, op(x.base, exponent), x)


def _centred(p: Tensor, d: Tensor, dim: int) -> Tensor:
    return d - (p * d).sum(dim, keepdim=True)


@_rule("_softmax")
def _softmax(ctx: Context, op: Any, x: Any, dim: int, half: bool) -> Any:
    y = op(x.base, dim, half)
    at = dim % y.ndim + 1
    d = _centred(y, x.delta, at)
    large = d > 30  # the exponential may overflow; the difference is not small there
    e = torch.expm1(d.clamp(max=30))
    total = (y * e).sum(at, keepdim=True)
    delta = y * (e - total) / (1 + total)
    if bool((large & (y > 0)).any()):
        rows = large.any(at, keepdim=True)
        delta = torch.where(rows, torch.softmax(x.at_points(), at) - y, delta)
    p = y + delta
    return Dual(y, delta, p * _centred(p, x.dot, at))


@_rule("_log_softmax")
def _log_softmax(ctx: Context, op: Any, x: Any, dim: int, half: bool) -> Any:
    y = op(x.base, dim, half)
    at = dim % y.ndim + 1
    p = torch.exp(y)
    d = _centred(p, x.delta, at)
    large = d > 30
    total = torch.log1p((p * torch.expm1(d.clamp(max=30))).sum(at, keepdim=True))
    delta = d - total
    if bool(large.any()):
        rows = large.any(at, keepdim=True)
        delta = torch.where(rows, torch.log_softmax(x.at_points(), at) - y, delta)
    return Dual(y, delta, _centred(torch.exp(y + delta), x.dot, at))


# Piecewise functions --------------------------------------------------------------------------


def _note_kink(ctx: Context, name: str, distance: Tensor, dot: Tensor) -> None:
    if ctx.points.at_base and bool(((distance == 0) & (dot != 0)).any()):
        ctx.notes.add(
            f"at radius 0 some units sit on the kink of {name}: the curvature there takes torch's "
            "convention for the derivative, not a one-sided one"
        )


@_rule("relu")
def _relu(ctx: Context, op: Any, x: Any) -> Any:
    _note_kink(ctx, "relu", x.base, x.dot)
    # relu(a + d) - relu(a) = max(d, -a) + min(a, 0), and relu(a + d) = max(d, -a) + a exactly at 0
    delta = torch.maximum(x.delta, -x.base)
    dot = aten.threshold_backward(x.dot, delta + x.base, 0)
    return Dual(op(x.base), delta.add_(x.base.clamp(max=0)), dot)


@_rule("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(ctx: Context, op: Any, x: Any, *bounds: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual) or any(moving(b) for b in (*bounds, *kwargs.values())):
        return NotImplemented
    base = op(x.base, *bounds, **kwargs)
    packet = op.overloadpacket
    low = kwargs.get("min", bounds[0] if bounds and packet is not aten.clamp_max else None)
    high = kwargs.get("max", bounds[-1] if packet is aten.clamp_max or len(bounds) == 2 else None)
    delta, at = x.delta, x.at_points()
    inside = torch.ones_like(at, dtype=torch.bool)
    if low is not None:
        _note_kink(ctx, "clamp", x.base - low, x.dot)
        inside &= at >= low
        delta = torch.maximum(delta, low - x.base)
    if high is not None:
        _note_kink(ctx, "clamp", x.base - high, x.dot)
        inside &= at <= high
        delta = torch.minimum(delta, high - x.base)
    return Dual(base, delta + (x.base - base), x.dot * inside)


def _choose(cond: Any, a: Any, b: Any, base: Tensor, ctx: Context) -> Dual:
    """``where`` with parts: exact where the point stays on the branch of the base."""
    (a0, da, ta), (b0, db, tb) = _parts(a), _parts(b)
    n, shape = base.ndim, base.shape
    zero = base.new_zeros(())
    da, ta, db, tb = (zero if t is None else lift(t, n) for t in (da, ta, db, tb))
    if isinstance(cond, Tensor):
        pair = (torch.where(cond, da, db), torch.where(cond, ta, tb))
        return Dual(base, *(fill(_pointed(t, ctx), shape) for t in pair))
    point = lift(cond.point, n)
    delta = torch.where(point, da, db)
    # Zero unless the point changed branch; infinities of the branch not taken cancel out.
    jump = torch.where(point == cond.base, zero, torch.where(point, a0, b0) - base)
    delta = delta + jump
    return Dual(base, fill(delta, shape), fill(torch.where(point, ta, tb), shape))


def _pointed(t: Tensor, ctx: Context) -> Tensor:
    return t if t.ndim else t.expand(ctx.points.count)


@_rule("where")
def _where(ctx: Context, op: Any, cond: Any, a: Any, b: Any) -> Any:
    base = _base(op, (cond, a, b), {})
    if not base.is_floating_point():
        return NotImplemented
    a, b = (to_dual(x, base.dtype) if isinstance(x, Discrete) else x for x in (a, b))
    return _choose(cond, a, b, base, ctx)


@_rule("maximum", "minimum")
def _maximum(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    operands = _operands(a, b)
    if operands is None:
        return NotImplemented
    a, b = operands
    base = op(*bases((a, b)))
    if not base.is_floating_point():
        return NotImplemented
    (a0, da, ta), (b0, db, tb) = _parts(a), _parts(b)
    n = base.ndim
    gap0 = a0 - b0
    gap = (
        _sum(da, None if db is None else -db, 1, base.shape)
        if da is not None
        else fill(-db, base.shape)
    )
    slope = _sum(ta, None if tb is None else -tb, 1, base.shape) if ta is not None else -tb
    name = op.overloadpacket.__name__
    _note_kink(ctx, name, gap0.expand(base.shape), fill(slope, base.shape))
    first0, first = gap0 > 0, gap > -gap0
    if op.overloadpacket is aten.minimum:
        first0, first = ~first0, ~first
    return _choose(
        Discrete(first0.expand(base.shape), fill(lift(first, n), base.shape)), a, b, base, ctx
    )


def _take(x: Dual, index: Tensor, dim: int, base: Tensor, index0: Tensor) -> Dual:
    """Values at a selected index per point, (P, *S) along ``dim`` of S."""
    wide = x.base.expand(x.delta.shape)
    jump = wide.gather(dim + 1, index) - x.base.gather(dim, index0)
    delta = x.delta.gather(dim + 1, index) + jump
    return Dual(base, delta, x.dot.gather(dim + 1, index))


def _extreme(ctx: Context, x: Dual, dim: int, keepdim: bool, largest: bool) -> tuple[Dual, Any]:
    find = torch.argmax if largest else torch.argmin
    index0 = find(x.base, dim, keepdim=True)
    index = find(x.at_points(), dim + 1, keepdim=True)
    value = _take(x, index, dim, x.base.gather(dim, index0), index0)
    if not keepdim:
        value = Dual(
            value.base.squeeze(dim), value.delta.squeeze(dim + 1), value.dot.squeeze(dim + 1)
        )
        index0, index = index0.squeeze(dim), index.squeeze(dim + 1)
    return value, discrete(index0, index)


@_rule("amax", "amin")
def _amax(ctx: Context, op: Any, x: Any, dims: Any = (), keepdim: bool = False) -> Any:
    if not isinstance(x, Dual):
        return NotImplemented
    n = x.base.ndim
    chosen = sorted(d % n for d in dims) if dims else list(range(n))
    largest = op.overloadpacket is aten.amax
    for d in reversed(chosen):
        x, _ = _extreme(ctx, x, d, keepdim, largest)
    return x


@_rule("max", "min")
def _max(ctx: Context, op: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(x, Dual) or isinstance(dim, (Tensor, Dual)):
        return NotImplemented
    largest = op.overloadpacket is aten.max
    if dim is None:
        shape = (x.base.numel(),)
        flat = Dual(x.base.reshape(shape), x.delta.flatten(1), x.dot.flatten(1))
        return _extreme(ctx, flat, 0, False, largest)[0]
    return _extreme(ctx, x, dim % x.base.ndim, keepdim, largest)


@_rule("sort", "topk")
def _sort(ctx: Context, op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual):
        return NotImplemented
    base, index0 = op(x.base, *args, **kwargs)
    position = 0 if op.overloadpacket is aten.sort else 1
    given = args[position] if len(args) > position else kwargs.get("dim", -1)
    _, index = torch.vmap(lambda v: op(v, *args, **kwargs))(x.at_points())
    value = _take(x, index, given % x.base.ndim, base, index0)
    return value, discrete(index0, index)


@_rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(ctx: Context, op: Any, x: Any, *args: Any) -> Any:
    base, index0 = op(x.base, *args)
    n = 2 if op.overloadpacket is aten.max_pool2d_with_indices else 3
    if x.base.ndim != n + 2:
        return NotImplemented
    _, index = op(x.at_points().flatten(0, 1), *args)
    index = index.unflatten(0, x.delta.shape[:2])
    flat = Dual(x.base.flatten(-n), x.delta.flatten(-n), x.dot.flatten(-n))
    dim = flat.base.ndim - 1
    value = _take(flat, index.flatten(-n), dim, base.flatten(-n), index0.flatten(-n))
    shaped = (t.unflatten(-1, base.shape[-n:]) for t in (value.delta, value.dot))
    return Dual(base, *shaped), discrete(index0, index)


@_rule("floor", "ceil", "round", "trunc", "sign", "heaviside")
def _steps(ctx: Context, op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual) or any(moving(a) for a in args):
        return NotImplemented
    base = op(x.base, *args, **kwargs)
    delta = op(x.at_points(), *args, **kwargs) - base
    return Dual(base, delta, torch.zeros_like(delta))


# Anything else --------------------------------------------------------------------------------


def fallback(ctx: Context, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operation: evaluated at each point, subtracted, differentiated by torch's forward mode.

    Raises:
        NotImplementedError: naming the operation, when torch cannot evaluate or differentiate it.
    """
    args, kwargs = pytree.tree_map(
        lambda x: to_dual(x) if isinstance(x, Weight) else x, (args, kwargs)
    )
    base = _base(op, args, kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    outputs = pytree.tree_leaves(base)
    smooth = [y.is_floating_point() for y in outputs]
    duals = [i for i, x in enumerate(leaves) if isinstance(x, Dual)]
    steps = [i for i, x in enumerate(leaves) if isinstance(x, Discrete)]
    values = [leaves[i].at_points() for i in duals]
    dots = [leaves[i].dot for i in duals]
    picks = [leaves[i].point for i in steps]

    def call(xs: Any, picked: Any) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, v in zip([*duals, *steps], [*xs, *picked], strict=True):
            filled[i] = v
        a, k = pytree.tree_unflatten(filled, spec)
        return tuple(pytree.tree_leaves(op(*a, **k)))

    def floats(xs: Any, picked: Any) -> tuple[Tensor, ...]:
        return tuple(y for y, s in zip(call(xs, picked), smooth, strict=True) if s)

    def at(xs: Any, ts: Any, picked: Any) -> tuple[Any, Any]:
        if not duals or not any(smooth):
            return call(xs, picked), ()
        _, slopes = torch.func.jvp(lambda *v: floats(v, picked), tuple(xs), tuple(ts))
        return call(xs, picked), slopes

    def one_by_one() -> tuple[Any, Any]:
        each = [
            at([v[j] for v in values], [t[j] for t in dots], [c[j] for c in picks])
            for j in range(ctx.points.count)
        ]
        return tuple(
            tuple(torch.stack(ys) for ys in zip(*part, strict=True))
            for part in zip(*each, strict=True)
        )  # type: ignore[return-value]  # two tuples, by construction

    try:
        try:
            points, slopes = torch.vmap(at)(values, dots, picks)
        except RuntimeError:
            points, slopes = one_by_one()
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(
            f"model: {op} has no rule here and torch cannot differentiate it forward: {error}"
        ) from error
    slope = iter(slopes)
    results: list[Value] = []
    for y, point, is_smooth in zip(outputs, points, smooth, strict=True):
        if is_smooth:
            dot = next(slope) if duals else torch.zeros_like(point)
            if duals:
                ctx.notes.add(f"{op} has no exact rule: its difference is a rounded subtraction")
            results.append(Dual(y, point - y, dot))
        else:
            results.append(discrete(y, point))
    if isinstance(base, Tensor):
        return results[0]
    return tuple(results)


def apply(ctx: Context, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry the arguments through one operation by its rule, or by the fallback."""
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(moving(x) for x in leaves):
        return op(*args, **kwargs)
    packet = op.overloadpacket
    if packet not in _WEIGHT_RULES:
        args, kwargs = pytree.tree_map(
            lambda x: to_dual(x) if isinstance(x, Weight) else x, (args, kwargs)
        )
    rule = RULES.get(packet)
    if rule is not None:
        result = rule(ctx, op, *args, **kwargs)
        if result is not NotImplemented:
            return result
    return fallback(ctx, op, args, kwargs)


_WEIGHT_RULES = {
    getattr(aten, name)
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "view", "_unsafe_view"),
        *("reshape", "permute", "t", "transpose", "expand", "clone", "alias", "detach"),
        *("_to_copy",),
    )
}
