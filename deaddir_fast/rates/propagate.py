"""Follow orders through a captured network, forward and in reverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from deaddir_fast.rates.ops import SUMS, dims, operands
from deaddir_fast.rates.orders import Orders, constant
from deaddir_fast.rates.rules import rule_of
from deaddir_fast.rates.walk import Walk, floating


def _level(like: Tensor, mask: Tensor | None, order: float) -> Tensor:
    """Live everywhere, ``order`` where the unit is."""
    out = torch.zeros(like.shape, dtype=torch.float64)
    if mask is not None:
        out[mask] = order
    return out


def propagate(
    run: Walk,
    parameters: Mapping[str, Tensor],
    masks: Mapping[fx.Node, Any],
    *,
    leaks: bool,
    entering: float = 0.0,
    leaving: float = 0.0,
) -> Orders:
    """Follow orders forward, then those of a generic gradient in reverse.

    Args:
        run: the walk of the model.
        parameters: name -> orders of the parameter's entries.
        masks: node -> entries that hold the unit (from ``locate``).
        leaks: whether the statistics of norms carry orders. Their coefficients are small (a mean
            over d channels), so that at finite t a rate can look as if they did not.
        entering: order of the unit in the inputs.
        leaving: order of the gradient in the unit's outputs.
    """
    found = Orders(run, masks, leaks)
    for node in run.nodes:
        if node.op == "placeholder":
            if node in run.parameter:
                name, numbers = run.parameter[node]
                found.value[node] = parameters[name].reshape(-1)[numbers]
            elif floating(run.values[node]):
                found.value[node] = _level(run.values[node], masks.get(node), entering)
        elif node.op == "get_attr":
            if floating(run.values[node]):
                found.value[node] = constant(run.values[node])
        elif node.op == "call_function":
            value = run.values[node]
            known = [a for a in node.all_input_nodes if a in found.value]
            if not floating(value) and not isinstance(value, (tuple, list)):
                continue
            if not known and isinstance(value, Tensor):
                found.value[node] = constant(value)
                continue
            _mark_statistic(found, node, known)
            found.value[node] = rule_of(node).forward(found, node)
    seed = found.value.get(run.output)
    if isinstance(seed, Tensor):
        found.gradient[run.output] = _level(seed, masks.get(run.output), leaving)
    for node in reversed(run.nodes):
        gradient = found.gradient.get(node)
        if node.op != "call_function" or gradient is None:
            continue
        if leaks or node not in found.statistics:
            rule_of(node).backward(found, node, gradient)
    return found


def _mark_statistic(found: Orders, node: fx.Node, known: list[fx.Node]) -> None:
    """Sums that pool entries of the unit with others, and what follows from these alone."""
    derived = known and all(a in found.statistics or _fixed(found.run, a) for a in known)
    if derived and any(a in found.statistics for a in known):
        found.statistics.add(node)
    if node.target in SUMS and _mixes(found.masks.get(operands(node)[0]), node):
        found.statistics.add(node)


def _fixed(run: Walk, node: fx.Node) -> bool:
    if node in run.parameter or node.op == "get_attr":
        return True
    return node.op == "call_function" and not node.all_input_nodes


def _mixes(mask: Tensor | None, node: fx.Node) -> bool:
    if mask is None:
        return False
    along = dims(node, mask.ndim)
    return bool(mask.any()) and not bool(mask.double().amin(along).any())
