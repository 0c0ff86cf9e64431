"""Which flows project to Θ/G: those in an invariant metric, and balanced Euclidean ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast import gauge
from gauge.flows import (
    MODELS,
    State,
    case,
    distance,
    elements,
    euler,
    loss_gradient,
    rk4,
    transport,
)

F64 = torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_flow_in_the_invariant_metric_projects_and_the_euclidean_one_does_not(name: str) -> None:
    model, inputs, state, found = case(name)
    found = tuple(g for g in found if name != "tied" or g.likelihood is None)
    moves = elements(found)
    there = transport(found, moves, state)
    plain = loss_gradient(model, inputs)

    def invariant(s: State) -> State:
        return gauge.frame(s, found).gradient(plain(s))

    for run, steps in ((rk4, 2), (euler, 4)):  # steps of any length project: all is linear
        here, after = run(invariant, state, 0.02, steps), run(invariant, there, 0.02, steps)
        travelled = distance(here, state)
        assert travelled > 1e-3
        assert distance(after, transport(found, moves, here)) <= 1e-8 * travelled
    here, after = rk4(plain, state, 0.02, 2), rk4(plain, there, 0.02, 2)
    travelled = distance(here, state)
    assert distance(after, transport(found, moves, here)) > 0.1 * travelled


class Product(nn.Module):
    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[a]], dtype=F64))
        self.b = nn.Parameter(torch.tensor([[b]], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.T


@pytest.mark.parametrize(
    ("a", "b", "score", "velocity"), [(1.0, 1.0, 2.0, 4.0), (2.0, 0.5, 4.25, 8.5)]
)
def test_states_with_one_product_differ_in_score_and_velocity(
    a: float, b: float, score: float, velocity: float
) -> None:
    """y ~ N(a b x, 1) at x = 1: trace F = a² + b². L = (a b − 3)² / 2: (a b)' = 2 (a² + b²)."""
    model = Product(a, b)
    z = model(torch.ones(1, 1, dtype=F64))
    slope = torch.autograd.grad(z.sum(), [model.a, model.b], retain_graph=True)
    assert z.item() == 1.0
    assert sum(float(g.square()) for g in slope) == score
    rates = torch.autograd.grad(0.5 * (z - 3).square().sum(), [model.a, model.b])
    assert float(-(rates[0] * b + rates[1] * a)) == velocity
    # in the invariant metric f_a = φ = |a|, f_b = 1 / φ: (a b)' = 2 (b² a² + a² / a²) on both
    state = {"a": model.a.detach(), "b": model.b.detach()}
    at = torch.zeros(1, 1, dtype=torch.long)
    slots = (gauge.rescaling.Slot("a", 0, at, 1, 1), gauge.rescaling.Slot("b", 1, at, 1, -1))
    g = gauge.Rescaling("test", "R^*", ("a", "b"), (1,), None, slots, False)
    raised = gauge.frame(state, [g]).gradient({"a": rates[0], "b": rates[1]})
    assert float(-(raised["a"] * b + raised["b"] * a)) == pytest.approx(4.0, rel=1e-14)


def root(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def balanced(product: Tensor, rotation: Tensor) -> State:
    """V, U with U V = product and Uᵀ U = V Vᵀ."""
    u, s, vh = torch.linalg.svd(product)
    half = torch.diag(s.sqrt())
    return {"V": rotation @ half @ vh, "U": u @ half @ rotation.T}


def test_balanced_flow_is_a_flow_of_the_product_and_an_unbalanced_one_is_not() -> None:
    """W = U V, L(W): W' = −(W Wᵀ)^½ G − G (Wᵀ W)^½ from a balanced start, whatever the factors."""
    draw = torch.Generator().manual_seed(1)
    start, target = (torch.randn(3, 3, dtype=F64, generator=draw) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=draw)).Q

    def factors(s: State) -> State:
        g = s["U"] @ s["V"] - target
        return {"U": g @ s["V"].T, "V": s["U"].T @ g}

    def product(s: State) -> State:
        w, g = s["W"], s["W"] - target
        return {"W": root(w @ w.T) @ g + g @ root(w.T @ w)}

    step, steps = 0.005, 200
    expected = rk4(product, {"W": start}, step, steps)
    assert distance(expected, {"W": start}) > 0.1
    stretch = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=F64))
    for turn in (torch.eye(3, dtype=F64), rotation):
        s = balanced(start, turn)
        end = rk4(factors, s, step, steps)
        assert distance({"W": end["U"] @ end["V"]}, expected) <= 1e-8
        unbalanced = {"V": stretch @ s["V"], "U": s["U"] @ torch.linalg.inv(stretch)}
        assert torch.allclose(unbalanced["U"] @ unbalanced["V"], start, rtol=1e-12)
        end = rk4(factors, unbalanced, step, steps)
        assert distance({"W": end["U"] @ end["V"]}, expected) > 1e-2


def test_descent_in_log_coordinates_is_equivariant() -> None:
    """w = e^u: the gauge is the translation u -> u + log s, and w · ∂L/∂w is the same on an orbit.

    A chain of positive weights with gauges between them; one step, and many.
    """
    draw = torch.Generator().manual_seed(2)
    sizes = (3, 4, 2)
    state = {
        f"w{i}": torch.rand(b, a, dtype=F64, generator=draw) + 0.2
        for i, (a, b) in enumerate(zip((3, *sizes[1:]), (4, 2, 1), strict=True))
    }
    inputs = torch.rand(5, 3, dtype=F64, generator=draw)
    slots = []
    for i, h in ((0, 4), (1, 2)):
        at = torch.arange(h)[:, None]
        slots.append(
            (
                gauge.rescaling.Slot(f"w{i}", 0, at, h, 1),
                gauge.rescaling.Slot(f"w{i + 1}", 1, at, h, -1),
            )
        )
    found = [
        gauge.Rescaling(
            f"between {i}", "R_>0", (f"w{i}", f"w{i + 1}"), (len(s[0].positions),), None, s, True
        )
        for i, s in enumerate(slots)
    ]
    moves = elements(found)

    def gradient(s: State) -> State:
        leaves = {k: v.detach().requires_grad_() for k, v in s.items()}
        z = inputs
        for i in range(3):
            z = torch.relu(z @ leaves[f"w{i}"].T)
        loss = (z - 1).square().mean()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def in_logs(u: State) -> State:
        w = {k: v.exp() for k, v in u.items()}
        return {k: w[k] * g for k, g in gradient(w).items()}

    def logs(s: State) -> State:
        return {k: v.log() for k, v in s.items()}

    there = transport(found, moves, state)
    shift = {k: logs(there)[k] - v for k, v in logs(state).items()}
    expected = math.log(float(moves[0][1]))
    assert torch.allclose(shift["w0"][1], torch.full((3,), expected, dtype=F64), rtol=1e-12)
    for steps in (1, 50):
        here, after = (
            euler(in_logs, logs(state), 0.05, steps),
            euler(in_logs, logs(there), 0.05, steps),
        )
        assert distance(here, logs(state)) > 1e-3
        assert distance(after, {k: v + shift[k] for k, v in here.items()}) <= 1e-12
        here, after = euler(gradient, state, 1e-3, steps), euler(gradient, there, 1e-3, steps)
        travelled = distance(here, state)
        assert distance(after, transport(found, moves, here)) > 0.1 * travelled
