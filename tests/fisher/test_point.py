"""Curvature at the checkpoint against dense Fisher matrices by torch.func and tiny radii."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deaddir_fast as dd
from deaddir_fast.nets import dual_registry, graph, rays
from deaddir_fast.nets.weights import RankOne
from tests.fisher.test_jacobian import Attention, cases, dense_fisher

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fast path has no forward mode
    yield
    torch.backends.mha.set_fastpath_enabled(fast)
    torch.set_default_dtype(torch.float32)


class Sorted(nn.Module):
    """Selections by value, products of moving matrices, a shared weight, sign and clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.power = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        w = self.scale[:, None] * self.a / self.a.norm(dim=1, keepdim=True)
        h = x @ w.t() + (x @ self.a) @ w
        top, where = h.topk(2, dim=-1)
        h = h.scatter(1, where, torch.softmax(top, -1)) + h.sign() * 2**self.power
        h = torch.maximum(h, h.sort(dim=-1).values) + h.amax(-1, keepdim=True)
        h = torch.cat([h.clamp(-1, 1), h.cumsum(1).abs(), h.prod(1, keepdim=True)], 1)
        return torch.tanh(h / 3)


def more_cases() -> dict[str, tuple[nn.Module, Any]]:
    found = cases()
    found["norms"] = (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2),
            nn.BatchNorm2d(4).eval(),
            nn.SiLU(),
            nn.GroupNorm(2, 4),
            nn.ConvTranspose2d(4, 2, 2),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3, bias=False),
            nn.RMSNorm(3),
        ),
        torch.randn(4, 2, 6, 6),
    )
    found["embedding"] = (
        nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 3), nn.LogSoftmax(-1)),
        torch.randint(0, 9, (5, 2)),
    )
    found["encoder"] = (
        nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True),
        torch.randn(3, 3, 4),
    )
    found["sorted"] = (Sorted(), torch.randn(5, 4))
    return found


CASES = (
    *("tanh mlp", "relu mlp", "gated", "conv", "attention"),
    *("norms", "embedding", "encoder", "sorted"),
)


def structured(model: nn.Module) -> dict[str, Tensor]:
    """Five directions: full, rank one, one parameter only, mixed by layer, full again."""
    g = torch.Generator().manual_seed(1)
    found = {}
    for k, (name, value) in enumerate(model.named_parameters()):
        u = torch.randn(5, *value.shape, generator=g)
        if value.ndim >= 2:
            for d in (1, 3) if k % 4 else (1,):
                flat = u[d].flatten(1)
                u[d] = torch.outer(flat[:, 0], flat[0]).view(value.shape)
        u[2] *= k == 0
        u[3] *= k % 3 != 1
        found[name] = u
    return found


def flat(model: nn.Module, directions: dict[str, Tensor]) -> Tensor:
    """(p, d), of unit norm."""
    p = len(next(iter(directions.values())))
    u = torch.cat([directions[k].reshape(p, -1) for k, _ in model.named_parameters()], 1)
    return u / u.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["gaussian", "categorical", "bernoulli", "poisson"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_fisher(case: str, name: str) -> None:
    model, inputs = more_cases()[case]
    directions = structured(model)
    found = dd.point_curvature(model, inputs, directions, likelihood=name)
    model.requires_grad_(False)
    u = flat(model, directions)
    n = graph.batch_size(inputs)
    assert found.notes == ()
    assert found.per_sample.shape == (5, n)
    for s in range(n):
        one = dense_fisher(model, graph.slice_batch(inputs, s, s + 1), name)
        want = torch.einsum("pi,ij,pj->p", u, one, u)
        torch.testing.assert_close(
            found.per_sample[:, s], want, rtol=1e-10, atol=1e-12 * float(want.max())
        )
    exact = dense_fisher(model, inputs, name)
    want = torch.einsum("pi,ij,pj->p", u, exact, u)
    torch.testing.assert_close(found.curvature, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", ["tanh mlp", "gated", "conv", "attention", "norms", "embedding"])
def test_is_the_limit_of_small_radii(case: str) -> None:
    """The difference of the curvature at r and at -r drops out of the mean: error r^2."""
    model, inputs = more_cases()[case]
    directions = structured(model)
    found = dd.point_curvature(model, inputs, directions)
    near = dd.ray_curvature(model, inputs, directions, [1e-7, -1e-7])
    torch.testing.assert_close(found.curvature, near.fisher.mean(1), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.norms, near.norms, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_radius_zero_of_a_grid_is_the_point(case: str, fisher: str) -> None:
    """The ray path, which carries differences too, at the same radius."""
    model, inputs = more_cases()[case]
    directions = structured(model)
    args: dict[str, Any] = {"fisher": fisher, "likelihood": "bernoulli"}
    mixed = dd.ray_curvature(model, inputs, directions, [0.0, 0.1], **args)
    still = dd.ray_curvature(model, inputs, directions, [0.0, -0.0], **args)
    for k in range(2):
        torch.testing.assert_close(still.fisher[:, k], mixed.fisher[:, 0], rtol=1e-10, atol=0)
        torch.testing.assert_close(still.stderr[:, k], mixed.stderr[:, 0], rtol=1e-9, atol=0)
    assert float(still.kl.abs().max()) == float(still.kl_stderr.abs().max()) == 0
    assert bool(still.pointwise_order().isnan().all())


def test_only_radius_zero_leaves_out_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = more_cases()["tanh mlp"]
    seen: list[bool] = []
    forward = rays._Rays.forward

    def spy(self: Any, samples: Any, points: Any, parameters: Any) -> Any:
        seen.append(points.still)
        return forward(self, samples, points, parameters)

    monkeypatch.setattr(rays._Rays, "forward", spy)
    dd.ray_curvature(model, inputs, structured(model), [0.0])
    dd.ray_curvature(model, inputs, structured(model), [0.0, 1e-9])
    dd.point_curvature(model, inputs, structured(model))
    assert seen == [True, False, True]


def test_statistics_over_samples() -> None:
    model, _ = more_cases()["relu mlp"]
    x = torch.randn(7, 3)
    found = dd.point_curvature(model, x, structured(model))
    torch.testing.assert_close(found.curvature, found.per_sample.mean(1))
    torch.testing.assert_close(found.stderr, found.per_sample.std(1) / 7**0.5)
    alone = dd.point_curvature(model, x[:1], structured(model))
    torch.testing.assert_close(alone.per_sample[:, 0], found.per_sample[:, 0])
    assert bool(alone.stderr.isnan().all()) and any("one sample" in note for note in alone.notes)


def test_order_and_scale_of_the_directions_do_not_matter() -> None:
    """Directions are sorted by structure inside; what is returned is in the order given."""
    model, inputs = more_cases()["gated"]
    directions = structured(model)
    found = dd.point_curvature(model, inputs, directions)
    back = [4, 2, 0, 3, 1]
    scale = torch.tensor([1e-12, 1.0, 30.0, -2.0, 1e9])
    moved = {k: u[back] * scale.view(-1, *(1,) * (u.ndim - 1)) for k, u in directions.items()}
    got = dd.point_curvature(model, inputs, moved)
    torch.testing.assert_close(got.per_sample, found.per_sample[back], rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(got.norms, found.norms[back] * scale.abs())


@pytest.mark.parametrize("case", ["relu mlp", "conv", "attention", "encoder"])
def test_chunks_do_not_matter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = more_cases()[case]
    directions = structured(model)
    whole = dd.point_curvature(model, inputs, directions)
    passes = []
    run = rays.dual.run
    monkeypatch.setattr(rays.dual, "run", lambda *a: passes.append(1) or run(*a))
    budget = dd.ray_curvature(model, inputs, directions, [0.0]).chunking.estimate
    passes.clear()
    cut = dd.point_curvature(model, inputs, directions, memory_budget=budget // 4)
    assert len(passes) >= 4
    torch.testing.assert_close(cut.per_sample, whole.per_sample, rtol=1e-11, atol=1e-16)
    torch.testing.assert_close(cut.stderr, whole.stderr, rtol=1e-11, atol=0)


def test_factors_stand_for_their_product() -> None:
    model, inputs = more_cases()["tanh mlp"]
    v, w = torch.randn(3, 4), torch.randn(3, 3)
    got = [
        dd.point_curvature(model, inputs, {"0.weight": u, "0.bias": torch.ones(3, 4)})
        for u in (RankOne(v, w), v.unsqueeze(2) * w.unsqueeze(1))
    ]
    torch.testing.assert_close(got[0].per_sample, got[1].per_sample, rtol=1e-12, atol=0)


def test_single_precision() -> None:
    model, inputs = more_cases()["attention"]
    directions = structured(model)
    exact = dd.point_curvature(model, inputs, directions)
    single = dd.point_curvature(model.float(), inputs, directions)
    assert single.curvature.dtype == torch.float64
    assert any("float32" in note for note in single.notes)
    torch.testing.assert_close(single.curvature, exact.curvature, rtol=1e-5, atol=0)


def test_one_output_per_sample() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    x, u = torch.randn(6, 3), torch.randn(2, 3)
    found = dd.point_curvature(Flat(), x, {"w": u}, likelihood="gaussian")
    unit = u / u.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.per_sample, (unit @ x.T).square())


def test_a_kink_is_reported() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    u = {"0.weight": torch.randn(2, 4, 3)}
    assert dd.point_curvature(model, x, u).notes == ()
    nn.init.zeros_(model[0].weight[1])
    nn.init.zeros_(model[0].bias)
    assert any("kink of relu" in note for note in dd.point_curvature(model, x, u).notes)


def test_an_operation_without_a_rule_is_exact() -> None:
    class Gamma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -1.2]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x * self.w.exp())

    model, x = Gamma(), torch.rand(4, 2) + 1
    found = dd.point_curvature(model, x, {"w": torch.eye(2)}, likelihood="gaussian")
    scaled = x * model.w.exp().detach()
    want = (torch.digamma(scaled) * scaled).square().T
    torch.testing.assert_close(found.per_sample, want, rtol=1e-12, atol=0)
    assert found.notes == ()


def test_rules_of_other_libraries_see_a_difference_for_each_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @torch.library.custom_op("deaddir_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.deaddir_test.twice(x @ self.w)

    def rule(ctx: Any, op: Any, x: Any) -> Any:
        assert x.delta.shape == x.dot.shape == (ctx.points.count, *x.base.shape)
        return type(x)(2 * x.base, 2 * x.delta, 2 * x.dot)

    monkeypatch.setitem(dual_registry.RULES, torch.ops.deaddir_test.twice, rule)
    model, x, u = Twice(), torch.randn(4, 3), torch.randn(2, 3, 3)
    found = dd.point_curvature(model, x, {"w": u}, likelihood="gaussian")
    unit = u / u.flatten(1).norm(dim=1).view(-1, 1, 1)
    torch.testing.assert_close(found.per_sample, (2 * (x @ unit)).square().sum(-1))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"likelihood": "cauchy"}, ValueError, "likelihood: expected one of"),
        ({"directions": {}}, ValueError, "directions: expected at least one parameter"),
        ({"directions": {"9.weight": torch.ones(1)}}, ValueError, "no parameter called '9.weight'"),
        ({"memory_budget": 10}, ValueError, "memory_budget: expected at least"),
        ({"model": 3}, TypeError, r"model: expected a torch.nn.Module"),
        ({"inputs": torch.ones(0, 3)}, ValueError, "inputs: expected at least one sample"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    model, x = more_cases()["tanh mlp"]
    args: dict[str, Any] = {"model": model, "inputs": x, "directions": structured(model)} | change
    with pytest.raises(error, match=match):
        dd.point_curvature(args.pop("model"), args.pop("inputs"), args.pop("directions"), **args)


def test_attention_without_its_own_projections_moves() -> None:
    """Only the embedding moves: queries, keys and values all move through frozen weights."""
    model, tokens = Attention(), torch.tensor([[0, 1, 2], [3, 1, 0]])
    u = torch.randn(2, 5, 4)
    found = dd.point_curvature(model, tokens, {"embed.weight": u})
    whole = {k: torch.zeros(2, *v.shape) for k, v in model.named_parameters()}
    whole["embed.weight"] = u
    model.requires_grad_(False)
    exact = dense_fisher(model, tokens, "categorical")
    unit = flat(model, whole)
    want = torch.einsum("pi,ij,pj->p", unit, exact, unit)
    torch.testing.assert_close(found.curvature, want, rtol=1e-10, atol=0)
