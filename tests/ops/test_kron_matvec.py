from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_rms, to_numpy

from deaddir_fast.ops import kron_matvec

torch.set_num_threads(1)

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 1, 33), (5, 64, 17), (0, 3, 4), (3, 0, 4), (3, 4, 0)]


def dense(A, G, U):
    """(G (x) A) vec U with the matrix written out, row-major vec."""
    A, G, U = to_numpy(A), to_numpy(G), to_numpy(U)
    # A enters as U A, so its transpose multiplies vec(U)
    return (U.reshape(len(U), G.shape[0] * A.shape[0]) @ np.kron(G, A.T).T).reshape(U.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values(shape, dtype):
    p, o, i = shape
    A, G, U = (torch.randn(s).to(dtype) for s in ((i, i), (o, o), (p, o, i)))
    result = kron_matvec(A, G, U)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_rms(result, dense(A, G, U), 1e-13 if dtype == torch.float64 else 1e-5)


def test_blocks_strides_and_mixed_types(monkeypatch):
    monkeypatch.setattr("deaddir_fast.ops._blocks.WORKSPACE", 500)
    A, G = torch.randn(4, 4).bfloat16(), torch.randn(10, 10)[::2, ::2]
    U = torch.randn(4, 5, 9).double().permute(2, 1, 0)
    result = kron_matvec(A, G, U)
    assert result.dtype == torch.float64
    assert_rms(result, dense(A, G, U), 1e-14)


def test_nan_stays_with_its_direction():
    A, G, U = torch.randn(3, 3), torch.randn(2, 2), torch.randn(4, 2, 3)
    U[1, 0, 0] = float("nan")
    result = kron_matvec(A, G, U)
    assert result[1].isnan().any()
    assert result[[0, 2, 3]].isfinite().all()


def test_bad_arguments():
    A, G, U = torch.randn(3, 3), torch.randn(2, 2), torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match=r"U: expected 3 dimensions"):
        kron_matvec(A, G, U[0])
    with pytest.raises(ValueError, match=r"A: expected size 3 in dimension 0 \(the last"):
        kron_matvec(G, G, U)
    with pytest.raises(ValueError, match=r"G: expected size 2 in dimension 1 \(the middle"):
        kron_matvec(A, torch.randn(2, 3), U)
    with pytest.raises(TypeError, match=r"A: expected dtype"):
        kron_matvec(A.to(torch.complex64), G, U)
    with pytest.raises(RuntimeError, match=r"U: requires grad"):
        kron_matvec(A, G, U.requires_grad_())


def test_registered_operator():
    args = torch.randn(3, 3), torch.randn(2, 2), torch.randn(4, 2, 3)
    torch.library.opcheck(torch.ops.deaddir.kron_matvec.default, args)
    torch.library.opcheck(
        torch.ops.deaddir.kron_matvec.default, (args[0], torch.ones(1, 1), torch.randn(4, 1, 3))
    )
