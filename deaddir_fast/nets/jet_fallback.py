"""Operations without a Taylor rule: held constant, or differentiated by nested jvp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast.nets.jet_context import RULES, Context, Rule, is_series, short_name
from deaddir_fast.nets.jet_linear import transpose

aten = torch.ops.aten


def _at_base(op: Any) -> Rule:
    """Operations whose result does not change along the curve: shapes, tests, fills."""

    def apply(context: Context, *args: Any, **kwargs: Any) -> Any:
        values = pytree.tree_map(
            lambda x: x.base if is_series(x) else x, (list(args), kwargs), is_leaf=is_series
        )
        return op(*values[0], **values[1])

    return apply


for _op in (
    aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.new_empty.default, aten.isnan.default, aten.isinf.default,
):  # fmt: skip
    RULES[_op] = _at_base(_op)


def _floating(value: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(value))


def nested_jvp(context: Context, op: Any, args: Any, kwargs: Any) -> Any:
    """Taylor coefficients of one operation by ``order`` nested forward derivatives.

    Correct wherever torch has a forward derivative (see :func:`check_derivative`), at a cost of
    2^order, and noted. Results that are not floating-point are held at their base value, noted.
    """
    name = short_name(op)
    leaves, spec = pytree.tree_flatten((list(args), kwargs), is_leaf=is_series)
    base = _at_base(op)(context, *args, **kwargs)
    if not _floating(base):
        context.notes[f"{name}: held at its value at the base point"] = None
        return base
    context.notes[f"{name}: no Taylor rule, differentiated by nested jvp (cost 2^order)"] = None
    first = next(x for x in leaves if is_series(x))
    zero = torch.zeros((), dtype=first.base.dtype, device=first.base.device)
    one = torch.ones_like(zero)

    def along(t: Tensor) -> Any:
        values = []
        for x in leaves:
            if is_series(x):
                total = x.base
                for q in range(1, context.order + 1):
                    if x.c[q] is not None:
                        total = total + x.c[q] * t**q
                x = total
            values.append(x)
        filled = pytree.tree_unflatten(values, spec)
        out = op(*filled[0], **filled[1])
        return out if isinstance(out, Tensor) else tuple(out)

    results = [base if isinstance(base, Tensor) else tuple(base)]
    derivative = along
    for q in range(1, context.order + 1):

        def derivative(t: Tensor, inner: Any = derivative) -> Any:
            return torch.func.jvp(inner, (t,), (one,))[1]

        try:
            value = derivative(zero)
        except (NotImplementedError, RuntimeError) as error:
            raise no_derivative(op) from error
        scale = 1.0 / math.factorial(q)
        results.append(pytree.tree_map(lambda x, s=scale: x * s, value))
    return transpose(results)


def no_derivative(op: Any) -> NotImplementedError:
    """The error for an operation that cannot be expanded."""
    return NotImplementedError(
        f"model: {short_name(op)} has neither a Taylor rule nor a usable forward derivative in "
        "torch; replace it by differentiable operations"
    )


def check_derivative(op: Any, args: Any, kwargs: Any) -> None:
    """Refuse an operation whose nested forward derivatives in torch cannot be trusted.

    Some have no formula and return zero without a word (``torch.special.bessel_j0`` in torch
    2.13), some are wrong from the second nesting on (``native_layer_norm``, which the capture
    takes apart). Three levels are compared with central differences along a random direction.

    Raises:
        NotImplementedError: naming the operation.
    """
    leaves, spec = pytree.tree_flatten((list(args), kwargs))
    generator = torch.Generator().manual_seed(0)
    tangents: dict[int, Tensor] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.is_floating_point():
            draw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            leaves[i], tangents[i] = x.double(), draw.to(x.device)
    if not tangents:
        return
    zero = torch.zeros((), dtype=torch.float64, device=next(iter(tangents.values())).device)
    one, step = torch.ones_like(zero), zero + 1e-5

    def along(t: Tensor) -> list[Tensor]:
        filled = [x + t * tangents[i] if i in tangents else x for i, x in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return [x for x in pytree.tree_leaves(op(*args, **kwargs)) if x.is_floating_point()]

    function: Callable[[Tensor], list[Tensor]] = along
    try:
        for _ in range(3):

            def derivative(t: Tensor, inner: Any = function) -> list[Tensor]:
                return torch.func.jvp(inner, (t,), (one,))[1]

            for exact, ahead, behind in zip(
                derivative(zero), function(step), function(-step), strict=True
            ):
                difference = (ahead - behind) / (2 * step)
                finite = exact.isfinite() & difference.isfinite()
                error = torch.where(finite, exact - difference, 0.0).abs()
                size = torch.where(finite, difference, 0.0).abs()
                if error.numel() and bool(error.max() > 1e-4 * size.max() + 1e-9):
                    raise no_derivative(op)
            function = derivative
    except (NotImplementedError, RuntimeError) as error:
        raise no_derivative(op) from error
