"""The orders of the values and gradients of a captured network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from deaddir_fast.rates.tropical import INF, fold
from deaddir_fast.rates.walk import Walk


@dataclass
class Orders:
    """Orders of values and of gradients, by node.

    Attributes:
        run: the walk they belong to.
        masks: node -> entries that hold the unit.
        leaks: whether the statistics of norms carry orders.
        value: node -> orders of its value (a tuple where the operation returns one).
        gradient: node -> orders of the gradient of a generic function of the outputs.
        statistics: nodes that pool live and dead entries into one number (means of norms) and
            what is computed from these alone.
        unknown: operations without a rule that the unit passed.
    """

    run: Walk
    masks: Mapping[fx.Node, Any]
    leaks: bool
    value: dict[fx.Node, Any] = field(default_factory=dict)
    gradient: dict[fx.Node, Tensor] = field(default_factory=dict)
    statistics: set[fx.Node] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def of(self, x: Any) -> Tensor:
        """Orders of an argument: a node, a number, or a tensor that has no real values."""
        if isinstance(x, fx.Node):
            found = self.value.get(x)
            return found if isinstance(found, Tensor) else constant(self.run.values[x].double())
        return torch.tensor(INF if x == 0 else 0.0, dtype=torch.float64)

    def give(self, node: Any, orders: Tensor) -> None:
        """Add a contribution to the gradient of a node; parameters and constants need none."""
        if not isinstance(node, fx.Node) or node in self.run.parameter or node.op == "get_attr":
            return
        if not isinstance(self.value.get(node), Tensor):
            return
        orders = fold(orders, self.value[node].shape)
        before = self.gradient.get(node)
        self.gradient[node] = orders if before is None else torch.minimum(before, orders)


def constant(value: Tensor) -> Tensor:
    """Orders of a tensor of numbers: inf where zero."""
    return torch.where(value == 0, INF, 0.0).double()
