"""Carrying values through one ATen operation: by its rule, or by the fallback that says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets import (
    dual_attention,
    dual_linear,
    dual_piecewise,
    dual_products,
    dual_smooth,
)
from deaddir_fast.nets.dual_registry import RULES, at_base, aten, moving
from deaddir_fast.nets.dual_values import (
    Context,
    Discrete,
    Dual,
    Still,
    Value,
    discrete,
    still,
    to_dual,
)
from deaddir_fast.nets.weights import Weight

# importing fills the table
FAMILIES = (dual_attention, dual_linear, dual_piecewise, dual_products, dual_smooth)


def fallback(ctx: Context, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operation: evaluated at each point, subtracted, differentiated by torch's forward mode.

    Raises:
        NotImplementedError: naming the operation, when torch cannot evaluate or differentiate it.
    """
    args, kwargs = pytree.tree_map(
        lambda x: to_dual(x) if isinstance(x, Weight) else x, (args, kwargs)
    )
    base = at_base(op, args, kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    outputs = pytree.tree_leaves(base)
    smooth = [y.is_floating_point() or y.is_complex() for y in outputs]
    duals = [i for i, x in enumerate(leaves) if isinstance(x, Dual)]
    steps = [i for i, x in enumerate(leaves) if isinstance(x, Discrete)]
    dots = [leaves[i].dot for i in duals]
    values = [leaves[i].at_points().expand_as(leaves[i].dot) for i in duals]
    picks = [leaves[i].point for i in steps]

    def call(xs: Any, picked: Any) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, v in zip([*duals, *steps], [*xs, *picked], strict=True):
            filled[i] = v
        a, k = pytree.tree_unflatten(filled, spec)
        return tuple(pytree.tree_leaves(op(*a, **k)))

    def floats(xs: Any, picked: Any) -> tuple[Tensor, ...]:
        return tuple(y for y, s in zip(call(xs, picked), smooth, strict=True) if s)

    def at(xs: Any, ts: Any, picked: Any) -> tuple[Any, Any]:
        if not duals or not any(smooth):
            return call(xs, picked), ()
        result = torch.func.jvp(lambda *v: floats(v, picked), tuple(xs), tuple(ts))
        return call(xs, picked), result[1]

    def one_by_one() -> tuple[Any, Any]:
        each = [
            at([v[j] for v in values], [t[j] for t in dots], [c[j] for c in picks])
            for j in range(ctx.points.count)
        ]
        return tuple(
            tuple(torch.stack(ys) for ys in zip(*part, strict=True))
            for part in zip(*each, strict=True)
        )  # type: ignore[return-value]  # two tuples, by construction

    try:
        try:
            points, slopes = torch.vmap(at)(values, dots, picks)
        except RuntimeError:
            points, slopes = one_by_one()
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(
            f"model: {op} has no rule here and torch cannot differentiate it forward: {error}"
        ) from error
    slope = iter(slopes)
    results: list[Value] = []
    for y, point, is_smooth in zip(outputs, points, smooth, strict=True):
        if is_smooth:
            dot = next(slope) if duals else torch.zeros_like(point)
            if duals and not ctx.points.still:
                ctx.notes.add(f"{op} has no exact rule: its difference is a rounded subtraction")
            results.append(Dual(y, point - y, dot))
        else:
            results.append(discrete(y, point))
    if isinstance(base, Tensor):
        return results[0]
    return tuple(results)


def apply(ctx: Context, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry the arguments through one operation by its rule, or by the fallback."""
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(moving(x) for x in leaves):
        return op(*args, **kwargs)
    packet = op.overloadpacket
    if packet not in _WEIGHT_RULES:
        args, kwargs = pytree.tree_map(
            lambda x: to_dual(x) if isinstance(x, Weight) else x, (args, kwargs)
        )
    if ctx.points.still and op.namespace != "aten":  # its rule may index differences by point
        args, kwargs = pytree.tree_map(_spread, (args, kwargs))
    rule = RULES.get(packet)
    result = NotImplemented if rule is None else rule(ctx, op, *args, **kwargs)
    if result is NotImplemented:
        result = fallback(ctx, op, args, kwargs)
    return _without_difference(ctx, op, result) if ctx.points.still else result


def _spread(x: Any) -> Any:
    return Dual(x.base, x.delta.expand_as(x.dot), x.dot) if isinstance(x, Still) else x


def _without_difference(ctx: Context, op: Any, result: Any) -> Any:
    """Drop the differences of an operation's result at theta0."""
    if isinstance(result, (tuple, list)):
        return tuple(_without_difference(ctx, op, x) for x in result)
    if not isinstance(result, Dual):
        return result
    if len(result.dot) != ctx.points.count:
        raise AssertionError(f"{op}: {len(result.dot)} derivatives at {ctx.points.count} points")
    return still(result.base, result.dot)


_WEIGHT_RULES = {
    getattr(aten, name)
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "view", "_unsafe_view"),
        *("reshape", "permute", "t", "transpose", "expand", "clone", "alias", "detach"),
        *("_to_copy",),
    )
}
