"""Eigenvalues of a layer's factors: which are zero, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Spectrum of A or G.

    Attributes:
        form: "matrix", "diagonal" or "one".
        dimension: number of eigenvalues.
        rank: how many are positive; ``dead`` the others.
        rank_limit: how many can be positive with this many rows.
        top, bottom: largest, and smallest that counts as positive.
        trace, log_pseudo_det: their sum, and the sum of logarithms of the positive ones.
        tolerance: eigenvalues below it count as zero.
        ambiguous: how many positive ones lie within a factor of 1000 of the tolerance.
        verdict: "resolved", or why the rank is not.
        values: (dimension,) fp64, ascending.
        null: (dimension, dead) orthonormal basis of the null space of a matrix; no columns where
            samples limit the rank, or where it would not fit in memory.
        low, high: (dimension,) eigenvectors of ``bottom`` and ``top``.
        diagonal: of a diagonal, its entries.
    """

    form: str
    dimension: int
    rank: int
    rank_limit: int
    dead: int
    top: float
    bottom: float
    trace: float
    log_pseudo_det: float
    tolerance: float
    ambiguous: int
    verdict: str
    values: Tensor = field(repr=False)
    null: Tensor = field(repr=False)
    low: Tensor = field(repr=False)
    high: Tensor = field(repr=False)
    diagonal: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))

    @classmethod
    def skipped(cls, dimension: int, limit: int) -> Spectrum:
        """Of a matrix too large for its eigenvalues."""
        nan, empty = math.nan, torch.zeros(dimension, 0, dtype=torch.float64)
        values = torch.full((dimension,), nan, dtype=torch.float64)
        return cls(
            "matrix", dimension, 0, min(limit, dimension), 0, nan, nan, nan, nan, nan, 0,
            f"unresolved: eigenvalues of dimension {dimension} were not computed "
            "(largest_spectrum)", values, empty, empty, empty,
        )  # fmt: skip


#: Bytes a basis of a null space may take.
LARGEST_BASIS = 1 << 28


def rounding(activations: torch.dtype, sums: torch.dtype, width: int) -> float:
    """Eigenvalues below this times the trace cannot be told from rounding.

    An exactly dead direction reads (c ε)² relative to the trace, ε the precision of the
    activations, plus the rounding of the sums and of the eigenvalue solver. (Our choice of c = 64.)
    """
    eps = torch.finfo(activations).eps
    summing = 16 * torch.finfo(sums).eps if sums != torch.float64 else 0.0
    return max((64 * eps) ** 2, summing, 4 * EPS * math.sqrt(max(width, 1)))


def spectrum(matrix: Tensor, *, relative: float, limit: int, form: str = "matrix") -> Spectrum:
    """Spectrum of a symmetric positive semi-definite matrix, or of a diagonal.

    Args:
        matrix: (d, d), or (d,) for a diagonal, or (groups, d, d): the spectra of all groups
            together.
        relative: from :func:`rounding`.
        limit: most positive eigenvalues there can be.
        form: what it is called in the result.
    """
    wide = matrix.to(torch.float64)
    if not bool(torch.isfinite(wide).all()):
        return _not_finite(wide, form, limit)
    vectors = None
    if wide.ndim == 1:
        values, order = wide.cpu().sort(stable=True)
    elif wide.ndim == 2:
        values, vectors = torch.linalg.eigh(wide)
        values = values.cpu()
    else:
        values, _ = torch.linalg.eigvalsh(wide).flatten().cpu().sort()
    trace = float(values.clamp_min(0).sum())
    # A diagonal of counts or variances has no rounding of other entries in it.
    tolerance = 0.0 if wide.ndim == 1 else relative * trace
    positive = values > tolerance
    rank, d = int(positive.sum()), len(values)
    clear = int((values > 1e3 * tolerance).sum())
    live = values[positive]
    verdict = "resolved"
    if rank < d and rank >= limit:
        verdict = f"limited by samples: rank {rank} of {d} is all that {limit} rows allow"
    elif clear < rank:
        verdict = f"unresolved: {rank - clear} eigenvalues are close to rounding"
    null = torch.zeros(d, 0, dtype=torch.float64)
    low = high = null
    if vectors is not None:
        if rank < limit and 8 * d * (d - rank) <= LARGEST_BASIS:
            null = vectors[:, : d - rank].cpu()
        low, high = vectors[:, min(d - rank, d - 1)].cpu(), vectors[:, -1].cpu()
    elif wide.ndim == 1:
        low, high = (torch.zeros(d, dtype=torch.float64) for _ in range(2))
        low[order[min(d - rank, d - 1)]] = 1.0
        high[order[-1]] = 1.0
    return Spectrum(
        form=form,
        dimension=d,
        rank=rank,
        rank_limit=min(limit, d),
        dead=d - rank,
        top=float(values[-1]) if d else 0.0,
        bottom=float(live[0]) if rank else 0.0,
        trace=trace,
        log_pseudo_det=float(live.log().sum()),
        tolerance=tolerance,
        ambiguous=rank - clear,
        verdict=verdict,
        values=values,
        null=null,
        low=low,
        high=high,
        diagonal=wide.cpu() if wide.ndim == 1 else torch.empty(0),
    )


def _not_finite(matrix: Tensor, form: str, limit: int) -> Spectrum:
    size = matrix.shape[-1] * (matrix.shape[0] if matrix.ndim == 3 else 1)
    nan = math.nan
    values = torch.full((size,), nan, dtype=torch.float64)
    empty = torch.zeros(size, 0, dtype=torch.float64)
    return Spectrum(
        form, size, 0, min(limit, size), 0, nan, nan, nan, nan, nan, 0,
        "unresolved: it has entries that are not finite", values, empty, empty, empty,
    )  # fmt: skip


def one() -> Spectrum:
    """Of the number 1: a norm's A."""
    unit = torch.ones(1, dtype=torch.float64)
    return spectrum(unit, relative=0.0, limit=1, form="one")
