"""Scores and directional curvature of the kernels on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from compare import EPS

from deaddir_fast._backend import backend
from deaddir_fast.ops import (
    directional_curvature,
    directional_curvature_rank1,
    directional_scores,
    directional_scores_rank1,
)

full = pytest.importorskip(
    "deaddir_fast.kernels.directional_scores", reason="Triton is not installed"
)
rank1 = pytest.importorskip("deaddir_fast.kernels.directional_scores_rank1")

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


def twice(operation, *args):
    """The result on the forced route, after checking that it repeats."""
    with backend("triton"):
        result, again = operation(*args), operation(*args)
    assert torch.equal(result.nan_to_num(), again.nan_to_num())
    return result


def mean_square(x):
    return x.square().mean(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype):
    n, t, i, o, p = shape
    lead = (n,) if t is None else (n, t)
    args = [torch.randn(s, device="cuda").to(dtype) for s in ((*lead, i), (*lead, o), (p, o, i))]
    value, size = scores(*args), scores(*(x.abs() for x in args))
    check(twice(directional_scores, *args), value, size)
    check(twice(directional_curvature, *args), mean_square(value), mean_square(size))
    for config in full.prune(full.CONFIGS[dtype], dtype, shared_memory()):
        check(full.directional_scores(*args, config=config), value, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_rank_one(shape, dtype):
    n, t, i, o, p = shape
    lead = (n,) if t is None else (n, t)
    sizes = ((*lead, i), (*lead, o), (p, o), (p, i))
    args = [torch.randn(s, device="cuda").to(dtype) for s in sizes]

    def exact(a, g, v, w):
        return scores(a, g, v.double()[:, :, None] * w.double()[:, None])

    value, size = exact(*args), exact(*(x.abs() for x in args))
    check(twice(directional_scores_rank1, *args), value, size)
    check(twice(directional_curvature_rank1, *args), mean_square(value), mean_square(size))
    for config in rank1.prune(rank1.CONFIGS[dtype], dtype, shared_memory()):
        check(rank1.directional_scores_rank1(*args, config=config), value, size)
