"""Values of the Kronecker kernels in Triton's interpreter, against fp64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_relative, assert_rms, to_numpy

from deaddir_fast import ops
from deaddir_fast._backend import backend
from deaddir_fast.kernels import (
    _product,
    kron_matvec,
    kron_quadratic,
    kron_quadratic_rank1,
    kron_solve,
)
from deaddir_fast.ops.kron_quadratic import cholesky_factors
from deaddir_fast.ops.kron_solve import eigenproblem

pytestmark = pytest.mark.interp

TINY = _product.Config(16, 16, 1, 1)
TINY_FORM = kron_quadratic_rank1.Config(16, 16, 16, 1, 1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 17, 35), (5, 1, 19), (2, 32, 16)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6}


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def factor(size, dtype=torch.float64):
    """Positive definite, and symmetric to the last bit."""
    x = torch.randn(size, size + 2, dtype=torch.float64)
    square = (x @ x.mT / (size + 2) + 0.1 * torch.eye(size)).to(dtype)
    return square.tril() + square.tril(-1).mT


def layer(shape, dtype):
    return factor(shape[2], dtype), factor(shape[1], dtype), torch.randn(shape).to(dtype)


def product_truth(A, G, U):
    return np.einsum("ab,pbc,cd->pad", *map(to_numpy, (G, U, A)))


def quadratic_truth(A, G, U):
    return np.einsum("pab,pab->p", product_truth(A, G, U), to_numpy(U))


def rank1_truth(A, G, v, w):
    A, G, v, w = map(to_numpy, (A, G, v, w))
    return np.einsum("pa,ab,pb->p", w, A, w) * np.einsum("pa,ab,pb->p", v, G, v)


def matvec(A, G, U, **options):
    out = torch.full(U.shape, float("nan"), dtype=wide(U.dtype))
    kron_matvec.kron_matvec(out, A, G, U, config=TINY, **options)
    return out


def quadratic(A, G, U, **options):
    options.setdefault("total", wide(U.dtype))
    return kron_quadratic.kron_quadratic(A, G, U, config=TINY, **options)


def rank1(A, G, v, w, **options):
    options.setdefault("total", wide(v.dtype))
    return kron_quadratic_rank1.kron_quadratic_rank1(A, G, v, w, config=TINY_FORM, **options)


# --- G U A ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matvec(shape, dtype):
    A, G, U = layer(shape, dtype)
    A[0, -1] += 1  # G U A, not G U A^T
    G[0, -1] += 1
    assert_rms(matvec(A, G, U), product_truth(A, G, U), BOUND[wide(dtype)])


@pytest.mark.parametrize("shape", SHAPES)
def test_matvec_of_bf16_on_the_matrix_units_is_as_exact_as_fp32(shape):
    A, G, U = layer(shape, torch.bfloat16)
    A *= torch.logspace(-6, 6, shape[2])  # far apart, so that every bit of a piece counts
    result = matvec(A, G, U, widen=False)
    truth = product_truth(A, G, U)
    error = np.abs(to_numpy(result) - truth)
    size = product_truth(A.abs(), G.abs(), U.abs())
    assert (error <= 2e-7 * size.shape[1] ** 0.5 * size).all()


def test_an_fp32_matrix_is_the_exact_sum_of_its_pieces():
    x = torch.cat([torch.randn(60) * 10.0 ** torch.arange(-30, 30), torch.tensor([3.4e38, 0.0])])
    x = x.view(1, 1, -1)
    pieces = torch.full((3, 1, 1, _product.width(x.numel())), 7.0, dtype=torch.bfloat16)
    ones = torch.eye(x.numel())
    left, right = _product.store(x, torch.float32), _product.store(ones, torch.float32)[None]
    size = x.numel()
    _product.Product(left, right, 1, size, size, config=TINY).write(pieces)
    total = pieces.double().sum(0)[..., :size]
    assert torch.equal(total, x.double())
    assert not pieces[..., size:].any()


def test_matvec_obeys_precision():
    A, G, U = layer((1, 20, 20), torch.float32)
    truth = product_truth(A, G, U)
    assert_rms(matvec(A, G, U, precision="ieee"), truth, 1e-6)
    assert np.abs(to_numpy(matvec(A, G, U, precision="tf32")) - truth).max() > 1e-4


def test_matvec_of_strided_and_mixed_operands():
    A, G, U = layer((3, 7, 19), torch.float32)
    loose = torch.zeros(38, 19, dtype=torch.bfloat16)[::2]
    loose.copy_(A)
    turned = U.double().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    out = torch.empty(3, 7, 19, dtype=torch.float64)
    kron_matvec.kron_matvec(out, loose, G.half().mT, turned, config=TINY)
    assert_rms(out, product_truth(loose, G.half(), turned), 1e-14)
    same = U[:1].expand(3, 7, 19)
    assert_rms(matvec(A, G, same), product_truth(A, G, same), 1e-6)
    # bf16 directions and inputs under an fp32 output factor
    narrow = A.bfloat16(), G, U.bfloat16()
    assert_rms(matvec(*narrow, widen=False), product_truth(*narrow), 1e-6)


def test_matvec_writes_its_output_and_nothing_else():
    memory = torch.full((3, 2, 5, 7), 5.0)
    A, G, U = layer((2, 5, 7), torch.float32)
    kron_matvec.kron_matvec(memory[1], A, G, U, config=TINY)
    assert (memory[[0, 2]] == 5).all()
    assert_rms(memory[1], product_truth(A, G, U), 1e-6)


@pytest.mark.parametrize("widen", [True, False])
def test_matvec_puts_nan_and_infinity_where_they_belong(widen):
    A, G, U = layer((4, 18, 5), torch.bfloat16)
    U[1, 17, 2], U[2, 3, 4] = float("nan"), float("inf")
    A[0, 3] = float("inf")
    with np.errstate(invalid="ignore"):
        truth = np.stack([to_numpy(G) @ (u @ to_numpy(A)) for u in to_numpy(U)])
        assert np.isinf(truth).any()
        assert np.isnan(truth).any()
        assert_rms(matvec(A, G, U, widen=widen), truth, 1e-6)


def test_addresses_beyond_32_bits():
    far = torch.empty(2**31 + 256, dtype=torch.float16)  # touched in three places
    U = far.as_strided((3, 16, 16), (2**30, 16, 1))
    A, G, values = layer((3, 16, 16), torch.float16)
    U.copy_(values)
    assert _product.store(U, torch.float16) is U
    assert torch.equal(matvec(A, G, U), matvec(A, G, values))
    assert_rms(quadratic(A, G, U), quadratic_truth(A, G, values), 1e-6)


# --- tr(U^T G U A) --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quadratic(shape, dtype):
    A, G, U = layer(shape, dtype)
    result = quadratic(A, G, U, cholesky=False)
    assert result.dtype == wide(dtype)
    assert_rms(result, quadratic_truth(A, G, U), BOUND[wide(dtype)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_quadratic_by_cholesky(shape, dtype):
    A, G, U = layer(shape, dtype)
    assert cholesky_factors(A, G) is not None
    result = quadratic(A, G, U, cholesky=True)
    assert result.dtype == wide(dtype)
    assert_rms(result, quadratic_truth(A, G, U), BOUND[wide(dtype)])


def test_quadratic_of_bf16_on_the_matrix_units():
    A, G, U = layer((3, 33, 20), torch.bfloat16)
    assert_rms(quadratic(A, G, U, widen=False), quadratic_truth(A, G, U), 1e-6)


def test_quadratic_of_factors_that_are_not_symmetric():
    A, G, U = layer((3, 18, 7), torch.float64)
    A[0, 3] += 1
    G[0, 17] += 1
    for cholesky in (None, True, False):
        assert cholesky_factors(A, G) is None
        result = quadratic(A, G, U, cholesky=cholesky)
        assert_rms(result, np.maximum(quadratic_truth(A, G, U), 0), 1e-14)


def test_quadratic_of_strided_and_mixed_operands():
    A, G, U = layer((3, 7, 19), torch.float32)
    mixed = A.bfloat16(), G.half(), U.bfloat16().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    result = quadratic(*mixed, widen=False)  # U A in bf16, G^T U in fp32
    assert_rms(result, quadratic_truth(*mixed), 1e-6)
    result = quadratic(A, G.double(), U[:1].expand(3, 7, 19), total=torch.float64)
    assert_rms(result, quadratic_truth(A, G, U[:1].expand(3, 7, 19)), 1e-14)


def test_cholesky_reads_the_triangles_alone(monkeypatch):
    A, G, U = layer((1, 20, 35), torch.float32)
    expected = quadratic(A, G, U, cholesky=True)
    M, L = cholesky_factors(A, G)
    for root in (M, L):
        for first in range(16, len(root), 16):
            root[:first, first:] = float("nan")  # tiles above the diagonal
    monkeypatch.setattr(kron_quadratic, "cholesky_factors", lambda *factors: (M, L))
    assert torch.equal(quadratic(A, G, U, cholesky=True), expected)


def test_cholesky_resolves_directions_that_the_general_form_does_not():
    basis = torch.linalg.qr(torch.randn(20, 20).double())[0]
    A = (basis * torch.logspace(0, -9, 20)) @ basis.mT
    A = A.tril() + A.tril(-1).mT
    G, U = factor(3), (torch.randn(4, 3, 1).double() * basis[:, -1])
    # the factors in fp64, the products in fp32
    triangles = [root.float() for root in cholesky_factors(A, G)]
    assert all(root.isfinite().all() for root in triangles)
    truth = quadratic_truth(A, G, U.float())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kron_quadratic, "cholesky_factors", lambda *factors: triangles)
        sharp = quadratic(A.float(), G.float(), U.float(), cholesky=True)
    blunt = quadratic(A.float(), G.float(), U.float(), cholesky=False)
    assert np.abs(to_numpy(sharp) / truth - 1).max() < 1e-2
    assert np.abs(to_numpy(blunt) / truth - 1).max() > 1


def test_the_form_is_chosen_by_cost_type_and_factors(monkeypatch):
    asked = []
    monkeypatch.setattr(kron_quadratic, "cholesky_factors", lambda *factors: asked.append(factors))
    A, G, U = layer((2, 3, 4), torch.float32)
    quadratic(A, G, U)  # too small
    assert asked == []
    monkeypatch.setattr(kron_quadratic, "pays", lambda p, o, i: (p, o, i) == (2, 3, 4))
    quadratic(A, G, U)
    assert len(asked) == 1
    quadratic(A.half(), G.half(), U.half())  # a root has more digits than its factor
    monkeypatch.setattr(kron_quadratic, "capturing", lambda U: True)
    quadratic(A, G, U)
    assert len(asked) == 1


def test_quadratic_is_never_negative():
    x = torch.randn(12, 2).double()
    A, G = (x @ x.mT).float(), torch.ones(1, 1)
    U = torch.linalg.eigh(A.double())[1].mT[:, None].float()[:6]
    assert (quadratic_truth(A, G, U) < 0).any()
    for cholesky in (None, True):  # rank two: there is no root, or one of rounding errors
        assert (quadratic(A, G, U, cholesky=cholesky) >= 0).all()
    assert torch.equal(quadratic(A, G, U * 0), torch.zeros(6))


@pytest.mark.parametrize("cholesky", [False, True])
def test_quadratic_keeps_nan_and_infinity(cholesky):
    A, G, U = layer((4, 18, 5), torch.float64)
    U[1, 17, 2], U[2, 3, 4] = float("nan"), float("inf")
    result = quadratic(A, G, U, cholesky=cholesky)
    assert result.isnan()[1]
    assert not result.isfinite()[2]
    assert_rms(result[[0, 3]], quadratic_truth(A, G, U[[0, 3]]), 1e-14)
    for value in (float("nan"), float("inf")):
        for position in ((0, 0), (17, 17)):
            bad = G.clone()
            bad[position] = value
            assert cholesky_factors(A, bad) is None
            assert not quadratic(A, bad, U[:1], cholesky=cholesky).isfinite().any()
    assert quadratic(A, G * float("nan"), U, cholesky=cholesky).isnan().all()


def test_infinity_beyond_the_edge_of_a_tile_stays_infinite():
    A, G = torch.eye(3).double(), torch.eye(2).double()
    U = torch.zeros(1, 2, 3).double()
    U[0, 1] = float("inf")
    U[0, 0] = 1
    ones = torch.ones(3, 3).double(), torch.ones(2, 2).double()
    assert quadratic(*ones, U, cholesky=False).tolist() == [float("inf")]
    v, w = torch.ones(1, 2).double(), torch.full((1, 3), float("inf")).double()
    assert rank1(*ones, v, w).tolist() == [float("inf")]
    with np.errstate(invalid="ignore"):
        assert np.isnan(quadratic_truth(A, G, U)).all()  # 0 times infinity
        assert quadratic(A, G, U, cholesky=False).isnan().all()


# --- (w^T A w)(v^T G v) ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (35, 3, 5)])
def test_rank1(shape, dtype):
    p, o, i = shape
    A, G = factor(i, dtype), factor(o, dtype)
    A[0, -1] *= 2
    v, w = torch.randn(p, o).to(dtype), torch.randn(p, i).to(dtype)
    result = rank1(A, G, v, w)
    assert result.dtype == wide(dtype)
    expected = rank1_truth(A, G, v, w)
    size = rank1_truth(A.abs(), G.abs(), v.abs(), w.abs())
    eps = 1e-14 if dtype == torch.float64 else 2e-6
    assert (np.abs(to_numpy(result) - np.maximum(expected, 0)) <= eps * size).all()


def test_rank1_of_bf16_on_the_matrix_units():
    A, G = factor(37, torch.bfloat16), factor(5, torch.bfloat16)
    v, w = torch.randn(3, 5).bfloat16(), torch.randn(3, 37).bfloat16()
    assert_rms(rank1(A, G, v, w, widen=False), rank1_truth(A, G, v, w), 1e-6)


@pytest.mark.parametrize("rows", [16, 32])
def test_rank1_in_chunks_with_and_without_aligned_rows(rows, monkeypatch):
    monkeypatch.setattr(kron_quadratic_rank1, "CHUNK", 32)
    assert (rows > kron_quadratic_rank1.FEW) == (rows == 32)
    config = kron_quadratic_rank1.Config(16, rows, 16, 1, 1)
    A, G = factor(71, torch.float64), factor(3, torch.float64)
    v, w = torch.randn(35, 3).double(), torch.randn(35, 71).double()
    result = kron_quadratic_rank1.kron_quadratic_rank1(A, G, v, w, torch.float64, config=config)
    assert_relative(result, rank1_truth(A, G, v, w), 1e-13)


def test_rank1_of_strided_and_mixed_operands():
    A, G = factor(38)[::2, ::2], factor(7).float().mT
    v, w = torch.randn(7, 3).mT.half(), torch.randn(3, 40)[:, 2::2][:, :19]
    result = rank1(A, G, v, w, total=torch.float64)
    assert_relative(result, rank1_truth(A, G, v, w), 1e-13)


def test_rank1_is_never_negative_and_keeps_nan():
    A, G = -torch.eye(3), torch.eye(2)
    v, w = torch.ones(3, 2), torch.ones(3, 3)
    v[1, 0] = float("nan")
    result = rank1(A, G, v, w)
    assert result.isnan().tolist() == [False, True, False]
    assert result[0] == result[2] == 0
    assert rank1(A * float("nan"), G, v, w).isnan().all()


# --- (G (x) A + damping)^-1 U ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_solve(shape, dtype):
    p, o, i = shape
    A, G, U = layer(shape, dtype)
    out = torch.full(shape, float("nan"), dtype=dtype)
    kron_solve.kron_solve(out, *eigenproblem(A, G, U, 0.01), U, config=TINY)
    matrix = np.kron(to_numpy(G), to_numpy(A)) + 0.01 * np.eye(o * i)
    truth = np.linalg.solve(matrix, to_numpy(U).reshape(p, o * i).T).T.reshape(shape)
    assert_rms(out, truth, 1e-11 if dtype == torch.float64 else 1e-7)


def test_solve_keeps_nan_with_its_direction():
    A, G, U = layer((3, 17, 4), torch.float64)
    U[1] = float("nan")
    out = torch.empty_like(U)
    kron_solve.kron_solve(out, *eigenproblem(A, G, U, 0.1), U, config=TINY)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    with backend("triton"):
        assert ops.kron_solve(A * float("inf"), G, U, 0.1).isnan().all()


def test_solve_keeps_infinity():
    one = torch.ones(1, 1).double()
    out, U = torch.empty(1, 1, 1).double(), torch.full((1, 1, 1), float("inf")).double()
    kron_solve.kron_solve(out, one, one, one, U, config=TINY)
    assert out.item() == float("inf")


# --- all of them ----------------------------------------------------------------------------------


def calls(shape=(3, 17, 5), dtype=torch.float32):
    p, o, i = shape
    A, G, U = layer(shape, dtype)
    v, w = torch.randn(p, o).to(dtype), torch.randn(p, i).to(dtype)
    return {
        "kron_matvec": (A, G, U),
        "kron_solve": (A, G, U, 0.1),
        "kron_quadratic": (A, G, U),
        "kron_quadratic_rank1": (A, G, v, w),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_public_function(name):
    args = calls()[name]
    before = [x.clone() for x in args if isinstance(x, torch.Tensor)]
    expected = getattr(ops, name)(*args)
    with backend("triton"):
        first, second = (getattr(ops, name)(*args) for _ in range(2))
    assert torch.equal(first, second)
    assert_rms(first, expected, 2e-6)
    assert all(torch.equal(x, y) for x, y in zip(before, args, strict=False))
    with backend("triton"), torch.inference_mode():
        assert torch.equal(getattr(ops, name)(*args), first)


@pytest.mark.parametrize("name", list(calls()))
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(name, shape, monkeypatch):
    monkeypatch.setattr(_product.Product, "_launch", None)  # nothing to launch
    args = calls(shape)[name]
    expected = getattr(ops, name)(*args)
    with backend("triton"):
        result = getattr(ops, name)(*args)
    assert result.shape == expected.shape
    assert torch.equal(result, torch.zeros_like(expected))


@pytest.mark.parametrize("name", list(calls()))
def test_registered_operator(name):
    with backend("triton"):
        args = calls((2, 3, 4))[name]
        torch.library.opcheck(getattr(torch.ops.deaddir, name).default, args)


@pytest.mark.parametrize("module", [kron_matvec, kron_solve, kron_quadratic])
def test_directions_in_blocks(module, monkeypatch):
    name = module.__name__.rpartition(".")[2]
    args = calls((5, 17, 3))[name]
    with backend("triton"):
        whole = getattr(ops, name)(*args)
        for workspace in (1, 10_000):
            monkeypatch.setattr(module, "WORKSPACE", workspace)
            assert torch.equal(getattr(ops, name)(*args), whole)


def test_refusals_are_those_of_the_reference():
    A, G, U = torch.ones(3, 3), torch.ones(2, 2), torch.ones(1, 2, 3)
    with backend("triton"):
        with pytest.raises(ValueError, match=r"damping: .*singular to working precision"):
            ops.kron_solve(A, G, U, 0.0)
        with pytest.raises(ValueError, match=r"G: expected a symmetric matrix"):
            ops.kron_solve(A, torch.tensor([[1.0, 2.0], [0.0, 1.0]]), U, 0.1)


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(dtype, c) for dtype, configs in _product.CONFIGS.items() for c in configs],
)
def test_shipped_tiles(dtype, config):
    A, G, U = layer((1, config.block + 1, config.block + 3), dtype)
    narrow = {"widen": False, "config": config}
    out = torch.full(U.shape, float("nan"), dtype=wide(dtype))
    kron_matvec.kron_matvec(out, A, G, U, **narrow)
    assert_rms(out, product_truth(A, G, U), BOUND[wide(dtype)])
    result = kron_quadratic.kron_quadratic(A, G, U, wide(dtype), cholesky=True, **narrow)
    assert_rms(result, quadratic_truth(A, G, U), BOUND[wide(dtype)])


@pytest.mark.parametrize(
    ("dtype", "config"),
    [(dtype, c) for dtype, configs in kron_quadratic_rank1.CONFIGS.items() for c in configs],
)
def test_shipped_forms(dtype, config):
    A, G = factor(config.block + 9, dtype), factor(5, dtype)
    v, w = torch.randn(config.rows + 1, 5).to(dtype), torch.randn(config.rows + 1, len(A)).to(dtype)
    result = kron_quadratic_rank1.kron_quadratic_rank1(
        A, G, v, w, wide(dtype), widen=False, config=config
    )
    assert_rms(result, rank1_truth(A, G, v, w), BOUND[wide(dtype)])


def test_many_tiles_in_groups():
    # more rows of tiles than a group, and a last group that is not full
    A, G, U = layer((1, 170, 3), torch.float32)
    assert _product.tiles(170, 1, 16) > _product.GROUP
    assert_rms(matvec(A, G, U), product_truth(A, G, U), 1e-6)
    wide_layer = layer((1, 3, 40), torch.float32)
    assert_rms(quadratic(*wide_layer, cholesky=True), quadratic_truth(*wide_layer), 1e-6)
