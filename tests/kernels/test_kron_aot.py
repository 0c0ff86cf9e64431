"""Operands of Kronecker products are loaded 16 bytes at a time, whatever the sizes."""

from __future__ import annotations

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deaddir_fast.kernels import kron_quadratic, kron_quadratic_rank1

pytestmark = pytest.mark.aot


def copies(case):
    """Bytes of each asynchronous copy to shared memory in the code for sm_90."""
    names = list(case.kernel.arg_names)
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(case.kernel, signature, dict(case.constants), aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)
    return [int(size, 0) for size in found]


@pytest.mark.parametrize("unit", ["bf16", "fp16", "fp32", "fp64"])
def test_odd_sizes_load_as_wide_as_even_ones(unit):
    cases = [c for c in kron_quadratic.aot() if c.unit == unit and " odd" in c.label]
    assert cases
    for case in cases[:2]:
        assert not {"m", "n", "k"} & set(case.aligned)
        assert set(copies(case)) == {16}
    # many rank-one directions read a copy with aligned rows
    (form,) = (
        c
        for c in kron_quadratic_rank1.aot()
        if c.unit == unit and " odd" in c.label and c.constants["STORED"]
    )
    assert set(copies(form)) == {16}
