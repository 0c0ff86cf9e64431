"""Rules for arithmetic, matrix products, embeddings and convolutions: bilinear operations.

With a = a0 + da and b = b0 + db, B(a, b) - B(a0, b0) = B(da, b) + B(a0, db): no cancellation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets import dual_elementwise
from deaddir_fast.nets.dual_registry import at_base, aten, bases, moving, operands, parts, rule
from deaddir_fast.nets.dual_smooth import elementwise
from deaddir_fast.nets.dual_values import Context, Discrete, Dual, Still, fill, lift, still, to_dual
from deaddir_fast.nets.weights import Run, Weight, no_difference


def add_parts(a: Tensor | None, b: Tensor | None, alpha: Any, shape: torch.Size) -> Tensor:
    """a + alpha b for per-point parts, None counting as zero, broadcast to ``shape``."""
    if a is None:
        assert b is not None
        return fill(b if alpha == 1 else b * alpha, shape)
    if b is None:
        return fill(a, shape)
    return torch.add(lift(a, len(shape)), lift(b, len(shape)), alpha=alpha)


def add(ctx: Context, op: Any, a: Any, b: Any, alpha: Any) -> Any:
    """a + alpha b."""
    if (pair := operands(a, b)) is None:
        return NotImplemented
    a, b = pair
    (a0, da, ta), (b0, db, tb) = parts(a), parts(b)
    base = torch.add(a0, b0, alpha=alpha) if isinstance(a0, Tensor) else a0 + alpha * b0
    return Dual(base, add_parts(da, db, alpha, base.shape), add_parts(ta, tb, alpha, base.shape))


@rule("add")
def _add_rule(ctx: Context, op: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return add(ctx, op, a, b, alpha)


@rule("sub")
def _sub_rule(ctx: Context, op: Any, a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return add(ctx, op, a, b, -alpha)


@rule("rsub")
def _rsub(ctx: Context, op: Any, a: Any, b: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return NotImplemented
    minus = -a if isinstance(a, (Tensor, int, float)) else _neg(ctx, op, a)
    return minus if minus is NotImplemented else add(ctx, op, minus, b, 1)


@rule("neg")
def _neg(ctx: Context, op: Any, x: Any) -> Any:
    if not isinstance(x, Dual):
        return NotImplemented
    return Dual(-x.base, -x.delta, -x.dot)


def product(form: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Dual:
    """A bilinear form of two values, at least one moving; ``form`` broadcasts leading P."""
    (a0, da, ta), (b0, db, tb) = parts(a), parts(b)
    base = form(a0, b0)
    if isinstance(a, Still) or isinstance(b, Still):
        dot = None if ta is None else form(ta, b0)
        if tb is not None:
            dot = form(a0, tb) if dot is None else form(a0, tb).add_(dot)
        assert dot is not None
        return still(base, dot)
    if da is None:
        return Dual(base, form(a0, db), form(a0, tb))
    if db is None:
        return Dual(base, form(da, b0), form(ta, b0))
    b1 = b0 + db
    delta = form(da, b1).add_(form(a0, db))
    dot = form(ta, b1).add_(form(a0 + da, tb))
    return Dual(base, delta, dot)


@rule("mul")
def _mul(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    if (pair := operands(a, b)) is None:
        return NotImplemented
    a, b = pair
    if a is b:
        return elementwise(dual_elementwise.STEPS["square"], torch.mul(a.base, a.base), a)
    base = op(*bases((a, b)))
    n = base.ndim
    raised = [
        type(x)(x.base, lift(x.delta, n), lift(x.dot, n)) if isinstance(x, Dual) else x
        for x in (a, b)
    ]
    out = product(torch.mul, *raised)
    return Dual(base, fill(out.delta, base.shape), fill(out.dot, base.shape))


@rule("div")
def _div(ctx: Context, op: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return NotImplemented
    if (pair := operands(a, b)) is None:
        return NotImplemented
    a, b = pair
    if not isinstance(b, Dual):
        base = op(a.base, b)
        n = base.ndim
        return Dual(base, *(fill(lift(t, n) / b, base.shape) for t in (a.delta, a.dot)))
    (a0, da, ta), (b0, db, tb) = parts(a), parts(b)
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


@rule("addcmul")
def _addcmul(ctx: Context, op: Any, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    if not moving(a) and not moving(b):
        return add(ctx, op, x, a * b, value)
    return add(ctx, op, x, _mul(ctx, aten.mul.Tensor, a, b), value)


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
    x0, dx, tx = parts(x)
    return w.product(x0, dx, tx, bias)


@rule("mm")
def _mm(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    if (pair := operands(a, b)) is None:
        return NotImplemented
    a, b = pair
    if isinstance(b, Weight):
        a = to_dual(a) if isinstance(a, Weight) else a
        return Dual(op(*bases((a, b))), *_weight_product(a, b, None))
    a, b = (to_dual(x) if isinstance(x, Weight) else x for x in (a, b))
    return product(_rows, a, b)


@rule("addmm")
def _addmm(ctx: Context, op: Any, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    base = at_base(op, (c, a, b), {})
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


@rule("bmm")
def _bmm(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    if (pair := operands(a, b)) is None:
        return NotImplemented
    a, b = pair
    if isinstance(b, Weight) and len(b.lead) == 1 and len(b.shape) == 2:
        a = to_dual(a) if isinstance(a, Weight) else a
        base = op(*bases((a, b)))
        x0, dx, tx = parts(a)
        x0 = x0.flatten(0, 1)
        dx, tx = (None if t is None else t.flatten(1, 2) for t in (dx, tx))
        moved = b.product(x0, dx, tx)
        return Dual(base, *(t.unflatten(1, base.shape[:2]) for t in moved))
    a, b = (to_dual(x) if isinstance(x, Weight) else x for x in (a, b))
    return product(_stacked, a, b)


@rule("baddbmm")
def _baddbmm(
    ctx: Context, op: Any, c: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    if alpha != 1 or beta != 1:
        return NotImplemented
    if not moving(a) and not moving(b):
        return add(ctx, op, torch.bmm(a, b), to_dual(c), 1)
    c = to_dual(c) if isinstance(c, Weight) else c
    return add(ctx, op, _bmm(ctx, aten.bmm.default, a, b), c, 1)


@rule("embedding")
def _embedding(ctx: Context, op: Any, w: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(index, Discrete):
        return NotImplemented
    if isinstance(w, Weight):
        if w.flip or w.lead or len(w.shape) != 2:
            w = to_dual(w)
        else:
            return Dual(op(w.base, index), *w.gather(index))
    return Dual(op(w.base, index), w.delta[:, index], w.dot[:, index])


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
    x0, dx, tx = parts(x)
    points, shape = ctx.points, w.shape[1:]
    along = (1,) * len(shape[1:])
    for d in range(run.stop - run.start):
        at = points.part(run.start + d, run.start + d + 1)
        kernel = run.w[d].view(1, *shape)
        value = points.value[at].view(-1, 1, 1, *along)
        tangent = points.tangent[at].view(-1, 1, 1, *along)
        s = conv(x0, kernel).unsqueeze(0)
        v = run.v[d].view(-1, *along)
        if points.still:
            out[1][at] += (tangent * s) * v
        elif dx is None:
            out[0][at] += (value * s) * v
            out[1][at] += (tangent * s) * v
        else:
            s = s + conv.points(dx[at], kernel)
            out[0][at] += (value * s) * v
            out[1][at] += (tangent * s + value * conv.points(tx[at], kernel)) * v


def _conv_full(ctx: Context, conv: _Conv, w: Weight, run: Run, x: Any, out: list[Tensor]) -> None:
    x0, dx, tx = parts(x)
    points = ctx.points
    kernels = run.dense()
    for d in range(run.stop - run.start):
        kernel = kernels[d].view(w.shape)
        start = (run.start + d) * points.r
        unmoved = conv(x0, kernel)
        for j in range(start, start + points.r):
            value, tangent = points.value[j], points.tangent[j]
            if points.still:
                out[1][j] += tangent * unmoved
            elif dx is None:
                out[0][j] += value * unmoved
                out[1][j] += tangent * unmoved
            else:
                moved = unmoved + conv(dx[j], kernel)
                out[0][j] += value * moved
                out[1][j] += tangent * moved + value * conv(tx[j], kernel)


@rule("convolution")
def _convolution(ctx: Context, op: Any, x: Any, w: Any, bias: Any, *args: Any) -> Any:
    base = at_base(op, (x, w, bias, *args), {})
    conv = _Conv(op, args)
    x0, dx, tx = parts(x)
    if isinstance(x, (Discrete, Weight)) or x0.ndim != len(args[0]) + 2:
        return NotImplemented
    w0 = w.base if moving(w) else w
    if ctx.points.still:
        dot = base.new_zeros(ctx.points.count, *base.shape) if tx is None else conv.points(tx, w0)
        out = [no_difference(base), dot]
    elif dx is not None:
        out = [conv.points(dx, w0), conv.points(tx, w0)]
    else:
        out = [base.new_zeros(ctx.points.count, *base.shape) for _ in range(2)]
    if isinstance(w, Weight):
        for run in w.runs:
            low = run.u is None and conv.groups == 1 and not conv.transposed
            (_conv_rank_one if low else _conv_full)(ctx, conv, w, run, x, out)
    elif isinstance(w, Dual):
        for j in range(ctx.points.count):
            if ctx.points.still:
                out[1][j] += conv(x0, w.dot[j])
                continue
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
