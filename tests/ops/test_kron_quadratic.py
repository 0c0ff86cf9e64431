from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from compare import assert_relative, assert_rms, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deaddir_fast.ops import kron_quadratic, kron_quadratic_rank1
from deaddir_fast.ops._cpu.kron import pays

torch.set_num_threads(1)


def factor(size, rank=None, generator=None):
    x = torch.randn(size, size if rank is None else rank, dtype=torch.float64, generator=generator)
    return x @ x.mT


def dense(A, G, U):
    A, G, U = to_numpy(A), to_numpy(G), to_numpy(U)
    u = U.reshape(len(U), A.shape[0] * G.shape[0])
    return np.einsum("pa,ab,pb->p", u, np.kron(G, A), u)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 1, 33), (5, 20, 17), (0, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    p, o, i = shape
    A, G, U = factor(i).to(dtype), factor(o).to(dtype), torch.randn(p, o, i).to(dtype)
    result = kron_quadratic(A, G, U)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_rms(result, dense(A, G, U), 1e-13 if dtype == torch.float64 else 1e-5)


def test_empty_layers_have_no_curvature():
    for o, i in ((0, 3), (3, 0)):
        result = kron_quadratic(torch.zeros(i, i), torch.zeros(o, o), torch.zeros(2, o, i))
        assert torch.equal(result, torch.zeros(2))


@given(rank=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_never_negative_on_dead_directions(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    A, G = factor(8, rank, generator), factor(6, generator=generator)
    null = torch.linalg.eigh(A)[1][:, : 8 - rank]
    U = torch.randn(6, 6, 8 - rank, generator=generator, dtype=torch.float64) @ null.mT
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert (kron_quadratic(A.to(dtype), G.to(dtype), U.to(dtype)) >= 0).all()


def test_a_transposed_factor_counts_as_written():
    # tr(U^T G U A) for a matrix that is not symmetric takes its symmetric part
    A, G, U = torch.randn(3, 3).double() + 4 * torch.eye(3), factor(2), torch.randn(5, 2, 3)
    expected = [np.trace(to_numpy(u).T @ to_numpy(G) @ to_numpy(u) @ to_numpy(A)) for u in U]
    assert_rms(kron_quadratic(A, G, U), np.array(expected), 1e-13)


def test_rank_one_agrees_with_full_rank():
    A, G = factor(7), factor(5)
    v, w = torch.randn(6, 5).double(), torch.randn(6, 7).double()
    full = kron_quadratic(A, G, v[:, :, None] * w[:, None, :])
    assert_relative(kron_quadratic_rank1(A, G, v, w), full, 1e-12)


def test_strides_and_blocks(monkeypatch):
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 500)
    A, G = factor(8)[::2, ::2], factor(10)[::2, ::2]
    U = torch.randn(4, 5, 9).double().permute(2, 1, 0)
    assert_rms(kron_quadratic(A, G, U), dense(A, G, U), 1e-14)


def test_nan_and_infinity_propagate():
    A, G, U = factor(3), factor(2), torch.randn(4, 2, 3).double()
    U[1, 0, 0] = float("nan")
    result = kron_quadratic(A, G, U)
    assert result.isnan().tolist() == [False, True, False, False]
    assert kron_quadratic(A * float("nan"), G, U).isnan().all()


def test_bad_arguments():
    A, G, U = factor(3), factor(2), torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match=r"A: expected size 3"):
        kron_quadratic(G, G, U)
    with pytest.raises(ValueError, match=r"G: expected size 2"):
        kron_quadratic(A, A, U)
    with pytest.raises(RuntimeError, match=r"G: requires grad"):
        kron_quadratic(A, G.requires_grad_(), U)


def test_registered_operator():
    args = factor(3).float(), factor(2).float(), torch.randn(4, 2, 3)
    torch.library.opcheck(torch.ops.deaddir.kron_quadratic.default, args)


# --- the form by Cholesky factors -----------------------------------------------------------------

cholesky_factors = import_module("deaddir_fast.ops.kron_quadratic").cholesky_factors


@pytest.fixture
def always_factorise(monkeypatch):
    monkeypatch.setattr("deaddir_fast.ops._cpu.kron.pays", lambda p, o, i: p > 0)


def definite(size, samples, dtype=torch.float64):
    x = torch.randn(samples, size, dtype=torch.float64)
    square = (x.mT @ x / max(1, samples)).to(dtype)
    return (square + square.mT) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 13, 37), (2, 60, 131), (0, 5, 4)])
def test_values_by_cholesky_factors(always_factorise, shape, dtype):
    _, o, i = shape
    A, G = (definite(s, 4 * s).to(dtype) + torch.eye(s).to(dtype) / 4 for s in (i, o))
    U = torch.randn(shape).to(dtype)
    assert cholesky_factors(A, G) is not None
    result = kron_quadratic(A, G, U)
    a, g, u = map(to_numpy, (A, G, U))
    expected = ((g @ u @ a) * u).sum((1, 2))
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    assert np.abs(to_numpy(result) - expected).max(initial=0) <= bound * expected.max(initial=0)


def test_factors_without_a_cholesky_factor_take_the_other_form(always_factorise):
    U = torch.randn(2, 5, 7, dtype=torch.float64)
    whole, other = definite(7, 30), definite(5, 30)
    assert cholesky_factors(whole, other) is not None
    dead = whole.clone()
    dead[3], dead[:, 3] = 0, 0  # a unit that never fires
    lopsided = whole.clone()
    lopsided[0, 1] += 1e-9
    nan = whole.clone()
    nan[2, 2] = float("nan")
    infinite = torch.diag(torch.full((7,), float("inf"), dtype=torch.float64))
    for square in (dead, definite(7, 3), lopsided, nan, infinite):
        assert cholesky_factors(square, other) is None
    for square in (dead, definite(7, 3), lopsided):
        expected = ((other @ U @ square.mT) * U).sum((1, 2))
        assert_relative(kron_quadratic(square, other, U), expected, 1e-12)
    assert kron_quadratic(nan, other, U).isnan().all()


def test_a_sum_of_squares_keeps_the_digits_of_a_dying_direction(always_factorise, forced_route):
    # the factor has an eigenvalue of 1e-12 along the direction: the form is that small, and in fp64
    # a difference of products would leave four digits of it
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    small = 2.0**-40
    A = q @ torch.diag(torch.tensor([1, 1, 1, 1, 1, small]).double()) @ q.mT
    A = (A + A.mT) / 2
    U = q[:, 5].reshape(1, 1, 6)
    G = torch.ones(1, 1, dtype=torch.float64)
    error = abs(float(kron_quadratic(A, G, U)) / small - 1)
    assert error <= 1e-3
    assert float(kron_quadratic(A, G, U)) > 0
    if forced_route == "cpu":
        factor = torch.linalg.cholesky(A)
        exact = (U[0] @ factor).square().sum()
        assert abs(float(kron_quadratic(A, G, U)) / float(exact) - 1) <= 1e-12


def test_a_factorisation_has_to_pay():
    assert pays(16, 512, 768)
    assert not pays(1, 512, 768)
    assert not pays(16, 20, 30)  # the checks alone cost more than the form
