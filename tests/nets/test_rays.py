"""Curvature and divergence along rays against dense Fisher matrices and closed forms."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deaddir_fast.nets import graph, rays, weights
from deaddir_fast.nets import likelihood as lk
from deaddir_fast.nets.rays import RayCurvature, ray_curvature
from deaddir_fast.nets.weights import RankOne

torch.set_num_threads(1)
F64 = torch.float64


def _slope(radii: Tensor, values: Tensor) -> float:
    x, y = radii.log(), values.log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


# Against the dense Fisher matrix ----------------------------------------------------------------


class _Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype)
        return self.head(h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0])


class _SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def _model(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    made: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (6, 4)),
        "relu": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (6, 4)),
        "conv": (
            lambda: nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1),
                nn.BatchNorm2d(3),
                nn.GELU(),
                nn.MaxPool2d(2),
                nn.Conv2d(3, 2, 2),
                nn.Flatten(),
                nn.Linear(8, 3),
            ),
            (6, 2, 6, 6),
        ),
        "layernorm": (
            lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 3)),
            (6, 5, 4),
        ),
        "embedding": (
            lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)),
            torch.randint(0, 9, (6, 3)),
        ),
        "causal": (_Causal, torch.randint(0, 7, (5, 4))),
        "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), (4, 3, 4)),
        "swiglu": (_SwiGLU, (6, 4)),
    }
    make, x = made[name]
    x = torch.randn(x).double() if isinstance(x, tuple) else x
    return make().double().eval(), x


def _output_metric(name: str, z: Tensor) -> Tensor:
    """H(z) as a dense matrix over the last dimension, (..., c, c)."""
    if name == "categorical":
        p = torch.softmax(z, -1)
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    diagonal = {
        "gaussian": torch.ones_like(z),
        "bernoulli": torch.sigmoid(z) * torch.sigmoid(-z),
        "poisson": z.exp(),
    }[name]
    return torch.diag_embed(diagonal)


def _dense_fisher(model: nn.Module, state: dict[str, Tensor], x: Any, name: str) -> Tensor:
    """Mean over samples of sum over tokens of J^T H J, over the concatenated parameters."""

    def forward(s: dict[str, Tensor]) -> Tensor:
        with graph.readable_attention():
            return graph.call_model(model, s, x)

    z = forward(state)
    jac = torch.func.jacfwd(forward)(state)
    flat = torch.cat([jac[k].reshape(*z.shape, -1) for k in state], -1)
    n = z.shape[0]
    flat, z = flat.reshape(-1, z.shape[-1], flat.shape[-1]), z.reshape(-1, z.shape[-1])
    return torch.einsum("bci,bcd,bdj->ij", flat, _output_metric(name, z), flat) / n


def _divergence(name: str, z0: Tensor, z1: Tensor) -> Tensor:
    if name == "categorical":
        a, b = torch.log_softmax(z0, -1), torch.log_softmax(z1, -1)
        k = (a.exp() * (a - b)).sum(-1)
    else:
        k = 0.5 * (z1 - z0).square().sum(-1)
    return k.flatten(1).sum(1) if k.ndim > 1 else k


def _directions(model: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    found = {}
    for k, (name, value) in enumerate(model.named_parameters()):
        u = torch.randn(3, *value.shape, dtype=F64, generator=g)
        if value.ndim >= 2:
            flat = u[1].flatten(1)
            u[1] = torch.outer(flat[:, 0], flat[0]).view(value.shape)
        u[2] *= k == 0
        found[name] = u
    return found


MODELS = ("mlp", "relu", "conv", "layernorm", "embedding", "causal", "encoder", "swiglu")
CASES = [(m, "categorical") for m in MODELS]
CASES += [("mlp", "gaussian"), ("mlp", "bernoulli"), ("mlp", "poisson"), ("causal", "gaussian")]


@pytest.mark.parametrize(("name", "likelihood"), CASES)
def test_curvature_equals_the_dense_fisher(name: str, likelihood: str) -> None:
    model, x = _model(name)
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fast path has no forward mode
    directions = _directions(model)
    radii = [0.0, -0.3, 0.7]
    got = ray_curvature(model, x, directions, radii, likelihood=likelihood)
    assert got.notes == ()
    norms = sum(u.flatten(1).square().sum(1) for u in directions.values()).sqrt()
    base = {k: v.detach() for k, v in model.named_parameters()}
    z0 = graph.call_model(model, base, x)
    for d in range(3):
        u = {k: v[d] / norms[d] for k, v in directions.items()}
        flat = torch.cat([u[k].flatten() for k in base])
        for j, r in enumerate(radii):
            state = {k: v + r * u[k] for k, v in base.items()}
            want = flat @ _dense_fisher(model, state, x, likelihood) @ flat
            assert got.fisher[d, j].item() == pytest.approx(want.item(), rel=1e-10)
            if likelihood in ("categorical", "gaussian"):
                with graph.readable_attention():
                    k = _divergence(likelihood, z0, graph.call_model(model, state, x))
                assert got.kl[d, j].item() == pytest.approx(k.mean().item(), rel=1e-9, abs=1e-15)
                spread = k.std().item() / len(k) ** 0.5
                assert got.kl_stderr[d, j].item() == pytest.approx(spread, rel=1e-9, abs=1e-15)
    assert got.kl[:, 0].abs().max() == 0


# Closed forms -----------------------------------------------------------------------------------


class _Power(nn.Module):
    """f(x, t) = t^k x."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.t, self.k = nn.Parameter(torch.zeros((), dtype=F64)), k

    def forward(self, x: Tensor) -> Tensor:
        return self.t**self.k * x


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_normal_location_power_is_exact_at_every_radius(k: int) -> None:
    """N(t^k, 1): F = k^2 t^(2k-2), K = t^(2k) / 2, down to K ~ 1e-30."""
    radii = torch.logspace(-30 / (2 * k), 0, 7, dtype=F64)
    radii = torch.cat([radii, -radii])
    got = ray_curvature(
        _Power(k), torch.ones(3, 1, dtype=F64), {"t": torch.ones(1)}, radii, likelihood="gaussian"
    )
    assert got.kl.min() < 1e-30
    torch.testing.assert_close(got.fisher[0], k**2 * radii ** (2 * k - 2), rtol=1e-13, atol=0)
    torch.testing.assert_close(got.kl[0], radii ** (2 * k) / 2, rtol=1e-13, atol=0)
    torch.testing.assert_close(got.pointwise_order(), torch.full_like(got.fisher, k))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "poisson"])
def test_tiny_divergences_of_logistic_and_poisson_models(k: int, likelihood: str) -> None:
    """K = H(z0) x^2 t^(2k) / 2 (1 + O(t^k)) with the metric H of the output at t = 0."""

    class Offset(_Power):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x) + 0.3
            return torch.cat([z, torch.zeros_like(z)], -1) if likelihood == "categorical" else z

    t = 10 ** (-15 / k)
    x = torch.tensor([[1.0], [-0.5], [2.0]], dtype=F64)
    got = ray_curvature(Offset(k), x, {"t": torch.ones(1)}, [t], likelihood=likelihood)
    p = 1 / (1 + math.exp(-0.3))
    metric = math.exp(0.3) if likelihood == "poisson" else p * (1 - p)
    moment = x.square().mean().item()
    assert got.kl.item() == pytest.approx(metric * moment * t ** (2 * k) / 2, rel=1e-11)
    assert got.fisher.item() == pytest.approx(metric * moment * k**2 * t ** (2 * k - 2), rel=1e-11)


class _Density(nn.Module):
    """A density on the line as a categorical distribution over quadrature nodes.

    For analytic integrands that decay, the trapezoid rule is exact to rounding, so KL and Fisher
    of the density are those of the softmax over nodes.
    """

    def __init__(self, density: Callable[[Tensor, Tensor], Tensor], start: list[float]) -> None:
        super().__init__()
        self.density = density
        self.b = nn.Parameter(torch.tensor(start, dtype=F64))
        self.register_buffer("nodes", torch.linspace(-14, 14, 281, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.density(self.nodes, self.b).log().unsqueeze(0).expand(x.shape[0], -1)


def _normal(x: Tensor, mean: Any, variance: Any = 1.0) -> Tensor:
    return torch.exp(-0.5 * (x - mean) ** 2 / variance) / variance**0.5


MIXTURES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, float, float]] = {
    "two means": (lambda x, b: 0.5 * (_normal(x, -b[0]) + _normal(x, b[0])), 2, 1 / 4, 2.0),
    "third cumulant": (
        lambda x, b: (
            (_normal(x, 2 * b[0], 1 - 2 * b[0] ** 2) + 2 * _normal(x, -b[0], 1 - 2 * b[0] ** 2)) / 3
        ),
        3,
        1 / 3,
        6.0,
    ),
    "fourth cumulant": (
        lambda x, b: 0.5 * (_normal(x, b[0], 1 - b[0] ** 2) + _normal(x, -b[0], 1 - b[0] ** 2)),
        4,
        1 / 12,
        8 / 3,
    ),
}


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_gaussian_mixture_anchors(name: str) -> None:
    density, k, c, f = MIXTURES[name]
    b = 1e-2
    got = ray_curvature(
        _Density(density, [0.0]), torch.zeros(2, 1), {"b": torch.ones(1, 1)}, [b, -b]
    )
    # +b and -b together: the odd correction drops out.
    assert got.kl.mean().item() / b ** (2 * k) == pytest.approx(c, rel=2e-3)
    assert got.fisher.mean().item() / b ** (2 * k - 2) == pytest.approx(f, rel=2e-3)
    assert got.pointwise_order().mean().item() == pytest.approx(k, rel=2e-3)


def test_weight_and_mean_of_a_mixture_together() -> None:
    """(1-w) N(0,1) + w N(m,1) on (w, m) = (t, t): K = t^4 / 2 + O(t^5)."""

    def density(x: Tensor, b: Tensor) -> Tensor:
        return (1 - b[0]) * _normal(x, 0.0) + b[0] * _normal(x, b[1])

    t = torch.tensor([1e-3, 1e-4], dtype=F64)
    got = ray_curvature(
        _Density(density, [0.0, 0.0]), torch.zeros(1, 1), {"b": torch.ones(1, 2)}, t * 2**0.5
    )
    torch.testing.assert_close(
        got.kl[0] / t**4, torch.full((2,), 0.5, dtype=F64), rtol=4e-3, atol=0
    )


def test_hessian_over_fisher_tends_to_two_minus_one_over_k() -> None:
    x = torch.randn(50, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 3):

        def divergence(t: Tensor, k: int = k) -> Tensor:
            z = t**k * x[:, 0]
            return (nn.functional.softplus(z) - math.log(2) - z / 2).mean()

        t = torch.tensor(1e-2, dtype=F64)
        hessian = torch.func.hessian(divergence)(t).item()
        got = ray_curvature(_Power(k), x, {"t": torch.ones(1)}, [1e-2], likelihood="bernoulli")
        assert hessian / got.fisher.item() == pytest.approx(2 - 1 / k, rel=2e-2 if k == 1 else 1e-3)


# Which Fisher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_interpolated_labels_give_the_empirical_fisher_slope_4k_minus_2(k: int) -> None:
    x = torch.randn(40, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    radii = torch.logspace(-3, -1, 5, dtype=F64)
    y = torch.zeros_like(x)  # the labels of theta0 itself, without noise
    model, u = _Power(k), {"t": torch.ones(1)}
    args: dict[str, Any] = {"likelihood": "gaussian"}
    wrong = ray_curvature(model, x, u, radii, fisher="empirical", targets=y, **args)
    right = ray_curvature(model, x, u, radii, **args)
    assert wrong.kind == "empirical"
    assert _slope(radii, wrong.fisher[0]) == pytest.approx(4 * k - 2, abs=1e-9)
    assert _slope(radii, right.fisher[0]) == pytest.approx(2 * k - 2, abs=1e-9)
    torch.testing.assert_close(wrong.kl, right.kl)


def test_noisy_labels_keep_the_slope_of_the_empirical_fisher() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, dtype=F64, generator=g)
    y = torch.randn(4000, 1, dtype=F64, generator=g)
    radii = torch.logspace(-3, -1, 5, dtype=F64)
    got = ray_curvature(
        _Power(3), x, {"t": torch.ones(1)}, radii,
        likelihood="gaussian", fisher="empirical", targets=y,
    )  # fmt: skip
    assert _slope(radii, got.fisher[0]) == pytest.approx(4, abs=0.02)


def test_the_empirical_hessian_bends_to_slope_k_minus_2() -> None:
    """Below t* ~ n^(-1/(2k)) its noise term k (k-1) t^(k-2) mean(x eps) dominates."""
    k, g = 3, torch.Generator().manual_seed(0)
    x, noise = (torch.randn(40, 1, dtype=F64, generator=g) for _ in range(2))

    def loss(t: Tensor) -> Tensor:
        return 0.5 * (t**k * x - noise).square().mean()

    radii = torch.logspace(-5, -4, 4, dtype=F64)
    hessian = torch.stack([torch.func.hessian(loss)(t) for t in radii]).abs()
    got = ray_curvature(_Power(k), x, {"t": torch.ones(1)}, radii, likelihood="gaussian")
    assert _slope(radii, hessian) == pytest.approx(k - 2, abs=1e-3)
    assert _slope(radii, got.fisher[0]) == pytest.approx(2 * k - 2, abs=1e-9)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli", "poisson"])
def test_sampled_labels_estimate_the_exact_fisher(likelihood: str) -> None:
    model, x = _model("mlp")
    x = torch.randn(2000, 4, dtype=F64, generator=torch.Generator().manual_seed(2))
    args: dict[str, Any] = {"radii": [0.0, 0.5], "likelihood": likelihood}
    exact = ray_curvature(model, x, _directions(model), **args)
    sampled = ray_curvature(model, x, _directions(model), fisher="mc", draws=4, seed=3, **args)
    assert sampled.kind == "mc"
    off = (sampled.fisher - exact.fisher).abs() / sampled.stderr
    assert bool((off < 5).all())
    assert bool((off > 0).all())
    again = ray_curvature(
        model, x, _directions(model), fisher="mc", draws=4, seed=3, memory_budget=1 << 20, **args
    )
    torch.testing.assert_close(again.fisher, sampled.fisher, rtol=1e-10, atol=0)


def test_common_random_numbers_keep_a_sampled_slope_smooth() -> None:
    x = torch.randn(200, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    radii = torch.logspace(-3, -1.5, 9, dtype=F64)
    got = ray_curvature(
        _Power(3), x, {"t": torch.ones(1)}, radii, likelihood="gaussian", fisher="mc"
    )
    # One draw per sample: far from the exact value, yet an exact power of the radius.
    assert _slope(radii, got.fisher[0]) == pytest.approx(4, abs=1e-6)


# Networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_a_dead_unit_through_linear_layers_has_order_depth(depth: int) -> None:
    """Unit 0 carries weight t in every layer: amplitude t^L, slope 2L - 2."""
    torch.manual_seed(depth)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(depth))).double()
    directions = {}
    with torch.no_grad():
        for i, layer in enumerate(model):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.diag(torch.tensor([0.0, 0.8, 1.2])))
            u = torch.zeros(1, 3, 3, dtype=F64)
            u[0, 0, 0] = 1
            directions[f"{i}.weight"] = u
    x = torch.randn(30, 3, dtype=F64)
    radii = torch.logspace(-4 / depth - 1, -1, 6, dtype=F64)
    for likelihood in ("gaussian", "categorical"):
        got = ray_curvature(model, x, directions, radii, likelihood=likelihood)
        # Below the bend of the softmax metric, for it only.
        low = radii if likelihood == "gaussian" else radii[:4]
        slope = _slope(low, got.fisher[0, : len(low)])
        assert slope == pytest.approx(2 * depth - 2, abs=1e-9 if likelihood == "gaussian" else 0.01)
        assert got.pointwise_order()[0, 0].item() == pytest.approx(depth, rel=1e-3)


def test_a_relu_rescaling_direction_is_flat() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    directions = {
        name: torch.randn(2, *value.shape, dtype=F64) for name, value in model.named_parameters()
    }
    for u in directions.values():
        u[0] = 0
    unit = 3
    directions["0.weight"][0, unit] = first.weight.detach()[unit]
    directions["0.bias"][0, unit] = first.bias.detach()[unit]
    directions["2.weight"][0, :, unit] = -last.weight.detach()[:, unit]
    got = ray_curvature(model, torch.randn(64, 10, dtype=F64), directions, [0.0])
    assert got.fisher[1, 0] > 1e-4
    assert got.fisher[0, 0] <= 1e-12 * got.fisher[1, 0]


def test_tokens_are_summed_and_samples_averaged() -> None:
    model, x = _model("causal")
    directions = _directions(model)
    whole = ray_curvature(model, x, directions, [0.4])
    each = [ray_curvature(model, x[i : i + 1], directions, [0.4]) for i in range(len(x))]
    values = torch.stack([e.fisher for e in each])
    torch.testing.assert_close(whole.fisher, values.mean(0))
    torch.testing.assert_close(whole.stderr, values.std(0) / len(x) ** 0.5)
    assert all(bool(e.stderr.isnan().all()) for e in each)
    assert any("one sample" in note for note in each[0].notes)


def test_outputs_may_be_one_number_per_sample() -> None:
    class Flat(_Power):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(-1)

    x = torch.randn(7, 1, dtype=F64)
    u = {"t": torch.ones(1)}
    for kind in ("exact", "mc", "empirical"):
        y = torch.randn(7, 1, dtype=F64) if kind == "empirical" else None
        pair = [
            ray_curvature(m, x, u, [0.3], likelihood="gaussian", fisher=kind, targets=t)
            for m, t in ((_Power(2), y), (Flat(2), None if y is None else y.squeeze(-1)))
        ]
        torch.testing.assert_close(pair[0].fisher, pair[1].fisher)


# Chunking and precision -------------------------------------------------------------------------


def _grid(model: nn.Module, x: Any, budget: int | None = None) -> RayCurvature:
    return ray_curvature(model, x, _directions(model), [0.0, 1e-6, -0.3, 0.7], memory_budget=budget)


@pytest.mark.parametrize("name", ["mlp", "conv", "causal", "encoder"])
def test_results_do_not_depend_on_chunking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_WEIGHTS_AT_ONCE", 1)  # small models, smaller budgets
    model, x = _model(name)
    x = torch.cat([x] * 3) + (torch.randn(3 * len(x), *x.shape[1:]) if x.is_floating_point() else 0)
    whole = _grid(model, x)
    seen = set()
    budget = whole.chunking.estimate
    for part in (3, 12, 40):
        got = _grid(model, x, budget // part)
        assert got.chunking.estimate <= budget // part
        seen.add((got.chunking.samples, got.chunking.directions, got.chunking.radii))
        for field in ("fisher", "kl", "stderr", "kl_stderr"):
            want = getattr(whole, field)
            torch.testing.assert_close(getattr(got, field), want, rtol=1e-11, atol=1e-30)
        assert got.notes == whole.notes
    assert len(seen) == 3
    assert got.chunking.chunks > 12
    with pytest.raises(ValueError, match="memory_budget: expected at least"):
        _grid(model, x, 100)


class _Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once, as seen by the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = [storage.nbytes(), 0]
                    self.now += storage.nbytes()
                self.live[key][1] += 1
                self.most = max(self.most, self.now)
                weakref.finalize(x, self._drop, key)
        return out

    def _drop(self, key: int) -> None:
        entry = self.live.get(key, [0, 0])
        entry[1] -= 1
        if entry[1] == 0:
            self.now -= self.live.pop(key)[0]


@pytest.mark.parametrize("name", ["mlp", "relu", "layernorm", "causal"])
def test_memory_stays_within_the_budget(name: str) -> None:
    model, x = _model(name)
    x = torch.cat([x] * (400 // len(x)))
    directions = _directions(model)
    given = x.numel() * x.element_size()
    given += 8 * sum(u.numel() * u.element_size() for u in directions.values())
    for budget in (1 << 20, 1 << 18):
        with _Peak() as peak:
            got = ray_curvature(model, x, directions, [0.0, -0.3, 0.7], memory_budget=budget)
        assert got.chunking.chunks > 1
        assert peak.most <= budget + given
        assert peak.most > got.chunking.estimate / 4  # the estimate is not idle either


def test_full_directions_of_large_matrices_form_one_weight_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = _model("mlp")
    want = _grid(model, x)
    monkeypatch.setattr(weights, "_WEIGHTS_AT_ONCE", 1)
    torch.testing.assert_close(_grid(model, x).fisher, want.fisher, rtol=1e-12, atol=0)


def test_complex_intermediate_values_are_differentiated() -> None:
    class Spectrum(_Power):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.fft.rfft(self.t.exp() * x)).flatten(1)

    x = torch.randn(6, 5, dtype=F64)
    got = ray_curvature(Spectrum(1), x, {"t": torch.ones(1)}, [0.3], likelihood="gaussian")
    power = torch.view_as_real(torch.fft.rfft(x)).square().sum((1, 2)).mean().item()
    assert got.fisher.item() == pytest.approx(math.exp(0.6) * power, rel=1e-12)
    assert any("no exact rule" in note for note in got.notes)


def test_nearby_structures_do_not_mix_when_directions_are_sorted() -> None:
    """Directions of different structure are reordered inside and come back in place."""
    model, x = _model("mlp")
    directions = {k: torch.cat([u, u.flip(0)]) for k, u in _directions(model).items()}
    got = ray_curvature(model, x, directions, [0.2])
    torch.testing.assert_close(got.fisher[:3], got.fisher[3:].flip(0))
    torch.testing.assert_close(got.norms[:3], got.norms[3:].flip(0))
    assert len(set(got.fisher[:3, 0].tolist())) == 3


def test_single_precision_works_and_says_so() -> None:
    model, x = _model("encoder")
    exact = _grid(model, x)
    single = _grid(model.float(), x.float())
    assert any("float32" in note for note in single.notes)
    torch.testing.assert_close(single.fisher, exact.fisher, rtol=1e-4, atol=0)
    # Also where single precision could not see the difference of the outputs.
    assert exact.kl[0, 1] < 1e-12
    torch.testing.assert_close(single.kl, exact.kl, rtol=1e-3, atol=0)


def test_factored_directions_and_keyword_inputs() -> None:
    model, x = _model("mlp")
    g = torch.Generator().manual_seed(0)
    v, w = torch.randn(2, 6, dtype=F64, generator=g), torch.randn(2, 4, dtype=F64, generator=g)
    low = ray_curvature(model, x, {"0.weight": RankOne(v, w)}, [0.0, 0.5])
    dense = {"0.weight": v.unsqueeze(2) * w.unsqueeze(1)}
    torch.testing.assert_close(low.fisher, ray_curvature(model, (x,), dense, [0, 0.5]).fisher)
    torch.testing.assert_close(
        low.fisher, ray_curvature(model, {"input": x}, dense, torch.tensor([0, 0.5])).fisher
    )


def test_moments_of_values_whose_squares_underflow() -> None:
    values = 1e-200 * torch.rand(2, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    moments = rays._Moments(2)
    for part in values.split(17, 1):
        moments.add(part)
    want = (values * 1e200).std(1) / 50**0.5 * 1e-200
    torch.testing.assert_close(moments.stderr(), want, rtol=1e-12, atol=0)


# What cannot be read ----------------------------------------------------------------------------


def test_control_flow_that_depends_on_values_is_refused() -> None:
    class OfParameters(_Power):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.t if float(self.t.detach()) < 0.1 else x * self.t**2

    class OfData(_Power):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.t if bool(x.sum() > 0) else x

    for model in (OfParameters(1), OfData(1)):
        with pytest.raises(ValueError, match="control flow"):
            ray_curvature(
                model, torch.ones(3, 1).double(), {"t": torch.ones(1)}, [0.5], likelihood="gaussian"
            )


def test_models_that_mix_samples_are_refused() -> None:
    class Centred(_Power):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    with pytest.raises(ValueError, match="each sample on its own"):
        ray_curvature(
            Centred(1), torch.randn(4, 1).double(), {"t": torch.ones(1)}, [1.0],
            likelihood="gaussian",
        )  # fmt: skip


class _ByNumber(nn.Module):
    """Doubles its output for more samples than it is compared on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2.0 if len(x) > 8 else 1.0)


def test_models_that_depend_on_the_number_of_samples_are_refused() -> None:
    x = torch.randn(20, 3, dtype=F64)
    with pytest.raises(ValueError, match="each sample on its own"):
        ray_curvature(_ByNumber(), x, {"inner.weight": torch.randn(1, 2, 3)}, [0.0])


@pytest.mark.parametrize(("name", "count"), [("mlp", 1), ("view", 2)])
def test_one_recording_serves_all_numbers_of_samples_it_holds_for(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)]
    if name == "view":
        layers.insert(0, nn.Flatten())
    model = nn.Sequential(*layers).double()
    x = torch.randn(6, 3, 1, dtype=F64) if name == "view" else torch.randn(6, 3, dtype=F64)
    sizes: list[int] = []
    record = graph.capture

    def counted(model: nn.Module, inputs: Any, **kwargs: Any) -> graph.Capture:
        sizes.append(graph.batch_size(inputs))
        return record(model, inputs, **kwargs)

    monkeypatch.setattr(graph, "capture", counted)
    u = {k: torch.randn(2, *v.shape, dtype=F64) for k, v in model.named_parameters()}
    found = ray_curvature(model, x, u, [0.0])
    assert len(sizes) == count
    norms = sum(v.flatten(1).square().sum(1) for v in u.values())
    state = {k: v.detach() for k, v in model.named_parameters()}
    for i in range(2):
        z, dz = torch.func.jvp(
            lambda s: torch.func.functional_call(model, s, (x,)),
            (state,),
            ({k: v[i] for k, v in u.items()},),
        )
        p = z.softmax(1)
        want = ((p * dz**2).sum(1) - (p * dz).sum(1) ** 2).mean() / norms[i]
        torch.testing.assert_close(found.fisher[i, 0], want.detach(), rtol=1e-11, atol=0)


def test_a_kink_at_the_base_point_is_reported() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)).double()
    first = model[0]
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight[0] = 0
    u = torch.zeros(1, 3, 2, dtype=F64)
    u[0, 0] = 1
    x = torch.rand(5, 2, dtype=F64) + 0.1
    at_base = ray_curvature(model, x, {"0.weight": u}, [0.0, 0.1])
    assert any("kink of relu" in note for note in at_base.notes)
    assert at_base.fisher[0, 1] > 0
    assert ray_curvature(model, x, {"0.weight": u}, [0.1]).notes == ()


def test_an_output_that_does_not_move_is_reported() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double()
    model.register_parameter("unused", nn.Parameter(torch.zeros(2, dtype=F64)))
    got = ray_curvature(model, torch.randn(3, 2, dtype=F64), {"unused": torch.ones(1, 2)}, [0.1])
    assert got.fisher.item() == 0 and got.kl.item() == 0
    assert any("does not depend" in note for note in got.notes)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": "mlp"}, TypeError, "model: expected a torch.nn.Module"),
    ({"inputs": torch.zeros(0, 4)}, ValueError, "inputs: expected at least one sample"),
    ({"inputs": torch.full((3, 4), torch.nan)}, ValueError, "inputs: expected no nan"),
    ({"inputs": None}, TypeError, "inputs"),
    ({"directions": {}}, ValueError, "directions: expected at least one parameter"),
    ({"directions": [1]}, TypeError, "directions: expected a dict"),
    (
        {"directions": {"9.weight": torch.ones(1, 6, 4)}},
        ValueError,
        "no parameter called '9.weight'",
    ),
    ({"directions": {"0.weight": torch.ones(6, 4)}}, ValueError, r"shape \(p, 6, 4\)"),
    ({"directions": {"0.weight": torch.ones(2, 4, 6)}}, ValueError, r"directions\['0.weight'\]"),
    ({"directions": {"0.weight": torch.ones(2, 6, 4).long()}}, TypeError, "dtype"),
    (
        {"directions": {"0.weight": torch.ones(2, 6, 4), "0.bias": torch.ones(3, 6)}},
        ValueError,
        "one number of directions",
    ),
    ({"directions": {"0.weight": torch.ones(0, 6, 4)}}, ValueError, "at least one direction"),
    (
        {"directions": {"0.weight": torch.stack([torch.ones(6, 4), torch.zeros(6, 4)])}},
        ValueError,
        "direction 1 is zero",
    ),
    ({"directions": {"0.bias": torch.full((1, 6), torch.inf)}}, ValueError, "not finite"),
    (
        {"directions": {"0.weight": RankOne(torch.ones(1, 4), torch.ones(1, 6))}},
        ValueError,
        "size 6",
    ),
    ({"directions": {"0.bias": RankOne(torch.ones(1, 6), torch.ones(1, 1))}}, ValueError, "vector"),
    ({"radii": []}, ValueError, "radii: expected a non-empty"),
    ({"radii": [[0.1]]}, ValueError, "radii"),
    ({"radii": [0.1, float("inf")]}, ValueError, "radii: expected finite"),
    ({"radii": "small"}, TypeError, "radii"),
    ({"radii": [1j]}, TypeError, "radii"),
    ({"likelihood": "cauchy"}, ValueError, "likelihood"),
    ({"fisher": "type2"}, ValueError, "fisher: expected one of 'exact'"),
    ({"fisher": "empirical"}, ValueError, "targets"),
    ({"targets": torch.zeros(6).long()}, ValueError, "targets"),
    ({"fisher": "empirical", "targets": torch.zeros(5).long()}, ValueError, r"shape \(6,\)"),
    ({"fisher": "empirical", "targets": torch.zeros(6)}, TypeError, "class indices"),
    ({"fisher": "empirical", "targets": torch.full((6,), 3)}, ValueError, r"0\.\.2, got 3"),
    ({"draws": 0}, ValueError, "draws"),
    ({"memory_budget": -1}, ValueError, "memory_budget"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, x = _model("mlp")
    args: dict[str, Any] = {
        "model": model,
        "inputs": x,
        "directions": {"0.weight": torch.ones(1, 6, 4)},
        "radii": [0.1],
    }
    args.update(change)
    with pytest.raises(error, match=message):
        ray_curvature(**args)


def test_unfit_models_are_refused() -> None:
    model, x = _model("mlp")
    u = {"0.weight": torch.ones(1, 6, 4)}
    with pytest.raises(TypeError, match=r"bfloat16.*expected float64 or float32"):
        ray_curvature(model.bfloat16(), x.bfloat16(), u, [0.1])
    model = model.double()
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"'0\.bias' has entries that are not finite"):
        ray_curvature(model, x, u, [0.1])
    one = nn.Sequential(nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match="at least two classes"):
        ray_curvature(one, x, {"0.weight": torch.ones(1, 1, 4)}, [0.1])
    dropped = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
    with pytest.raises(ValueError, match="eval"):
        ray_curvature(dropped, x, {"1.weight": torch.ones(1, 3, 4)}, [0.1])


def test_named_likelihoods_and_instances_agree() -> None:
    model, x = _model("mlp")
    args = (model, x, _directions(model), [0.1])
    unit = ray_curvature(*args, likelihood="gaussian")
    half = ray_curvature(*args, likelihood=lk.Gaussian(0.5))
    torch.testing.assert_close(half.fisher, 2 * unit.fisher)
    torch.testing.assert_close(half.kl, 2 * unit.kl)
    assert unit.likelihood == "gaussian"
