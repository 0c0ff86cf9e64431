from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_rms, to_numpy

from deaddir_fast.ops import kron_matvec, kron_solve

torch.set_num_threads(1)


def factor(size, rank=None):
    x = torch.randn(size, size if rank is None else rank, dtype=torch.float64)
    return x @ x.mT / max(1, x.shape[1])


def dense(A, G, U, damping):
    A, G, U = to_numpy(A), to_numpy(G), to_numpy(U)
    size = A.shape[0] * G.shape[0]
    matrix = np.kron(G, A) + damping * np.eye(size)
    return np.linalg.solve(matrix, U.reshape(len(U), size).T).T.reshape(U.shape)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 1, 9), (4, 8, 1)])
@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_values(shape, damping):
    p, o, i = shape
    A, G, U = factor(i), factor(o), torch.randn(p, o, i).double()
    assert_rms(kron_solve(A, G, U, damping), dense(A, G, U, damping), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_solved_in_fp64(dtype):
    A, G = (factor(5) + torch.eye(5)).to(dtype), (factor(4) + torch.eye(4)).to(dtype)
    U = torch.randn(3, 4, 5).to(dtype)
    result = kron_solve(A, G, U, 1e-2)
    assert result.dtype == torch.float32
    symmetric = [(F.double() + F.double().mT) / 2 for F in (A, G)]
    assert_rms(result, dense(*symmetric, U, 1e-2), 1e-7)


def test_singular_factors_with_tiny_damping_keep_their_null_space():
    basis = torch.linalg.qr(torch.randn(6, 6).double())[0]
    A = basis @ torch.diag(torch.tensor([1.0, 0.5, 0.2, 0, 0, 0]).double()) @ basis.mT
    A = (A + A.mT) / 2
    dead = torch.outer(torch.ones(3).double(), basis[:, 5])[None]
    result = kron_solve(A, torch.eye(3).double(), dead, 1e-8)
    assert_rms(result, dead / 1e-8, 1e-6)


def test_solves_what_matvec_applies():
    A, G, X = factor(6), factor(5), torch.randn(2, 5, 6).double()
    U = kron_matvec(A, G, X) + 0.1 * X
    assert_rms(kron_solve(A, G, U, 0.1), X, 1e-12)


def test_no_damping_where_the_factors_are_regular():
    A, G, U = factor(4) + torch.eye(4), factor(3) + torch.eye(3), torch.randn(2, 3, 4)
    assert_rms(kron_solve(A, G, U.double(), 0.0), dense(A, G, U, 0.0), 1e-12)


def test_empty():
    for p, o, i in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        A, G, U = torch.zeros(i, i), torch.zeros(o, o), torch.zeros(p, o, i)
        assert kron_solve(A, G, U, 0.1).shape == (p, o, i)


def test_non_finite_factors_give_nan():
    A, G, U = factor(3), factor(2), torch.randn(4, 2, 3).double()
    A[0, 0] = float("nan")
    assert kron_solve(A, G, U, 0.1).isnan().all()
    A[0, 0] = float("inf")
    assert kron_solve(A, G, U, 0.1).isnan().all()


def test_nan_stays_with_its_direction():
    A, G, U = factor(3), factor(2), torch.randn(4, 2, 3).double()
    U[2] = float("nan")
    result = kron_solve(A, G, U, 0.1)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


def test_blocks(monkeypatch):
    A, G, U = factor(6), factor(5), torch.randn(7, 5, 6).double()
    whole = kron_solve(A, G, U, 0.1)
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 500)
    assert_rms(kron_solve(A, G, U, 0.1), whole, 1e-14)


def test_bad_arguments():
    A, G, U = factor(3), factor(2), torch.randn(4, 2, 3).double()
    with pytest.raises(ValueError, match=r"damping: expected a finite number >= 0"):
        kron_solve(A, G, U, -1e-3)
    with pytest.raises(ValueError, match=r"damping: expected a finite number >= 0"):
        kron_solve(A, G, U, float("nan"))
    with pytest.raises(ValueError, match=r"damping: .*singular to working precision"):
        kron_solve(factor(3, rank=1), G, U, 0.0)
    with pytest.raises(ValueError, match=r"damping: .*singular to working precision"):
        kron_solve(torch.zeros(3, 3), torch.zeros(2, 2), U, 0.0)
    with pytest.raises(ValueError, match=r"A: expected a symmetric matrix"):
        kron_solve(A + torch.triu(torch.ones(3, 3), 1), G, U, 0.1)
    with pytest.raises(ValueError, match=r"G: expected size 2"):
        kron_solve(A, A, U, 0.1)
    with pytest.raises(RuntimeError, match=r"A: requires grad"):
        kron_solve(A.requires_grad_(), G, U, 0.1)


def test_registered_operator():
    args = factor(3), factor(2), torch.randn(4, 2, 3).double(), 0.1
    torch.library.opcheck(torch.ops.deaddir.kron_solve.default, args)
