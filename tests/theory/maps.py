"""Mean maps and independent formulas for their curvature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd

Map = Callable[[Tensor], Tensor]


def umbrella(k: int) -> Map:
    """(t^k + w², w, t w)."""
    return lambda p: torch.stack([p[0] ** k + p[1] ** 2, p[1], p[0] * p[1]])


def umbrella_curvature(k: int, t: float) -> float:
    """Its curvature on w = 0 (Dead Directions: k = 2 and 3; the Gauss equation by hand: any k)."""
    return -1 / (k**2 * t ** (2 * (k - 1)) * (1 + t * t) ** 2)


def christoffel_curvature(mu: Map, theta: Tensor, u: Tensor, v: Tensor) -> float:
    """⟨R(u,v)v, u⟩ over the area, from the metric alone: Γ and its derivatives."""

    def metric(x: Tensor) -> Tensor:
        j = jacfwd(mu)(x)
        return j.T @ j

    def connection(x: Tensor) -> Tensor:
        """Γ^a_bc."""
        dg = jacfwd(metric)(x)  # [b, c, a]: derivative along a
        lower = 0.5 * (dg.permute(0, 2, 1) + dg - dg.permute(2, 1, 0))  # [a, b, c]
        return torch.linalg.solve(metric(x), lower.reshape(len(x), -1)).reshape(lower.shape)

    g, c = metric(theta).numpy(), connection(theta).numpy()
    dc = jacfwd(connection)(theta).numpy()  # [a, b, c, i]
    # R^a_bij = ∂_i Γ^a_jb - ∂_j Γ^a_ib + Γ^a_ie Γ^e_jb - Γ^a_je Γ^e_ib
    quadratic = np.einsum("aie,ejb->abij", c, c)
    riemann = dc.transpose(0, 2, 3, 1) - dc.transpose(0, 2, 1, 3)
    riemann = riemann + quadratic - quadratic.transpose(0, 1, 3, 2)
    a, b = u.numpy(), v.numpy()
    top = np.einsum("ea,abij,b,i,j,e->", g, riemann, b, a, b, a)
    return float(top / ((a @ g @ a) * (b @ g @ b) - (a @ g @ b) ** 2))
