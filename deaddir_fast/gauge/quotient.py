"""Splitting parameter space at a point into orbit tangents and their complement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State
from deaddir_fast.gauge.frame import frame, read_by

Names = Callable[[Gauge], tuple[str, ...]]
Batch = dict[str, Tensor]  # name -> (p, *shape)
Map = Callable[[Batch], Batch]
METRICS = ("euclidean", "invariant")


def _moved(gauge: Gauge) -> tuple[str, ...]:
    return gauge.parameters


def clusters(gauges: Sequence[Gauge], names: Names = _moved) -> list[list[Gauge]]:
    """Gauges that share no parameter have orthogonal tangents and are treated apart.

    Finite groups, which have no tangents, are left out.
    """
    joined: list[tuple[set[str], list[Gauge]]] = []
    for gauge in (g for g in gauges if g.dimension):
        own = set(names(gauge))
        touching = [c for c in joined if c[0] & own]
        joined = [c for c in joined if not c[0] & own]
        members = [g for c in touching for g in c[1]]
        joined.append((own.union(*(c[0] for c in touching)), [*members, gauge]))
    return [members for _, members in joined]


def _names(cluster: Sequence[Gauge], names: Names = _moved) -> list[str]:
    return list(dict.fromkeys(n for g in cluster for n in names(g)))


def _basis(
    cluster: Sequence[Gauge],
    state: State,
    tolerance: float | None,
    names: Sequence[str],
    white: Map,
) -> Tensor:
    """(q, N) orthonormal rows spanning ``white`` of the tangents, over ``names`` in order."""
    rows = []
    for gauge in cluster:
        moved = white(gauge.tangents(state))
        parts = [
            moved[n].flatten(1)
            if n in moved
            else state[n].new_zeros(gauge.dimension, state[n].numel())
            for n in names
        ]
        rows.append(torch.cat(parts, 1))
    return row_space(torch.cat(rows), tolerance)


def row_space(matrix: Tensor, tolerance: float | None) -> Tensor:
    """Orthonormal rows spanning those of ``matrix`` (r, N)."""
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


def check_gauges(gauges: Sequence[Gauge]) -> None:
    """Refuse anything but gauges."""
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
    check_gauges(gauges)
    if tolerance is not None:
        _check.positive("tolerance", tolerance)
    bases = [(c, _basis(c, state, tolerance, _names(c), dict)) for c in clusters(gauges)]
    rank = sum(b.shape[0] for _, b in bases)
    out = {n: _zeros(state[n], rank) for g in gauges for n in g.parameters}
    start = 0
    for cluster, basis in bases:
        column = 0
        for name in _names(cluster):
            value = state[name]
            part = basis[:, column : column + value.numel()]
            out[name][start : start + basis.shape[0]] = part.reshape(basis.shape[0], *value.shape)
            column += value.numel()
        start += basis.shape[0]
    return out, rank


def project_out(
    directions: Mapping[str, Tensor],
    gauges: Sequence[Gauge],
    state: State,
    *,
    metric: str | Mapping[str, Tensor] = "euclidean",
    tolerance: float | None = None,
) -> dict[str, Tensor]:
    """Remove from directions their projection onto the orbit tangents, orthogonal in a metric.

    Two states of one orbit have different Euclidean complements: what is projected out there
    depends on the gauge. In the invariant metric it does not: the projection at h θ of a direction
    moved by h is the projection at θ moved by h.

    Args:
        directions: {name: (p, *shape)}; a missing parameter is zero.
        gauges: as returned by ``find``; leave out those of another likelihood.
        state: parameter name to tensor, the point at which tangents are taken.
        metric: ``"euclidean"``; ``"invariant"``, the metric <x, y> = <A x, A y> of ``frame`` (for
            rescalings Σ x_e y_e / f_e², f moving with the group; for GL blocks tr Xᵀ S⁻¹ Y with
            S the Gram matrix of the writers; for translations the readers' biases count as
            effective ones); or {name: positive weights w}, Σ w_e x_e y_e, missing names w = 1.
        tolerance: as for ``orthonormal_tangents``.

    Returns:
        {name: (p, *shape)} for every parameter in ``directions`` and every parameter of a gauge
        that meets one of them: the part orthogonal to all orbits. Lengths are not restored.

    Raises:
        ValueError: a direction's name is not in ``state`` or its shape does not fit; the metric
            is none of these; no invariant metric exists at this state (``Frame.remarks``).
    """
    check_gauges(gauges)
    if tolerance is not None:
        _check.positive("tolerance", tolerance)
    invariant = isinstance(metric, str) and _check.choice("metric", metric, METRICS) == METRICS[1]
    weights = {} if isinstance(metric, str) else _checked_weights(metric, state)
    p = _checked_directions(directions, state)
    out = dict(directions)
    names_of = read_by if invariant else _moved
    for cluster in clusters(gauges, names_of):
        names = _names(cluster, names_of)
        if not any(n in directions for n in names):
            continue
        if invariant:
            moving = frame(state, cluster)
            if moving.remarks:
                raise ValueError(f"metric: no invariant one here, {'; '.join(moving.remarks)}")
            white: Map = moving.push
            back: Map = moving.pull
        else:
            roots = {n: weights[n].sqrt() for n in names if n in weights}
            white, back = _weighted(roots), _weighted({n: 1 / r for n, r in roots.items()})
        basis = _basis(cluster, state, tolerance, names, white)
        full = {n: directions[n] if n in directions else _zeros(state[n], p) for n in names}
        whitened = white(full)
        flat = torch.cat([whitened[n].flatten(1) for n in names], 1)
        for _ in range(2):  # the second pass removes what rounding left of the first
            flat = flat - (flat @ basis.T) @ basis
        sizes = [state[n].numel() for n in names]
        parts = zip(names, flat.split(sizes, 1), strict=True)
        out |= back({n: part.reshape(p, *state[n].shape) for n, part in parts})
    return out


def _zeros(value: Tensor, p: int) -> Tensor:
    return value.new_zeros(p, *value.shape)


def _weighted(roots: Mapping[str, Tensor]) -> Map:
    return lambda batch: {n: v * roots[n] if n in roots else v for n, v in batch.items()}


def _checked_weights(metric: Mapping[str, Tensor], state: State) -> Mapping[str, Tensor]:
    if not isinstance(metric, Mapping):
        raise _check.fail("metric", metric, "'euclidean', 'invariant' or a mapping", TypeError)
    for name, value in metric.items():
        if name not in state:
            raise ValueError(f"metric: no parameter called {name!r} in the state")
        _check.tensor(f"metric[{name!r}]", value)
        if value.shape != state[name].shape:
            raise _check.fail(f"metric[{name!r}]", value, f"shape {tuple(state[name].shape)}")
        if not bool((value.isfinite() & (value > 0)).all()):
            raise ValueError(f"metric[{name!r}]: expected finite positive weights")
    return metric


def _checked_directions(directions: Mapping[str, Tensor], state: State) -> int:
    """The common number of directions."""
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
    return counts.pop() if counts else 0
