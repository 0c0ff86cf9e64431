"""The choice of a configuration of the categorical kernels: pure functions, no device."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
linear = import_module("deaddir_fast.kernels.linear_softmax_fisher")
softmax_fisher = import_module("deaddir_fast.kernels.softmax_fisher")
softmax_kl = import_module("deaddir_fast.kernels.softmax_kl")

H200, MI300 = 227 * 1024, 64 * 1024
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moving", [False, True])
def test_pruning_keeps_what_fits(dtype, moving):
    configs = linear.CONFIGS[dtype]
    for config in configs:
        needed = linear.shared_bytes(config, dtype, moving=moving)
        assert linear.prune([config], dtype, needed, moving=moving) == [config]
        assert linear.prune([config], dtype, needed - 1, moving=moving) == []
    with pytest.raises(ValueError, match="no configuration fits in 512 bytes"):
        linear.choose(configs, dtype, 1, 512, moving=moving)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_the_fewest_products_on_every_device(dtype, moving, p):
    for shared in (H200, MI300, 163 * 1024):
        chosen = linear.choose(linear.CONFIGS[dtype], dtype, p, shared, moving=moving)
        fitting = linear.prune(linear.CONFIGS[dtype], dtype, shared, moving=moving)
        assert linear.work(chosen, p, moving=moving) == min(
            linear.work(c, p, moving=moving) for c in fitting
        )


@pytest.mark.parametrize("kernel", [softmax_fisher, softmax_kl])
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_rows_take_narrow_tiles(kernel, dtype):
    configs = kernel.CONFIGS[dtype]
    widest = max(c.classes for c in configs)
    assert softmax_fisher.choose(configs, 1, 5).classes == min(c.classes for c in configs)
    assert softmax_fisher.choose(configs, 1, 128_256).classes == widest
    for p in (1, 2, 3, 4, 9):
        chosen = softmax_fisher.choose(configs, p, 128_256)
        assert chosen.directions * 2 <= 3 * p
        assert softmax_fisher.programs(chosen, p, 7) * chosen.directions * chosen.samples >= 7 * p


def test_small_or_exact_problems_are_left_to_the_vendor():
    half = [torch.empty(s, dtype=torch.bfloat16, device="meta")
            for s in ((4096, 4096), (1, 4096, 4096), (128_256, 4096))]  # fmt: skip
    assert linear.worthwhile(*half, None, None)
    assert not linear.worthwhile(*(x.float() for x in half), None, None)
    assert not linear.worthwhile(half[0][:2], half[1][:, :2], half[2][:10], None, None)
