"""Which symmetries the step respects, and how: one rule per kind of gauge.

    Rescaling       path-norm frame, per unit; the pair step where no other symmetry meets it
    GeneralLinear   per block: scale by the frame, rotations by a shared second moment (our
    ComplexRescaling  extension; of GL(d) that is the conformal subgroup, of C^* all of it)
    Permutation     nothing to do: the step treats units alike
    ClassShift      no weight decay on the shifted parameters, which the step never reads
    Translation     taken back by a softmax alone: those entries stay put, since their exact
                    gradient is zero and Adam would walk on its rounding. With readers: not claimed

Sources: "Dead Directions" (arXiv 2606.05957) for pairs, chains and translations; the path-norm
frame, the shared moment and what follows where symmetries overlap are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.gauge.base import Gauge
from deaddir_fast.gauge.batch_norm import NormPermutation, NormRescaling
from deaddir_fast.gauge.complex import ComplexRescaling
from deaddir_fast.gauge.linear import GeneralLinear
from deaddir_fast.gauge.rescaling import Rescaling, Slot
from deaddir_fast.gauge.shift import ClassShift, Translation
from deaddir_fast.nets.sharded import spread

FRAME = "path-norm frame"
SHARED = "frame per block, second moment shared within it"
PAIR = "pair step per unit"
CHAIN = "chain step per layer"
LAYER = "frame per layer"
FREE = "respected by any step that treats units alike"
SHIFT = "no weight decay"
STILL = "held still: its exact gradient is zero"
NONE = "not claimed"


@dataclass(frozen=True)
class Claim:
    """How the optimizer treats one gauge.

    Attributes:
        gauge: as ``deaddir_fast.gauge.find`` returned it.
        treatment: one of the constants of this module; ``NONE`` where trajectories from gauge
            equivalent points are not promised to agree.
        note: why, or which subgroup.
    """

    gauge: Gauge
    treatment: str
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.gauge.name} {self.gauge.group}: {self.treatment}{note}"


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a gauge whose scales the step follows.

    Attributes:
        count: number of units (blocks, for a general linear gauge).
        size: coordinates per unit that rotate into one another; 1 where there are none.
        slots: where the units sit.
        owner: per slot (axis size,) long, the unit of every entry, ``count`` where none.
        group: per slot (axis size,) long, the rotating group of every entry, -1 where none.
    """

    gauge: Gauge
    count: int
    size: int
    slots: tuple[Slot, ...]
    owner: tuple[Tensor, ...]
    group: tuple[Tensor, ...]

    def merged(self) -> Units:
        """All units as one: the layer-wise scale."""
        owner = tuple(torch.where(o < self.count, 0, 1) for o in self.owner)
        return replace(self, count=1, owner=owner)


def units(gauge: Gauge) -> Units | None:
    """The units of a gauge, or None where it has none of the known forms."""
    if isinstance(gauge, NormRescaling):  # it shifts biases besides
        return None
    if isinstance(gauge, Rescaling):
        none = tuple(torch.full((s.size,), -1) for s in gauge.slots)
        owner = tuple(s.unit_of() for s in gauge.slots)
        return Units(gauge, gauge.shape[0], 1, gauge.slots, owner, none)
    if isinstance(gauge, GeneralLinear):
        count, size = gauge.shape[0], gauge.shape[1]
        # (blocks * d, m): copy c of coordinate j of block b belongs to the group (b, c).
        views = [s.positions.unflatten(0, (count, size)).movedim(1, 2) for s in gauge.slots]
    elif isinstance(gauge, ComplexRescaling):
        count, size = gauge.shape[0], 2
        views = [s.positions.reshape(count, -1, 2) for s in gauge.slots]
    else:
        return None
    owners, groups = [], []
    for slot, view in zip(gauge.slots, views, strict=True):  # (blocks, copies, size)
        unit = torch.full((slot.size,), count)
        group = torch.full((slot.size,), -1)
        unit[view] = torch.arange(count)[:, None, None].expand_as(view)
        group[view] = (
            torch.arange(view.shape[0] * view.shape[1]).reshape(count, -1, 1).expand_as(view)
        )
        owners.append(unit)
        groups.append(group)
    return Units(gauge, count, size, gauge.slots, tuple(owners), tuple(groups))


@dataclass(frozen=True)
class Chain:
    """Layers in a row whose hidden units are rescaled layer by layer.

    Attributes:
        weights: names of the L weights, first to last.
        biases: names of the L - 1 hidden biases, None where there is none.
    """

    weights: tuple[str, ...]
    biases: tuple[str | None, ...]


@dataclass(frozen=True)
class Treatment:
    """What the step does with all gauges together.

    Attributes:
        claims: one per gauge.
        framed: units whose scales enter the frame, in no particular order.
        pairs: isolated rescalings that take the pair step.
        chains: layers tied by layer-wise rescalings that take the chain step.
        undecayed: parameters without weight decay.
        still: {bias: entries that stay put}.
        shifted: {weight of a class shift: class axis}.
    """

    claims: tuple[Claim, ...]
    framed: tuple[Units, ...]
    pairs: tuple[Units, ...]
    chains: tuple[Chain, ...]
    undecayed: frozenset[str]
    still: Mapping[str, Tensor]
    shifted: Mapping[str, int]


def treat(
    gauges: Sequence[Gauge],
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, int],
    *,
    layerwise: bool = False,
) -> Treatment:
    """Decide how each gauge is treated.

    Args:
        gauges: as returned by ``deaddir_fast.gauge.find``.
        parameters: name to parameter, trainable or not.
        owners: param group of every parameter the optimizer steps; pairs and chains need theirs
            in one group, of one dtype, none of them frozen.
        layerwise: one scale per hidden layer instead of one per unit.
    """
    claims: list[Claim] = []
    framed: list[Units] = []
    pairs: list[Units] = []
    undecayed: set[str] = set()
    still: dict[str, Tensor] = {}
    shifted: dict[str, int] = {}
    rotating: set[tuple[str, int]] = set()
    for gauge in gauges:
        problem = _problem(gauge, parameters)
        found = units(gauge)
        if problem is not None:
            claims.append(Claim(gauge, NONE, problem))
        elif isinstance(gauge, ClassShift) and gauge.likelihood == "categorical":
            undecayed.update(gauge.parameters)
            shifted[gauge.weight] = gauge.class_axis
            claims.append(Claim(gauge, SHIFT))
        elif isinstance(gauge, Translation):
            if gauge.readers:
                claims.append(Claim(gauge, NONE, "the step is taken at fixed readers"))
            else:
                entries = still.get(gauge.source)
                more = gauge.entries
                still[gauge.source] = more if entries is None else torch.cat([entries, more])
                undecayed.add(gauge.source)
                claims.append(Claim(gauge, STILL))
        elif found is None:
            # Statistics of batch norms stay in place: γ would take another scale along.
            free = gauge.dimension == 0 and not isinstance(gauge, NormPermutation)
            claims.append(Claim(gauge, FREE if free else NONE, "" if free else "no rule for it"))
        elif found.size > 1:
            places = {(s.parameter, a) for s in found.slots for a in s.axes}
            if places & rotating and _tangled(found, framed):
                claims.append(Claim(gauge, NONE, "it rotates units that another gauge rotates"))
                continue
            rotating |= places
            framed.append(found)
            claims.append(Claim(gauge, SHARED, _subgroup(gauge)))
        else:
            framed.append(found.merged() if layerwise else found)
            claims.append(Claim(gauge, LAYER if layerwise else FRAME))
    chains: list[Chain] = []
    if layerwise:
        chains = _chains(framed, still, parameters, owners)
        inside = {name for chain in chains for name in chain.weights}
        framed = [f for f in framed if not inside & {s.parameter for s in f.slots}]
        shifted = {n: axis for n, axis in shifted.items() if n not in inside}
        for n, claim in enumerate(claims):
            if not inside & set(claim.gauge.parameters):
                continue
            if claim.treatment == LAYER:
                claims[n] = replace(claim, treatment=CHAIN)
            elif claim.treatment == SHIFT:
                undecayed -= set(claim.gauge.parameters)
                claims[n] = replace(claim, treatment=NONE, note="the chain step reads the weight")
    else:
        taken = _met(framed, shifted, still)
        for found in list(framed):
            if _is_pair(found, taken, parameters, owners):
                framed.remove(found)
                pairs.append(found)
                place = next(n for n, c in enumerate(claims) if c.gauge is found.gauge)
                claims[place] = Claim(found.gauge, PAIR)
    return Treatment(
        tuple(claims),
        tuple(framed),
        tuple(pairs),
        tuple(chains),
        frozenset(undecayed),
        still,
        shifted,
    )


def _problem(gauge: Gauge, parameters: Mapping[str, Tensor]) -> str | None:
    missing = [p for p in gauge.parameters if p not in parameters]
    if missing:
        return f"its parameter {missing[0]!r} is not known to the optimizer"
    if len({parameters[p].device for p in gauge.parameters}) > 1:
        return "its parameters are on several devices"
    return None


def _subgroup(gauge: Gauge) -> str:
    if isinstance(gauge, GeneralLinear):
        return "scales and rotations of each block, not all of GL"
    return ""


def _tangled(found: Units, others: Sequence[Units]) -> bool:
    """Whether an entry of an axis would rotate in two gauges."""
    mine = dict(zip([(s.parameter, s.axes) for s in found.slots], found.group, strict=True))
    for other in others:
        for slot, group in zip(other.slots, other.group, strict=True):
            same = mine.get((slot.parameter, slot.axes))
            if same is not None and bool(((same >= 0) & (group >= 0)).any()):
                return True
    return False


def _met(
    framed: Sequence[Units], shifted: Mapping[str, Any], still: Mapping[str, Any]
) -> dict[str, int]:
    """How many symmetries meet each parameter."""
    count: dict[str, int] = {}
    for found in framed:
        for name in {s.parameter for s in found.slots}:
            count[name] = count.get(name, 0) + 1
    for name in (*shifted, *still):
        count[name] = count.get(name, 0) + 1
    return count


def _is_pair(
    found: Units,
    taken: Mapping[str, int],
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, int],
) -> bool:
    """Whether each unit is a pair of blocks that nothing else scales, shifts or spreads."""
    names = [s.parameter for s in found.slots]
    return (
        found.size == 1
        and len(set(names)) == len(names)
        and all(taken[n] == 1 for n in names)
        and {s.exponent for s in found.slots} == {1, -1}
        and not any(s.outer for s in found.slots)
        and all(bool((o < found.count).all()) for o in found.owner)
        and not any(spread(parameters[n]) or not parameters[n].requires_grad for n in names)
        and len({parameters[n].dtype for n in names}) == 1
        and _one_group(names, owners)
    )


def _one_group(names: Sequence[str], owners: Mapping[str, int]) -> bool:
    return None not in (groups := {owners.get(n) for n in names}) and len(groups) == 1


def _chains(
    framed: Sequence[Units],
    still: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, int],
) -> list[Chain]:
    """Sequences of layers that layer-wise rescalings tie, each met by nothing else."""
    met = _met(framed, {}, still)
    links: dict[str, tuple[str, str | None]] = {}
    for found in framed:
        link = _link(found, parameters)
        if link is not None:
            links[link[0]] = link[1:]
    chains = []
    readers = {after for after, _ in links.values()}
    for first in links:
        if first in readers:
            continue
        weights, biases = [first], []
        while weights[-1] in links:
            after, bias = links[weights[-1]]
            weights.append(after)
            biases.append(bias)
        expected = [1, *([2] * (len(weights) - 2)), 1]
        names = [*weights, *(b for b in biases if b is not None)]
        alone = all(met[b] == 1 for b in biases if b is not None)
        together = (
            _one_group(names, owners)
            and all(parameters[n].requires_grad for n in names)
            and len({parameters[n].dtype for n in names}) == 1
        )
        if alone and together and [met[w] for w in weights] == expected:
            chains.append(Chain(tuple(weights), tuple(biases)))
    return chains


def _link(found: Units, parameters: Mapping[str, Tensor]) -> tuple[str, str, str | None] | None:
    """Writer, reader and bias of a layer-wise rescaling between two weights, or None."""
    writers = [s.parameter for s in found.slots if s.exponent == 1]
    readers = [s.parameter for s in found.slots if s.exponent == -1]
    weights = [w for w in writers if parameters[w].ndim > 1]
    biases = [w for w in writers if parameters[w].ndim == 1]
    plain = (
        len(found.slots) == len(set(writers + readers)) == len(weights) + len(biases) + len(readers)
        and not any(s.outer for s in found.slots)
        and all(bool((o < 1).all()) for o in found.owner)
        and not any(spread(parameters[s.parameter]) for s in found.slots)
    )
    if not plain or len(weights) != 1 or len(readers) != 1 or len(biases) > 1:
        return None
    return weights[0], readers[0], biases[0] if biases else None
