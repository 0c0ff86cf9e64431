"""What a step does with each parameter, worked out once: matrices, factors, groups, blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.optim import blocks as blocked
from deaddir_fast.optim.blocks import Blocks
from deaddir_fast.optim.claims import NONE, Claim, Treatment, Units
from deaddir_fast.optim.frame import Frame
from deaddir_fast.optim.layout import COLS, ROWS, Layout, first_slice, layouts, shard_groups


@dataclass
class Entry:
    """How one matrix is stepped.

    Attributes:
        layout: the matrix.
        row_groups, col_groups: (rows,), (cols,) int32 groups that share a second moment, or None.
        groups: extents (b, a) of the second moment where it is shared, else None.
        split: process groups that hold the other parts of a group, if any.
        still: (cols,) zero at entries that stay put, one elsewhere, or None.
    """

    layout: Layout
    row_groups: Tensor | None = None
    col_groups: Tensor | None = None
    groups: tuple[int, int] | None = None
    split: list[Any] = field(default_factory=list)
    still: Tensor | None = None


@dataclass
class FramePart:
    """The frame of the parameters on one device.

    Attributes:
        frame: the scales.
        names: of its parameters, the same on all processes.
        layouts: its matrices.
    """

    frame: Frame
    names: list[str]
    layouts: list[Layout]


@dataclass
class Plan:
    """All of the step.

    Attributes:
        entries: {parameter: its matrices}.
        forms: {parameter: one of them, or what it would be if this process held any}.
        parts: frames, one per device.
        blocks: pairs and chains; their parameters take no other step.
        claims: as treated, after what could not be ordered.
        undecayed, shifted, still: as in the treatment.
        in_blocks: names of the parameters of blocks.
    """

    entries: dict[str, list[Entry]]
    forms: dict[str, Entry]
    parts: list[FramePart]
    blocks: list[Blocks]
    claims: tuple[Claim, ...]
    undecayed: frozenset[str]
    shifted: Mapping[str, int]
    still: Mapping[str, Tensor]
    in_blocks: frozenset[str] = field(default_factory=frozenset)


def make(treatment: Treatment, parameters: Mapping[str, Tensor], stepped: Sequence[str]) -> Plan:
    """Lay out the step.

    Args:
        treatment: what is done with each gauge.
        parameters: name to parameter, those outside the optimizer included.
        stepped: names of the parameters the optimizer steps.
    """
    framed = list(treatment.framed)
    sliced = {s.parameter for f in framed for s in f.slots if s.outer}
    touched = {s.parameter for f in framed for s in f.slots}
    read = {
        name: layouts(name, parameters[name], sliced=name in sliced)
        for name in dict.fromkeys([*stepped, *(n for n in parameters if n in touched)])
    }
    parts, dropped = [], []
    for device in dict.fromkeys(parameters[n].device for n in parameters if n in touched):
        here = [f for f in framed if parameters[f.slots[0].parameter].device == device]
        names = [n for n in parameters if n in {s.parameter for f in here for s in f.slots}]
        chosen = [layout for n in names for layout in read[n]]
        frame = Frame(here, chosen, parameters, {*treatment.shifted, *treatment.still})
        dropped += frame.dropped
        parts.append(FramePart(frame, names, chosen))
    gone = {id(f.gauge) for f in dropped}
    kept = [f for f in framed if id(f.gauge) not in gone]
    claims = tuple(
        Claim(c.gauge, NONE, "nothing is left to read its scale from") if id(c.gauge) in gone else c
        for c in treatment.claims
    )
    entries = {
        name: [_entry(layout, kept, treatment.still.get(name), parameters) for layout in read[name]]
        for name in stepped
    }
    forms = {
        name: found[0]
        if found
        else _entry(first_slice(name, parameters[name]), kept, None, parameters)
        for name, found in entries.items()
    }
    one = {name: found[0] for name, found in read.items() if found}
    in_pairs = [blocked.of_pair(f, one) for f in treatment.pairs]
    in_chains = [blocked.of_chain(c, one) for c in treatment.chains]
    return Plan(
        entries,
        forms,
        parts,
        in_pairs + in_chains,
        claims,
        treatment.undecayed,
        treatment.shifted,
        treatment.still,
        frozenset(n for b in in_pairs + in_chains for n in b.names),
    )


def _entry(
    layout: Layout, framed: Sequence[Units], still: Tensor | None, parameters: Mapping[str, Tensor]
) -> Entry:
    parameter = parameters[layout.name]
    rows, cols = (_groups(layout.whole(), side, framed) for side in (ROWS, COLS))
    entry = Entry(layout)
    if rows is not None or cols is not None:
        extents = []
        for side, groups in ((ROWS, rows), (COLS, cols)):
            held = layout.rows if side == ROWS else layout.cols
            extents.append(held if groups is None else int(groups.max()) + 1)
            if groups is not None:
                entry.split += shard_groups(parameter, layout.axes(side))
        entry.groups = (extents[ROWS], extents[COLS])
        entry.row_groups = _held(rows, layout, ROWS, parameter.device)
        entry.col_groups = _held(cols, layout, COLS, parameter.device)
    if still is not None:
        # Biases alone are shifted: vectors, hence one row.
        mask = torch.ones(layout.shape[0], dtype=accumulation(parameter))
        mask[still] = 0
        entry.still = mask[layout.within(COLS)].to(parameter.device)
    return entry


def _held(groups: Tensor | None, layout: Layout, side: int, device: torch.device) -> Tensor | None:
    return None if groups is None else groups[layout.within(side)].to(device, torch.int32)


def _groups(layout: Layout, side: int, framed: Sequence[Units]) -> Tensor | None:
    """Groups along one side that rotate, numbered from 0; others are groups of one."""
    length = layout.rows if side == ROWS else layout.cols
    label = torch.full((length,), -1)
    end = 0
    for found in framed:
        if found.size == 1:
            continue
        for slot, group in zip(found.slots, found.group, strict=True):
            if layout.covers(slot) and layout.side(slot) == side:
                mine = group[layout.entries(slot)]
                beside = layout.beside(slot)
                number = end + mine * (int(beside.max()) + 1) + beside
                label = torch.where(mine >= 0, number, label)
                end = int(label.max()) + 1
    if end == 0:
        return None
    single = label < 0
    label[single] = torch.arange(int(single.sum())) + end
    return torch.unique(label, return_inverse=True)[1]
