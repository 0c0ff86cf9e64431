"""Values of the categorical Triton kernels on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from compare import assert_rms

from deaddir_fast._backend import backend
from deaddir_fast.ops import linear_softmax_fisher, softmax_fisher, softmax_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bound(result):
    return 1e-12 if result.dtype == torch.float64 else 2e-5


def both(call, *args, **kwargs):
    """The Triton kernel, twice the same bits, and the reference in fp64."""
    with backend("triton"):
        result, again = call(*args, **kwargs), call(*args, **kwargs)
    assert torch.equal(result, again)
    wide = [x.double() for x in args]
    with backend("reference"):
        return result, call(*wide, **{k: v.double() for k, v in kwargs.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 37, 1000), (5, 2, 50257), (2, 300, 33)])
def test_rows(shape, dtype):
    _, n, c = shape
    logits = (3 * torch.randn(n, c, device="cuda")).to(dtype)
    tangent = (torch.randn(shape, device="cuda") + 5).to(dtype)
    result, truth = both(softmax_fisher, logits, tangent)
    assert_rms(result, truth, bound(result))
    # a step the type represents: the divergence is one of the difference of the arguments
    step = torch.randint(-8, 9, shape, device="cuda") / 4
    coarse = (logits.double() * 4).round().div(4)
    result, truth = both(softmax_kl, coarse.to(dtype), (coarse.to(dtype) + step).to(dtype))
    if dtype in (torch.float64, torch.float32):
        assert_rms(result, truth, bound(result))
    assert result.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 1000, 48), (3, 130, 5003, 77)])
def test_read_out(shape, dtype):
    p, n, c, d = shape
    h = (torch.randn(n, d, device="cuda") / d**0.5).to(dtype)
    dh, W = (torch.randn(s, device="cuda").to(dtype) for s in ((p, n, d), (c, d)))
    result, truth = both(linear_softmax_fisher, h, dh, W)
    assert_rms(result, truth, bound(result))
    bias, dW = (torch.randn(s, device="cuda").to(dtype) for s in ((c,), (p, c, d)))
    result, truth = both(linear_softmax_fisher, h, dh, W, bias=bias, dW=dW)
    assert_rms(result, truth, bound(result))
