"""Splitting parameter space at a point into orbit tangents and their complement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State


def _clusters(gauges: Sequence[Gauge]) -> list[list[Gauge]]:
    """Gauges that share no parameter have orthogonal tangents and are treated apart."""
    clusters: list[tuple[set[str], list[Gauge]]] = []
    for gauge in gauges:
        names = set(gauge.parameters)
        touching = [c for c in clusters if c[0] & names]
        clusters = [c for c in clusters if not c[0] & names]
        joined = [g for c in touching for g in c[1]]
        clusters.append((names.union(*(c[0] for c in touching)), [*joined, gauge]))
    return [members for _, members in clusters]


def _names(cluster: Sequence[Gauge]) -> list[str]:
    return list(dict.fromkeys(n for g in cluster for n in g.parameters))


def _basis(cluster: Sequence[Gauge], state: State, tolerance: float | None) -> Tensor:
    """(q, N) orthonormal rows spanning the tangents, over the cluster's parameters in order."""
    names = _names(cluster)
    rows = []
    for gauge in cluster:
        moved = gauge.tangents(state)
        parts = [
            moved[n].flatten(1)
            if n in moved
            else state[n].new_zeros(gauge.dimension, state[n].numel())
            for n in names
        ]
        rows.append(torch.cat(parts, 1))
    matrix = torch.cat(rows)
    # Rows of unit length: the rank should not depend on how large the weights are.
    lengths = matrix.norm(dim=1)
    matrix = matrix[lengths > 0] / lengths[lengths > 0, None]
    if not matrix.shape[0]:
        return matrix
    # A QR first: as accurate, and the SVD then costs nothing where parameters are many.
    orthogonal, triangle = torch.linalg.qr(matrix.mT)
    left, sizes, _ = torch.linalg.svd(triangle, full_matrices=False)
    basis = (orthogonal @ left).mT
    if tolerance is None:
        tolerance = max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return basis[sizes > tolerance * sizes[0]]


def _check_gauges(gauges: Sequence[Gauge]) -> None:
    for gauge in gauges:
        if not isinstance(gauge, Gauge):
            raise _check.fail("gauges", gauge, "a sequence of Gauge", TypeError)


def orthonormal_tangents(
    gauges: Sequence[Gauge], state: State, *, tolerance: float | None = None
) -> tuple[dict[str, Tensor], int]:
    """An orthonormal basis of all orbit tangents at a point.

    Tangents of one or of several gauges can be linearly dependent (the centre of GL(h) against a
    neighbouring rescaling, a unit whose weights are zero), so the rank can be less than the sum
    of the dimensions.

    Args:
        gauges: as returned by ``find``; leave out those of another likelihood.
        state: parameter name to tensor.
        tolerance: tangents are scaled to unit length; singular values below ``tolerance`` times
            the largest count as zero. Default max(rows, columns) times the dtype's epsilon, per
            group of gauges that share parameters.

    Returns:
        ({name: (q, *shape)}, q): q orthonormal directions over the parameters the gauges move.
    """
    _check_gauges(gauges)
    if tolerance is not None:
        _check.positive("tolerance", tolerance)
    bases = [(c, _basis(c, state, tolerance)) for c in _clusters(gauges)]
    rank = sum(b.shape[0] for _, b in bases)
    out: dict[str, Tensor] = {}
    start = 0
    for cluster, basis in bases:
        column = 0
        for name in _names(cluster):
            value = state[name]
            full = value.new_zeros(rank, *value.shape)
            part = basis[:, column : column + value.numel()]
            full[start : start + basis.shape[0]] = part.reshape(-1, *value.shape)
            out[name] = full
            column += value.numel()
        start += basis.shape[0]
    return out, rank


def project_out(
    directions: Mapping[str, Tensor],
    gauges: Sequence[Gauge],
    state: State,
    *,
    tolerance: float | None = None,
) -> dict[str, Tensor]:
    """Remove from directions their Euclidean projection onto the orbit tangents.

    Args:
        directions: {name: (p, *shape)}; a missing parameter is zero.
        gauges: as returned by ``find``; leave out those of another likelihood.
        state: parameter name to tensor, the point at which tangents are taken.
        tolerance: as for ``orthonormal_tangents``.

    Returns:
        {name: (p, *shape)} for every parameter in ``directions`` and every parameter of a gauge
        that meets one of them: the part orthogonal to all orbits. Lengths are not restored.

    Raises:
        ValueError: a direction's name is not in ``state`` or its shape does not fit.
    """
    _check_gauges(gauges)
    if tolerance is not None:
        _check.positive("tolerance", tolerance)
    counts = set()
    for name, value in directions.items():
        if name not in state:
            raise ValueError(f"directions: no parameter called {name!r} in the state")
        shape = tuple(state[name].shape)
        _check.tensor(f"directions[{name!r}]", value)
        if tuple(value.shape[1:]) != shape or value.ndim != len(shape) + 1:
            raise _check.fail(f"directions[{name!r}]", value, f"shape (p, {shape})")
        counts.add(value.shape[0])
    if len(counts) > 1:
        raise ValueError(
            f"directions: expected one common number of directions, got {sorted(counts)}"
        )
    out = dict(directions)
    for cluster in _clusters(gauges):
        names = _names(cluster)
        if not any(n in directions for n in names):
            continue
        basis = _basis(cluster, state, tolerance)
        p = counts.copy().pop()
        parts = [
            directions[n].flatten(1) if n in directions else state[n].new_zeros(p, state[n].numel())
            for n in names
        ]
        flat = torch.cat(parts, 1)
        for _ in range(2):  # the second pass removes what rounding left of the first
            flat = flat - (flat @ basis.T) @ basis
        column = 0
        for n in names:
            size = state[n].numel()
            out[n] = flat[:, column : column + size].reshape(p, *state[n].shape)
            column += size
    return out
