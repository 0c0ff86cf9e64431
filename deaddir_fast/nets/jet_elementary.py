"""Taylor rules of elementary functions and softmax, by their differential recurrences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from deaddir_fast.nets import series as ts
from deaddir_fast.nets.jet_context import RULES, Context, Rule, rule
from deaddir_fast.nets.series import Series

aten = torch.ops.aten


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
