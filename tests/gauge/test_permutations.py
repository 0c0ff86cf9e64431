"""Permutations: lists by hand, the laws of the group, every transposition, and what is not one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import deaddir_fast as dd
from deaddir_fast import gauge
from deaddir_fast.gauge import spaces
from deaddir_fast.gauge.rescaling import Slot
from deaddir_fast.gauge.spaces import Space
from deaddir_fast.gauge.verify import Verifier
from gauge.models import Attention, Gated, Residual, conv_net, mlp, with_statistics


@pytest.fixture(autouse=True)
def no_claim_is_dropped() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Recurrent(nn.Module):
    """One recurrent layer and a readout of every step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(3, 4, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0])


class Attending(nn.Module):
    """Four query heads of width 3 share two heads of keys and values, behind an RMS norm."""

    def __init__(self, rotate: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.RMSNorm(6)
        self.q = nn.Linear(6, 12, bias=False)
        self.k = nn.Linear(6, 6, bias=False)
        self.v = nn.Linear(6, 6, bias=False)
        self.o = nn.Linear(12, 6, bias=False)
        self.head = nn.Linear(6, 2)
        self.rotate = rotate

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm(x)
        b, t, _ = x.shape
        q = self.q(y).view(b, t, 4, 3).transpose(1, 2)
        k, v = (m(y).view(b, t, 2, 3).transpose(1, 2) for m in (self.k, self.v))
        k, v = (z[:, :, None].expand(b, 2, 2, t, 3).reshape(b, 4, t, 3) for z in (k, v))
        if self.rotate:  # features told apart, each with its own frequency
            angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.5, 0.1])
            q, k = q * angle.cos(), k * angle.cos()
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.head(torch.tanh(x + self.o(mixed.transpose(1, 2).reshape(b, t, 12))))


class Kernelised(nn.Module):
    """Attention with a feature map: no linear group, so that features of a head permute."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 6)
        self.k = nn.Linear(4, 6)
        self.v = nn.Linear(4, 6)
        self.o = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, 2, 3).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = F.softplus(q) @ F.softplus(k).transpose(-1, -2)
        mixed = weights @ torch.tanh(v) / weights.sum(-1, keepdim=True)
        return self.o(mixed.transpose(1, 2).reshape(b, t, 6))


class Dense(nn.Module):
    """Two layers of features side by side, read as one (as in a DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 2, 3, padding=1)
        self.c = nn.Conv2d(5, 4, 1)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.cat([x, torch.tanh(self.b(x))], 1)
        return self.out(torch.tanh(self.c(x)).mean((2, 3)))


class Fused(nn.Module):
    """Gate and values come out of one map."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 10)
        self.down = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Mixture(nn.Module):
    """A softmax mixture of three experts held in stacked matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(3, 4, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("nd,edh->neh", x, self.up))
        return torch.einsum("neh,eho,ne->no", hidden, self.down, self.router(x).softmax(-1))


class Positions(nn.Module):
    """A table of positions longer than the input, read by slicing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x + self.table[: x.shape[1]]))


class Ordered(nn.Module):
    """Hidden units met by something that depends on their order."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)
        self.how = how
        self.register_buffer("weights", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x))
        if self.how == "cumulative":
            h = h.cumsum(-1)
        elif self.how == "constant":
            h = h * self.weights
        elif self.how == "neighbours":
            h = h + h.roll(1, -1)
        elif self.how == "largest":
            h = h * h.argmax(-1, keepdim=True)
        elif self.how == "one unit":
            h = h + h[..., :1]
        elif self.how == "halves":
            h = torch.cat([h[..., :2] * 2, h[..., 2:]], -1)
        return self.out(h)


TOKENS = torch.randint(9, (3, 5))
# Written out by hand: name and group of every permutation there is.
CASES: dict[str, tuple[Any, Any, set[tuple[str, str]]]] = {
    "tanh": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
        torch.randn(3, 4),
        {("0 -> 2", "S_5")},
    ),
    # Channels flattened into a linear map: blocks of 3 x 3 columns.
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 2)
        ),
        torch.randn(3, 1, 8, 8),
        {("0 -> 4", "S_3")},
    ),
    # Depthwise channels are one space from the first to the last map.
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.Conv2d(3, 6, 3, groups=3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(96, 2),
        ),
        torch.randn(3, 1, 8, 8),
        # Each channel makes two, which change places within their channel.
        {("0, 1 -> 1, 4", "S_3"), ("1 -> 4", "S_2^3")},
    ),
    # Two groups of two channels each: groups change places; channels inside do so alike, in
    # both groups, for their maps are stacked along the other axis of the kernel.
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.Tanh(),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(96, 2),
        ),
        torch.randn(3, 1, 8, 8),
        {("0, 2 -> 2, 5", "S_2"), ("0 -> 2", "S_2"), ("2 -> 5", "S_3^2")},
    ),
    "batch norm": (
        lambda: with_statistics(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)
        ),
        torch.randn(3, 2, 8),
        {("0, 1 -> 4", "S_4")},
    ),
    "attention": (Attention, torch.randn(3, 4, 6), {("mha -> mha.out_proj", "S_2")}),
    # GL(3) of each key head holds the permutations of its features.
    "grouped queries": (
        lambda: Attending(rotate=False),
        TOKENS,
        {
            ("embed, norm, o -> q, k, v, head", "S_6"),
            ("q, k, v -> o", "S_2"),
            ("q -> o", "S_2^2"),
        },
    ),
    "grouped queries, rotated": (
        lambda: Attending(rotate=True),
        TOKENS,
        {
            ("embed, norm, o -> q, k, v, head", "S_6"),
            ("q, k, v -> o", "S_2"),
            ("q -> o", "S_2^2"),
        },
    ),
    "feature maps": (
        Kernelised,
        torch.randn(3, 4, 4),
        {("q, k, v -> o", "S_2"), ("q, k", "S_3^2"), ("v -> o", "S_3^2")},
    ),
    "side by side": (
        Dense,
        torch.randn(3, 1, 5, 5),
        {("a -> b, c", "S_3"), ("b -> c", "S_2"), ("c -> out", "S_4")},
    ),
    "fused gate": (Fused, torch.randn(3, 4), {("up -> down", "S_5")}),
    "recurrent": (lambda: Recurrent(nn.RNN), torch.randn(3, 3, 3), {("cell -> cell, out", "S_4")}),
    "lstm": (lambda: Recurrent(nn.LSTM), torch.randn(3, 3, 3), {("cell -> cell, out", "S_4")}),
    "gru": (lambda: Recurrent(nn.GRU), torch.randn(3, 3, 3), {("cell -> cell, out", "S_4")}),
    "experts": (
        Mixture,
        torch.randn(3, 4),
        {("up, down, router", "S_3"), ("up -> down", "S_5")},
    ),
    # The input is added to the stream: its features are fixed. Rows beyond the input are idle.
    "positions": (Positions, torch.randn(3, 5, 4), set()),
    **{
        how: (lambda how=how: Ordered(how), torch.randn(3, 4), set())
        for how in ("cumulative", "constant", "neighbours", "largest")
    },
    # The others may still change places.
    "one unit": (lambda: Ordered("one unit"), torch.randn(3, 4), {("fc -> out", "S_5")}),
    "halves": (
        lambda: Ordered("halves"),
        torch.randn(3, 4),
        {("fc -> out", "S_2"), ("fc -> out", "S_4")},
    ),
}


def permutations(model: nn.Module, inputs: Any) -> list[gauge.Permutation]:
    return [g for g in gauge.find(model, inputs) if isinstance(g, gauge.Permutation)]


@pytest.mark.parametrize("case", CASES)
def test_list_written_out_by_hand(case: str) -> None:
    build, inputs, expected = CASES[case]
    found = permutations(build(), inputs)
    assert {(g.name.removeprefix("permutation: "), g.group) for g in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("case", [k for k, c in CASES.items() if c[2]])
def test_every_transposition_leaves_the_outputs_alone(case: str) -> None:
    build, inputs, _ = CASES[case]
    model = build().double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    state = {k: v.detach() + 0.3 * torch.randn_like(v) for k, v in model.named_parameters()}
    before = functional_call(model, state, inputs)
    for g in permutations(model, inputs):
        h = g.shape[-1]
        for place, (i, j) in itertools.product(
            range(g.identity().numel() // h), itertools.combinations(range(h), 2)
        ):
            swap = g.identity().reshape(-1, h)
            swap[place, [i, j]] = swap[place, [j, i]]
            swap = swap.reshape(g.shape)
            moved = g.act(state, swap)
            assert any(not torch.equal(moved[k], state[k]) for k in state)
            change = functional_call(model, moved, inputs) - before
            assert change.abs().max() <= 1e-12 * before.abs().max()


def test_explicit_action() -> None:
    model = mlp().double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    g = permutations(model, None)[0]
    order = torch.tensor([2, 0, 1, 4, 3])
    moved = g.act(state, order)
    assert torch.equal(moved["0.weight"], state["0.weight"][order])
    assert torch.equal(moved["0.bias"], state["0.bias"][order])
    assert torch.equal(moved["3.weight"], state["3.weight"][:, order])
    assert moved["3.bias"] is state["3.bias"]


@given(st.permutations(range(5)), st.permutations(range(5)))
@settings(max_examples=25, deadline=None)
def test_laws_of_the_group(first: list[int], second: list[int]) -> None:
    model = mlp().double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    g = permutations(model, None)[0]
    one, two = torch.tensor(first), torch.tensor(second)
    both = g.act(g.act(state, one), two)
    once = g.act(state, g.compose(one, two))
    assert all(torch.equal(both[k], once[k]) for k in state)
    assert torch.equal(g.compose(one, one.argsort()), g.identity())
    assert all(torch.equal(v, state[k]) for k, v in g.act(state, g.identity()).items())


def test_a_finite_group_has_no_tangents() -> None:
    model = mlp().double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    g = permutations(model, None)[0]
    assert g.dimension == 0 and g.algebra_shape == (0,)
    zero = torch.zeros(0, dtype=torch.float64)
    assert {k: v.shape for k, v in g.tangents(state).items()} == {
        "0.weight": (0, 5, 4),
        "0.bias": (0, 5),
        "3.weight": (0, 3, 5),
    }
    assert all(not v.any() for v in g.velocity(state, zero).values())
    assert torch.equal(g.exp(zero), g.identity())
    assert all(torch.equal(v, state[k]) for k, v in g.curve(state, zero, 0.7).items())
    basis, rank = gauge.orthonormal_tangents([g], state)
    assert rank == 0 and basis["0.weight"].shape == (0, 5, 4)
    only = {"0.weight": torch.randn(2, 5, 4, dtype=torch.float64)}
    assert torch.equal(gauge.project_out(only, [g], state)["0.weight"], only["0.weight"])


def test_random_elements_move_every_unit() -> None:
    g = permutations(Attending(rotate=False), TOKENS)[-1]
    for _ in range(20):
        element = g.random_element()
        assert element.shape == g.shape and bool((element != g.identity()).all())


def test_elements_outside_the_group_are_refused() -> None:
    model = mlp()
    state = {k: v.detach() for k, v in model.named_parameters()}
    g = permutations(model, None)[0]
    with pytest.raises(TypeError, match=r"element: expected a torch\.int64 tensor"):
        g.act(state, torch.ones(5))
    with pytest.raises(ValueError, match=r"element: expected shape \(5,\)"):
        g.act(state, torch.arange(4))
    with pytest.raises(ValueError, match="element: expected permutations"):
        g.act(state, torch.tensor([0, 1, 1, 3, 4]))
    with pytest.raises(ValueError, match=r"algebra: expected shape \(0,\)"):
        g.exp(torch.zeros(5))


def test_permutations_inside_a_linear_group_are_not_repeated() -> None:
    linear = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False), nn.Linear(2, 3))
    assert not permutations(linear, None)
    assert not permutations(Residual(embed=True), None)[1:]  # fc1 alone, the stream is linear
    # A diagonal group next to it does not hold them.
    assert [g.group for g in permutations(Gated(), None)] == ["S_6"]


def test_a_false_permutation_is_dropped_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is made even when many are checked at once."""
    model = mlp()
    found = permutations(model, None)
    good = found[0]
    false = gauge.Permutation(
        good.name, good.group, good.parameters, good.shape, None, good.slots[:1]
    )
    monkeypatch.setattr("deaddir_fast.gauge.discover.permutations", lambda *_: [false, *found])
    with pytest.warns(UserWarning, match=r"permutation: 0 -> 3 .* dropped: a random element"):
        assert permutations(model, None) == found


def test_two_errors_that_undo_each_other_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers and readers permuted by two claims: right together, wrong apart."""
    model = mlp()
    good = permutations(model, None)[0]

    class Cycle(gauge.Permutation):
        def random_element(self, generator: torch.Generator | None = None) -> Tensor:
            return torch.arange(5).roll(1)

    halves = [
        Cycle(good.name, good.group, good.parameters, good.shape, None, slots)
        for slots in (good.slots[:2], good.slots[2:])
    ]
    monkeypatch.setattr("deaddir_fast.gauge.discover.permutations", lambda *_: halves)
    with pytest.warns(UserWarning, match="dropped"):
        assert not permutations(model, None)


def test_readings_work_beside_finite_groups() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(20, 2, dtype=torch.float64)
    assert [g.group for g in gauge.find(model, x)] == ["S_3"]
    triple = dd.read_triple(model, x, likelihood="gaussian")
    # A generic point: all 13 parameters are live.
    assert (triple.rlct, triple.multiplicity) == (Fraction(13, 2), 1)
    dead = dd.dead_directions(model, x, likelihood="gaussian")
    assert dead.rank == 13 and not dead.kinds


def test_model_with_narrowing_casts_is_checked_in_full_precision() -> None:
    """Summing in another order inside an fp32 norm moves the outputs by 1e-7."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 64)
            self.out = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            wide = h.float()
            return self.out((wide * wide.square().mean(-1, keepdim=True).rsqrt()).to(h.dtype))

    found = permutations(Cast().double(), torch.randn(3, 4, dtype=torch.float64))
    assert [g.group for g in found] == ["S_64"]


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_unified_axes_have_the_same_coordinates(a: list[int], b: list[int]) -> None:
    """After unifying two factorings of one axis, free leaves sit at the same places of both."""
    left, right = [Space(n) for n in a], [Space(n) for n in b]
    if spaces.size(left) != spaces.size(right):
        left.append(Space(spaces.size(right)))
        right.insert(0, Space(spaces.size(left[:-1])))
    spaces.unify(left, right)
    one, two = spaces.coordinates(left), spaces.coordinates(right)
    for leaf in set(one) | set(two):
        if not leaf.fixed and leaf.size > 1:
            x, y = one[leaf], two[leaf]
            assert (x is None) == (y is None)
            assert x is None or y is None or (x == y).all()


@pytest.mark.parametrize("build", [conv_net])
def test_convolutions_with_batch_norm_keep_their_outputs(build: Any) -> None:
    model = build().double().eval()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    state = {k: v.detach() + 0.2 * torch.randn_like(v) for k, v in model.named_parameters()}
    before = functional_call(model, state, x)
    groups = []
    for g in permutations(model, x):
        groups.append(g.group)
        after = functional_call(model, g.act(state, g.random_element()), x)
        assert (after - before).abs().max() <= 1e-12 * before.abs().max()
    assert groups == ["S_3", "S_4"]


def test_false_swaps_that_undo_each_other_are_told_apart() -> None:
    """Rows of one layer and columns of the next swap together only."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    at = torch.arange(2)[:, None]

    def swap(*slots: Slot) -> gauge.Permutation:
        names = tuple(s.parameter for s in slots)
        return gauge.Permutation("swap", "S_2", names, (2,), None, slots)

    writers = swap(Slot("0.weight", 0, at, 2, 1), Slot("0.bias", 0, at, 2, 1))
    readers = swap(Slot("2.weight", 1, at, 2, -1))
    verifier = Verifier(model, torch.randn(8, 3))
    assert None not in verifier.objections([writers, readers])
    assert verifier.objections([swap(*writers.slots, *readers.slots)]) == [None]
