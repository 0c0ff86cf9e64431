from __future__ import annotations

import numpy as np
import pytest
import torch
from adam_steps import DTYPES, SHAPES, draw, state_dtype
from compare import EPS, assert_rms, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast import _native
from deaddir_fast._backend import backend
from deaddir_fast.ops import scaled_squares

torch.set_num_threads(1)

SCALES = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture(params=_native.extension.build_info()["isas"] if _native.extension else [])
def isa(request):
    previous = _native.extension.use_isa(request.param)
    yield request.param
    _native.extension.use_isa(previous)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def truth(ws, rows, cols, dims):
    parts = [np.zeros(0)]
    for w, row, col, dim in zip(ws, rows, cols, dims, strict=True):
        scaled = to_numpy(w)
        if row is not None:
            scaled = scaled * to_numpy(row)[:, None]
        if col is not None:
            scaled = scaled * to_numpy(col)
        parts.append((scaled**2).sum(1 - dim))
    return np.concatenate(parts)


def check_values(shapes, dtype, rows, cols, dims):
    x = draw(shapes, dtype, rows=rows, cols=cols)
    before = x.copy()
    result = scaled_squares(x.ws, x.rows, x.cols, dims)
    assert result.dtype == state_dtype(dtype)
    exact = truth(x.ws, x.rows, x.cols, dims)
    assert result.shape == exact.shape
    # A sum of squares has no cancellation: a few roundings of each term and of the partial sums.
    longest = max((max(s) for s in shapes), default=0)
    bound = (6 + longest**0.5) * EPS[result.dtype]
    assert (np.abs(to_numpy(result) - exact) <= bound * exact).all()
    assert all(torch.equal(a, b) for a, b in zip(x.ws, before.ws, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,cols", SCALES)
def test_values(dtype, rows, cols):
    for dims in ([0] * len(SHAPES), [1] * len(SHAPES), [k % 2 for k in range(len(SHAPES))]):
        check_values(SHAPES, dtype, rows, cols, dims)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_values_on_every_instruction_set(isa, dtype, dim):
    with backend("cpu"):
        for rows, cols in SCALES:
            check_values([*SHAPES, (70, 1500), (300, 67)], dtype, rows, cols, [dim] * 12)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(700, 500), (3, 140000), (140000, 3), (1, 200001), (200001, 1)])
def test_large(shape, dim):
    check_values([shape], torch.float32, True, True, [dim])
    check_values([shape, (5, 6)], torch.bfloat16, False, True, [dim, 1 - dim])


def test_long_sums_are_accurate():
    """fp32 alone, one after another, would be off by a hundred roundings and more."""
    w = torch.rand(1, 1_000_000) + 1
    for ws, dim in ((w, 0), (w.mT.contiguous(), 1)):
        result = scaled_squares([ws], [None], [None], [dim])
        assert_rms(result, truth([ws], [None], [None], [dim]), 4 * EPS[torch.float32])


@given(
    shapes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_any_list(shapes, data, seed):
    x = draw(shapes, torch.float64, seed=seed)
    dims = [data.draw(st.integers(0, 1)) for _ in shapes]
    for k in range(len(shapes)):
        x.rows[k] = x.rows[k] if data.draw(st.booleans()) else None
        x.cols[k] = x.cols[k] if data.draw(st.booleans()) else None
    if not shapes:
        assert scaled_squares([], [], [], []).shape == (0,)
        return
    assert_rms(scaled_squares(x.ws, x.rows, x.cols, dims), truth(x.ws, x.rows, x.cols, dims), 1e-14)


def test_unchanged_by_a_rescaling_of_what_is_read():
    """w -> w c and col -> col / c, by powers of two: not a bit changes."""
    x = draw([(9, 70)], torch.float32)
    c = 2.0 ** torch.randint(-8, 9, (70,))
    before = scaled_squares(x.ws, x.rows, x.cols, [0])
    assert torch.equal(scaled_squares([x.ws[0] * c], x.rows, [x.cols[0] / c], [0]), before)
    scaled = scaled_squares([x.ws[0] * 4], x.rows, x.cols, [0])
    assert torch.equal(scaled, before * 16)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(5, 9), (9, 100), (70, 70), (1, 50), (50, 1)])
def test_nan_and_infinity_propagate(shape, dim):
    w = torch.randn(shape)
    at = (shape[0] - 1, shape[1] // 2)
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        bad = w.clone()
        bad[at] = value
        result = scaled_squares([bad], [None], [None], [dim])
        special = result.isnan() if np.isnan(value) else result == float("inf")
        expected = torch.zeros(shape[dim], dtype=torch.bool)
        expected[at[dim]] = True
        assert torch.equal(special, expected)
        assert torch.equal(result.isfinite(), ~expected)


def test_infinite_and_zero_scales():
    for n in (3, 8, 31, 64, 100):
        w = torch.ones(2, n)
        row = torch.tensor([float("inf"), 1.0])
        result = scaled_squares([w], [row], [None], [0])
        assert result.tolist() == [float("inf"), n]
        w[0, 0] = 0.0
        assert scaled_squares([w], [row], [None], [0]).isnan().tolist() == [True, False]
        assert scaled_squares([w], [torch.zeros(2)], [None], [1]).tolist() == [0.0] * n


@pytest.mark.skipif(_native.extension is None, reason=str(_native.why_not))
@pytest.mark.parametrize("dim", [0, 1])
def test_does_not_depend_on_threads_or_company(threads, dim):
    shapes = [(300, 257), (1, 1), (5, 70001), (90000, 1), (3000, 90), (3, 3)]
    x = draw(shapes, torch.float32)
    dims = [dim] * len(shapes)
    results = []
    with backend("cpu"):  # sums of torch do depend on threads
        for count in (1, 2, 3, 7):
            threads(count)
            results.append(scaled_squares(x.ws, x.rows, x.cols, dims))
        lists = zip(x.ws, x.rows, x.cols, strict=True)
        results.append(torch.cat([scaled_squares([w], [r], [c], [dim]) for w, r, c in lists]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_bad_arguments():
    w = torch.ones(4, 5)

    def refuse(error, message, ws=(w,), rows=(None,), cols=(None,), dims=(0,)):
        with pytest.raises(error, match=message):
            scaled_squares(ws, rows, cols, dims)

    refuse(TypeError, r"ws: expected a list of tensors", ws=w)
    refuse(TypeError, r"ws\[0\]: expected a tensor", ws=[3.0])
    refuse(TypeError, r"ws\[0\]: expected dtype", ws=[w.long()])
    refuse(TypeError, r"ws\[0\]: expected a dense", ws=[w.to_sparse()])
    refuse(ValueError, r"ws\[0\]: expected 2 dimensions", ws=[w[0]])
    refuse(ValueError, r"ws\[0\]: expected a contiguous", ws=[w.mT])
    refuse(ValueError, r"ws\[1\]: expected torch.float32 on cpu", ws=[w, w.half()])
    refuse(ValueError, r"ws\[1\]: expected torch.float32 on cpu", ws=[w, w.to("meta")])
    refuse(ValueError, r"rows: expected 1 entries, got 2", rows=[None, None])
    refuse(TypeError, r"rows: expected a list", rows=None)
    refuse(ValueError, r"rows\[0\]: expected size 4", rows=[torch.ones(5)])
    refuse(ValueError, r"cols\[0\]: expected size 5", cols=[torch.ones(4)])
    refuse(TypeError, r"cols\[0\]: expected dtype float32", cols=[torch.ones(5).double()])
    refuse(TypeError, r"rows\[0\]: expected a tensor", rows=[2.0])
    refuse(ValueError, r"rows\[0\]: expected 1 dimensions", rows=[torch.ones(4, 1)])
    refuse(ValueError, r"rows\[0\]: expected a contiguous vector", rows=[torch.ones(8)[::2]])
    refuse(ValueError, r"dims: expected 1 numbers, each 0 or 1", dims=[2])
    refuse(ValueError, r"dims: expected 1 numbers, each 0 or 1", dims=[0, 1])


@pytest.mark.skipif(_native.extension is None, reason=str(_native.why_not))
def test_the_extension_checks_for_itself():
    w, run = torch.ones(4, 5), _native.extension.scaled_squares

    def refuse(error, message, ws=(w,), rows=(None,), cols=(None,), dims=(0,), size=4, threads=1):
        with pytest.raises(error, match=message):
            run(list(ws), list(rows), list(cols), list(dims), torch.ones(size), threads)

    refuse(ValueError, r"rows: expected 1 entries, got 0", rows=[])
    refuse(ValueError, r"dims: expected 1 entries, got 2", dims=[0, 1])
    refuse(ValueError, r"dims: expected 0 or 1, got 2", dims=[2])
    refuse(ValueError, r"rows\[0\]: expected 4 rows", rows=[torch.ones(5)])
    refuse(ValueError, r"cols\[0\]: expected 5 rows", cols=[torch.ones(4)])
    refuse(ValueError, r"cols: expected float64 where", cols=[torch.ones(5).double()])
    refuse(ValueError, r"out: expected size 4", size=5)
    refuse(ValueError, r"out: expected float64", ws=[w.double()])
    refuse(ValueError, r"threads: expected at least 1", threads=0)


def test_gradients_are_refused():
    w = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"ws\[0\]: requires grad.*no_grad"):
        scaled_squares([w], [None], [None], [0])
    with torch.no_grad():
        assert not scaled_squares([w], [None], [None], [0]).requires_grad
    with pytest.raises(RuntimeError, match="no gradient is defined"):
        torch.ops.deaddir.scaled_squares([w], [None], [None], [0]).sum().backward()


def test_registered_operator():
    x = draw([(4, 5), (0, 3), (2, 3)], torch.bfloat16)
    x.rows[0] = x.cols[2] = None
    args = (x.ws, x.rows, x.cols, [0, 1, 1])
    torch.library.opcheck(torch.ops.deaddir.scaled_squares.default, args)


def test_compiles_to_one_node():
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    @torch.compile(fullgraph=True, backend=keep)
    def norms(ws, rows, cols):
        return scaled_squares(ws, rows, cols, [0, 1]).sqrt()

    x = draw([(4, 5), (2, 3)], torch.float32)
    result = norms(x.ws, x.rows, x.cols)
    targets = [str(node.target) for node in graphs[0].nodes if node.op == "call_function"]
    assert "deaddir.scaled_squares.default" in targets
    assert torch.equal(result, scaled_squares(x.ws, x.rows, x.cols, [0, 1]).sqrt())
