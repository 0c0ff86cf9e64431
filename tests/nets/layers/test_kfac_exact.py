"""Where K-FAC is exact: deep linear networks, with and without shared weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deaddir_fast as dd

torch.set_num_threads(1)


def block(model: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean over samples of Jᵀ J for one layer, bias column last, by autograd."""
    own = (weight,) if bias is None else (weight, bias)
    z = model(x).flatten(1)
    total: Tensor | None = None
    for k in range(len(x)):
        for c in range(z.shape[1]):
            grads = torch.autograd.grad(z[k, c], own, retain_graph=True)
            row = grads[0] if bias is None else torch.cat([grads[0], grads[1][:, None]], 1)
            row = row.flatten()
            total = torch.outer(row, row) + (0 if total is None else total)
    assert total is not None
    return total / len(x)


def compare(model: nn.Module, x: Tensor, kfac: str) -> None:
    factors = dd.kron_factors(model, [x[:2], x[2:]], likelihood="gaussian", kfac=kfac, strict=True)
    own = dict(model.named_parameters())
    for name, f in factors.items():
        exact = block(model, x, own[f.weight], None if f.bias is None else own[f.bias])
        scale = float(exact.abs().max())
        got = torch.kron(f.G, f.A)
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-10 * scale, msg=name)


def chain(bias: bool) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o, bias=bias) for i, o in ((4, 5), (5, 3), (3, 2))))


@pytest.mark.parametrize("bias", [False, True])
def test_deep_linear(bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    for kfac in ("expand", "reduce"):
        compare(chain(bias).double().eval(), x, kfac)


@pytest.mark.parametrize("bias", [False, True])
def test_expand_on_each_token(bias: bool) -> None:
    """Outputs at every token (Eschenhagen et al. 2023, the expand setting)."""
    torch.manual_seed(1)
    compare(chain(bias).double().eval(), torch.randn(5, 3, 4, dtype=torch.float64), "expand")


class Mean(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.chain = chain(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x).mean(1)


@pytest.mark.parametrize("bias", [False, True])
def test_reduce_of_a_mean(bias: bool) -> None:
    """Outputs averaged over tokens (the reduce setting); expand is not exact there."""
    torch.manual_seed(2)
    model, x = Mean(bias).double().eval(), torch.randn(5, 3, 4, dtype=torch.float64)
    compare(model, x, "reduce")
    with pytest.raises(AssertionError):
        compare(model, x, "expand")


@pytest.mark.parametrize("pool", [True, False])
def test_reduce_of_convolutions(pool: bool) -> None:
    """Pointwise and strided convolutions without overlap, averaged over positions."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(2, 4, 2, stride=2, bias=pool)
            self.mix = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.patch(x)).mean((2, 3))

    torch.manual_seed(3)
    model, x = Net().double().eval(), torch.randn(4, 2, 6, 4, dtype=torch.float64)
    factors = dd.kron_factors(model, x, likelihood="gaussian", kfac="reduce")
    z = model(x)
    for name, module in (("patch", model.patch), ("mix", model.mix)):
        own = [p for p in (module.weight, module.bias) if p is not None]
        rows = []
        for k in range(4):
            for c in range(3):
                grads = torch.autograd.grad(z[k, c], own, retain_graph=True)
                parts = [grads[0].flatten(1), *(g[:, None] for g in grads[1:])]
                rows.append(torch.cat(parts, 1).flatten())
        s = torch.stack(rows)
        f = factors[name]
        torch.testing.assert_close(torch.kron(f.G, f.A), s.T @ s / 4, rtol=0, atol=1e-10)


def test_norms_are_exact_blocks_in_any_network() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    model, x = model.double().eval(), torch.randn(4, 5, 4, dtype=torch.float64)
    f = dd.kron_factors(model, x, likelihood="gaussian")["1"]
    z = model(x)
    rows = []
    for k in range(4):
        for t in range(5):
            for c in range(3):
                own = (model[1].weight, model[1].bias)
                grads = torch.autograd.grad(z[k, t, c], own, retain_graph=True)
                rows.append(torch.cat(grads))
    s = torch.stack(rows)
    torch.testing.assert_close(f.G, s.T @ s / 4, rtol=1e-11, atol=1e-12)
