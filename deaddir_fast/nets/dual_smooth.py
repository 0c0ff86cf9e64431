"""Rules for elementwise smooth functions, powers and softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets import dual_elementwise
from deaddir_fast.nets.dual_registry import RULES, Rule, aten, note_kink, rule
from deaddir_fast.nets.dual_values import Context, Dual


def elementwise(step: dual_elementwise.Step, base: Tensor, x: Dual) -> Dual:
    """f(x) from the step of f and f at the base."""
    delta, slope = step(x.base, x.delta, base)
    return Dual(base, delta, slope.mul_(x.dot) if slope.shape == x.dot.shape else slope * x.dot)


def _step_rule(name: str) -> Rule:
    step = dual_elementwise.STEPS[name]

    def rule(ctx: Context, op: Any, x: Any) -> Any:
        if not isinstance(x, Dual):
            return NotImplemented
        if name in ("abs", "sqrt"):
            note_kink(ctx, name, x.base, x.dot)
        return elementwise(step, op(x.base), x)

    return rule


for _name in dual_elementwise.STEPS:
    RULES[getattr(aten, _name)] = _step_rule(_name)


@rule("pow")
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
    return NotImplemented if step is None else elementwise(step, op(x.base, exponent), x)


def _centred(p: Tensor, d: Tensor, dim: int) -> Tensor:
    return d - (p * d).sum(dim, keepdim=True)


@rule("_softmax")
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


@rule("_log_softmax")
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
