"""Configurations, flags and cuts of the optimizer steps: pure functions, no device."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
adam = import_module("deaddir_fast.kernels._adam")
groups = import_module("deaddir_fast.kernels._groups")
lists = import_module("deaddir_fast.kernels._lists")
scaled_squares = import_module("deaddir_fast.kernels.scaled_squares")
shared_adam = import_module("deaddir_fast.kernels.shared_adam")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_blocks_are_whole_vectors_of_every_lane(dtype):
    config = adam.CONFIGS[dtype]
    assert set(adam.CONFIGS) == {F64, F32, BF16, F16}
    assert config.block & (config.block - 1) == 0
    for lanes in (32, 64):  # NVIDIA, AMD
        assert config.block * dtype.itemsize % (16 * config.warps * 32) == 0
        assert config.block >= config.warps * lanes
    assert adam.vector(dtype) * min(dtype.itemsize, 4) == 16
    assert config.block % adam.vector(dtype) == 0


def test_large_lists_take_many_blocks_a_program_and_small_ones_fill_the_device():
    assert adam.steps((2**30,), 1024, 132) == max(adam.STEPS)
    assert adam.steps((1000,) * 3, 1024, 132) == 1
    for sizes in ((2**22,), (2**25,), (768 * 768,) * 48, (5,)):
        count = adam.steps(sizes, 1024, 132)
        programs = sum(-(-n // (1024 * count)) for n in sizes)
        assert programs == adam.programs(sizes, 1024 * count)
        assert programs >= adam.PROGRAMS * 132 or count == 1
    # a table of less than a thousandth of the parameters' bytes
    programs = 7_000_000_000 // (1024 * adam.steps((7_000_000_000,), 1024, 132))
    assert programs * 8 < 7e9 * 2 / 1000


def test_flags_say_what_addresses_and_widths_allow():
    everything = adam.ALIGNED | adam.EVEN
    assert adam.flags((32, 64), (16, 0), 8, F32) == everything
    assert adam.flags((32, 64), (), 7, F32) == adam.ALIGNED | adam.PLAIN
    assert adam.flags((32, 68), (16,), 8, F32) == adam.EVEN
    assert adam.flags((32, 64), (16,), 7, F32) == adam.ALIGNED
    assert adam.flags((32, 64), (20,), 8, F32) == adam.ALIGNED
    # 4 elements are 16 bytes of fp32 state but not of 16-bit parameters
    assert adam.flags((0,), (16,), 4, F32) & adam.EVEN
    assert not adam.flags((0,), (16,), 4, BF16) & adam.EVEN


def test_seeds_keep_their_low_32_bits():
    for seed in (-1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3):
        assert -(2**31) <= adam.signed32(seed) < 2**31
        assert adam.signed32(seed) % 2**32 == seed % 2**32


def test_entries_number_the_programs_of_each_tensor():
    found = lists.entries([2, 0, 3])
    assert [(x >> 32, x & 0xFFFFFFFF) for x in found.tolist()] == [
        (0, 0), (0, 1), (2, 0), (2, 1), (2, 2)
    ]  # fmt: skip
    assert found.dtype == np.int64
    assert lists.pack([(1, 2), (3, 4)], [1, 1], [0, 1]).tolist() == [
        1, 2, 3, 4, 0, 1 << 32, 1 << 32
    ]  # fmt: skip
    assert lists.entries([]).size == 0
    with pytest.raises(ValueError, match="too many for a grid"):
        lists.entries([2**31])


def test_spans_cover_a_matrix_and_do_not_depend_on_the_device():
    for dtype, config in scaled_squares.CONFIGS.items():
        for o, i in ((1, 1), (0, 5), (5, 0), (4096, 4096), (17, 100_000), (100_000, 17)):
            for dim in (0, 1):
                count, spans = scaled_squares.tiles(o, i, dim, config)
                lines, along = ((o, i), (i, o))[dim]
                block = (config.rows, config.columns)[dim]
                span = (
                    config.columns * config.span_columns, config.rows * config.span_rows
                )[dim]  # fmt: skip
                assert (count - 1) * block < lines <= count * block
                assert spans >= 1
                assert max(1, spans - 1) * span <= max(span, along) <= spans * span
        assert scaled_squares.vector(dtype) == adam.vector(dtype)


AXIS = groups.Axis(lanes=4, each=3, together=10, large=5)


def parts(layout, numbers):
    """Order, begin, end, first, count."""
    n, p, g = layout.n, layout.pieces, layout.groups
    return np.split(numbers, np.cumsum([n, p, p, g + 1]))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_pieces_hold_every_member_once_in_order(count):
    rng = np.random.default_rng(0)
    for group in (
        np.arange(40) * count // 40,
        rng.integers(0, count, 40),
        np.zeros(40, int),
        np.arange(40) % count,
    ):
        layout, numbers = groups.divide(group.astype(np.int32), count, AXIS)
        order, begin, end, first, members = parts(layout, numbers)
        assert numbers.dtype == np.int32
        assert sorted(order) == list(range(40))
        assert members.tolist() == np.bincount(group, minlength=count).tolist()
        span = AXIS.together if layout.together else AXIS.each
        assert layout.together == (AXIS.large * count <= 40)
        assert (end - begin).max() <= span
        for g in range(count):
            mine = [x for p in range(first[g], first[g + 1]) for x in order[begin[p] : end[p]]]
            assert mine == np.flatnonzero(group == g).tolist()
            assert first[g + 1] > first[g]  # one piece at least, perhaps empty
        assert layout.pieces == first[-1] <= count + 40 // span
        assert layout.split == (layout.pieces > count)
        assert layout.runs == bool((np.diff(group) >= 0).all())


def test_layouts_of_heads_and_rotary_pairs():
    rows = shared_adam.ROWS
    heads, _ = groups.divide(np.repeat(np.arange(32), 128).astype(np.int32), 32, rows)
    assert (heads.together, heads.split, heads.runs, heads.even) == (True, False, True, True)
    assert shared_adam.tiles(heads, groups.alone(4096)) == 32 * 32
    assert shared_adam.merges(heads, groups.alone(4096)) == 0
    pairs, _ = groups.divide((np.arange(128) % 64).astype(np.int32), 64, rows)
    assert (pairs.together, pairs.split, pairs.pieces) == (False, False, 64)
    whole, _ = groups.divide(np.zeros(4096, np.int32), 1, rows)
    assert whole.together and whole.pieces == 4096 // rows.together
    assert shared_adam.merges(whole, groups.alone(100)) == 4
    alone = groups.alone(64)
    assert shared_adam.in_order(alone, 64, (16, 32), F32)
    assert not shared_adam.in_order(alone, 66, (16, 32), F32)
    assert not shared_adam.in_order(alone, 64, (8, 32), F32)
    assert not shared_adam.in_order(pairs, 128, (16, 32), F32)


@pytest.mark.parametrize("bad", [-1, 3])
def test_entries_that_are_no_group_are_refused(bad):
    with pytest.raises(ValueError, match=r"groups: expected entries in \[0, 3\)"):
        groups.divide(np.array([0, bad, 2], np.int32), 3, AXIS)
