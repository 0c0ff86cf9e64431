"""Sectional curvature of the Fisher metric of N(μ(θ), I), for a mean map μ given as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd, jvp

from deaddir_fast import _check
from deaddir_fast.theory.curvature_ray import CurvatureRay
from deaddir_fast.theory.gauss import (
    SectionalCurvature,
    TangentSpace,
    gauss_curvature,
    tangent_space,
)

WITHIN = ("parameters", "plane")
Map = Callable[[Tensor], Tensor]


def vector(argument: str, value: Any, size: int | None = None) -> Tensor:
    """Check a non-empty real vector (of a given size) and return it in fp64."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise _check.fail(argument, value, "a vector of real numbers", TypeError) from None
    shape = "a non-empty vector" if size is None else f"a vector of {size} numbers"
    if found.ndim != 1 or not found.numel() or found.numel() != (size or found.numel()):
        raise _check.fail(argument, value, shape)
    if not bool(torch.isfinite(found).all()):
        raise _check.fail(argument, value, "finite numbers")
    return found


def unit(argument: str, value: Any, size: int) -> Tensor:
    """Check a vector other than zero and scale it to length one."""
    found = vector(argument, value, size)
    norm = float(found.norm())
    if norm == 0:
        raise _check.fail(argument, value, "a vector other than zero")
    return found / norm


def flat_map(mu: Any, theta: Tensor) -> Map:
    """``mu`` with its output as one fp64 vector, checked at ``theta``."""
    if not callable(mu):
        raise _check.fail("mu", mu, "a function of one tensor", TypeError)
    value = mu(theta)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise _check.fail("mu", value, "a function that returns a real tensor", TypeError)
    return lambda x: mu(x).reshape(-1).double()


def second_derivative(mu: Map, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(N,): D²μ[x, y], forward over forward."""
    return jvp(lambda p: jvp(mu, (p,), (x,))[1], (theta,), (y,))[1]


def generic_pair(space: TangentSpace, d: int) -> tuple[Tensor, Tensor] | None:
    """A generic null vector of J and a generic vector of R^d; None if J has no null space."""
    if space.rank == d:
        return None
    draw = torch.Generator().manual_seed(0)
    null, other = torch.randn(2, d, generator=draw, dtype=torch.float64)
    for _ in range(2):
        null = null - space.live @ (space.live.T @ null)
    return null / null.norm(), other / other.norm()


def _at(mu: Map, theta: Tensor, u: Tensor, v: Tensor, within: str) -> SectionalCurvature:
    def along(x: Tensor) -> Tensor:
        return jvp(mu, (theta,), (x,))[1]

    plane = torch.stack([along(u), along(v)], 1)
    second = torch.stack(
        [second_derivative(mu, theta, x, y) for x, y in ((u, u), (u, v), (v, v))], 1
    )
    if within == "plane":
        return gauss_curvature(tangent_space(plane), plane, second, None, 2)
    space = tangent_space(jacfwd(mu)(theta))
    pair = generic_pair(space, theta.numel())
    bend = None if pair is None else second_derivative(mu, theta, *pair)
    return gauss_curvature(space, plane, second, bend, theta.numel())


def sectional_curvature(
    mu: Map, theta: Any, u: Any, v: Any, *, within: str = "parameters"
) -> SectionalCurvature:
    """Sectional curvature at ``theta`` of the metric F = JᵀJ of a mean map, in the plane (u, v).

    F is the Fisher metric of N(μ(θ), I), and that of any family for which μ is an isometric
    embedding (2√p for probabilities p). Exact first and second derivatives by forward mode, and the
    Gauss equation (:mod:`deaddir_fast.theory.gauss`); positive on a sphere.

    Args:
        mu: function of a (d,) fp64 tensor, made of differentiable torch operations; the output is
            flattened to (N,).
        theta: (d,) the point.
        u, v: (d,) two directions; only their plane matters.
        within: "parameters", the curvature of the whole d-dimensional manifold, or "plane", that of
            the surface θ + a u + b v in it (they differ by the Gauss equation of that surface).

    Returns:
        :class:`SectionalCurvature`, whose verdict says "unresolved: ..." where the metric
        degenerates or rounding hides the value.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    point = vector("theta", theta)
    function = flat_map(mu, point)
    _check.choice("within", within, WITHIN)
    directions = unit("u", u, point.numel()), unit("v", v, point.numel())
    with torch.no_grad():
        return _at(function, point, *directions, within)


def curvature_ray(
    mu: Map, theta: Any, u: Any, v: Any, radii: Any, *, within: str = "parameters"
) -> CurvatureRay:
    """Curvature in the plane (u, v) at the points θ + t u, u scaled to length one.

    See :func:`sectional_curvature`.

    Args:
        radii: (r,) real numbers t.

    Returns:
        :class:`CurvatureRay`; its :meth:`~CurvatureRay.rate` reads the order.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    point = vector("theta", theta)
    function = flat_map(mu, point)
    _check.choice("within", within, WITHIN)
    first, other = unit("u", u, point.numel()), unit("v", v, point.numel())
    grid = vector("radii", radii)
    with torch.no_grad():
        points = tuple(_at(function, point + t * first, first, other, within) for t in grid)
    return CurvatureRay(grid, points)
