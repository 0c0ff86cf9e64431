"""What the launchers of the Triton kernels share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def problem(*args: Any) -> str | None:
    """Say why a Triton kernel cannot take these arguments."""
    for value in args:
        if isinstance(value, Tensor):
            return _device_problem(value)
    return None


def _device_problem(x: Tensor) -> str | None:
    if x.is_cuda:
        return None
    if x.device.type == "cpu":
        from deaddir_fast.kernels import interpreted

        if interpreted():
            return None
    return f"its tensors are on {x.device} and the Triton kernels run on cuda"
