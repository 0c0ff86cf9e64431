"""Batch norm in evaluation mode: lists by hand, exact outputs, exact Fisher, closed form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from deaddir_fast import gauge
from gauge.models import with_statistics


@pytest.fixture(autouse=True)
def no_claim_is_dropped() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Stream(nn.Module):
    """Two writers of a stream, each behind a norm of its own, and a third norm on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a = with_statistics(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
        self.b = with_statistics(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
        self.top = with_statistics(nn.BatchNorm1d(3), nn.Tanh())
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.top(self.a(x) + self.b(x)))


LINEAR = torch.randn(12, 4)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, set[tuple[str, str, int]]]] = {
    # Scale and shift of every channel before the norm; nothing else passes a tanh.
    "convolution": (
        lambda: with_statistics(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)
        ),
        torch.randn(12, 1, 4, 4),
        {
            ("rescaling: 0 -> 1", "(R^*)^2", 2),
            ("translation: 0.bias -> 1.bias", "R^2", 2),
            ("permutation: 0, 1 -> 4", "S_2", 0),
        },
    ),
    # The sign passes: the norm's own weight takes it back before the ReLU.
    "before a relu": (
        lambda: with_statistics(
            nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)
        ),
        LINEAR,
        {
            ("rescaling: 0 -> 1", "(R^*)^3", 3),
            ("rescaling: 1 -> 3", "(R_>0)^3", 3),
            ("permutation: 0, 1 -> 3", "S_3", 0),
        },
    ),
    "behind a relu": (
        lambda: with_statistics(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 1)),
        LINEAR,
        {
            ("rescaling: 0 -> 2", "(R_>0)^3", 3),
            ("rescaling: 2 -> 3", "(R^*)^3", 3),
            ("translation: 2.bias -> 3.bias", "R^3", 3),
            ("permutation: 0, 2 -> 3", "S_3", 0),
        },
    ),
    "depthwise, transposed": (
        lambda: with_statistics(
            nn.ConvTranspose1d(2, 3, 2, bias=False),
            nn.BatchNorm1d(3),
            nn.Tanh(),
            nn.Conv1d(3, 3, 2, groups=3),
            nn.BatchNorm1d(3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 1),
        ),
        torch.randn(12, 2, 4),
        {
            ("rescaling: 0 -> 1", "(R^*)^3", 3),
            ("rescaling: 3 -> 4", "(R^*)^3", 3),
            ("translation: 3.bias -> 4.bias", "R^3", 3),
            ("permutation: 0, 1, 3, 4 -> 3, 7", "S_3", 0),
        },
    ),
    # The stream scales with both norms' parameters, and what it does to the third is exact too.
    # Shifts of two biases that meet in one sum are not followed.
    "stream": (
        Stream,
        LINEAR,
        {
            ("rescaling: a.0 -> a.1", "(R^*)^3", 3),
            ("rescaling: b.0 -> b.1", "(R^*)^3", 3),
            ("rescaling: a.1, b.1 -> top.0", "(R^*)^3", 3),
            ("permutation: a.0, a.1, b.0, b.1 and 1 more -> out", "S_3", 0),
        },
    ),
    # Without a weight of its own nothing takes the scale back; statistics differ by channel.
    "no affine": (
        lambda: with_statistics(
            nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Tanh(), nn.Linear(3, 1)
        ),
        LINEAR,
        set(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_list_written_out_by_hand(case: str) -> None:
    build, inputs, expected = CASES[case]
    assert {(g.name, g.group, g.dimension) for g in gauge.find(build(), inputs)} == expected


@pytest.mark.parametrize("case", CASES)
def test_action_outputs_and_exact_fisher(case: str) -> None:
    build, inputs, _ = CASES[case]
    model, inputs = build().double().eval(), inputs.double()
    state = {k: v.detach() + 0.3 * torch.randn_like(v) for k, v in model.named_parameters()}
    before = functional_call(model, state, inputs)
    jacobian = jacrev(lambda s: functional_call(model, s, inputs))(state)
    scale = max(float(j.abs().max()) for j in jacobian.values())
    for g in gauge.find(model, inputs):
        one, two = g.random_element(), g.random_element()
        moved = g.act(state, one)
        assert {k for k in state if not torch.equal(moved[k], state[k])} == set(g.parameters)
        change = functional_call(model, moved, inputs) - before
        assert change.abs().max() <= 1e-11 * before.abs().max()
        both, once = g.act(moved, two), g.act(state, g.compose(one, two))
        assert all(torch.allclose(both[k], once[k], rtol=1e-11, atol=1e-12) for k in state)
        same = g.act(state, g.identity())
        assert all(torch.allclose(same[k], state[k], rtol=1e-13, atol=1e-14) for k in state)
        # J t = 0 for every tangent: the null space of the exact Fisher J^T H J, whatever H.
        tangents = g.tangents(state)
        pushed = sum(
            torch.einsum("nop,qp->nqo", jacobian[k].flatten(2), t.reshape(g.dimension, -1))
            for k, t in tangents.items()
            if g.dimension
        )
        assert g.dimension == 0 or float(pushed.abs().max()) <= 1e-11 * scale
        # ... and tangents are derivatives of the action.
        if g.dimension:
            x, t = torch.randn(g.algebra_shape, dtype=torch.float64), 1e-5
            ahead, behind = g.curve(state, x, t), g.curve(state, x, -t)
            for k, v in g.velocity(state, x).items():
                assert torch.allclose((ahead[k] - behind[k]) / (2 * t), v, rtol=1e-7, atol=1e-8)


def test_closed_form() -> None:
    """W -> cW, b -> cb, gamma -> gamma/c, beta -> beta + gamma mu (1/c - 1) / sqrt(var + eps)."""
    norm = nn.BatchNorm1d(3, eps=1e-3)
    model = with_statistics(nn.Linear(4, 3), norm, nn.Tanh(), nn.Linear(3, 2)).double()
    state = {k: v.detach() + 0.3 for k, v in model.named_parameters()}
    g = next(g for g in gauge.find(model) if g.name == "rescaling: 0 -> 1")
    c = torch.tensor([2.0, -0.5, 3.0], dtype=torch.float64)
    moved = g.act(state, c)
    assert norm.running_mean is not None and norm.running_var is not None
    mu, sd = norm.running_mean, (norm.running_var + 1e-3).sqrt()
    gamma, beta = state["1.weight"], state["1.bias"]
    assert torch.allclose(moved["0.weight"], c[:, None] * state["0.weight"], rtol=1e-14)
    assert torch.allclose(moved["0.bias"], c * state["0.bias"], rtol=1e-14)
    assert torch.allclose(moved["1.weight"], gamma / c, rtol=1e-14)
    assert torch.allclose(moved["1.bias"], beta + gamma * mu * (1 / c - 1) / sd, rtol=1e-12)
    shift = next(g for g in gauge.find(model) if g.name == "translation: 0.bias -> 1.bias")
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = shift.act(state, v)
    assert torch.allclose(moved["0.bias"], state["0.bias"] + v, rtol=1e-14)
    assert torch.allclose(moved["1.bias"], beta - gamma * v / sd, rtol=1e-12)


def test_not_a_symmetry_in_training_mode() -> None:
    """Batch statistics take the scale out themselves, but for epsilon, and gamma/c adds it."""
    model = with_statistics(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    g = next(g for g in gauge.find(model, x) if g.name == "rescaling: 0 -> 1")
    model.train()
    state = {k: v.detach().clone() for k, v in model.named_parameters()}
    moved = g.act(state, torch.full((3,), 2.0, dtype=torch.float64))
    change = functional_call(model, moved, x) - functional_call(model, state, x)
    assert change.abs().max() > 1e-2


def test_statistics_stay_where_they_are() -> None:
    model = with_statistics(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    before = {k: v.clone() for k, v in model.named_buffers()}
    assert gauge.find(model)
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())


def test_instance_norm_does_not_see_a_bias() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)
    )
    found = {(g.name, g.dimension) for g in gauge.find(model, torch.randn(3, 1, 4, 4))}
    assert found == {("translation: 0.bias -> mean", 2), ("permutation: 0 -> 4", 0)}
