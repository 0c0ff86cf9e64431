"""The paper's step for pairs and chains against its formulas, written out unit by unit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.optim.blocks import zero_sum_modes
from deaddir_fast.optim.claims import CHAIN, PAIR
from deaddir_fast.optim.ddcadam import DDCAdam
from optim.trajectories import load, state_of

BETAS, EPS = (0.9, 0.99), 1e-8


class Moments:
    """Adam of one tensor, as the textbook has it."""

    def __init__(self) -> None:
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def direction(self, g: Tensor, t: int) -> Tensor:
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        first, second = self.m / (1 - BETAS[0] ** t), self.v / (1 - BETAS[1] ** t)
        return first / (second.sqrt() + EPS)


def paper_step(
    blocks: list[Tensor],
    gradients: list[Tensor],
    memory: dict[str, list[Moments]],
    t: int,
    lr: float,
    wd: float,
    breadth: list[int],
) -> list[Tensor]:
    """Steps 1 to 7 of theory for one unit made of several flat blocks, gauge mode off."""
    w = [(1 - lr * wd) * b for b in blocks]
    rho = [b.norm() for b in w]
    hat = [g @ b for g, b in zip(gradients, w, strict=True)]
    count = len(w)
    total = sum(hat) / math.sqrt(count)
    radial = -lr * memory["radial"][0].direction(total, t) / math.sqrt(count)
    out = []
    for b in range(count):
        tangent = rho[b] * (gradients[b] - hat[b] / rho[b] ** 2 * w[b])
        u = memory["tangent"][b].direction(tangent, t)
        u = u - (u @ w[b]) / rho[b] ** 2 * w[b]
        out.append(radial.exp() * w[b] - lr * rho[b] / math.sqrt(breadth[b]) * u)
    return out


def test_pair_step_per_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    lr, wd = 2e-2, 0.3
    optimizer = DDCAdam(model, lr, BETAS, EPS, wd, likelihood="gaussian")
    assert [c.treatment for c in optimizer.claims if c.gauge.dimension] == [PAIR]
    memory = [{"radial": [Moments()], "tangent": [Moments(), Moments()]} for _ in range(5)]
    tail = torch.nn.Parameter(model[2].bias.detach().clone())
    other = torch.optim.AdamW([tail], lr, BETAS, EPS, wd)
    for t in range(1, 6):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        w1, b1, w2 = (p.detach().clone() for p in (model[0].weight, model[0].bias, model[2].weight))
        g1, c1, g2 = (p.grad.clone() for p in (model[0].weight, model[0].bias, model[2].weight))
        tail.grad = model[2].bias.grad.clone()
        optimizer.step()
        other.step()
        for j in range(5):
            incoming, outgoing = paper_step(
                [torch.cat([w1[j], b1[j : j + 1]]), w2[:, j]],
                [torch.cat([g1[j], c1[j : j + 1]]), g2[:, j]],
                memory[j], t, lr, wd, [1, 1],
            )  # fmt: skip
            assert torch.allclose(model[0].weight[j], incoming[:-1], rtol=1e-11)
            assert torch.allclose(model[0].bias[j], incoming[-1], rtol=1e-11)
            assert torch.allclose(model[2].weight[:, j], outgoing, rtol=1e-11)
        assert torch.allclose(model[2].bias, tail, rtol=1e-12)


def test_chain_step_of_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.ReLU(),
        nn.Linear(6, 3, bias=False),
    ).double()  # fmt: skip
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    lr, wd = 2e-2, 0.3
    optimizer = DDCAdam(model, lr, BETAS, EPS, wd, "layerwise", likelihood="gaussian")
    assert {c.treatment for c in optimizer.claims if c.gauge.dimension} == {CHAIN}
    memory = {"radial": [Moments()], "tangent": [Moments() for _ in range(3)]}
    for t in range(1, 6):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        before = [p.detach().clone() for p in model.parameters()]
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        after = paper_step(
            [w.flatten() for w in before], [g.flatten() for g in gradients], memory, t, lr, wd,
            [5, 6, 3],
        )  # fmt: skip
        for p, expected in zip(model.parameters(), after, strict=True):
            assert torch.allclose(p.flatten(), expected, rtol=1e-11)


def test_later_biases_of_a_chain_scale_with_the_layers_before() -> None:
    """b -> a_1 a_2 b: the bias moves by the product of the layers' row norms."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    optimizer = DDCAdam(model, 1e-2, gauges="layerwise", likelihood="gaussian")
    F.mse_loss(model(x), y).backward()
    start, g = state_of(model), model[2].bias.grad.clone()
    optimizer.step()
    first = torch.cat([start["0.weight"].flatten(), start["0.bias"]]).norm() / math.sqrt(5)
    scale = first * start["2.weight"].norm() / math.sqrt(6)
    expected = start["2.bias"] - 1e-2 * scale * (g * scale) / ((g * scale).abs() + 1e-8)
    assert torch.allclose(model[2].bias, expected, rtol=1e-10)


@pytest.mark.parametrize("length", [2, 3, 7])
def test_zero_sum_modes_are_an_orthonormal_basis(length: int) -> None:
    basis = zero_sum_modes(length)
    assert basis.shape == (length - 1, length)
    assert torch.allclose(basis @ basis.T, torch.eye(length - 1).double(), atol=1e-14)
    assert basis.sum(1).abs().max() < 1e-14


def test_vertical_step_moves_along_the_gauge_only() -> None:
    """With the mode on, the function is that of the step with the mode off, to second order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    ends = []
    for vertical in (False, True):
        m = load(model, state_of(model))
        optimizer = DDCAdam(m, 1e-2, likelihood="gaussian", vertical=vertical)
        F.mse_loss(m(x), y).backward()
        # A gradient that is not invariant, as rounding makes it.
        m[0].weight.grad += 1e-3 * m[0].weight.detach()
        optimizer.step()
        ends.append(m)
    a, b = ends
    ratio = (b[0].weight / a[0].weight).detach()
    back = (b[2].weight / a[2].weight).detach()
    assert (ratio - 1).abs().min() > 1e-3
    along = ratio.median(1).values * back.median(0).values
    assert torch.allclose(along, torch.ones(5).double(), rtol=1e-3)


def test_a_dead_unit_takes_the_step_of_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    x, y = torch.randn(20, 4).double(), torch.randn(20, 3).double()
    optimizer = DDCAdam(model, 1e-2, likelihood="gaussian")
    F.mse_loss(model(x), y).backward()
    g = model[2].weight.grad[:, 1].clone()
    assert bool((g != 0).all())
    optimizer.step()
    assert torch.allclose(model[2].weight[:, 1], -1e-2 * g / (g.abs() + 1e-8), rtol=1e-10)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
