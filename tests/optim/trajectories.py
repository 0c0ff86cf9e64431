"""Trainings from a point and from a gauge equivalent one, and how far apart they end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.gauge import ComplexRescaling, Gauge, GeneralLinear, Rescaling
from deaddir_fast.optim.claims import LAYER, NONE, SHARED
from deaddir_fast.optim.ddcadam import DDCAdam

Loss = Callable[[Tensor, Tensor], Tensor]


def scales(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Log-uniform in [0.2, 3]."""
    u = torch.rand(tuple(shape), dtype=torch.float64, generator=draw)
    return 0.2 * torch.exp(u * torch.log(torch.tensor(15.0, dtype=torch.float64)))


def element(gauge: Gauge, treatment: str, draw: torch.Generator) -> Tensor:
    """An element of what is claimed of a gauge, of size 0.2 to 3."""
    if isinstance(gauge, Rescaling):
        layer = treatment in (LAYER, "chain step per layer")
        c = scales((1,) if layer else gauge.shape, draw).expand(gauge.shape)
        if gauge.positive or layer:
            return c.contiguous()
        return c * (2 * torch.randint(0, 2, gauge.shape, generator=draw) - 1)
    if isinstance(gauge, GeneralLinear) and treatment == SHARED:
        x = torch.randn(gauge.shape, dtype=torch.float64, generator=draw)
        return torch.linalg.qr(x)[0] * scales((gauge.shape[0], 1, 1), draw)
    if isinstance(gauge, ComplexRescaling):
        phase = torch.rand(gauge.shape[0], dtype=torch.float64, generator=draw) * 6.28
        turned = torch.stack([phase.cos(), phase.sin()], -1)
        return turned * scales((gauge.shape[0], 1), draw)
    return gauge.random_element(draw)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters, in fp64."""
    return {k: v.detach().to(torch.float64, copy=True) for k, v in model.named_parameters()}


def load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A copy of the model at another point."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.copy_(state[name])
    return moved


@dataclass
class Pair:
    """Relative distances of transported trajectories, and the losses at their ends."""

    ours: float
    adamw: float
    moved: float
    losses: tuple[float, float]
    optimizer: DDCAdam


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any, target: Tensor, loss: Loss,
    steps: int,
) -> float:  # fmt: skip
    """Full-batch steps; the last loss."""
    value = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        value = loss(out if isinstance(out, Tensor) else out.logits, target)
        value.backward()
        optimizer.step()
    return value.item()


def transported(
    model: nn.Module,
    inputs: Any,
    target: Tensor,
    loss: Loss,
    gauges: Sequence[Gauge] | str,
    *,
    elements: list[tuple[Gauge, Tensor]] | None = None,
    steps: int = 200,
    lr: float = 1e-3,
    seed: int = 3,
    adamw: bool = True,
    **options: Any,
) -> Pair:
    """Train from theta and from h theta; h is a random element of every claimed gauge if None."""
    draw = torch.Generator().manual_seed(seed)
    options = {"weight_decay": 0.1, **options}

    def make(m: nn.Module) -> DDCAdam:
        return DDCAdam(m, lr=lr, **{"gauges": gauges, **options})

    probe = make(copy.deepcopy(model))
    if elements is None:
        elements = [
            (c.gauge, element(c.gauge, c.treatment, draw))
            for c in probe.claims
            if c.treatment != NONE
        ]
    assert elements

    def h(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for gauge, e in elements:
            state = gauge.act(state, e)
        return state

    start = state_of(model)
    there = h(start)
    distances, losses, moved, optimizer = [], (0.0, 0.0), 0.0, probe
    for kind in ("ours", "adamw")[: 2 if adamw else 1]:
        ends, last = [], []
        for at in (start, there):
            m = load(model, at)
            if kind == "ours":
                optimizer = make(m)
                o: torch.optim.Optimizer = optimizer
            else:
                o = torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=options["weight_decay"])
            last.append(train(m, o, inputs, target, loss, steps))
            ends.append(state_of(m))
        distances.append(apart(h(ends[0]), ends[1]))
        if kind == "ours":
            losses = (last[0], last[1])
            moved = apart(start, ends[0])
    return Pair(distances[0], distances[-1], moved, losses, optimizer)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Distance of two points relative to the second."""
    size = sum(float(v.square().sum()) for v in b.values())
    return (sum(float((a[k] - b[k]).square().sum()) for k in b) / size) ** 0.5
