"""``dead_directions``: the null space of the exact Fisher, classified."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check, gauge
from deaddir_fast.fisher.jacobian import rank_on
from deaddir_fast.reading.dead_space import DeadSpace, explore, flag_basis
from deaddir_fast.reading.fibre import doubt, flat_directions
from deaddir_fast.reading.local import LocalModel

MEASURED = 512  # directions whose own orders are measured; the rest of a large space is summed up
BATCH = 64  # directions whose jets are taken together


@dataclass(frozen=True)
class DeadCounts:
    """Dimensions of the dead space by kind, at one point.

    Attributes:
        total: dimension of the null space of the Fisher on Θ.
        gauge: along orbits of the symmetries listed in ``DeadDirections.gauges``.
        quotient: total − gauge, what is dead on Θ/G. The Fisher lives on the quotient where orbits
            near the point have one dimension (``dd.gauge.quotient_dimension``).
        fibre, singular, unresolved: kinds of the rest; None where it was too large to list.
    """

    total: int
    gauge: int
    quotient: int
    fibre: int | None
    singular: int | None
    unresolved: int | None

    def __str__(self) -> str:
        kinds = ("fibre", "singular", "unresolved")
        rest = ", ".join(f"{k} {getattr(self, k)}" for k in kinds if getattr(self, k) is not None)
        told = rest or "sampled only"
        return f"{self.total} dead: gauge {self.gauge}, {self.quotient} on the quotient ({told})"


@dataclass(frozen=True)
class DeadDirections:
    """An orthonormal basis of the null space of the exact Fisher, each vector classified.

    Attributes:
        directions: {parameter name: (q, *shape)}: gauge first, then singular, then fibre.
        dead_dimension: dimension of the null space; q is smaller where ``sampled``.
        sampled: the null space is too large to list: gauge directions are complete, the others
            random samples that stand for the rest.
        kinds: per direction ``"gauge"`` (tangent to a symmetry orbit), ``"fibre"`` (K stays zero
            after relaxing the live coordinates), ``"singular"`` (K grows with a finite order) or
            ``"unresolved"``.
        orders: (q,) KL order after relaxing; inf on gauge and fibre, NaN where unresolved.
        line_orders: (q,) KL order of the straight line; finite on a tangent of a curved fibre; NaN
            where unclear and, beyond the first 512 of a kind, not measured.
        rank: number of live directions.
        dimension: number of parameters.
        samples: number of inputs.
        rows: number of output equations (n·t·c), an upper limit of the rank.
        rank_half: rank from every second sample; smaller than ``rank`` while the rank still grows
            with data. None for a single sample.
        singular_values: (min(rows, d),) of the whitened Jacobian; squares are Fisher eigenvalues.
        tolerance: singular values below it count as zero.
        gap: smallest live over largest dead singular value.
        ambiguous: number of singular values too close to the tolerance to call.
        gauges: names of the symmetries found.
        verdict: ``"resolved"`` or why not.
        notes: remarks.
    """

    directions: dict[str, Tensor]
    dead_dimension: int
    sampled: bool
    kinds: tuple[str, ...]
    orders: Tensor
    line_orders: Tensor
    rank: int
    dimension: int
    samples: int
    rows: int
    rank_half: int | None
    singular_values: Tensor
    tolerance: float
    gap: float
    ambiguous: int
    gauges: tuple[str, ...]
    verdict: str
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.kinds)

    def count(self, kind: str) -> int:
        """Number of directions of one kind."""
        return self.kinds.count(kind)

    @property
    def counts(self) -> DeadCounts:
        """Dimensions by kind, and what is dead on Θ/G."""
        on_orbits = self.count("gauge")
        listed = {
            kind: None if self.sampled else self.count(kind)
            for kind in ("fibre", "singular", "unresolved")
        }
        total = self.dead_dimension
        return DeadCounts(total, on_orbits, total - on_orbits, **listed)

    def select(self, index: Any) -> dict[str, Tensor]:
        """Some of the directions, {name: (p, *shape)}; ``index`` as for a tensor."""
        return {name: value[index] for name, value in self.directions.items()}


def half_rank(local: LocalModel) -> int | None:
    """Rank on every second sample; None for one sample."""
    return rank_on(local.spectrum, local.samples, 2) if local.samples > 1 else None


def _batches(vectors: Tensor) -> Iterator[Tensor]:
    yield from vectors[:MEASURED].split(BATCH)


def line_orders(local: LocalModel, vectors: Tensor, max_order: int) -> list[float]:
    """Straight-line KL orders of (p, d) vectors, NaN where unclear or not measured."""
    found = [k for part in _batches(vectors) for k in local.line_orders(part, max_order)]
    return _plain(found, vectors.shape[0])


def relaxed_orders(local: LocalModel, vectors: Tensor, max_order: int) -> list[float]:
    """KL orders of (p, d) vectors after relaxing, NaN where unclear or not measured."""
    found = [k for part in _batches(vectors) for k in local.relaxed_jets(part, max_order).orders()]
    return _plain(found, vectors.shape[0])


def _plain(values: list[float | None], count: int) -> list[float]:
    nan = float("nan")
    return [nan if v is None else v for v in values] + [nan] * (count - len(values))


def classify(
    local: LocalModel, space: DeadSpace, max_order: int, unsure: bool
) -> tuple[Tensor, list[str], list[float], list[float]]:
    """Basis (q, d), kinds, relaxed orders and line orders of the whole dead space.

    ``unsure`` says that what looks flat was not found to be so at a distance.
    """
    nan, inf = float("nan"), float("inf")
    gauge_vectors = space.orbit.T
    kinds = ["gauge"] * gauge_vectors.shape[0]
    orders = [inf] * len(kinds)
    lines = line_orders(local, gauge_vectors, max_order) if kinds else []
    rest = space.rest.T
    if rest.shape[0] == 0:
        return gauge_vectors, kinds, orders, lines
    adapted = flag_basis(space)
    if adapted is not None:
        rest = adapted[0].T
        own = [nan if unsure and k == inf else k for k in adapted[1]]
    elif space.order == inf:
        own = [nan if unsure else inf] * rest.shape[0]
    elif space.kinked or space.order is None:
        own = [nan] * rest.shape[0]
    else:
        # A flat direction in a space that is not flat may only lie between singular ones.
        own = [nan if k == inf else k for k in relaxed_orders(local, rest, max_order)]
    straight = [nan] * len(own) if space.kinked else line_orders(local, rest, max_order)
    names = ["fibre" if k == inf else "unresolved" if k != k else "singular" for k in own]
    ranking = sorted(
        range(len(own)), key=lambda i: ("singular", "unresolved", "fibre").index(names[i])
    )
    return (
        torch.cat([gauge_vectors, rest[ranking]]),
        kinds + [names[i] for i in ranking],
        orders + [own[i] for i in ranking],
        lines + [straight[i] for i in ranking],
    )


def spectrum_verdict(local: LocalModel) -> str | None:
    """Why the rank is not certain, or None."""
    split = local.spectrum
    if split.ambiguous:
        return (
            f"no gap in the spectrum: {split.ambiguous} singular value"
            f"{'s lie' if split.ambiguous > 1 else ' lies'} between rounding "
            f"({split.tolerance:.1e}) and {split.clear:.1e}"
        )
    return None


def dead_directions(
    model: nn.Module,
    inputs: Any,
    *,
    likelihood: Any = "categorical",
    max_order: int = 8,
) -> DeadDirections:
    """Null space of the exact Fisher at the model's parameters, each direction classified.

    The model's own distribution is the truth (K = 0 at θ0). Readings are in fp64 on a copy. The
    null space is taken from the singular values of the whitened Jacobian with a stated tolerance;
    gauge directions come from verified symmetries (``dd.gauge.find``); every other direction is
    read after relaxing the live coordinates (Morse splitting), where a tangent of a curved fibre
    becomes flat and a truly singular direction keeps its KL order ("Dead Directions", arXiv
    2606.05957, definition 1; the relaxed reading is our choice).

    Args:
        model: any module in evaluation mode. Up to 4096 parameters the null space is dense and
            complete; beyond, the live space is found by Fisher products and a randomised range
            finder, and the null space is sampled.
        inputs: tensor, tuple or dict; samples lead.
        likelihood: ``"categorical"``, ``"gaussian"``, ``"bernoulli"``, ``"poisson"`` or a
            ``Likelihood``.
        max_order: highest KL order looked for; a direction flat to that order counts as fibre.

    Raises:
        ValueError: for a model in training mode, NaN parameters or outputs, empty inputs, or a
            rank too large for the range finder.
    """
    local = open_local(model, inputs, likelihood, max_order)
    space = explore(local, max_order, gauges=gauge.find(local.model, local.inputs))
    why = doubt(local, space, multiple=False) if flat_directions(space).shape[0] else None
    found = describe(local, space, max_order, unsure=why is not None)
    reasons = [spectrum_verdict(local), why]
    if space.order is None:
        reasons.append(space.reason)
    elif why is None and "unresolved" in found.kinds:
        unclear = found.count("unresolved")
        reasons.append(space.reason or f"{unclear} directions lie on no block of one order")
    return replace(found, verdict=verdict(reasons))


def verdict(reasons: list[str | None]) -> str:
    """``"resolved"``, or the reasons why not."""
    why = "; ".join(r for r in reasons if r)
    return f"unresolved: {why}" if why else "resolved"


def describe(
    local: LocalModel, space: DeadSpace, max_order: int, *, unsure: bool = False
) -> DeadDirections:
    """Everything about the dead space but the verdict."""
    vectors, kinds, orders, lines = classify(local, space, max_order, unsure)
    split = local.spectrum
    return DeadDirections(
        directions=local.space.directions(vectors),
        dead_dimension=local.space.dimension - split.rank,
        sampled=space.rest.shape[1] < space.size,
        kinds=tuple(kinds),
        orders=torch.tensor(orders, dtype=torch.float64),
        line_orders=torch.tensor(lines, dtype=torch.float64),
        rank=split.rank,
        dimension=local.space.dimension,
        samples=local.samples,
        rows=split.rows,
        rank_half=half_rank(local),
        singular_values=split.values,
        tolerance=split.tolerance,
        gap=split.gap,
        ambiguous=split.ambiguous,
        gauges=space.gauges,
        verdict="",
        notes=space.notes,
    )


def open_local(model: nn.Module, inputs: Any, likelihood: Any, max_order: int) -> LocalModel:
    """Check the arguments every local reading shares."""
    if not isinstance(model, nn.Module):
        raise _check.fail("model", model, "a torch.nn.Module", TypeError)
    if not isinstance(max_order, int) or max_order < 2:
        raise _check.fail("max_order", max_order, "an integer >= 2")
    return LocalModel(model, inputs, likelihood)
