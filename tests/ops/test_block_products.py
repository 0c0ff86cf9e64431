from __future__ import annotations

import numpy as np
import pytest
import torch
from block_lists import CASES, Lists, products, units
from compare import to_numpy

from deaddir_fast import _native
from deaddir_fast.ops import block_products

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def call(lists):
    return block_products(lists.ws, lists.gs, lists.blocks, lists.dims, lists.count)


def assert_products(result, lists):
    """Errors are relative to the sums of absolute values."""
    absolute = lists.copy()
    absolute.ws, absolute.gs = ([t.abs() for t in ts] for ts in (lists.ws, lists.gs))
    bound = 1e-13 if lists.dtype == torch.float64 else 4e-6
    assert result.shape == (2, lists.count)
    error = np.abs(to_numpy(result) - products(lists))
    assert (error <= bound * products(absolute)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype):
    lists = Lists(*CASES[name], dtype)
    result = call(lists)
    if lists.ws:
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_products(result, lists)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(3, 40001), (4001, 3), (400, 700)])
def test_long_lines(shape, dim, dtype):
    lists = Lists([shape], [dim], 7, dtype)
    assert_products(call(lists), lists)


def test_exact_integers():
    lists = units(20, 9, torch.float32)
    for ts in (lists.ws, lists.gs):
        for t in ts:
            t.copy_(torch.randint(-8, 9, t.shape))
    assert np.array_equal(to_numpy(call(lists)), products(lists))


def test_a_block_of_a_whole_layer():
    x = torch.randn(60, 50).double()
    zeros = torch.zeros(60, dtype=torch.int32), torch.zeros(50, dtype=torch.int32)
    for dim in (0, 1):
        result = block_products([x], [x], [zeros[dim]], [dim], 1)
        norm = torch.linalg.matrix_norm(x) ** 2
        assert torch.allclose(result, torch.stack([norm, norm])[:, None], rtol=1e-14)


def test_nan_and_infinity_stay_in_their_blocks():
    lists = units(30, 20, torch.float32)
    lists.ws[0][3, 5] = float("nan")
    lists.gs[0][7, 0] = float("inf")
    lists.gs[2][4, 9] = float("nan")
    result = to_numpy(call(lists))
    assert np.flatnonzero(np.isnan(result[0])).tolist() == [3]
    assert np.flatnonzero(~np.isfinite(result[1])).tolist() == [3, 7, 30 + 9]


@pytest.mark.skipif(_native.extension is None, reason="no C++ here")
def test_the_result_does_not_depend_on_the_threads():
    lists = Lists([(301, 513), (513, 301), (301, 1)], [0, 1, 0], 37, torch.float32)
    results = []
    for threads in (1, 2, 3, 5):
        out = torch.full((2, 37), float("nan"))
        _native.extension.block_products(lists.ws, lists.gs, lists.blocks, lists.dims, out, threads)
        results.append(out)
    assert_products(results[0], lists)
    assert all(torch.equal(results[0], other) for other in results)


def test_every_instruction_set():
    if _native.extension is None:
        pytest.skip("no C++ here")
    lists = Lists([(30, 67), (67, 30)], [0, 1], 5, torch.float32)
    before = _native.extension.build_info()["isa"]
    try:
        for isa in _native.extension.build_info()["isas"]:
            _native.extension.use_isa(isa)
            assert_products(call(lists), lists)
    finally:
        _native.extension.use_isa(before)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_blocks_out_of_range(bad, forced_route):
    lists = Lists([(6, 3)], [0], 4)
    lists.blocks[0][2] = bad
    error = ValueError if forced_route == "cpu" else (IndexError, RuntimeError)
    with pytest.raises(error, match=r"blocks\[0\]" if forced_route == "cpu" else "index"):
        call(lists)


def test_bad_arguments():
    lists = Lists([(3, 4), (5, 2)], [0, 1], 4)
    ws, gs, blocks = lists.ws, lists.gs, lists.blocks
    cases = [
        ((ws, gs[:1], blocks, [0, 1], 4), ValueError, "gs"),
        ((ws, [gs[0], gs[1].T.contiguous()], blocks, [0, 1], 4), ValueError, r"gs\[1\]"),
        ((ws, [g.float() for g in gs], blocks, [0, 1], 4), (ValueError, TypeError), r"gs\[0\]"),
        ((ws, gs, blocks[:1], [0, 1], 4), ValueError, "blocks"),
        ((ws, gs, [blocks[0], None], [0, 1], 4), TypeError, r"blocks\[1\]"),
        ((ws, gs, [b.long() for b in blocks], [0, 1], 4), (ValueError, TypeError), r"blocks\[0\]"),
        ((ws, gs, blocks, [0, 0], 4), ValueError, r"blocks\[1\]"),
        ((ws, gs, blocks, [0, 2], 4), ValueError, "dims"),
        ((ws, gs, blocks, [0], 4), ValueError, "dims"),
        ((ws, gs, blocks, [0, 1], -1), ValueError, "count"),
        ((ws[0], gs, blocks, [0, 1], 4), TypeError, "ws"),
        (([ws[0].T, ws[1]], gs, blocks, [0, 1], 4), ValueError, r"ws\[0\]"),
    ]
    for args, error, match in cases:
        with pytest.raises(error, match=match):
            block_products(*args)
    ws[1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"ws\[1\]: requires grad"):
        block_products(ws, gs, blocks, [0, 1], 4)


def test_registered_operator():
    lists = units(5, 3, torch.float32)
    torch.library.opcheck(
        torch.ops.deaddir.block_products.default,
        (lists.ws, lists.gs, lists.blocks, lists.dims, lists.count),
    )
