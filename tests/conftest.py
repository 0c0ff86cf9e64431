"""Fixtures and collection rules for every test."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.trace_rules  # its table of torch functions must hold the unpoisoned ones

# bench is a package of the repository; `python -m pytest` finds it there, plain `pytest` does not
sys.path.append(str(Path(__file__).resolve().parents[1]))

INTERPRETING = os.environ.get("TRITON_INTERPRET", "") not in ("", "0")

if INTERPRETING:
    import interpreter_fidelity

    interpreter_fidelity.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this process cannot run.

    Triton decides when a kernel is decorated whether it is interpreted or compiled, so a process
    does one or the other: ``TRITON_INTERPRET=1 pytest -m interp`` and ``pytest -m aot``.
    """
    marker = "aot" if INTERPRETING else "interp"
    elsewhere = [item for item in items if item.get_closest_marker(marker)]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        plain = type(out) is torch.Tensor and out.device.type != "meta"
        if caller.split(".")[0] == "deaddir_fast" and plain and out.dtype.is_floating_point:
            out.detach().fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill the package's uninitialised tensors with NaN, so that no test passes by luck.

    An element of an output that a kernel forgets to write then shows.
    """
    for owner, name in _ALLOCATORS:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield
