"""Values of the kernels for blocks in Triton's interpreter, against fp64 numpy."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from block_lists import CASES, Lists, blocks_of, hyper, products, step, units, wide
from compare import EPS, assert_rms, to_numpy

from deaddir_fast import ops
from deaddir_fast._backend import backend
from deaddir_fast.kernels import _blocks, block_adam, block_products
from deaddir_fast.kernels.block_adam import rounded_at
from deaddir_fast.ops import _adam

pytestmark = pytest.mark.interp

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of few elements, so that small matrices have edges and several pieces."""
    monkeypatch.setattr(_blocks, "TILES", ((2, 64), (16, 16)))
    monkeypatch.setattr(_blocks, "LONG", 32)


def sums_of(lists, group=256):
    out = torch.full((2, lists.count), float("nan"), dtype=wide(lists.dtype))
    block_products.block_products(lists.ws, lists.gs, lists.blocks, lists.dims, out, group=group)
    return out


def take(lists, given, values, *, group=256, **options):
    block_adam.block_adam(
        lists.ws, lists.gs, lists.ms, lists.vs, lists.blocks, lists.dims, *given, values,
        group=group, **options,
    )  # fmt: skip


def assert_step(lists, before, given, values, maximize=False):
    new, ms, vs = step(before, *given, values, maximize)
    bound = BOUND[lists.dtype]
    for k, w in enumerate(lists.ws):
        assert_rms(lists.ms[k], ms[k], bound)
        assert_rms(lists.vs[k], vs[k], bound)
        assert_rms(w, new[k], max(bound, EPS[w.dtype] if w.dtype.itemsize == 2 else 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_products(name, dtype):
    lists = Lists(*CASES[name], dtype)
    assert_rms(sums_of(lists), products(lists), BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_step(name, dtype):
    lists = Lists(*CASES[name], dtype)
    given, before = blocks_of(lists, hyper()), lists.copy()
    take(lists, given, hyper())
    assert_step(lists, before, given, hyper())


@pytest.mark.parametrize("group", [16, 64, 10**6])
def test_large_and_small_blocks(group):
    lists = units(7, 35, torch.float32)
    given, before = blocks_of(lists, hyper(), maximize=True), lists.copy()
    take(lists, given, hyper(), maximize=True, group=group)
    assert_step(lists, before, given, hyper(), maximize=True)
    assert_rms(sums_of(lists, group), products(lists), 1e-6)


def test_many_slots_in_a_block(monkeypatch):
    monkeypatch.setattr(block_products, "JOINS", ((4, 2), (1, 8)))
    lists = Lists([(25, 20), (33, 20)], [0, 1], 2)
    assert_rms(sums_of(lists, 16), products(lists), 1e-13)
    given, before = blocks_of(lists, hyper()), lists.copy()
    take(lists, given, hyper(), group=16)
    assert_step(lists, before, given, hyper())


@pytest.mark.parametrize("group", [1, 256])
def test_a_block_without_norm_takes_an_adamw_step(group):
    lists = units(6, 5)
    lists.ws[0][2], lists.ws[1][2] = 0, 0
    given = blocks_of(lists, hyper())
    given[2][2], given[3][2] = 5.0, 7.0  # read as 0 and 1
    before = lists.copy()
    take(lists, given, hyper(), group=group)
    assert_step(lists, before, given, hyper())


@pytest.mark.parametrize("group", [1, 256])
def test_nan_and_infinity_stay_in_their_blocks(group):
    lists = units(12, 7, torch.float32)
    lists.gs[0][3, 5], lists.gs[2][0, 4] = float("nan"), float("inf")
    given, before = blocks_of(lists, hyper()), lists.copy()
    given[0][12 + 6], given[1][7] = float("nan"), float("nan")
    given[2][8], given[3][9] = float("inf"), float("inf")
    with np.errstate(all="ignore"):
        take(lists, given, hyper(), group=group)
        assert_step(lists, before, given, hyper())
    assert (~lists.ws[0].isfinite().all(1)).nonzero().ravel().tolist() == [3, 7, 8, 9]


@pytest.mark.parametrize("group", [64, 4096])
@pytest.mark.parametrize("dim", [0, 1])
def test_random_bits(dim, group):
    """Without gradient and moments the new value is exact: the bits alone decide."""
    lists = Lists([(2, 3), (11, 67)], [0, dim], 3, torch.bfloat16)
    for ts in (lists.gs, lists.ms, lists.vs):
        for t in ts:
            t.zero_()
    values = _adam.hyper(5, lr=0.125, betas=(0.9, 0.99), eps=1e-6, weight_decay=2.25)
    exact = lists.ws[1].float() * (1 - 0.125 * 2.25)
    zeros, ones = torch.zeros(3), torch.ones(3)
    seed = 2**40 + 2**31 + 9
    take(lists, [ones, zeros, zeros, ones], values, seed=seed, group=group)
    expected = torch.empty_like(lists.ws[1])
    _adam.store(expected, exact, seed, values[7], 1)
    assert torch.equal(lists.ws[1], expected)


def test_offsets_beyond_32_bits_take_other_bits():
    """The kernel's function of the offset is the reference's, past 2^33 too."""
    place = torch.tensor([0, 1, 2**33 - 2, 2**33 - 1, 2**33, 2**33 + 1, 2**34 + 5])
    key = _adam._hash(_adam._hash(_adam._hash(torch.tensor(3)) ^ 4) ^ 0)
    pair = place >> 1
    mixed = _adam._hash(key ^ (pair & 0xFFFFFFFF) ^ _adam._hash(pair >> 32))
    noise = torch.where(place % 2 == 0, mixed & 0xFFFF, mixed >> 16)
    value = torch.full((8,), 1.0 + 2.0**-9)
    out = torch.zeros(8, dtype=torch.bfloat16)
    rounding_kernel[(1,)](torch.cat([place, place[:1]]), value, torch.tensor([int(key)]), out, N=8)
    bits = (value[:7].view(torch.int32).long() + noise) & 0xFFFF0000
    assert torch.equal(out[:7].float(), bits.to(torch.int32).view(torch.float32))


@triton.jit
def rounding_kernel(place_ptr, value_ptr, key_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    key = tl.load(key_ptr).to(tl.uint32)
    place, value = tl.load(place_ptr + lane), tl.load(value_ptr + lane)
    tl.store(out_ptr + lane, rounded_at(value, key, place))


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("group", [1, 50, 700, 10**6])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_covers_every_element_once(name, group, grouped):
    shapes, dims, count = CASES[name]
    blocks = [np.random.randint(count, size=s[d]) for s, d in zip(shapes, dims, strict=True)]
    plan = _blocks.make_plan(shapes, dims, blocks, count, grouped=grouped, group=group)
    seen = [np.zeros(s, dtype=int) for s in shapes]
    owner = np.full(plan.slots, -1)
    for k, line, lines, begin, end, slot in plan.pieces.tolist():
        rows, columns, dim = _blocks.turned(shapes[k], dims[k])
        part = seen[k].reshape(rows, columns)
        part = part if dim == 0 else part.T
        part[line : line + lines, begin:end] += 1
        assert (owner[slot : slot + lines] == -1).all()
        owner[slot : slot + lines] = blocks[k][line : line + lines]
    assert all((x == 1).all() for x in seen)
    assert (owner >= 0).all()
    for r, b in enumerate(plan.ids):
        mine = plan.order[plan.start[r] : plan.start[r + 1]]
        assert np.array_equal(mine, np.flatnonzero(owner == b))
    if not grouped:
        assert len(plan.groups) == 0
    inside = plan.groups[:, 1].max(initial=0)
    assert plan.large[1] == inside
    for begin, end, first, stop in plan.groups.tolist():
        slots = [s + l for *_, n, _, _, s in plan.pieces[begin:end].tolist() for l in range(n)]
        assert set(owner[slots]) == set(plan.ids[first:stop])
        assert stop - first <= _blocks.GROUP_BLOCKS
        assert (
            stop - first == 1
            or sum(n * (e - b) for _, _, n, b, e, _ in plan.pieces[begin:end].tolist()) <= group
        )


def test_units_make_groups_of_neighbours():
    lists = units(64, 40)
    blocks = [b.numpy() for b in lists.blocks]
    shapes = [tuple(w.shape) for w in lists.ws]
    plan = _blocks.make_plan(shapes, lists.dims, blocks, 128, grouped=True, group=640)
    assert plan.large[1] == plan.large[3]  # no large ones
    columns = plan.pieces[plan.pieces[:, 0] == 2]
    assert (columns[:, 2] == 16).all()
    # a row and its bias are in one group
    for begin, end, *_ in plan.groups.tolist():
        group = plan.pieces[begin:end]
        rows = {l for k, f, n, *_ in group.tolist() if k == 0 for l in range(f, f + n)}
        biases = {l for k, f, n, *_ in group.tolist() if k == 1 for l in range(f, f + n)}
        assert rows == biases


def test_a_plan_is_kept_until_the_blocks_change_or_die():
    w = [torch.randn(6, 4)]
    blocks = [torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)]

    def plan():
        return _blocks.plan_of(w, blocks, [0], 3, grouped=True)

    first = plan()
    assert plan() is first
    blocks[0][0] = 2  # seen by its version
    second = plan()
    assert second is not first
    assert second.lines.tolist() == [2, 1, 2, 0, 1, 2]
    blocks[0] = blocks[0].clone()
    gc.collect()
    assert plan() is not second
    with torch.inference_mode():
        blocks[0] = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    assert plan() is not plan()  # no versions are counted there


@pytest.mark.parametrize("bad", [-1, 4])
def test_blocks_out_of_range_change_nothing(bad):
    lists = Lists([(6, 3), (2, 5)], [0, 1], 4)
    given, before = blocks_of(lists, hyper()), lists.copy()
    lists.blocks[1][3] = bad
    with pytest.raises(ValueError, match=r"blocks\[1\]: expected entries from 0 to 3"):
        take(lists, given, hyper())
    with pytest.raises(ValueError, match=r"blocks\[1\]"):
        sums_of(lists)
    assert all(torch.equal(x, y) for x, y in zip(lists.ws, before.ws, strict=True))


# --- the operations -------------------------------------------------------------------------------


def test_the_public_functions():
    lists = units(10, 9, torch.float32)
    given, before = blocks_of(lists, hyper()), lists.copy()
    args = lists.ws, lists.gs, lists.ms, lists.vs, lists.blocks, lists.dims
    versions = [t._version for t in (*lists.ws, *lists.ms, *lists.vs)]
    with backend("triton"):
        result = ops.block_products(lists.ws, lists.gs, lists.blocks, lists.dims, lists.count)
        ops.block_adam(*args, *given, hyper())
    after = [t._version for t in (*lists.ws, *lists.ms, *lists.vs)]
    assert all(x < y for x, y in zip(versions, after, strict=True))
    assert_rms(result, products(before), 1e-6)
    assert_step(lists, before, given, hyper())
    assert to_numpy(result).shape == (2, 20)


def test_registered_operators():
    lists = units(5, 3, torch.float32)
    given = blocks_of(lists, hyper())
    blocks = (lists.blocks, lists.dims)
    with backend("triton"):
        torch.library.opcheck(
            torch.ops.deaddir.block_products.default, (lists.ws, lists.gs, *blocks, lists.count)
        )
        torch.library.opcheck(
            torch.ops.deaddir.block_adam_.default,
            (lists.ws, lists.gs, lists.ms, lists.vs, *blocks, *given, hyper(), False, -1),
        )
