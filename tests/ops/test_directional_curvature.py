from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import EPS, assert_relative, assert_rms, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import directional_curvature, directional_curvature_rank1
from deaddir_fast.ops.directional_curvature import reference

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
]
EMPTY = [(3, None, 4, 2, 0), (3, 2, 0, 2, 3), (3, 2, 4, 0, 3), (3, 0, 4, 2, 3)]


def make(n, t, i, o, p, dtype=torch.float64):
    lead = (n,) if t is None else (n, t)
    return tuple(torch.randn(s).to(dtype) for s in ((*lead, i), (*lead, o), (p, o, i)))


def truth(a, g, U):
    a, g, U = map(to_numpy, (a, g, U))
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    return (np.einsum("nto,poi,nti->pn", g, U, a) ** 2).mean(1)


def cancellation(a, g, U):
    """The same with absolute values: what rounding scales with."""
    return truth(a.abs(), g.abs(), U.abs())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    a, g, U = make(*shape, dtype)
    result = directional_curvature(a, g, U)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = np.abs(to_numpy(result) - truth(a, g, U))
    assert (error <= 32 * EPS[result.dtype] * cancellation(a, g, U)).all()


@pytest.mark.parametrize("route", ["reference", "cpu"])
@pytest.mark.parametrize("shape", EMPTY)
def test_empty_sums_are_zero(route, shape):
    if route == "cpu" and _native.extension is None:
        pytest.skip(f"no C++ here: {_native.why_not}")
    with backend(route):
        result = directional_curvature(*make(*shape))
    assert torch.equal(result, torch.zeros(shape[-1], dtype=torch.float64))


@pytest.mark.parametrize("route", ["reference", "cpu"])
def test_a_mean_over_no_samples_is_nan(route):
    if route == "cpu" and _native.extension is None:
        pytest.skip(f"no C++ here: {_native.why_not}")
    with backend(route):
        assert directional_curvature(*make(0, None, 3, 2, 4)).isnan().all()
        assert directional_curvature(*make(0, 5, 3, 2, 4)).isnan().all()


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
    a, g, U = make(n, t, i, o, p, dtype)
    with backend("cpu"):
        result = directional_curvature(a, g, U)
    expected = reference(a.double(), g.double(), U.double())
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result.isnan(), expected.isnan())
    if n:
        error = np.abs(to_numpy(result) - to_numpy(expected))
        assert (error <= 32 * EPS[result.dtype] * cancellation(a, g, U)).all()


@pytest.mark.skipif(_native.extension is None, reason=f"no C++ here: {_native.why_not}")
def test_cpp_takes_strides_and_mixed_types():
    a = torch.randn(6, 9, 4).permute(1, 2, 0)[::2].bfloat16()
    g = torch.randn(5, 4, 3).double()
    U = torch.randn(6, 3, 2).permute(2, 1, 0)
    before = a.clone(), g.clone(), U.clone()
    with backend("cpu"):
        result = directional_curvature(a, g, U)
    assert result.dtype == torch.float64
    assert_rms(result, truth(a, g, U), 1e-13)
    assert all(torch.equal(x, y) for x, y in zip((a, g, U), before, strict=True))


def test_a_dead_direction_reads_small_to_full_relative_accuracy():
    # the unit carries t = 1e-9, so its curvature is t^2: no digits are lost
    a, g = torch.randn(50, 4).double(), torch.randn(50, 3).double()
    a[:, 2] *= 1e-9
    U = torch.zeros(1, 3, 4).double()
    U[0, 1, 2] = 1.0
    expected = (to_numpy(a)[:, 2] ** 2 * to_numpy(g)[:, 1] ** 2).mean()
    assert_relative(directional_curvature(a, g, U), np.array([expected]), 1e-13)


def test_tokens_add_within_a_sample():
    a, g, U = make(6, 4, 5, 3, 2)
    scores = (g.mT @ a).reshape(6, 15) @ U.reshape(2, 15).mT
    assert_rms(directional_curvature(a, g, U), scores.square().mean(0), 1e-13)


def test_rank_one_agrees_with_full_rank():
    a, g, _ = make(9, 3, 5, 4, 1)
    v, w = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    full = directional_curvature(a, g, v[:, :, None] * w[:, None, :])
    assert_relative(directional_curvature_rank1(a, g, v, w), full, 1e-11)


@pytest.mark.parametrize("t", [None, 6])
def test_blocks(monkeypatch, t):
    a, g, U = make(25, t, 5, 4, 3)
    with backend("reference"):
        whole = directional_curvature(a, g, U)
        monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 1000)
        assert_rms(directional_curvature(a, g, U), whole, 1e-14)


@pytest.mark.parametrize("route", ["reference", "auto"])
def test_nan_and_infinity_propagate(route):
    a, g, U = make(5, None, 4, 3, 3)
    U[1, 2, 2] = float("nan")
    with backend(route):
        assert directional_curvature(a, g, U).isnan().tolist() == [False, True, False]
        U[1, 2, 2] = float("inf")
        assert directional_curvature(a, g, U).isfinite().tolist() == [True, False, True]
        a[3, 0] = float("nan")
        assert directional_curvature(a, g, U).isnan().all()


def test_bad_arguments():
    a, g, U = make(5, None, 4, 3, 2)
    with pytest.raises(ValueError, match=r"a: expected 2 or 3 dimensions"):
        directional_curvature(a[0], g, U)
    with pytest.raises(ValueError, match=r"g: expected 2 dimensions, as a has"):
        directional_curvature(a, g[:, None], U)
    with pytest.raises(ValueError, match=r"g: expected size 5 in dimension 0"):
        directional_curvature(a, g[:4], U)
    with pytest.raises(ValueError, match=r"g: expected size 2 in dimension 1 \(the tokens"):
        directional_curvature(a[:, None].expand(-1, 2, -1), g[:, None], U)
    with pytest.raises(ValueError, match=r"U: expected size 3 in dimension 1"):
        directional_curvature(a, g, U.mT)
    with pytest.raises(RuntimeError, match=r"g: requires grad"):
        directional_curvature(a, g.requires_grad_(), U)


def test_registered_operator_and_trace():
    a, g, U = make(5, 3, 4, 3, 2, torch.float32)
    torch.library.opcheck(torch.ops.deaddir.directional_curvature.default, (a, g, U))
    torch.library.opcheck(
        torch.ops.deaddir.directional_curvature.default, (a[:, 0], g[:, 0], U.double())
    )
    compiled = torch.compile(directional_curvature, fullgraph=True, backend="eager")
    assert torch.equal(compiled(a, g, U), directional_curvature(a, g, U))
    traced = torch.fx.experimental.proxy_tensor.make_fx(directional_curvature)(a, g, U)
    assert "directional_curvature" in traced.code


def test_transforms_go_through_the_reference():
    a, g, U = make(5, None, 4, 3, 2)
    with backend("auto"):
        value, slope = torch.func.jvp(lambda u: directional_curvature(a, g, u), (U,), (U,))
        mapped = torch.func.vmap(lambda u: directional_curvature(a, g, u[None])[0])(U)
    assert_rms(slope, 2 * value, 1e-14)  # homogeneous of degree two
    assert_rms(mapped, value, 1e-14)
