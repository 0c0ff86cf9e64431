"""Optimizer steps of the Triton kernels in the interpreter, against numpy, bit by bit."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compare import assert_relative
from numpy_steps import BF16, F16, F32, F64, Problem, draw, hyper, noise, take

from deaddir_fast._backend import backend
from deaddir_fast.kernels import _adam as adam
from deaddir_fast.kernels import _groups as groups
from deaddir_fast.kernels import _lists as lists
from deaddir_fast.kernels import scaled_adam as scaled_kernel
from deaddir_fast.kernels import scaled_squares as squares_kernel
from deaddir_fast.kernels import shared_adam as shared_kernel
from deaddir_fast.ops import scaled_adam, scaled_squares, shared_adam

pytestmark = [
    pytest.mark.interp,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on empty groups and NaN
]

#: One element, rows longer and shorter than a block, none at all, ragged and even widths.
SHAPES = [(5, 7), (3, 1030), (70, 24), (1, 2100), (1, 1), (0, 4), (4, 0), (130, 1)]
BOUND = {F64: 1e-12, F32: 3e-6}


@pytest.fixture(autouse=True)
def forced_route():
    with backend("triton"):
        yield


def assert_same(result: Problem, truth: Problem) -> None:
    for name in ("ws", "ms", "vs"):
        for k, (a, b) in enumerate(zip(getattr(result, name), getattr(truth, name), strict=True)):
            assert torch.equal(a, b), f"{name}[{k}] {tuple(a.shape)}"


# --------------------------------------------------------------------------------------- squares


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("scaled", [(False, False), (True, True), (True, False), (False, True)])
def test_sums_of_squares(dtype, scaled):
    shapes = [(5, 7), (33, 136), (140, 64), (3, 2100), (1, 1), (0, 4), (4, 0)]
    p = draw(shapes, dtype, rows=scaled[0], cols=scaled[1])
    for dims in ([0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1]):
        truth = []
        for w, row, col, dim in zip(p.ws, p.rows, p.cols, dims, strict=True):
            x = w.double().numpy()
            x = x if row is None else x * row.double().numpy()[:, None]
            x = x if col is None else x * col.double().numpy()
            truth.append((x**2).sum(1 - dim))
        result = scaled_squares(p.ws, p.rows, p.cols, dims)
        assert_relative(result, np.concatenate(truth), BOUND[result.dtype])
        if dtype != F32 or not all(scaled):
            continue
        # no matrix depends on the others of the list
        for k, part in enumerate(result.split([len(t) for t in truth])):
            alone = scaled_squares([p.ws[k]], [p.rows[k]], [p.cols[k]], [dims[k]])
            assert torch.equal(alone, part)


def test_squares_of_unaligned_matrices_and_of_what_is_not_finite():
    base = torch.randn(1 + 6 * 64)
    w = base[1:].view(6, 64)
    assert w.data_ptr() % 16 != 0
    truth = w.double().square().sum(1)
    assert_relative(scaled_squares([w], [None], [None], [0]), truth, 3e-6)
    w[2, 5] = float("nan")
    w[4, 1] = float("inf")
    result = scaled_squares([w], [None], [None], [0])
    assert result.isnan().tolist() == [False, False, True, False, False, False]
    assert result[4] == float("inf")
    # an infinite scale spoils its row alone: no lane outside the matrix multiplies it by zero
    row = torch.tensor([1.0, float("inf"), 1.0])
    result = scaled_squares([torch.ones(3, 5)], [row], [None], [0])
    assert result.tolist() == [5.0, float("inf"), 5.0]


# ------------------------------------------------------------------------------------------ step


@pytest.mark.parametrize(
    ("dtype", "seed"), [(F64, -1), (F32, -1), (F16, -1), (BF16, -1), (BF16, 3)]
)
@pytest.mark.parametrize("scaled", [(False, False), (True, True), (True, False), (False, True)])
def test_a_step(dtype, seed, scaled):
    problem = draw(SHAPES, dtype, rows=scaled[0], cols=scaled[1])
    result = problem.copy()
    maximize = scaled == (True, False)
    scaled_adam(*result.args(), hyper(), maximize=maximize, seed=seed)
    assert_same(result, take(problem, maximize, seed))
    for a, b in zip(result.gs, problem.gs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_every_cut_of_a_matrix_gives_the_same_bits(dtype):
    problem = draw([(5, 7), (3, 264), (66, 24), (1, 100)], dtype)
    truth = take(problem, False, 11)
    for block, steps in ((32, 1), (32, 3), (128, 2), (2048, 16)):
        result = problem.copy()
        config = adam.Config(block, 1)
        scaled_kernel.scaled_adam(*result.args(), hyper(), seed=11, config=config, steps=steps)
        assert_same(result, truth)


def test_unaligned_matrices():
    problem = draw([(6, 64), (6, 64)], F32)
    result = problem.copy()
    for some in (result.ws, result.vs):
        base = torch.empty(1 + some[1].numel())
        shifted = base[1:].view_as(some[1])
        shifted.copy_(some[1])
        some[1] = shifted
        assert shifted.data_ptr() % 16 != 0
    scaled_adam(*result.args(), hyper())
    assert_same(result, take(problem, False, -1))


def test_random_bits_beyond_32_bits_and_of_every_seed():
    @triton.jit
    def kernel(value_ptr, hyper_ptr, out_ptr, start, seed, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        key = adam.stream_key(seed, hyper_ptr, tl.load(start + 1))
        value = tl.load(value_ptr + lane)
        tl.store(out_ptr + lane, adam.rounded(value, key, tl.load(start), lane))

    value = torch.full((64,), 1.0 + 2.0**-9)  # a quarter of the way to the next bf16
    bits = int(value[:1].view(torch.int32))
    for start in (0, 64, 2**33 - 64, 2**33, 2**33 + 2**20, 5 * 2**34 + 128):
        for seed in (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5):
            out = torch.empty(64, dtype=BF16)
            place = torch.tensor([start, 6])
            kernel[(1,)](value, hyper(), out, place, adam.signed32(seed), BLOCK=64)
            added = noise(np.arange(start, start + 64), seed, 7, 6).tolist()
            expected = [(bits + x) & 0xFFFF0000 for x in added]
            assert out.float().view(torch.int32).tolist() == expected
    assert len(set(noise(np.arange(1000), 5, 7, 6).tolist())) > 980  # of 2^16, about 7 meet


def test_special_values_of_a_stochastic_step():
    problem = draw([(3, 40)], BF16, rows=False, cols=False)
    problem.ws[0][0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.38e38])
    result = problem.copy()
    scaled_adam(*result.args(), hyper(), seed=1)
    with np.errstate(over="ignore"):
        truth = take(problem, False, 1)
    assert torch.equal(result.ws[0].isnan(), truth.ws[0].isnan())
    assert torch.equal(result.ws[0].nan_to_num(), truth.ws[0].nan_to_num())


# ---------------------------------------------------------------------------------------- groups


def blocks(n, size):
    return (torch.arange(n) // size).to(torch.int32)


def pairs(n):
    return (torch.arange(n) % (n // 2)).to(torch.int32)


def scattered(n, count):
    group = torch.randint(0, count, (n,))
    group[:count] = torch.arange(count)
    return group[torch.randperm(n)].to(torch.int32)


def uneven(n):
    """One group of nearly all, the others single."""
    return torch.arange(n).sub(n - 5).clamp(min=0).to(torch.int32)


MAPS = [
    ((32, 40), lambda: (blocks(32, 16), None)),  # heads
    ((16, 24), lambda: (pairs(16), None)),  # rotary pairs
    ((5, 208), lambda: (None, blocks(208, 104))),
    ((6, 64), lambda: (None, pairs(64))),
    ((9, 8), lambda: (None, None)),
    ((300, 20), lambda: (blocks(300, 300), None)),  # more than one piece
    ((20, 8), lambda: (scattered(20, 3), scattered(8, 2))),
    ((9, 1500), lambda: (scattered(9, 2), blocks(1500, 1500))),
    ((8, 128), lambda: (blocks(8, 8), blocks(128, 64))),
    ((50, 130), lambda: (scattered(50, 40), scattered(130, 3))),
    ((60, 7), lambda: (uneven(60), None)),
    ((3, 90), lambda: (uneven(3 + 4)[:3], uneven(90))),
    ((0, 6), lambda: (None, None)),
]


def assert_close(result: Problem, truth: Problem) -> None:
    """m to the bit; v by the rounding of its sums; w by that, or by its own dtype's."""
    for k, (a, b) in enumerate(zip(result.ms, truth.ms, strict=True)):
        assert torch.equal(a, b), f"ms[{k}]"
        assert_relative(result.vs[k], truth.vs[k], BOUND[a.dtype])
        w, expected = result.ws[k].double(), truth.ws[k].double()
        # a step of at most about lr / sqrt(1 - beta2); 16 bits may fall to either side
        slack = {F64: 1e-13, F32: 1e-6, BF16: 2**-8, F16: 2**-11}[result.ws[k].dtype]
        assert ((w - expected).abs() <= slack * (expected.abs() + 0.1)).all(), f"ws[{k}]"


@pytest.mark.parametrize(("dtype", "scaled"), [(F64, True), (F32, False), (BF16, True)])
def test_a_shared_step(dtype, scaled):
    maps = [make() for _, make in MAPS]
    maps = [tuple(None if g is None else g - g.min() for g in pair) for pair in maps]
    problem = draw([s for s, _ in MAPS], dtype, rows=scaled, cols=scaled, groups=maps)
    result, again = problem.copy(), problem.copy()
    shared_adam(*result.args(), hyper(), maximize=scaled)
    assert_close(result, take(problem, scaled, -1))
    # the maps of the copy are other tensors: the same bits from tables built anew
    shared_adam(*again.args(), hyper(), maximize=scaled)
    assert_same(again, result)
    for k in range(len(MAPS) if dtype == F32 else 0):  # alone, whatever the others of the list
        alone = Problem(*([some[k]] for some in problem.copy().args()))
        shared_adam(*alone.args(), hyper(), maximize=scaled)
        assert torch.equal(alone.vs[0], result.vs[k])


def test_a_shared_step_of_single_elements_is_the_unshared_one():
    problem = draw([(9, 8), (20, 33)], F32)
    shared = problem.copy()
    shared_adam(*shared.args(), [None] * 2, [None] * 2, hyper())
    assert_close(shared, take(problem, False, -1))


def test_random_bits_of_a_shared_step():
    problem = draw([(32, 40), (6, 64)], BF16, groups=[(blocks(32, 16), None), (None, pairs(64))])
    result = problem.copy()
    shared_adam(*result.args(), hyper(), seed=4)
    truth = take(problem, False, 4)
    same = [(a == b).float().mean() for a, b in zip(result.ws, truth.ws, strict=True)]
    assert min(same) > 0.99  # v is not the same to the last bit


def test_a_group_that_no_row_is_in_takes_nothing_with_it():
    group = torch.tensor([0, 2, 2, 0], dtype=torch.int32)
    problem = draw([(4, 8)], F32, groups=[(group, None)])
    result = problem.copy()
    shared_adam(*result.args(), hyper())
    truth = take(problem, False, -1)
    assert result.vs[0][1].isnan().all()
    for v in (result.vs[0], truth.vs[0]):
        v[1] = 0
    assert_close(result, truth)


def test_entries_that_are_no_group_are_refused():
    problem = draw([(4, 8)], F32, groups=[(blocks(4, 2), None)])
    for bad in (-1, 2):
        problem.row_groups[0][1] = bad
        with pytest.raises(ValueError, match=r"groups: expected entries in \[0, 2\)"):
            shared_adam(*problem.args(), hyper())


# ---------------------------------------------------------------------------------------- tables


def test_tables_are_built_once_for_a_list_and_again_for_another():
    lists.clear()
    problem = draw([(4, 8), (3, 5)], F32)
    scaled_adam(*problem.args(), hyper())
    before = set(lists._cache)
    scaled_adam(*problem.args(), hyper())
    assert set(lists._cache) == before
    problem.gs[1] = problem.gs[1].clone()
    scaled_adam(*problem.args(), hyper())
    assert len(lists._cache) == len(before) + 1


def test_addresses_that_come_back_with_another_shape_are_another_list():
    base = [torch.randn(64) for _ in range(4)]
    for shape in ((4, 16), (16, 4), (2, 8)):
        n = shape[0] * shape[1]
        problem = draw([shape], F32)
        views = [b[:n].view(shape) for b in base]
        for view, source in zip(
            views, (problem.ws, problem.gs, problem.ms, [problem.vs[0].abs()]), strict=True
        ):
            view.copy_(source[0])
        result = Problem(*([v] for v in views), problem.rows, problem.cols)
        truth = take(result, False, -1)
        scaled_adam(*result.args(), hyper())
        assert_same(result, truth)


def test_a_map_that_is_written_is_read_again():
    group = blocks(16, 8)
    problem = draw([(16, 24)], F32, groups=[(group, None)])
    for write in (lambda: None, lambda: group.copy_(torch.arange(16) % 2), lambda: group.sub_(0)):
        write()
        problem.row_groups[0] = group
        result = Problem(*(list(some) for some in problem.copy().args()))
        result.row_groups[0] = group
        shared_adam(*result.args(), hyper())
        assert_close(result, take(problem, False, -1))


def test_a_map_is_forgotten_with_its_tensor():
    gc.collect()
    before = len(groups._known)
    group = blocks(16, 8)
    groups.grouping(group, 16, 2, shared_kernel.ROWS)
    groups.grouping(group, 16, 2, shared_kernel.ROWS)
    assert len(groups._known) == before + 1
    del group
    gc.collect()
    assert len(groups._known) == before
    with torch.inference_mode():  # writes to it are not counted
        group = blocks(16, 8)
        assert groups.grouping(group, 16, 2, shared_kernel.ROWS)[0].runs
        group.copy_(torch.arange(16) % 2)
        assert not groups.grouping(group, 16, 2, shared_kernel.ROWS)[0].runs
    assert len(groups._known) == before


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(lists, "SIZE", 3)
    lists.clear()
    device = torch.device("cpu")
    for k in range(9):
        table = lists.table(lists.entries, device, (k, 1))
        assert table.tolist() == [*range(k), 1 << 32]
    assert len(lists._cache) == 3
    monkeypatch.setattr(lists, "BYTES", 200)
    for k in (5, 15, 100):  # the newest stays, whatever its size
        lists.table(lists.entries, device, (k,))
        assert sum(e.table.nbytes for e in lists._cache.values()) <= max(200, 8 * k)
    assert len(lists._cache) == 1
    lists.clear()


def test_nothing_is_built_while_a_graph_is_captured(monkeypatch):
    problem = draw([(16, 8)], F32, groups=[(blocks(16, 8), None)])
    lists.clear()
    monkeypatch.setattr(lists, "capturing", lambda device: True)
    monkeypatch.setattr(lists, "_captured", {})
    for run, args in ((shared_adam, problem.args()), (scaled_adam, draw([(2, 3)], F32).args())):
        with pytest.raises(RuntimeError, match="before the capture"):
            run(*args, hyper())


# ------------------------------------------------------------------------------------- the route


def test_writes_are_counted_and_the_operators_registered():
    problem = draw([(4, 8), (3, 5)], F32)
    before = [t._version for t in problem.written()]
    scaled_adam(*problem.args(), hyper())
    assert [t._version for t in problem.written()] == [b + 1 for b in before]
    ops = torch.ops.deaddir
    torch.library.opcheck(ops.scaled_adam_.default, (*problem.args(), hyper(), False, -1))
    shared = draw([(4, 8)], F32, groups=[(blocks(4, 2), None)])
    torch.library.opcheck(ops.shared_adam_.default, (*shared.args(), hyper(), True, -1))
    torch.library.opcheck(
        ops.scaled_squares.default, (problem.ws, problem.rows, problem.cols, [0, 1])
    )


def test_empty_lists_and_repeated_matrices():
    assert scaled_squares([], [], [], []).shape == (0,)
    scaled_adam([], [], [], [], [], [], hyper())
    shared_adam([], [], [], [], [], [], [], [], hyper())
    problem = draw([(2, 3), (2, 3)], F32)
    problem.ws[1] = problem.ws[0]
    with pytest.raises(RuntimeError, match="in the list twice"):
        scaled_adam(*problem.args(), hyper())
    assert squares_kernel.tiles(0, 4, 1, squares_kernel.CONFIGS[F32]) == (1, 1)
