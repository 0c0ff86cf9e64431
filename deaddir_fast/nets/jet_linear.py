"""Taylor rules of linear operations: they act on every coefficient alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets import series as ts
from deaddir_fast.nets.branches import select
from deaddir_fast.nets.jet_context import RULES, Context, Rule, is_series, leaves, rule
from deaddir_fast.nets.series import Series

aten = torch.ops.aten


def jointly_linear(op: Any) -> Rule:
    """Linear in all tensor arguments that can depend on t, together (``cat``, ``where``, ...).

    Constant tensors among the linear arguments enter the base value only.
    """

    def apply(context: Context, args: Any, kwargs: Any, linear_args: tuple[int, ...]) -> Any:
        values, spec = pytree.tree_flatten((list(args), kwargs), is_leaf=is_series)
        positions = _positions(args, linear_args)
        base = pytree.tree_unflatten([x.base if is_series(x) else x for x in values], spec)
        results: list[Any] = [op(*base[0], **base[1])]
        for q in range(1, context.order + 1):
            parts: list[Any] = []
            live = False
            for i, x in enumerate(values):
                if is_series(x):
                    live = live or x.c[q] is not None
                    parts.append(torch.zeros_like(x.base) if x.c[q] is None else x.c[q])
                elif i in positions and isinstance(x, Tensor):
                    parts.append(torch.zeros_like(x))
                else:
                    parts.append(x)
            if not live:
                results.append(None)
                continue
            filled = pytree.tree_unflatten(parts, spec)
            results.append(op(*filled[0], **filled[1]))
        return transpose(results)

    return apply


def _positions(args: Any, linear_args: tuple[int, ...]) -> set[int]:
    found: set[int] = set()
    offset = 0
    for i, x in enumerate(args):
        size = len(leaves(x)) if x is not None else 1
        if i in linear_args:
            found.update(range(offset, offset + size))
        offset += size
    return found


def transpose(results: list[Any]) -> Any:
    """Coefficients of tuples to tuples of coefficients."""
    if isinstance(results[0], Tensor):
        return Series(results)
    return [Series([None if r is None else r[i] for r in results]) for i in range(len(results[0]))]


def _register_linear(op: Any, linear_args: tuple[int, ...]) -> None:
    apply = jointly_linear(op)
    RULES[op] = lambda context, *args, **kwargs: apply(context, args, kwargs, linear_args)


for _op in (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.slice.Tensor,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.neg.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
    aten.cumsum.default, aten.flip.default, aten.roll.default, aten.index_select.default,
    aten.index.Tensor, aten.gather.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
    aten.avg_pool3d.default, aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default,
    aten.adaptive_avg_pool1d.default, aten.upsample_nearest1d.vec, aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default, aten.reflection_pad1d.default, aten.reflection_pad2d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.im2col.default,
    aten.col2im.default, aten.pixel_shuffle.default, aten.repeat.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, aten.tril.default, aten.triu.default,
    aten.diagonal.default, aten.unfold.default, aten.as_strided.default, aten.mul.Scalar,
    aten.div.Scalar, aten.trace.default,
):  # fmt: skip
    _register_linear(_op, (0,))
for _op in (aten.cat.default, aten.stack.default):
    _register_linear(_op, (0,))
for _op in (aten.slice_scatter.default, aten.select_scatter.default):
    _register_linear(_op, (0, 1))
_register_linear(aten.index_put.default, (0, 2))
for _op in (aten.scatter.src, aten.scatter_add.default, aten.index_add.default):
    _register_linear(_op, (0, 3))


@rule(aten._to_copy.default)
def _to_copy(context: Context, x: Series, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        context.notes[f"{context.label}: a value on the path is cast to {dtype}, held constant"] = (
            None
        )
        return aten._to_copy.default(x.base, **kwargs)
    return x.map(lambda c: aten._to_copy.default(c, **kwargs))


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(context: Context, a: Any, b: Any, alpha: float = 1) -> Series:
    if isinstance(a, Series) and not isinstance(b, (Series, Tensor)):
        return a.with_base(a.base + alpha * b)
    return ts.add(context.series(a), context.series(b), alpha)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(context: Context, a: Any, b: Any, alpha: float = 1) -> Series:
    return _add(context, a, b, alpha=-alpha)


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(context: Context, a: Any, b: Any, alpha: float = 1) -> Series:
    minus = a.map(lambda c: -alpha * c) if isinstance(a, Series) else -alpha * a
    return _add(context, minus, b)


@rule(aten.constant_pad_nd.default)
def _pad(context: Context, x: Series, pad: list[int], value: float = 0) -> Series:
    padded = x.map(lambda c: aten.constant_pad_nd.default(c, pad, 0))
    return padded.with_base(aten.constant_pad_nd.default(x.base, pad, value))


@rule(aten.masked_fill.Scalar)
def _masked_fill(context: Context, x: Series, mask: Tensor, value: float) -> Series:
    filled = x.map(lambda c: c.masked_fill(mask, 0))
    return filled.with_base(x.base.masked_fill(mask, value))


@rule(aten.where.self)
def _where(context: Context, mask: Tensor, a: Any, b: Any) -> Series:
    return select(mask, context.series(a), context.series(b))
