"""KL orders by slope, by the pointwise identity and by Taylor coefficients, against the truth."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import deaddir_fast as dd

RADII = torch.logspace(-3, -0.5, 16, dtype=torch.float64)


class RotatedPowers(nn.Module):
    """Means x_i^k_i, i = 1..5, k_i = i, in a random rotation of the parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(5, 5, dtype=torch.float64, generator=generator)
        self.register_buffer("rotation", torch.linalg.qr(draw).Q)
        self.w = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.rotation @ self.w
        return torch.stack([x[k] ** (k + 1) for k in range(5)]).expand(inputs.shape[0], 5)


class Residual(nn.Module):
    """A stack of residual blocks x + W2 tanh(W1 x) and a read-out."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(blocks)
        self.first = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(blocks))
        self.read = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        for one, two in zip(self.first, self.second, strict=True):
            x = x + two(torch.tanh(one(x)))
        return self.read(x)


def read(
    model: nn.Module, x: Tensor, directions: dict[str, Tensor]
) -> tuple[list[dd.RateFit], list[float]]:
    rays = dd.ray_curvature(model, x, directions, RADII, likelihood="gaussian")
    fits = dd.fit_rate(rays.radii, rays.fisher, kl=rays.kl)
    return fits, dd.ray_orders(model, x, directions, likelihood="gaussian").tolist()


@pytest.mark.parametrize("seed", range(3))
def test_rotated_sums_of_powers(seed: int) -> None:
    """Along the rotated axes the slope is 2(k − 1) and the order exactly k."""
    model = RotatedPowers(seed)
    fits, orders = read(model, torch.zeros(1, 1, dtype=torch.float64), {"w": model.rotation})
    for k, fit, order in zip(range(1, 6), fits, orders, strict=True):
        assert fit.verdict == "resolved"
        assert abs(fit.slope - 2 * (k - 1)) <= 0.05
        assert order == k
    triple = dd.read_triple(model, torch.zeros(1, 1, dtype=torch.float64), likelihood="gaussian")
    assert triple.resolved
    assert triple.rlct == dd.theory.additive(range(1, 6)).rlct


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_dead_branch_behind_a_skip(blocks: int) -> None:
    """A residual branch that is all dead has order 2, whatever the depth around it."""
    model = Residual(blocks)
    with torch.no_grad():
        for parameter in (*model.first[0].parameters(), *model.second[0].parameters()):
            parameter.zero_()
    directions = {
        name: torch.randn(1, *value.shape, dtype=torch.float64)
        for name, value in model.named_parameters()
        if name.startswith(("first.0.weight", "second.0.weight"))
    }
    fits, orders = read(model, torch.randn(20, 3, dtype=torch.float64), directions)
    assert orders == [2.0]
    assert abs(fits[0].slope - 2) <= 0.05 and fits[0].verdict == "resolved"


def test_the_skip_itself_is_live() -> None:
    """Through the identity skip a change of an early bias reaches the output at first order."""
    model = Residual(2)
    with torch.no_grad():
        for parameter in model.second.parameters():
            parameter.zero_()
    fits, orders = read(
        model,
        torch.randn(20, 3, dtype=torch.float64),
        {"second.0.bias": torch.randn(1, 3, dtype=torch.float64)},
    )
    assert orders == [1.0]
    assert abs(fits[0].slope) <= 0.05 and fits[0].verdict == "resolved"


class CurvedHighOrder(nn.Module):
    """Means (x − y², x⁵): outputs of degree 5, yet order 10 along the curve x = y²."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        x, y = self.w[0], self.w[1]
        return torch.stack([x - y * y, x**5]).expand(inputs.shape[0], 2)


def test_a_low_degree_does_not_prove_a_curved_fibre() -> None:
    """λ = 1/2 + 1/20; flat to order 8 it must not be read as a smooth fibre with λ = 1/2."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    triple = dd.read_triple(CurvedHighOrder(), x, likelihood="gaussian")
    assert not triple.resolved
    assert triple.lower <= Fraction(11, 20) <= triple.upper
    dead = dd.dead_directions(CurvedHighOrder(), x, likelihood="gaussian")
    assert dead.kinds == ("unresolved",) and dead.verdict != "resolved"
    resolved = dd.read_triple(CurvedHighOrder(), x, likelihood="gaussian", max_order=10)
    assert resolved.rlct == Fraction(11, 20)
