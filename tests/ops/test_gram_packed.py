from __future__ import annotations

import pytest
import torch
from compare import assert_rms

from deaddir_fast.ops import gram, gram_packed

torch.set_num_threads(1)


def packed(square: torch.Tensor) -> torch.Tensor:
    """The lower triangle row by row, entry (r, c) at r (r + 1) / 2 + c."""
    i = len(square)
    result = square.new_zeros(i * (i + 1) // 2)
    for r in range(i):
        for c in range(r + 1):
            result[r * (r + 1) // 2 + c] = square[r, c]
    return result


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (63, 33), (40, 300), (0, 4), (7, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[0], dtype=dtype)
    result = gram_packed(x, weight=weight, alpha=-2.0)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = packed(-2.0 * (x.double().mT * weight.double()) @ x.double())
    assert_rms(result, expected, 1e-14 if dtype == torch.float64 else 1e-6)


def test_update_in_place():
    x, out = torch.randn(9, 5).double(), torch.randn(15).double()
    expected = 0.7 * out + 0.3 * packed(x.mT @ x)
    version = out._version
    assert gram_packed(x, out=out, alpha=0.3, beta=0.7) is out
    assert out._version > version
    assert_rms(out, expected, 1e-14)


def test_agrees_with_the_square_form_on_strided_input():
    x = torch.randn(12, 40).double().mT[::2]
    assert_rms(gram_packed(x), packed(gram(x)), 1e-14)


def test_nan_and_infinity_propagate():
    x = torch.randn(6, 4).double()
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    expected = packed(x.mT @ x)
    result = gram_packed(x)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isfinite(), expected.isfinite())


def test_bad_arguments():
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"out: expected shape \(6,\)"):
        gram_packed(x, out=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"weight: expected 1 dimensions"):
        gram_packed(x, weight=torch.ones(5, 1))
    with pytest.raises(RuntimeError, match=r"weight: requires grad"):
        gram_packed(x, weight=torch.ones(5, requires_grad=True))


def test_registered_operators():
    x, weight = torch.randn(5, 3), torch.rand(5)
    torch.library.opcheck(torch.ops.deaddir.gram_packed.default, (x, weight, 0.5))
    out = torch.zeros(6)
    torch.library.opcheck(torch.ops.deaddir.gram_packed_.default, (out, x, None, 0.5, 0.9))
