"""Values of the categorical Triton kernels in the interpreter, against fp64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_relative, assert_rms, to_numpy

from deaddir_fast._backend import backend
from deaddir_fast.kernels import _online_softmax as online
from deaddir_fast.kernels import linear_softmax_fisher as linear_kernel
from deaddir_fast.kernels import softmax_fisher as fisher_kernel
from deaddir_fast.kernels import softmax_kl as kl_kernel
from deaddir_fast.ops import linear_softmax_fisher, softmax_fisher, softmax_kl

pytestmark = [
    pytest.mark.interp,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on -inf and NaN
]

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
BOUND = {F64: 1e-12, F32: 2e-5}
#: p, n, c: one tile, ragged tiles, several tiles, one class
SHAPES = [(1, 1, 1), (2, 3, 7), (3, 17, 16), (1, 5, 70), (5, 2, 530)]


@pytest.fixture(autouse=True)
def forced_route():
    with backend("triton"):
        yield


def wide(*tensors):
    return F64 if any(x is not None and x.dtype == F64 for x in tensors) else F32


def probability(z):
    weight = np.exp(z - z.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def true_fisher(logits, tangent):
    p, x = probability(to_numpy(logits)), to_numpy(tangent)
    x = x - np.take_along_axis(x, p.argmax(-1)[None, :, None].repeat(len(x), 0), -1)
    x = x - (p * x).sum(-1, keepdims=True)
    return (p * x**2).sum(-1)


def excess(x):
    """e^x - 1 - x, from its power series where the difference would cancel."""
    near = np.where(np.abs(x) < 0.5, x, 0.0)
    term, total = np.ones_like(x), np.zeros_like(x)
    for k in range(1, 20):
        term = term * near / k
        total = total + (term if k > 1 else 0.0)
    return np.where(np.abs(x) < 0.5, total, np.expm1(x) - x)


def true_kl(logits, logits_t):
    """For the difference of the arguments as the type of the arithmetic represents it."""
    dtype = wide(logits, logits_t)
    p = probability(to_numpy(logits))
    x = to_numpy(logits_t.to(dtype) - logits.to(dtype))
    x = x - np.take_along_axis(x, p.argmax(-1)[None, :, None].repeat(len(x), 0), -1)
    x = x - (p * x).sum(-1, keepdims=True)
    return np.log1p((p * excess(x)).sum(-1))


def true_linear(h, dh, W, bias, dW):
    z, tangent = to_numpy(h) @ to_numpy(W).T, to_numpy(dh) @ to_numpy(W).T
    if bias is not None:
        z = z + to_numpy(bias)
    if dW is not None:
        tangent = tangent + np.einsum("nd,pcd->pnc", to_numpy(h), to_numpy(dW))
    return true_fisher(z, tangent)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_variance(shape, dtype):
    _, n, c = shape
    logits, tangent = (3 * torch.randn(n, c)).to(dtype), (torch.randn(shape) + 5).to(dtype)
    before = logits.clone(), tangent.clone()
    result = softmax_fisher(logits, tangent)
    assert result.dtype == wide(logits)
    assert_rms(result, true_fisher(logits, tangent), BOUND[result.dtype])
    assert torch.equal(result, softmax_fisher(logits, tangent))
    assert torch.equal(logits, before[0])
    assert torch.equal(tangent, before[1])


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence(shape, dtype):
    _, n, c = shape
    logits = (3 * torch.randn(n, c)).to(dtype)
    moved = (logits + torch.randn(shape).to(dtype)).to(dtype)
    result = softmax_kl(logits, moved)
    assert result.dtype == wide(logits)
    assert_rms(result, true_kl(logits, moved), BOUND[result.dtype])
    assert torch.equal(result, softmax_kl(logits, moved))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 5), (3, 17, 70, 19), (1, 2, 9, 0)])
@pytest.mark.parametrize("extra", [False, True])
def test_read_out(shape, dtype, extra):
    p, n, c, d = shape
    h, dh = (torch.randn(n, d) / max(1, d) ** 0.5).to(dtype), torch.randn(p, n, d).to(dtype)
    W = torch.randn(c, d).to(dtype)
    bias, dW = (torch.randn(c).to(dtype), torch.randn(p, c, d).to(dtype)) if extra else (None, None)
    result = linear_softmax_fisher(h, dh, W, bias=bias, dW=dW)
    assert result.dtype == wide(h)
    assert_rms(result, true_linear(h, dh, W, bias, dW), BOUND[result.dtype])


@pytest.mark.parametrize("dtype", [F64, F32])
def test_every_tile_and_split(dtype):
    logits, tangent = torch.randn(3, 100, dtype=dtype), torch.randn(3, 3, 100, dtype=dtype)
    moved = logits + tangent / 4
    for kernel, stacked, truth in (
        (fisher_kernel.softmax_fisher, tangent, true_fisher(logits, tangent)),
        (kl_kernel.softmax_kl, moved, true_kl(logits, moved)),
    ):
        configs = fisher_kernel.CONFIGS if stacked is tangent else kl_kernel.CONFIGS
        for config in configs[dtype]:
            for span in (config.classes, 128 * config.classes):
                out = torch.full((3, 3), float("nan"), dtype=dtype)
                kernel(logits, stacked, out, config=config, span=span)
                assert_rms(out, truth, BOUND[dtype])


def test_splits_of_a_read_out():
    h, dh, W = (
        torch.randn(3, 8).double(),
        torch.randn(2, 3, 8).double(),
        torch.randn(90, 8).double(),
    )
    truth = true_linear(h, dh, W, None, None)
    config = linear_kernel.CONFIGS[F64][-1]
    for span in (config.classes, 16 * config.classes):
        out = torch.full((2, 3), float("nan"), dtype=F64)
        linear_kernel.linear_softmax_fisher(h, dh, W, None, None, out, config=config, span=span)
        assert_rms(out, truth, 1e-12)


@pytest.mark.parametrize("scale", [1e-2, 1e-8, 1e-15])
def test_small_divergences_keep_their_digits(scale):
    logits = torch.randn(4, 300).double()
    moved = logits + scale * torch.randn(2, 4, 300).double()
    assert_relative(softmax_kl(logits, moved), true_kl(logits, moved), 1e-10)


def test_constants_cost_no_digits():
    logits, tangent = torch.randn(3, 90).double(), torch.randn(2, 3, 90).double() * 1e-6
    shifted = tangent + 1024.0
    exact = true_fisher(logits, shifted - 1024.0)
    assert_relative(softmax_fisher(logits + 7.0, shifted), exact, 1e-9)
    assert torch.equal(softmax_fisher(logits, torch.full((1, 3, 90), 3.7).double()),
                       torch.zeros(1, 3).double())  # fmt: skip


@pytest.mark.parametrize("gap", [5.0, 40.0, 300.0])
def test_a_confident_class_costs_no_digits(gap):
    logits = torch.randn(2, 70).double()
    logits[:, 3] += gap
    tangent = torch.randn(2, 2, 70).double()
    assert_relative(softmax_fisher(logits, tangent), true_fisher(logits, tangent), 1e-11)


def test_absent_gained_and_lost_classes():
    logits, tangent = torch.randn(2, 70).double(), torch.randn(1, 2, 70).double()
    logits[:, 20:] = -torch.inf
    some = slice(0, 20)
    assert_rms(
        softmax_fisher(logits, tangent), true_fisher(logits[:, some], tangent[..., some]), 1e-12
    )
    moved = logits + tangent
    assert_rms(softmax_kl(logits, moved), true_kl(logits[:, some], moved[..., some]), 1e-12)
    lost = moved.clone()
    lost[0, 0, 3] = -torch.inf
    assert softmax_kl(logits, lost)[0].isinf().tolist() == [True, False]
    gained = moved.clone()
    gained[0, :, 40] = 1.0
    with backend("reference"):
        expected = softmax_kl(logits, gained)
    assert_rms(softmax_kl(logits, gained), expected, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_sample(bad):
    logits, tangent = torch.randn(3, 40), torch.randn(2, 3, 40)
    spoiled = tangent.clone()
    spoiled[1, 2, 5] = bad
    finite = softmax_fisher(logits, spoiled).isfinite().tolist()
    assert finite == [[True] * 3, [True, True, False]]
    spoiled = logits.clone()
    spoiled[1, 7] = bad
    assert softmax_fisher(spoiled, tangent).isfinite().all(0).tolist() == [True, False, True]
    moved = logits + tangent
    moved[0, 0, 3] = float("nan")
    assert softmax_kl(logits, moved).isnan().tolist() == [[True, False, False], [False] * 3]


def test_strides_mixed_types_and_empty_extents():
    logits = torch.randn(40, 6).mT[::2].bfloat16()
    tangent = torch.randn(40, 3, 2).permute(2, 1, 0).double()
    assert_rms(softmax_fisher(logits, tangent), true_fisher(logits, tangent), 1e-12)
    assert softmax_fisher(torch.randn(0, 4), torch.randn(2, 0, 4)).shape == (2, 0)
    assert softmax_kl(torch.randn(3, 4), torch.randn(0, 3, 4)).shape == (0, 3)
    h, dh, W = torch.randn(2, 9)[:, ::2], torch.randn(1, 2, 5).half(), torch.randn(7, 5).double()
    assert_rms(linear_softmax_fisher(h, dh, W), true_linear(h, dh, W, None, None), 1e-12)


def test_registered_operators_over_the_kernels():
    ops = torch.ops.deaddir
    z, t = torch.randn(3, 20), torch.randn(2, 3, 20)
    torch.library.opcheck(ops.softmax_fisher.default, (z, t))
    torch.library.opcheck(ops.softmax_kl.default, (z, z + t))
    h, dh, W = torch.randn(3, 5), torch.randn(2, 3, 5), torch.randn(20, 5)
    torch.library.opcheck(ops.linear_softmax_fisher.default, (h, dh, W, None, None))


def test_cutting_classes_into_splits():
    assert online.split(1000, 64, 1, 1) == (1, 1024)
    splits, span = online.split(1000, 64, 1, 8)
    assert splits * span >= 1000 > (splits - 1) * span
    assert span % 64 == 0
    assert online.split(10, 64, 1, 100) == (1, 64)
