"""Shifts of all features alike that a mean or a softmax takes away, and of all class biases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from deaddir_fast import gauge


@pytest.fixture(autouse=True)
def no_claim_is_dropped() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Block(nn.Module):
    """Tokens and positions, one MLP block, a norm on the stream, a head.

    ``post``: the norm comes after the sum, and its output is the stream that goes on.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        tied: bool = False,
        leak: bool = False,
        post: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.places = nn.Embedding(5, 4)
        self.inner = norm(4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)
        self.outer = norm(4)
        self.head = nn.Linear(4, 7, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight
        self.leak, self.post = leak, post

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        if self.post:
            x = self.inner(x)
            x = self.outer(x + self.down(F.gelu(self.up(x))))
        else:
            x = x + self.down(F.gelu(self.up(self.inner(x))))
            x = self.outer(x) + torch.tanh(x) if self.leak else self.outer(x)
        return self.head(torch.tanh(x))


class Patches(nn.Module):
    """A convolution, a class token and a table of positions in front of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 5, 4))
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], 1, 4), x], 1) + self.places
        return self.out(torch.tanh(self.norm(x)))


class Routed(nn.Module):
    """A softmax over three experts, each a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("nd,edo->neo", x, self.experts))
        return torch.einsum("neo,ne->no", hidden, self.router(x).softmax(-1))


IDS = torch.randint(7, (6, 5))
WRITERS = {
    ("translation: tokens -> mean of LayerNorm", 7),
    ("translation: places -> mean of LayerNorm", 5),
    ("translation: down -> mean of LayerNorm", 7),
}
# Written out by hand: what is claimed about means, softmaxes and classes.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, set[tuple[str, int]]]] = {
    "pre-norm": (Block, IDS, WRITERS | {("class shift: head", 4)}),
    # The table of tokens is the head as well, which sees its rows.
    "tied": (lambda: Block(tied=True), IDS, {w for w in WRITERS if "tokens" not in w[0]}),
    "tied with a bias": (
        lambda: Block(tied=True, bias=True),
        IDS,
        {w for w in WRITERS if "tokens" not in w[0]} | {("class shift: head", 1)},
    ),
    # Sums go into norms only, but what leaves the norms goes on elsewhere too.
    "post-norm": (lambda: Block(post=True), IDS, WRITERS | {("class shift: head", 4)}),
    "rms norm": (lambda: Block(nn.RMSNorm), IDS, {("class shift: head", 4)}),
    "another reader": (lambda: Block(leak=True), IDS, {("class shift: head", 4)}),
    "patches": (
        Patches,
        torch.randn(6, 2, 4, 4),
        {
            ("translation: patch -> mean of LayerNorm", 9),
            ("translation: token -> mean of LayerNorm", 1),
            ("translation: places -> mean of LayerNorm", 5),
        },
    ),
    "router": (
        Routed,
        torch.randn(6, 4),
        {("translation: router -> softmax", 5)},
    ),
    # Probabilities as outputs: exact whatever the likelihood.
    "softmax output": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)),
        torch.randn(6, 4),
        {("translation: 0 -> softmax", 5)},
    ),
    # One group of channels is no single feature axis; a mean over space does not centre features.
    "pooled": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Tanh()),
        torch.randn(6, 2, 4),
        set(),
    ),
}


def claims(model: nn.Module, inputs: Any) -> list[gauge.Gauge]:
    return [g for g in gauge.find(model, inputs) if isinstance(g, gauge.ClassShift)]


@pytest.mark.parametrize("case", CASES)
def test_list_written_out_by_hand(case: str) -> None:
    build, inputs, expected = CASES[case]
    found = claims(build(), inputs)
    assert {(g.name, g.dimension) for g in found} == expected
    assert all(g.group == f"R^{g.dimension}" for g in found)
    assert all((g.likelihood == "categorical") == g.name.startswith("class") for g in found)


@pytest.mark.parametrize("case", [k for k, c in CASES.items() if c[2]])
def test_outputs_and_exact_fisher(case: str) -> None:
    build, inputs, _ = CASES[case]
    model = build().double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    state = {k: v.detach() + 0.3 * torch.randn_like(v) for k, v in model.named_parameters()}
    before = functional_call(model, state, inputs)
    jacobian = jacrev(lambda s: functional_call(model, s, inputs))(state)
    scale = max(float(j.abs().max()) for j in jacobian.values())
    for g in claims(model, inputs):
        one, two = g.random_element(), g.random_element()
        moved = g.act(state, one)
        assert {k for k in state if not torch.equal(moved[k], state[k])} == set(g.parameters)
        both, once = g.act(moved, two), g.act(state, g.compose(one, two))
        assert all(torch.allclose(both[k], once[k], rtol=1e-12, atol=1e-12) for k in state)
        change = functional_call(model, moved, inputs) - before
        pushed = sum(
            torch.einsum(
                "...p,qp->...q",
                jacobian[k].reshape(*before.shape, -1),
                t.reshape(g.dimension, -1),
            )
            for k, t in g.tangents(state).items()
        )
        assert isinstance(pushed, Tensor)
        if g.likelihood == "categorical":  # F sees the part that is not constant over classes
            change = change - change.mean(-1, keepdim=True)
            pushed = pushed - pushed.mean(-2, keepdim=True)
        assert change.abs().max() <= 1e-11 * before.abs().max()
        assert pushed.abs().max() <= 1e-11 * scale


def test_explicit_action() -> None:
    model = Block().double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    g = next(g for g in claims(model, IDS) if "down" in g.name)
    v = torch.arange(1.0, 8.0, dtype=torch.float64)
    moved = g.act(state, v)
    assert torch.allclose(moved["down.weight"], state["down.weight"] + v[:6], rtol=1e-14)
    assert torch.allclose(moved["down.bias"], state["down.bias"] + 7.0, rtol=1e-14)
