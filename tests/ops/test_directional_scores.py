from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compare import EPS, assert_relative, assert_rms, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import directional_curvature, directional_scores
from deaddir_fast.ops.directional_scores import reference

torch.set_num_threads(1)

#: n, t (None: no token dimension), i, o, p
SHAPES = [
    (1, None, 1, 1, 1),
    (7, None, 5, 3, 4),
    (33, None, 17, 65, 9),
    (7, 1, 5, 3, 4),
    (5, 11, 6, 3, 8),
    (4, 9, 33, 2, 1),
    (2, 3, 1, 70, 5),
    (2, 5000, 3, 2, 4),  # a sample in several runs of tokens
]
EMPTY = [(3, None, 4, 2, 0), (3, 2, 0, 2, 3), (3, 2, 4, 0, 3), (3, 0, 4, 2, 3)]


def make(n, t, i, o, p, dtype=torch.float64):
    lead = (n,) if t is None else (n, t)
    return tuple(torch.randn(s).to(dtype) for s in ((*lead, i), (*lead, o), (p, o, i)))


def truth(a, g, U):
    a, g, U = map(to_numpy, (a, g, U))
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    return np.einsum("noi,poi->pn", np.einsum("nto,nti->noi", g, a), U)


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
    assert_close(directional_scores(*args), args)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_sums_are_zero(shape):
    result = directional_scores(*make(*shape))
    assert torch.equal(result, torch.zeros(shape[-1], shape[0], dtype=torch.float64))


@pytest.mark.parametrize("t", [None, 5])
def test_no_samples_have_no_scores(t):
    result = directional_scores(*make(0, t, 3, 2, 4, torch.bfloat16))
    assert result.shape == (4, 0) and result.dtype == torch.float32


@pytest.mark.skipif(_native.extension is None, reason=f"no C++ here: {_native.why_not}")
@given(
    n=st.integers(0, 20),
    t=st.one_of(st.none(), st.integers(0, 6)),
    i=st.integers(0, 40),
    o=st.integers(0, 40),
    p=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_cpp_agrees_with_the_reference(n, t, i, o, p, dtype, seed):
    torch.manual_seed(seed)
    args = make(n, t, i, o, p, dtype)
    with backend("cpu"):
        result = directional_scores(*args)
    expected = reference(*(x.double() for x in args))
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.shape == expected.shape
    error = np.abs(to_numpy(result) - to_numpy(expected))
    assert (error <= 16 * EPS[result.dtype] * truth(*(x.abs() for x in args))).all()


def test_strides_and_mixed_types():
    a = torch.randn(6, 9, 4).permute(1, 2, 0)[::2].bfloat16()
    g = torch.randn(5, 4, 3).double()
    U = torch.randn(6, 3, 2).permute(2, 1, 0)
    before = a.clone(), g.clone(), U.clone()
    assert_close(directional_scores(a, g, U), (a, g, U))
    assert all(torch.equal(x, y) for x, y in zip((a, g, U), before, strict=True))


@pytest.mark.parametrize("t", [None, 7])
def test_they_are_derivatives_of_the_log_likelihood(t):
    """One linear layer into a softmax: the slope of log p(y | x) as its weight moves along U."""
    n, i, c, p = 6, 4, 3, 5
    lead = (n, 1) if t is None else (n, t)
    x, W, U = torch.randn(*lead, i).double(), torch.randn(c, i).double(), make(1, 1, i, c, p)[2]
    y = torch.randint(c, lead)

    def loglikelihood(weight):
        return (x @ weight.mT).log_softmax(-1).gather(-1, y[..., None]).sum((1, 2))

    residual = torch.nn.functional.one_hot(y, c) - (x @ W.mT).softmax(-1)
    a, g = (x[:, 0], residual[:, 0]) if t is None else (x, residual)
    slopes = [torch.func.jvp(loglikelihood, (W,), (u,))[1] for u in U]
    assert_rms(directional_scores(a, g, U), torch.stack(slopes), 1e-13)


@pytest.mark.parametrize("shape", [(9, None, 5, 4, 3), (9, 6, 5, 4, 7)])
def test_their_mean_square_is_the_curvature(shape):
    args = make(*shape)
    squares = directional_scores(*args).square().mean(1)
    assert_relative(directional_curvature(*args), squares, 1e-14)


def test_scores_of_two_layers_add():
    """Two layers are one of block-diagonal directions: the curvature of their sum is its own."""
    (a, g, U), (b, h, V) = make(8, None, 3, 4, 2), make(8, None, 5, 2, 2)
    both = torch.zeros(2, 6, 8).double()
    both[:, :4, :3], both[:, 4:, 3:] = U, V
    together = directional_scores(torch.cat((a, b), 1), torch.cat((g, h), 1), both)
    assert_rms(directional_scores(a, g, U) + directional_scores(b, h, V), together, 1e-14)


@pytest.mark.parametrize("t", [None, 6])
def test_blocks(monkeypatch, t):
    args = make(25, t, 5, 4, 3)
    with backend("reference"):
        whole = directional_scores(*args)
        monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 1000)
        assert_rms(directional_scores(*args), whole, 1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("t", [None, 5])
def test_what_is_not_finite_stays_with_its_sample_and_direction(bad, t):
    # positive numbers: an infinity gives an infinity
    args = [x.abs() + 0.1 for x in make(5, t, 19, 18, 3)]
    last = () if t is None else (t - 1,)
    for k, place in ((2, (1, 17, 18)), (1, (4, *last, 17)), (0, (4, *last, 18))):
        some = [x.clone() for x in args]
        some[k][place] = bad
        expected = torch.zeros(3, 5, dtype=torch.bool)
        expected[(1, slice(None)) if k == 2 else (slice(None), 4)] = True
        result = directional_scores(*some)
        assert torch.equal(~result.isfinite(), expected)
        assert torch.equal(result.isnan(), expected & math.isnan(bad))


def test_bad_arguments():
    a, g, U = make(5, None, 4, 3, 2)
    with pytest.raises(ValueError, match=r"a: expected 2 or 3 dimensions"):
        directional_scores(a[0], g, U)
    with pytest.raises(ValueError, match=r"g: expected 2 dimensions, as a has"):
        directional_scores(a, g[:, None], U)
    with pytest.raises(ValueError, match=r"g: expected size 5 in dimension 0"):
        directional_scores(a, g[:4], U)
    with pytest.raises(ValueError, match=r"U: expected size 3 in dimension 1"):
        directional_scores(a, g, U.mT)
    with pytest.raises(RuntimeError, match=r"g: requires grad"):
        directional_scores(a, g.requires_grad_(), U)


def test_registered_operator_and_trace():
    a, g, U = make(5, 3, 4, 3, 2, torch.float32)
    operator = torch.ops.deaddir.directional_scores.default
    torch.library.opcheck(operator, (a, g, U))
    torch.library.opcheck(operator, (a[:, 0], g[:, 0], U.double()))
    torch.library.opcheck(operator, (a, g, U[:1]))
    torch.library.opcheck(operator, (a[:1], g[:1], U))
    compiled = torch.compile(directional_scores, fullgraph=True, backend="eager")
    assert torch.equal(compiled(a, g, U), directional_scores(a, g, U))


def test_transforms_go_through_the_reference():
    a, g, U = make(5, None, 4, 3, 2)
    with backend("auto"):
        value, slope = torch.func.jvp(lambda u: directional_scores(a, g, u), (U,), (U,))
        mapped = torch.func.vmap(lambda u: directional_scores(a, g, u[None])[0])(U)
    assert_rms(slope, value, 1e-14)  # linear
    assert_rms(mapped, value, 1e-14)
