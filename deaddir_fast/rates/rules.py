"""How each kind of ATen operation passes orders on: values forward, gradients back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deaddir_fast.rates.ops import (
    ADDITIONS,
    EXTREMES,
    GETITEM,
    JOINS,
    MAX_POOLS,
    ONE_ARGUMENT,
    PRODUCTS,
    QUOTIENTS,
    SCATTERS,
    SOFTMAX,
    aten,
    average,
    bilinear,
    dims,
    factors,
    germ,
    operands,
)
from deaddir_fast.rates.orders import Orders
from deaddir_fast.rates.tropical import (
    INF,
    Germ,
    contract,
    plus,
    pull,
    pull_product,
    through,
)
from deaddir_fast.rates.walk import floating


@dataclass(frozen=True)
class Rule:
    """Orders of an operation's value from those of its arguments, and of their gradients."""

    forward: Callable[[Orders, fx.Node], Any]
    backward: Callable[[Orders, fx.Node, Tensor], None]


def _wide(orders: Tensor, like: Tensor) -> Tensor:
    return orders.expand(like.shape).clone()


def _linear(found: Orders, node: fx.Node) -> Any:
    first, linear = operands(node)[0], found.run.linear(node)
    value, orders = found.run.values[node], found.value[first]
    if isinstance(value, Tensor):
        return through(linear, orders, value)
    return tuple(through(_entry(linear, k), orders, v) for k, v in enumerate(value))


def _entry(linear: Callable[[Tensor], Any], k: int) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x)[k]


def _linear_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    first = operands(node)[0]
    if first in found.value and first not in found.run.parameter:
        found.give(first, pull(found.run.linear(node), gradient, found.value[first].shape))


def _item(found: Orders, node: fx.Node) -> Any:
    source, index = operands(node)
    return found.value[source][index]


def _item_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    """Back through an operation with several results, of which this is one."""
    source, index = operands(node)
    inner = operands(source)[0]
    if not isinstance(found.value.get(inner), Tensor):
        return
    shape = found.value[inner].shape
    if source.target in ONE_ARGUMENT:
        linear = found.run.linear(source)
        found.give(inner, pull(lambda x: linear(x)[index], gradient, shape))
    elif source.target in MAX_POOLS:
        found.give(inner, pull(average(source, found.run.value(source.args)), gradient, shape))
    elif source.target in EXTREMES:
        found.give(inner, _spread(source, gradient, shape))
    elif source.target is aten.topk.default:
        least = gradient.amin(_axis_of_topk(source), keepdim=True)
        found.give(inner, least.expand(shape).clone())


def _join(found: Orders, node: fx.Node) -> Tensor:
    target: Any = node.target
    parts, *rest = operands(node)
    return target([found.of(a) for a in parts], *rest)


def _join_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    target: Any = node.target
    parts, *rest = operands(node)
    shapes = [found.run.values[a].shape for a in parts]
    for k, part in enumerate(parts):

        def place(x: Tensor, k: int = k) -> Any:
            others = [torch.zeros(s, dtype=torch.float64) for s in shapes]
            others[k] = x
            return target(others, *rest)

        found.give(part, pull(place, gradient, shapes[k]))


def _add(found: Orders, node: fx.Node) -> Tensor:
    one, two = operands(node)[:2]
    a, b = found.of(one), found.of(two)
    first, second = one in found.statistics, two in found.statistics
    if not found.leaks and first != second:
        # What a norm subtracts does not show: the other term keeps its order.
        a, b = (torch.full_like(a, INF), b) if first else (a, torch.full_like(b, INF))
    return _wide(torch.minimum(a, b), found.run.values[node])


def _add_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    for a in operands(node)[:2]:
        found.give(a, gradient)


def _where(found: Orders, node: fx.Node) -> Tensor:
    a, b = (found.of(x) for x in operands(node)[1:3])
    return _wide(torch.minimum(a, b), found.run.values[node])


def _where_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    for a in operands(node)[1:3]:
        found.give(a, gradient)


def _fill(found: Orders, node: fx.Node) -> Tensor:
    x, mask, fill = operands(node)[:3]
    value = found.run.values[node]
    return torch.where(found.run.values[mask], INF if fill == 0 else 0.0, _wide(found.of(x), value))


def _fill_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    x, mask = operands(node)[:2]
    found.give(x, torch.where(found.run.values[mask], INF, gradient))


def _multiply(found: Orders, node: fx.Node) -> Tensor:
    a, b = (found.of(x) for x in operands(node)[:2])
    return _wide(plus(a, b), found.run.values[node])


def _multiply_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    a, b = operands(node)[:2]
    found.give(a, plus(gradient, found.of(b)))
    found.give(b, plus(gradient, found.of(a)))


def _divide(found: Orders, node: fx.Node) -> Tensor:
    a, b = (found.of(x) for x in operands(node)[:2])
    return _wide(plus(a, -b), found.run.values[node])


def _divide_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    a, b = operands(node)[:2]
    below = found.of(b)
    found.give(a, plus(gradient, -below))
    found.give(b, plus(plus(gradient, found.of(a)), -2 * below))


def _contract(found: Orders, node: fx.Node) -> Tensor:
    left, right, bias = factors(node)
    value = found.run.values[node]
    orders = contract(bilinear(node), found.of(left), found.of(right), value)
    if bias is None:
        return orders
    offset = found.of(bias)
    if node.target is aten.convolution.default:
        offset = offset.reshape(1, -1, *[1] * (value.ndim - 2))
    return torch.minimum(orders, offset.expand(orders.shape))


def _contract_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    left, right, bias = factors(node)
    product, x, y = bilinear(node), found.of(left), found.of(right)
    if left not in found.run.parameter:
        found.give(left, pull_product(product, gradient, y, x.shape))
    if right not in found.run.parameter:
        found.give(right, pull_product(lambda b, a: product(a, b), gradient, x, y.shape))
    if bias is not None and node.target is not aten.convolution.default:
        found.give(bias, gradient)


def _softmax(found: Orders, node: fx.Node) -> Tensor:
    return torch.zeros(found.run.values[node].shape, dtype=torch.float64)


def _softmax_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    # Every entry moves every other one along the axis, by a live amount.
    x, axis = operands(node)[:2]
    found.give(x, gradient.amin(axis, keepdim=True).expand(gradient.shape).clone())


def _extreme(found: Orders, node: fx.Node) -> Any:
    orders, value = found.value[operands(node)[0]], found.run.values[node]
    keep = (value if isinstance(value, Tensor) else value[0]).ndim == orders.ndim
    least = orders.amin(dims(node, orders.ndim), keepdim=keep)
    return least if isinstance(value, Tensor) else (least, None)


def _spread(node: fx.Node, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Undo a reduction: every entry could have been the one chosen."""
    if gradient.ndim < len(shape):
        for axis in sorted(dims(node, len(shape))):
            gradient = gradient.unsqueeze(axis)
    return gradient.expand(shape).clone()


def _extreme_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    first = operands(node)[0]
    found.give(first, _spread(node, gradient, found.value[first].shape))


def _max_pool(found: Orders, node: fx.Node) -> Any:
    pool = average(node, found.run.value(node.args))
    return through(pool, found.value[operands(node)[0]], found.run.values[node][0]), None


def _axis_of_topk(node: fx.Node) -> int:
    args = operands(node)
    return int(args[2]) if len(args) > 2 else -1


def _topk(found: Orders, node: fx.Node) -> Any:
    least = found.value[operands(node)[0]].amin(_axis_of_topk(node), keepdim=True)
    return _wide(least, found.run.values[node][0]), None


def _embedding(found: Orders, node: fx.Node) -> Tensor:
    # Whichever row is looked up: the few samples traced need not hold every token.
    return _wide(found.of(operands(node)[0]).amin(0), found.run.values[node])


def _scattered(found: Orders, node: fx.Node, added: Tensor) -> Tensor:
    """The operation on a zero base: where the added entries go."""
    target: Any = node.target
    value = found.run.values[node]
    if target is aten.copy.default:
        return added.expand(value.shape)
    args = list(found.run.value(node.args))
    base, position = SCATTERS[target]
    args[base], args[position] = torch.zeros(value.shape, dtype=torch.float64), added
    return target(*args, **found.run.value(node.kwargs))


def _scatter(found: Orders, node: fx.Node) -> Tensor:
    base, added = (operands(node)[k] for k in SCATTERS[node.target])
    orders = through(lambda x: _scattered(found, node, x), found.of(added), found.run.values[node])
    return orders if base is added else torch.minimum(orders, found.of(base).expand(orders.shape))


def _scatter_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    base, added = (operands(node)[k] for k in SCATTERS[node.target])
    shape = found.of(added).shape
    found.give(added, pull(lambda x: _scattered(found, node, x), gradient, shape))
    if base is not added:
        found.give(base, gradient)


def _elementwise(function: Germ) -> Rule:
    def forward(found: Orders, node: fx.Node) -> Tensor:
        return function.value(found.of(operands(node)[0]))

    def backward(found: Orders, node: fx.Node, gradient: Tensor) -> None:
        first = operands(node)[0]
        found.give(first, plus(gradient, function.slope(found.of(first))))

    return Rule(forward, backward)


def _live(found: Orders, node: fx.Node) -> bool:
    known = [found.value[a] for a in node.all_input_nodes if a in found.value]
    return all(isinstance(v, Tensor) and not bool((v != 0).any()) for v in known)


def _unknown(found: Orders, node: fx.Node) -> Any:
    """No rule: live stays live, anything else is not known from here on."""
    live, value = _live(found, node), found.run.values[node]
    if not live:
        found.unknown.append(str(node.target))

    def made(v: Any) -> Tensor | None:
        fill = 0.0 if live else math.nan
        return torch.full(v.shape, fill, dtype=torch.float64) if floating(v) else None

    return made(value) if isinstance(value, Tensor) else tuple(map(made, value))


def _unknown_back(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    fill = 0.0 if _live(found, node) and not bool((gradient != 0).any()) else math.nan
    for a in node.all_input_nodes:
        if isinstance(found.value.get(a), Tensor):
            found.give(a, torch.full_like(found.value[a], fill))


def _no_gradient(found: Orders, node: fx.Node, gradient: Tensor) -> None:
    """Tables are parameters."""


_UNKNOWN = Rule(_unknown, _unknown_back)
_CONTRACTION = Rule(_contract, _contract_back)
_TABLE: dict[Any, Rule] = {
    GETITEM: Rule(_item, _item_back),
    **dict.fromkeys(ONE_ARGUMENT, Rule(_linear, _linear_back)),
    **dict.fromkeys(JOINS, Rule(_join, _join_back)),
    **dict.fromkeys(ADDITIONS, Rule(_add, _add_back)),
    **dict.fromkeys(PRODUCTS, Rule(_multiply, _multiply_back)),
    **dict.fromkeys(QUOTIENTS, Rule(_divide, _divide_back)),
    **dict.fromkeys(SOFTMAX, Rule(_softmax, _softmax_back)),
    **dict.fromkeys(EXTREMES, Rule(_extreme, _extreme_back)),
    **dict.fromkeys(MAX_POOLS, Rule(_max_pool, _unknown_back)),
    **dict.fromkeys(SCATTERS, Rule(_scatter, _scatter_back)),
    aten.where.self: Rule(_where, _where_back),
    aten.masked_fill.Scalar: Rule(_fill, _fill_back),
    aten.embedding.default: Rule(_embedding, _no_gradient),
    aten.topk.default: Rule(_topk, _unknown_back),
}


def rule_of(node: fx.Node) -> Rule:
    """The rule of a node; one that admits ignorance if there is none."""
    found = _TABLE.get(node.target)
    if found is not None:
        return found
    if bilinear(node) is not None:
        return _CONTRACTION
    function = germ(node)
    return _UNKNOWN if function is None else _elementwise(function)
