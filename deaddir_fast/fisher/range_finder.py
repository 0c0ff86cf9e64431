"""Live space of models too large for a dense Jacobian: a randomised range finder.

With B the whitened Jacobian (F = BᵀB), BᵀΩ for a random Ω with k columns spans the live space as
soon as k reaches the rank (Halko, Martinsson & Tropp 2011). Each column is one backward pass, each
column of B Q one forward-mode pass; F itself is never formed or squared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deaddir_fast.fisher.jacobian import EPS, Spectrum

BLOCK = 64  # columns added at a time
SPARE = 8  # columns beyond the rank that must come out dead


class RankTooLarge(ValueError):
    """The rank exceeds what the range finder may use."""


def find_range(
    push: Callable[[Tensor], Tensor],
    pull: Callable[[Tensor], Tensor],
    rows: int,
    dimension: int,
    *,
    limit: int,
    seed: int = 0,
) -> Spectrum:
    """Split parameter space through products with B and Bᵀ only.

    Args:
        push: (k, d) directions -> (k, N) whitened output tangents, B v.
        pull: (k, N) cotangents -> (k, d), Bᵀ w.
        rows: N.
        dimension: d.
        limit: largest rank looked for.
        seed: of the random cotangents.

    Returns:
        a ``Spectrum`` without a basis of the dead space; its values are the singular values of B
        on the space found.

    Raises:
        RankTooLarge: if the space found is still full at ``limit`` columns.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(0, dimension, dtype=torch.float64)
    image = torch.zeros(0, rows, dtype=torch.float64)
    largest = 0.0
    limit = min(limit, rows, dimension)
    while True:
        size = max(1, min(BLOCK, limit + SPARE - basis.shape[0]))
        draws = torch.randn(size, rows, dtype=torch.float64, generator=generator) / rows**0.5
        fresh = pull(draws)
        largest = max(largest, float(fresh.norm(dim=1).max()) if size else 0.0)
        for _ in range(2):  # twice is enough for orthogonality to rounding
            fresh = fresh - (fresh @ basis.T) @ basis
        tolerance = 64 * EPS * max(rows, dimension) ** 0.5 * largest
        fresh = fresh[fresh.norm(dim=1) > tolerance]
        exhausted = fresh.shape[0] < size
        if fresh.shape[0]:
            q, upper = torch.linalg.qr(fresh.T)
            kept = upper.diagonal().abs() > tolerance
            exhausted = exhausted or not bool(kept.all())
            q = q.T[kept]
            q = q - (q @ basis.T) @ basis
            q = q / q.norm(dim=1, keepdim=True)
            basis = torch.cat([basis, q])
            image = torch.cat([image, push(q)])
        if exhausted or basis.shape[0] >= min(rows, dimension):
            break
        if basis.shape[0] >= limit + SPARE:
            raise RankTooLarge(
                f"model: the exact Fisher has rank above {limit}, the most that is looked for in a "
                f"model with {dimension} parameters; use fewer samples or a smaller model"
            )
    u, values, vh = torch.linalg.svd(image.T, full_matrices=False)
    top = float(values[0]) if values.numel() else 0.0
    tolerance = 64 * EPS * max(rows, dimension) ** 0.5 * top
    clear = 1e3 * tolerance
    rank = int((values > tolerance).sum())
    ambiguous = int(((values > tolerance) & (values < clear)).sum())
    return Spectrum(
        values=values,
        left=u[:, :rank],
        live=(vh[:rank] @ basis).T,
        dead=None,
        tolerance=tolerance,
        clear=clear,
        rows=rows,
        ambiguous=ambiguous,
    )
