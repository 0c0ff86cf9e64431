"""What the launchers of the C++ kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deaddir_fast import _native
from deaddir_fast.ops._dispatch import Kernel, tensors


def extension() -> Any:
    """Return the loaded extension; the dispatcher has checked that it is there."""
    assert _native.extension is not None
    return _native.extension


def problem(*args: Any) -> str | None:
    """Say why a C++ kernel cannot take these arguments."""
    for value in tensors(args):
        if not value.is_cpu:
            return f"its tensors are on {value.device} and the C++ kernels read CPU memory"
    return None


def always(*args: Any) -> bool:
    """The kernel beats the reference on all arguments."""
    return True


def kernel(run: Callable[..., Any], worthwhile: Callable[..., bool] = always) -> Kernel:
    """Make the C++ route of an operation."""
    return Kernel("cpu", run, problem, worthwhile)
