"""One interpreter for a whole model along many rays: base, difference and derivative together.

All points theta0 + r u of a chunk go through the captured graph at once. A rank-one ray costs two
plain forwards per point (difference and derivative), a full-rank one three; the value at theta0 is
computed once for all points. (Our choice of propagation; the operations are in ``dual_rules``.)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from deaddir_fast.nets import attention, dual_rules
from deaddir_fast.nets.dual_values import Context, Discrete, Dual, still, to_dual
from deaddir_fast.nets.graph import Capture
from deaddir_fast.nets.weights import Directions, Points, RankOne, Weight, runs


def parameter_values(
    capture: Capture, directions: Directions, points: Points
) -> dict[str, Tensor | Dual | Weight]:
    """Every captured parameter as it moves along the directions."""
    values: dict[str, Tensor | Dual | Weight] = dict(capture.parameters)
    for name, u in directions.slices.items():
        base = capture.parameters[name]
        if base.ndim >= 2:
            found = tuple(runs(u, directions.kinds[name]))
            values[name] = Weight(base, tuple(base.shape), points, found)
        else:
            assert not isinstance(u, RankOne)
            wide = u.repeat_interleave(points.r, 0)
            ones = (1,) * base.ndim
            dot = wide * points.tangent.view(-1, *ones)
            moved = Dual(base, wide * points.value.view(-1, *ones), dot)
            values[name] = still(base, dot) if points.still else moved
    return values


def run(
    capture: Capture,
    inputs: list[Tensor],
    parameters: Mapping[str, Tensor | Dual | Weight],
    points: Points,
) -> tuple[Dual, set[str]]:
    """Propagate through the graph.

    Args:
        capture: the captured forward.
        inputs: input tensors in placeholder order, of sizes that the capture holds for.
        parameters: every captured parameter, from :func:`parameter_values`.
        points: where to evaluate.

    Returns:
        The output as a :class:`Dual` (delta and dot of shape (P, n, *out)), and notes.
    """
    ctx = Context(points)
    feed = iter([*(parameters[name] for name in capture.names), *inputs])
    env: dict[fx.Node, Any] = {}
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "get_attr":
            env[node] = operator.attrgetter(node.target)(capture.module)
        elif node.op == "output":
            output = pytree.tree_leaves(fx.node.map_arg(node.args[0], env.__getitem__))[0]
        else:
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            if node.target is operator.getitem:
                env[node] = args[0][args[1]]
            else:
                env[node] = dual_rules.apply(ctx, node.target, args, kwargs)
            del args, kwargs
        for dead in capture.last_use[node]:
            env.pop(dead, None)
    if isinstance(output, (Discrete, Weight)):
        output = to_dual(output)
    if isinstance(output, Tensor):
        ctx.notes.add("the output does not depend on the parameters these directions move")
        zero = output.new_zeros(()).expand(points.count, *output.shape)
        output = still(output, zero) if points.still else Dual(output, zero, zero)
    return output, ctx.notes


def _extent(value: Any) -> int:
    leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in leaves)


def _attention_scratch(node: fx.Node) -> int:
    """Bytes an attention node needs per point beyond its arguments and result; 0 for others."""
    if node.target is not attention.OPERATION:
        return 0
    query, key, value = (x.meta["val"] for x in node.args[:3] if isinstance(x, fx.Node))
    shape = attention.Shape.of(query, key, value)
    return attention.scratch_elements(shape, query.device.type) * query.element_size()


def working_bytes(capture: Capture, moved: set[str], still: bool) -> tuple[int, int]:
    """Estimate the memory of :func:`run` for the captured number of samples.

    Counts what is alive at once along the graph: values that depend on the moved parameters are
    held as difference and derivative per point (only the latter where every radius is 0:
    ``still``), and the operation in progress may need a few more of that size for its temporaries.

    Returns:
        (bytes per point, bytes shared by all points).
    """
    names = dict(zip(capture.names, (n for n in capture.graph.nodes), strict=False))
    weights = {names[k] for k in capture.names if k in moved and capture.parameters[k].ndim >= 2}
    moving = {names[k] for k in capture.names if k in moved} - weights
    lazy = {"permute", "t", "transpose", "view", "expand", "clone", "alias", "detach"}
    alive: dict[fx.Node, tuple[int, int]] = {}
    point = base = worst_point = worst_base = 0
    for node in capture.graph.nodes:
        if node.op in ("call_function", "placeholder"):
            inputs = node.all_input_nodes
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            if name in lazy and inputs and inputs[0] in weights:
                weights.add(node)
            elif node.op == "call_function" and any(x in moving or x in weights for x in inputs):
                moving.add(node)
            size = _extent(node.meta.get("val"))
            per_point = (1 if still else 2) * size if node in moving else 0
            if node in weights or (node.op == "placeholder" and node not in moving):
                size = 0
            alive[node] = (per_point, size)
            point, base = point + per_point, base + size
            scratch = _attention_scratch(node)
            if node in moving:
                worst_point = max(worst_point, point + (scratch or 3 * per_point))
                scratch = 0
            worst_base = max(worst_base, base + size + scratch)
        for dead in capture.last_use[node]:
            gone = alive.pop(dead, (0, 0))
            point, base = point - gone[0], base - gone[1]
    return worst_point, worst_base
