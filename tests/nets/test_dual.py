"""The dual forward: exact small differences, and values and derivatives against torch.func."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast.nets import dual, graph
from deaddir_fast.nets.dual_elementwise import STEPS, power
from deaddir_fast.nets.weights import Points, RankOne, check_directions, rank_one_factors

torch.set_num_threads(1)
getcontext().prec = 70
F64 = torch.float64


# High-precision elementary functions ------------------------------------------------------------


def _series(first: Decimal, ratio: Callable[[int], Decimal]) -> Decimal:
    total, term, k = first, first, 0
    while abs(term) > Decimal(10) ** -65:
        k += 1
        term = term * ratio(k)
        total += term
    return total


def _d_sin(x: Decimal) -> Decimal:
    return _series(x, lambda k: -x * x / ((2 * k) * (2 * k + 1)))


def _d_cos(x: Decimal) -> Decimal:
    return _series(Decimal(1), lambda k: -x * x / ((2 * k) * (2 * k - 1)))


def _d_erf(x: Decimal) -> Decimal:
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620")
    total, power_, k = Decimal(0), x, 0
    while abs(power_) > Decimal(10) ** -65:
        total += power_ / (2 * k + 1)
        k += 1
        power_ = -power_ * x * x / k
    return 2 * total / pi.sqrt()


_EXACT: dict[str, Callable[[Decimal], Decimal]] = {
    "exp": lambda x: x.exp(),
    "exp2": lambda x: Decimal(2) ** x,
    "expm1": lambda x: x.exp() - 1,
    "log": lambda x: x.ln(),
    "log2": lambda x: x.ln() / Decimal(2).ln(),
    "log10": lambda x: x.log10(),
    "log1p": lambda x: (1 + x).ln(),
    "reciprocal": lambda x: 1 / x,
    "sqrt": lambda x: x.sqrt(),
    "rsqrt": lambda x: 1 / x.sqrt(),
    "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "sin": _d_sin,
    "cos": _d_cos,
    "sinh": lambda x: (x.exp() - (-x).exp()) / 2,
    "cosh": lambda x: (x.exp() + (-x).exp()) / 2,
    "erf": _d_erf,
    "erfc": lambda x: 1 - _d_erf(x),
    "asinh": lambda x: (x + (x * x + 1).sqrt()).ln(),
    "square": lambda x: x * x,
    "abs": abs,
}
_POSITIVE = {"log1p", "log", "log2", "log10", "sqrt", "rsqrt"}


@pytest.mark.parametrize("name", sorted(_EXACT))
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e-3, 0.1, 0.49, 0.9])
def test_differences_of_elementary_functions_are_relatively_exact(name: str, scale: float) -> None:
    a = torch.tensor([0.37, 1.3, 2.9] + ([] if name in _POSITIVE else [-0.7, -2.2]), dtype=F64)
    d = torch.tensor([scale, -scale * 0.39], dtype=F64).unsqueeze(1) * torch.ones_like(a)
    y = getattr(torch, name)(a)
    delta, _ = STEPS[name](a, d, y)
    exact = _EXACT[name]
    for i in range(2):
        for j in range(len(a)):
            start, step = Decimal(a[j].item()), Decimal(d[i, j].item())
            want = exact(start + step) - exact(start)
            # Where the derivative nearly vanishes, only the rounding of its scale can be asked for.
            floor = Decimal("2e-15") * abs(step) if name in ("sin", "cos", "erf", "erfc") else 0
            error = abs(Decimal(delta[i, j].item()) - want)
            assert error <= Decimal("4e-14") * abs(want) + floor


@pytest.mark.parametrize("exponent", [2, 3, 5, -1, -2, -3, 0.5, -0.5, 1.7, -0.3])
def test_differences_of_powers(exponent: float) -> None:
    a = torch.tensor([0.37, 1.9], dtype=F64)
    for scale in (1e-17, 1e-5, 0.3, -0.2):
        d = torch.full((1, 2), scale, dtype=F64)
        step = power(exponent)
        assert step is not None
        delta, slope = step(a, d, a**exponent)
        for j in range(2):
            x, h, e = Decimal(a[j].item()), Decimal(scale), Decimal(exponent)
            want = (x + h) ** e - x**e
            assert float(delta[0, j]) == pytest.approx(float(want), rel=2e-14)
            assert float(slope[0, j]) == pytest.approx(float(e * (x + h) ** (e - 1)), rel=2e-14)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_slopes_match_autograd(name: str) -> None:
    x = torch.tensor([0.4, 1.1, 2.3], dtype=F64, requires_grad=True)
    a = torch.tensor([0.9, 1.0, 1.8], dtype=F64)
    f = getattr(torch, name)
    (want,) = torch.autograd.grad(f(x).sum(), x)
    delta, slope = STEPS[name](a, (x.detach() - a).unsqueeze(0), f(a))
    torch.testing.assert_close(slope[0], want, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(delta[0], (f(x) - f(a)).detach(), rtol=1e-12, atol=1e-15)


def test_saturated_units_and_large_steps_stay_finite_and_right() -> None:
    a = torch.tensor([-800.0, -40.0, 0.0, 40.0, 800.0], dtype=F64)
    d = torch.tensor([[-900.0], [-35.0], [-1e-12], [35.0], [900.0]], dtype=F64).expand(5, 5)
    for name in ("tanh", "sigmoid", "erf"):
        f = getattr(torch, name)
        delta, slope = STEPS[name](a, d, f(a))
        torch.testing.assert_close(delta, f(a + d) - f(a), rtol=1e-12, atol=1e-15)
        assert bool(torch.isfinite(slope).all())
    # Deep in saturation the difference keeps its own scale: s(x) ~ e^x.
    delta, _ = STEPS["sigmoid"](a[1:2], torch.tensor([[1e-9]], dtype=F64), torch.sigmoid(a[1:2]))
    assert delta.item() == pytest.approx(torch.exp(a[1]).item() * 1e-9, rel=1e-8)


# Whole models -----------------------------------------------------------------------------------


class _Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype)
        h = h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return self.head(h)


class _Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 2, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class _SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class _Odd(nn.Module):
    """Operations with unusual rules: tied and reparametrised weights, sorting, routing, max."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 6))
        self.g = nn.Parameter(torch.rand(6) + 0.5)
        self.b = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        w = self.g[:, None] * self.a / self.a.norm(dim=1, keepdim=True)
        h = x @ w.t() + x @ self.a @ w
        top, where = h.topk(3, dim=-1)
        h = h.scatter(1, where, torch.softmax(top, -1))
        h = torch.maximum(h, (self.a @ x.t()).t().sort(dim=-1).values) - h.amax(-1, keepdim=True)
        h = torch.cat([h, h.cumsum(1).abs()], 1)[:, 1:7].clamp(-2, 2)
        return torch.logsumexp(h, -1, keepdim=True) + h.prod(1, keepdim=True) + h @ self.b


def _model(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    x3, x8 = torch.randn(5, 3).double(), torch.randn(5, 4, 8).double()
    image = torch.randn(5, 3, 8, 8).double()
    models: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.Tanh()), x3),
        "relu": (lambda: nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 4)), x3),
        "norms": (
            lambda: nn.Sequential(
                nn.Linear(8, 6, bias=False), nn.SiLU(), nn.LayerNorm(6), nn.Linear(6, 2)
            ),
            x8,
        ),
        "conv": (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 3, groups=2, bias=False),
                nn.GroupNorm(2, 4),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 2),
            ),
            image,
        ),
        "transposed": (
            lambda: nn.Sequential(
                nn.ConvTranspose2d(3, 4, 3, stride=2), nn.ReLU6(), nn.AvgPool2d(2), nn.Flatten(1)
            ),
            image[..., :4, :4],
        ),
        "causal": (_Causal, torch.randint(0, 7, (5, 4))),
        "encoder": (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"),
            x8,
        ),
        "fused": (_Fused, x8),
        "swiglu": (_SwiGLU, x8[:, 0]),
        "lstm": (lambda: _First(nn.LSTM(8, 3, batch_first=True)), x8),
        "activations": (
            lambda: nn.Sequential(
                nn.Linear(8, 8),
                nn.Softplus(),
                nn.ELU(),
                nn.LeakyReLU(),
                nn.Softmax(-1),
                nn.LogSoftmax(-1),
                nn.Mish(),
                nn.Hardswish(),
                nn.GELU("tanh"),
            ),
            3 * x8[:, 0],
        ),
        "odd": (_Odd, torch.randn(5, 6).double()),
    }
    make, x = models[name]
    return make().double().eval(), x


MODELS = (
    *("mlp", "relu", "norms", "conv", "transposed", "causal", "encoder", "fused", "swiglu"),
    *("lstm", "activations", "odd"),
)


def _mixed_directions(model: nn.Module) -> dict[str, Tensor]:
    """One full direction, one of rank one everywhere, one in a single parameter."""
    g = torch.Generator().manual_seed(1)
    found = {}
    for k, (name, value) in enumerate(model.named_parameters()):
        u = torch.randn(3, *value.shape, dtype=F64, generator=g)
        if value.ndim >= 2:
            flat = u[1].flatten(1)
            u[1] = torch.outer(flat[:, 0], flat[0]).view(value.shape)
        if k != 0:
            u[2] = 0
        found[name] = u
    return found


@pytest.mark.parametrize("name", MODELS)
def test_values_and_derivatives_match_torch(name: str) -> None:
    model, x = _model(name)
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fast path has no forward mode
    directions = check_directions(_mixed_directions(model), dict(model.named_parameters()))
    radii = torch.tensor([0.0, 1e-3, -0.2, 0.7], dtype=F64)
    points = Points.make(directions.norms, radii, radii)
    captured = graph.capture(model, x)
    values = dual.parameter_values(captured, directions, points)
    out, notes = dual.run(captured, captured.bind(x), values, points)
    assert all("no exact rule" in note or "at radius 0" in note for note in notes), notes
    assert not notes or name == "odd"
    given = _mixed_directions(model)
    for d in range(3):
        for j, r in enumerate(radii):

            def along(t: Tensor, d: int = d) -> Tensor:
                moved = {
                    k: v.detach() + t * given[k][d] / directions.norms[d]
                    for k, v in model.named_parameters()
                }
                with graph.readable_attention():
                    return graph.call_model(model, moved, x)

            y, slope = torch.func.jvp(along, (r,), (torch.ones_like(r),))
            at = d * len(radii) + j
            torch.testing.assert_close(out.base + out.delta[at], y, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(out.dot[at], slope, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["mlp", "norms", "causal", "fused", "swiglu", "activations"])
def test_tiny_differences_are_the_derivative_times_the_radius(name: str) -> None:
    """At radius 1e-13 the difference agrees with the derivative to far below its own rounding."""
    model, x = _model(name)
    directions = check_directions(_mixed_directions(model), dict(model.named_parameters()))
    radius = 1e-13
    points = Points.make(
        directions.norms, torch.tensor([radius], dtype=F64), torch.ones(1).double()
    )
    captured = graph.capture(model, x)
    values = dual.parameter_values(captured, directions, points)
    out, _ = dual.run(captured, captured.bind(x), values, points)
    scale = out.dot.abs().max()
    assert bool((out.delta / radius - out.dot).abs().max() < 2e-12 * scale)


def test_an_operation_without_a_rule_is_differentiated_and_named() -> None:
    class Bessel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -1.2]).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x * self.w.exp())

    model, x = Bessel(), torch.rand(4, 2).double() + 1
    directions = check_directions({"w": torch.eye(2).double()}, dict(model.named_parameters()))
    points = Points.make(directions.norms, torch.tensor([0.1, 0.4]).double(), x)
    captured = graph.capture(model, x)
    values = dual.parameter_values(captured, directions, points)
    out, notes = dual.run(captured, captured.bind(x), values, points)
    assert any("lgamma" in note and "no exact rule" in note for note in notes)
    scaled = x * (model.w + torch.tensor([0.4, 0.0])).exp()
    torch.testing.assert_close(out.base + out.delta[1], torch.lgamma(scaled).detach())
    want = torch.digamma(scaled) * scaled * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(out.dot[1], want.detach())


# Structure of directions ------------------------------------------------------------------------


def test_rank_one_matrices_are_found_and_others_are_not() -> None:
    g = torch.Generator().manual_seed(0)
    v, w = torch.randn(4, 9, dtype=F64, generator=g), torch.randn(4, 7, dtype=F64, generator=g)
    u = v.unsqueeze(2) * w.unsqueeze(1)
    u[1] = 0
    u[2, 3, 4] += 1e-9 * u[2].abs().max()
    got_v, got_w, exact = rank_one_factors(u)
    assert exact.tolist() == [True, True, False, True]
    back = got_v.unsqueeze(2) * got_w.unsqueeze(1)
    torch.testing.assert_close(back[exact], u[exact], rtol=0, atol=1e-14)


def test_factored_and_dense_directions_agree() -> None:
    model, x = _model("relu")
    g = torch.Generator().manual_seed(4)
    v, w = torch.randn(2, 9, dtype=F64, generator=g), torch.randn(2, 3, dtype=F64, generator=g)
    results = []
    for u in (RankOne(v, w), v.unsqueeze(2) * w.unsqueeze(1)):
        directions = check_directions({"0.weight": u}, dict(model.named_parameters()))
        assert isinstance(directions.slices["0.weight"], RankOne)
        points = Points.make(directions.norms, torch.tensor([0.3, -1.0], dtype=F64), x)
        captured = graph.capture(model, x)
        values = dual.parameter_values(captured, directions, points)
        results.append(dual.run(captured, captured.bind(x), values, points)[0])
    torch.testing.assert_close(results[0].delta, results[1].delta, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(results[0].dot, results[1].dot, rtol=1e-13, atol=1e-15)
