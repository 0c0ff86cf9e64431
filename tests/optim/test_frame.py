"""The path-norm frame against its definition, and its behaviour under the group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gauge.models import Gated, Residual, Shared, conv_net
from torch import Tensor, nn

from deaddir_fast import gauge
from deaddir_fast.optim.claims import treat
from deaddir_fast.optim.plan import FramePart, make
from optim.trajectories import element


def part_of(model: nn.Module, gauges: list[Any]) -> FramePart:
    parameters = dict(model.named_parameters())
    treatment = treat(gauges, parameters, dict.fromkeys(parameters, 0))
    # Isolated pairs have a step of their own, but a frame like all others.
    treatment = replace(treatment, framed=treatment.framed + treatment.pairs, pairs=())
    plan = make(treatment, parameters, list(parameters))
    assert len(plan.parts) == 1
    return plan.parts[0]


def number_of(part: FramePart, name: str) -> int:
    return next(n for n, layout in enumerate(part.layouts) if layout.name == name)


def scales(part: FramePart, state: dict[str, Tensor]) -> Tensor:
    return part.frame.scales([layout.matrix(state[layout.name]) for layout in part.layouts])


def factor(part: FramePart, state: dict[str, Tensor], name: str) -> tuple[Any, Any]:
    number = number_of(part, name)
    found = {n: (r, c) for n, r, c in part.frame.factors(scales(part, state))}
    return found[number]


def random_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach() + 0.2 * torch.randn_like(v) for k, v in model.double().named_parameters()}


def continuous(model: nn.Module, inputs: Any = None) -> list[Any]:
    found = gauge.find(model, inputs)
    return [g for g in found if g.dimension]


def test_path_norms_of_a_deep_network() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(),
        nn.Linear(3, 2),
    ).double()  # fmt: skip
    state = random_state(model)
    part = part_of(model, continuous(model))
    phi = torch.ones(4, dtype=torch.float64)
    for layer in (0, 2, 4):
        w, b = state[f"{layer}.weight"], state[f"{layer}.bias"]
        into = ((w * phi).square().sum(1) + b.square()).sqrt()
        row, col = factor(part, state, f"{layer}.weight")
        assert torch.allclose(row, into, rtol=1e-13)
        if layer == 0:
            assert col is None  # inputs have no scale
        else:
            assert torch.allclose(col, 1 / phi, rtol=1e-13)
        assert torch.allclose(factor(part, state, f"{layer}.bias")[1], into, rtol=1e-13)
        phi = into
    assert torch.allclose(factor(part, state, "6.weight")[1], 1 / phi, rtol=1e-13)


def test_depthwise_convolution_and_flatten() -> None:
    """A depthwise kernel is scaled twice along one axis; a linear map reads channels by the map."""
    model = conv_net().double().eval()
    state = random_state(model)
    gauges = [g for g in continuous(model) if isinstance(g, gauge.Rescaling)]
    gauges = [g for g in gauges if "6.weight" in g.parameters]
    part = part_of(model, gauges)
    names = {p for g in gauges for p in g.parameters}
    first = sum(
        state[n].flatten(1).square().sum(1) if state[n].ndim > 1 else state[n].square()
        for n in names
        if n.startswith(("3.", "4."))
    )
    writers = {n for n in names if n.startswith(("3.", "4."))}
    if writers == {"4.weight", "4.bias"}:  # the batch norm alone writes these channels
        first = state["4.weight"].square() + state["4.bias"].square()
    phi = first.sqrt()
    w, b = state["6.weight"], state["6.bias"]
    psi = ((w.flatten(1).square().sum(1) / phi.square() * phi.square() ** 2) + b.square()).sqrt()
    row, _ = factor(part, state, "6.weight")
    assert torch.allclose(row, psi / phi, rtol=1e-12)
    _, col = factor(part, state, "10.weight")
    assert torch.allclose(col, (1 / psi).repeat_interleave(4), rtol=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        conv_net,
        Gated,
        Shared,
        lambda: Residual(embed=True, norm=True),
        lambda: Residual(embed=True),
    ],
)
def test_scales_move_with_the_group(build: Any) -> None:
    """w / f and g f are unchanged by every claimed element."""
    model = build().double().eval()
    gauges = [g for g in continuous(model) if g.likelihood is None]
    state = random_state(model)
    part = part_of(model, gauges)
    chosen = [f.gauge for f in part.frame.order if f.size == 1]
    assert chosen
    draw = torch.Generator().manual_seed(2)
    moved = dict(state)
    for g in chosen:
        moved = g.act(moved, element(g, "", draw))
    for layout in part.layouts:
        before, after = (_in_frame(part, at, layout.name) for at in (state, moved))
        assert torch.allclose(before.abs(), after.abs(), rtol=1e-11, atol=1e-14)


def _in_frame(part: FramePart, state: dict[str, Tensor], name: str) -> Tensor:
    number = number_of(part, name)
    w = part.layouts[number].matrix(state[name])
    for n, row, col in part.frame.factors(scales(part, state)):
        if n == number:
            w = w if row is None else w / row[:, None]
            w = w if col is None else w / col
    return w


def test_zero_writers_read_as_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    state = random_state(model)
    state["0.weight"][1] = 0
    state["0.bias"][1] = 0
    part = part_of(model, continuous(model))
    row, _ = factor(part, state, "0.weight")
    assert row[1] == 1 and bool((row[[0, 2]] != 1).all())
