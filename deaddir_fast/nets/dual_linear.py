"""Rules for operations that are linear: reductions, views, selections, joins, casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets.dual_registry import at_base, aten, moving, rule, tensors
from deaddir_fast.nets.dual_values import Context, Discrete, Dual, fill, to_dual
from deaddir_fast.nets.weights import Weight


def each_point(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pick: str) -> Any:
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


@rule(
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
    base = at_base(op, args, kwargs)
    rest = args[1:]
    delta = each_point(op, (x, *rest), kwargs, "delta")
    dot = each_point(op, (x, *rest), kwargs, "dot")
    if any(isinstance(leaf, Discrete) for leaf in pytree.tree_leaves((rest, kwargs))):
        jump = each_point(op, (x.base, *rest), kwargs, "value") - base
        delta = delta + jump
    return _pack(base, delta, dot)


def without_constants(x: Any) -> Any:
    """Zero for a constant that is summed, anything else (indices, values that move) as it is."""
    summed = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    return torch.zeros_like(x) if summed else x


@rule("cat", "stack", "scatter_add", "index_add", "select_scatter", "slice_scatter", "index_put")
@rule("diagonal_scatter", "scatter")
def jointly_linear(ctx: Context, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in all floating-point tensor arguments together: constants count as zero."""
    if op is aten.scatter.value:
        return NotImplemented
    leaves = pytree.tree_leaves((args, kwargs))
    if any(isinstance(x, Discrete) for x in leaves):
        return NotImplemented
    base = at_base(op, args, kwargs)
    args, kwargs = pytree.tree_map(without_constants, (args, kwargs))
    return Dual(base, each_point(op, args, kwargs, "delta"), each_point(op, args, kwargs, "dot"))


@rule("view", "_unsafe_view", "reshape")
def _view(ctx: Context, op: Any, x: Any, shape: Any) -> Any:
    if isinstance(x, Weight):
        base = x.base.reshape(shape)
        if base.shape == x.base.shape:
            return x
        x = to_dual(x)
    base = x.base.reshape(shape)
    parts = [t.reshape(t.shape[0], *base.shape) for t in tensors(x)]
    return type(x)(base, *parts)


@rule("permute", "t", "transpose")
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
    return type(x)(base, *(t.permute(shifted) for t in tensors(x)))


@rule("expand")
def _expand(ctx: Context, op: Any, x: Any, shape: Any, **kwargs: Any) -> Any:
    base = op(x.base, shape, **kwargs)
    if isinstance(x, Weight):
        if base.shape == x.base.shape:
            return x
        if base.shape[-x.base.ndim :] == x.base.shape and not x.lead:
            return x.expanded(base)
        x = to_dual(x)
    return type(x)(base, *(fill(t, base.shape) for t in tensors(x)))


@rule("clone", "alias", "detach", "lift_fresh_copy")
def _same(ctx: Context, op: Any, x: Any, **kwargs: Any) -> Any:
    return x


@rule("full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "new_empty")
def _shape_only(ctx: Context, op: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if any(moving(a) for a in args) else op(x.base, *args, **kwargs)


@rule("_to_copy")
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


@rule("constant_pad_nd")
def _pad(ctx: Context, op: Any, x: Any, pad: Any, value: Any = 0) -> Any:
    return Dual(op(x.base, pad, value), op(x.delta, pad, 0), op(x.dot, pad, 0))
