"""What a step moves is loaded and stored 16 bytes at a time, and nothing is contracted."""

from __future__ import annotations

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deaddir_fast.kernels import scaled_adam, scaled_squares, shared_adam

pytestmark = pytest.mark.aot

#: Bytes of an element.
SIZES = {"fp64": 8, "fp32": 4, "bf16": 2}


def ptx(case):
    """The code for sm_90."""
    names = list(case.kernel.arg_names)
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(case.kernel, signature, dict(case.constants), aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    options["enable_fp_fusion"] = case.fusion
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def moves(code, what):
    """Bytes a lane of each load or store of memory that moves 16 bytes or more."""
    widths = {"v4.b32": 16, "v2.b64": 16}
    found = re.findall(rf"{what}\.global(?:\.\w+)*?\.(v\d\.b\d+)", code)
    assert set(found) <= widths.keys()
    return [widths[x] for x in found]


@pytest.mark.parametrize("name", SIZES)
def test_a_step_moves_16_bytes_a_lane(name):
    (case,) = (c for c in scaled_adam.aot() if c.label == name)
    code = ptx(case)
    lanes = 32 * case.warps
    state = 8 if name == "fp64" else 4
    block = case.constants["BLOCK"]
    # two copies of the step have no masks: one loads the scales of columns by vectors too
    assert sum(moves(code, "ld")) * lanes == block * (4 * SIZES[name] + 5 * state)
    assert sum(moves(code, "st")) * lanes == block * (2 * SIZES[name] + 4 * state)
    assert not re.search(r"\bfma\.", code)  # the arithmetic of the reference, step by step
    assert not re.search(r"(sqrt|div)\.(approx|full)", code)


def test_a_shared_step_moves_16_bytes_a_lane():
    (case,) = (c for c in shared_adam.aot() if c.label == "fp32" and "BLOCK" in c.constants)
    code = ptx(case)
    lanes, block = 32 * case.warps, case.constants["BLOCK"]
    # w, g, m twice; scales of columns, and v or the groups of columns, where a block is in one row
    assert sum(moves(code, "ld")) * lanes == block * 4 * (2 * 3 + 3)
    assert sum(moves(code, "st")) * lanes == block * 4 * (2 * 2)


@pytest.mark.parametrize("name", SIZES)
def test_sums_load_16_bytes_a_lane(name):
    (case,) = (
        c
        for c in scaled_squares.aot()
        if c.kernel is scaled_squares.scaled_squares_kernel and c.label == name
    )
    tile = case.constants["BLOCK_R"] * case.constants["BLOCK_C"]
    loads = moves(ptx(case), "ld")
    assert sum(loads) * 32 * case.warps >= 2 * tile * SIZES[name]  # for rows and for columns
    (case,) = (
        c
        for c in shared_adam.aot()
        if c.kernel is shared_adam.shared_moments_kernel and c.label == name
    )
    tile = case.constants["BLOCK_R"] * case.constants["BLOCK_C"]
    assert sum(moves(ptx(case), "ld")) * 32 * case.warps >= tile * SIZES[name]
