"""Taylor rules of products and quotients: coefficients convolve."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets import series as ts
from deaddir_fast.nets.jet_context import RULES, Context, Rule, rule
from deaddir_fast.nets.series import Series

aten = torch.ops.aten


@rule(aten.mul.Tensor)
def _mul(context: Context, a: Any, b: Any) -> Series:
    if not isinstance(b, (Series, Tensor)):
        return a.map(lambda c: c * b)
    first = context.series(a)
    return ts.square(first) if a is b else ts.multiply(first, context.series(b))


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


def _unsqueeze(x: Tensor, dims: list[int]) -> Tensor:
    for d in dims:
        x = x.unsqueeze(d)
    return x


@rule(aten._trilinear.default)
def _trilinear(
    context: Context, a: Any, b: Any, c: Any, *expand_and_sum: list[int], unroll_dim: int = 1
) -> Series:
    *expand, total = expand_and_sum
    factors = []
    for x, dims in zip((a, b, c), expand, strict=True):
        series = context.series(x)
        factors.append(series.map(partial(_unsqueeze, dims=dims)))
    product = ts.multiply(ts.multiply(factors[0], factors[1]), factors[2])
    return product.map(lambda v: v.sum(total))


@rule(aten.prod.default)
def _prod(context: Context, x: Series, **kwargs: Any) -> Series:
    return ts.product(x.map(lambda c: c.reshape(-1)), 0).map(lambda c: c.reshape(()))


@rule(aten.prod.dim_int)
def _prod_dim(context: Context, x: Series, dim: int, keepdim: bool = False, **_: Any) -> Series:
    out = ts.product(x, dim)
    return out if keepdim else out.map(lambda c: c.squeeze(dim))
