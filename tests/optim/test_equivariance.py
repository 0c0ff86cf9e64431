"""The test of truth: trajectories from theta and from h theta agree after transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gauge.models import (
    Attention,
    Gated,
    KeysFirst,
    Residual,
    Shared,
    TiedHead,
    conv_net,
    deep_linear,
    mlp,
    normed,
)
from torch import Tensor, nn

from deaddir_fast import gauge
from deaddir_fast.optim.claims import CHAIN, FRAME, FREE, LAYER, NONE, PAIR, SHARED, SHIFT, STILL
from optim.trajectories import transported

EXACT = 1e-12
SINGLE = 1e-5
# Far enough to see what amplifies rounding (AdamW is 0.1 to 1 off), not so far that a sample
# crosses a kink of a ReLU on one side only.
LR = 3e-4


def no_bias_chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.ReLU(),
        nn.Linear(7, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip


def deep() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.LeakyReLU(), nn.Linear(12, 10),
        nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def gated_residual() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4), Gated())


# model, input shape, loss, what every gauge is treated as
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, list[str]]] = {
    "deep, classes": (deep, (64, 6), "classes", [FRAME] * 3 + [SHIFT]),
    "deep, regression": (deep, (64, 6), "regression", [FRAME] * 3),
    "chain without biases": (no_bias_chain, (64, 6), "regression", [FRAME] * 3),
    "pair": (two_layers, (64, 6), "regression", [PAIR]),
    "dropout-free mlp": (lambda: mlp().eval(), (64, 4), "classes", [FRAME] * 2 + [SHIFT]),
    "norms as pairs": (normed, (64, 4), "regression", [PAIR, PAIR, NONE, NONE]),
    "gated": (Gated, (64, 4), "classes", [FRAME, SHIFT]),
    "norm into gated": (gated_residual, (64, 6), "classes", [FRAME, FRAME, SHIFT]),
    "residual, norm": (
        lambda: Residual(embed=True, norm=True), (64, 4), "classes", [FRAME, FRAME, NONE, SHIFT],
    ),
    "residual, linear stream": (
        lambda: Residual(embed=True), (64, 4), "classes", [SHARED, FRAME, NONE, SHIFT],
    ),
    "shared layer": (Shared, (64, 4), "regression", [FRAME]),
    "deep linear": (deep_linear, (64, 4), "regression", [SHARED, SHARED]),
    "attention": (Attention, (16, 5, 6), "regression", [SHARED, SHARED, STILL, NONE]),
    "attention, keys first": (
        KeysFirst,
        (16, 5, 6),
        "regression",
        [SHARED, SHARED, STILL, NONE],
    ),
    "convolutions": (conv_net, (32, 1, 8, 8), "classes", [PAIR, NONE, FRAME, FRAME, SHIFT]),
    "tied head": (lambda: TiedHead(F.relu), (), "tokens", [FRAME]),
}  # fmt: skip


def problem(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Tensor, Any, list[Any]]:
    build, shape, kind, _ = CASES[name]
    torch.manual_seed(1)
    model = build().double().eval()
    with torch.no_grad():
        for p in model.parameters():  # off the zeros and ones of norms and biases
            p.add_(0.05 * torch.randn_like(p))
    inputs = torch.randint(7, (12, 5)) if kind == "tokens" else torch.randn(shape).double()
    out = model(inputs)
    found = [g for g in gauge.find(model, inputs) if g.dimension]
    # Something to learn: on noise, single samples decide, and whether one of them crosses a kink
    # amplifies rounding by orders of magnitude for any optimizer.
    width = 3 if kind == "tokens" else shape[-1]
    rule = torch.randn(out.shape[-1], width).double() / width**0.5
    seen = torch.eye(7, 3).double()[inputs] if kind == "tokens" else inputs
    taught = (seen @ rule.T).reshape(out.shape[0], -1)[:, : out[0].numel()].reshape(out.shape)
    target: Tensor
    if kind == "regression":
        target = taught.to(dtype)
        loss: Any = F.mse_loss
        found = [g for g in found if g.likelihood is None]
    else:
        target = taught.argmax(-1).flatten()

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z.flatten(0, -2), y)

    moved = inputs if kind == "tokens" else inputs.to(dtype)
    return model.to(dtype), moved, target.detach(), loss, found


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_transported(name: str) -> None:
    model, inputs, target, loss, found = problem(name, torch.float64)
    pair = transported(model, inputs, target, loss, found, lr=LR)
    assert [c.treatment for c in pair.optimizer.claims] == CASES[name][3]
    assert pair.moved > 1e-2  # it went somewhere
    assert pair.ours <= EXACT
    assert pair.adamw > 1e-2


# One case of each treatment in every run, all of them in the full one.
SHORT = ("deep, classes", "pair", "norm into gated", "attention")


@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_trajectories_are_transported_in_single_precision(name: str) -> None:
    model, inputs, target, loss, found = problem(name, torch.float32)
    pair = transported(model, inputs, target, loss, found, lr=LR)
    assert pair.moved > 1e-2
    assert pair.ours <= SINGLE
    assert pair.adamw > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("build", "treatment"),
    [(deep, CHAIN), (no_bias_chain, CHAIN), (two_layers, CHAIN), (gated_residual, LAYER)],
)
def test_layers_as_a_whole(
    build: Callable[[], nn.Module], treatment: str, dtype: torch.dtype
) -> None:
    """One scale per layer: chains take the chain step, others the frame."""
    torch.manual_seed(2)
    model = build().to(dtype)
    inputs = torch.randn(64, 6, dtype=dtype)
    target = inputs @ torch.randn(6, 3, dtype=dtype) / 6**0.5
    pair = transported(
        model, inputs, target, F.mse_loss, "layerwise",
        likelihood="gaussian", lr=LR,
    )  # fmt: skip
    assert {c.treatment for c in pair.optimizer.claims if c.gauge.dimension} == {treatment}
    assert pair.ours <= (EXACT if dtype == torch.float64 else SINGLE)
    assert pair.adamw > 1e-2


@pytest.mark.parametrize(("name", "c"), [("deep, classes", 0.2), ("pair", 3.0)])
def test_global_scale(name: str, c: float) -> None:
    """(c W1, W2 / c): a subgroup of what is claimed."""
    model, inputs, target, loss, found = problem(name, torch.float64)
    one = next(g for g in found if isinstance(g, gauge.Rescaling))
    everywhere = [(one, torch.full(one.shape, c, dtype=torch.float64))]
    pair = transported(model, inputs, target, loss, found, elements=everywhere, lr=LR)
    assert pair.ours <= EXACT
    assert pair.adamw > 1e-2


@pytest.mark.parametrize("name", ["deep, classes", "pair", "convolutions"])
def test_permutations(name: str) -> None:
    """Units, channels: the state moves along with them."""
    model, inputs, target, loss, _ = problem(name, torch.float64)
    found = [g for g in gauge.find(model, inputs) if g.likelihood is None]
    draw = torch.Generator().manual_seed(0)
    swaps = [(g, g.random_element(draw)) for g in found if type(g) is gauge.Permutation]
    pair = transported(model, inputs, target, loss, found, elements=swaps, lr=LR, adamw=False)
    claimed = {id(c.gauge): c.treatment for c in pair.optimizer.claims}
    assert swaps and {claimed[id(g)] for g, _ in swaps} == {FREE}
    assert pair.ours <= EXACT


def test_vertical_mode_amplifies_rounding() -> None:
    """The gauge mode's gradient is rounding: Adam on it breaks what it is meant to respect."""
    model, inputs, target, loss, found = problem("pair", torch.float32)
    off = transported(model, inputs, target, loss, found, adamw=False, lr=LR)
    on = transported(model, inputs, target, loss, found, adamw=False, vertical=True, lr=LR)
    assert off.ours <= SINGLE < 20 * SINGLE < on.ours


def test_shears_of_a_block_are_not_claimed() -> None:
    """Only scales and rotations of a general linear gauge: a shear changes the trajectory."""
    model, inputs, target, loss, found = problem("deep linear", torch.float64)
    draw = torch.Generator().manual_seed(0)
    shears = [(g, g.random_element(draw)) for g in found]
    pair = transported(model, inputs, target, loss, found, elements=shears)
    assert pair.ours > 1e-4


@pytest.mark.parametrize(("seed", "wd"), [(0, 0.0), (1, 0.3)])
def test_other_elements_decays_and_betas(seed: int, wd: float) -> None:
    model, inputs, target, loss, found = problem("deep, classes", torch.float64)
    pair = transported(
        model, inputs, target, loss, found, seed=seed, weight_decay=wd, lr=1e-3, adamw=False,
        steps=100, betas=(0.8, 0.95),
    )  # fmt: skip
    assert pair.ours <= EXACT
