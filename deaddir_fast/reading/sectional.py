"""Sectional curvature of a model's Fisher metric, at its parameters and along rays from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.fisher.embedding import embed
from deaddir_fast.fisher.jacobian import ROW_BLOCK
from deaddir_fast.nets.likelihood import Likelihood
from deaddir_fast.nets.series import Series
from deaddir_fast.reading.local import LocalModel
from deaddir_fast.theory.curvature_ray import CurvatureRay
from deaddir_fast.theory.gauss import SectionalCurvature, gauss_curvature, tangent_space
from deaddir_fast.theory.sectional import WITHIN, generic_pair, vector

Direction = Mapping[str, Tensor]


def unit_direction(argument: str, value: Any, local: LocalModel) -> Tensor:
    """(d,): a direction {parameter name: tensor of its shape}, scaled to unit norm."""
    space = local.space
    if not isinstance(value, Mapping) or not value:
        raise _check.fail(argument, value, "a non-empty dict {parameter name: tensor}", TypeError)
    for name, part in value.items():
        if name not in space.names:
            raise ValueError(f"{argument}: no parameter called {name!r} in the model")
        _check.tensor(f"{argument}[{name!r}]", part)
        shape = tuple(space.shapes[space.names.index(name)])
        if tuple(part.shape) != shape:
            raise _check.fail(f"{argument}[{name!r}]", part, f"shape {shape}")
    like = torch.zeros((), dtype=torch.float64)
    found = space.vectors({k: v.detach().cpu()[None] for k, v in value.items()}, 1, like)[0]
    norm = float(found.norm())
    if not 0 < norm < float("inf"):
        raise _check.fail(argument, value, "a direction of finite norm other than zero")
    return found / norm


class _Embedded:
    """The embedding of a model and its derivatives along lines, at any parameters."""

    def __init__(self, local: LocalModel) -> None:
        self.local = local

    def lines(self, theta: Tensor, vectors: Tensor, order: int) -> tuple[list[Tensor], bool]:
        """Coefficients (N, q) of t^1..t^order along q lines, and whether a kink was met."""
        local = self.local
        curves = {k: v[None] for k, v in local.space.directions(vectors).items()}
        jet = local.program.run(curves, order, base=local.space.directions(theta))
        image = embed(local.likelihood, Series(list(jet.coefficients)))
        found = []
        for c in image.c[1:]:
            rows = torch.zeros_like(image.base) if c is None else c
            found.append(rows.flatten(1).T / local.samples**0.5)
        return found, bool(jet.kinks.any())

    def jacobian(self, theta: Tensor) -> Tensor:
        """(N, d)."""
        units = torch.eye(theta.numel(), dtype=torch.float64).split(ROW_BLOCK)
        return torch.cat([self.lines(theta, part, 1)[0][0] for part in units], 1)

    def at(self, theta: Tensor, u: Tensor, v: Tensor, within: str) -> SectionalCurvature:
        """Curvature in the plane (u, v)."""
        # D²μ[u,u] is twice the coefficient of t²; D²μ[u,v] the difference of those along u ± v.
        lines = torch.stack([u, v, u + v, u - v])
        (first, second), kinked = self.lines(theta, lines, 2)
        uu, vv, plus, minus = second.T
        plane, forms = first[:, :2], torch.stack([2 * uu, (plus - minus) / 2, 2 * vv], 1)
        if within == "plane":
            found = gauss_curvature(tangent_space(plane), plane, forms, None, 2)
        else:
            space = tangent_space(self.jacobian(theta))
            pair, bend = generic_pair(space, theta.numel()), None
            if pair is not None:
                ends = torch.stack([pair[0] + pair[1], pair[0] - pair[1]])
                plus, minus = self.lines(theta, ends, 2)[0][1].T
                bend = (plus - minus) / 2
            found = gauss_curvature(space, plane, forms, bend, theta.numel())
        if kinked:
            why = "unresolved: the model has a kink here"
            return replace(found, value=float("nan"), rounding=float("nan"), verdict=why)
        return found


def _prepare(
    model: Any, inputs: Any, u: Any, v: Any, likelihood: Any, within: str
) -> tuple[_Embedded, Tensor, Tensor]:
    if not isinstance(model, nn.Module):
        expected = "a torch.nn.Module (for a function of a vector: theory.sectional_curvature)"
        raise _check.fail("model", model, expected, TypeError)
    _check.choice("within", within, WITHIN)
    local = LocalModel(model, inputs, likelihood)
    embed(local.likelihood, Series([local.outputs]))  # refuse what has no embedding
    if within == "parameters" and not local.dense:
        raise _check.fail(
            "within", within, f"'plane' for {local.space.dimension} parameters on these inputs"
        )
    return _Embedded(local), unit_direction("u", u, local), unit_direction("v", v, local)


def sectional_curvature(
    model: nn.Module,
    inputs: Any,
    u: Direction,
    v: Direction,
    *,
    likelihood: str | Likelihood = "categorical",
    within: str = "parameters",
) -> SectionalCurvature:
    """Sectional curvature of the exact Fisher metric, at the model's parameters, in a plane.

    The likelihood embeds the outputs isometrically in flat space
    (:mod:`deaddir_fast.fisher.embedding`), and the Gauss equation takes Taylor coefficients of
    that embedding (:mod:`deaddir_fast.theory.gauss`): exact derivatives, in fp64 on a copy.

    Args:
        model: any module in evaluation mode.
        inputs: a tensor, a tuple or a dict; samples lead.
        u, v: {parameter name: tensor of its shape}, a missing parameter is zero; only the plane
            matters.
        likelihood: "categorical", "gaussian", "bernoulli", "poisson" or one of these objects.
        within: "parameters", the curvature of the whole parameter manifold (up to 4096 parameters;
            null directions of constant rank are divided out), or "plane", that of the surface
            θ0 + a u + b v, for models whose metric changes rank nearby or that are large.

    Returns:
        :class:`~deaddir_fast.theory.SectionalCurvature`: "unresolved: ..." where the metric
        degenerates, the rank changes, a kink is met or rounding hides the value.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: for an operation that cannot be differentiated forward.
    """
    embedded, first, other = _prepare(model, inputs, u, v, likelihood, within)
    return embedded.at(embedded.local.theta, first, other, within)


def curvature_ray(
    model: nn.Module,
    inputs: Any,
    u: Direction,
    v: Direction,
    radii: Any,
    *,
    likelihood: str | Likelihood = "categorical",
    within: str = "parameters",
) -> CurvatureRay:
    """Curvature in the plane (u, v) at the parameters θ0 + t u, u scaled to unit norm.

    ``curvature_ray(...).rate()`` reads the order k of a dead direction u from
    |curvature| ~ t^(-2(k-1)), or says why that law is not the one to read.

    Args:
        model, inputs, u, v, likelihood, within: as for :func:`sectional_curvature`; v has to be
            live.
        radii: (r,) real numbers t.

    Returns:
        :class:`~deaddir_fast.theory.CurvatureRay`.

    Raises:
        TypeError, ValueError, NotImplementedError: as for :func:`sectional_curvature`.
    """
    embedded, first, other = _prepare(model, inputs, u, v, likelihood, within)
    grid = vector("radii", radii)
    start = embedded.local.theta
    points = tuple(embedded.at(start + t * first, first, other, within) for t in grid)
    return CurvatureRay(grid, points)
