"""States, transport along orbits and integration, for tests of gauges."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from deaddir_fast import gauge
from gauge.models import Attention, Gated, Residual, Rotary, Shared, TiedHead, conv_net, mlp, normed

State = dict[str, Tensor]
Field = Callable[[State], State]

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "mlp": (mlp, (9, 4)),
    "conv": (conv_net, (3, 1, 8, 8)),
    "deep linear": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False), nn.Linear(2, 3)),
        (9, 4),
    ),
    "gated": (Gated, (9, 4)),
    "norms": (normed, (9, 4)),
    "residual": (lambda: Residual(embed=True), (9, 4)),
    "shared": (Shared, (9, 4)),
    "tied": (lambda: TiedHead(F.relu), None),
    "attention": (Attention, (4, 3, 6)),
    "rotary": (Rotary, (4, 3, 6)),
}


@functools.cache
def case(name: str) -> tuple[nn.Module, Tensor, State, tuple[gauge.Gauge, ...]]:
    """A model in fp64, inputs, a state off zeros and ones, its gauges."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    inputs = torch.randint(7, (4, 5)) if shape is None else torch.randn(shape).double()
    state = {k: v.detach() + 0.2 * torch.randn_like(v) for k, v in model.named_parameters()}
    return model, inputs, state, tuple(gauge.find(model, inputs))


def elements(gauges: Sequence[gauge.Gauge], seed: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [g.random_element(draw) for g in gauges]


def transport(gauges: Sequence[gauge.Gauge], moves: Sequence[Tensor], state: State) -> State:
    for g, e in zip(gauges, moves, strict=True):
        state = g.act(state, e)
    return state


def transport_directions(
    gauges: Sequence[gauge.Gauge], moves: Sequence[Tensor], state: State, x: State
) -> State:
    """{name: (p, *shape)} at ``state`` carried along by the differential of the action."""

    def one(v: State) -> State:
        return torch.func.jvp(lambda s: transport(gauges, moves, s), (state,), (v,))[1]

    p = next(iter(x.values())).shape[0]
    rows = [one({k: v[i] for k, v in x.items()}) for i in range(p)]
    return {k: torch.stack([r[k] for r in rows]) for k in state}


def distance(a: State, b: State) -> float:
    """Largest difference over largest entry of ``b``."""
    assert a.keys() == b.keys()
    size = max(float(v.abs().max()) for v in b.values())
    return max(float((a[k] - b[k]).abs().max()) for k in a) / size


def loss_gradient(model: nn.Module, inputs: Tensor) -> Field:
    """State -> gradient of a cross-entropy to fixed labels."""
    with torch.no_grad():
        classes = model(inputs).shape[-1]
    labels = torch.arange(inputs.numel()) % classes

    def loss(state: State) -> Tensor:
        z = functional_call(model, state, (inputs,)).reshape(-1, classes)
        return F.cross_entropy(z, labels[: z.shape[0]])

    def field(state: State) -> State:
        leaves = {k: v.detach().requires_grad_() for k, v in state.items()}
        gradients = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
        return {
            k: torch.zeros_like(v) if g is None else g
            for (k, v), g in zip(state.items(), gradients, strict=True)
        }

    return field


def moved(state: State, field: State, t: float) -> State:
    return {k: v + t * field[k] for k, v in state.items()}


def rk4(field: Field, state: State, step: float, steps: int) -> State:
    """Flow of θ' = −field(θ)."""
    for _ in range(steps):
        a = field(state)
        b = field(moved(state, a, -step / 2))
        c = field(moved(state, b, -step / 2))
        d = field(moved(state, c, -step))
        mean = {k: (a[k] + 2 * b[k] + 2 * c[k] + d[k]) / 6 for k in a}
        state = moved(state, mean, -step)
    return state


def euler(field: Field, state: State, step: float, steps: int) -> State:
    for _ in range(steps):
        state = moved(state, field(state), -step)
    return state
