"""Which process keeps the sums of which layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deaddir_fast.nets.survey import Survey
from deaddir_fast.ops.gram_packed import entries


@dataclass(frozen=True)
class Share:
    """A layer and those that have its inputs: they need its A, so they stay together.

    Attributes:
        index: place of the first in the survey.
        names: in the survey's order, the first leads.
        size: numbers its sums take.
        owner: rank of the process that adds them up.
    """

    index: int
    names: tuple[str, ...]
    size: int
    owner: int = 0


def shares(survey: Survey, closed_head: str | None, processes: int) -> list[Share]:
    """All layers, dealt so that the processes' sums take nearly the same memory.

    The largest first, each to the process that has least (at most 4/3 of the best: Graham 1969).

    Args:
        survey: of the model.
        closed_head: the layer whose G is a diagonal.
        processes: how many there are.
    """
    members: dict[str, list[str]] = {}
    for name in survey.layers:
        members.setdefault(survey.leaders.get(name, name), []).append(name)
    sizes: dict[str, int] = {}
    for leader, names in members.items():
        first = survey.layers[leader]
        size = {"matrix": first.groups * entries(first.inputs), "diagonal": first.inputs}.get(
            first.form, 0
        )
        for name in names:
            layer = survey.layers[name]
            size += layer.outputs if name == closed_head else layer.groups * entries(layer.outputs)
        sizes[leader] = size
    held = [0] * processes
    owners: dict[str, int] = {}
    order = {name: k for k, name in enumerate(survey.layers)}
    for leader in sorted(sizes, key=lambda n: (-sizes[n], order[n])):
        owner = min(range(processes), key=lambda r: (held[r], r))
        owners[leader] = owner
        held[owner] += sizes[leader]
    return [
        Share(order[leader], tuple(names), sizes[leader], owners[leader])
        for leader, names in members.items()
    ]


def held_by(dealt: Sequence[Share], rank: int) -> list[Share]:
    """The shares of one process."""
    return [s for s in dealt if s.owner == rank]
