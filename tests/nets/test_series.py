"""Power-series arithmetic against closed-form Taylor coefficients and nested derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deaddir_fast.nets import series as ts
from deaddir_fast.nets.series import Series

torch.set_num_threads(1)
ORDER = 5


def nested(function: Callable[[Tensor], Tensor], coefficients: Tensor) -> Tensor:
    """Coefficients of function(sum_q c_q t^q) by nested forward derivatives."""

    def along(t: Tensor) -> Tensor:
        powers = torch.stack([t**q for q in range(len(coefficients))])
        return function((powers[:, None] * coefficients).sum(0))

    out, derivative = [], along
    for q in range(len(coefficients)):
        out.append(derivative(torch.zeros((), dtype=torch.float64)) / math.factorial(q))

        def derivative(t: Tensor, inner: Callable[[Tensor], Tensor] = derivative) -> Tensor:
            return torch.func.jvp(inner, (t,), (torch.ones_like(t),))[1]

    return torch.stack(out)


def filled(s: Series) -> Tensor:
    return torch.stack([torch.zeros_like(s.base) if c is None else c for c in s.c])


def random_series(seed: int, shift: float = 0.0, scale: float = 0.5) -> Series:
    generator = torch.Generator().manual_seed(seed)
    c = scale * torch.randn(ORDER + 1, 3, generator=generator, dtype=torch.float64)
    c[0] += shift
    return Series(list(c))


CASES: dict[str, tuple[Callable[[Series], Series], Callable[[Tensor], Tensor], float]] = {
    "exp": (ts.exp, torch.exp, 0.0),
    "expm1": (ts.expm1, torch.expm1, 0.0),
    "log": (ts.log, torch.log, 3.0),
    "log1p": (ts.log1p, torch.log1p, 1.0),
    "tanh": (ts.tanh, torch.tanh, 0.3),
    "sigmoid": (ts.sigmoid, torch.sigmoid, -0.3),
    "erf": (ts.erf, torch.erf, 0.2),
    "sin": (lambda u: ts.sin_cos(u)[0], torch.sin, 0.0),
    "cos": (lambda u: ts.sin_cos(u)[1], torch.cos, 0.0),
    "sinh": (lambda u: ts.sinh_cosh(u)[0], torch.sinh, 0.0),
    "cosh": (lambda u: ts.sinh_cosh(u)[1], torch.cosh, 0.0),
    "sqrt": (ts.sqrt, torch.sqrt, 3.0),
    "rsqrt": (ts.rsqrt, torch.rsqrt, 3.0),
    "reciprocal": (ts.reciprocal, torch.reciprocal, 3.0),
    "power 5": (lambda u: ts.power(u, 5), lambda x: x**5, 0.0),
    "power 0": (lambda u: ts.power(u, 0), lambda x: x**0, 0.0),
    "power -2": (lambda u: ts.power(u, -2), lambda x: x**-2, 3.0),
    "power 0.3": (lambda u: ts.power(u, 0.3), lambda x: x**0.3, 3.0),
    "square": (ts.square, torch.square, 0.0),
    "softmax": (lambda u: ts.softmax(u, 0), lambda x: torch.softmax(x, 0), 0.0),
    "log_softmax": (lambda u: ts.log_softmax(u, 0), lambda x: torch.log_softmax(x, 0), 0.0),
    "product": (lambda u: ts.product(u, 0), lambda x: x.prod(0, keepdim=True), 0.5),
    "divide": (
        lambda u: ts.divide(ts.exp(u), ts.add(u, ts.square(u))),
        lambda x: torch.exp(x) / (x + x * x),
        3.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_function_against_nested_derivatives(name: str) -> None:
    rule, function, shift = CASES[name]
    u = random_series(len(name), shift)
    expected = nested(function, filled(u))
    got = filled(rule(u))
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_zero_coefficients_may_be_left_out(name: str) -> None:
    rule, _, shift = CASES[name]
    dense = random_series(3, shift)
    for q in (1, 3, 4):
        dense.c[q] = torch.zeros(3, dtype=torch.float64)
    sparse = Series([None if q in (1, 3, 4) else c for q, c in enumerate(dense.c)])
    assert torch.allclose(filled(rule(sparse)), filled(rule(dense)), rtol=1e-13, atol=1e-14)


def test_known_expansions_to_order_nine() -> None:
    t = Series([torch.zeros(1).double(), torch.ones(1).double()] + [None] * 8)
    tangent = [0, 1, 0, -1 / 3, 0, 2 / 15, 0, -17 / 315, 0, 62 / 2835]
    assert torch.allclose(filled(ts.tanh(t))[:, 0], torch.tensor(tangent).double(), atol=1e-15)
    exponential = torch.tensor([1 / math.factorial(q) for q in range(10)]).double()
    assert torch.allclose(filled(ts.exp(t))[:, 0], exponential, atol=1e-16)
    geometric = filled(ts.reciprocal(t.with_base(t.base + 1)))[:, 0]
    assert torch.equal(geometric, torch.tensor([1.0, -1.0] * 5).double())
    root = [1, 1 / 2, -1 / 8, 1 / 16, -5 / 128, 7 / 256, -21 / 1024, 33 / 2048, -429 / 32768]
    series = filled(ts.sqrt(t.with_base(t.base + 1)))[:9, 0]
    assert torch.allclose(series, torch.tensor(root).double(), rtol=1e-14)
    error = [0, 1, 0, -1 / 3, 0, 1 / 10, 0, -1 / 42, 0, 1 / 216]
    expected = torch.tensor(error).double() * (2 / math.sqrt(math.pi))
    assert torch.allclose(filled(ts.erf(t))[:, 0], expected, atol=1e-16)


def test_whole_powers_hold_at_zero() -> None:
    t = Series([torch.zeros(1), torch.ones(1)] + [None] * (ORDER - 1))
    cube = ts.power(t, 3)
    assert [None if c is None else float(c) for c in cube.c[:5]] == [0, 0, 0, 1, None]


def test_saturated_functions_keep_relative_accuracy() -> None:
    u = Series([torch.tensor([40.0]).double(), torch.ones(1).double(), None])
    first = float(ts.tanh(u).c[1])
    assert math.isclose(first, 4 * math.exp(-80), rel_tol=1e-12)
    assert math.isclose(float(ts.sigmoid(u).c[1]), math.exp(-40), rel_tol=1e-12)


def test_masked_softmax_entries_stay_dead() -> None:
    u = random_series(1)
    u.c[0] = torch.tensor([0.3, -math.inf, 0.1]).double()
    v = filled(ts.softmax(u, 0))
    assert torch.equal(v[:, 1], torch.zeros(ORDER + 1).double())
    kept = ts.softmax(Series([c[[0, 2]] for c in u.c]), 0)
    assert torch.allclose(v[:, [0, 2]], filled(kept), rtol=1e-14, atol=1e-15)


def test_bilinear_loops_over_the_sparser_factor() -> None:
    calls = []

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return a @ b

    x = Series([torch.randn(4, 3).double() for _ in range(ORDER + 1)])
    w = Series([torch.randn(3, 2).double(), torch.randn(3, 2).double()] + [None] * (ORDER - 1))
    got = filled(ts.bilinear(matmul, x, w))
    for k in range(ORDER + 1):
        expected = sum(x.c[i] @ w.c[k - i] for i in range(k + 1) if w.c[k - i] is not None)
        assert torch.allclose(got[k], expected, atol=1e-13)
    assert len(calls) == 4  # two weights, each with the base value and with all the rest at once
