"""Forms, configurations and blocks of the kernels of scores: pure functions."""

from __future__ import annotations

import pytest
import torch

full = pytest.importorskip(
    "deaddir_fast.kernels.directional_scores", reason="Triton is not installed"
)
rank1 = pytest.importorskip("deaddir_fast.kernels.directional_scores_rank1")

H200 = (227 * 1024, 132)
MI300 = (64 * 1024, 304)
A100 = (163 * 1024, 108)
HALF = torch.bfloat16


def test_the_cheaper_form_is_preferred():
    for dtype in full.CONFIGS:
        assert full.preferred(1, 1000, dtype) == "factorised"
        assert full.preferred(1000, 1, dtype) == "factorised"
        assert full.preferred(512, 64, dtype) == "contracted"
    # t + p < t p, where a product with U costs as much as any other
    assert full.preferred(2, 2, torch.float32) == "factorised"
    assert full.preferred(2, 3, torch.float64) == "contracted"
    # t + 8 p < t p on the matrix units
    assert full.preferred(8, 1000, HALF) == "factorised"
    assert full.preferred(10, 5, HALF) == "factorised"
    assert full.preferred(10, 6, HALF) == "contracted"


def test_pruning_keeps_what_fits():
    for dtype, configs in full.CONFIGS.items():
        assert full.prune(configs, dtype, H200[0]) == list(configs)
        assert full.prune(configs, dtype, 1024) == []
        for config in configs:
            needed = full.shared_bytes(config, dtype)
            assert full.prune([config], dtype, needed) == [config]
            assert full.prune([config], dtype, needed - 1) == []
    assert [c.height for c in full.prune(full.candidates(HALF, "factorised"), HALF, MI300[0])] == [
        64
    ]
    for dtype, configs in rank1.CONFIGS.items():
        assert rank1.prune(configs, dtype, MI300[0]) == list(configs)
        for config in configs:
            needed = rank1.shared_bytes(config, dtype)
            assert rank1.prune([config], dtype, needed - 1) == []


def test_shared_memory_is_that_of_the_pipeline():
    factorised, _, contracted, _ = full.CONFIGS[HALF]
    assert full.shared_bytes(factorised, HALF) == 3 * (128 * 64 + 64 * 128) * 2
    assert full.shared_bytes(contracted, HALF) == 3 * (64 * 64 + 64 * 128) * 2
    (single,) = full.candidates(torch.float32, "contracted")
    assert full.shared_bytes(single, torch.float32) == 2 * 64 * 64 * 4  # tiles of U
    wide, _ = full.candidates(torch.float32, "factorised")
    assert full.shared_bytes(wide, torch.float32) == 128 * 128 * 4  # a tile of a
    assert rank1.shared_bytes(rank1.CONFIGS[HALF][0], HALF) == 3 * (64 * 64 + 64 * 64) * 2


def test_programs_and_partial_sums_are_counted():
    factorised = full.Config("factorised", 64, 32, 16, 4, 3)
    contracted = full.Config("contracted", 64, 32, 16, 4, 3)
    shape = (5, 30, 33, 65, 7)  # n, t, i, o, p
    assert full.tiles(factorised, 33, 65) == 2
    assert full.tiles(contracted, 33, 65) == 4
    assert full.programs(factorised, *shape) == 7 * 3 * 2
    assert full.programs(contracted, *shape) == 2 * 4


def test_large_problems_get_large_tiles_and_small_ones_fill_the_device():
    configs = full.candidates(HALF, "factorised")
    assert full.choose(configs, HALF, (4096, 1, 1024, 1024, 8), *H200).height == 128
    assert full.choose(configs, HALF, (100, 1, 256, 256, 1), *H200).height == 64
    assert full.choose(configs, HALF, (4096, 1, 1024, 1024, 8), *MI300).height == 64
    configs = full.candidates(HALF, "contracted")
    assert full.choose(configs, HALF, (64, 512, 1024, 1024, 8), *H200).width == 128
    assert full.choose(configs, HALF, (4, 512, 256, 256, 8), *H200).width == 64
    with pytest.raises(ValueError, match="no configuration fits in 512 bytes"):
        full.choose(configs, HALF, (64, 512, 1024, 1024, 8), 512, 132)


@pytest.mark.parametrize("dtype", list(full.CONFIGS))
def test_every_form_has_a_configuration_on_every_device(dtype):
    for form in ("factorised", "contracted"):
        configs = full.candidates(dtype, form)
        area = [c.height * c.width for c in configs]
        assert area == sorted(area, reverse=True)
        for shared, processors in (H200, MI300, A100):
            for shape in ((1, 1, 1, 1, 1), (7, 100, 50, 60, 3), (10_000, 512, 4096, 4096, 64)):
                chosen = full.choose(configs, dtype, shape, shared, processors)
                assert chosen in configs
                assert full.shared_bytes(chosen, dtype) <= shared
    for p in (1, 16, 17, 1000):
        chosen = rank1.choose(rank1.CONFIGS[dtype], dtype, p, MI300[0])
        narrow = min(c.directions for c in rank1.CONFIGS[dtype])
        assert (chosen.directions == narrow) == (p <= narrow)
    with pytest.raises(ValueError, match="no configuration fits in 512 bytes"):
        rank1.choose(rank1.CONFIGS[dtype], dtype, 1, 512)


def test_tokens_fill_their_tiles():
    chosen = [rank1.tokens_in_tile(t) for t in (1, 2, 3, 4, 5, 13, 15, 16, 50, 52, 64, 100, 500)]
    assert chosen == [1, 1, 1, 4, 1, 16, 16, 16, 4, 64, 64, 16, 64]
    for t in range(1, 300):
        k = rank1.tokens_in_tile(t)
        assert -(-t // k) * k <= 1.25 * t
        assert all(rank1.CONFIGS[dtype][0].rows % k == 0 for dtype in rank1.CONFIGS)


@pytest.mark.parametrize("cut", [full.samples_first, full.directions_first])
def test_blocks_cover_each_pair_once_within_the_workspace(cut):
    for workspace in (1, 40, 100, 700, 10**6):
        seen = torch.zeros(13, 7)
        for samples, directions in cut(13, 7, 10, workspace):
            block = seen[samples, directions]
            block += 1
            assert block.numel() * 10 <= max(workspace, 10)
        assert (seen == 1).all()


def test_directions_are_cut_last_where_they_repeat_work():
    first = next(full.directions_first(100, 50, 10, 2500, least=4))
    assert first == (slice(0, 5), slice(0, 50))
    first = next(full.directions_first(100, 500, 10, 2500, least=4))
    assert first == (slice(0, 4), slice(0, 62))
    first = next(full.samples_first(100, 50, 10, 2500))
    assert first == (slice(0, 100), slice(0, 2))


def test_small_or_wide_problems_are_left_to_the_reference():
    def meta(*shape, dtype=HALF):
        return torch.empty(shape, dtype=dtype, device="meta")

    a, g, U = meta(4096, 1024), meta(4096, 1024), meta(8, 1024, 1024)
    assert full.worthwhile(a, g, U)
    assert not full.worthwhile(a, g, U.float())
    assert not full.worthwhile(a.float(), g.float(), U.float())
    assert not full.worthwhile(a[:1], g[:1], U)
    assert full.worthwhile(a[:, 16:], g, U[:, :, 16:])
    assert not full.worthwhile(a[:, 1:], g, U[:, :, 1:])
    assert not full.worthwhile(meta(4096, 1025)[:, 1:], g, U)
    v = w = meta(8, 1024)
    tokens = meta(64, 512, 1024)
    assert rank1.worthwhile(tokens, tokens, v, w)
    assert not rank1.worthwhile(tokens, tokens, v.float(), w)
    assert not rank1.worthwhile(tokens.float(), tokens.float(), v.float(), w.float())
    assert not rank1.worthwhile(a, g, v, w)


def test_every_configuration_is_in_the_manifest():
    listed = {
        (case.kernel.__name__, case.unit, case.warps, case.stages, *case.constants.values())
        for case in (*full.aot(), *rank1.aot())
    }
    assert len(listed) == len([*full.aot(), *rank1.aot()])
    for dtype in full.CONFIGS:
        unit = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(
            dtype, "fp64"
        )
        cases = [c for c in full.aot() if c.unit == unit]
        for config in full.CONFIGS[dtype]:
            tile = "BLOCK_R" if config.form == "factorised" else "BLOCK_O"
            assert any(
                case.kernel.__name__ == f"directional_scores_{config.form}_kernel"
                and case.constants[tile] == config.height
                and case.constants["BLOCK_I"] == config.width
                and case.constants["DEPTH"] == config.depth
                and (case.warps, case.stages) == (config.warps, config.stages)
                and case.shared_bound == full.shared_bytes(config, dtype)
                for case in cases
            )
        cases = [c for c in rank1.aot() if c.unit == unit]
        assert len(cases) == len(rank1.CONFIGS[dtype]) * len(rank1.TOKENS)


@pytest.mark.aot
@pytest.mark.parametrize("case", [*full.aot()[:4], rank1.aot()[0]], ids=lambda case: case.name)
def test_sizes_of_one_compile(case):
    """A launch turns integer arguments that equal one into constants."""
    from deaddir_fast.kernels import aot

    ones = dict.fromkeys((x for x, kind in case.signature.items() if kind == "i32"), 1)
    aligned = tuple(x for x in case.aligned if x not in ones)
    constant = type(case)(
        **{**vars(case), "constants": {**ones, **case.constants}, "aligned": aligned}
    )
    target = next(t for t in aot.TARGETS if t.name == "sm_90")
    problems = aot.compile_case(constant, target).problems
    assert not any("Error" in problem for problem in problems), problems
