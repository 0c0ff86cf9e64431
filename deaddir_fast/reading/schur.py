"""``schur_curvature``: curvature along a line, cleared of what the live directions can undo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.nets.rays import check_radii
from deaddir_fast.nets.weights import RankOne, check_directions
from deaddir_fast.reading.dead import open_local
from deaddir_fast.reading.local import LocalModel
from deaddir_fast.reading.selection import Selection, selection_rule

EPS = torch.finfo(torch.float64).eps
STEPS = 40  # of Gauss-Newton
HALVINGS = 8  # of a step
PROGRESS = 0.5  # once converged, a step that leaves more than this of the error is the last
CONVERGED = 1e-5  # of the first error
DEPENDENT = 1e-13  # a pivot below this times the largest one
SLACK = 64  # roundings of an inner product


@dataclass(frozen=True)
class SchurCurvature:
    """Raw and Schur curvature on a grid of directions and radii; fit with ``fit_rate``.

    All tensors are fp64.

    Attributes:
        radii: (r,).
        raw: (p, r), u^T F u at θ0 + t u.
        schur: (p, r), F_uu - F_uL F_LL^-1 F_Lu at the relaxed point, L the live space at θ0; 0
            where it is below ``floor``, NaN where the point could not be relaxed.
        kl: (p, r), KL(p_θ0 || p) at the relaxed point, in nats; 0 below its rounding.
        moved: (p, r), distance from θ0 + t u to the relaxed point.
        floor: (p, r), rounding of ``schur``.
        line_orders: (p,) KL order of the straight line from Taylor coefficients; NaN if unclear.
        relaxed_orders: (p,) KL order of the relaxed line, inf where K stays zero.
        gram_floor: λ_g, the smallest eigenvalue of F on the live space at θ0.
        ratios: (p,), 2k² Σ_a E[a b_a]² / (k² E[a²]), a the leading score coefficient along u and
            b_a the live scores.
        margins: (p,), ratio over λ_g/2; the selection rule holds below 1.
        verdicts: per direction ``"transversal"`` or why the selection rule does not apply.
        relaxed: whether the points were relaxed.
        live: number of live directions.
        samples: n.
    """

    radii: Tensor
    raw: Tensor
    schur: Tensor
    kl: Tensor
    moved: Tensor
    floor: Tensor
    line_orders: Tensor
    relaxed_orders: Tensor
    gram_floor: float
    ratios: Tensor
    margins: Tensor
    verdicts: tuple[str, ...]
    relaxed: bool
    live: int
    samples: int

    def pointwise_order(self) -> Tensor:
        """(p, r): sqrt(t² S / (2 K)) at the relaxed points, the KL order without a fit."""
        ratio = self.radii.square() * self.schur / (2 * self.kl)
        return torch.where((self.kl > 0) & (self.schur > 0), ratio, torch.nan).sqrt()


@dataclass(frozen=True)
class Point:
    """Raw and Schur curvature of one direction at one radius."""

    raw: float
    schur: float
    kl: float
    floor: float
    kl_floor: float
    theta: Tensor


def schur_point(
    local: LocalModel, vector: Tensor, radius: float, start: Tensor | None, relax: bool = True
) -> Point:
    """Curvature of a unit vector (d,) at one radius, relaxed along the live space.

    Args:
        start: (d,) first guess of the live correction.
    """
    live = local.spectrum.live.T
    straight = local.theta + radius * vector
    outputs, derivative = local.tangents_at(straight, vector[None])
    raw = float(local.whiten(derivative, outputs).square().sum())
    theta, error = straight, 0.0
    rounding = rounding_near(local, straight)
    if relax and live.shape[0]:
        first = straight if start is None else straight + start
        theta, error, tangents = relax_live(local, first, live, rounding)
        if not bool(torch.isfinite(theta).all()):
            nan = float("nan")
            return Point(raw, nan, nan, nan, nan, theta)
    else:
        tangents = local.tangents_at(theta, live)[1]
    outputs, derivative = local.tangents_at(theta, vector[None])
    along = local.whiten(derivative, outputs)[0]
    basis = local.whiten(tangents, outputs).T
    left, coefficients = along, along.new_zeros(basis.shape[1])
    if basis.shape[1]:
        span = _Span.of(basis)
        for _ in range(2):  # the second pass removes the rounding of the first
            step, inside = span.project(left)
            coefficients, left = coefficients + step, left - inside
    # Rounding of the derivatives, of the projection, and of the point.
    size = basis.norm(dim=0)
    largest = float(local.spectrum.values[0]) if local.spectrum.rank else 0.0
    terms = float(along.norm() + (size * coefficients.abs()).sum())
    noise = SLACK * EPS * (terms + largest)
    if relax and live.shape[0] and radius:
        smallest = float(local.spectrum.values[live.shape[0] - 1])
        noise += float(along.norm()) / abs(radius) * (rounding + error) / smallest
    schur = float(left.square().sum())
    delta = local.outputs_at(theta) - local.outputs
    kl = float(_per_sample(local.likelihood.kl(*_vectors(local.outputs, delta))).mean())
    return Point(
        raw,
        schur if schur > noise**2 else 0.0,
        kl if kl > 0.5 * rounding**2 else 0.0,
        noise**2,
        0.5 * rounding**2,
        theta,
    )


def rounding_near(local: LocalModel, theta: Tensor) -> float:
    """Rounding of the residuals: that of the outputs, and what a last digit of θ changes."""
    generator = torch.Generator().manual_seed(17)
    draw = torch.randn(theta.shape, dtype=torch.float64, generator=generator)
    change = local.residuals(theta * (1 + EPS * draw)) - local.residuals(theta)
    return max(local.residual_floor(), 16 * float(change.norm()))


def _vectors(*values: Tensor) -> tuple[Tensor, ...]:
    """Scalar outputs (n,) as (n, 1)."""
    return tuple(v.unsqueeze(-1) if v.ndim == 1 else v for v in values)


def _per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1) if x.ndim > 1 else x


@dataclass(frozen=True)
class _Span:
    """The span of the columns of ``basis`` (N, r); QR factors where they are independent."""

    basis: Tensor
    q: Tensor | None
    upper: Tensor | None

    @classmethod
    def of(cls, basis: Tensor) -> _Span:
        if basis.shape[0] < basis.shape[1]:
            return cls(basis, None, None)
        q, upper = torch.linalg.qr(basis)
        diagonal = upper.diagonal().abs()
        if float(diagonal.min()) <= DEPENDENT * float(diagonal.max()):
            return cls(basis, None, None)
        return cls(basis, q, upper)

    def project(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(r,) coefficients of least squares and the (N,) projection of (N,) onto the span."""
        if self.q is None or self.upper is None:
            found = torch.linalg.lstsq(self.basis, target[:, None], driver="gelsd").solution[:, 0]
            return found, self.basis @ found
        inside = self.q.T @ target
        found = torch.linalg.solve_triangular(self.upper, inside[:, None], upper=True)[:, 0]
        return found, self.q @ inside


def relax_live(
    local: LocalModel, theta: Tensor, live: Tensor, rounding: float
) -> tuple[Tensor, float, Tensor]:
    """Gauss-Newton for the least |f| over the live coordinates, at least one of them.

    Steps are halved until |f| falls. NaN where it does not converge.

    Returns:
        the (d,) point, the error (the part of f that live directions can produce), and the
        derivatives of the outputs along the live directions there.
    """
    residual = local.residuals(theta)
    first, error, good = 0.0, float("inf"), False
    tangents = residual
    for _ in range(STEPS):
        tangents = local.tangents_at(theta, live)[1]
        step, inside = _Span.of(local.whiten(tangents).T).project(residual)
        before, error = error, float(inside.norm())
        first = first or error
        good = error <= max(rounding, CONVERGED * first)
        if error <= 0.1 * rounding or (good and error > PROGRESS * before):
            break
        size, scale = float(residual.norm()), 1.0
        for _ in range(HALVINGS):
            moved = theta - scale * step @ live
            residual = local.residuals(moved)
            if float(residual.norm()) <= size * (1 + 1e-12):
                break
            scale /= 2
        else:
            break
        theta = moved
    else:
        good = False  # the last step was not looked at
    if good:
        return theta, error, tangents
    return torch.full_like(theta, float("nan")), error, tangents


def schur_curvature(
    model: nn.Module,
    inputs: Any,
    directions: Mapping[str, Tensor | RankOne],
    radii: Any,
    *,
    likelihood: Any = "categorical",
    relax: bool = True,
    max_order: int = 8,
) -> SchurCurvature:
    """Curvature along lines, raw and as the Schur complement on the live space, and their margin.

    The straight line along a dead direction may be tangent to a curved fibre: the raw curvature
    then has a rate although K stays zero nearby. At the point relaxed back along the live
    directions (Gauss-Newton), the Schur complement F_uu - F_uL F_LL^-1 F_Lu has the rate 2(k-1) of
    the order k that counts for λ, and is zero on a fibre. It is computed by projecting the whitened
    derivative along u off the whitened derivatives along the live space: no matrix is squared.
    The selection rule ("Dead Directions", arXiv 2606.05957, selection rule on smooth fibres) is
    evaluated from Taylor coefficients; the relaxed reading is derived.

    Each direction and radius costs about three derivatives along every live direction and as many
    least-squares problems with that many unknowns.

    Args:
        model: any module in evaluation mode; read in fp64 on a copy. Its parameters are θ0.
        inputs: tensor, tuple or dict; samples lead.
        directions: {parameter name: (p, *shape)}, missing parameters count as 0; scaled to unit
            norm. Those of ``dead_directions`` fit.
        radii: (r,) real numbers; 0 and negative ones are allowed.
        likelihood: as in ``dead_directions``.
        relax: read at the relaxed points; otherwise on the straight line, where the live
            displacement of order t² spoils the Schur complement from order t⁴ on.
        max_order: highest KL order looked for.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    grid = check_radii(radii)
    if not isinstance(relax, bool):
        raise _check.fail("relax", relax, "True or False", TypeError)
    local = open_local(model, inputs, likelihood, max_order)
    checked = check_directions(directions, local.state)
    named = {
        k: u.dense(local.state[k].shape) if isinstance(u, RankOne) else u
        for k, u in checked.slices.items()
    }
    vectors = local.space.vectors(named, checked.count, local.theta)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    rule = selection_rule(local, vectors, max_order)
    values = torch.zeros(5, len(vectors), len(grid), dtype=torch.float64)
    for p, vector in enumerate(vectors):
        values[:, p] = _ray(local, vector, grid, relax)
    raw, schur, kl, floor, moved = values
    return _assemble(local, grid, rule, (raw, schur, kl, floor, moved), relax)


def _ray(local: LocalModel, vector: Tensor, grid: Tensor, relax: bool) -> Tensor:
    """(5, r) raw, Schur, KL, floor and displacement along one direction."""
    found = torch.zeros(5, len(grid), dtype=torch.float64)
    near: dict[float, tuple[float, Tensor]] = {}
    # Outwards on either side, each point starting from the last one: the correction grows like t².
    for index in torch.argsort(grid.abs()).tolist():
        t = float(grid[index])
        side = 1.0 if t >= 0 else -1.0
        start = None
        if side in near and t:
            last, correction = near[side]
            start = correction * (t / last) ** 2
        point = schur_point(local, vector, t, start, relax)
        correction = point.theta - local.theta - t * vector
        if t and bool(torch.isfinite(correction).all()):
            near[side] = (t, correction)
        numbers = [point.raw, point.schur, point.kl, point.floor, float(correction.norm())]
        found[:, index] = torch.tensor(numbers, dtype=torch.float64)
    return found


def _assemble(
    local: LocalModel, grid: Tensor, rule: Selection, values: tuple[Tensor, ...], relax: bool
) -> SchurCurvature:
    raw, schur, kl, floor, moved = values
    return SchurCurvature(
        radii=grid,
        raw=raw,
        schur=schur,
        kl=kl,
        moved=moved,
        floor=floor,
        line_orders=rule.line_orders,
        relaxed_orders=rule.relaxed_orders,
        gram_floor=rule.gram_floor,
        ratios=rule.ratios,
        margins=rule.margins,
        verdicts=rule.verdicts,
        relaxed=relax,
        live=local.spectrum.rank,
        samples=local.samples,
    )
