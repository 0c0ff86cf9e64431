"""Which hidden units may change places, read off the unit spaces of the forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from deaddir_fast.gauge.batch_norm import Site, through_norms
from deaddir_fast.gauge.layouts import Layout, Layouts
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.permutation import Permutation
from deaddir_fast.gauge.rescaling import Slot
from deaddir_fast.gauge.scaling import Flow
from deaddir_fast.gauge.spaces import Axis, Space, coordinates, leaves, size, summands

_NAMED = 4  # modules named on either side; the number of the others is given


class _Place(NamedTuple):
    """One axis of a parameter and where its entries lie in each leaf."""

    parameter: str
    axis: int
    of: dict[Space, np.ndarray | None]


def permutations(
    run: Flow, linear: Sequence[GeneralLinear] = (), norms: Collection[Site] = ()
) -> list[Permutation]:
    """Permutation gauges of a forward pass.

    Args:
        run: the forward pass with its values.
        linear: gauges already found; permutations they contain are left out.
        norms: batch norms whose running statistics their other parameters make up for.
    """
    walk = Layouts(run, {c for site in norms for c in site.constants})
    walk.walk()
    places = [
        _Place(name, i, coordinates(axis))
        for name, layout in walk.parameters.items()
        for i, axis in enumerate(layout)
        if axis is not None
    ]
    free = dict.fromkeys(
        leaf for p in places for leaf in p.of if leaf.touched and not leaf.fixed and leaf.size > 1
    )
    companions = _companions(walk, free)
    roles = _Roles(walk)
    contained = _Contained(linear)
    order = {name: i for i, name in enumerate(run.capture.names)}
    found = []
    for leaf in free:
        here = [p for p in places if leaf in p.of]
        if any(p.of[leaf] is None for p in here):
            continue
        blocks = [b for b in companions[leaf] if all(p.of.get(b) is not None for p in here)]
        gauge = _gauge(leaf, blocks, here, roles)
        if not contained(gauge):
            found.append(through_norms(gauge, norms, order))
    return sorted(found, key=lambda g: order[g.parameters[0]])


def _companions(walk: Layouts, free: Iterable[Space]) -> dict[Space, list[Space]]:
    """The leaves that go wherever a leaf goes.

    Units of a leaf that never appears without another one (query heads of a group, without the
    group) permute in each place of the other on their own: no operation compares them across.
    """
    with_all: dict[Space, dict[Space, None]] = {}
    wanted = set(free)
    seen: set[tuple[int, ...]] = set()
    for found in walk.of.values():
        for layout in found if isinstance(found, list) else [found]:
            key = tuple(id(s.root()) for axis in layout for s in axis or ())
            if key in seen:
                continue
            seen.add(key)
            for leaf, near in _met(layout):
                if leaf in wanted:
                    before = with_all.get(leaf)
                    with_all[leaf] = {
                        s: None for s in near if s is not leaf and (before is None or s in before)
                    }
    return {leaf: list(with_all.get(leaf, ())) for leaf in wanted}


def _met(layout: Layout) -> list[tuple[Space, list[Space]]]:
    """Every occurrence of a leaf in a tensor, with the leaves that are there at all its entries."""
    axes = [_terms(axis) for axis in layout if axis is not None]
    common = [[s for s in terms[0] if len(terms) == 1] for terms in axes]
    out = []
    for i, terms in enumerate(axes):
        others = [s for j, spaces in enumerate(common) if j != i for s in spaces]
        out += [(leaf, term + others) for term in terms for leaf in term]
    return out


def _terms(axis: Axis) -> list[list[Space]]:
    """An axis as a sum of products of leaves."""
    products: list[list[Space]] = [[]]
    for space in axis:
        root = space.root()
        if root.parts is None:
            choices = [[root]]
        elif root.product:
            choices = _terms(root.parts)
        else:
            choices = [term for part in summands(root) for term in _terms([part])]
        products = [before + term for before in products for term in choices]
    return products


class _Roles:
    """Which parameters read a leaf, and which of these write it as well through the same axis."""

    def __init__(self, walk: Layouts) -> None:
        self._read = [(name, set(leaves(axis))) for name, axis in walk.readers]
        self._both = walk.both

    def exponent(self, leaf: Space, place: _Place, here: Sequence[_Place]) -> int:
        reads = any(name == place.parameter and leaf in spaces for name, spaces in self._read)
        last = max(p.axis for p in here if p.parameter == place.parameter)
        return -1 if reads and place.axis == last else 1

    def writes(self, slot: Slot) -> bool:
        return slot.exponent > 0 or (slot.parameter, slot.axis) in self._both


def _gauge(leaf: Space, blocks: list[Space], here: list[_Place], roles: _Roles) -> Permutation:
    count, h = size(blocks), leaf.size
    slots = []
    for place in here:
        unit = np.array(place.of[leaf])
        block = np.zeros_like(unit)
        for b in blocks:
            block = block * b.size + place.of[b]
        entries = np.flatnonzero(unit >= 0)
        # Entries of a unit stay in the order of the axis: they map one by one.
        entries = entries[np.argsort((block * h + unit)[entries], kind="stable")]
        positions = torch.from_numpy(entries.reshape(count * h, -1))
        exponent = roles.exponent(leaf, place, here)
        slots.append(Slot(place.parameter, place.axis, positions, unit.size, exponent))
    ends = [
        _modules(s.parameter for s in slots if roles.writes(s)),
        _modules(s.parameter for s in slots if s.exponent < 0),
    ]
    return Permutation(
        name=f"permutation: {' -> '.join(e for e in ends if e)}",
        group=f"S_{h}" + (f"^{count}" if count > 1 else ""),
        parameters=tuple(dict.fromkeys(s.parameter for s in slots)),
        shape=(count, h) if count > 1 else (h,),
        likelihood=None,
        slots=tuple(slots),
    )


def _modules(parameters: Iterable[str]) -> str:
    names = list(dict.fromkeys(p.rpartition(".")[0] or p for p in parameters))
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


class _Contained:
    """Whether a permutation is an element of general linear gauges found already."""

    def __init__(self, linear: Sequence[GeneralLinear]) -> None:
        self._block: dict[tuple[str, int], np.ndarray] = {}
        self._unit: dict[tuple[str, int], np.ndarray] = {}
        counts = []
        blocks = units = 0
        for gauge in linear:
            number, d, _ = gauge.shape
            entries = np.zeros(number * d, np.int64)
            for slot in gauge.slots:
                key = (slot.parameter, slot.axis)
                for table in (self._block, self._unit):
                    table.setdefault(key, np.full(slot.size, -1))
                own = np.arange(number * d).repeat(slot.positions.shape[1])
                at = slot.positions.reshape(-1).numpy()
                self._unit[key][at] = units + own
                self._block[key][at] = blocks + own // d
                entries += slot.positions.shape[1]
            counts.append(entries)
            blocks, units = blocks + number, units + number * d
        self._entries = np.concatenate(counts) if counts else np.zeros(0, np.int64)

    def __call__(self, gauge: Permutation) -> bool:
        keys = [(s.parameter, s.axis) for s in gauge.slots]
        if any(k not in self._block for k in keys):
            return False
        at = [s.positions.numpy() for s in gauge.slots]
        block = np.concatenate([self._block[k][p] for k, p in zip(keys, at, strict=True)], 1)
        unit = np.concatenate([self._unit[k][p] for k, p in zip(keys, at, strict=True)], 1)
        h = gauge.shape[-1]
        block, unit = block.reshape(-1, h, block.shape[1]), unit.reshape(-1, h, block.shape[1])
        if (block < 0).any() or (block != block[:, :1]).any():
            return False
        for ids, own in zip(block[:, 0], unit, strict=True):
            _, first, group = np.unique(ids, return_index=True, return_inverse=True)
            whole = own[:, first]  # a unit is made of one linear unit of each block it meets
            if (own != whole[:, group]).any():
                return False
            if (self._entries[whole].sum(1) != ids.size).any():
                return False
        return True
