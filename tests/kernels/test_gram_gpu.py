"""Values of the Gram kernel on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from compare import EPS, to_numpy

from deaddir_fast._backend import backend
from deaddir_fast.ops import gram, gram_packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (33, 37), (1000, 384), (4096, 2500), (0, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_values(shape, dtype, weighted):
    x = torch.randn(shape, device="cuda").to(dtype)
    weight = torch.randn(shape[0], device="cuda", dtype=dtype) if weighted else None
    out = torch.randn(shape[1], shape[1], device="cuda", dtype=torch.float64)
    out = (out + out.mT).to(torch.float64 if dtype == torch.float64 else torch.float32)
    factor = x.double() if weight is None else x.double() * weight.double()[:, None]
    expected = 0.3 * factor.mT @ x.double() + 0.9 * out.double()
    size = 0.3 * factor.abs().mT @ x.double().abs() + 0.9 * out.double().abs()
    with backend("triton"):
        twice = [gram(x, weight=weight, out=out.clone(), alpha=0.3, beta=0.9) for _ in range(2)]
        packed = gram_packed(x, weight=weight, alpha=0.3)
        plain = gram(x, weight=weight, alpha=0.3)
    assert torch.equal(twice[0], twice[1])
    assert torch.equal(twice[0], twice[0].mT)
    assert torch.equal(plain, plain.mT)
    bound = 8 * EPS[out.dtype] * max(1, shape[0]) ** 0.5 * to_numpy(size).max()
    assert abs(to_numpy(twice[0]) - to_numpy(expected)).max() <= bound
    index = torch.tril_indices(shape[1], shape[1], device="cuda")
    assert abs(to_numpy(packed) - to_numpy(plain[index[0], index[1]])).max(initial=0) <= bound
