"""The registry of Taylor rules per ATen operation, and what a rule is given.

A rule takes the propagation's :class:`Context` and the operation's own arguments, some of which
are :class:`~deaddir_fast.nets.series.Series`, and returns the series of the result. Rules run
under ``vmap`` over directions, so they see the operation's plain shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets import series as ts
from deaddir_fast.nets.branches import Branches
from deaddir_fast.nets.series import Series


@dataclass
class Context:
    """One propagation: its order, the branches it takes, what it has to report."""

    order: int
    branches: Branches
    node: str = ""
    label: str = ""
    notes: dict[str, None] = field(default_factory=dict)

    def series(self, x: Any) -> Series:
        """A series, made constant if ``x`` is a tensor or a number."""
        if isinstance(x, Series):
            return x
        value = x if isinstance(x, Tensor) else torch.as_tensor(x)
        return ts.constant(value, self.order)

    def sign(self, a: Series, b: Any, part: str = "") -> Tensor:
        """Sign of a - b beside t = 0, noted under the current operation."""
        return self.branches.sign((self.node, part), self.label, a, b)


Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Register a rule for the given overloads."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def is_series(x: Any) -> bool:
    """Whether ``x`` is a series."""
    return isinstance(x, Series)


def leaves(x: Any) -> list[Any]:
    """Leaves of nested arguments, series counting as leaves."""
    return pytree.tree_leaves(x, is_leaf=is_series)


def uses_series(args: Any, kwargs: Any) -> bool:
    """Whether any argument depends on t."""
    return any(isinstance(x, Series) for x in leaves((args, kwargs)))


def short_name(op: Any) -> str:
    """``aten.special_i0.default`` -> ``special_i0``."""
    return str(op).removeprefix("aten.").split(".")[0]
