"""Which ATen operations move data, sum, multiply, or act elementwise, and how they start at 0."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from deaddir_fast.nets import moves as nets_moves
from deaddir_fast.nets.moves import SAME, operands
from deaddir_fast.rates.tropical import INF, LINEAR_GERM, Germ, clamp_germ, power_germ

aten = torch.ops.aten
GETITEM = operator.getitem

# Linear in the first argument, with coefficients >= 0 (a sign does not change an order).
MOVES: set[Any] = nets_moves.MOVES | {aten.constant_pad_nd.default}
SUMS: set[Any] = {
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.mean.dim,
    aten.mean.default,
}
_POOLS: set[Any] = {
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten.cumsum.default,
    aten.tril.default,
    aten.triu.default,
}
ONE_ARGUMENT: set[Any] = MOVES | SAME | SUMS | _POOLS

JOINS: set[Any] = {aten.cat.default, aten.stack.default}
# Positions of what is written into, and of what is written.
SCATTERS: dict[Any, tuple[int, int]] = {
    aten.index_add.default: (0, 3),
    aten.scatter_add.default: (0, 3),
    aten.index_put.default: (0, 2),
    aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1),
    aten.copy.default: (1, 1),
}
ADDITIONS: set[Any] = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.maximum.default,
    aten.minimum.default,
}
PRODUCTS: set[Any] = {aten.mul.Tensor, aten.mul.Scalar}
QUOTIENTS: set[Any] = {aten.div.Tensor, aten.div.Scalar}
MATRIX: set[Any] = {aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default}
BIASED_MATRIX: set[Any] = {aten.addmm.default, aten.baddbmm.default}
SOFTMAX: set[Any] = {aten._softmax.default, aten._log_softmax.default}
EXTREMES: set[Any] = {aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim}
MAX_POOLS: dict[Any, Any] = {
    aten.max_pool2d_with_indices.default: torch.nn.functional.avg_pool2d,
    aten.max_pool3d_with_indices.default: torch.nn.functional.avg_pool3d,
}

_GERMS: dict[Any, Germ] = {
    **dict.fromkeys(
        (
            aten.relu.default,
            aten.tanh.default,
            aten.sin.default,
            aten.tan.default,
            aten.sinh.default,
            aten.asinh.default,
            aten.atan.default,
            aten.erf.default,
            aten.abs.default,
            aten.expm1.default,
            aten.log1p.default,
            aten.leaky_relu.default,
            aten.gelu.default,
            aten.silu.default,
            aten.elu.default,
        ),
        LINEAR_GERM,
    ),
    **dict.fromkeys(
        (aten.exp.default, aten.sigmoid.default, aten.softplus.default, aten.erfc.default),
        Germ(1, constant=True),
    ),
    aten.cos.default: Germ(2, constant=True),
    aten.cosh.default: Germ(2, constant=True),
    aten.sqrt.default: power_germ(0.5),
    aten.rsqrt.default: power_germ(-0.5),
    aten.reciprocal.default: power_germ(-1),
    aten.log.default: Germ(1, singular=True),
    aten.log2.default: Germ(1, singular=True),
}


def germ(node: fx.Node) -> Germ | None:
    """How an elementwise function starts at 0; None for other operations."""
    target, args = node.target, operands(node)
    if target is aten.pow.Tensor_Scalar and isinstance(args[1], (int, float)):
        return power_germ(args[1]) if args[1] else Germ(INF, constant=True)
    if target in (aten.clamp.default, aten.clamp_min.default, aten.hardtanh.default):
        bounds = [*args[1:3], node.kwargs.get("min"), node.kwargs.get("max")]
        if target is aten.hardtanh.default and len(args) == 1:
            bounds = [-1.0, 1.0]
        return clamp_germ(_number(bounds[0]), _number(bounds[1]))
    return _GERMS.get(target)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def bilinear(node: fx.Node) -> Any:
    """``f(a, b)`` of a matrix product or convolution without its bias; None for others."""
    target: Any = node.target
    if target is aten.addmm.default:
        return torch.mm
    if target is aten.baddbmm.default:
        return torch.bmm
    if target is aten.convolution.default:
        rest = operands(node)[3:]
        return lambda a, b: aten.convolution.default(a, b, None, *rest)
    return target if target in MATRIX else None


def factors(node: fx.Node) -> tuple[Any, Any, Any]:
    """(left, right, bias) of a matrix product or convolution."""
    args = operands(node)
    if node.target in BIASED_MATRIX:
        return args[1], args[2], args[0] if node.kwargs.get("beta", 1) != 0 else None
    if node.target is aten.convolution.default:
        return args[0], args[1], args[2]
    return args[0], args[1], None


def dims(node: fx.Node, ndim: int) -> list[int]:
    """Axes a reduction works on."""
    args = operands(node)
    given: Any = args[1] if len(args) > 1 else node.kwargs.get("dim")
    if given is None or given == [] or node.target in (aten.sum.default, aten.mean.default):
        return list(range(ndim))
    return [d % ndim for d in ([given] if isinstance(given, int) else given)]


def average(node: fx.Node, args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    """The average pooling with the windows of a maximum pooling."""
    pool = MAX_POOLS[node.target]
    kernel, stride, padding = args[1], (args[2:3] or (None,))[0] or None, (args[3:4] or (0,))[0]
    ceil = bool(args[5]) if len(args) > 5 else False
    return lambda x: pool(x, kernel, stride, padding, ceil)
