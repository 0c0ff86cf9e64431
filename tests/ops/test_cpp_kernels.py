"""What holds for every C++ kernel: values around tile edges, each instruction set, determinism."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from compare import to_numpy
from torch import Tensor

import deaddir_fast as dd
from deaddir_fast import _native
from deaddir_fast._backend import backend

C: Any = _native.extension
pytestmark = pytest.mark.skipif(C is None, reason=f"no C++ here: {_native.why_not}")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def forced_route() -> Iterator[str]:
    """These tests are about one route (in place of the two of conftest.py)."""
    with backend("cpu"):
        yield "cpu"


@dataclass(frozen=True)
class Case:
    """Shapes of the arguments by extent, the call, and the same in fp64 numpy."""

    shapes: Callable[..., list[tuple[int, ...]]]
    call: Callable[..., Tensor]
    truth: Callable[..., np.ndarray]
    extents: list[tuple[int, ...]]


def _gram(x):
    return x.T @ x


def _packed(x):
    return (x.T @ x)[np.tril_indices(x.shape[1])]


def _weighted(x, weight):
    return (x * weight[:, None]).T @ x


def _matvec(A, G, U):
    return G @ U @ A


def _quadratic(A, G, U):
    return ((G @ U @ A.T) * U).sum((1, 2)).clip(min=0)


def _form(square, rows):
    return ((rows @ square) * rows).sum(1).clip(min=0)


def _quadratic_rank1(A, G, v, w):
    return _form(A, w) * _form(G, v)


def _scores(a, g, U):
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    # einsum's own path multiplies p by o by n t: through the gradient of each sample instead
    gradient = np.einsum("nto,nti->noi", g, a).reshape(len(a), -1)
    return U.reshape(len(U), -1) @ gradient.T


def _scores_rank1(a, g, v, w):
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    return ((g @ v.T) * (a @ w.T)).sum(1).T


def _curvature(a, g, U):
    return (_scores(a, g, U) ** 2).mean(1)


def _curvature_rank1(a, g, v, w):
    return (_scores_rank1(a, g, v, w) ** 2).mean(1)


GRAM = [(0, 3), (5, 0), (1, 1), (7, 13), (513, 33), (64, 48), (1031, 97), (40, 145), (2, 300)]
KRON = [(1, 1, 1), (2, 5, 0), (0, 3, 4), (2, 0, 4), (3, 13, 31), (2, 12, 32), (1, 25, 67),
        (5, 97, 130), (2, 47, 521)]  # fmt: skip
CURVATURE = [(1, 1, 1, 1), (13, 11, 31, 3), (37, 48, 64, 2), (130, 521, 67, 2), (9, 5, 260, 7)]
TOKENS = [(1, 1, 1, 1, 1), (3, 7, 13, 31, 5), (17, 33, 12, 64, 9), (2, 600, 25, 67, 4),
          (20, 2, 40, 130, 9), (7, 5, 9, 11, 1)]  # fmt: skip

CASES = {
    "gram": Case(lambda n, i: [(n, i)], dd.ops.gram, _gram, GRAM),
    "gram weighted": Case(
        lambda n, i: [(n, i), (n,)],
        lambda x, weight: dd.ops.gram(x, weight=weight),
        _weighted,
        GRAM,
    ),
    "gram packed": Case(lambda n, i: [(n, i)], dd.ops.gram_packed, _packed, GRAM),
    "kron_matvec": Case(
        lambda p, o, i: [(i, i), (o, o), (p, o, i)], dd.ops.kron_matvec, _matvec, KRON
    ),
    "kron_quadratic": Case(
        lambda p, o, i: [(i, i), (o, o), (p, o, i)], dd.ops.kron_quadratic, _quadratic, KRON
    ),
    "kron_quadratic_rank1": Case(
        lambda p, o, i: [(i, i), (o, o), (p, o), (p, i)],
        dd.ops.kron_quadratic_rank1,
        _quadratic_rank1,
        [*KRON, (13, 70, 521), (30, 5, 131)],
    ),
    "directional_curvature": Case(
        lambda n, o, i, p: [(n, i), (n, o), (p, o, i)],
        dd.ops.directional_curvature,
        _curvature,
        CURVATURE,
    ),
    "directional_curvature tokens": Case(
        lambda n, t, o, i, p: [(n, t, i), (n, t, o), (p, o, i)],
        dd.ops.directional_curvature,
        _curvature,
        TOKENS,
    ),
    "directional_curvature_rank1": Case(
        lambda n, o, i, p: [(n, i), (n, o), (p, o), (p, i)],
        dd.ops.directional_curvature_rank1,
        _curvature_rank1,
        CURVATURE,
    ),
    "directional_curvature_rank1 tokens": Case(
        lambda n, t, o, i, p: [(n, t, i), (n, t, o), (p, o), (p, i)],
        dd.ops.directional_curvature_rank1,
        _curvature_rank1,
        TOKENS,
    ),
    "directional_scores": Case(
        lambda n, o, i, p: [(n, i), (n, o), (p, o, i)],
        dd.ops.directional_scores,
        _scores,
        CURVATURE,
    ),
    "directional_scores tokens": Case(
        lambda n, t, o, i, p: [(n, t, i), (n, t, o), (p, o, i)],
        dd.ops.directional_scores,
        _scores,
        TOKENS,
    ),
    "directional_scores_rank1": Case(
        lambda n, o, i, p: [(n, i), (n, o), (p, o), (p, i)],
        dd.ops.directional_scores_rank1,
        _scores_rank1,
        CURVATURE,
    ),
    "directional_scores_rank1 tokens": Case(
        lambda n, t, o, i, p: [(n, t, i), (n, t, o), (p, o), (p, i)],
        dd.ops.directional_scores_rank1,
        _scores_rank1,
        TOKENS,
    ),
}
SWEEP = [(name, extents) for name, case in CASES.items() for extents in case.extents]


def build(case: Case, extents: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Random arguments; the factors of Kronecker forms are positive definite."""
    arguments = []
    for shape in case.shapes(*extents):
        x = torch.randn(shape, dtype=torch.float64)
        if len(shape) == 2 and shape[0] == shape[1] and case.call in FACTORED:
            x = x @ x.mT / max(1, shape[0]) + torch.eye(shape[0], dtype=torch.float64)
        arguments.append(x.to(dtype))
    return arguments


FACTORED = (dd.ops.kron_quadratic, dd.ops.kron_quadratic_rank1, dd.ops.kron_matvec)


def check(case: Case, arguments: list[Tensor], result: Tensor) -> None:
    """Errors relative to the size of the result, bounded as the operations promise."""
    wide = any(x.dtype == torch.float64 for x in arguments)
    dtype = torch.float64 if wide else torch.float32
    expected = case.truth(*map(to_numpy, arguments))
    assert result.dtype == dtype
    assert result.shape == expected.shape
    error = np.abs(to_numpy(result) - expected).max(initial=0.0)
    assert error <= BOUND[dtype] * np.abs(expected).max(initial=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "extents"), SWEEP)
def test_values(name, extents, dtype):
    arguments = build(CASES[name], extents, dtype)
    before = [x.clone() for x in arguments]
    check(CASES[name], arguments, CASES[name].call(*arguments))
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_instruction_set(name, dtype):
    case = CASES[name]
    before = C.build_info()["isa"]
    try:
        for isa in C.build_info()["isas"]:
            C.use_isa(isa)
            for extents in case.extents:
                arguments = build(case, extents, dtype)
                check(case, arguments, case.call(*arguments))
    finally:
        C.use_isa(before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_bits_on_any_number_of_threads(name, dtype):
    case, threads = CASES[name], torch.get_num_threads()
    try:
        for extents in case.extents[-3:]:
            big = tuple(3 * e for e in extents)  # beyond what is run on one thread for its size
            arguments = build(case, big, dtype)
            results = []
            for count in (1, 2, 3, 7, 1):
                torch.set_num_threads(count)
                results.append(case.call(*arguments))
            assert all(torch.equal(results[0], other) for other in results[1:])
            check(case, arguments, results[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_mixed_types_and_strides(name):
    case = CASES[name]
    extents = case.extents[4]
    arguments = build(case, extents, torch.float32)
    wide = [
        (x.double() if k == len(arguments) - 1 else x.bfloat16()) for k, x in enumerate(arguments)
    ]
    check(case, wide, case.call(*wide))
    spread = []
    for x in arguments:
        room = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0)
        room[..., ::2] = x
        spread.append(room[..., ::2])
    assert all(torch.equal(x, y) for x, y in zip(arguments, spread, strict=True))
    assert torch.equal(case.call(*spread), case.call(*arguments))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(name, bad):
    case = CASES[name]
    arguments = build(case, case.extents[4], torch.float32)
    with np.errstate(invalid="ignore"):
        for k in range(len(arguments)):
            broken = [x.clone() for x in arguments]
            broken[k].reshape(-1)[broken[k].numel() // 2] = bad
            expected = np.isfinite(case.truth(*map(to_numpy, broken)))
            # a value clamped at 0 from below, in one form, may be one that is not in another
            np.testing.assert_array_equal(np.isfinite(to_numpy(case.call(*broken))), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grams_of_16_bit_inputs_have_no_negative_eigenvalue(dtype):
    # half as many rows as columns: half of the spectrum is zero
    for scale in (1.0, 100.0):
        x = (torch.randn(150, 300) * torch.logspace(0, -3, 300) * scale).to(dtype)
        values = np.linalg.eigvalsh(to_numpy(dd.ops.gram(x)))
        assert values[0] >= -1e-6 * values[-1]


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    n, i = 2**31 // 32 + 1000, 32
    if _memory() < 3 * 2 * n * i:
        pytest.skip("needs 13 GB of memory")
    x = torch.zeros(n, i, dtype=torch.bfloat16)
    x[-1], x[0, 3] = torch.arange(i), 2
    expected = np.outer(np.arange(i), np.arange(i)).astype(float)
    expected[3, 3] += 4
    np.testing.assert_array_equal(to_numpy(dd.ops.gram(x)), expected)
    v = torch.ones(1, i)
    curvature = dd.ops.directional_curvature_rank1(x, x, v, v)
    total = (np.arange(i).sum() ** 4 + 2.0**4) / n
    np.testing.assert_allclose(to_numpy(curvature), [total], rtol=2e-5)
