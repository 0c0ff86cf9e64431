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
from deaddir_fast.ops import softmax_fisher, softmax_kl

torch.set_num_threads(1)


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def route(request):
    if request.param == "cpu" and _native.extension is None:
        pytest.skip(f"no C++ here: {_native.why_not}")
    with backend(request.param):
        yield request.param


def truth(logits, logits_t):
    """KL to 400 decimal places, for the difference of the arguments as their type represents it."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    delta = to_numpy(logits_t.to(dtype) - logits.to(dtype))
    z, moved = to_numpy(logits), to_numpy(logits_t)
    result = np.zeros(moved.shape[:2])
    with mpmath.workdps(400):
        for n, row in enumerate(z):
            e = [mpmath.exp(mpmath.mpf(float(x))) for x in row]
            p = [x / mpmath.fsum(e) for x in e]
            for q in range(len(moved)):
                d = [mpmath.mpf(float(x)) for x in delta[q, n]]
                ratio = mpmath.fdot(p, [mpmath.exp(x) for x in d])
                result[q, n] = mpmath.log(ratio) - mpmath.fdot(p, d)
    return result


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 2), (2, 3, 65), (0, 3, 4), (3, 0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    q, n, c = shape
    logits, logits_t = (2 * torch.randn(n, c)).to(dtype), (2 * torch.randn(q, n, c)).to(dtype)
    result = softmax_kl(logits, logits_t)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 1e-13 if dtype == torch.float64 else 1e-5
    assert_relative(result, truth(logits, logits_t), bound)


@given(exponent=st.floats(-15, 2), scale=st.floats(0.1, 10), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_relative_accuracy_at_every_distance(exponent, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, 7, generator=generator).double()
    step = torch.randn(2, 2, 7, generator=generator).double()
    logits_t = logits + 10.0**exponent * step
    assert_relative(softmax_kl(logits, logits_t), truth(logits, logits_t), 1e-12)
    narrow, narrow_t = logits.float(), logits_t.float()
    assert_relative(softmax_kl(narrow, narrow_t), truth(narrow, narrow_t), 5e-5)


def test_1e_minus_30_has_all_its_digits():
    logits = torch.randn(3, 10).double()
    logits_t = logits + 1e-15 * torch.randn(4, 3, 10).double()
    expected = truth(logits, logits_t)
    assert 1e-33 < np.median(expected) < 1e-28
    assert_relative(softmax_kl(logits, logits_t), expected, 1e-13)
    half_variance = softmax_fisher(logits, logits_t - logits) / 2
    assert_relative(softmax_kl(logits, logits_t), half_variance, 1e-12)


def test_a_constant_shift_is_invisible():
    logits = torch.randint(-50, 50, (4, 9)).double()
    shifted = logits + 1024.0
    assert torch.equal(softmax_kl(logits, shifted[None]), torch.zeros(1, 4).double())
    moved = (logits + torch.randint(-3, 4, (4, 9)) * 2.0**-30 + 1024.0)[None]  # exact
    assert_relative(softmax_kl(logits, moved), truth(logits, moved), 1e-13)


@given(gap=st.floats(0, 700), exponent=st.floats(-12, 1), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_confident_class_costs_no_digits(gap, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 5, generator=generator).double()
    logits[:, 2] += gap
    logits_t = (logits + 10.0**exponent * torch.randn(1, 5, generator=generator))[None]
    result, expected = softmax_kl(logits, logits_t), truth(logits, logits_t)
    if expected.min() > 1e-290:  # above the subnormal numbers
        assert_relative(result, expected, 1e-11)


@pytest.mark.parametrize("far", [10.0, 60.0, 800.0, 1e5])
def test_far_points_do_not_overflow(far):
    logits = torch.zeros(1, 4).double()
    logits_t = torch.tensor([[[far, 0.0, -far, 3.0]]]).double()
    assert_relative(softmax_kl(logits, logits_t), truth(logits, logits_t), 1e-12)
    assert_relative(softmax_kl(logits.float(), logits_t.float()), truth(logits, logits_t), 1e-6)


def test_two_classes_against_the_closed_form():
    p, q = 0.25, 0.625
    logits = torch.tensor([[np.log(p), np.log(1 - p)]])
    logits_t = torch.tensor([[[np.log(q), np.log(1 - q)]]])
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert_relative(softmax_kl(logits, logits_t), np.array([[expected]]), 1e-14)


def test_absent_gained_and_lost_classes():
    inf = torch.inf
    logits = torch.tensor([[0.0, -inf, 1.0], [0.0, -inf, 1.0], [0.0, 0.5, 1.0]]).double()
    logits_t = torch.tensor([[0.5, -inf, 0.0], [0.5, 0.5, 0.0], [0.5, -inf, 0.0]]).double()
    result = softmax_kl(logits, logits_t[None])[0]
    without = softmax_kl(logits[:1, [0, 2]], logits_t[None, :1][..., [0, 2]])[0, 0]
    assert_relative(result[0], without, 1e-14)
    # the gained class takes mass: KL grows by the log of what is left
    e = np.exp([0.5, 0.0])
    assert_relative(result[1], without + np.log((e.sum() + np.exp(0.5)) / e.sum()), 1e-14)
    assert result[2] == inf


def test_strides_and_blocks(monkeypatch):
    logits, logits_t = torch.randn(6, 4).double().mT, torch.randn(6, 8, 5).double().permute(2, 1, 0)
    expected = truth(logits, logits_t[:, ::2])
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 600)
    assert_relative(softmax_kl(logits, logits_t[:, ::2]), expected, 1e-13)


def test_nan_propagates():
    logits, logits_t = torch.randn(3, 4), torch.randn(2, 3, 4)
    logits[1, 2] = float("nan")
    logits_t[0, 2, 1] = float("nan")
    expected = [[False, True, True], [False, True, False]]
    assert softmax_kl(logits, logits_t).isnan().tolist() == expected


def test_bad_arguments():
    logits, logits_t = torch.randn(3, 4), torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"logits: expected at least one class"):
        softmax_kl(logits[:, :0], logits_t[..., :0])
    with pytest.raises(ValueError, match=r"logits_t: expected size 3 in dimension 1"):
        softmax_kl(logits, logits_t[:, :2])
    with pytest.raises(RuntimeError, match=r"logits: requires grad"):
        softmax_kl(logits.requires_grad_(), logits_t)


def test_registered_operator():
    args = torch.randn(3, 4), torch.randn(2, 3, 4)
    torch.library.opcheck(torch.ops.deaddir.softmax_kl.default, args)
