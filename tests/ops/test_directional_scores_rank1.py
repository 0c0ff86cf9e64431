from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compare import EPS, assert_relative, assert_rms, to_numpy

from deaddir_fast.ops import (
    directional_curvature_rank1,
    directional_scores,
    directional_scores_rank1,
)

torch.set_num_threads(1)

SHAPES = [
    (1, None, 1, 1, 1),
    (7, None, 5, 3, 4),
    (33, None, 17, 65, 9),
    (5, 11, 6, 3, 8),
    (2, 3, 1, 70, 5),
    (500, 1, 3, 2, 5),  # several groups of samples
    (2, 10_000, 3, 2, 5),  # a sample in several parts
]


def make(n, t, i, o, p, dtype=torch.float64):
    lead = (n,) if t is None else (n, t)
    return tuple(torch.randn(s).to(dtype) for s in ((*lead, i), (*lead, o), (p, o), (p, i)))


def truth(a, g, v, w):
    a, g, v, w = map(to_numpy, (a, g, v, w))
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    return np.einsum("ntp,ntp->pn", g @ v.T, a @ w.T)


def assert_close(result, args):
    """Errors scale with the sums of absolute values."""
    wide = any(x.dtype == torch.float64 for x in args)
    assert result.dtype == (torch.float64 if wide else torch.float32)
    expected = truth(*args)
    assert result.shape == expected.shape and result.is_contiguous()
    error = np.abs(to_numpy(result) - expected)
    assert (error <= 16 * EPS[result.dtype] * truth(*(x.abs() for x in args))).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    args = make(*shape, dtype)
    assert_close(directional_scores_rank1(*args), args)


def test_empty():
    result = directional_scores_rank1(*make(0, 2, 3, 4, 5, torch.float16))
    assert result.shape == (5, 0) and result.dtype == torch.float32
    for shape in ((3, 0, 4, 2, 5), (3, 2, 0, 2, 5), (3, 2, 4, 0, 5), (3, 2, 4, 2, 0)):
        result = directional_scores_rank1(*make(*shape))
        assert torch.equal(result, torch.zeros(shape[-1], 3).double())


def test_strides_and_blocks(monkeypatch):
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 300)
    a = torch.randn(6, 4, 9).double().permute(2, 1, 0)
    g, v, w = torch.randn(9, 8, 3).double()[:, ::2], torch.randn(3, 5).mT, torch.randn(5, 6)
    assert_close(directional_scores_rank1(a, g, v, w), (a, g, v, w))


@pytest.mark.parametrize("t", [None, 3, 9000])
def test_full_rank_and_the_curvature_agree(t):
    a, g, v, w = make(9, t, 5, 4, 6)
    result = directional_scores_rank1(a, g, v, w)
    assert_rms(result, directional_scores(a, g, v[:, :, None] * w[:, None, :]), 1e-13)
    assert_relative(directional_curvature_rank1(a, g, v, w), result.square().mean(1), 1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("t", [None, 5, 9000])
def test_what_is_not_finite_stays_with_its_sample_and_direction(bad, t):
    # positive numbers: an infinity gives an infinity
    args = [x.abs() + 0.1 for x in make(5, t, 9, 8, 3)]
    last = () if t is None else (t - 1,)
    for k, place in ((3, (1, 8)), (2, (1, 7)), (1, (4, *last, 7)), (0, (4, *last, 8))):
        some = [x.clone() for x in args]
        some[k][place] = bad
        expected = torch.zeros(3, 5, dtype=torch.bool)
        expected[(1, slice(None)) if k >= 2 else (slice(None), 4)] = True
        result = directional_scores_rank1(*some)
        assert torch.equal(~result.isfinite(), expected)
        assert torch.equal(result.isnan(), expected & math.isnan(bad))


def test_bad_arguments():
    a, g, v, w = make(5, None, 4, 3, 2)
    with pytest.raises(ValueError, match=r"v: expected size 3 in dimension 1 \(the outputs"):
        directional_scores_rank1(a, g, w, w)
    with pytest.raises(ValueError, match=r"w: expected size 4 in dimension 1 \(the inputs"):
        directional_scores_rank1(a, g, v, v)
    with pytest.raises(ValueError, match=r"w: expected size 2 in dimension 0"):
        directional_scores_rank1(a, g, v, w[:1])
    with pytest.raises(RuntimeError, match=r"a: requires grad"):
        directional_scores_rank1(a.requires_grad_(), g, v, w)


def test_registered_operator():
    a, g, v, w = make(5, 3, 4, 3, 2)
    operator = torch.ops.deaddir.directional_scores_rank1.default
    torch.library.opcheck(operator, (a, g, v, w))
    torch.library.opcheck(operator, (a[:, 0], g[:, 0], v[:1], w[:1].float()))
