"""Differences f(a + d) - f(a) of elementwise functions, to relative rounding as d -> 0.

Each function here takes the base a (S), the difference d (P, *S) and f(a), and returns the
difference of f and its derivative at a + d. Closed forms are used where addition theorems exist,
else the mean of f' over the segment by Gauss-Legendre quadrature (our choice).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_REACH = 0.5  # beyond this difference plain subtraction loses nothing
_GROWTH = 6.0  # bound on the growth rate of derivatives the quadrature is dimensioned for


@cache
def _legendre(count: int) -> tuple[tuple[float, float], ...]:
    x, w = np.polynomial.legendre.leggauss(count)
    return tuple(zip(((x + 1) / 2).tolist(), (w / 2).tolist(), strict=True))


def _node_count(reach: float, eps: float) -> int:
    for n in range(1, 12):
        constant = math.factorial(n) ** 4 / ((2 * n + 1) * math.factorial(2 * n) ** 3)
        if constant * (_GROWTH * reach) ** (2 * n) < eps / 4:
            return n
    return 12


def mean_derivative(slope: Callable[[Tensor], Tensor], a: Tensor, d: Tensor) -> Tensor:
    """Integral over s in [0, 1] of slope(a + s d), for |d| up to 1/2."""
    d = d.clamp(-_REACH, _REACH)
    reach = float(d.abs().max()) if d.numel() else 0.0
    if not math.isfinite(reach):
        reach = _REACH
    total: Tensor | None = None
    for s, w in _legendre(_node_count(reach, torch.finfo(d.dtype).eps)):
        term = slope(torch.add(a, d, alpha=s))
        total = term.mul_(w) if total is None else total.add_(term, alpha=w)
    assert total is not None
    return total


def by_quadrature(f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Step:
    """A step from a function and its derivative; both must be smooth at the scale 1."""

    def step(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        near = mean_derivative(slope, a, d).mul_(d)
        large = d.abs() > _REACH
        x = a + d
        if bool(large.any()):
            near = torch.where(large, f(x) - y, near)
        return near, slope(x)

    return step


def _exp(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return y * torch.expm1(d), torch.exp(a + d)


def _exp2(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    scale = math.log(2)
    return y * torch.expm1(scale * d), scale * torch.exp2(a + d)


def _expm1(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.exp(a) * torch.expm1(d), torch.exp(a + d)


def _log(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log1p(d / a), (a + d).reciprocal_()


def _log1p(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log1p(d / (1 + a)), (1 + a + d).reciprocal_()


def _scaled(step: Step, factor: float) -> Step:
    def scaled(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        difference, slope = step(a, d, y)
        return difference.mul_(factor), slope.mul_(factor)

    return scaled


def _reciprocal(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    inverse = (a + d).reciprocal_()
    return -d * y * inverse, -inverse.square()


def _sqrt(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    root = (a + d).sqrt_()
    total = root + y
    return torch.where(total == 0, d, d / total), 0.5 / root


def _rsqrt(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    inverse = (a + d).rsqrt_()
    # 1/sqrt(b) - 1/sqrt(a) = -d / (sqrt(a b) (sqrt(a) + sqrt(b))), with y = 1/sqrt(a).
    return -d * (inverse * y).square() / (inverse + y), -0.5 * inverse**3


def _sech(x: Tensor) -> Tensor:
    e = torch.exp(-x.abs())
    return 2 * e / (1 + e.square())


def _tanh(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = a + d
    sech = _sech(x)
    # tanh x - tanh a = sinh(x - a) sech x sech a; beyond 30 the difference is not small.
    far = d.abs() > 30
    difference = torch.sinh(d.clamp(-30, 30)) * sech * _sech(a)
    if bool(far.any()):
        difference = torch.where(far, torch.tanh(x) - y, difference)
    return difference, sech.square()


def _sigmoid(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = a + d
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    # s(x) - s(a) = s(a) s(-x) (e^d - 1), or for d > 0 the same with no growing factor.
    up = p * torch.sigmoid(-a) * -torch.expm1(-d.clamp(min=0))
    down = y * q * torch.expm1(d.clamp(max=0))
    return up.add_(down), p.mul_(q)


def _sin(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    half = d / 2
    return 2 * torch.sin(half) * torch.cos(a + half), torch.cos(a + d)


def _cos(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    half = d / 2
    return -2 * torch.sin(half) * torch.sin(a + half), -torch.sin(a + d)


def _sinh(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    half = d / 2
    return 2 * torch.sinh(half) * torch.cosh(a + half), torch.cosh(a + d)


def _cosh(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    half = d / 2
    return 2 * torch.sinh(half) * torch.sinh(a + half), torch.sinh(a + d)


def _erf_slope(x: Tensor) -> Tensor:
    return x.square().neg_().exp_().mul_(2 / math.sqrt(math.pi))


def _abs(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = a + d
    sign = torch.sign(x)
    return torch.where(sign == torch.sign(a), sign * d, x.abs() - y), sign


def _square(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return d * (2 * a + d), 2 * (a + d)


def power(exponent: float) -> Step | None:
    """The step of x -> x^exponent; None where no rule here is exact near 0."""
    if exponent == 2:
        return _square
    if exponent == 0.5:
        return _sqrt
    if exponent == -0.5:
        return _rsqrt
    if exponent == -1:
        return _reciprocal
    if exponent == int(exponent) and 1 <= abs(exponent) <= 16:
        n = int(abs(exponent))

        def whole(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x = a + d
            # x^n - a^n = d (x^(n-1) + x^(n-2) a + ... + a^(n-1))
            total = torch.ones_like(x)
            for k in range(1, n):
                total = total * x + a**k
            difference, slope = d * total, n * x ** (n - 1)
            if exponent > 0:
                return difference, slope
            return -difference * y / x**n, -slope / x ** (2 * n)

        return whole

    def real(a: Tensor, d: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = a + d
        near = y * torch.expm1(exponent * torch.log1p(d / a))
        direct = x**exponent - y
        return torch.where(a > 0, near, direct), exponent * x ** (exponent - 1)

    return real


STEPS: dict[str, Step] = {
    "exp": _exp,
    "exp2": _exp2,
    "expm1": _expm1,
    "log": _log,
    "log2": _scaled(_log, 1 / math.log(2)),
    "log10": _scaled(_log, 1 / math.log(10)),
    "log1p": _log1p,
    "reciprocal": _reciprocal,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "sin": _sin,
    "cos": _cos,
    "sinh": _sinh,
    "cosh": _cosh,
    "erf": by_quadrature(torch.erf, _erf_slope),
    "erfc": by_quadrature(torch.erfc, lambda x: _erf_slope(x).neg_()),
    "atan": by_quadrature(torch.atan, lambda x: 1 / (1 + x.square())),
    "asinh": by_quadrature(torch.asinh, lambda x: (1 + x.square()).rsqrt_()),
    "abs": _abs,
    "square": _square,
}
