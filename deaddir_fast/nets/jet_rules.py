"""Taylor rules per ATen operation: what each does to truncated power series.

A rule takes the propagation's :class:`Context` and the operation's own arguments, some of which
are :class:`~deaddir_fast.nets.series.Series`, and returns the series of the result. Rules run
under ``vmap`` over directions, so they see the operation's plain shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets import series as ts
from deaddir_fast.nets.branches import Branches, select
from deaddir_fast.nets.series import Series

aten = torch.ops.aten


@dataclass
class Context:
    """One propagation: its order, the branches it takes, what it has to report."""

    order: int
    branches: Branches
    node: str = ""
    label: str = ""
    notes: dict[str, None] = field(default_factory=dict)

    def series(self, x: Any) -> Series:
        """A series, made constant if ``x`` is a tensor or a number."""
        if isinstance(x, Series):
            return x
        value = x if isinstance(x, Tensor) else torch.as_tensor(x)
        return ts.constant(value, self.order)

    def sign(self, a: Series, b: Any, part: str = "") -> Tensor:
        """Sign of a - b beside t = 0, noted under the current operation."""
        return self.branches.sign((self.node, part), self.label, a, b)


Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register a rule for the given overloads."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def _is_series(x: Any) -> bool:
    return isinstance(x, Series)


def _leaves(x: Any) -> list[Any]:
    return pytree.tree_leaves(x, is_leaf=_is_series)


def uses_series(args: Any, kwargs: Any) -> bool:
    """Whether any argument depends on t."""
    return any(isinstance(x, Series) for x in _leaves((args, kwargs)))


# --- linear -----------------------------------------------------------------------------------


def jointly_linear(op: Any) -> Rule:
    """Linear in all tensor arguments that can depend on t, together (``cat``, ``where``, ...).

    Constant tensors among the linear arguments enter the base value only.
    """

    def apply(context: Context, args: Any, kwargs: Any, linear_args: tuple[int, ...]) -> Any:
        leaves, spec = pytree.tree_flatten((list(args), kwargs), is_leaf=_is_series)
        positions = _positions(args, linear_args)
        base = pytree.tree_unflatten([x.base if _is_series(x) else x for x in leaves], spec)
        results: list[Any] = [op(*base[0], **base[1])]
        for q in range(1, context.order + 1):
            parts: list[Any] = []
            live = False
            for i, x in enumerate(leaves):
                if _is_series(x):
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
        return _transpose(results)

    return apply


def _positions(args: Any, linear_args: tuple[int, ...]) -> set[int]:
    found: set[int] = set()
    offset = 0
    for i, x in enumerate(args):
        size = len(_leaves(x)) if x is not None else 1
        if i in linear_args:
            found.update(range(offset, offset + size))
        offset += size
    return found


def _transpose(results: list[Any]) -> Any:
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


# --- products ---------------------------------------------------------------------------------


@rule(aten.mul.Tensor)
def _mul(context: Context, a: Any, b: Any) -> Series:
    if not isinstance(b, (Series, Tensor)):
        return a.map(lambda c: c * b)
    return ts.square(a) if a is b else ts.multiply(context.series(a), context.series(b))


@rule(aten.square.default)
def _square(context: Context, x: Series) -> Series:
    return ts.square(x)


@rule(aten.div.Tensor)
def _div(context: Context, a: Any, b: Any) -> Series:
    if not isinstance(b, Series):
        return a.map(lambda c: c / b) if not isinstance(b, Tensor) else _divide(context, a, b)
    return _divide(context, a, b)


def _divide(context: Context, a: Any, b: Any) -> Series:
    return ts.divide(context.series(a), context.series(b))


def _matrix_rule(op: Any) -> Rule:
    return lambda context, a, b: ts.bilinear(op, context.series(a), context.series(b))


for _op in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default):
    RULES[_op] = _matrix_rule(_op)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def _affine(context: Context, c: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Series:
    product = ts.bilinear(torch.matmul, context.series(a), context.series(b))
    if alpha != 1:
        product = product.map(lambda x: alpha * x)
    shift = context.series(c)
    return ts.add(product, shift if beta == 1 else shift.map(lambda x: beta * x))


@rule(aten.convolution.default)
def _convolution(context: Context, x: Any, w: Any, bias: Any, *rest: Any) -> Series:
    out = ts.bilinear(
        lambda a, b: aten.convolution.default(a, b, None, *rest),
        context.series(x),
        context.series(w),
    )
    if bias is None:
        return out
    spread = (-1,) + (1,) * (out.base.ndim - 2)
    return ts.add(out, context.series(bias).map(lambda c: c.reshape(spread)))


@rule(aten.embedding.default)
def _embedding(context: Context, weight: Series, index: Tensor, *rest: Any) -> Series:
    return weight.map(lambda c: aten.embedding.default(c, index))


@rule(aten._trilinear.default)
def _trilinear(
    context: Context, a: Any, b: Any, c: Any, *expand_and_sum: list[int], unroll_dim: int = 1
) -> Series:
    *expand, total = expand_and_sum
    factors = []
    for x, dims in zip((a, b, c), expand, strict=True):
        series = context.series(x)
        for d in dims:
            series = series.map(lambda v, d=d: v.unsqueeze(d))
        factors.append(series)
    product = ts.multiply(ts.multiply(factors[0], factors[1]), factors[2])
    return product.map(lambda v: v.sum(total))


@rule(aten.prod.default)
def _prod(context: Context, x: Series, **kwargs: Any) -> Series:
    return ts.product(x.map(lambda c: c.reshape(-1)), 0).map(lambda c: c.reshape(()))


@rule(aten.prod.dim_int)
def _prod_dim(context: Context, x: Series, dim: int, keepdim: bool = False, **_: Any) -> Series:
    out = ts.product(x, dim)
    return out if keepdim else out.map(lambda c: c.squeeze(dim))


# --- elementary functions ---------------------------------------------------------------------


def _unary(function: Callable[[Series], Series]) -> Rule:
    return lambda context, x: function(x)


def _scaled(function: Callable[[Series], Series], factor: float) -> Rule:
    return lambda context, x: function(x).map(lambda c: c * factor)


def _one_minus_square(x: Series) -> Series:
    return ts.square(x).map(torch.neg).with_base((1 - x.base) * (1 + x.base))


def _one_plus_square(x: Series) -> Series:
    out = ts.square(x)
    return out.with_base(1 + out.base)


def _tan(x: Series) -> Series:
    sine, cosine = ts.sin_cos(x)
    return ts.divide(sine, cosine)


RULES.update(
    {
        aten.exp.default: _unary(ts.exp),
        aten.exp2.default: lambda context, x: ts.exp(x.map(lambda c: c * math.log(2))),
        aten.expm1.default: _unary(ts.expm1),
        aten.log.default: _unary(ts.log),
        aten.log1p.default: _unary(ts.log1p),
        aten.log2.default: _scaled(ts.log, 1 / math.log(2)),
        aten.log10.default: _scaled(ts.log, 1 / math.log(10)),
        aten.tanh.default: _unary(ts.tanh),
        aten.sigmoid.default: _unary(ts.sigmoid),
        aten.erf.default: _unary(ts.erf),
        aten.erfc.default: lambda context, x: ts.erf(x).map(torch.neg).with_base(x.base.erfc()),
        aten.sin.default: lambda context, x: ts.sin_cos(x)[0],
        aten.cos.default: lambda context, x: ts.sin_cos(x)[1],
        aten.tan.default: _unary(_tan),
        aten.sinh.default: lambda context, x: ts.sinh_cosh(x)[0],
        aten.cosh.default: lambda context, x: ts.sinh_cosh(x)[1],
        aten.atan.default: lambda context, x: ts.primitive(
            x, x.base.atan(), ts.reciprocal(_one_plus_square(x))
        ),
        aten.asin.default: lambda context, x: ts.primitive(
            x, x.base.asin(), ts.rsqrt(_one_minus_square(x))
        ),
        aten.acos.default: lambda context, x: ts.primitive(
            x, x.base.acos(), ts.rsqrt(_one_minus_square(x)).map(torch.neg)
        ),
        aten.asinh.default: lambda context, x: ts.primitive(
            x, x.base.asinh(), ts.rsqrt(_one_plus_square(x))
        ),
        aten.atanh.default: lambda context, x: ts.primitive(
            x, x.base.atanh(), ts.reciprocal(_one_minus_square(x))
        ),
        aten.reciprocal.default: _unary(ts.reciprocal),
        aten.sqrt.default: _unary(ts.sqrt),
        aten.rsqrt.default: _unary(ts.rsqrt),
    }
)


@rule(aten.pow.Tensor_Scalar)
def _pow(context: Context, x: Series, exponent: float) -> Series:
    return ts.power(x, exponent)


@rule(aten.pow.Scalar)
def _pow_scalar(context: Context, base: float, x: Series) -> Series:
    return ts.exp(x.map(lambda c: c * math.log(base)))


@rule(aten.pow.Tensor_Tensor)
def _pow_tensor(context: Context, a: Any, b: Any) -> Series:
    a, b = context.series(a), context.series(b)
    return ts.exp(ts.multiply(ts.log(a), b)).with_base(a.base.pow(b.base))


@rule(aten._softmax.default)
def _softmax(context: Context, x: Series, dim: int, half_to_float: bool = False) -> Series:
    return ts.softmax(x, dim)


@rule(aten._log_softmax.default)
def _log_softmax(context: Context, x: Series, dim: int, half_to_float: bool = False) -> Series:
    return ts.log_softmax(x, dim)


# --- piecewise --------------------------------------------------------------------------------


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


# --- norms ------------------------------------------------------------------------------------


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


# --- everything else --------------------------------------------------------------------------


def _at_base(op: Any) -> Rule:
    """Operations whose result does not change along the curve: shapes, tests, fills."""

    def apply(context: Context, *args: Any, **kwargs: Any) -> Any:
        values = pytree.tree_map(
            lambda x: x.base if _is_series(x) else x, (list(args), kwargs), is_leaf=_is_series
        )
        return op(*values[0], **values[1])

    return apply


for _op in (
    aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.new_empty.default, aten.isnan.default, aten.isinf.default,
):  # fmt: skip
    RULES[_op] = _at_base(_op)


def short_name(op: Any) -> str:
    """``aten.special_i0.default`` -> ``special_i0``."""
    return str(op).removeprefix("aten.").split(".")[0]


def _floating(value: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(value))


def nested_jvp(context: Context, op: Any, args: Any, kwargs: Any) -> Any:
    """Taylor coefficients of one operation by ``order`` nested forward derivatives.

    Correct wherever torch has a forward derivative (see :func:`check_derivative`), at a cost of
    2^order, and noted. Results that are not floating-point are held at their base value, noted.
    """
    name = short_name(op)
    leaves, spec = pytree.tree_flatten((list(args), kwargs), is_leaf=_is_series)
    base = _at_base(op)(context, *args, **kwargs)
    if not _floating(base):
        context.notes[f"{name}: held at its value at the base point"] = None
        return base
    context.notes[f"{name}: no Taylor rule, differentiated by nested jvp (cost 2^order)"] = None
    first = next(x for x in leaves if _is_series(x))
    zero = torch.zeros((), dtype=first.base.dtype, device=first.base.device)
    one = torch.ones_like(zero)

    def along(t: Tensor) -> Any:
        values = []
        for x in leaves:
            if _is_series(x):
                total = x.base
                for q in range(1, context.order + 1):
                    if x.c[q] is not None:
                        total = total + x.c[q] * t**q
                x = total
            values.append(x)
        filled = pytree.tree_unflatten(values, spec)
        out = op(*filled[0], **filled[1])
        return out if isinstance(out, Tensor) else tuple(out)

    results = [base if isinstance(base, Tensor) else tuple(base)]
    derivative = along
    for q in range(1, context.order + 1):

        def derivative(t: Tensor, inner: Any = derivative) -> Any:
            return torch.func.jvp(inner, (t,), (one,))[1]

        try:
            value = derivative(zero)
        except (NotImplementedError, RuntimeError) as error:
            raise no_derivative(op) from error
        scale = 1.0 / math.factorial(q)
        results.append(pytree.tree_map(lambda x, s=scale: x * s, value))
    return _transpose(results)


def no_derivative(op: Any) -> NotImplementedError:
    """The error for an operation that cannot be expanded."""
    return NotImplementedError(
        f"model: {short_name(op)} has neither a Taylor rule nor a usable forward derivative in "
        "torch; replace it by differentiable operations"
    )


def check_derivative(op: Any, args: Any, kwargs: Any) -> None:
    """Refuse an operation whose nested forward derivatives in torch cannot be trusted.

    Some have no formula and return zero without a word (``torch.special.bessel_j0`` in torch
    2.13), some are wrong from the second nesting on (``native_layer_norm``, which the capture
    takes apart). Three levels are compared with central differences along a random direction.

    Raises:
        NotImplementedError: naming the operation.
    """
    leaves, spec = pytree.tree_flatten((list(args), kwargs))
    generator = torch.Generator().manual_seed(0)
    tangents: dict[int, Tensor] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.is_floating_point():
            draw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            leaves[i], tangents[i] = x.double(), draw.to(x.device)
    if not tangents:
        return
    zero = torch.zeros((), dtype=torch.float64, device=next(iter(tangents.values())).device)
    one, step = torch.ones_like(zero), zero + 1e-5

    def along(t: Tensor) -> list[Tensor]:
        filled = [x + t * tangents[i] if i in tangents else x for i, x in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return [x for x in pytree.tree_leaves(op(*args, **kwargs)) if x.is_floating_point()]

    function: Callable[[Tensor], list[Tensor]] = along
    try:
        for _ in range(3):

            def derivative(t: Tensor, inner: Any = function) -> list[Tensor]:
                return torch.func.jvp(inner, (t,), (one,))[1]

            for exact, ahead, behind in zip(
                derivative(zero), function(step), function(-step), strict=True
            ):
                difference = (ahead - behind) / (2 * step)
                finite = exact.isfinite() & difference.isfinite()
                error = torch.where(finite, exact - difference, 0.0).abs()
                size = torch.where(finite, difference, 0.0).abs()
                if error.numel() and bool(error.max() > 1e-4 * size.max() + 1e-9):
                    raise no_derivative(op)
            function = derivative
    except (NotImplementedError, RuntimeError) as error:
        raise no_derivative(op) from error


def propagate(context: Context, op: Any, args: Any, kwargs: Any) -> Any:
    """Apply the rule of one operation, or nested jvp."""
    found = RULES.get(op)
    if found is None:
        return nested_jvp(context, op, args, kwargs)
    return found(context, *args, **kwargs)
