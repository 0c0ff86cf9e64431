"""Scores and directional curvature of the kernels in Triton's interpreter, against fp64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import EPS, assert_relative, assert_rms, to_numpy

from deaddir_fast._backend import backend
from deaddir_fast.kernels import directional_scores as full
from deaddir_fast.kernels import directional_scores_rank1 as rank1
from deaddir_fast.kernels.directional_curvature import directional_curvature as curvature
from deaddir_fast.kernels.directional_curvature_rank1 import (
    directional_curvature_rank1 as curvature_rank1,
)
from deaddir_fast.ops import (
    directional_curvature,
    directional_curvature_rank1,
    directional_scores,
    directional_scores_rank1,
)

pytestmark = pytest.mark.interp

TINY = [full.Config(form, 16, 16, 16, 1, 1) for form in ("factorised", "contracted")]
TINY_RANK1 = rank1.Config(16, 16, 16, 1, 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: n, t (None: no token dimension), i, o, p
SHAPES = [
    (1, None, 1, 1, 1),
    (7, None, 5, 3, 4),
    (18, None, 17, 20, 2),
    (7, 1, 16, 16, 2),
    (5, 19, 6, 20, 3),
    (4, 2, 33, 2, 1),
    (2, 3, 1, 40, 5),
]
EMPTY = [(3, None, 4, 2, 0), (3, 2, 0, 2, 3), (3, 2, 4, 0, 3), (3, 0, 4, 2, 3)]

forms = pytest.mark.parametrize("config", TINY, ids=lambda config: config.form)


def make(n, t, i, o, p, dtype=torch.float32):
    lead = (n,) if t is None else (n, t)
    return tuple(torch.randn(s).to(dtype) for s in ((*lead, i), (*lead, o), (p, o, i)))


def make_rank1(n, t, i, o, p, dtype=torch.float32):
    lead = (n,) if t is None else (n, t)
    return tuple(torch.randn(s).to(dtype) for s in ((*lead, i), (*lead, o), (p, o), (p, i)))


def scores(a, g, U):
    a, g, U = map(to_numpy, (a, g, U))
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    with np.errstate(all="ignore"):
        return np.einsum("nti,nto,poi->pn", a, g, U)


def scores_rank1(a, g, v, w):
    a, g, v, w = map(to_numpy, (a, g, v, w))
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    with np.errstate(all="ignore"):
        return np.einsum("ntp,ntp->pn", g @ v.T, a @ w.T)


def truth(a, g, U):
    with np.errstate(all="ignore"):
        return (scores(a, g, U) ** 2).mean(1)


def truth_rank1(a, g, v, w):
    with np.errstate(all="ignore"):
        return (scores_rank1(a, g, v, w) ** 2).mean(1)


def assert_close(result, args, truth):
    """Errors scale with the sums of absolute values."""
    assert result.dtype == (
        torch.float64 if any(x.dtype == torch.float64 for x in args) else torch.float32
    )
    error = np.abs(to_numpy(result) - truth(*args))
    assert (error <= 16 * EPS[result.dtype] * truth(*(x.abs() for x in args))).all()


@forms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, config):
    args = make(*shape, dtype)
    assert_close(full.directional_scores(*args, config=config), args, scores)
    assert_close(curvature(*args, config=config), args, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 40, 5, 4, 18), (9, 5, 3, 17, 2)])
def test_values_of_rank_one(shape, dtype):
    args = make_rank1(*shape, dtype)
    result = rank1.directional_scores_rank1(*args, config=TINY_RANK1)
    assert_close(result, args, scores_rank1)
    result = curvature_rank1(*args, config=TINY_RANK1)
    assert_close(result, args, truth_rank1)


@pytest.mark.parametrize("shape", EMPTY)
def test_empty_sums_are_zero(shape):
    expected = torch.zeros(shape[-1], dtype=torch.float64)
    assert torch.equal(curvature(*make(*shape, torch.float64)), expected)
    assert torch.equal(curvature_rank1(*make_rank1(*shape, torch.float64)), expected)


@pytest.mark.parametrize("shape", [*EMPTY, (0, None, 3, 2, 4), (0, 5, 3, 2, 4)])
def test_empty_scores(shape):
    expected = torch.zeros(shape[-1], shape[0], dtype=torch.float64)
    assert torch.equal(full.directional_scores(*make(*shape, torch.float64)), expected)
    assert torch.equal(rank1.directional_scores_rank1(*make_rank1(*shape, torch.float64)), expected)


def test_a_mean_over_no_samples_is_nan():
    for t in (None, 5):
        assert curvature(*make(0, t, 3, 2, 4)).isnan().tolist() == [True] * 4
        result = curvature_rank1(*make_rank1(0, t, 3, 2, 4))
        assert result.isnan().tolist() == [True] * 4


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (dtype, c)
        for dtype in (torch.float16, torch.float32, torch.float64)
        for c in full.CONFIGS[dtype]
    ],
)
def test_shipped_tiles(dtype, config):
    # two tiles each way, the second a ragged one; a step and a bit deep; five samples
    tokens = 1 if config.form == "factorised" else config.depth + 1
    n = config.height + 1 if config.form == "factorised" else 5
    o = config.depth + 1 if config.form == "factorised" else config.height + 1
    args = make(n, tokens, config.width + 1, o, 2, dtype)
    assert_close(curvature(*args, config=config), args, truth)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (dtype, c)
        for dtype in (torch.float16, torch.float32, torch.float64)
        for c in rank1.CONFIGS[dtype]
    ],
)
@pytest.mark.parametrize("tokens", rank1.TOKENS)
def test_shipped_tiles_of_rank_one(dtype, config, tokens):
    n = config.rows // tokens + 1
    args = make_rank1(n, tokens, config.depth + 1, 3, config.directions + 1, dtype)
    assert rank1.tokens_in_tile(tokens) == tokens
    result = curvature_rank1(*args, config=config)
    assert_close(result, args, truth_rank1)


@forms
def test_bf16_operands_as_the_matrix_units_take_them(config):
    args = make(6, 5, 19, 18, 2, torch.bfloat16)
    assert_close(curvature(*args, config=config, widen=False), args, truth)


def test_bf16_operands_of_rank_one_as_the_matrix_units_take_them():
    args = make_rank1(6, 5, 19, 18, 2, torch.bfloat16)
    result = curvature_rank1(*args, config=TINY_RANK1, widen=False)
    assert_close(result, args, truth_rank1)


@forms
def test_precision_is_obeyed(config):
    args = make(6, 3, 17, 17, 2)
    expected = truth(*args)
    exact = curvature(*args, config=config)
    rounded = curvature(*args, config=config, precision="tf32")
    assert np.abs(to_numpy(exact) / expected - 1).max() < 1e-6
    assert 1e-5 < np.abs(to_numpy(rounded) / expected - 1).max() < 1e-2
    pieces = curvature(*args, config=config, precision="bf16x6")
    assert np.abs(to_numpy(pieces) / expected - 1).max() < 1e-6


def test_precision_of_rank_one_is_obeyed():
    args = make_rank1(20, 3, 30, 30, 3)
    expected = truth_rank1(*args)
    exact = curvature_rank1(*args, config=TINY_RANK1)
    rounded = curvature_rank1(*args, config=TINY_RANK1, precision="tf32")
    assert np.abs(to_numpy(exact) / expected - 1).max() < 1e-6
    assert 1e-5 < np.abs(to_numpy(rounded) / expected - 1).max() < 1e-2


@forms
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(config, bad):
    # positive numbers: an infinity gives an infinity, and NaN only where a padded 0 meets it
    args = [x.abs() + 0.1 for x in make(5, 3, 19, 18, 3)]
    for k, place in ((2, (1, 17, 18)), (1, (4, 2, 17)), (0, (4, 2, 18))):
        some = [x.clone() for x in args]
        some[k][place] = bad
        assert_rms(full.directional_scores(*some, config=config), scores(*some), 1e-6)
        assert_rms(curvature(*some, config=config), truth(*some), 1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("t", [1, 5, 19])
def test_what_is_not_finite_stays_where_it_belongs_in_rank_one(bad, t):
    args = [x.abs() + 0.1 for x in make_rank1(5, t, 19, 18, 3)]
    for k, place in ((3, (1, 18)), (2, (1, 17)), (1, (4, t - 1, 17)), (0, (4, t - 1, 18))):
        some = [x.clone() for x in args]
        some[k][place] = bad
        result = rank1.directional_scores_rank1(*some, config=TINY_RANK1)
        assert_rms(result, scores_rank1(*some), 1e-6)
        result = curvature_rank1(*some, config=TINY_RANK1)
        assert_rms(result, truth_rank1(*some), 1e-6)


@forms
def test_strides_and_mixed_types(config):
    a = torch.randn(6, 9, 4).permute(1, 2, 0)[::2].bfloat16()
    g = torch.randn(5, 8, 6).double()[:, ::2, ::2]
    U = torch.randn(6, 3, 2).permute(2, 1, 0)
    result = curvature(a, g, U, config=config)
    assert_relative(result, truth(a, g, U), 1e-12)
    # columns of wider arrays are read in place
    a, g, U = torch.randn(20, 9)[:, 1:8], torch.randn(20, 5)[:, :3], torch.randn(2, 4, 9)
    args = a, g, U[:, 1:, 2:]
    assert_close(curvature(*args, config=config), args, truth)
    expanded = a.expand(3, -1, -1), g.expand(3, -1, -1), args[2]
    assert_close(curvature(*expanded, config=config), expanded, truth)


def test_strides_and_mixed_types_of_rank_one():
    a = torch.randn(6, 9, 4).permute(1, 2, 0)[::2].half()
    g = torch.randn(5, 8, 6)[:, ::2, ::2].bfloat16()
    v, w = torch.randn(3, 8).mT[::2], torch.randn(4, 7)[:, 1:]
    args = a, g, v, w
    assert_close(curvature_rank1(*args, config=TINY_RANK1), args, truth_rank1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal_and_inputs_untouched(dtype):
    args, args1 = make(5, 3, 17, 4, 2, dtype), make_rank1(5, 3, 17, 4, 2, dtype)
    runs = [lambda c=c: curvature(*args, config=c) for c in TINY]
    runs += [lambda c=c: full.directional_scores(*args, config=c) for c in TINY]
    runs.append(lambda: rank1.directional_scores_rank1(*args1, config=TINY_RANK1))
    runs.append(lambda: curvature_rank1(*args1, config=TINY_RANK1))
    before = [x.clone() for x in (*args, *args1)]
    for run in runs:
        assert torch.equal(run(), run())
    assert all(torch.equal(x, y) for x, y in zip((*args, *args1), before, strict=True))


@forms
def test_blocks(config):
    args = make(6, 2, 17, 4, 3, torch.float64)
    whole = curvature(*args, config=config)
    for workspace in (1, 100):
        pieces = curvature(*args, config=config, workspace=workspace)
        assert_relative(pieces, whole, 1e-14)
        pieces = full.directional_scores(*args, config=config, workspace=workspace)
        assert_rms(pieces, scores(*args), 1e-14)


def test_blocks_of_rank_one():
    args = make_rank1(5, 3, 17, 4, 2, torch.float64)
    whole = curvature_rank1(*args, config=TINY_RANK1)
    for workspace in (1, 50):
        pieces = curvature_rank1(*args, config=TINY_RANK1, workspace=workspace)
        assert_relative(pieces, whole, 1e-14)
        pieces = rank1.directional_scores_rank1(*args, config=TINY_RANK1, workspace=workspace)
        assert_rms(pieces, scores_rank1(*args), 1e-14)


@pytest.mark.parametrize("form", ["factorised", "contracted"])
def test_a_dead_direction_reads_small_to_full_relative_accuracy(form):
    a, g = torch.randn(50, 2, 4).double(), torch.randn(50, 2, 3).double()
    a[..., 2] *= 1e-9
    U = torch.zeros(1, 3, 4).double()
    U[0, 1, 2] = 1.0
    expected = ((to_numpy(a)[..., 2] * to_numpy(g)[..., 1]).sum(1) ** 2).mean()
    result = curvature(a, g, U, form=form)
    assert_relative(result, np.array([expected]), 1e-13)


def test_the_public_functions_on_the_triton_route():
    args, args1 = make(6, 5, 9, 7, 3), make_rank1(6, 5, 9, 7, 3)
    with backend("triton"):
        assert_close(directional_curvature(*args), args, truth)
        assert_close(directional_curvature(*args[:2], args[2][:1]), (*args[:2], args[2][:1]), truth)
        assert_close(directional_curvature_rank1(*args1), args1, truth_rank1)
        assert directional_curvature_rank1(*make_rank1(2, None, 1, 1, 0)).shape == (0,)
        assert_close(directional_scores(*args), args, scores)
        assert_close(directional_scores_rank1(*args1), args1, scores_rank1)
        assert directional_scores(*make(0, None, 1, 1, 2)).shape == (2, 0)


@pytest.mark.parametrize("name", ["curvature", "scores"])
def test_registered_operators_over_the_kernels(name):
    full_rank = getattr(torch.ops.deaddir, f"directional_{name}").default
    rank_one = getattr(torch.ops.deaddir, f"directional_{name}_rank1").default
    with backend("triton"):
        torch.library.opcheck(full_rank, make(5, 3, 4, 3, 2))
        torch.library.opcheck(rank_one, make_rank1(5, 3, 4, 3, 2))
