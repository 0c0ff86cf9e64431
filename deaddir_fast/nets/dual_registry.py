"""The table of rules that carry base, difference and derivative through ATen operations.

A rule takes the context, the operation and its arguments, some of which move (:class:`Dual`,
:class:`Discrete`, :class:`Weight`), and returns the moved result or ``NotImplemented``; the
interpreter then falls back to a plain difference and says so. Every rule is exact in the
difference: bilinear operations expand it, linear ones pass it on, piecewise ones compare at the
point and are exact on each piece. Where every radius is 0, values are :class:`Still`: there is one
zero difference for all points, to be broadcast or left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets.dual_values import Context, Discrete, Dual, to_dual
from deaddir_fast.nets.weights import Weight

aten = torch.ops.aten

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*packets: str) -> Callable[[Rule], Rule]:
    """Register a rule for some operations, all overloads of each."""

    def add(function: Rule) -> Rule:
        for name in packets:
            RULES[getattr(aten, name)] = function
        return function

    return add


def moving(x: Any) -> bool:
    """Whether a value depends on the point."""
    return isinstance(x, (Dual, Discrete, Weight))


def bases(tree: Any) -> Any:
    """The same arguments at theta0."""
    return pytree.tree_map(lambda x: x.base if moving(x) else x, tree)


def at_base(op: Any, args: Any, kwargs: Any) -> Any:
    """The operation at theta0."""
    return op(*bases(args), **bases(kwargs))


def tensors(x: Dual | Discrete) -> tuple[Tensor, ...]:
    """What a value holds per point."""
    return (x.delta, x.dot) if isinstance(x, Dual) else (x.point,)


def operands(*xs: Any) -> list[Any] | None:
    """Operands with discrete values as steps of the dtype of the others; None if none is dual."""
    floats = [x.base if isinstance(x, Dual) else x for x in xs if isinstance(x, (Dual, Tensor))]
    dtypes = [x.dtype for x in floats if x.is_floating_point()]
    if dtypes:
        xs = tuple(to_dual(x, dtypes[0]) if isinstance(x, Discrete) else x for x in xs)
    return list(xs) if any(isinstance(x, (Dual, Weight)) for x in xs) else None


def parts(x: Any) -> tuple[Any, Any, Any]:
    """Base, difference and derivative; the latter two None for what does not move."""
    return (x.base, x.delta, x.dot) if isinstance(x, Dual) else (x, None, None)


def note_kink(ctx: Context, name: str, distance: Tensor, dot: Tensor) -> None:
    """Report readings at radius 0 where a unit sits on a kink (``distance`` 0) and moves."""
    if not ctx.points.at_base or bool(distance.all()):
        return
    if bool(((distance == 0) & (dot != 0)).any()):
        ctx.notes.add(
            f"at radius 0 some units sit on the kink of {name}: the curvature there takes torch's "
            "convention for the derivative, not a one-sided one"
        )
