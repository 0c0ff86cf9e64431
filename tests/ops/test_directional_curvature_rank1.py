from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import EPS, to_numpy

from deaddir_fast.ops import directional_curvature_rank1

torch.set_num_threads(1)

SHAPES = [
    (1, None, 1, 1, 1),
    (7, None, 5, 3, 4),
    (33, None, 17, 65, 9),
    (5, 11, 6, 3, 8),
    (2, 3, 1, 70, 5),
]


def make(n, t, i, o, p, dtype=torch.float64):
    lead = (n,) if t is None else (n, t)
    return tuple(torch.randn(s).to(dtype) for s in ((*lead, i), (*lead, o), (p, o), (p, i)))


def truth(a, g, v, w):
    a, g, v, w = map(to_numpy, (a, g, v, w))
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    return (np.einsum("nto,po,pi,nti->pn", g, v, w, a) ** 2).mean(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    args = make(*shape, dtype)
    result = directional_curvature_rank1(*args)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = np.abs(to_numpy(result) - truth(*args))
    assert (error <= 32 * EPS[result.dtype] * truth(*(x.abs() for x in args))).all()


def test_empty():
    assert directional_curvature_rank1(*make(0, 2, 3, 4, 5)).isnan().all()
    for shape in ((3, 0, 4, 2, 5), (3, 2, 0, 2, 5), (3, 2, 4, 0, 5), (3, 2, 4, 2, 0)):
        result = directional_curvature_rank1(*make(*shape))
        assert torch.equal(result, torch.zeros(shape[-1]).double())


def test_strides_and_blocks(monkeypatch):
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 300)
    a = torch.randn(6, 4, 9).double().permute(2, 1, 0)
    g, v, w = torch.randn(9, 8, 3).double()[:, ::2], torch.randn(3, 5).mT, torch.randn(5, 6)
    result = directional_curvature_rank1(a, g, v, w)
    assert np.allclose(to_numpy(result), truth(a, g, v, w), rtol=1e-12)


def test_nan_stays_with_its_direction():
    a, g, v, w = make(5, None, 4, 3, 3)
    v[1, 0] = float("nan")
    assert directional_curvature_rank1(a, g, v, w).isnan().tolist() == [False, True, False]


def test_bad_arguments():
    a, g, v, w = make(5, None, 4, 3, 2)
    with pytest.raises(ValueError, match=r"v: expected size 3 in dimension 1 \(the outputs"):
        directional_curvature_rank1(a, g, w, w)
    with pytest.raises(ValueError, match=r"w: expected size 4 in dimension 1 \(the inputs"):
        directional_curvature_rank1(a, g, v, v)
    with pytest.raises(ValueError, match=r"w: expected size 2 in dimension 0"):
        directional_curvature_rank1(a, g, v, w[:1])
    with pytest.raises(RuntimeError, match=r"a: requires grad"):
        directional_curvature_rank1(a.requires_grad_(), g, v, w)


def test_registered_operator():
    torch.library.opcheck(
        torch.ops.deaddir.directional_curvature_rank1.default, make(5, 3, 4, 3, 2)
    )
