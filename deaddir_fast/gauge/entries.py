"""Which entries of the parameters a gauge moves, and which of them move with it alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.gauge.base import Gauge, State, along
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.rescaling import Rescaling, Slot
from deaddir_fast.gauge.shift import ClassShift, Translation

Multiplicative = Rescaling | GeneralLinear


@dataclass(frozen=True, eq=False)
class Hold:
    """A gauge's hold on one axis of a parameter.

    Attributes:
        gauge: whose it is.
        slot: the slot behind it; None for gauges that add.
        parameter, axis: what is held.
        entries: (size,) bool: the entries of the axis that are moved.
    """

    gauge: Gauge
    slot: Slot | None
    parameter: str
    axis: int
    entries: Tensor


def holds(gauge: Gauge, state: State, units: Tensor | None = None) -> list[Hold]:
    """Everything that a gauge moves; with ``units`` (h,) bool, what some of its units move.

    Raises:
        TypeError: a kind of gauge that is neither of the four of this package.
    """

    def whole(name: str) -> Hold:
        return Hold(gauge, None, name, 0, torch.ones(state[name].shape[0], dtype=torch.bool))

    if isinstance(gauge, Rescaling | GeneralLinear):
        h = gauge.slots[0].positions.shape[0]
        chosen = torch.ones(h, dtype=torch.bool) if units is None else units.cpu()
        chosen = torch.cat([chosen, torch.zeros(1, dtype=torch.bool)])
        return [Hold(gauge, s, s.parameter, s.axis, chosen[s.unit_of()]) for s in gauge.slots]
    if isinstance(gauge, ClassShift):
        return [whole(n) for n in gauge.parameters]
    if isinstance(gauge, Translation):
        source = torch.zeros(state[gauge.source].shape[0], dtype=torch.bool)
        source[gauge.entries] = True
        return [
            Hold(gauge, None, gauge.source, 0, source),
            *(whole(reader.bias) for reader in gauge.readers),
        ]
    raise TypeError(
        f"gauges: expected Rescaling, GeneralLinear, Translation or ClassShift, got "
        f"{type(gauge).__name__} {gauge.name!r}"
    )


Keep = dict[int, Tensor]  # axis -> (size,) bool, the entries that count


def kept(slot: Slot, others: Sequence[Hold], before: Keep | None = None) -> Keep:
    """The entries of a slot's parameter (of ``before``) that none of the other holds moves."""
    keep: Keep = dict(before or {})
    for other in others:
        if other.parameter == slot.parameter and other.slot is not slot:
            free = ~other.entries
            keep[other.axis] = keep[other.axis] & free if other.axis in keep else free
    return keep


def counts(slot: Slot, shape: Sequence[int], keep: Keep) -> Tensor:
    """(h,) number of kept entries that each unit owns."""
    rest = math.prod(
        int(keep[a].sum()) if a in keep else size for a, size in enumerate(shape) if a != slot.axis
    )
    own = keep[slot.axis] if slot.axis in keep else torch.ones(slot.size, dtype=torch.bool)
    return own[slot.positions].sum(1).double() * rest


def _masked(w: Tensor, keep: Keep) -> Tensor:
    for axis, mask in keep.items():
        if not bool(mask.all()):
            w = w * along(mask.to(w), axis, w.ndim)
    return w


def squares(w: Tensor, slot: Slot, keep: Keep) -> Tensor:
    """(h,) sum of squares of the kept entries of each unit, fp64."""
    w = _masked(w.detach(), keep).reshape(w.shape or (1,))
    rest = [a for a in range(w.ndim) if a != slot.axis]
    rows = torch.linalg.vector_norm(w, dim=rest, dtype=torch.float64) if rest else w.double()
    return rows.square()[slot.positions.to(w.device)].sum(1)


def blocks(w: Tensor, slot: Slot, keep: Keep, shape: Sequence[int]) -> Tensor:
    """(blocks, d, columns) the kept entries of each block of units, fp64; others are zero."""
    w = _masked(w.detach().double(), keep)
    rows = w.movedim(slot.axis, 0).flatten(1) if w.ndim > 1 else w.reshape(-1, 1)
    owned = rows[slot.positions.to(w.device)]
    return owned.flatten(1).unflatten(0, shape[:2]).flatten(2)


def in_turn(
    gauges: Sequence[Multiplicative], state: State, others: Sequence[Gauge] = ()
) -> Iterator[tuple[Multiplicative, list[Keep]]]:
    """The gauges in an order in which each can be pinned down by entries of its own.

    Yields each gauge once, and for each of its slots the entries that move with it and with
    gauges yielded before, but neither with later ones nor with it a second time (a layer between
    units of one gauge). Gauges in ``others`` count as later throughout. First come gauges all of
    whose writers are left, then those with the largest share of each unit's writers, then those
    with any entry. What is chosen depends on shapes only, never on values.
    """
    pending = list(gauges)
    held: dict[str, list[Hold]] = {}
    for gauge in [*pending, *others]:
        for hold in holds(gauge, state):
            held.setdefault(hold.parameter, []).append(hold)

    def keeps(gauge: Multiplicative, own: bool) -> list[Keep]:
        return [
            kept(s, [h for h in held[s.parameter] if not own or h.gauge is gauge])
            for s in gauge.slots
        ]

    def available(gauge: Multiplicative, keep: list[Keep], signs: tuple[int, ...]) -> Tensor:
        total = torch.zeros(gauge.slots[0].positions.shape[0], dtype=torch.float64)
        for slot, mask in zip(gauge.slots, keep, strict=True):
            if (slot.exponent > 0) - (slot.exponent < 0) in signs:
                total = total + counts(slot, state[slot.parameter].shape, mask)
        return total

    def rank(gauge: Multiplicative) -> float:
        now = keeps(gauge, own=False)
        writers = available(gauge, now, (1,))
        if bool((writers > 0).all()):
            return 1 - float((writers / available(gauge, keeps(gauge, own=True), (1,))).min())
        return 2 if bool((available(gauge, now, (1, -1)) > 0).all()) else 3

    ranks = {id(g): rank(g) for g in pending}
    while pending:
        gauge = min(pending, key=lambda g: ranks[id(g)])  # the first of equals
        pending.remove(gauge)
        yield gauge, keeps(gauge, own=False)
        for name in gauge.parameters:
            held[name] = [h for h in held[name] if h.gauge is not gauge]
        for other in pending:
            if set(other.parameters) & set(gauge.parameters):
                ranks[id(other)] = rank(other)


def translations_in_turn(gauges: Sequence[Gauge], state: State) -> tuple[list[Translation], bool]:
    """Translations such that none moves the source entries of an earlier one; whether that holds.

    A translation that absorbs a shift in another's source has to come before it.
    """
    pending = [g for g in gauges if isinstance(g, Translation)]
    ordered: list[Translation] = []
    clean = True
    while pending:

        def free(g: Translation, among: list[Translation] = pending) -> bool:
            return not any(
                h.parameter == g.source and bool(h.entries[g.entries].any())
                for o in among
                if o is not g
                for h in holds(o, state)
            )

        first = next((g for g in pending if free(g)), None)
        clean = clean and first is not None
        ordered.append(first or pending[0])
        pending.remove(ordered[-1])
    return ordered, clean
