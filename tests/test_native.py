"""The C++ kernels, called directly: values, independence of threads, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deaddir_fast import _native

C: Any = _native.extension

needs_extension = pytest.mark.skipif(C is None, reason=str(_native.why_not))


@pytest.fixture(params=C.build_info()["isas"] if C else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    previous = C.use_isa(request.param)
    yield request.param
    C.use_isa(previous)


def exact(a: Tensor, g: Tensor, U: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """mean_n (sum_t g^T U a)^2 in fp64, and the same of absolute values (the scale of errors)."""
    a_, g_, U_ = (x.to(torch.float64).numpy() for x in (a, g, U))
    if a_.ndim == 2:
        a_, g_ = a_[:, None], g_[:, None]

    def form(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        gu = np.einsum("nto,poi->ntpi", y, z, optimize=True)
        return np.einsum("ntpi,nti->np", gu, x, optimize=True)

    q, size = form(a_, g_, U_), form(abs(a_), abs(g_), abs(U_))
    return (q**2).mean(0), (abs(q) * size).mean(0)


def curvature(a: Tensor, g: Tensor, U: Tensor, threads: int = 1) -> Tensor:
    wide = torch.float64 in (a.dtype, g.dtype, U.dtype)
    out = torch.full((U.shape[0],), float("nan"), dtype=torch.float64 if wide else torch.float32)
    C.directional_curvature(a, g, U, out, threads)
    return out


def problem(
    n: int, t: int | None, i: int, o: int, p: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    lead = (n,) if t is None else (n, t)
    return (
        torch.randn(*lead, i, dtype=torch.float64).to(dtype),
        torch.randn(*lead, o, dtype=torch.float64).to(dtype),
        torch.randn(p, o, i, dtype=torch.float64).to(dtype),
    )


# Around every edge of the tiling, with and without contracting tokens first: register tiles of 6
# or 12 rows, panels of 4 to 32 columns, runs of 256, groups of 8 and 32 samples, blocks of up to
# 512, rows of 2048 tokens.
SHAPES = [
    (1, None, 1, 1, 1),
    (3, None, 5, 7, 2),
    (31, None, 255, 11, 3),
    (32, None, 256, 12, 1),
    (33, None, 257, 13, 3),
    (600, None, 64, 40, 2),
    (1025, None, 3, 2, 5),
    (2, None, 1030, 130, 12),
    (5, 1, 9, 8, 4),
    (7, 3, 20, 30, 1),
    (2, 3, 5, 7, 2),
    (5, 17, 33, 13, 9),
    (33, 8, 130, 25, 6),
    (1, 40, 257, 25, 11),
    (9, 70, 140, 110, 3),
    (2, 600, 70, 31, 5),
    (1, 2100, 17, 3, 300),
]
IDS = ["x".join(str(k) for k in shape) for shape in SHAPES]

# Relative to sum |q| sum |g||U||a|, which is what rounding errors scale with when q cancels.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,  # inputs are exact, arithmetic is fp32
    torch.float16: 1e-6,
}


@needs_extension
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_values(isa: str, shape: tuple, dtype: torch.dtype) -> None:
    a, g, U = problem(*shape, dtype=dtype)
    expected, scale = exact(a, g, U)
    got = curvature(a, g, U).double().numpy()
    assert (abs(got - expected) <= TOLERANCE[dtype] * scale).all()


@needs_extension
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("shape", [(512, None, 700, 300, 3), (40, 24, 130, 90, 8)])
def test_relative_error(isa: str, shape: tuple, dtype: torch.dtype, bound: float) -> None:
    a, g, U = problem(*shape, dtype=dtype)
    expected, _ = exact(a, g, U)
    got = curvature(a, g, U).double().numpy()
    assert (abs(got - expected) <= bound * expected).all()


@needs_extension
def test_a_closed_form(isa: str) -> None:
    # all ones: q = t i o for every sample
    n, t, i, o, p = 5, 9, 33, 14, 7
    ones = torch.ones
    assert (curvature(ones(n, i), ones(n, o), ones(p, o, i)) == float(i * o) ** 2).all()
    out = curvature(ones(n, t, i), ones(n, t, o), ones(p, o, i))
    assert (out == float(t * i * o) ** 2).all()


@needs_extension
def test_a_dead_direction_is_exactly_zero(isa: str) -> None:
    for t in (None, 6):
        a, g, U = problem(50, t, 40, 30, 8)
        a[..., 20:] = 0
        U[:, :, :20] = 0  # weights that only read inputs which are always zero
        assert (curvature(a, g, U) == 0).all()


@needs_extension
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_same_bits_on_any_number_of_threads(isa: str, shape: tuple) -> None:
    a, g, U = problem(*shape, dtype=torch.float32)
    once = curvature(a, g, U, 1)
    for threads in (1, 2, 3, 7):
        assert torch.equal(once, curvature(a, g, U, threads))


@needs_extension
@pytest.mark.parametrize("t", [None, 40])
def test_same_bits_on_threads_where_the_work_is_split(t: int | None) -> None:
    a, g, U = problem(30, t, 300, 200, 5, dtype=torch.float32)  # beyond the serial threshold
    once = curvature(a, g, U, 1)
    for threads in (2, 2, 5):
        assert torch.equal(once, curvature(a, g, U, threads))


@needs_extension
def test_mixed_types_are_widened(isa: str) -> None:
    for t in (None, 12):
        a, g, U = problem(20, t, 300, 14, 4)
        a, g, U = a.bfloat16(), g.half(), U.float()
        wide = curvature(a.double(), g.double(), U.double())
        torch.testing.assert_close(curvature(a, g, U).double(), wide, rtol=2e-5, atol=0)
        assert torch.equal(curvature(a, g, U.double()), wide)


@needs_extension
def test_half_precision_inputs_are_read_exactly(isa: str) -> None:
    # every finite float16 and bfloat16 value, one a sample and direction: q = value
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        values = values[values.isfinite()]
        one = torch.ones(1, 1, dtype=dtype)
        out = torch.empty(len(values), dtype=torch.float64)
        C.directional_curvature(one, one, values.view(-1, 1, 1), out, 1)
        assert torch.equal(out, values.double().square())


@needs_extension
def test_empty_extents(isa: str) -> None:
    def result(n: int, t: int | None, i: int, o: int, p: int) -> Tensor:
        return curvature(*problem(n, t, i, o, p))

    assert result(0, None, 3, 4, 2).isnan().all()  # a mean over nothing, as torch.mean
    assert result(0, 5, 3, 4, 2).isnan().all()
    assert result(0, 0, 0, 0, 2).isnan().all()
    for shape in [(5, 0, 3, 4, 2), (5, None, 0, 4, 2), (5, None, 3, 0, 2), (5, 7, 0, 4, 2)]:
        assert torch.equal(result(*shape), torch.zeros(2, dtype=torch.float64))
    assert result(5, None, 3, 4, 0).shape == (0,)
    assert result(5, 7, 3, 4, 0).shape == (0,)


@needs_extension
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("t", [None, 9])
def test_non_finite_values_propagate_and_stay_apart(isa: str, bad: float, t: int | None) -> None:
    # one non-finite entry of U spoils its own direction and no other; sizes leave padding
    a, g, U = (x.abs() + 0.5 for x in problem(5, t, 35, 7, 7))
    clean = curvature(a, g, U)
    U[3, 6, 34] = bad
    spoiled = curvature(a, g, U)
    keep = torch.arange(7) != 3
    assert torch.equal(spoiled[keep], clean[keep])
    assert spoiled[3].isnan() if bad != bad else spoiled[3] == float("inf")
    # and a non-finite entry of a or g spoils all, as itself: padding must not make inf a NaN
    for which in (0, 1):
        args = [x.abs() + 0.5 for x in problem(5, t, 35, 7, 7)]
        args[which].view(-1)[-1] = bad
        out = curvature(*args)
        assert out.isnan().all() if bad != bad else (out == float("inf")).all()


@needs_extension
def test_inputs_are_left_alone() -> None:
    args = problem(33, 5, 20, 13, 6)
    before = [x.clone() for x in args]
    curvature(*args, threads=2)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


@needs_extension
def test_torch_goes_through_the_exchange_api_and_numpy_does_not() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 3))
    assert C.uses_exchange(torch.zeros(2, dtype=torch.bfloat16))
    assert C.uses_exchange(weight)
    assert not C.uses_exchange(np.zeros(2))


@needs_extension
def test_numpy_arrays_and_views_with_an_offset() -> None:
    a, g, U = problem(20, None, 6, 4, 3)
    expected = curvature(a, g, U)
    out = np.empty(3)
    C.directional_curvature(a.numpy(), g.numpy(), U.numpy(), out, 1)
    assert (out == expected.numpy()).all()

    padded = torch.cat([torch.full((2, 6), float("nan"), dtype=a.dtype), a])
    assert torch.equal(curvature(padded[2:], g, U), expected)


@needs_extension
def test_results_may_be_wider_than_the_inputs() -> None:
    # 1e-30 squared is nothing in fp32 and something in fp64
    a, g, U = torch.tensor([[1e-30]]), torch.ones(1, 1), torch.ones(1, 1, 1)
    out = torch.empty(1, dtype=torch.float64)
    C.directional_curvature(a, g, U, out, 1)
    assert out.item() == pytest.approx(1e-60, rel=1e-6)


def _good() -> dict[str, Any]:
    a, g, U = problem(4, 3, 6, 5, 2)
    return {"a": a, "g": g, "U": U, "out": torch.empty(2, dtype=torch.float64), "threads": 1}


@needs_extension
@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("a", torch.zeros(4, 6, 3, dtype=torch.float64).mT, ValueError, "a: .*contiguous.*strided"),
        ("g", torch.zeros(4, 3, 10)[..., ::2], ValueError, "g: .*contiguous"),
        ("U", torch.zeros(1, 5, 6).expand(2, 5, 6), ValueError, "U: .*contiguous"),
        ("out", torch.zeros(4)[::2], ValueError, "out: .*contiguous"),
        ("a", torch.zeros(4, 3, 6, dtype=torch.int64), TypeError, "a: .*got Tensor of .*int64"),
        (
            "a",
            torch.zeros(4, 3, 6, dtype=torch.complex64),
            TypeError,
            "a: .*complex64",
        ),
        ("g", torch.zeros(4, 3, 5, dtype=torch.bool), TypeError, "g: .*bool"),
        ("a", [[1.0]], TypeError, "a: .*got unreadable list"),
        ("U", None, TypeError, "U: .*got unreadable NoneType"),
        ("a", torch.zeros(24), ValueError, r"a: .*\(n, i\) or \(n, t, i\), got float32 \(24,\)"),
        ("g", torch.zeros(4, 5), ValueError, "g: .*as many dimensions as a"),
        ("g", torch.zeros(3, 3, 5), ValueError, "g: .*size 4 in dimension 0 .the samples of a"),
        ("g", torch.zeros(4, 2, 5), ValueError, "g: .*size 3 in dimension 1 .the tokens of a"),
        ("U", torch.zeros(5, 6), ValueError, r"U: .*\(p, o, i\)"),
        ("U", torch.zeros(2, 6, 6), ValueError, "U: .*size 5 in dimension 1 .the outputs of g"),
        ("U", torch.zeros(2, 5, 5), ValueError, "U: .*size 6 in dimension 2 .the inputs of a"),
        ("out", torch.zeros(3), ValueError, "out: .*size 2 in dimension 0 .the directions of U"),
        ("out", torch.zeros(2, 1), ValueError, r"out: .*\(p,\)"),
        ("out", torch.zeros(2, dtype=torch.bfloat16), ValueError, "out: .*float64 or float32"),
        ("threads", 0, ValueError, "threads: .*at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(
    name: str, value: Any, kind: type[Exception], message: str
) -> None:
    C.directional_curvature(**_good())  # the rest is in order
    with pytest.raises(kind, match=message):
        C.directional_curvature(**{**_good(), name: value})


@needs_extension
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(2), r"out: .*\(p, n\)"),
        (torch.zeros(4, 2), "out: .*size 2 in dimension 0 .the directions of U"),
        (torch.zeros(2, 3), "out: .*size 4 in dimension 1 .the samples of a"),
        (torch.zeros(2, 4), "out: .*float64, as an input is"),
        (torch.zeros(4, 2).mT, "out: .*a contiguous tensor"),
    ],
)
def test_bad_results_of_scores_are_named(out: Tensor, message: str) -> None:
    C.directional_scores(**{**_good(), "out": torch.zeros(2, 4).double()})  # the rest is in order
    with pytest.raises(ValueError, match=message):
        C.directional_scores(**{**_good(), "out": out})


@needs_extension
def test_tensors_elsewhere_or_without_storage_are_refused() -> None:
    for tensor in (torch.zeros(4, 3, 6, device="meta"), torch.eye(6).to_sparse()):
        with pytest.raises(TypeError, match=r"a: expected a CPU tensor.*got Tensor of.*\)$"):
            C.directional_curvature(**{**_good(), "a": tensor})


@needs_extension
def test_read_only_memory_is_for_inputs() -> None:
    out = np.zeros(2)
    out.flags.writeable = False
    with pytest.raises(TypeError, match=r"out: .*unwritable"):
        C.directional_curvature(**{**_good(), "out": out})
    a = np.ones((4, 3, 6))
    a.flags.writeable = False
    C.directional_curvature(**{**_good(), "a": a})


@needs_extension
def test_instruction_sets() -> None:
    info = C.build_info()
    assert info["isa"] in info["isas"]
    assert "portable" in info["isas"]
    with pytest.raises(ValueError, match=r"name: expected one of portable.*got 'mmx'"):
        C.use_isa("mmx")
    assert C.build_info()["isa"] == info["isa"]


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


BLOCKED = """
import sys
sys.modules["deaddir_fast._C"] = None
from deaddir_fast import _native
print(_native.extension, "|", _native.why_not)
"""


def test_a_missing_extension_says_why_and_is_an_error_where_required() -> None:
    optional = _python(BLOCKED, DDF_REQUIRE_EXT="0")
    assert optional.returncode == 0, optional.stderr
    assert optional.stdout.startswith("None | deaddir_fast._C does not load")
    required = _python(BLOCKED, DDF_REQUIRE_EXT="1")
    assert required.returncode == 1
    assert "ImportError: DDF_REQUIRE_EXT is set" in required.stderr


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime() -> None:
    code = """
from deaddir_fast import _native
lines = {l.split()[-1] for l in open("/proc/self/maps") if "libgomp" in l or "libiomp" in l}
print(len(lines), sorted(lines))
"""
    found = _python(code)
    assert found.stdout.startswith("1 "), found.stdout + found.stderr
