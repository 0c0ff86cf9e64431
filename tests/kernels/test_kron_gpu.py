"""Values of the Kronecker kernels on a GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from compare import assert_rms

from deaddir_fast import ops
from deaddir_fast._backend import backend
from deaddir_fast.kernels import kron_quadratic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 257, 769), (5, 512, 129), (300, 64, 65), (1, 2048, 1024)]
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5}


def factor(size, dtype):
    x = torch.randn(size, size + 2, device="cuda", dtype=torch.float64)
    square = (x @ x.mT / (size + 2) + 0.1 * torch.eye(size, device="cuda")).to(dtype)
    return square.tril() + square.tril(-1).mT


def layer(shape, dtype):
    U = torch.randn(shape, device="cuda").to(dtype)
    return factor(shape[2], dtype), factor(shape[1], dtype), U


def twice(name, *args):
    with backend("triton"):
        first, second = (getattr(ops, name)(*args) for _ in range(2))
    assert torch.equal(first, second)
    return first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matvec(shape, dtype):
    A, G, U = layer(shape, dtype)
    result = twice("kron_matvec", A, G, U)
    assert_rms(result, G.double() @ (U.double() @ A.double()), BOUND[result.dtype])


@pytest.mark.parametrize("cholesky", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quadratic(shape, dtype, cholesky):
    A, G, U = layer(shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first, second = (
        kron_quadratic.kron_quadratic(A, G, U, wide, cholesky=cholesky) for _ in range(2)
    )
    assert torch.equal(first, second)
    truth = (G.double() @ (U.double() @ A.double()) * U.double()).sum((1, 2))
    assert_rms(first, truth, BOUND[wide])
    assert_rms(twice("kron_quadratic", A, G, U), truth, BOUND[wide])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 2048, 1025), (17, 700, 33)])
def test_rank1(shape, dtype):
    p, o, i = shape
    A, G = factor(i, dtype), factor(o, dtype)
    v, w = (torch.randn(p, size, device="cuda").to(dtype) for size in (o, i))
    result = twice("kron_quadratic_rank1", A, G, v, w)
    left = (w.double() @ A.double() * w.double()).sum(1)
    right = (v.double() @ G.double() * v.double()).sum(1)
    assert_rms(result, left * right, BOUND[result.dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_solve(shape, dtype):
    A, G, X = layer(shape, torch.float64)
    U = (G @ (X @ A) + 0.1 * X).to(dtype)
    result = twice("kron_solve", A.to(dtype), G.to(dtype), U, 0.1)
    assert_rms(result, X, 1e-10 if dtype == torch.float64 else 1e-4)


def test_a_graph_can_be_captured():
    A, G, U = layer((64, 1024, 1024), torch.float32)
    with backend("triton"):
        expected = kron_quadratic.kron_quadratic(A, G, U, torch.float32, cholesky=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ops.kron_quadratic(A, G, U)
        graph.replay()
    assert torch.equal(result, expected)


def test_the_form_is_chosen_by_cost():
    A, G, U = layer((64, 1024, 1024), torch.float32)
    assert kron_quadratic.pays(*U.shape)
    by_roots = kron_quadratic.kron_quadratic(A, G, U, torch.float32, cholesky=True)
    assert torch.equal(twice("kron_quadratic", A, G, U), by_roots)
