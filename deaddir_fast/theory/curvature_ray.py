"""The rate of sectional curvature towards a dead direction.

Along θ0 + t u with u dead of order k, F_uu = k² A t^(2(k-1)) (1 + O(t)). In the plane (u, v) with
v live the Gauss equation has three parts: II(u, v) tends to a limit N, II(u, u) is O(t^(k-1))
because the leading score itself is tangent (derived: with ∂_t μ = k t^(k-1) (a + t b + ...),
∂_t² μ minus (k-1)/t times ∂_t μ is k t^(k-1) b), and the area is F_uu F_vv sin². So where N ≠ 0

    curvature = -|N|² / (F_vv sin²) · F_uu⁻¹ (1 + O(t))  ~  -t^(-2(k-1))

(Dead Directions, arXiv 2606.05957, second face of the rate chain). N ≠ 0 says that moving along v
makes u live at first order. If N = 0, as at points of a smooth set along which u stays dead, the
exponent is smaller (k-1 in general: a cuspidal edge, k = 2, has curvature ~ 1/t), and it is no
reading of k by this law: :meth:`CurvatureRay.rate` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.theory.gauss import SectionalCurvature
from deaddir_fast.theory.rate import RateFit, fit_rate

# Orders read from the metric and from the curvature agree within this (our choice).
AGREEMENT = 0.2


@dataclass(frozen=True)
class CurvatureRate:
    """The order of a dead direction read from sectional curvature.

    Attributes:
        order: k, nan if not resolved.
        exponent: p of |curvature| ~ t^(-p), nan if there is no fit.
        fit: fit of 1/|curvature|, whose slope is p.
        fisher: fit of F_uu.
        coupling: fit of |II(u,v)|²/F_vv, which has to tend to a constant other than zero.
        partner: fit of F_vv, likewise.
        verdict: "resolved" or "unresolved: ...".
    """

    order: float
    exponent: float
    fit: RateFit
    fisher: RateFit
    coupling: RateFit
    partner: RateFit
    verdict: str

    @property
    def resolved(self) -> bool:
        """Whether the order may be used."""
        return self.verdict == "resolved"


@dataclass(frozen=True)
class CurvatureRay:
    """Sectional curvatures in the plane (u, v) at the points θ0 + t u.

    Attributes:
        radii: (r,) t.
        points: (r,) the readings.
    """

    radii: Tensor
    points: tuple[SectionalCurvature, ...]

    @property
    def curvature(self) -> Tensor:
        """(r,) fp64, nan where not resolved."""
        nan = float("nan")
        return self._column([p.value if p.resolved else nan for p in self.points])

    @property
    def rounding(self) -> Tensor:
        """(r,) bounds on the rounding of the curvature."""
        return self._column([p.rounding for p in self.points])

    @property
    def fisher(self) -> Tensor:
        """(r,) F_uu."""
        return self._column([p.metric[0] for p in self.points])

    @staticmethod
    def _column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def rate(self) -> CurvatureRate:
        """Read k from |curvature| ~ t^(-2(k-1)), checking what the law needs.

        1/|curvature| goes to :func:`~deaddir_fast.theory.rate.fit_rate`. Resolved needs: that fit
        resolved; F_vv and the coupling |II(u,v)|²/F_vv tending to constants; and the order of F_uu
        not disagreeing.
        """
        metric = torch.tensor([p.metric for p in self.points], dtype=torch.float64)
        mixed = self._column([p.mixed for p in self.points])
        fit = fit_rate(self.radii, 1 / self.curvature.abs())
        fisher = fit_rate(self.radii, metric[:, 0])
        partner = fit_rate(self.radii, metric[:, 2])
        coupling = fit_rate(self.radii, mixed / metric[:, 2])
        verdict = _verdict(fit, fisher, coupling, partner)
        order = fit.order if verdict == "resolved" else float("nan")
        return CurvatureRate(order, fit.slope, fit, fisher, coupling, partner, verdict)


def _verdict(fit: RateFit, fisher: RateFit, coupling: RateFit, partner: RateFit) -> str:
    if fit.verdict != "resolved":
        return fit.verdict if fit.verdict != "flat" else "unresolved: no curvature is finite"
    power = f"unresolved: curvature goes as t^{-fit.slope:.2f}"
    if partner.integer_order != 1:
        return f"{power}, but v is not seen to be live at t = 0 ({partner.verdict})"
    if coupling.integer_order != 1:
        return (
            f"{power}, but II(u, v) is not seen to have a limit other than 0, so it is not 2(k-1)"
        )
    if fisher.verdict == "resolved" and abs(fisher.order - fit.order) > AGREEMENT:
        return f"unresolved: curvature reads k={fit.order:.2f}, the metric k={fisher.order:.2f}"
    return "resolved"
