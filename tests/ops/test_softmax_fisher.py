from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from compare import assert_relative, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import softmax_fisher

torch.set_num_threads(1)


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def route(request):
    if request.param == "cpu" and _native.extension is None:
        pytest.skip(f"no C++ here: {_native.why_not}")
    with backend(request.param):
        yield request.param


def truth(logits, tangent):
    """The variance at 60 digits."""
    z, t = to_numpy(logits), to_numpy(tangent)
    result = np.zeros(t.shape[:2])
    with mpmath.workdps(60):
        for n, row in enumerate(z):
            e = [mpmath.exp(mpmath.mpf(float(x))) for x in row]
            p = [x / mpmath.fsum(e) for x in e]
            for k in range(len(t)):
                v = [mpmath.mpf(float(x)) for x in t[k, n]]
                mean = mpmath.fdot(p, v)
                result[k, n] = mpmath.fdot(p, [(x - mean) ** 2 for x in v])
    return result


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 2), (2, 7, 65), (0, 3, 4), (3, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    p, n, c = shape
    logits, tangent = (3 * torch.randn(n, c)).to(dtype), torch.randn(p, n, c).to(dtype)
    result = softmax_fisher(logits, tangent)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 1e-13 if dtype == torch.float64 else 1e-5
    assert_relative(result, truth(logits, tangent), bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_large_mean_costs_no_digits(dtype):
    base = torch.randint(-8, 9, (2, 3, 10)).to(dtype)
    logits = torch.randn(3, 10, dtype=dtype)
    shift = 2.0 ** (40 if dtype == torch.float64 else 16)  # the sum is exact
    assert_relative(softmax_fisher(logits, base + shift), truth(logits, base), 2e-6)
    if dtype == torch.float64:
        assert_relative(softmax_fisher(logits, base + shift), truth(logits, base), 1e-14)


@given(gap=st.floats(0, 60), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_confident_class_costs_no_digits(gap, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, generator=generator).double()
    logits[:, 3] += gap
    tangent = torch.randn(2, 2, 6, generator=generator).double() + 5
    assert_relative(softmax_fisher(logits, tangent), truth(logits, tangent), 1e-12)
    narrow = softmax_fisher(logits.float(), tangent.float())
    assert_relative(narrow, truth(logits.float(), tangent.float()), 2e-5)


def test_constants_are_invisible_and_tiny_tangents_are_not():
    logits = torch.randn(4, 9).double()
    constant = torch.full((1, 4, 9), 1.2345678)
    assert torch.equal(softmax_fisher(logits, constant), torch.zeros(1, 4).double())
    tangent = torch.randn(2, 4, 9).double()
    scaled = softmax_fisher(logits, tangent * 2.0**-400)
    assert torch.equal(scaled, softmax_fisher(logits, tangent) * 2.0**-800)


def test_matches_the_dense_fisher():
    logits, tangent = torch.randn(5, 7).double(), torch.randn(3, 5, 7).double()
    p = torch.softmax(logits, 1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("pna,nab,pnb->pn", tangent, fisher, tangent)
    assert_relative(softmax_fisher(logits, tangent), expected, 1e-12)


def test_masked_classes_are_absent():
    logits, tangent = torch.randn(3, 6).double(), torch.randn(2, 3, 6).double()
    logits[:, 2] = -torch.inf
    keep = [0, 1, 3, 4, 5]
    expected = softmax_fisher(logits[:, keep], tangent[:, :, keep])
    assert_relative(softmax_fisher(logits, tangent), expected, 1e-14)


def test_strides_and_blocks(monkeypatch):
    logits, tangent = torch.randn(9, 4).double().mT, torch.randn(9, 8, 5).double().permute(2, 1, 0)
    expected = truth(logits, tangent[:, ::2])
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 600)
    assert_relative(softmax_fisher(logits, tangent[:, ::2]), expected, 1e-13)


def test_nan_and_infinity_propagate():
    logits, tangent = torch.randn(3, 4), torch.randn(2, 3, 4)
    logits[1, 2] = float("nan")
    tangent[0, 2, 1] = float("inf")
    result = softmax_fisher(logits, tangent)
    assert result[:, 1].isnan().all()
    assert result[0, 2].isnan() or result[0, 2].isinf()
    assert result[:, 0].isfinite().all()
    assert result[1, 2].isfinite()


def test_bad_arguments():
    logits, tangent = torch.randn(3, 4), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"logits: expected at least one class"):
        softmax_fisher(logits[:, :0], tangent[..., :0])
    with pytest.raises(ValueError, match=r"tangent: expected size 3 in dimension 1"):
        softmax_fisher(logits, tangent[:, :2])
    with pytest.raises(ValueError, match=r"tangent: expected size 4 in dimension 2"):
        softmax_fisher(logits, tangent[..., :2])
    with pytest.raises(ValueError, match=r"tangent: expected 3 dimensions"):
        softmax_fisher(logits, tangent[0])
    with pytest.raises(RuntimeError, match=r"tangent: requires grad"):
        softmax_fisher(logits, tangent.requires_grad_())


def test_registered_operator():
    args = torch.randn(3, 4), torch.randn(2, 3, 4)
    torch.library.opcheck(torch.ops.deaddir.softmax_fisher.default, args)


def test_maps_over_a_batch():
    logits, tangent = torch.randn(6, 3, 4).double(), torch.randn(6, 2, 3, 4).double()
    with backend("auto"):
        mapped = torch.func.vmap(softmax_fisher)(logits, tangent)
    expected = torch.stack([softmax_fisher(x, y) for x, y in zip(logits, tangent, strict=True)])
    assert_relative(mapped, expected, 1e-13)
