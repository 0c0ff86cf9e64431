"""The path-norm frame: one positive scale per unit that moves with the unit's rescaling.

For a unit j with incoming weights W_ji and bias b_j

    phi_j^2 = sum_i (W_ji phi_i)^2 + b_j^2,    phi = 1 on inputs,

so that W -> c_j W / c_i gives phi_j -> c_j phi_j exactly: W phi_i / phi_j and g phi_j / phi_i are
invariants of all rescalings at once, however they overlap. In general a unit's scale is the root
mean square, over the entries of an axis it owns, of the norms of what its writers hold there, in
the frame of what they read; gauges are taken in an order in which that frame is known. Writers
that would need their own scale (a layer used twice) are left out, and so are parameters that a
class shift or a softmax may shift (key biases); a gauge none of whose writers can be used takes the
inverse norms of its readers. A scale that would be zero is read as 1: a unit
whose writers all vanish lies outside the chart, and is stepped as AdamW would.

Each gauge further has one constant (``balance.py``), fixed at the first step.

Source: path norms (Neyshabur, Salakhutdinov & Srebro 2015, "Path-SGD"); as a moving frame our
choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.gauge.rescaling import Slot
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import call
from deaddir_fast.optim.claims import Units
from deaddir_fast.optim.layout import COLS, ROWS, Layout, shard_groups


@dataclass
class _Vector:
    """A factor per row or column of a matrix: unit numbers and exponents, one term per gauge."""

    length: int
    terms: list[tuple[Tensor, int]]


class _Table:
    """Factors of many vectors, gathered at once from the powers of all units' scales."""

    def __init__(self, vectors: Sequence[_Vector], units: int, device: torch.device) -> None:
        self.sizes = [v.length for v in vectors]
        depth = max((len(v.terms) for v in vectors), default=0)
        exponents = sorted({e for v in vectors for _, e in v.terms})
        columns = []
        for vector in vectors:
            rows = [
                torch.where(unit < units, exponents.index(e) * (units + 1) + unit, units)
                for unit, e in vector.terms
            ]
            rows += [torch.full((vector.length,), units)] * (depth - len(rows))
            columns.append(torch.stack(rows) if rows else torch.zeros(0, vector.length).long())
        empty = torch.zeros(depth, 0, dtype=torch.long)
        self._index = torch.cat(columns, 1).to(device) if columns else empty.to(device)
        self._exponents = exponents
        self._depth = depth
        self._kept: Tensor | None = None

    def factors(self, scales: Tensor, *, keep: bool = False) -> list[Tensor]:
        """The vectors, for the scales of all units with a 1 behind them.

        With ``keep`` they lie where those of the last call with ``keep`` lay, and replace them:
        the address is then part of what a captured graph may rely on.
        """
        if keep and self.sizes:
            if self._kept is None:
                self._kept = scales.new_empty(sum(self.sizes))
            self._kept.copy_(torch.cat(self.factors(scales)))
            return list(self._kept.split(self.sizes))
        if not self.sizes:
            return []
        if self._depth == 0:
            return list(scales.new_ones(sum(self.sizes)).split(self.sizes))
        powers = torch.cat([scales**e if e != 1 else scales for e in self._exponents])
        values = powers[self._index[0]]
        for row in self._index[1:]:
            values = values * powers[row]
        return list(values.split(self.sizes))


@dataclass
class _Level:
    """Units whose scales can be read at once.

    Attributes:
        reads: numbers of the matrices that write them, and the side units run along.
        across, own: tables of inverse factors on the other side of a matrix, and of other gauges
            on the same side; with the numbers of the reads that have any.
        source, target: sums of shards are added up at ``target`` among further places behind the
            sums.
        further: number of these places.
        added: over which process groups which of these places are added up.
        gather: (n, k) places of the sums of the n units that have k; behind them all the
            units in order among these.
        count: (units,) entries per unit.
        power: (units,): scale = mean square ** power; None where it is 1/2 for all.
        start, stop: places of the units among all.
    """

    reads: list[tuple[int, int]]
    across: tuple[_Table, list[int]]
    own: tuple[_Table, list[int]]
    source: Tensor
    target: Tensor
    further: int
    added: list[tuple[list[Any], slice]]
    gather: tuple[list[Tensor], Tensor]
    count: Tensor
    power: Tensor | None
    start: int
    stop: int


class Frame:
    """Scales of all units of several gauges, and the factors of every matrix they touch.

    Args:
        units: of the gauges.
        matrices: all matrices of all parameters they touch.
        parameters: name to parameter; all of these on one device.
        unread: names of parameters that a symmetry of another kind shifts: a scale that read
            them would not be blind to it.

    Attributes:
        order: the units in the order of their places among all scales.
        gauge_of: (units,) long: the number of their gauge in this order.
        dropped: gauges none of whose writers or readers can be read.
        framed: numbers of the matrices with factors; whether rows and columns have them.
    """

    def __init__(
        self,
        units: Sequence[Units],
        matrices: Sequence[Layout],
        parameters: Mapping[str, Tensor],
        unread: Collection[str] = (),
    ) -> None:
        self._matrices = list(matrices)
        self._parameters = parameters
        # Not those of the matrices: this process may hold none.
        touched = [parameters[s.parameter] for found in units for s in found.slots]
        wide = any(p.dtype == torch.float64 for p in touched)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = touched[0].device if touched else torch.device("cpu")
        plan, self.dropped = _ordered(units, unread)
        self.order = [found for found, _, _ in plan]
        self._depth = {id(found): level for found, _, level in plan}
        self._offset: dict[int, int] = {}
        self.total = 0
        for found in self.order:
            self._offset[id(found)] = self.total
            self.total += found.count
        counts = torch.tensor([found.count for found in self.order], dtype=torch.long)
        self.gauge_of = torch.arange(len(self.order)).repeat_interleave(counts).to(self.device)
        self._levels = [
            self._level([(f, slots) for f, slots, level in plan if level == depth], depth)
            for depth in sorted(set(self._depth.values()))
        ]
        self.framed: list[tuple[int, bool, bool]] = []
        vectors = []
        for n, layout in enumerate(self._matrices):
            rows, cols = (self._vector(layout, side) for side in (ROWS, COLS))
            if rows.terms or cols.terms:
                self.framed.append((n, bool(rows.terms), bool(cols.terms)))
                vectors += [v for v in (rows, cols) if v.terms]
        self._table = _Table(vectors, self.total, self.device)

    def _vector(self, layout: Layout, side: int, *, below: int | None = None) -> _Vector:
        """Factors along one side of a matrix; inverse ones of lower levels if ``below``."""
        terms = []
        for found in self.order:
            if below is not None and self._depth[id(found)] >= below:
                continue
            for slot, owner in zip(found.slots, found.owner, strict=True):
                if layout.covers(slot) and layout.side(slot) == side:
                    unit = owner[layout.entries(slot)]
                    inside = unit < found.count
                    if bool(inside.any()):
                        place = torch.where(inside, unit + self._offset[id(found)], self.total)
                        terms.append((place, slot.exponent if below is None else -slot.exponent))
        return _Vector(layout.rows if side == ROWS else layout.cols, terms)

    def _level(self, members: list[tuple[Units, list[Slot]]], depth: int) -> _Level:
        reads: list[tuple[int, int]] = []
        begin: list[int] = []  # of the sums of each read
        across, own = [], []
        length = 0
        for slot in (s for _, slots in members for s in slots):
            for n, layout in enumerate(self._matrices):
                read = (n, layout.side(slot)) if layout.covers(slot) else None
                if read is not None and read not in reads:
                    reads.append(read)
                    begin.append(length)
                    across.append(self._vector(layout, 1 - read[1], below=depth))
                    own.append(self._vector(layout, read[1], below=depth))
                    length += own[-1].length
        further = 0
        added: list[tuple[list[Any], slice]] = []
        source, target, units, places, powers, counts = [], [], [], [], [], []
        first = self._offset[id(members[0][0])]
        for found, slots in members:
            most = torch.zeros(found.count, dtype=torch.long)
            for slot in slots:
                owner = found.owner[_number(found, slot)]
                most = torch.maximum(
                    most, torch.bincount(owner, minlength=found.count)[: found.count]
                )
                spread_over = shard_groups(self._parameters[slot.parameter])
                for n, layout in enumerate(self._matrices):
                    if not layout.covers(slot):
                        continue
                    entries = layout.entries(slot)
                    place = (
                        torch.arange(entries.numel()) + begin[reads.index((n, layout.side(slot)))]
                    )
                    if spread_over:
                        source.append(place)
                        target.append(entries + further)
                    else:
                        inside = owner[entries] < found.count
                        units.append(owner[entries][inside] + self._offset[id(found)] - first)
                        places.append(place[inside])
                if spread_over:
                    inside = owner < found.count
                    units.append(owner[inside] + self._offset[id(found)] - first)
                    places.append(torch.arange(slot.size)[inside] + length + further)
                    if added and added[-1][0] == spread_over:
                        added[-1] = (spread_over, slice(added[-1][1].start, further + slot.size))
                    else:
                        added.append((spread_over, slice(further, further + slot.size)))
                    further += slot.size
            powers.append(torch.full((found.count,), 0.5 / slots[0].exponent, dtype=self.dtype))
            counts.append(most)
        power = torch.cat(powers)
        gather, order = _by_unit(torch.cat(units), torch.cat(places), power.numel())
        none = [torch.zeros(0, dtype=torch.long)]
        return _Level(
            reads,
            self._table_of(across),
            self._table_of(own),
            torch.cat(source or none).to(self.device),
            torch.cat(target or none).to(self.device),
            further,
            added,
            ([g.to(self.device) for g in gather], order.to(self.device)),
            torch.cat(counts).clamp(min=1).to(self.device, self.dtype),
            None if bool((power == 0.5).all()) else power.to(self.device),
            first,
            first + power.numel(),
        )

    def _table_of(self, vectors: list[_Vector]) -> tuple[_Table, list[int]]:
        having = [n for n, v in enumerate(vectors) if v.terms]
        return _Table([vectors[n] for n in having], self.total, self.device), having

    def scales(self, matrices: Sequence[Tensor]) -> Tensor:
        """(units + 1,): the scale of every unit at the present parameters, and a 1.

        Args:
            matrices: the values behind the layouts, in their order.
        """
        out = torch.ones(self.total + 1, dtype=self.dtype, device=self.device)
        for level in self._levels:
            sums = self._sums(level, matrices, out)
            if level.further:
                added = sums.new_zeros(level.further).index_add_(
                    0, level.target, sums[level.source]
                )
                for groups, where in level.added:
                    for group in groups:
                        torch.distributed.all_reduce(added[where], group=group)
                sums = torch.cat([sums, added])
            gather, order = level.gather
            mean = torch.cat([sums[g].sum(1) for g in gather])[order] / level.count
            mean = torch.where(mean > 0, mean, 1)
            root = mean.sqrt() if level.power is None else mean**level.power
            out[level.start : level.stop] = root
        return out

    def _sums(self, level: _Level, matrices: Sequence[Tensor], scales: Tensor) -> Tensor:
        """Sums of squares along the units of every read, in the frame of what is across."""
        across = _placed(level.across, scales, len(level.reads))
        parts: list[Tensor] = [scales] * len(level.reads)
        for dtype in dict.fromkeys(matrices[n].dtype for n, _ in level.reads):
            chosen = [r for r, (n, _) in enumerate(level.reads) if matrices[n].dtype == dtype]
            ws = [matrices[level.reads[r][0]] for r in chosen]
            sides = [level.reads[r][1] for r in chosen]
            work = accumulation(*ws)
            factor = [None if (f := across[r]) is None else f.to(work) for r in chosen]
            rows = [f if side == COLS else None for f, side in zip(factor, sides, strict=True)]
            cols = [f if side == ROWS else None for f, side in zip(factor, sides, strict=True)]
            sums = call("scaled_squares", ws, rows, cols, sides).to(self.dtype)
            lengths = [w.shape[side] for w, side in zip(ws, sides, strict=True)]
            for r, part in zip(chosen, sums.split(lengths), strict=True):
                parts[r] = part
        for r, own in enumerate(_placed(level.own, scales, len(level.reads))):
            if own is not None:
                parts[r] = parts[r] * own.square()
        return torch.cat(parts) if parts else scales.new_zeros(0)

    def labels(self, layout: Layout, side: int) -> tuple[Tensor, list[tuple[int, ...]]]:
        """Rows or columns of a matrix told apart by the gauges that scale them.

        Returns:
            (rows,) or (cols,) long labels, and per label the exponents of all gauges in order.
        """
        length = layout.rows if side == ROWS else layout.cols
        label = torch.zeros(length, dtype=torch.long)
        exponents: list[tuple[int, ...]] = [(0,) * len(self.order)]
        for g, found in enumerate(self.order):
            for slot, owner in zip(found.slots, found.owner, strict=True):
                if not layout.covers(slot) or layout.side(slot) != side:
                    continue
                inside = owner[layout.entries(slot)] < found.count
                label = torch.where(inside, label + len(exponents), label)
                exponents += [
                    tuple(e + slot.exponent * (g == n) for n, e in enumerate(known))
                    for known in exponents
                ]
                met, label = torch.unique(label, return_inverse=True)
                exponents = [exponents[m] for m in met.tolist()]
        return label, exponents or [(0,) * len(self.order)]

    def factors(self, scales: Tensor) -> list[tuple[int, Tensor | None, Tensor | None]]:
        """Per touched matrix its number and its factors along rows and columns."""
        vectors = iter(self._table.factors(scales))
        return [
            (n, next(vectors) if rows else None, next(vectors) if cols else None)
            for n, rows, cols in self.framed
        ]


def _placed(table: tuple[_Table, list[int]], scales: Tensor, count: int) -> list[Tensor | None]:
    """The vectors of a table at the places that have one."""
    out: list[Tensor | None] = [None] * count
    for n, vector in zip(table[1], table[0].factors(scales, keep=True), strict=True):
        out[n] = vector
    return out


def _by_unit(units: Tensor, places: Tensor, count: int) -> tuple[list[Tensor], Tensor]:
    """Places of each unit in a row, for the units that have equally many of them.

    Returns:
        [(n, k)] with n units of k places each, and (count,) the row of every unit among all rows.
    """
    places = places[torch.argsort(units, stable=True)]
    number = torch.bincount(units, minlength=count)
    start = number.cumsum(0) - number
    gather, members = [], []
    for k in torch.unique(number).tolist():
        chosen = torch.nonzero(number == k).flatten()
        gather.append(places[start[chosen, None] + torch.arange(k)])
        members.append(chosen)
    return gather, torch.argsort(torch.cat(members))


def _ordered(
    units: Sequence[Units], unread: Collection[str]
) -> tuple[list[tuple[Units, list[Slot], int]], list[Units]]:
    """Gauges in an order in which each one's writers are framed, with the slots to read, level.

    Returns:
        (units, slots that give its scale, level) in order of levels, and the gauges left over.
    """
    meets: dict[str, list[Units]] = {}
    for found in units:
        for name in {s.parameter for s in found.slots}:
            meets.setdefault(name, []).append(found)
    ready: dict[int, int] = {}
    waiting = list(units)
    plan: list[tuple[Units, list[Slot], int]] = []
    dropped: list[Units] = []

    def others(slot: Slot, found: Units) -> list[Units]:
        return [o for o in meets[slot.parameter] if o is not found and _enters(o, slot, found)]

    def known(slot: Slot, found: Units) -> bool:
        return all(id(o) in ready for o in others(slot, found))

    def usable(found: Units, sign: int) -> list[Slot]:
        slots = [s for s in found.slots if sign * s.exponent > 0 and s.parameter not in unread]
        if slots:
            least = min(abs(s.exponent) for s in slots)
            slots = [s for s in slots if abs(s.exponent) == least]
        return [s for s in slots if not _enters(found, s, found)]

    def take(found: Units, slots: list[Slot]) -> None:
        below = [ready[id(o)] for s in slots for o in others(s, found)]
        ready[id(found)] = 1 + max(below, default=-1)
        plan.append((found, slots, ready[id(found)]))
        waiting.remove(found)

    while waiting:
        for found in waiting:
            slots = usable(found, 1)
            if slots and all(known(s, found) for s in slots):
                take(found, slots)
                break
        else:
            for sign in (1, -1):
                chosen = next(
                    (
                        (found, slots)
                        for found in waiting
                        if (slots := [s for s in usable(found, sign) if known(s, found)])
                    ),
                    None,
                )
                if chosen is not None:
                    take(*chosen)
                    break
            else:
                dropped.append(waiting.pop(0))
                for there in meets.values():
                    if dropped[-1] in there:
                        there.remove(dropped[-1])
    return sorted(plan, key=lambda p: p[2]), dropped


def _enters(other: Units, slot: Slot, found: Units) -> bool:
    """Whether a gauge scales, by another slot, what a slot of ``found`` holds at its units."""
    mine = found.owner[_number(found, slot)] < found.count
    for there, owner in zip(other.slots, other.owner, strict=True):
        if there is slot or there.parameter != slot.parameter:
            continue
        if there.axes != slot.axes or bool((mine & (owner < other.count)).any()):
            return True
    return False


def _number(found: Units, slot: Slot) -> int:
    return next(n for n, s in enumerate(found.slots) if s is slot)
