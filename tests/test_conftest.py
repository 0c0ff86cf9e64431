"""The safety nets of the test suite catch what they are there for."""

from __future__ import annotations

import types

import pytest
import torch

ALLOCATE = """
import torch
plain = torch.empty(3)
like = torch.empty_like(torch.zeros(2, dtype=torch.float64))
new = torch.zeros(1).new_empty((4,))
strided = torch.empty_strided((2, 2), (2, 1))
integers = torch.empty_like(torch.zeros(2, dtype=torch.int64))
"""


def _allocate_as(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(ALLOCATE, module.__dict__)
    return module


@pytest.mark.parametrize("name", ["deaddir_fast", "deaddir_fast.ops.somewhere"])
def test_memory_the_package_leaves_unwritten_is_nan(name: str) -> None:
    module = _allocate_as(name)
    for tensor in (module.plain, module.like, module.new, module.strided):
        assert tensor.isnan().all()
    assert module.integers.dtype == torch.int64


def test_other_callers_get_memory_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: filled.append(value))
    _allocate_as("deaddir_faster")
    _allocate_as("numpy")
    assert not filled
    _allocate_as("deaddir_fast")
    assert len(filled) == 4


def test_compiled_code_is_not_disturbed() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x) + torch.empty(3).zero_()

    assert torch.equal(f(torch.ones(3)), torch.ones(3))
