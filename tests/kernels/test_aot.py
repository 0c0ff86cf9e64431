"""Every kernel compiles for every target without a GPU, to the machine code it should."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from deaddir_fast.kernels import aot, gram
from deaddir_fast.kernels._case import Case

pytestmark = pytest.mark.aot

CASES = aot.manifest()
FIRST = {(case.kernel, case.unit): case for case in reversed(CASES)}


def parameters():
    """One case of each kernel and type here; the others, minutes of compilation, are slow."""
    for case in CASES:
        for target in aot.TARGETS:
            marks = [] if case is FIRST[case.kernel, case.unit] else [pytest.mark.slow]
            yield pytest.param(case, target, id=f"{case.name} {target.name}", marks=marks)


@pytest.mark.parametrize(("case", "target"), list(parameters()))
def test_compiles_to_fit_code(case, target):
    outcome = aot.compile_case(case, target)
    assert outcome.problems == ()
    assert outcome.registers > 16
    assert outcome.instructions > 0


def test_every_jit_function_is_in_a_manifest():
    assert aot.unlisted() == []


def test_every_gram_configuration_is_in_the_manifest():
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for dtype, configs in gram.CONFIGS.items():
        for config in configs:
            assert any(
                case.kernel is gram.gram_kernel
                and case.unit == names.get(dtype, "fp64")
                and (case.constants["BLOCK"], case.warps) == (config.block, config.warps)
                for case in CASES
            )


@triton.jit
def widened_kernel(x_ptr, w_ptr, out_ptr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Loads bf16, weights in fp32, multiplies in "ieee"."""
    d, r = tl.arange(0, DEPTH), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + d[:, None] * BLOCK + r[None, :]).to(tl.float32)
    y = x * tl.load(w_ptr + d)[:, None]
    out = tl.dot(tl.trans(x), y, input_precision="ieee")
    tl.store(out_ptr + r[:, None] * BLOCK + r[None, :], out)


@triton.jit
def empty_kernel(x_ptr, w_ptr, out_ptr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Multiplies nothing."""
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32))


def case_of(kernel, *, unit="fp32", block=64):
    return Case(
        kernel=kernel,
        label="test",
        signature={"x_ptr": "*bf16", "w_ptr": "*fp32", "out_ptr": "*fp32"},
        constants={"BLOCK": block, "DEPTH": 16},
        warps=4,
        stages=2,
        aligned=("x_ptr", "w_ptr", "out_ptr"),
        unit=unit,
    )


def test_code_without_the_matrix_instruction_is_refused():
    target = next(t for t in aot.TARGETS if t.name == "sm_90")
    outcome = aot.compile_case(case_of(empty_kernel, unit="bf16"), target)
    assert any("has no wgmma" in problem for problem in outcome.problems)


def test_rounded_operands_are_refused():
    # Triton may take these products in tf32 on sm_100 although "ieee" is asked for; whichever way
    # it compiles, the check has to agree with the code
    target = next(t for t in aot.TARGETS if t.name == "sm_100")
    outcome = aot.compile_case(case_of(widened_kernel), target)
    rounded = any("multiplies fp32 by" in problem for problem in outcome.problems)
    assert rounded != (outcome.problems == ())


def test_spills_and_compile_errors_are_refused():
    target = next(t for t in aot.TARGETS if t.name == "sm_80")
    outcome = aot.compile_case(case_of(widened_kernel, block=256), target)
    assert "spills registers" in outcome.problems
    outcome = aot.compile_case(case_of(widened_kernel, block=48), target)
    assert len(outcome.problems) == 1
    assert "arange" in outcome.problems[0] or "power of 2" in outcome.problems[0]


def test_the_command_prints_a_table_and_a_verdict(monkeypatch, capsys):
    case = FIRST[gram.gram_kernel, "bf16"]
    monkeypatch.setattr(aot, "modules", lambda: [gram])  # the other files are in no manifest here
    monkeypatch.setattr(aot, "manifest", lambda: [case])
    assert aot.main() == 0
    printed = capsys.readouterr().out
    for target in aot.TARGETS:
        assert target.name in printed
    bad = Case(**{**vars(case), "unit": "fp64"})
    monkeypatch.setattr(aot, "manifest", lambda: [bad])
    assert aot.main() == 1
    monkeypatch.setattr(aot, "manifest", lambda: [])
    assert aot.main() == 1  # the jit functions are then in no manifest
