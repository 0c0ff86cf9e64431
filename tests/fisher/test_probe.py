"""Curvature by layers and heads against dense autograd."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import deaddir_fast as dd
from deaddir_fast.nets.likelihood import get


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.ln = nn.LayerNorm(8)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        y = self.ln(h)
        h = h + self.att(y, y, y, need_weights=False)[0]
        return self.head(h + torch.tanh(self.fc(h)))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, groups=2, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.two(torch.tanh(self.one(x)))))
        return self.head(x.mean((2, 3)))


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "transformer": (Net().double().eval(), torch.randint(0, 11, (6, 4))),
        "pictures": (Pictures().double().eval(), torch.randn(5, 2, 6, 6).double()),
    }


def per_sample(model: nn.Module, x: Tensor, u: dict[str, Tensor], likelihood: str) -> Tensor:
    """(p, n) uᵀ F_n u from the dense Jacobian."""
    state = {k: v.detach() for k, v in model.named_parameters()}
    jacobian = jacrev(lambda s: functional_call(model, s, (x,)))(state)
    z, out = model(x).detach(), []
    for i in range(len(next(iter(u.values())))):
        dz = sum((jacobian[k] * u[k][i]).flatten(z.ndim).sum(-1) for k in u)
        out.append(get(likelihood).fisher(z, dz).flatten(1).sum(1) if z.ndim > 2
                   else get(likelihood).fisher(z, dz))  # fmt: skip
    return torch.stack(out)


def random_directions(model: nn.Module, p: int = 3) -> dict[str, Tensor]:
    return {k: torch.randn(p, *v.shape).double() for k, v in model.named_parameters()}


@pytest.mark.parametrize("name", ["transformer", "pictures"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_total_and_layers_against_autograd(name, likelihood):
    model, x = models()[name]
    u = random_directions(model)
    norms = torch.cat([v.flatten(1) for v in u.values()], 1).norm(dim=1)
    read = dd.layer_curvature(model, [x[:2], x[2:]], u, likelihood=likelihood)
    truth = per_sample(model, x, u, likelihood) / norms[:, None] ** 2
    torch.testing.assert_close(read.per_sample, truth, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(read.curvature, truth.mean(1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(read.stderr, truth.std(1) / len(x) ** 0.5, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(read.norms, norms)
    for layer, probe in read.layers.items():
        own = {k: v for k, v in u.items() if k.startswith(f"{layer}.")}
        if not own:
            continue  # part of a packed projection, below
        alone = per_sample(model, x, own, likelihood).mean(1) / norms**2
        torch.testing.assert_close(probe.curvature, alone, rtol=1e-8, atol=1e-14)


def test_packed_projections_and_heads():
    model, x = models()["transformer"]
    u = random_directions(model)
    norms = torch.cat([v.flatten(1) for v in u.values()], 1).norm(dim=1)
    read = dd.layer_curvature(model, x, u, heads=True)
    weight, bias = u["att.in_proj_weight"], u["att.in_proj_bias"]
    for block, letter in enumerate("qkv"):
        probe = read.layers[f"att.{letter}"]
        for head, rows in enumerate((range(0, 4), range(4, 8))):
            keep = [8 * block + r for r in rows]
            w, b = torch.zeros_like(weight), torch.zeros_like(bias)
            w[:, keep], b[:, keep] = weight[:, keep], bias[:, keep]
            part = {"att.in_proj_weight": w, "att.in_proj_bias": b}
            truth = per_sample(model, x, part, "categorical").mean(1) / norms**2
            torch.testing.assert_close(probe.heads[f"{letter}{head}"], truth, rtol=1e-8, atol=1e-15)
    for head, columns in enumerate((slice(0, 4), slice(4, 8))):
        w = torch.zeros_like(u["att.out_proj.weight"])
        w[:, :, columns] = u["att.out_proj.weight"][:, :, columns]
        truth = per_sample(model, x, {"att.out_proj.weight": w}, "categorical").mean(1) / norms**2
        found = read.layers["att.out_proj"].heads[f"o{head}"]
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-15)


def test_rank_one_directions():
    model, x = models()["transformer"]
    v, w = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    dense = {"fc.weight": v[:, :, None] * w[:, None], "fc.bias": torch.randn(4, 8).double()}
    low = {"fc.weight": dd.RankOne(v, w), "fc.bias": dense["fc.bias"]}
    one, other = (dd.layer_curvature(model, x, u) for u in (dense, low))
    truth = per_sample(model, x, dense, "categorical").mean(1) / one.norms**2
    torch.testing.assert_close(one.curvature, truth, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(other.curvature, truth, rtol=1e-10, atol=1e-15)
    assert other.layers["fc"].flops == 2 * 4 * 24 * (8 + 8)


def test_a_symmetry_across_layers_is_null_in_total_but_not_by_layers():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    w1, b1, w2 = (model[0].weight.data, model[0].bias.data, model[2].weight.data)
    u = {
        "0.weight": torch.zeros_like(w1)[None],
        "0.bias": torch.zeros_like(b1)[None],
        "2.weight": torch.zeros_like(w2)[None],
    }
    u["0.weight"][0, 1], u["0.bias"][0, 1], u["2.weight"][0, :, 1] = w1[1], b1[1], -w2[:, 1]
    x = torch.randn(40, 4).double()
    read = dd.layer_curvature(model, x, u)
    assert float(read.curvature) < 1e-30
    assert all(float(p.curvature) > 1e-4 for p in read.layers.values())
    factors = dd.kron_factors(model, x)
    by_kfac = dd.layer_curvature(model, x, u, method="kfac", factors=factors)
    assert bool(by_kfac.curvature.isnan().all()) and "K-FAC" in by_kfac.notes[0]
    assert all(p.method == "kfac" for p in by_kfac.layers.values())


def test_kfac_is_exact_on_deep_linear_networks():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double().eval()
    x, u = torch.randn(30, 4).double(), random_directions(model)
    factors = dd.kron_factors(model, x, likelihood="gaussian")
    exact = dd.layer_curvature(model, x, u, likelihood="gaussian")
    kfac = dd.layer_curvature(model, x, u, likelihood="gaussian", method="kfac", factors=factors)
    for name, probe in exact.layers.items():
        torch.testing.assert_close(probe.curvature, kfac.layers[name].curvature, rtol=1e-10, atol=0)


def test_cheapest_takes_kfac_where_samples_are_many():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 40)).double().eval()
    x, u = torch.randn(12, 4).double(), random_directions(model)
    factors = dd.kron_factors(model, x)
    read = dd.layer_curvature(model, x, u, method="cheapest", factors=factors)
    assert {k: p.method for k, p in read.layers.items()} == {"0": "kfac", "2": "exact"}


def test_monte_carlo_converges_to_exact():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    x, u = torch.randn(50, 4).double(), random_directions(model)
    exact = dd.layer_curvature(model, x, u)
    mc = dd.layer_curvature(model, x, u, fisher="mc", draws=400)
    # The relative spread of a squared score is of order one: 1/√(50 · 400) = 0.7 %.
    torch.testing.assert_close(mc.curvature, exact.curvature, rtol=0.05, atol=0)
    assert mc.kind == "mc" and "drawn from the model" in mc.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models(dtype):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    x, u = torch.randn(32, 16), {k: v.float() for k, v in random_directions(model).items()}
    wide = dd.layer_curvature(model.double(), x.double(), {k: v.double() for k, v in u.items()})
    model.to(dtype)
    read = dd.layer_curvature(model, x.to(dtype), {k: v.to(dtype) for k, v in u.items()})
    rtol = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(read.curvature, wide.curvature, rtol=rtol, atol=1e-5)


def test_bad_arguments_are_named():
    model, x = models()["transformer"]
    u = random_directions(model)
    with pytest.raises(TypeError, match="factors"):
        dd.layer_curvature(model, x, u, method="kfac")
    with pytest.raises(ValueError, match="method"):
        dd.layer_curvature(model, x, u, method="guess")
    with pytest.raises(ValueError, match="batches"):
        dd.layer_curvature(model, [], u)
    with pytest.raises(ValueError, match="no parameter called"):
        dd.layer_curvature(model, x, {"nothing": torch.ones(1, 3)})

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * self.scale)

    with (
        pytest.warns(UserWarning, match="scale|Odd"),
        pytest.raises(ValueError, match="point_curvature"),
    ):
        dd.layer_curvature(Odd().eval(), torch.randn(4, 3), {"scale": torch.ones(1, 3)})
