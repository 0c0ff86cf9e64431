"""Arithmetic of orders: how the leading powers of t pass through sums, products and functions.

A quantity ~ c t^v with a generic c has *order* v; 0 is a live quantity and inf an exact zero. Sums
take the smaller order, products add orders, a linear or bilinear operation takes the best of its
terms: the (min, +) semiring. Coefficients are generic: what cancels identically is not seen. NaN is
an order nobody knows; it stays one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

INF = math.inf
MOST_ORDERS = 64  # distinct finite orders of one tensor; real networks have a handful


def levels(orders: Tensor) -> list[float]:
    """The distinct finite orders in a tensor, smallest first.

    Raises:
        NotImplementedError: more than ``MOST_ORDERS`` of them.
    """
    found = orders[torch.isfinite(orders)].unique().tolist()
    if len(found) > MOST_ORDERS:
        raise NotImplementedError(f"{len(found)} different orders in one tensor")
    return [float(v) for v in found]


def indicator(orders: Tensor, level: float) -> Tensor:
    """1 where the order is ``level``."""
    return (orders == level).double()


def through(linear: Callable[[Tensor], Tensor], orders: Tensor, like: Tensor) -> Tensor:
    """Orders of ``linear(x)`` from those of x; ``like`` has the shape of the result.

    ``linear`` must have coefficients >= 0, so that terms of one order never cancel.
    """
    out = torch.full(like.shape, INF, dtype=torch.float64)
    for level in reversed(levels(orders)):
        out[linear(indicator(orders, level)) > 0] = level
    if bool(orders.isnan().any()):
        out[linear(orders.isnan().double()) > 0] = math.nan
    return out


def contract(
    bilinear: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, like: Tensor
) -> Tensor:
    """Orders of a bilinear operation with coefficients >= 0."""
    out = torch.full(like.shape, INF, dtype=torch.float64)
    pairs = sorted(((x + y, x, y) for x in levels(a) for y in levels(b)), reverse=True)
    for total, x, y in pairs:
        out[bilinear(indicator(a, x), indicator(b, y)) > 0] = total
    for one, other, swap in ((a, b, False), (b, a, True)):
        if bool(one.isnan().any()):
            unknown, ones = one.isnan().double(), torch.ones_like(other)
            out[(bilinear(ones, unknown) if swap else bilinear(unknown, ones)) > 0] = math.nan
    return out


def pull(
    linear: Callable[[Tensor], Tensor], gradient: Tensor, at: Sequence[int] | torch.Size
) -> Tensor:
    """Orders of the gradient in x from those of the gradient in ``linear(x)``; x has shape ``at``.

    The transpose of a linear map with coefficients >= 0 has the same coefficients.
    """
    back = torch.func.vjp(linear, torch.zeros(at, dtype=torch.float64))[1]
    out = torch.full(tuple(at), INF, dtype=torch.float64)
    for level in reversed(levels(gradient)):
        (hit,) = back(indicator(gradient, level))
        out[hit > 0] = level
    if bool(gradient.isnan().any()):
        out[back(gradient.isnan().double())[0] > 0] = math.nan
    return out


def pull_product(
    bilinear: Callable[[Tensor, Tensor], Tensor],
    gradient: Tensor,
    other: Tensor,
    at: Sequence[int] | torch.Size,
) -> Tensor:
    """Orders of the gradient in the first factor of ``bilinear(x, other)``."""
    out = torch.full(tuple(at), INF, dtype=torch.float64)
    found = []
    for y in levels(other):
        there = indicator(other, y)
        back = torch.func.vjp(
            lambda x, there=there: bilinear(x, there), torch.zeros(at, dtype=torch.float64)
        )[1]
        found += [(g + y, back, g) for g in levels(gradient)]
    for total, back, g in sorted(found, key=lambda f: -f[0]):
        (hit,) = back(indicator(gradient, g))
        out[hit > 0] = total
    if bool(gradient.isnan().any() or other.isnan().any()):
        out[:] = math.nan
    return out


def plus(a: Tensor, b: Tensor) -> Tensor:
    """Order of a product: the sum, where an exact zero stays one whatever it meets."""
    total = a + b
    return torch.where(torch.isposinf(a) | torch.isposinf(b), torch.full_like(total, INF), total)


def fold(orders: Tensor, shape: Sequence[int] | torch.Size) -> Tensor:
    """Undo broadcasting: the smallest order over every axis that ``shape`` does not have."""
    while orders.ndim > len(shape):
        orders = orders.amin(0)
    for axis, size in enumerate(shape):
        if size == 1 and orders.shape[axis] != 1:
            orders = orders.amin(axis, keepdim=True)
    return orders


class Germ:
    """A function of one variable near 0: whether φ(0) = 0, and its order there.

    Args:
        degree: φ(x) − φ(0) ~ x^degree.
        constant: φ(0) is not zero.
        singular: φ has no power law at 0 (a logarithm).
    """

    def __init__(self, degree: float, constant: bool = False, singular: bool = False) -> None:
        self.degree, self.constant, self.singular = degree, constant, singular

    def value(self, orders: Tensor) -> Tensor:
        """Orders of φ(x)."""
        if self.singular:
            return torch.where(orders == 0, orders, torch.full_like(orders, math.nan))
        if self.constant:
            return torch.zeros_like(orders)
        return _times(self.degree, orders)

    def slope(self, orders: Tensor) -> Tensor:
        """Orders of φ'(x)."""
        if self.singular:
            return torch.where(orders == 0, orders, torch.full_like(orders, math.nan))
        if math.isinf(self.degree):  # locally constant: live inputs move it, small ones do not
            return torch.where(orders == 0, orders, torch.full_like(orders, INF))
        return _times(self.degree - 1, orders)


def _times(factor: float, orders: Tensor) -> Tensor:
    if factor == 0:
        return torch.zeros_like(orders)
    scaled = factor * orders
    # An exact zero to a negative power is no power of t.
    return torch.where(
        torch.isinf(orders) & (scaled < 0), torch.full_like(orders, math.nan), scaled
    )


LINEAR_GERM = Germ(1)


def power_germ(exponent: Any) -> Germ:
    """x^exponent."""
    return Germ(float(exponent))


def clamp_germ(low: float | None, high: float | None) -> Germ:
    """x cut off at ``low`` and ``high``: the identity near 0 where 0 lies inside or on the edge."""
    inside = (low is None or low <= 0) and (high is None or high >= 0)
    return LINEAR_GERM if inside else Germ(INF, constant=True)
