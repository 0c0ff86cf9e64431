"""Values of the directional curvature kernels on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from compare import EPS

from deaddir_fast._backend import backend
from deaddir_fast.ops import directional_curvature, directional_curvature_rank1

full = pytest.importorskip(
    "deaddir_fast.kernels.directional_curvature", reason="Triton is not installed"
)
rank1 = pytest.importorskip("deaddir_fast.kernels.directional_curvature_rank1")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: n, t (None: no token dimension), i, o, p
SHAPES = [
    (1, None, 1, 1, 1),
    (1000, None, 384, 257, 5),
    (513, 1, 96, 300, 33),
    (6, 131, 200, 70, 9),
    (1, 2000, 64, 128, 3),
    (37, 5, 65, 129, 1),
    (0, 3, 4, 5, 2),
    (3, 0, 4, 5, 2),
]


def shared_memory():
    properties = torch.cuda.get_device_properties("cuda")
    extended = getattr(properties, "shared_memory_per_block_optin", 0)
    return extended or properties.shared_memory_per_block


def scores(a, g, U):
    a, g = (x.double().reshape(x.shape[0], -1, x.shape[-1]) for x in (a, g))
    return torch.einsum("nto,poi,nti->pn", g, U.double(), a)


def check(result, value, size):
    assert torch.equal(result.isnan(), value.isnan())
    if not value.isnan().any():
        assert ((result - value).abs() <= 32 * EPS[result.dtype] * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype):
    n, t, i, o, p = shape
    lead = (n,) if t is None else (n, t)
    a, g, U = (torch.randn(s, device="cuda").to(dtype) for s in ((*lead, i), (*lead, o), (p, o, i)))
    value = scores(a, g, U).square().mean(1)
    size = scores(a.abs(), g.abs(), U.abs()).square().mean(1)
    with backend("triton"):
        result = directional_curvature(a, g, U)
        assert torch.equal(result.nan_to_num(), directional_curvature(a, g, U).nan_to_num())
    check(result, value, size)
    for config in full.prune(full.CONFIGS[dtype], a.dtype, shared_memory()):
        check(full.directional_curvature(a, g, U, config=config), value, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_rank_one(shape, dtype):
    n, t, i, o, p = shape
    lead = (n,) if t is None else (n, t)
    sizes = ((*lead, i), (*lead, o), (p, o), (p, i))
    a, g, v, w = (torch.randn(s, device="cuda").to(dtype) for s in sizes)
    value = scores(a, g, v.double()[:, :, None] * w.double()[:, None]).square().mean(1)
    bound = v.double().abs()[:, :, None] * w.double().abs()[:, None]
    size = scores(a.abs(), g.abs(), bound).square().mean(1)
    with backend("triton"):
        result = directional_curvature_rank1(a, g, v, w)
        again = directional_curvature_rank1(a, g, v, w)
    assert torch.equal(result.nan_to_num(), again.nan_to_num())
    check(result, value, size)
    for config in rank1.prune(rank1.CONFIGS[dtype], a.dtype, shared_memory()):
        check(rank1.directional_curvature_rank1(a, g, v, w, config=config), value, size)
