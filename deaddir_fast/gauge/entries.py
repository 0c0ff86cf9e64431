"""Which entries of the parameters a gauge moves, and which of them move with it alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.gauge.base import Gauge, State
from deaddir_fast.gauge.batch_norm import Norm, NormRescaling
from deaddir_fast.gauge.complex import ComplexRescaling
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.permutation import Permutation
from deaddir_fast.gauge.rescaling import Rescaling, Slot
from deaddir_fast.gauge.shift import ClassShift, Translation

Multiplicative = Rescaling | GeneralLinear | ComplexRescaling
Axes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Hold:
    """A gauge's hold on one axis of a parameter, or on the axes that a stack indexes together.

    Attributes:
        gauge: whose it is.
        slot: the slot behind it; None for gauges that add.
        parameter, axes: what is held.
        entries: (size,) bool: the entries of the axes, flattened, that are moved.
    """

    gauge: Gauge
    slot: Slot | None
    parameter: str
    axes: Axes
    entries: Tensor


def holds(gauge: Gauge, state: State, units: Tensor | None = None) -> list[Hold]:
    """Everything that a gauge moves; with ``units`` (h,) bool, what some of its units move.

    A permutation holds nothing: its orbits are points. The biases of batch norms that scales pass
    through are moved in ``folded`` coordinates as the slots say.

    Raises:
        TypeError: a kind of gauge that is none of this package.
    """

    def whole(name: str) -> Hold:
        return Hold(gauge, None, name, (0,), torch.ones(state[name].shape[0], dtype=torch.bool))

    if isinstance(gauge, Multiplicative):
        h = gauge.slots[0].positions.shape[0]
        chosen = torch.ones(h, dtype=torch.bool) if units is None else units.cpu()
        chosen = torch.cat([chosen, torch.zeros(1, dtype=torch.bool)])
        return [Hold(gauge, s, s.parameter, s.axes, chosen[s.unit_of()]) for s in gauge.slots]
    if isinstance(gauge, Permutation):
        return []
    if isinstance(gauge, ClassShift):
        return [whole(n) for n in gauge.parameters]
    if isinstance(gauge, Translation):
        source = torch.zeros(state[gauge.source].shape[0], dtype=torch.bool)
        source[gauge.entries] = True
        return [
            Hold(gauge, None, gauge.source, (0,), source),
            *(whole(reader.bias) for reader in gauge.readers),
        ]
    raise TypeError(
        "gauges: expected Rescaling, ComplexRescaling, GeneralLinear, Translation, ClassShift or "
        f"Permutation, got {type(gauge).__name__} {gauge.name!r}"
    )


def norms_of(gauges: Sequence[Gauge]) -> tuple[Norm, ...]:
    """The batch norms that scales pass through."""
    own = (n for g in gauges if isinstance(g, NormRescaling) for n in g.norms)
    return tuple({n.gamma: n for n in own}.values())


def folded(state: State, norms: Sequence[Norm]) -> dict[str, Tensor]:
    """The state, or a direction, in coordinates in which scales through ``norms`` only scale."""
    out = dict(state)
    for norm in norms:
        out.update(norm.fold(out))
    return out


Keep = dict[Axes, Tensor]  # axes -> (size,) bool, the entries of them, flattened, that count


def kept(slot: Slot, others: Sequence[Hold], before: Keep | None = None) -> Keep:
    """The entries of a slot's parameter (of ``before``) that none of the other holds moves."""
    keep: Keep = dict(before or {})
    for other in others:
        if other.parameter == slot.parameter and other.slot is not slot:
            free = ~other.entries
            keep[other.axes] = keep[other.axes] & free if other.axes in keep else free
    return keep


def undivided(slot: Slot, keep: Keep) -> bool:
    """Whether all units of a slot are kept, as far as its own axes tell."""
    return slot.axes not in keep or bool(keep[slot.axes][slot.positions].all())


def counts(slot: Slot, shape: Sequence[int], keep: Keep) -> Tensor:
    """(h,) number of kept entries that each unit owns."""
    if any(len(axes) > 1 for axes in (slot.axes, *keep)):
        entries = _masked(torch.ones(tuple(shape), dtype=torch.bool), keep)
        rest_axes = [a for a in range(len(shape)) if a not in slot.axes]
        each = entries.sum(rest_axes) if rest_axes else entries
        return each.reshape(-1)[slot.positions].sum(1).double()
    rest = math.prod(
        int(keep[(a,)].sum()) if (a,) in keep else size
        for a, size in enumerate(shape)
        if a != slot.axis
    )
    own = keep[slot.axes] if slot.axes in keep else torch.ones(slot.size, dtype=torch.bool)
    return own[slot.positions].sum(1).double() * rest


def _masked(w: Tensor, keep: Keep) -> Tensor:
    for axes, mask in keep.items():
        if not bool(mask.all()):
            view = [s if a in axes else 1 for a, s in enumerate(w.shape)]
            w = w * mask.to(w).reshape(view)
    return w


def squares(w: Tensor, slot: Slot, keep: Keep) -> Tensor:
    """(h,) sum of squares of the kept entries of each unit, fp64."""
    w = _masked(w.detach(), keep).reshape(w.shape or (1,))
    rest = [a for a in range(w.ndim) if a not in slot.axes]
    rows = torch.linalg.vector_norm(w, dim=rest, dtype=torch.float64) if rest else w.double()
    return rows.reshape(-1).square()[slot.positions.to(w.device)].sum(1)


def blocks(w: Tensor, slot: Slot, keep: Keep, shape: Sequence[int]) -> Tensor:
    """(blocks, d, columns) the kept entries of each block of units, fp64; others are zero."""
    w = _masked(w.detach().double(), keep)
    rows = w.movedim(slot.axes, tuple(range(len(slot.axes)))).reshape(slot.size, -1)
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
        for name in {slot.parameter for slot in gauge.slots}:
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
