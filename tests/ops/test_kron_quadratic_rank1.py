from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_relative, to_numpy

from deaddir_fast.ops import kron_quadratic_rank1

torch.set_num_threads(1)


def factor(size):
    x = torch.randn(size, size + 1, dtype=torch.float64)
    return x @ x.mT


def dense(A, G, v, w):
    A, G, v, w = map(to_numpy, (A, G, v, w))
    return np.array([(y @ A @ y) * (x @ G @ x) for x, y in zip(v, w, strict=True)])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (65, 2, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    p, o, i = shape
    A, G = factor(i).to(dtype), factor(o).to(dtype)
    v, w = torch.randn(p, o).to(dtype), torch.randn(p, i).to(dtype)
    result = kron_quadratic_rank1(A, G, v, w)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = dense(A, G, v, w)
    if dtype in (torch.float64, torch.float32):
        assert_relative(result, expected, 1e-10 if dtype == torch.float64 else 1e-3)
    else:  # a rounded Gram matrix may have a negative form, which is returned as 0
        scale = np.abs(expected).max()
        assert np.abs(to_numpy(result) - np.maximum(expected, 0)).max() <= 1e-3 * scale


def test_never_negative_and_exactly_zero_at_zero():
    # a Gram matrix of rank one, rounded to bf16, has negative eigenvalues
    x = torch.randn(64, 1)
    A, G = (x @ x.mT).bfloat16(), torch.ones(1, 1).bfloat16()
    w = torch.linalg.eigh(A.double())[1].mT.bfloat16()
    forms = dense(A, G, torch.ones(64, 1), w)
    assert (forms < 0).any()
    assert (kron_quadratic_rank1(A, G, torch.ones(64, 1), w) >= 0).all()
    assert torch.equal(kron_quadratic_rank1(A, G, torch.zeros(2, 1), w[:2]), torch.zeros(2))


def test_empty():
    zeros = torch.zeros
    assert kron_quadratic_rank1(zeros(3, 3), zeros(2, 2), zeros(0, 2), zeros(0, 3)).shape == (0,)
    result = kron_quadratic_rank1(zeros(0, 0), zeros(2, 2), zeros(4, 2), zeros(4, 0))
    assert torch.equal(result, zeros(4))


def test_nan_stays_with_its_direction():
    A, G, v, w = factor(3), factor(2), torch.randn(4, 2).double(), torch.randn(4, 3).double()
    w[2, 1] = float("nan")
    result = kron_quadratic_rank1(A, G, v, w)
    assert result.isnan().tolist() == [False, False, True, False]


def test_bad_arguments():
    A, G, v, w = factor(3), factor(2), torch.randn(4, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"w: expected size 4 .*one row for each row of v"):
        kron_quadratic_rank1(A, G, v, w[:3])
    with pytest.raises(ValueError, match=r"A: expected size 3"):
        kron_quadratic_rank1(G, G, v, w)
    with pytest.raises(ValueError, match=r"v: expected 2 dimensions"):
        kron_quadratic_rank1(A, G, v[0], w)
    with pytest.raises(RuntimeError, match=r"v: requires grad"):
        kron_quadratic_rank1(A, G, v.requires_grad_(), w)


def test_registered_operator():
    args = factor(3), factor(2), torch.randn(4, 2), torch.randn(4, 3)
    torch.library.opcheck(torch.ops.deaddir.kron_quadratic_rank1.default, args)
