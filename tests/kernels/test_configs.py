"""The choice of a configuration: pure functions, no device."""

from __future__ import annotations

import pytest
import torch

gram = pytest.importorskip("deaddir_fast.kernels.gram", reason="Triton is not installed")

H200 = (227 * 1024, 132)
MI300 = (64 * 1024, 304)


def test_tiles_count_the_lower_triangle():
    assert [gram.tiles(i, 128) for i in (0, 1, 128, 129, 1024)] == [0, 1, 1, 3, 36]


def test_pruning_keeps_what_fits():
    configs = gram.CONFIGS[torch.bfloat16]
    assert gram.prune(configs, torch.bfloat16, 227 * 1024) == list(configs)
    small = gram.prune(configs, torch.bfloat16, 64 * 1024)
    assert [c.block for c in small] == [64]
    assert gram.prune(configs, torch.bfloat16, 1024) == []
    for config in configs:
        needed = gram.shared_bytes(config, torch.bfloat16)
        assert gram.prune([config], torch.bfloat16, needed) == [config]
        assert gram.prune([config], torch.bfloat16, needed - 1) == []


def test_large_problems_get_large_tiles_and_small_ones_fill_the_device():
    configs = gram.CONFIGS[torch.bfloat16]
    assert gram.choose(configs, torch.bfloat16, 8192, *H200).block == 128
    assert gram.choose(configs, torch.bfloat16, 1024, *H200).block == 64
    assert gram.choose(configs, torch.bfloat16, 5, *H200).block == 64
    assert gram.choose(configs, torch.bfloat16, 8192, *MI300).block == 64
    with pytest.raises(ValueError, match="no configuration fits in 512 bytes"):
        gram.choose(configs, torch.bfloat16, 8192, 512, 132)


@pytest.mark.parametrize("dtype", list(gram.CONFIGS))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_variant_has_a_configuration_on_every_device(dtype, weighted, packed):
    configs = gram.candidates(dtype, weighted=weighted, packed=packed)
    assert configs
    for shared, processors in (H200, MI300, (163 * 1024, 108)):
        for i in (1, 100, 4096, 50_000):
            chosen = gram.choose(configs, dtype, i, shared, processors)
            assert chosen in configs
            assert gram.shared_bytes(chosen, dtype) <= shared
    assert [c.block for c in configs] == sorted((c.block for c in configs), reverse=True)


def test_small_or_wide_problems_are_left_to_the_vendor():
    half = torch.bfloat16
    assert gram.worthwhile(torch.empty(8, 4096, dtype=half), None)
    assert not gram.worthwhile(torch.empty(8, 512, dtype=half), None)
    assert not gram.worthwhile(torch.empty(8, 4096, dtype=torch.float64), None)
