"""Rules for piecewise functions: compared at the point, exact on the piece it lies on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets.dual_products import add_parts
from deaddir_fast.nets.dual_registry import (
    at_base,
    aten,
    bases,
    moving,
    note_kink,
    operands,
    parts,
    rule,
)
from deaddir_fast.nets.dual_values import (
    Context,
    Discrete,
    Dual,
    Still,
    discrete,
    fill,
    lift,
    still,
    to_dual,
)


@rule("relu")
def _relu(ctx: Context, op: Any, x: Any) -> Any:
    note_kink(ctx, "relu", x.base, x.dot)
    if isinstance(x, Still):
        return still(op(x.base), aten.threshold_backward(x.dot, x.base.unsqueeze(0), 0))
    # relu(a + d) - relu(a) = max(d, -a) + min(a, 0), and relu(a + d) = max(d, -a) + a exactly at 0
    delta = torch.maximum(x.delta, -x.base)
    dot = aten.threshold_backward(x.dot, delta + x.base, 0)
    return Dual(op(x.base), delta.add_(x.base.clamp(max=0)), dot)


@rule("clamp", "clamp_min", "clamp_max", "hardtanh")
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
        note_kink(ctx, "clamp", x.base - low, x.dot)
        inside &= at >= low
        delta = torch.maximum(delta, low - x.base)
    if high is not None:
        note_kink(ctx, "clamp", x.base - high, x.dot)
        inside &= at <= high
        delta = torch.minimum(delta, high - x.base)
    return Dual(base, delta + (x.base - base), x.dot * inside)


def _choose(cond: Any, a: Any, b: Any, base: Tensor, ctx: Context) -> Dual:
    """``where`` with parts: exact where the point stays on the branch of the base."""
    (a0, da, ta), (b0, db, tb) = parts(a), parts(b)
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


@rule("where")
def _where(ctx: Context, op: Any, cond: Any, a: Any, b: Any) -> Any:
    base = at_base(op, (cond, a, b), {})
    if not base.is_floating_point():
        return NotImplemented
    a, b = (to_dual(x, base.dtype) if isinstance(x, Discrete) else x for x in (a, b))
    return _choose(cond, a, b, base, ctx)


@rule("maximum", "minimum")
def _maximum(ctx: Context, op: Any, a: Any, b: Any) -> Any:
    if (pair := operands(a, b)) is None:
        return NotImplemented
    a, b = pair
    base = op(*bases((a, b)))
    if not base.is_floating_point():
        return NotImplemented
    (a0, da, ta), (b0, db, tb) = parts(a), parts(b)
    n = base.ndim
    gap0 = a0 - b0
    gap = (
        add_parts(da, None if db is None else -db, 1, base.shape)
        if da is not None
        else fill(-db, base.shape)
    )
    slope = add_parts(ta, None if tb is None else -tb, 1, base.shape) if ta is not None else -tb
    name = op.overloadpacket.__name__
    note_kink(ctx, name, gap0.expand(base.shape), fill(slope, base.shape))
    first0, first = gap0 > 0, gap > -gap0
    if op.overloadpacket is aten.minimum:
        first0, first = ~first0, ~first
    return _choose(
        Discrete(first0.expand(base.shape), fill(lift(first, n), base.shape)), a, b, base, ctx
    )


def _take(x: Dual, index: Tensor, dim: int, base: Tensor, index0: Tensor) -> Dual:
    """Values at a selected index per point, (P, *S) along ``dim`` of S."""
    index = index.expand(len(x.dot), *index.shape[1:])
    wide = x.base.expand(x.dot.shape)
    jump = wide.gather(dim + 1, index) - x.base.gather(dim, index0)
    delta = x.delta.expand_as(x.dot).gather(dim + 1, index) + jump
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


@rule("amax", "amin")
def _amax(ctx: Context, op: Any, x: Any, dims: Any = (), keepdim: bool = False) -> Any:
    if not isinstance(x, Dual):
        return NotImplemented
    n = x.base.ndim
    chosen = sorted(d % n for d in dims) if dims else list(range(n))
    largest = op.overloadpacket is aten.amax
    for d in reversed(chosen):
        x, _ = _extreme(ctx, x, d, keepdim, largest)
    return x


@rule("max", "min")
def _max(ctx: Context, op: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(x, Dual) or isinstance(dim, (Tensor, Dual)):
        return NotImplemented
    largest = op.overloadpacket is aten.max
    if dim is None:
        shape = (x.base.numel(),)
        flat = Dual(x.base.reshape(shape), x.delta.flatten(1), x.dot.flatten(1))
        return _extreme(ctx, flat, 0, False, largest)[0]
    return _extreme(ctx, x, dim % x.base.ndim, keepdim, largest)


@rule("sort", "topk")
def _sort(ctx: Context, op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual):
        return NotImplemented
    base, index0 = op(x.base, *args, **kwargs)
    position = 0 if op.overloadpacket is aten.sort else 1
    given = args[position] if len(args) > position else kwargs.get("dim", -1)
    _, index = torch.vmap(lambda v: op(v, *args, **kwargs))(x.at_points())
    value = _take(x, index, given % x.base.ndim, base, index0)
    return value, discrete(index0, index)


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
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


@rule("floor", "ceil", "round", "trunc", "sign", "heaviside")
def _steps(ctx: Context, op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual) or any(moving(a) for a in args):
        return NotImplemented
    base = op(x.base, *args, **kwargs)
    delta = op(x.at_points(), *args, **kwargs) - base
    return Dual(base, delta, torch.zeros_like(x.dot))
