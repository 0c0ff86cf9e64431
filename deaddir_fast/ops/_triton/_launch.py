"""What the launchers of the Triton kernels share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deaddir_fast.ops._dispatch import tensors


def problem(*args: Any) -> str | None:
    """Say why a Triton kernel cannot take these arguments."""
    first = next(tensors(args), None)
    return None if first is None else _device_problem(first)


def _device_problem(x: Tensor) -> str | None:
    if x.is_cuda:
        return None
    if x.device.type == "cpu":
        from deaddir_fast.kernels import interpreted

        if interpreted():
            return None
    return f"its tensors are on {x.device} and the Triton kernels run on cuda"
