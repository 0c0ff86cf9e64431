"""Values of the kernels for blocks on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from block_lists import Lists, blocks_of, hyper, products, step, units
from compare import EPS, assert_rms

from deaddir_fast import ops
from deaddir_fast._backend import backend
from deaddir_fast.ops import _adam

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
PROBLEMS = {
    "units": lambda dtype: units(300, 700, dtype, "cuda"),
    "wide units": lambda dtype: units(65, 9001, dtype, "cuda"),
    "layers": lambda dtype: Lists(
        [(500, 300), (300, 500), (500, 1)], [0, 1, 0], 2, dtype, device="cuda"
    ),
    "odd": lambda dtype: Lists(
        [(1, 1), (33, 7), (0, 4), (1000, 3), (3, 1000)], [0, 1, 0, 1, 0], 40, dtype, device="cuda"
    ),
}


def take(lists, given, values, **options):
    with backend("triton"):
        ops.block_adam(
            lists.ws, lists.gs, lists.ms, lists.vs, lists.blocks, lists.dims, *given, values,
            **options,
        )  # fmt: skip


def sums_of(lists):
    with backend("triton"):
        return ops.block_products(lists.ws, lists.gs, lists.blocks, lists.dims, lists.count)


def same(first, second):
    return all(
        torch.equal(x, y)
        for name in ("ws", "ms", "vs")
        for x, y in zip(getattr(first, name), getattr(second, name), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_values(name, dtype):
    lists = PROBLEMS[name](dtype)
    values = hyper(device="cuda")
    result = sums_of(lists)
    assert torch.equal(result, sums_of(lists))
    assert_rms(result, products(lists), BOUND[dtype])
    given, before, again = blocks_of(lists, values), lists.copy(), lists.copy()
    take(lists, given, values)
    take(again, given, values)
    assert same(lists, again)
    new, ms, vs = step(before, *given, values)
    for k, w in enumerate(lists.ws):
        assert_rms(lists.ms[k], ms[k], BOUND[dtype])
        assert_rms(lists.vs[k], vs[k], BOUND[dtype])
        assert_rms(w, new[k], max(BOUND[dtype], EPS[dtype] if dtype.itemsize == 2 else 0))


def test_random_bits():
    lists = Lists([(2, 3), (301, 607)], [0, 1], 3, torch.bfloat16, device="cuda")
    for ts in (lists.gs, lists.ms, lists.vs):
        for t in ts:
            t.zero_()
    values = _adam.hyper(
        5, lr=0.125, betas=(0.9, 0.99), eps=1e-6, weight_decay=2.25,
        device=torch.device("cuda"),
    )  # fmt: skip
    exact = lists.ws[1].float() * (1 - 0.125 * 2.25)
    zeros, ones = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    take(lists, [ones, zeros, zeros, ones], values, seed=9)
    expected = torch.empty_like(lists.ws[1])
    _adam.store(expected, exact, 9, values[7], 1)
    assert torch.equal(lists.ws[1], expected)


def test_a_graph_can_be_captured():
    lists = units(100, 200, torch.float32, "cuda")
    values = hyper(device="cuda")
    given, captured, first = blocks_of(lists, values), lists.copy(), lists.copy()
    take(first, given, values)
    take(captured, given, values)  # its tables are built here
    for name in ("ws", "ms", "vs"):
        for x, y in zip(getattr(captured, name), getattr(lists, name), strict=True):
            x.copy_(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(captured, given, values)
    graph.replay()
    assert same(first, captured)
    fresh = units(100, 200, torch.float32, "cuda")
    with pytest.raises(RuntimeError, match="captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sums_of(fresh)
