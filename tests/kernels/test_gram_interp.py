"""Values of the Gram kernel in Triton's interpreter, against fp64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compare import EPS, assert_rms, to_numpy

from deaddir_fast._backend import backend
from deaddir_fast.kernels import gram as kernel
from deaddir_fast.kernels.gram import Config, tiles, triangle
from deaddir_fast.ops import gram, gram_packed

pytestmark = pytest.mark.interp

TINY = Config(16, 16, 1, 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (17, 16), (33, 37), (40, 48), (0, 7)]


def truth(x, weight, out, alpha, beta):
    x = to_numpy(x)
    w = np.ones(len(x)) if weight is None else to_numpy(weight)
    lower = np.tril(to_numpy(out)) if beta else np.zeros((x.shape[1],) * 2)
    return alpha * (x.T * w) @ x + beta * (lower + np.tril(lower, -1).T)


def scale(x, weight, out, alpha, beta):
    parts = [np.abs(to_numpy(v)) if v is not None else None for v in (x, weight, out)]
    return truth(*parts, abs(alpha), abs(beta)).max(initial=1e-300)


@triton.jit
def decode_kernel(t_ptr, row_ptr, column_ptr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    row, column = triangle(tl.load(t_ptr + offset))
    tl.store(row_ptr + offset, row)
    tl.store(column_ptr + offset, column)


def decode(t):
    t = torch.tensor(t, dtype=torch.int64)
    row, column = torch.empty_like(t), torch.empty_like(t)
    decode_kernel[(1,)](t, row, column, BLOCK=len(t))
    return row, column


def test_the_grid_counts_the_triangle_row_by_row():
    row, column = decode(list(range(64)))
    expected = [(r, c) for r in range(11) for c in range(r + 1)][:64]
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == expected


def test_the_grid_is_exact_where_the_fp32_root_is_not():
    for r in (2**12, 2**16 - 1, 2**16, 2**20 - 1, 2**22 - 1):
        first = r * (r + 1) // 2
        row, column = decode([first - 1, first, first + r, first + r + 1])
        assert row.tolist() == [r - 1, r, r, r + 1]
        assert column.tolist() == [r - 1, 0, r, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.1, 0.9)])
def test_values(shape, dtype, weighted, alpha, beta):
    x = torch.randn(shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(shape[0], dtype=wide) if weighted else None
    out = torch.randn(shape[1], shape[1], dtype=wide)
    expected, size = truth(x, weight, out, alpha, beta), scale(x, weight, out, alpha, beta)
    if not beta:
        out.fill_(float("nan"))  # not read
    kernel.gram(out, x, weight, alpha, beta, config=TINY)
    assert torch.equal(out, out.mT)
    assert np.abs(to_numpy(out) - expected).max() <= 8 * EPS[wide] * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (33, 37), (20, 16)])
@pytest.mark.parametrize("beta", [0.0, -0.5])
def test_packed_is_the_lower_triangle(shape, dtype, beta):
    x = torch.randn(shape).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(shape[0], dtype=wide)
    square = torch.randn(shape[1], shape[1], dtype=wide)
    index = torch.tril_indices(shape[1], shape[1])
    out = square[index[0], index[1]]
    kernel.gram(out, x, weight, 0.3, beta, packed=True, config=TINY)
    kernel.gram(square, x, weight, 0.3, beta, config=TINY)
    assert torch.equal(out, square[index[0], index[1]])


@pytest.mark.parametrize("config", [c for configs in kernel.CONFIGS.values() for c in configs])
def test_shipped_tiles(config):
    i = config.block + 3
    x, out = torch.randn(config.depth + 1, i), torch.empty(i, i)
    kernel.gram(out, x, None, 1.0, 0.0, config=config)
    expected = truth(x, None, out, 1.0, 0.0)
    assert np.abs(to_numpy(out) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_bf16_operands_as_the_matrix_units_take_them():
    x, out = torch.randn(33, 20).bfloat16(), torch.empty(20, 20)
    kernel.gram(out, x, None, 1.0, 0.0, config=TINY, widen=False)
    assert np.abs(to_numpy(out) - truth(x, None, out, 1.0, 0.0)).max() <= 1e-5 * 33


def test_precision_is_obeyed():
    x, exact, rounded = torch.randn(64, 16), torch.empty(16, 16), torch.empty(16, 16)
    kernel.gram(exact, x, None, 1.0, 0.0, config=TINY)
    kernel.gram(rounded, x, None, 1.0, 0.0, config=TINY, precision="tf32")
    expected = truth(x, None, exact, 1.0, 0.0)
    assert np.abs(to_numpy(exact) - expected).max() <= 1e-6 * 64
    assert np.abs(to_numpy(rounded) - expected).max() > 1e-4


def test_strided_input_and_output():
    x = torch.randn(20, 30).mT[::2]
    out = torch.full((20, 33), 5.0)
    kernel.gram(out[:, :20], x, None, 1.0, 0.0, config=TINY)
    assert np.abs(to_numpy(out[:, :20]) - truth(x, None, out, 1.0, 0.0)).max() <= 1e-4
    assert (out[:, 20:] == 5).all()


def test_neighbours_of_the_output_are_not_touched():
    memory = torch.full((3 * 37 * 37,), 5.0)
    out = memory[37 * 37 : 2 * 37 * 37].view(37, 37)
    kernel.gram(out, torch.randn(9, 37), None, 1.0, 0.0, config=TINY)
    assert (memory[: 37 * 37] == 5).all()
    assert (memory[2 * 37 * 37 :] == 5).all()


def test_nan_and_infinity_propagate():
    x = torch.randn(9, 20)
    x[4, 3], x[5, 17] = float("nan"), float("inf")
    out = torch.empty(20, 20)
    kernel.gram(out, x, None, 1.0, 0.0, config=TINY)
    with np.errstate(invalid="ignore"):
        assert_rms(out, truth(x, None, out, 1.0, 0.0), 1e-6)


def test_no_inputs():
    kernel.gram(torch.empty(0, 0), torch.randn(4, 0), None, 1.0, 0.0)
    assert tiles(0, 16) == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_the_public_function_on_the_triton_route(weighted):
    x = torch.randn(21, 9).double()
    weight = torch.rand(21) if weighted else None
    for out_stride in (1, 2):
        out = torch.randn(9, 9 * out_stride).double()[:, ::out_stride]
        expected = gram(x, weight=weight, out=out.clone(), alpha=0.1, beta=0.9)
        version = out._version
        with backend("triton"):
            assert gram(x, weight=weight, out=out, alpha=0.1, beta=0.9) is out
            assert out._version > version
            assert np.abs(to_numpy(out - expected)).max() <= 1e-14
            packed = gram_packed(x, weight=weight)
        assert np.abs(to_numpy(packed - gram_packed(x, weight=weight))).max() <= 1e-13


def test_inference_tensors():
    with backend("triton"), torch.inference_mode():
        x, out = torch.randn(9, 5), torch.zeros(5, 5)
        gram(x, out=out)
        assert_rms(out, truth(x, None, out, 1.0, 0.0), 1e-6)


def test_registered_operator_over_the_kernel():
    with backend("triton"):
        x, weight = torch.randn(9, 5), torch.rand(9)
        torch.library.opcheck(torch.ops.deaddir.gram.default, (x, weight, 0.5))
        out = torch.zeros(5, 5)
        torch.library.opcheck(torch.ops.deaddir.gram_.default, (out, x, weight, 0.5, 0.9))
