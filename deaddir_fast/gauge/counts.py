"""Dimensions of parameter space, of the orbit through a state, and of the quotient Θ/G."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State
from deaddir_fast.gauge.complex import ComplexRescaling
from deaddir_fast.gauge.entries import (
    Keep,
    Multiplicative,
    blocks,
    folded,
    in_turn,
    norms_of,
    squares,
    translations_in_turn,
    undivided,
)
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.quotient import check_gauges, clusters, orthonormal_tangents
from deaddir_fast.gauge.shift import ClassShift

#: Numbers in the dense matrix of a cluster's tangents, above which its rank is only bounded.
LARGEST_TANGENTS = 50_000_000


@dataclass(frozen=True)
class QuotientDimension:
    """Dimensions at a state.

    Attributes:
        parameters: dimension of Θ.
        group: sum of the dimensions of the groups.
        orbit: dimension of the orbit through the state, the rank of its tangents; None where only
            the bounds are known.
        orbit_bounds: (least, most).
        generic_orbit: the same at a random state of the same shapes; None where only bounded.
        reason: why a rank is only bounded, or empty.
    """

    parameters: int
    group: int
    orbit: int | None
    orbit_bounds: tuple[int, int]
    generic_orbit: int | None
    reason: str

    @property
    def quotient(self) -> int | None:
        """Dimension of Θ/G at the state: parameters − orbit."""
        return None if self.orbit is None else self.parameters - self.orbit

    @property
    def generic_quotient(self) -> int | None:
        """Dimension of Θ/G near a generic state."""
        return None if self.generic_orbit is None else self.parameters - self.generic_orbit

    @property
    def special(self) -> bool | None:
        """Whether the orbit is smaller than a generic one, so that Θ/G is not smooth here."""
        if self.orbit is None or self.generic_orbit is None:
            return None
        return self.orbit < self.generic_orbit


def quotient_dimension(
    model_or_state: nn.Module | State, gauges: Sequence[Gauge]
) -> QuotientDimension:
    """Count dimensions of Θ, of the orbit and of Θ/G.

    Gauges that share parameters are counted together. In an order like that of ``frame`` each
    gauge has entries that only it and gauges before it move. The tangents are block triangular
    there, and the rank is at least the sum of the ranks of single units (is any entry not zero),
    pairs (twice that), blocks (d² − (d − rank of writers)(d − rank of readers)) and shifts,
    whatever the size of the model. It is at most the same sum over all entries. Where the two
    differ (layers wider than both neighbours, zeros next to shared entries), the cluster's dense
    tangents decide, up to
    5·10⁷ numbers; beyond, there are bounds only.

    Args:
        model_or_state: a module, or parameter name to tensor.
        gauges: as returned by ``find``; leave out those of another likelihood.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a gauge moves a parameter that is not there.
    """
    if isinstance(model_or_state, nn.Module):
        state = {k: v.detach() for k, v in model_or_state.named_parameters()}
    else:
        if not hasattr(model_or_state, "items"):
            expected = "a torch.nn.Module or a mapping of tensors"
            raise _check.fail("model_or_state", model_or_state, expected, TypeError)
        state = {k: v.detach() for k, v in model_or_state.items()}
    check_gauges(gauges)
    for gauge in gauges:
        gauge._check_state(state)
    draw = torch.Generator().manual_seed(0)
    generic = {
        k: torch.randn(v.shape, dtype=torch.float64, generator=draw) for k, v in state.items()
    }
    least, most = orbit_rank(state, gauges)
    generic_least, generic_most = orbit_rank(generic, gauges)
    reasons = []
    if least < most:
        reasons.append("the orbit through the state")
    if generic_least < generic_most:
        reasons.append("the generic orbit")
    where = " and ".join(reasons)
    return QuotientDimension(
        parameters=sum(v.numel() for v in state.values()),
        group=sum(g.dimension for g in gauges),
        orbit=least if least == most else None,
        orbit_bounds=(least, most),
        generic_orbit=generic_least if generic_least == generic_most else None,
        reason=f"{where}: more than {LARGEST_TANGENTS:,} numbers in tangents" if where else "",
    )


def orbit_rank(state: State, gauges: Sequence[Gauge]) -> tuple[int, int]:
    """Least and most dimension of the orbit: equal unless a cluster is too large to decide."""
    least = most = 0
    for cluster in clusters(gauges):
        certain, possible = _triangular(state, cluster)
        if certain < possible:
            numbers = sum(state[n].numel() for n in {n for g in cluster for n in g.parameters})
            if sum(g.dimension for g in cluster) * numbers <= LARGEST_TANGENTS:
                certain = possible = orthonormal_tangents(cluster, state)[1]
        least += certain
        most += possible
    return least, most


def _triangular(state: State, cluster: Sequence[Gauge]) -> tuple[int, int]:
    """Bounds of the rank: ranks on each gauge's own entries, and on all of its entries, summed.

    Ordered as they come here, no gauge moves the own entries of one before it: the tangents are
    block triangular there, which bounds the rank from below. From above it is subadditive.
    """
    multiplicative = [g for g in cluster if isinstance(g, Multiplicative)]
    additive = [g for g in cluster if not isinstance(g, Multiplicative)]
    state = folded(state, norms_of(cluster))  # a change of coordinates leaves ranks alone
    certain = possible = 0
    for gauge, keeps in in_turn(multiplicative, state, additive):
        certain += _rank(gauge, state, keeps)
        twice = len({s.parameter for s in gauge.slots}) < len(gauge.slots)
        if isinstance(gauge, GeneralLinear) and twice:
            possible += gauge.dimension
        else:
            possible += _rank(gauge, state, [{} for _ in gauge.slots])
    shifts = [g for g in additive if isinstance(g, ClassShift)]
    apart = len({p for g in shifts for p in g.parameters}) == sum(len(g.parameters) for g in shifts)
    translations, clean = translations_in_turn(additive, state)
    # The source of a translation moves by v itself, and the rows of a weight by the class shift.
    for translation in translations:
        later = any(translation.source in g.parameters for g in shifts)
        certain += translation.dimension if clean and not later else 0
        possible += translation.dimension
    for shift in shifts:
        certain += shift.dimension if apart else 0
        possible += shift.dimension
    return certain, possible


def _rank(gauge: Multiplicative, state: State, keeps: Sequence[Keep]) -> int:
    """Rank of a gauge's tangents on the kept entries of its slots."""
    slots = list(zip(gauge.slots, keeps, strict=True))
    if not isinstance(gauge, GeneralLinear):
        pairs = isinstance(gauge, ComplexRescaling)
        sizes = [
            squares(state[s.parameter], s, keep).cpu()
            for s, keep in slots
            if not pairs or undivided(s, keep)
        ]
        # Modulus and phase of a pair move it at right angles.
        alive = (torch.stack(sizes) > 0).any(0) if sizes else torch.zeros(0)
        return int(alive.sum()) * (2 if pairs else 1)
    d = gauge.shape[1]
    missing = torch.ones(gauge.shape[0], dtype=torch.int64)
    for sign in (1, -1):
        columns = []
        for slot, keep in slots:
            if slot.exponent == sign and undivided(slot, keep):
                columns.append(blocks(state[slot.parameter], slot, keep, gauge.shape).cpu())
        rank = _ranks(torch.cat(columns, 2), state[slots[0][0].parameter].dtype) if columns else 0
        missing = missing * (d - rank)
    return int((d * d - missing).sum())


def _ranks(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(blocks,) rank of (blocks, d, n), to the rounding of the parameters' dtype."""
    d, n = matrices.shape[1:]
    if n > d:
        matrices = torch.linalg.qr(matrices.mT, mode="r").R
    values = torch.linalg.svdvals(matrices)
    return (values > max(d, n) * torch.finfo(dtype).eps * values[:, :1]).sum(1)
