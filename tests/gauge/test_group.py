"""The action is a group action, leaves the law unchanged, and its tangents are its derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from deaddir_fast import gauge
from gauge.models import (
    Attention,
    Gated,
    Residual,
    Rotary,
    Shared,
    TiedHead,
    conv_net,
    mlp,
    normed,
)

MODELS = {
    "mlp": (mlp, (6, 4)),
    "conv": (conv_net, (3, 1, 8, 8)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 3)), (6, 4)),
    "gated": (Gated, (6, 4)),
    "narrow": (
        lambda: nn.Sequential(nn.Conv2d(1, 1, 2), nn.Flatten(), nn.Linear(4, 1), nn.Linear(1, 2)),
        (6, 1, 3, 3),
    ),
    "norms": (normed, (6, 4)),
    "residual": (lambda: Residual(embed=True), (6, 4)),
    "shared": (Shared, (6, 4)),
    "tied": (lambda: TiedHead(F.relu), None),
    "attention": (Attention, (4, 3, 6)),
    "rotary": (Rotary, (4, 5, 6)),
    "rotary pairs": (lambda: Rotary(rotary=2, neighbours=True), (4, 5, 6)),
}


def case(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor], list[gauge.Gauge]]:
    build, shape = MODELS[name]
    model = build().double().eval()
    inputs = torch.randint(7, (4, 5)) if shape is None else torch.randn(shape).double()
    # Off the initial zeros and ones of norms and attention biases, which some actions fix.
    state = {k: v.detach() + 0.2 * torch.randn_like(v) for k, v in model.named_parameters()}
    found = gauge.find(model, inputs)
    assert found
    return model, inputs, state, found


def close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-12) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[k], b[k], rtol=rtol, atol=rtol * float(a[k].abs().max())) for k in a
    )


@pytest.mark.parametrize("name", MODELS)
def test_group_action(name: str) -> None:
    model, inputs, state, found = case(name)
    draw = torch.Generator().manual_seed(3)
    before = functional_call(model, state, inputs)
    for g in found:
        first, second = g.random_element(draw), g.random_element(draw)
        copies = {k: v.clone() for k, v in state.items()}
        moved = g.act(state, first)
        assert all(torch.equal(copies[k], v) for k, v in state.items())
        assert moved.keys() == state.keys()
        assert {k for k in state if not torch.equal(moved[k], state[k])} == set(g.parameters)
        assert close(g.act(state, g.identity()), state)
        assert close(g.act(moved, second), g.act(state, g.compose(first, second)))
        change = functional_call(model, moved, inputs) - before
        if g.likelihood == "categorical":
            assert change.abs().max() > 1e-3
            change = change - change.mean(-1, keepdim=True)
        assert change.abs().max() <= 1e-11 * before.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_curves_are_one_parameter_subgroups_with_the_stated_tangents(name: str) -> None:
    _, _, state, found = case(name)
    draw = torch.Generator().manual_seed(3)
    for g in found:
        x = torch.randn(g.algebra_shape, dtype=torch.float64, generator=draw)
        assert close(g.curve(g.curve(state, x, 0.3), x, 0.4), g.curve(state, x, 0.7))
        _, derivative = torch.func.jvp(
            lambda t, g=g, x=x: {
                k: v for k, v in g.curve(state, x, t).items() if k in g.parameters
            },
            (torch.zeros((), dtype=torch.float64),),
            (torch.ones((), dtype=torch.float64),),
        )
        tangents = g.tangents(state)
        assert set(tangents) == set(g.parameters)
        for k, rate in derivative.items():
            assert tangents[k].shape == (g.dimension, *state[k].shape)
            combined = torch.tensordot(x.reshape(-1), tangents[k], 1)
            assert torch.allclose(combined, rate, rtol=1e-12, atol=1e-13)


def test_explicit_relu_action() -> None:
    _, _, state, found = case("mlp")
    scales = torch.tensor([2.0, 1.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    moved = found[0].act(state, scales)
    assert torch.equal(moved["0.weight"], scales[:, None] * state["0.weight"])
    assert torch.equal(moved["0.bias"], scales * state["0.bias"])
    assert torch.equal(moved["3.weight"], state["3.weight"] / scales)
    assert moved["5.weight"] is state["5.weight"]
    tangent = found[0].tangents(state)
    expected = torch.zeros(5, 5, 4, dtype=torch.float64)
    for j in range(5):
        expected[j, j] = state["0.weight"][j]
    assert torch.equal(tangent["0.weight"], expected)


def test_explicit_linear_action() -> None:
    _, _, state, found = case("linear")
    c = found[0].random_element(torch.Generator().manual_seed(0))
    moved = found[0].act(state, c)
    assert torch.allclose(moved["0.weight"], c[0] @ state["0.weight"], rtol=1e-13)
    assert torch.allclose(moved["0.bias"], c[0] @ state["0.bias"], rtol=1e-13)
    assert torch.allclose(moved["1.weight"], state["1.weight"] @ torch.linalg.inv(c[0]), rtol=1e-12)


def test_elements_outside_the_group_are_refused() -> None:
    _, _, state, found = case("mlp")
    bad = found[0].identity()
    bad[2] = -1
    with pytest.raises(ValueError, match="element: expected finite positive scales"):
        found[0].act(state, bad)
    with pytest.raises(ValueError, match=r"element: expected shape \(5,\)"):
        found[0].act(state, torch.ones(4))
    with pytest.raises(ValueError, match=r"state: no parameter called '0\.weight'"):
        found[0].tangents({})
    _, _, state, found = case("linear")
    with pytest.raises(ValueError, match="element: expected invertible blocks"):
        found[0].act(state, torch.zeros(1, 3, 3))
    _, _, state, found = case("gated")
    zero = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(ValueError, match="element: expected finite non-zero scales"):
        found[0].act(state, zero)
    assert found[0].act(state, zero - 1)["up.weight"].equal(-state["up.weight"])


def test_complex_elements() -> None:
    _, _, state, found = case("rotary")
    turn = found[0]
    assert isinstance(turn, gauge.ComplexRescaling) and turn.shape == (2, 2)
    i = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(turn.compose(i, i)[0], torch.tensor([-1.0, 0.0]).double())
    quarter = torch.tensor([[0.0, torch.pi / 2], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(turn.exp(quarter), i, atol=1e-15)
    moved = turn.act(state, i)
    # Units 0 and 2 of both query heads, and of the key, turn by the same angle.
    for name, w in state.items():
        if name[0] in "qk":
            turned = [k for k in range(len(w)) if not torch.allclose(moved[name][k], w[k])]
            assert turned == ([0, 2, 4, 6] if name[0] == "q" else [0, 2])
            for real in turned[::2]:
                assert torch.allclose(moved[name][real], -w[real + 2])
                assert torch.allclose(moved[name][real + 2], w[real])
    with pytest.raises(ValueError, match="element: expected finite non-zero complex numbers"):
        turn.act(state, torch.zeros(2, 2))


def test_state_dtype_is_kept() -> None:
    model = mlp()
    state = {k: v.detach() for k, v in model.named_parameters()}
    for g in gauge.find(model):
        moved = g.act(state, g.random_element())
        assert all(v.dtype == torch.float32 for v in moved.values())
        assert all(v.dtype == torch.float32 for v in g.tangents(state).values())
