"""How far a result is from its fp64 truth, and how far it may be."""

from __future__ import annotations

import torch
from torch import Tensor

#: What our results are held to. The matrix units of a GPU cut the products of 16-bit operands off
#: when they align them.
OURS = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-4,
    torch.float16: 1e-4,
}

#: What a formulation in torch is held to: that it computes the same thing. It may be less accurate
#: than ours and still compete.
TORCH = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}


#: What rounding the parameters to the type that they are kept in costs a step, stochastically.
STORED = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-10,
}


def limit(dtype: torch.dtype, *, ours: bool, stored: bool = False) -> float:
    """The error allowed; ``stored``: results are rounded to ``dtype``."""
    allowed = (OURS if ours else TORCH)[dtype]
    return max(allowed, STORED[dtype]) if stored else allowed


def error(result: Tensor, truth: Tensor, *, by_element: bool) -> float:
    """Largest relative error of an element, or relative error of the whole in root mean square.

    Infinite where the shape is wrong or the result has a NaN or an infinity that the truth has not.
    """
    if result.shape != truth.shape:
        return float("inf")
    difference = (result.double() - truth).abs()
    difference[(truth.isnan() & result.isnan()) | (truth == result)] = 0
    if not bool(difference.isfinite().all()):
        return float("inf")
    if difference.numel() == 0:
        return 0.0
    if by_element:
        return float(torch.where(difference == 0, 0.0, difference / truth.abs()).max())
    size, total = torch.linalg.norm(truth), torch.linalg.norm(difference)
    return 0.0 if total == 0 else float(total / size)
