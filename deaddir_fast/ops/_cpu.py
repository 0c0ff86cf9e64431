"""Launchers of the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deaddir_fast import _native
from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import Kernel


def _problem(*args: Any) -> str | None:
    for value in args:
        if isinstance(value, Tensor) and not value.is_cpu:
            return f"its tensors are on {value.device} and the C++ kernels read CPU memory"
    return None


def _always(*args: Any) -> bool:
    return True


def _directional_curvature(a: Tensor, g: Tensor, U: Tensor) -> Tensor:
    assert _native.extension is not None
    out = torch.empty(U.shape[0], dtype=accumulation(a, g, U))
    _native.extension.directional_curvature(
        a.contiguous(), g.contiguous(), U.contiguous(), out, torch.get_num_threads()
    )
    return out


directional_curvature = Kernel("cpu", _directional_curvature, _problem, _always)
