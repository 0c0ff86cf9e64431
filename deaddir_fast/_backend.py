"""Which implementation runs the operations: plain torch, C++ or Triton.

The choice is ours, not the paper's. ``"auto"`` (the default) takes, for each call, a compiled
kernel that can run on the tensors and is worth it, else the torch reference. Forcing a route makes
every operation that has a kernel on it use that kernel or raise; operations without one use the
reference.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import TracebackType
from typing import overload

import torch

from deaddir_fast import _check

ROUTES = ("reference", "cpu", "triton")

_route: ContextVar[str] = ContextVar("deaddir_fast._backend", default="auto")


class Forced:
    """The route in force since `backend(name)` was called; as a context manager it restores."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._before = _route.get()
        _route.set(name)

    def __enter__(self) -> str:
        _route.set(self.name)
        return self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _route.set(self._before)

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


@overload
def backend() -> str: ...
@overload
def backend(name: str) -> Forced: ...


def backend(name: str | None = None) -> str | Forced:
    """Force a route, or say which one is in force.

    ``backend("cpu")`` takes effect at once; ``with backend("cpu"):`` restores the earlier choice
    on leaving. The choice belongs to the current thread (or asynchronous task): other threads keep
    theirs, and new ones start with "auto".

    Args:
        name: "reference" (plain torch), "cpu" (C++), "triton", or "auto"; None changes nothing.

    Returns:
        The name in force if ``name`` is None, else the context manager.

    Raises:
        ValueError: ``name`` is none of these.
        RuntimeError: the route cannot run here; the message says why.
    """
    if name is None:
        return current()
    _check.choice("backend", name, (*ROUTES, "auto"))
    reason = unavailable(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return Forced(name)


def current() -> str:
    """Return the name of the route in force."""
    return _route.get()


def unavailable(route: str) -> str | None:
    """Say why a route cannot run in this process (None: it can)."""
    if route == "cpu":
        from deaddir_fast import _native

        return None if _native.extension is not None else _native.why_not
    if route == "triton":
        return _triton_problem()
    return None


@cache
def _importable(module: str) -> bool:
    return find_spec(module) is not None


def _triton_problem() -> str | None:
    for module in ("triton", "deaddir_fast.kernels"):
        if not _importable(module):
            return f"{module} is not installed"
    from deaddir_fast.kernels import interpreted

    if interpreted() or torch.cuda.is_available():
        return None
    return (
        "torch sees no GPU that Triton compiles for (TRITON_INTERPRET=1, set before Python "
        "starts, runs the kernels on the CPU, slowly)"
    )


def routes() -> dict[str, dict[str, str | None]]:
    """Say for each operation and route why it cannot run here, or None where it can."""
    from deaddir_fast.ops._dispatch import OPS

    report: dict[str, dict[str, str | None]] = {}
    for name, op in OPS.items():
        kernels = {kernel.route for kernel in op.kernels}
        report[name] = {
            route: unavailable(route)
            if route == "reference" or route in kernels
            else "no kernel for this operation"
            for route in ROUTES
        }
    return report
