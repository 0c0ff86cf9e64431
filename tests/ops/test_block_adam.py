from __future__ import annotations

import numpy as np
import pytest
import torch
from block_lists import CASES, Lists, blocks_of, hyper, step, sums, units
from compare import EPS, assert_relative, assert_rms, to_numpy

from deaddir_fast import _native
from deaddir_fast.ops import _adam, block_adam, block_products

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}


def take(lists, given, values, **options):
    block_adam(
        lists.ws, lists.gs, lists.ms, lists.vs, lists.blocks, lists.dims, *given, values, **options
    )


def assert_step(lists, before, given, values, maximize=False):
    """``lists`` has taken the step from ``before``; parameters of 16 bits are rounded besides."""
    new, ms, vs = step(before, *given, values, maximize)
    bound = BOUND[lists.dtype]
    for k, w in enumerate(lists.ws):
        assert_rms(lists.ms[k], ms[k], bound)
        assert_rms(lists.vs[k], vs[k], bound)
        assert_rms(w, new[k], max(bound, EPS[w.dtype] if w.dtype.itemsize == 2 else 0))
    for name in ("gs", "blocks"):
        pairs = zip(getattr(lists, name), getattr(before, name), strict=True)
        assert all(np.array_equal(to_numpy(x), to_numpy(y), equal_nan=True) for x, y in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype):
    lists = Lists(*CASES[name], dtype)
    given, before = blocks_of(lists, hyper()), lists.copy()
    take(lists, given, hyper())
    assert_step(lists, before, given, hyper())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shapes", "dims", "count"),
    [
        ([(3, 90001)], [0], 3),  # lines too long for a group
        ([(70001, 3)], [1], 3),
        ([(400, 700), (400, 1)], [1, 0], 1),  # a layer is a block
        ([(300, 200), (200, 300)], [0, 1], 90),
        ([(300, 5001)], [1], 5),  # wider than a panel
        ([(20, 9001), (9001, 1)], [1, 0], 9001),
        ([(2, 9), (3, 40000), (9, 5)], [0, 0, 1], 4),  # large and small ones
    ],
)
def test_large(shapes, dims, count, dtype):
    lists = Lists(shapes, dims, count, dtype)
    given, before = blocks_of(lists, hyper()), lists.copy()
    take(lists, given, hyper())
    assert_step(lists, before, given, hyper())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_units(dtype):
    lists = units(150, 70, dtype)
    given, before = blocks_of(lists, hyper()), lists.copy()
    take(lists, given, hyper())
    assert_step(lists, before, given, hyper())


def test_maximize():
    lists = units(7, 5)
    given, before = blocks_of(lists, hyper(), maximize=True), lists.copy()
    take(lists, given, hyper(), maximize=True)
    assert_step(lists, before, given, hyper(), maximize=True)


def test_one_large_block_is_adamw_without_the_projections():
    # with rho = 1, inner = 0, and u orthogonal to w nothing is left but AdamW
    w, g = torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    w[:, :3], g[:, 3:] = torch.randn(4, 3), torch.randn(4, 3)
    w /= torch.linalg.matrix_norm(w)
    parameter = torch.nn.Parameter(w.clone())
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.0}
    adamw = torch.optim.AdamW([parameter], **options)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    block = torch.zeros(4, dtype=torch.int32)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    parameter.grad = g
    adamw.step()
    values = _adam.hyper(1, **options)
    block_adam([w], [g], [m], [v], [block], [0], one, zero, zero, one, values)
    assert_relative(w, parameter.detach(), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_without_norm_takes_an_adamw_step(dtype):
    lists = units(6, 5, dtype)
    j = 2
    lists.ws[0][j], lists.ws[1][j] = 0, 0
    for ts in (lists.ms, lists.vs):
        ts[0][j], ts[1][j] = 0, 0
    parameter = torch.nn.Parameter(lists.ws[0][j].clone())
    options = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.2}
    adamw = torch.optim.AdamW([parameter], **options)
    parameter.grad = lists.gs[0][j].clone()
    adamw.step()
    values, before = _adam.hyper(1, **options), lists.copy()
    given = blocks_of(lists, values)
    assert given[0][j] == 0
    given[2][j], given[3][j] = 5.0, 7.0  # read as 0 and 1
    take(lists, given, values)
    bound = 1e-13 if dtype == torch.float64 else 1e-6
    assert_relative(lists.ws[0][j], parameter.detach(), bound)
    assert_step(lists, before, given, values)


@pytest.mark.parametrize("c", [2.0**-7, 8.0, 3.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_moves_with_the_scales_of_its_blocks(dtype, c):
    """Several steps from w and from c w, g / c with norms and inner products of their own."""
    first = units(9, 12, dtype)
    other = first.copy()
    scale = torch.ones(first.count, dtype=torch.float64)
    scale[::2] = c

    def scales(k):
        chosen = scale[first.blocks[k].long()].to(dtype)
        return chosen[:, None] if first.dims[k] == 0 else chosen

    other.ws = [w * scales(k) for k, w in enumerate(first.ws)]
    for number in range(1, 4):
        values = hyper(number, weight_decay=0.1)
        keep = 1 - float(values[0] * values[4])
        gs = [torch.randn(g.shape, dtype=torch.float64).to(dtype) for g in first.gs]
        radial = 0.1 * torch.randn(first.count).to(dtype)
        for lists in (first, other):
            lists.gs = gs if lists is first else [g / scales(k) for k, g in enumerate(gs)]
            squares, inner = block_products(
                lists.ws, lists.gs, lists.blocks, lists.dims, lists.count
            )
            norms = keep * squares.sqrt()
            take(lists, [norms, keep * inner, radial, norms], values)
    exact = c == 2.0 ** round(np.log2(c))
    bound = {torch.float64: 1e-12, torch.float32: 2e-4}[dtype]
    for k in range(len(first.ws)):
        if exact:  # a power of two changes no rounding
            assert torch.equal(other.ms[k], first.ms[k])
            assert torch.equal(other.vs[k], first.vs[k])
            assert torch.equal(other.ws[k], first.ws[k] * scales(k))
        else:
            assert_rms(other.ms[k], first.ms[k], bound)
            assert_rms(other.vs[k], first.vs[k], bound)
            assert_rms(other.ws[k], first.ws[k] * scales(k), bound)


def test_what_moves_is_tangential():
    lists = Lists([(20, 30), (30, 20), (20, 1)], [0, 1, 0], 8)
    values = hyper(weight_decay=0.0)
    given, before = blocks_of(lists, values, radial=0), lists.copy()
    take(lists, given, values)
    moved = [w - old for w, old in zip(lists.ws, before.ws, strict=True)]
    along = sums(moved, before.ws, lists.blocks, lists.dims, lists.count)
    size = np.sqrt(sums(moved, moved, lists.blocks, lists.dims, lists.count))
    assert (size > 1e-3).all()
    assert (np.abs(along) <= 1e-13 * size * to_numpy(given[0])).all()


def test_radial_alone_scales_the_blocks():
    lists = units(4, 3)
    values, before = hyper(lr=0.0), lists.copy()
    given = blocks_of(lists, values)
    take(lists, given, values)
    for k, w in enumerate(lists.ws):
        grow = torch.exp(given[2])[lists.blocks[k].long()]
        grow = grow[:, None] if lists.dims[k] == 0 else grow
        assert_relative(w, before.ws[k] * grow, 1e-15)


def test_nan_and_infinity_stay_in_their_blocks():
    lists = units(20, 10, torch.float32)
    lists.gs[0][3, 5] = float("nan")
    lists.gs[2][0, 4] = float("inf")
    given, before = blocks_of(lists, hyper()), lists.copy()
    given[0][20 + 6] = float("nan")  # outside of the chart: a step of AdamW
    given[1][7] = float("nan")
    given[2][8] = float("inf")
    given[3][9] = float("inf")
    take(lists, given, hyper())
    with np.errstate(invalid="ignore"):
        assert_step(lists, before, given, hyper())
    broken = ~lists.ws[0].isfinite().all(1)
    assert broken.nonzero().ravel().tolist() == [3, 7, 8, 9]
    broken = ~lists.ws[2].isfinite().all(0)
    assert broken.nonzero().ravel().tolist() == [4]


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(3, 1201), (40, 67), (301, 33), (5, 1)])
def test_random_bits(shape, dim, seed):
    """Without gradient and moments the new value is exact: the bits alone decide."""
    lists = Lists([(2, 3), shape], [0, dim], 3, torch.bfloat16)
    for ts in (lists.gs, lists.ms, lists.vs):
        for t in ts:
            t.zero_()
    values = _adam.hyper(5, lr=0.125, betas=(0.9, 0.99), eps=1e-6, weight_decay=2.25)
    keep = 1 - 0.125 * 2.25
    zeros = torch.zeros(3)
    old = lists.ws[1].clone()
    take(lists, [torch.ones(3), zeros, zeros, torch.ones(3)], values, seed=seed)
    exact = old.float() * keep
    expected = torch.empty_like(old)
    _adam.store(expected, exact, seed, values[7], 1)
    assert torch.equal(lists.ws[1], expected)
    if old.numel() > 100:
        down = (expected.float() - exact).sign()
        assert (down > 0).any() and (down < 0).any()
    # rounding is to a neighbour
    assert ((expected.float() - exact).abs() <= exact.abs() * 2.0**-7).all()


def test_stochastic_rounding_of_a_whole_step():
    lists = units(60, 50, torch.bfloat16)
    given, before, nearest = blocks_of(lists, hyper()), lists.copy(), lists.copy()
    again = lists.copy()
    take(lists, given, hyper(), seed=7)
    take(again, given, hyper(), seed=7)
    take(nearest, given, hyper())
    new, _, _ = step(before, *given, hyper())
    for k, w in enumerate(lists.ws):
        assert torch.equal(w, again.ws[k])
        expected = torch.empty_like(w)
        _adam.store(expected, torch.from_numpy(new[k]).float(), 7, hyper()[7], k)
        differ = (w != expected).double().mean()  # a last bit of fp32 rarely tips the balance
        assert differ <= 2e-3
        assert torch.equal(lists.ms[k], nearest.ms[k])
    assert any((w != n).any() for w, n in zip(lists.ws, nearest.ws, strict=True))


@pytest.mark.skipif(_native.extension is None, reason="no C++ here")
def test_the_result_does_not_depend_on_the_threads():
    shapes, dims = [(120, 513), (513, 301), (120, 1), (2, 70000)], [0, 1, 0, 0]
    start = Lists(shapes, dims, 421, torch.bfloat16)
    given = blocks_of(start, hyper())
    results = []
    for threads in (1, 2, 3, 5):
        lists = start.copy()
        _native.extension.block_adam(
            lists.ws, lists.gs, lists.ms, lists.vs, lists.blocks, dims, *given, hyper(), False, 3,
            threads,
        )  # fmt: skip
        results.append((*lists.ws, *lists.ms, *lists.vs))
    assert_step_moments = step(start, *given, hyper())
    assert_rms(results[0][4], assert_step_moments[1][0], 3e-6)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.skipif(_native.extension is None, reason="no C++ here")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(dtype):
    before_isa = _native.extension.build_info()["isa"]
    try:
        for isa in _native.extension.build_info()["isas"]:
            _native.extension.use_isa(isa)
            lists = Lists([(30, 67), (67, 30), (2, 40000)], [0, 1, 0], 50, dtype)
            given, before = blocks_of(lists, hyper()), lists.copy()
            take(lists, given, hyper())
            assert_step(lists, before, given, hyper())
    finally:
        _native.extension.use_isa(before_isa)


def test_parameters_are_written_and_seen_to_be(forced_route):
    lists = units(3, 4, torch.float32)
    parameters = [torch.nn.Parameter(w) for w in lists.ws]
    lists.ws = parameters
    given = blocks_of(lists, hyper())
    versions = [t._version for t in (*parameters, *lists.ms, *lists.vs)]
    with pytest.raises(RuntimeError, match=r"ws\[0\]: requires grad"):
        take(lists, given, hyper())
    with torch.no_grad():
        take(lists, given, hyper())
    after = [t._version for t in (*parameters, *lists.ms, *lists.vs)]
    assert all(x < y for x, y in zip(versions, after, strict=True))


@pytest.mark.parametrize("bad", [-1, 4])
def test_blocks_out_of_range_change_nothing(bad, forced_route):
    if forced_route == "reference":
        pytest.skip("torch indexes from the end, too")
    lists = Lists([(6, 3), (2, 5)], [0, 1], 4)
    given, before = blocks_of(lists, hyper()), lists.copy()
    lists.blocks[1][3] = bad
    with pytest.raises(ValueError, match=r"blocks\[1\]: expected entries from 0 to 3"):
        take(lists, given, hyper())
    for name in ("ws", "ms", "vs"):
        pairs = zip(getattr(lists, name), getattr(before, name), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_bad_arguments():
    lists = Lists([(3, 4), (5, 2)], [0, 1], 4, torch.float32)
    given = blocks_of(lists, hyper())

    def call(error, match, vectors=given, values=None, **change):
        other = lists.copy()
        for name, value in change.items():
            setattr(other, name, value)
        with pytest.raises(error, match=match):
            take(other, vectors, hyper() if values is None else values)

    short = [given[0], given[1][:3], *given[2:]]
    wide = [given[0].double(), *given[1:]]
    call(ValueError, "inner", vectors=short)
    call((ValueError, TypeError), "norms", vectors=wide)
    call(ValueError, "gs", gs=lists.gs[:1])
    call(ValueError, r"vs\[1\]", vs=[lists.vs[0], lists.vs[1][:, :1].contiguous()])
    call((ValueError, TypeError), r"ms\[0\]", ms=[m.double() for m in lists.ms])
    call((ValueError, TypeError), r"blocks\[0\]", blocks=[b.long() for b in lists.blocks])
    call(ValueError, r"blocks\[0\]", dims=[1, 1])
    call(ValueError, "dims", dims=[0])
    call(ValueError, "hyper", values=hyper()[:5])
    with pytest.raises((ValueError, TypeError), match="seed"):
        take(lists.copy(), given, hyper(), seed=-2)


def test_registered_operator():
    lists = units(5, 3, torch.float32)
    given = blocks_of(lists, hyper())
    torch.library.opcheck(
        torch.ops.deaddir.block_adam_.default,
        (lists.ws, lists.gs, lists.ms, lists.vs, lists.blocks, lists.dims, *given, hyper(),
         False, -1),
    )  # fmt: skip
