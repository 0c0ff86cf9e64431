"""Discovery: the lists are written out by hand from the architectures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deaddir_fast import gauge
from deaddir_fast.gauge.discover import verified
from deaddir_fast.gauge.verify import Verifier
from gauge.models import (
    Attention,
    Gated,
    Residual,
    Rotary,
    Shared,
    TiedHead,
    TwoReaders,
    conv_net,
    deep_linear,
    mlp,
    normed,
)


@pytest.fixture(autouse=True)
def no_claim_is_dropped() -> Iterator[None]:
    """The rules themselves should be right; the numerical check is the second line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def listing(model: nn.Module, inputs: Any = None) -> set[tuple[str, str, int]]:
    return {(g.name, g.group, g.dimension) for g in gauge.find(model, inputs)}


def tokens(n: int, t: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (n, t))


CASES: dict[str, tuple[Any, Any, set[tuple[str, str, int]]]] = {
    "mlp": (
        mlp,
        None,
        {
            ("rescaling: 0 -> 3", "(R_>0)^5", 5),
            ("rescaling: 3 -> 5", "(R_>0)^3", 3),
            ("class shift: 5", "R^4", 4),
            ("permutation: 0 -> 3", "S_5", 0),
            ("permutation: 3 -> 5", "S_3", 0),
        },
    ),
    "one output": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)),
        None,
        {
            ("rescaling: 0 -> 2", "(R_>0)^5", 5),
            ("permutation: 0 -> 2", "S_5", 0),
        },
    ),
    "width one": (
        lambda: nn.Sequential(
            nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)
        ),
        None,
        {
            ("rescaling: 0 -> 2", "(R_>0)^1", 1),
            ("rescaling: 2 -> 4", "(R_>0)^2", 2),
            ("permutation: 2 -> 4", "S_2", 0),
        },
    ),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 2, bias=False)),
        None,
        {
            ("rescaling: 0 -> 2", "(R_>0)^5", 5),
            ("class shift: 2", "R^5", 5),
            ("permutation: 0, 1 -> 2", "S_5", 0),
        },
    ),
    "squared relu": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Square(), nn.Linear(5, 2, bias=False)),
        None,
        {
            ("rescaling: 0 -> 3", "(R_>0)^5", 5),
            ("class shift: 3", "R^5", 5),
            ("permutation: 0 -> 3", "S_5", 0),
        },
    ),
    "gelu": (
        lambda: mlp(nn.GELU()),
        None,
        {
            ("rescaling: 3 -> 5", "(R_>0)^3", 3),
            ("class shift: 5", "R^4", 4),
            ("permutation: 0 -> 3", "S_5", 0),
            ("permutation: 3 -> 5", "S_3", 0),
        },
    ),
    "tanh": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)),
        None,
        {
            ("permutation: 0 -> 2", "S_5", 0),
        },
    ),
    "relu6": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU6(), nn.Linear(5, 1)),
        None,
        {
            ("permutation: 0 -> 2", "S_5", 0),
        },
    ),
    "conv": (
        conv_net,
        None,
        {
            ("rescaling: 0 -> 3", "(R_>0)^3", 3),
            ("rescaling: 4 -> 6", "(R_>0)^4", 4),
            ("rescaling: 6 -> 10", "(R_>0)^4", 4),
            ("class shift: 10", "R^17", 17),
            ("rescaling: 3 -> 4", "(R^*)^4", 4),
            ("permutation: 0 -> 3", "S_3", 0),
            ("permutation: 3, 4, 6 -> 6, 10", "S_4", 0),
        },
    ),
    "deep linear": (
        deep_linear,
        None,
        {
            ("general linear: 0 -> 1", "GL(3)", 9),
            ("general linear: 1 -> 2", "GL(2)", 4),
            ("class shift: 2", "R^2", 2),
        },
    ),
    "deep linear with biases": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)),
        None,
        {
            ("general linear: 0 -> 1", "GL(3)", 9),
            ("translation: 0.bias -> 1.bias", "R^3", 3),
        },
    ),
    "width one, linear": (
        lambda: nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3)),
        None,
        {
            ("rescaling: 0 -> 1", "(R^*)^1", 1),
            ("translation: 0.bias -> 1.bias", "R^1", 1),
            ("class shift: 1", "R^2", 2),
        },
    ),
    "linear convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 1)),
        torch.randn(2, 2, 8, 8),
        {
            ("general linear: 0 -> 3", "GL(3)", 9),
            ("translation: 0.bias -> 3.bias", "R^3", 3),
        },
    ),
    "swiglu": (
        Gated,
        None,
        {
            ("rescaling: up -> down", "(R^*)^6", 6),
            ("class shift: down", "R^7", 7),
            ("permutation: gate, up -> down", "S_6", 0),
        },
    ),
    "bilinear": (
        lambda: Gated(nn.Identity()),
        None,
        {
            ("rescaling: gate -> down", "(R^*)^6", 6),
            ("rescaling: up -> down", "(R^*)^6", 6),
            ("class shift: down", "R^7", 7),
            ("permutation: gate, up -> down", "S_6", 0),
        },
    ),
    "norms": (
        normed,
        None,
        {
            ("rescaling: 1 -> 2", "(R^*)^5", 5),
            ("rescaling: 4 -> 5", "(R^*)^3", 3),
            ("translation: 1.bias -> 2.bias", "R^5", 5),
            ("class shift: 5", "R^4", 4),
            ("translation: 0 -> mean of LayerNorm", "R^5", 5),
            ("permutation: 0, 1 -> 2", "S_5", 0),
            ("permutation: 2, 4 -> 5", "S_3", 0),
        },
    ),
    "residual from the input": (
        lambda: Residual(embed=False),
        None,
        {
            ("rescaling: fc1 -> fc2", "(R_>0)^6", 6),
            ("class shift: head", "R^5", 5),
            ("permutation: fc1 -> fc2", "S_6", 0),
        },
    ),
    # Every writer (embed, fc2) and every reader (fc1, head) of the stream is linear.
    "residual from a linear embedding": (
        lambda: Residual(embed=True),
        None,
        {
            ("general linear: embed, fc2 -> fc1, head", "GL(4)", 16),
            ("translation: embed.bias -> fc1.bias, head.bias", "R^4", 4),
            ("rescaling: fc1 -> fc2", "(R_>0)^6", 6),
            ("class shift: head", "R^5", 5),
            ("permutation: fc1 -> fc2", "S_6", 0),
        },
    ),
    "residual with a norm on the branch": (
        lambda: Residual(embed=True, norm=True),
        None,
        {
            ("rescaling: norm -> fc1", "(R^*)^4", 4),
            ("translation: norm.bias -> fc1.bias", "R^4", 4),
            ("rescaling: fc1 -> fc2", "(R_>0)^6", 6),
            ("class shift: head", "R^5", 5),
            ("permutation: embed, norm, fc2 -> fc1, head", "S_4", 0),
            ("permutation: fc1 -> fc2", "S_6", 0),
        },
    ),
    # Units of `middle` feed `middle` itself: one scale for both, read by `last`.
    "shared layer": (
        Shared,
        None,
        {
            ("rescaling: first, middle -> middle, last", "(R_>0)^5", 5),
            ("class shift: last", "R^6", 6),
            ("permutation: first, middle -> middle, last", "S_5", 0),
        },
    ),
    # embedding * c, columns of mix / c, rows of mix / c (read by the tied head * c).
    "tied head": (
        lambda: TiedHead(F.relu),
        tokens(3, 4, 7),
        {
            ("rescaling: embedding -> mix", "(R_>0)^4", 4),
            ("permutation: embedding, mix -> embedding, mix", "S_4", 0),
        },
    ),
    "tied head with gelu": (
        lambda: TiedHead(F.gelu),
        tokens(3, 4, 7),
        {
            ("permutation: embedding, mix -> embedding, mix", "S_4", 0),
        },
    ),
    # The constant over classes can be carried by either map, the bias only once.
    "two readers": (
        lambda: TwoReaders(spoil=False),
        None,
        {
            ("rescaling: fc -> left, right", "(R_>0)^5", 5),
            ("class shift: left", "R^5", 5),
            ("class shift: right", "R^6", 6),
            ("permutation: fc -> left, right", "S_5", 0),
        },
    ),
    "two readers and a sigmoid": (
        lambda: TwoReaders(spoil=True),
        None,
        {
            ("class shift: left", "R^5", 5),
            ("class shift: right", "R^6", 6),
            ("permutation: fc -> left, right", "S_5", 0),
        },
    ),
    "attention": (
        Attention,
        None,
        {
            ("general linear: mha -> mha", "GL(3)^2", 18),
            ("general linear: mha -> mha.out_proj", "GL(3)^2", 18),
            ("translation: mha.in_proj_bias -> softmax", "R^6", 6),
            ("translation: mha.in_proj_bias -> mha.out_proj.bias", "R^6", 6),
            ("class shift: mha.out_proj", "R^7", 7),
            ("permutation: mha -> mha.out_proj", "S_2", 0),
        },
    ),
    "rotary attention": (
        Rotary,
        torch.randn(3, 5, 6),
        {
            ("complex rescaling: q -> k", "(C^*)^2", 4),
            ("general linear: v -> o", "GL(4)", 16),
            ("translation: v.bias -> o.bias", "R^4", 4),
            ("class shift: o", "R^9", 9),
            # two query heads share the one key head
            ("permutation: q -> o", "S_2", 0),
        },
    ),
    # Two of four units turn; of the others the key bias is invisible.
    "partly rotary attention": (
        lambda: Rotary(rotary=2, neighbours=True),
        torch.randn(3, 5, 6),
        {
            ("complex rescaling: q -> k", "(C^*)^1", 2),
            ("general linear: q -> k", "GL(2)", 4),
            ("general linear: v -> o", "GL(4)", 16),
            ("translation: k.bias -> softmax", "R^2", 2),
            ("translation: v.bias -> o.bias", "R^4", 4),
            ("class shift: o", "R^9", 9),
            ("permutation: q -> o", "S_2", 0),
        },
    ),
    # No complex number commutes with these but the real ones.
    "boosted pairs": (
        lambda: Boosted(bias=False),
        torch.randn(3, 5, 6),
        {
            ("rescaling: q -> k", "(R^*)^2", 2),
            ("general linear: v -> o", "GL(4)", 16),
            ("class shift: o", "R^8", 8),
            ("permutation: q -> o", "S_2", 0),
        },
    ),
    "attention without biases": (
        lambda: Attention(bias=False),
        None,
        {
            ("general linear: mha -> mha", "GL(3)^2", 18),
            ("general linear: mha -> mha.out_proj", "GL(3)^2", 18),
            ("class shift: mha.out_proj", "R^6", 6),
            ("permutation: mha -> mha.out_proj", "S_2", 0),
        },
    ),
}


class Boosted(Rotary):
    """Pairs (c x + s y, s x + c y): split-complex numbers rather than complex ones."""

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([0.3, 0.2])
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + x.roll(2, -1) * sin


class Square(nn.Module):
    """Homogeneous of degree two, as in Primer's squared ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square()


@pytest.mark.parametrize("case", CASES)
def test_list_written_out_by_hand(case: str) -> None:
    build, inputs, expected = CASES[case]
    assert listing(build(), inputs) == expected


def test_squared_relu_reader_scales_by_the_inverse_square() -> None:
    model = CASES["squared relu"][0]().double()
    found = next(g for g in gauge.find(model) if g.likelihood is None)
    state = {k: v.detach() for k, v in model.named_parameters()}
    moved = found.act(state, torch.full((5,), 2.0, dtype=torch.float64))
    assert torch.equal(moved["0.weight"], 2 * state["0.weight"])
    assert torch.equal(moved["3.weight"], state["3.weight"] / 4)


def test_model_is_left_as_found() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    model.train()
    model[1].eval()
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    model[5].weight.grad = None
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    needed = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    assert gauge.find(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert fast == torch.backends.mha.get_fastpath_enabled()
    assert flags == [m.training for m in model.modules()]
    assert needed == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for old, p in zip(grads, model.parameters(), strict=True):
        assert (old is None) == (p.grad is None)
        assert old is None or torch.equal(old, p.grad)


def test_training_flags_survive_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="inputs: cannot make inputs up"):
        gauge.find(model)
    assert model.training and model[0].training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_are_made_up_in_the_parameters_dtype(dtype: torch.dtype) -> None:
    seen = []
    model = mlp().to(dtype)
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    gauge.find(model)
    assert seen[0] == dtype


def test_dictionary_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, *, features: torch.Tensor, scale: float) -> torch.Tensor:
            return self.body(features * scale)

    found = listing(Named(), {"features": torch.randn(3, 4), "scale": 2.0})
    assert ("rescaling: body.0 -> body.3", "(R_>0)^5", 5) in found


def test_zero_initialised_output_hides_nothing() -> None:
    """At W2 = 0 any change of W1 is invisible; only the symmetry of the architecture counts."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    nn.init.zeros_(model[2].weight)
    expected = {("class shift: 2", "R^6", 6), ("permutation: 0 -> 2", "S_5", 0)}
    assert listing(model) == expected


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        gauge.find(lambda x: x)  # type: ignore[arg-type]  # the wrong type is the point
    with pytest.raises(ValueError, match="inputs: cannot make inputs up"):
        gauge.find(Square())


def false_claim(positive: bool) -> gauge.Rescaling:
    """The rescaling of a ReLU network, as it would be claimed for another one."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    found = gauge.find(model)[0]
    assert isinstance(found, gauge.Rescaling)
    return gauge.Rescaling(
        found.name, found.group, found.parameters, found.shape, None, found.slots, positive
    )


@pytest.mark.parametrize("act", [nn.GELU(), nn.Softplus(), nn.Hardtanh(0.0, 0.1), nn.SELU()])
def test_false_claim_is_dropped_with_a_warning(act: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 2))
    verifier = Verifier(model, torch.randn(8, 4))
    with pytest.warns(UserWarning, match=r"rescaling: 0 -> 2 .* dropped: a random element"):
        assert verified(verifier, [(false_claim(True), None)]) == []


def test_negative_scales_through_a_relu_are_false() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    verifier = Verifier(model, torch.randn(8, 4))
    assert verifier.objection(false_claim(True)) is None
    assert verifier.objection(false_claim(False)) is not None


def test_scale_before_a_norm_with_small_epsilon_is_not_claimed() -> None:
    """Nearly invariant (the epsilon breaks it at 1e-5) is not a symmetry."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, elementwise_affine=False))
    assert listing(model) == {("translation: 0 -> mean of LayerNorm", "R^5", 5)}


def test_scale_before_a_norm_without_epsilon_is_one_global_scale() -> None:
    class Unit(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt()

    assert listing(nn.Sequential(nn.Linear(4, 5), Unit())) == {("rescaling: 0", "(R_>0)^1", 1)}
