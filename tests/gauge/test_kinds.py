"""The quotient under complex rescalings, stacks, batch norms, mean shifts and permutations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast import gauge
from deaddir_fast.gauge.batch_norm import NormRescaling
from deaddir_fast.gauge.rescaling import Slot
from gauge.flows import State, elements, transport, transport_directions
from gauge.models import Rotary, with_statistics

F64 = torch.float64


class Stream(nn.Module):
    """Two maps into a stream that only norms read, one of them behind a rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 5)
        self.norm1, self.norm2 = nn.LayerNorm(5), nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.fc2(F.relu(self.fc1(self.norm1(x))))
        return self.head(self.norm2(x))


class Folding(nn.Module):
    """A biased layer, a batch norm, a rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = with_statistics(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rotary": (Rotary, (4, 3, 6)),
    "stream": (Stream, (9, 4)),
    "batch norm": (Folding, (9, 4)),
}


def case(name: str) -> tuple[State, list[gauge.Gauge]]:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    found = gauge.find(model, torch.randn(shape).double())
    return {k: v.detach() + 0.2 * torch.randn_like(v) for k, v in model.named_parameters()}, found


def stack() -> tuple[State, list[gauge.Gauge]]:
    """Three experts 4 -> 2 -> 3 in stacks (E, 2, 4), (E, 3, 2), behind gains of their input."""
    torch.manual_seed(0)
    state = {"g": torch.rand(4), "up": torch.randn(3, 2, 4), "down": torch.randn(3, 3, 2)}
    units, inputs = torch.arange(6)[:, None], torch.arange(12).reshape(3, 4).T
    hidden = gauge.Rescaling(
        "units", "R^6", ("up", "down"), (6,), None,
        (Slot("up", 1, units, 6, 1, (0,)), Slot("down", 2, units, 6, -1, (0,))), True,
    )  # fmt: skip
    gains = gauge.Rescaling(
        "gains", "R^4", ("g", "up"), (4,), None,
        (Slot("g", 0, torch.arange(4)[:, None], 4, 1), Slot("up", 2, inputs, 12, -1, (0,))), True,
    )  # fmt: skip
    return {k: v.double() for k, v in state.items()}, [hidden, gains]


def test_every_kind_is_there() -> None:
    kinds = {type(g) for name in MODELS for g in case(name)[1]}
    assert kinds >= {gauge.ComplexRescaling, gauge.Permutation, NormRescaling, gauge.ClassShift}
    assert any(g.likelihood is None for g in case("stream")[1] if isinstance(g, gauge.ClassShift))


@pytest.mark.parametrize("name", [*MODELS, "stack"])
def test_invariant_metric(name: str) -> None:
    """Elements of all kinds, with signs, phases and permutations."""
    state, found = stack() if name == "stack" else case(name)
    x = {k: torch.randn(3, *v.shape, dtype=F64) for k, v in state.items()}
    here = gauge.frame(state, found)
    assert here.remarks == ()
    before = gram(here.push(x))
    for g in [*found, None]:
        some = found if g is None else [g]
        moves = elements(some)
        moved = transport_directions(some, moves, state, x)
        after = gram(gauge.frame(transport(some, moves, state), found).push(moved))
        assert (after - before).abs().max() <= 1e-9 * before.abs().max(), some[0].name
    back = here.pull(here.push(x))
    assert all(torch.allclose(back[k], x[k], rtol=1e-10, atol=1e-12) for k in state)


def gram(x: State) -> Tensor:
    flat = torch.cat([v.flatten(1) for v in x.values()], 1)
    return flat @ flat.T


@pytest.mark.parametrize("name", [*MODELS, "stack"])
def test_dimensions_against_dense_tangents(name: str) -> None:
    state, found = stack() if name == "stack" else case(name)
    zeroed = {k: v.clone() for k, v in state.items()}
    if name == "batch norm":  # units of which only the norm's bias moves, or nothing
        zeroed["net.0.weight"][:2] = zeroed["net.0.bias"][:2] = 0
        zeroed["net.1.weight"][1] = 0
    for at in (state, zeroed):
        moved = [g.tangents(at) for g in found]
        rows = [
            torch.cat(
                [
                    t[k].flatten(1) if k in t else v.new_zeros(g.dimension, v.numel())
                    for k, v in at.items()
                ],
                1,
            )
            for g, t in zip(found, moved, strict=True)
        ]
        rank = int(torch.linalg.matrix_rank(torch.cat(rows)))
        counted = gauge.quotient_dimension(at, found)
        assert counted.orbit == rank == gauge.orthonormal_tangents(found, at)[1]
        assert counted.group == sum(g.dimension for g in found)


def test_conserved_by_hand() -> None:
    state, found = case("rotary")
    g = next(g for g in found if isinstance(g, gauge.ComplexRescaling))
    q, k = (torch.cat([state[f"{n}.weight"], state[f"{n}.bias"][:, None]], 1) for n in "qk")
    q, k = q.square().sum(1), k.square().sum(1)
    # Unit j of a head turns with unit j + 2; two query heads meet one key head.
    expected = torch.stack(
        [q[[j, j + 2, j + 4, j + 6]].sum() - k[[j, j + 2]].sum() for j in (0, 1)]
    )
    assert torch.allclose(gauge.conserved(g, state), expected, rtol=1e-13)
    state, (hidden, _) = stack()
    up, down = state["up"].square().sum(2), state["down"].square().sum(1)
    assert torch.allclose(gauge.conserved(hidden, state), (up - down).reshape(-1), rtol=1e-13)
    state, found = case("stream")
    g = next(g for g in found if g.name == "translation: fc2 -> mean of LayerNorm")
    expected = torch.cat([state["fc2.weight"].sum(0), state["fc2.bias"].sum()[None]])
    assert torch.allclose(gauge.conserved(g, state), expected, rtol=1e-13)


def test_what_conserves_nothing() -> None:
    """T ∧ dT of the one-form of a scale through a batch norm is not zero: no integrating factor."""
    state, found = case("batch norm")
    g = next(g for g in found if isinstance(g, NormRescaling))
    assert gauge.conserved(g, state) is None
    names = list(g.parameters)
    sizes = [state[n].numel() for n in names]

    def field(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        at = {n: v.reshape(state[n].shape) for n, v in parts}
        algebra = torch.zeros(g.shape, dtype=F64)
        algebra[0] = 1
        v = g.velocity(at, algebra)
        return torch.cat([v[n].reshape(-1) for n in names])

    flat = torch.cat([state[n].reshape(-1) for n in names])
    t = field(flat)
    jacobian = torch.func.jacrev(field)(flat)
    curl = jacobian - jacobian.T
    wedge = (
        t[:, None, None] * curl + t[None, :, None] * curl.T[:, None, :] + t * curl[:, :, None]
    )  # t_i c_jk + t_j c_ki + t_k c_ij
    assert wedge.abs().max() > 1e-3
    for p in (p for p in found if isinstance(p, gauge.Permutation)):
        assert gauge.conserved(p, state) is None


def test_permutations_of_a_frame_take_no_step() -> None:
    state, found = case("stream")
    finite = [g for g in found if not g.dimension]
    assert finite and gauge.frame(state, finite).steps == ()
    x = {k: torch.randn(2, *v.shape, dtype=F64) for k, v in state.items()}
    for metric in ("euclidean", "invariant"):
        kept = gauge.project_out(x, finite, state, metric=metric)
        assert all(torch.equal(kept[k], x[k]) for k in x)
    drift = gauge.Drift(Stream(), finite)
    drift.update()
    assert drift.report()["without"] == [g.name for g in finite]
