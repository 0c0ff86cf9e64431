"""The choices of the Kronecker kernels: pure functions, no device."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from deaddir_fast.ops._dispatch import OPS

pytest.importorskip("triton", reason="Triton is not installed")
product, kron_matvec, kron_quadratic, kron_quadratic_rank1 = (
    import_module(f"deaddir_fast.kernels.{name}")
    for name in ("_product", "kron_matvec", "kron_quadratic", "kron_quadratic_rank1")
)

A100 = (163 * 1024, 108)
H200 = (227 * 1024, 132)
MI300 = (64 * 1024, 304)
HALF = torch.bfloat16


def test_tiles_and_rows_round_up():
    assert [product.tiles(m, n, 64) for m, n in ((1, 1), (64, 64), (65, 64), (65, 129))] == [
        1,
        1,
        2,
        6,
    ]
    assert [product.width(size) for size in (0, 1, 16, 17, 4097)] == [0, 16, 16, 32, 4112]
    assert [kron_quadratic_rank1.parts(i, 64) for i in (1, 64, 65, 512, 513)] == [1, 1, 2, 8, 18]


@pytest.mark.parametrize("kernel", [product, kron_quadratic_rank1])
@pytest.mark.parametrize("dtype", list(product.CONFIGS))
def test_pruning_keeps_what_fits(kernel, dtype):
    configs = kernel.CONFIGS[dtype]
    assert kernel.prune(configs, dtype, H200[0]) == list(configs)
    assert kernel.prune(configs, dtype, 1024) == []
    for config in configs:
        needed = kernel.shared_bytes(config, dtype)
        assert kernel.prune([config], dtype, needed) == [config]
        assert kernel.prune([config], dtype, needed - 1) == []


def test_large_products_get_large_tiles_and_small_ones_fill_the_device():
    configs = product.CONFIGS[HALF]
    blocks = [
        product.choose(configs, HALF, shape, *limits).block
        for shape, limits in (
            ((1, 4096, 4096), H200),
            ((132, 5, 5), H200),
            ((131, 5, 5), H200),
            ((1, 512, 512), H200),
            ((1, 4096, 4096), MI300),
        )
    ]
    assert blocks == [128, 128, 64, 64, 64]
    with pytest.raises(ValueError, match="no configuration fits in 512 bytes"):
        product.choose(configs, HALF, (1, 8, 8), 512, 132)


@pytest.mark.parametrize("dtype", list(product.CONFIGS))
def test_every_type_has_a_configuration_on_every_device(dtype):
    configs = product.CONFIGS[dtype]
    assert [c.block for c in configs] == sorted((c.block for c in configs), reverse=True)
    for shared, processors in (A100, H200, MI300):
        for shape in ((1, 1, 1), (64, 100, 4097), (1, 50_000, 1000)):
            chosen = product.choose(configs, dtype, shape, shared, processors)
            assert product.shared_bytes(chosen, dtype) <= shared
        for p in (1, 16, 17, 1000):
            few = kron_quadratic_rank1.choose(kron_quadratic_rank1.CONFIGS[dtype], dtype, p, shared)
            assert kron_quadratic_rank1.shared_bytes(few, dtype) <= shared


def test_few_directions_share_one_pass_over_the_matrix():
    configs = kron_quadratic_rank1.CONFIGS[HALF]
    rows = [kron_quadratic_rank1.choose(configs, HALF, p, H200[0]).rows for p in (1, 16, 17, 999)]
    assert rows == [16, 16, 64, 64]
    with pytest.raises(ValueError, match="no configuration fits in 512 bytes"):
        kron_quadratic_rank1.choose(configs, HALF, 4, 512)


def test_chunks_are_whole_steps():
    for configs in kron_quadratic_rank1.CONFIGS.values():
        assert all(kron_quadratic_rank1.CHUNK % config.depth == 0 for config in configs)
    for configs in product.CONFIGS.values():  # so that a triangle starts on a step
        assert all(config.block % config.depth == 0 for config in configs)


def test_products_run_in_the_type_that_loses_nothing():
    narrow, other, wide = (torch.empty(1, dtype=t) for t in (HALF, torch.float16, torch.float32))
    single, double = torch.float32, torch.float64
    assert product.product_dtype(single, narrow, narrow, widen=False) == HALF
    assert product.product_dtype(single, narrow, narrow, widen=True) == single
    assert product.product_dtype(single, other, other) == torch.float16
    assert product.product_dtype(single, narrow, other, widen=False) == single
    assert product.product_dtype(single, narrow, wide, widen=False) == single
    assert product.product_dtype(double, narrow, narrow, widen=False) == double


def test_operands_are_copied_only_where_their_rows_are_not_aligned():
    fits = torch.randn(3, 5, 32)
    for x in (fits, fits[1], fits[:, ::2, 16:], fits[:, 1, :][:, None]):
        assert product.store(x, torch.float32) is x
    for x in (fits[..., :31], fits[..., 1:17], fits[..., ::2], fits.mT, fits.double()):
        copy = product.store(x, torch.float32)
        assert copy is not x
        assert copy.shape == (*x.shape[:-1], product.width(x.shape[-1]))
        assert torch.equal(copy[..., : x.shape[-1]], x.float())
        assert not copy[..., x.shape[-1] :].any()
    assert product.store(torch.randn(4, 17).mT, HALF).shape == (17, 16)


def test_rows_become_one_matrix_where_they_follow_each_other():
    x = torch.randn(6, 5, 16)
    for part in (x, x[2:4], x[1:2], x[:, 2:3], x[::2, :1]):
        flat = product.rows(part)
        assert flat.shape[0] == 1
        assert torch.equal(flat[0], part.reshape(-1, 16))
        assert flat.data_ptr() == part.data_ptr()
    for part in (x[::2], x[:, :3], x[:1].expand(4, 5, 16)):
        assert product.rows(part) is part


def test_factorising_pays_for_enough_large_directions():
    pays = kron_quadratic.pays
    assert pays(16, 4096, 4096)
    assert not pays(1, 4096, 4096)
    assert not pays(1000, 100, 128)  # a single tile has no zero half
    assert not pays(4, 64, 8192)  # the large factor costs more than it saves
    assert pays(10_000, 64, 8192)


def test_only_large_16_bit_problems_leave_the_vendor():
    def empty(*shape, dtype=HALF):
        return torch.empty(shape, dtype=dtype, device="meta")

    for kernel in (kron_matvec, kron_quadratic):
        assert kernel.worthwhile(empty(1025, 1025), empty(1024, 1024), empty(4, 1024, 1025))
        assert not kernel.worthwhile(empty(64, 64), empty(64, 64), empty(1024, 64, 64))
        assert not kernel.worthwhile(empty(512, 512), empty(512, 512), empty(1, 512, 512))
        single = torch.float32
        assert not kernel.worthwhile(
            empty(1024, 1024), empty(1024, 1024), empty(4, 1024, 1024, dtype=single)
        )
    half = torch.float16
    layer = [empty(*s, dtype=half) for s in ((1024, 1024), (1024, 1024), (4, 1024, 1024))]
    assert kron_quadratic.worthwhile(*layer)
    assert not kron_matvec.worthwhile(*layer)
    rank1 = kron_quadratic_rank1.worthwhile
    assert rank1(empty(4096, 4096), empty(10, 10), empty(1, 10), empty(1, 4096))
    assert not rank1(empty(1024, 1024), empty(10, 10), empty(1, 10), empty(1, 1024))
    assert not rank1(empty(4096, 4096), empty(10, 10), empty(0, 10), empty(0, 4096))
    assert not rank1(empty(4096, 4096), empty(10, 10, dtype=half), empty(1, 10), empty(1, 4096))


def test_cpu_tensors_never_take_the_interpreter_by_themselves():
    A, G, U = torch.empty(1024, 1024), torch.empty(1024, 1024), torch.empty(4, 1024, 1024)
    v = torch.empty(1, 1024)
    arguments = {
        "kron_matvec": (A, G, U),
        "kron_solve": (A, G, U, 1.0),
        "kron_quadratic": (A, G, U),
        "kron_quadratic_rank1": (A, G, v, v),
    }
    for name, args in arguments.items():
        args = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in args]
        (kernel,) = (k for k in OPS[name].kernels if k.route == "triton")
        assert not kernel.worthwhile(*args)


def test_every_configuration_is_compiled_ahead_of_time():
    cases = kron_matvec.aot() + kron_quadratic.aot()
    for dtype, configs in product.CONFIGS.items():
        for config in configs:
            found = [
                case
                for case in cases
                if (case.unit, case.constants["BLOCK"], case.constants["DEPTH"])
                == (product.NAMES[dtype], config.block, config.depth)
                and (case.warps, case.stages) == (config.warps, config.stages)
            ]
            assert {case.constants["EPILOGUE"] for case in found} >= {"store", "dot"}
