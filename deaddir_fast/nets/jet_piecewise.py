"""Taylor rules of piecewise operations: the branch beside the base point."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets import series as ts
from deaddir_fast.nets.branches import select
from deaddir_fast.nets.jet_context import RULES, Context, rule
from deaddir_fast.nets.jet_fallback import nested_jvp
from deaddir_fast.nets.series import Series

aten = torch.ops.aten


def _like(x: Series, value: float) -> Tensor:
    return torch.full_like(x.base, value)


@rule(aten.relu.default)
def _relu(context: Context, x: Series) -> Series:
    return select(context.sign(x, 0.0) > 0, x, context.series(_like(x, 0.0)))


@rule(aten.abs.default)
def _abs(context: Context, x: Series) -> Series:
    sign = context.sign(x, 0.0)
    return x.map(lambda c: c * sign)


@rule(aten.sign.default, aten.sgn.default)
def _sign(context: Context, x: Series) -> Tensor:
    return context.sign(x, 0.0).to(x.base.dtype)


def _comparison(op: Any, decide: Callable[[Tensor], Tensor]) -> None:
    def compare(context: Context, a: Any, b: Any) -> Tensor:
        first = context.series(a)
        return decide(context.sign(first, b))

    RULES[op] = compare


for _name, _decide in (
    ("gt", lambda s: s > 0),
    ("ge", lambda s: s >= 0),
    ("lt", lambda s: s < 0),
    ("le", lambda s: s <= 0),
    ("eq", lambda s: s == 0),
    ("ne", lambda s: s != 0),
):
    for _overload in ("Scalar", "Tensor"):
        _comparison(getattr(getattr(aten, _name), _overload), _decide)


def _larger(context: Context, a: Any, b: Any, part: str, flip: bool = False) -> Series:
    a, b = context.series(a), context.series(b)
    sign = context.sign(a, b, part)
    return select(sign <= 0 if flip else sign >= 0, a, b)


@rule(aten.maximum.default)
def _maximum(context: Context, a: Any, b: Any) -> Series:
    return _larger(context, a, b, "max")


@rule(aten.minimum.default)
def _minimum(context: Context, a: Any, b: Any) -> Series:
    return _larger(context, a, b, "min", flip=True)


def _bound(x: Series, bound: Any) -> Any:
    return bound if isinstance(bound, (Series, Tensor)) else _like(x, bound)


@rule(aten.clamp.default, aten.clamp.Tensor)
def _clamp(context: Context, x: Any, min: Any = None, max: Any = None) -> Series:
    out = context.series(x)
    if min is not None:
        out = _larger(context, out, _bound(out, min), "min")
    if max is not None:
        out = _larger(context, out, _bound(out, max), "max", flip=True)
    return out


@rule(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(context: Context, x: Any, min: Any) -> Series:
    return _clamp(context, x, min=min)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(context: Context, x: Any, max: Any) -> Series:
    return _clamp(context, x, max=max)


def _pick(context: Context, x: Series, dim: int, keepdim: bool, sign: int) -> tuple[Series, Tensor]:
    turned = x if sign > 0 else x.map(torch.neg)
    index = context.branches.largest(context.node, context.label, turned, dim)
    out = x.map(lambda c: c.gather(dim, index))
    if keepdim:
        return out, index
    return out.map(lambda c: c.squeeze(dim)), index.squeeze(dim)


def _extreme(context: Context, x: Series, dims: Any, keepdim: bool, sign: int) -> Series:
    ndim = x.base.ndim
    if ndim == 0:
        return x
    chosen = sorted(d % ndim for d in dims) if dims else list(range(ndim))
    kept = [d for d in range(ndim) if d not in chosen]
    shape = [x.base.shape[d] for d in kept]
    flat = x.map(lambda c: c.permute(*kept, *chosen).reshape(*shape, -1))
    out, _ = _pick(context, flat, -1, False, sign)
    if keepdim:
        full = [1 if d in chosen else n for d, n in enumerate(x.base.shape)]
        return out.map(lambda c: c.reshape(full))
    return out


@rule(aten.amax.default)
def _amax(context: Context, x: Series, dim: Any = (), keepdim: bool = False) -> Series:
    return _extreme(context, x, dim, keepdim, 1)


@rule(aten.amin.default)
def _amin(context: Context, x: Series, dim: Any = (), keepdim: bool = False) -> Series:
    return _extreme(context, x, dim, keepdim, -1)


@rule(aten.max.default)
def _max(context: Context, x: Series) -> Series:
    return _extreme(context, x, (), False, 1)


@rule(aten.min.default)
def _min(context: Context, x: Series) -> Series:
    return _extreme(context, x, (), False, -1)


@rule(aten.max.dim)
def _max_dim(context: Context, x: Series, dim: int, keepdim: bool = False) -> Any:
    return _pick(context, x, dim, keepdim, 1)


@rule(aten.min.dim)
def _min_dim(context: Context, x: Series, dim: int, keepdim: bool = False) -> Any:
    return _pick(context, x, dim, keepdim, -1)


@rule(aten.max_pool2d_with_indices.default)
def _max_pool2d(
    context: Context,
    x: Series,
    kernel: list[int],
    stride: Any = (),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    windows = _windows(x.base, kernel, stride, padding, dilation, ceil_mode)
    inside = windows >= 0
    flat = x.map(lambda c: c.flatten(-2))
    rows = windows.clamp(min=0)
    cells = Series(
        [
            None if c is None else torch.where(inside, c[..., rows], 0.0 if q else -torch.inf)
            for q, c in enumerate(flat.c)
        ]
    )
    out, index = _pick(context, cells, -1, False, 1)
    where = rows.expand(*index.shape, rows.shape[-1]).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return [out, where]


def _windows(
    x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Tensor:
    """(out_h, out_w, cells) flattened input positions of each pooling window, -1 for padding."""

    def axis(size: int, i: int) -> Tensor:
        def at(v: Any, default: int) -> int:
            return default if not v else v[i if len(v) > 1 else 0]

        k, p, d = at(kernel, 1), at(padding, 0), at(dilation, 1)
        s = at(stride, k)
        span = size + 2 * p - d * (k - 1) - 1
        count = (-(-span // s) if ceil_mode else span // s) + 1
        if ceil_mode and (count - 1) * s >= size + p:
            count -= 1
        starts = torch.arange(count, device=x.device) * s - p
        position = starts[:, None] + d * torch.arange(k, device=x.device)
        return torch.where((position >= 0) & (position < size), position, -1)

    height, width = x.shape[-2:]
    rows, columns = axis(height, 0), axis(width, 1)
    flat = rows[:, None, :, None] * width + columns[None, :, None, :]
    ok = (rows[:, None, :, None] >= 0) & (columns[None, :, None, :] >= 0)
    flat = torch.where(ok, flat, -1)
    return flat.reshape(rows.shape[0], columns.shape[0], -1)


@rule(aten.linalg_vector_norm.default)
def _vector_norm(
    context: Context, x: Series, ord: float = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Series:
    dims = list(range(x.base.ndim)) if dim is None else list(dim)
    if ord == math.inf:
        return _extreme(context, _abs(context, x), dims, keepdim, 1)
    if ord == 2:
        powers, root = ts.square(x), 0.5
    elif ord == 1:
        powers, root = _abs(context, x), 1.0
    elif float(ord).is_integer() and ord > 0:
        powers, root = ts.power(_abs(context, x) if ord % 2 else x, ord), 1.0 / ord
    else:
        return nested_jvp(context, aten.linalg_vector_norm.default, (x, ord, dim, keepdim), {})
    total = powers.map(lambda c: c.sum(dims, keepdim=keepdim))
    return total if root == 1.0 else ts.flow_power(total, total.base.pow(root), root)
