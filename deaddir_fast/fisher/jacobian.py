"""The whitened output Jacobian: a square root of the exact Fisher.

With z the outputs and H(z) the Fisher of the likelihood in them, F = mean_n Σ_t JᵀH J = BᵀB for
B = whiten(z, J)/√n, which has n·t·c rows. Everything about rank and null space is read from
singular values of B, never from eigenvalues of a rounded F: squaring would lose half the digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.nets.jet import JetProgram
from deaddir_fast.nets.likelihood import Likelihood
from deaddir_fast.nets.space import ParameterSpace

EPS = torch.finfo(torch.float64).eps
ROW_BLOCK = 256  # directions per forward-mode pass


def whitened_coefficients(coefficients: Tensor, outputs: Tensor, likelihood: Likelihood) -> Tensor:
    """(..., n, *out) coefficients of outputs -> (..., n·…) rows of whiten(z0, ·)/√n.

    The metric is that of the base outputs z0 (n, *out).
    """
    lead = coefficients.ndim - outputs.ndim
    rows = likelihood.whiten(outputs, coefficients)
    return rows.flatten(lead) / outputs.shape[0] ** 0.5


def whitened_jacobian(
    program: JetProgram,
    space: ParameterSpace,
    likelihood: Likelihood,
    *,
    base: Mapping[str, Tensor] | None = None,
    outputs: Tensor | None = None,
) -> Tensor:
    """B of shape (n·…, d) with F = BᵀB, by forward mode along every coordinate.

    Forward mode costs d dual forwards and needs nothing of the model but its graph. ``base``
    replaces the parameters, ``outputs`` (n, *out) the outputs whose metric whitens.
    """
    d = space.dimension
    columns = []
    for start in range(0, d, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, d)
        units = torch.zeros(stop - start, d, dtype=torch.float64)
        units[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
        jet = program.run({k: v[None] for k, v in space.directions(units).items()}, 1, base=base)
        at = jet.coefficients[0][0] if outputs is None else outputs
        columns.append(whitened_coefficients(jet.coefficients[1], at, likelihood))
    return torch.cat(columns).T.contiguous()


@dataclass(frozen=True)
class Spectrum:
    """Live and dead parameter space at a point.

    Attributes:
        values: (min(N, d),) singular values of B, falling; their squares are the eigenvalues of F.
        left: (N, r) orthonormal output patterns of the live directions.
        live: (d, r) orthonormal live directions.
        dead: (d, d − r) orthonormal basis of the null space of F; None where it is too large.
        tolerance: singular values below it count as zero.
        clear: singular values above it count as live; none may lie between the two.
        rows: N, the number of output equations, an upper limit of the rank.
        ambiguous: how many singular values lie between ``tolerance`` and ``clear``.
    """

    values: Tensor
    left: Tensor
    live: Tensor
    dead: Tensor | None
    tolerance: float
    clear: float
    rows: int
    ambiguous: int

    @property
    def rank(self) -> int:
        """Number of live directions."""
        return self.live.shape[1]

    def onto_dead(self, vectors: Tensor) -> Tensor:
        """Projection of the columns of a (d, q) matrix onto the null space of F."""
        return vectors - self.live @ (self.live.T @ vectors)

    @property
    def gap(self) -> float:
        """Ratio of the smallest live singular value to the largest dead one, or to rounding."""
        if self.rank == 0:
            return float("inf")
        below = self.values[self.rank :]
        floor = max(float(below.max()) if below.numel() else 0.0, EPS * float(self.values[0]))
        return float(self.values[self.rank - 1]) / floor


def decompose(jacobian: Tensor, scale: float = 0.0) -> Spectrum:
    """Split parameter space by the singular values of B.

    A singular value is zero below 64 ε √max(N, d) times the largest one (or times ``scale`` if that
    is larger: the size of the terms whose cancellation makes a column small), live above 10³ times
    that; in between it is counted as ambiguous and treated as live. (Our choice.)
    """
    rows, d = jacobian.shape
    if rows > d:
        q, upper = torch.linalg.qr(jacobian)
        u, values, vh = torch.linalg.svd(upper, full_matrices=True)
        u = q @ u
    else:
        u, values, vh = torch.linalg.svd(jacobian, full_matrices=True)
    largest = max(float(values.max()) if values.numel() else 0.0, scale)
    tolerance = 64 * EPS * max(rows, d, 1) ** 0.5 * largest
    clear = 1e3 * tolerance
    rank = int((values > tolerance).sum())
    ambiguous = int(((values > tolerance) & (values < clear)).sum())
    dead = vh[rank:].T
    if rank == 0:
        dead = torch.eye(d, dtype=jacobian.dtype)
    return Spectrum(values, u[:, :rank], vh[:rank].T, dead, tolerance, clear, rows, ambiguous)


def rank_on(split: Spectrum, samples: int, step: int) -> int:
    """Rank of F on every ``step``-th sample: that of the rows of B = U S Vᵀ that belong to them."""
    if split.rank == 0:
        return 0
    rows = (split.left * split.values[: split.rank]).reshape(samples, -1, split.rank)
    part = rows[::step].reshape(-1, split.rank)
    if part.shape[0] > part.shape[1]:
        part = torch.linalg.qr(part, mode="r").R
    # The rows are scaled by 1/√n of all samples: the tolerance carries over within √step.
    return int((torch.linalg.svdvals(part) > split.tolerance).sum())
