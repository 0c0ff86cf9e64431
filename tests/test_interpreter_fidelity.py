"""The interpreter rounds as the hardware does, once patched."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.interp

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def dot_kernel(
    a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=P))


@triton.jit
def cast_kernel(x_ptr, out_ptr, explicit: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(x_ptr + i)
    if explicit:
        x = x.to(tl.bfloat16)
    tl.store(out_ptr + i, x)


def _dot_error(dtype: torch.dtype, precision: str, k: int = 64) -> float:
    a, b = torch.randn(32, k).to(dtype), torch.randn(k, 32).to(dtype)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, 32, 32, k, precision)
    exact = a.double() @ b.double()
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("dtype", "precision", "low", "high"),
    [
        # relative error: operand rounding of 2^-11 (tf32), 2^-16 and 2^-24 (three bf16 products,
        # six), else that of fp32 sums; each mode is as bad as on hardware and no worse
        (torch.float32, "ieee", 0.0, 5e-7),
        (torch.float32, "tf32", 1e-4, 5e-4),
        (torch.float32, "tf32x3", 0.0, 1e-6),
        (torch.float32, "bf16x3", 5e-7, 1e-5),
        (torch.float32, "bf16x6", 0.0, 1e-6),
        (torch.bfloat16, "ieee", 0.0, 5e-7),
        (torch.float16, "ieee", 0.0, 5e-7),
    ],
)
def test_dot_has_the_error_of_its_precision(
    dtype: torch.dtype, precision: str, low: float, high: float
) -> None:
    assert low <= _dot_error(dtype, precision) <= high


@pytest.mark.parametrize("explicit", [True, False])
def test_bfloat16_casts_round_to_nearest_even(explicit: bool) -> None:
    ties = torch.arange(64, dtype=torch.int32) * 0x8000 + 0x3F800000  # every other one a tie
    x = torch.cat([torch.randn(448), ties.view(torch.float32)])
    out = torch.empty(512, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, explicit, 512)
    assert torch.equal(out, x.bfloat16())


def test_bfloat16_casts_keep_special_values() -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 3.4e38, 1e-40, 1.0, 0.0])
    out = torch.empty(8, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, True, 8)
    expected = x.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(out[keep].view(torch.int16), expected[keep].view(torch.int16))


def test_bfloat16_widens_exactly() -> None:
    x = torch.randn(256).bfloat16()
    out = torch.empty(256)
    cast_kernel[(1,)](x, out, False, 256)
    assert torch.equal(out, x.float())
