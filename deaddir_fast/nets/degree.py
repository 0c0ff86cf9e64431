"""Degree of a captured network as a polynomial of its parameters, between kinks.

Along a straight line the outputs of a linear or piecewise-linear network are, up to the next kink,
polynomials of this degree in the step: vanishing Taylor coefficients to that order prove that
nothing moves, at any distance before the kink.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from deaddir_fast.nets import jet_linear, jet_piecewise
from deaddir_fast.nets.graph import Capture
from deaddir_fast.nets.jet_context import RULES

aten = torch.ops.aten
INFINITE = float("inf")

_PRODUCTS = {
    aten.mul.Tensor,
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.convolution.default,
    aten.embedding.default,
}
_AFFINE_PRODUCTS = {aten.addmm.default, aten.baddbmm.default, aten.addmv.default}
_NOT_POLYNOMIAL = {aten.linalg_vector_norm.default}


def _keeps_degree(op: Any) -> bool:
    rule = RULES.get(op)
    module = getattr(rule, "__module__", "")
    families = (jet_linear.__name__, jet_piecewise.__name__)
    return module in families and op not in _NOT_POLYNOMIAL


def polynomial_degree(capture: Capture) -> float:
    """Degree of the outputs in the parameters between kinks; inf if they are no polynomials."""
    degrees: dict[fx.Node, float] = {}
    placeholders = 0
    for node in capture.graph.nodes:
        if node.op == "placeholder":
            degrees[node] = 1.0 if placeholders < len(capture.names) else 0.0
            placeholders += 1
        elif node.op == "get_attr":
            degrees[node] = 0.0
        elif node.op == "output":
            return max((degrees[a] for a in node.all_input_nodes), default=0.0)
        else:
            degrees[node] = _degree(node, degrees)
    return INFINITE


def _degree(node: fx.Node, degrees: dict[fx.Node, float]) -> float:
    inputs = [degrees[a] for a in node.all_input_nodes]
    if not any(inputs):
        return 0.0

    def of(argument: Any) -> float:
        return degrees[argument] if isinstance(argument, fx.Node) else 0.0

    op, args = node.target, node.args
    if op is operator.getitem or _keeps_degree(op):
        return max(inputs)
    if op in _PRODUCTS:
        return max(of(args[0]) + of(args[1]), max(inputs))
    if op in _AFFINE_PRODUCTS:
        return max(of(args[0]), of(args[1]) + of(args[2]))
    if op is aten.square.default:
        return 2 * of(args[0])
    if op is aten.pow.Tensor_Scalar and isinstance(args[1], int) and args[1] >= 0:
        return args[1] * of(args[0])
    if op is aten.div.Tensor and of(args[1]) == 0:
        return of(args[0])
    return INFINITE
