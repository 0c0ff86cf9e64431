"""The Gauss equation: sectional curvature of a metric that an embedding pulls back.

For an immersion μ into flat space with F = JᵀJ and II(x, y) the part of D²μ[x, y] normal to the
range of J, the plane (u, v) has curvature

    (⟨II(u,u), II(v,v)⟩ - |II(u,v)|²) / (|Ju|² |Jv|² - ⟨Ju, Jv⟩²)

(do Carmo 1992, *Riemannian Geometry*, chapter 6). Only J and second derivatives along u and v
enter: no inverse of F, no Christoffel symbols and no squared matrices, so the digits last down to
metrics of size eps² along u. Where J has a null space of constant rank (symmetries of a model), the
curvature is that of the image; where the rank changes there is no manifold and no curvature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# Our choices. Singular values below this many eps times the largest are rounding.
RANK_UNITS = 64.0
# Errors of a singular vector, in eps times largest over its own singular value.
VECTOR_UNITS = 8.0
# A curvature is resolved when its rounding is at most this part of it.
RELATIVE = 0.02
# Normal part of D²μ[n, x], n null, above which the rank is not constant.
BENDING = 1e-9


@dataclass(frozen=True)
class TangentSpace:
    """Range of a Jacobian J (N, d).

    Attributes:
        basis: (N, rank) orthonormal.
        live: (d, rank) orthonormal right singular vectors.
        tolerance: lengths below it are rounding.
        scale: largest singular value.
        error: rounding error of the projector on the range, as the sine of an angle.
    """

    basis: Tensor
    live: Tensor
    tolerance: float
    scale: float
    error: float

    @property
    def rank(self) -> int:
        """Dimension of the range."""
        return self.basis.shape[1]

    def normal(self, vectors: Tensor) -> Tensor:
        """Normal parts of the columns of (N, q)."""
        for _ in range(2):  # once more for the digits that cancelled
            vectors = vectors - self.basis @ (self.basis.T @ vectors)
        return vectors


@dataclass(frozen=True)
class SectionalCurvature:
    """Sectional curvature of the Fisher metric in the plane (u, v) of unit directions.

    Attributes:
        value: the curvature; nan where there is none.
        rounding: bound on its rounding error.
        direct: ⟨II(u,u), II(v,v)⟩.
        mixed: |II(u,v)|².
        metric: (F_uu, F_uv, F_vv).
        rank, dimension: of the tangent space, and of the parameters.
        verdict: "resolved", "zero to rounding" or "unresolved: ...".
    """

    value: float
    rounding: float
    direct: float
    mixed: float
    metric: tuple[float, float, float]
    rank: int
    dimension: int
    verdict: str

    @property
    def resolved(self) -> bool:
        """Whether the value stands well above its rounding."""
        return self.verdict == "resolved"


def tangent_space(jacobian: Tensor) -> TangentSpace:
    """Split R^N by the range of J (N, d), fp64; everything is nan where J is not finite."""
    rows, d = jacobian.shape
    if not bool(torch.isfinite(jacobian).all()):
        nan = float("nan")
        return TangentSpace(jacobian[:, :0], jacobian[:0].T, nan, nan, nan)
    if rows > d:
        q, upper = torch.linalg.qr(jacobian)
        u, values, vh = torch.linalg.svd(upper, full_matrices=False)
        u = q @ u
    else:
        u, values, vh = torch.linalg.svd(jacobian, full_matrices=False)
    scale = float(values[0]) if values.numel() else 0.0
    tolerance = RANK_UNITS * EPS * scale
    rank = int((values > tolerance).sum())
    error = VECTOR_UNITS * EPS * (scale / float(values[rank - 1]) if rank else 1.0)
    return TangentSpace(u[:, :rank], vh[:rank].T, tolerance, scale, error)


def gauss_curvature(
    space: TangentSpace, plane: Tensor, second: Tensor, null_second: Tensor | None, dimension: int
) -> SectionalCurvature:
    """The Gauss equation.

    Args:
        space: tangent space.
        plane: (N, 2) Ju and Jv.
        second: (N, 3) D²μ[u,u], D²μ[u,v], D²μ[v,v].
        null_second: (N,) D²μ[n, x] for a generic null vector n of J and a generic x, which is
            tangent if and only if the rank is constant to first order; None without null vectors.
        dimension: d, for the report.
    """
    ju, jv = plane.T
    lengths = plane.norm(dim=0)
    fuv = float(ju @ jv)
    metric = (float(lengths[0]) ** 2, fuv, float(lengths[1]) ** 2)
    nan = float("nan")

    def refused(why: str) -> SectionalCurvature:
        verdict = f"unresolved: {why}"
        return SectionalCurvature(nan, nan, nan, nan, metric, space.rank, dimension, verdict)

    finite = torch.isfinite(plane).all() and torch.isfinite(second).all()
    if not bool(finite) or space.scale != space.scale:
        return refused("derivatives are not finite here")
    for name, length in zip("uv", lengths.tolist(), strict=True):
        if length <= space.tolerance:
            return refused(f"the metric vanishes along {name} to rounding")
    sine = float(torch.linalg.qr(plane / lengths, mode="r").R[1, 1].abs())
    slack = VECTOR_UNITS * EPS * float((space.scale / lengths).sum())
    if sine <= RANK_UNITS * slack:
        return refused("u and v span no plane in the metric")
    sizes = second.norm(dim=0)
    if null_second is not None:
        leak = float(space.normal(null_second[:, None]).norm())
        size = max(float(sizes.max()), float(null_second.norm()))
        if leak > max(BENDING, 1e3 * space.error) * size:
            return refused(f"the rank of the metric, {space.rank}, is not constant here")
    uu, uv, vv = space.normal(second).T
    area = float(lengths[0] * lengths[1]) * sine
    direct, mixed = float(uu @ vv), float(uv @ uv)
    value = (direct - mixed) / area / area
    # Normal parts inherit the angle of the projector and the rounding of the second derivatives.
    euu, euv, evv = (space.error * sizes + VECTOR_UNITS * EPS * sizes.max()).tolist()
    error = float(uu.norm()) * evv + float(vv.norm()) * euu + euu * evv
    error += 2 * float(uv.norm()) * euv + euv**2
    error += 2 * slack / sine * (abs(direct) + mixed)
    rounding = error / area / area
    if not rounding <= RELATIVE * abs(value):
        small = abs(value) <= rounding
        verdict = (
            "zero to rounding" if small else f"unresolved: rounding {rounding:.1e} of {value:.1e}"
        )
    else:
        verdict = "resolved"
    return SectionalCurvature(
        value, rounding, direct, mixed, metric, space.rank, dimension, verdict
    )
