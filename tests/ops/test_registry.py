from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deaddir_fast.ops
from deaddir_fast.ops._dispatch import OPS
from deaddir_fast.ops._registry import TABLE

NAMES = [row[0] for row in TABLE]
#: Operations whose kernel is another one's.
SHARED = {"kron_solve": "kron_matvec"}
ROOT = Path(__file__).parents[2]


def test_every_public_operation_is_registered():
    functions = {name.removesuffix("_") for name in NAMES}
    assert functions == set(deaddir_fast.ops.__all__)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_name_in_every_place(name):
    name = name.removesuffix("_")
    source = (ROOT / "deaddir_fast" / "ops" / f"{name}.py").read_text()
    for part in ("Index letters:", "Bound:", "Source:"):
        assert part in source, f"ops/{name}.py does not say {part}"
    assert (ROOT / "tests" / "ops" / f"test_{name}.py").exists()
    assert callable(getattr(deaddir_fast.ops, name))


@pytest.mark.parametrize(("name", "schema"), TABLE, ids=NAMES)
def test_schema_and_kernels(name, schema):
    op = getattr(torch.ops.deaddir, name).default
    assert str(op._schema) == f"deaddir::{name}{schema}"
    assert op._schema.is_mutable == name.endswith("_")
    for device in ("CPU", "CUDA", "XPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, device)
    for kernel in OPS[name].kernels:
        folder, suffix = {"cpu": ("csrc", "cpp"), "triton": ("kernels", "py")}[kernel.route]
        source = name.removesuffix("_").removesuffix("_packed")
        files = (f"{source}.{suffix}", f"{SHARED.get(source)}.{suffix}")
        assert any((ROOT / folder / file).exists() for file in files)
