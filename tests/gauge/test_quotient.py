"""Orbit tangents against the exact dense Fisher, their rank, and the projection beside them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from deaddir_fast import gauge
from deaddir_fast.gauge.rescaling import Slot
from gauge.models import (
    Attention,
    Gated,
    Residual,
    Rotary,
    Shared,
    TiedHead,
    deep_linear,
    mlp,
    normed,
)

MODELS = {
    "mlp": (mlp, (9, 4)),
    "small conv": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        ),
        (8, 1, 6, 6),
    ),
    "deep linear": (deep_linear, (9, 4)),
    "gated": (Gated, (9, 4)),
    "norms": (normed, (9, 4)),
    "residual": (lambda: Residual(embed=True), (9, 4)),
    "shared": (Shared, (9, 4)),
    "tied": (lambda: TiedHead(F.relu), None),
    "attention": (Attention, (4, 3, 6)),
    "rotary": (Rotary, (4, 5, 6)),
    "rotary pairs": (lambda: Rotary(rotary=2, neighbours=True), (4, 5, 6)),
}


def case(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor], list[gauge.Gauge]]:
    build, shape = MODELS[name]
    model = build().double().eval()
    inputs = torch.randint(7, (6, 5)) if shape is None else torch.randn(shape).double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    return model, inputs, state, gauge.find(model, inputs)


def fisher_root(
    model: nn.Module, state: dict[str, Tensor], inputs: Tensor, likelihood: str
) -> Tensor:
    """Dense R with F = R^T R, from the full Jacobian."""
    jacobian = jacrev(lambda s: functional_call(model, s, inputs))(state)
    z = functional_call(model, state, inputs)
    flat = torch.cat([j.reshape(*z.shape, -1) for j in jacobian.values()], -1)
    if likelihood == "categorical":
        p = z.softmax(-1).unsqueeze(-1)
        flat = p.sqrt() * (flat - (p * flat).sum(-2, keepdim=True))
    return flat.reshape(-1, flat.shape[-1]) / inputs.shape[0] ** 0.5


def linear_chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


def flatten(directions: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
    p = next(iter(directions.values())).shape[0]
    return torch.cat(
        [
            directions[k].reshape(p, v.numel()) if k in directions else v.new_zeros(p, v.numel())
            for k, v in state.items()
        ],
        1,
    )


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("name", MODELS)
def test_tangents_lie_in_the_null_space_of_the_exact_fisher(name: str, likelihood: str) -> None:
    model, inputs, state, found = case(name)
    root = fisher_root(model, state, inputs, likelihood)
    scale = torch.linalg.matrix_norm(root, 2)
    random = torch.randn(8, root.shape[1], dtype=torch.float64)
    alive = (random @ root.T).norm(dim=1) / random.norm(dim=1) / scale
    assert alive.min() > 1e-3  # a random direction is not null
    for g in found:
        tangents = flatten(g.tangents(state), state)
        lengths = tangents.norm(dim=1)
        reading = (tangents @ root.T).norm(dim=1) / scale / lengths
        if g.dimension == 0:
            assert tangents.shape == (0, root.shape[1])
        elif g.likelihood in (None, likelihood):
            assert reading.max() <= 1e-12
            curvature = reading.square().max() / alive.square().min()
            assert curvature <= 1e-12
        else:
            assert reading.max() > 1e-3  # Gaussian outputs do see the shift of all classes
    valid = [g for g in found if g.likelihood in (None, likelihood)]
    basis, rank = gauge.orthonormal_tangents(valid, state)
    flat = flatten(basis, state) if rank else random[:0]
    assert ((flat @ root.T).norm(dim=1) <= 1e-12 * scale).all()
    spectrum = torch.linalg.svdvals(root)
    nullity = root.shape[1] - int((spectrum > 1e-11 * spectrum[0]).sum())
    assert 0 < rank <= nullity


@pytest.mark.parametrize(
    ("build", "likelihood", "orbit", "null"),
    [
        # Generic point, enough samples: every null direction is an orbit direction.
        (Gated, "gaussian", 6, 6),
        (Gated, "categorical", 6 + 7, 6 + 7),
        # Rank-2 maps R^4 -> R^3 form a manifold of dimension 2 (4 + 3 - 2) = 10; 18 parameters.
        (lambda: linear_chain(4, 2, 2, 3), "gaussian", 4 + 4, 18 - 10),
        # Modulo constants over 3 classes: rank-2 maps R^4 -> R^2, dimension 8.
        (lambda: linear_chain(4, 2, 2, 3), "categorical", 4 + 4 + 2, 18 - 8),
        # A wider layer before a bottleneck: 3 * 4 + 2 * 3 + 3 * 2 = 24 parameters, GL(3) x GL(2),
        # and 24 - 10 - 13 = 1 direction of the fibre that no group element moves along.
        (lambda: linear_chain(4, 3, 2, 3), "gaussian", 9 + 4, 24 - 10),
    ],
)
def test_null_space_against_dimension_counts(
    build: Callable[[], nn.Module], likelihood: str, orbit: int, null: int
) -> None:
    model = build().double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    root = fisher_root(model, state, torch.randn(60, 4, dtype=torch.float64), likelihood)
    spectrum = torch.linalg.svdvals(root)
    nullity = root.shape[1] - int((spectrum > 1e-11 * spectrum[0]).sum())
    valid = [g for g in gauge.find(model) if g.likelihood in (None, likelihood)]
    assert gauge.orthonormal_tangents(valid, state)[1] == orbit
    assert nullity == null


@pytest.mark.parametrize("name", MODELS)
def test_basis_is_orthonormal_and_spans_every_tangent(name: str) -> None:
    _, _, state, found = case(name)
    basis, rank = gauge.orthonormal_tangents(found, state)
    flat = flatten(basis, state)
    assert flat.shape[0] == rank <= sum(g.dimension for g in found)
    assert torch.allclose(flat @ flat.T, torch.eye(rank, dtype=torch.float64), atol=1e-13)
    for g in found:
        tangents = flatten(g.tangents(state), state)
        assert torch.allclose(tangents @ flat.T @ flat, tangents, atol=1e-12)


def test_rank_counts_each_direction_once() -> None:
    """A unit with zero weights on both sides has no orbit; a gauge given twice counts once."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    state = {k: v.detach().clone() for k, v in model.named_parameters()}
    found = gauge.find(model)
    assert gauge.orthonormal_tangents(found, state)[1] == 5
    assert gauge.orthonormal_tangents(found * 2, state)[1] == 5
    state["0.weight"][2] = 0
    state["0.bias"][2] = 0
    assert gauge.orthonormal_tangents(found, state)[1] == 5
    state["2.weight"][:, 2] = 0
    assert gauge.orthonormal_tangents(found, state)[1] == 4


def test_deep_linear_orbits_overlap_where_a_factor_loses_rank() -> None:
    """f = W2 W1 with W1 = 0 = W2: the orbit of GL(h) is a point."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    state = {k: v.detach().clone() for k, v in model.named_parameters()}
    found = gauge.find(model)
    assert gauge.orthonormal_tangents(found, state)[1] == 4
    zero = {k: torch.zeros_like(v) for k, v in state.items()}
    basis, rank = gauge.orthonormal_tangents(found, zero)
    assert rank == 0 and basis["0.weight"].shape == (0, 2, 3)
    state["1.weight"].zero_()
    # X W1 for all X: 4 dimensions, since W1 has full row rank.
    assert gauge.orthonormal_tangents(found, state)[1] == 4
    state["0.weight"][1] = state["0.weight"][0]
    # X W1 with W1 of rank 1: 2 dimensions.
    assert gauge.orthonormal_tangents(found, state)[1] == 2


@pytest.mark.parametrize("name", MODELS)
def test_projection_is_orthogonal_and_idempotent(name: str) -> None:
    _, _, state, found = case(name)
    directions = {k: torch.randn(4, *v.shape, dtype=torch.float64) for k, v in state.items()}
    once = gauge.project_out(directions, found, state)
    assert {k: v.shape for k, v in once.items()} == {k: v.shape for k, v in directions.items()}
    before, after = flatten(directions, state), flatten(once, state)
    twice = flatten(gauge.project_out(once, found, state), state)
    assert torch.allclose(twice, after, atol=1e-14)
    assert torch.allclose(((before - after) * after).sum(1), before.new_zeros(4), atol=1e-12)
    for g in found:
        tangents = flatten(g.tangents(state), state)
        assert (tangents @ after.T).norm() <= 1e-13 * tangents.norm() * before.norm()
        removed = flatten(gauge.project_out(g.tangents(state), found, state), state)
        assert removed.norm() <= 1e-13 * tangents.norm()


def test_projection_of_one_parameter_reaches_its_partners() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    only = {"0.weight": state["0.weight"][None].clone()}
    out = gauge.project_out(only, gauge.find(model), state)
    assert set(out) == {"0.weight", "0.bias", "2.weight"}
    w, b, v = state["0.weight"], state["0.bias"], state["2.weight"][0]
    for j in range(5):
        length = w[j] @ w[j] + b[j] ** 2 + v[j] ** 2
        share = (w[j] @ w[j]) / length
        assert torch.allclose(out["0.weight"][0, j], (1 - share) * w[j], rtol=1e-12)
        assert torch.allclose(out["2.weight"][0, 0, j], share * v[j], rtol=1e-12)


def test_projection_leaves_other_parameters_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    only = {"2.bias": torch.ones(2, 1, dtype=torch.float64)}
    out = gauge.project_out(only, gauge.find(model), state)
    assert set(out) == {"2.bias"} and torch.equal(out["2.bias"], only["2.bias"])


def test_bad_arguments_are_named() -> None:
    model = mlp().double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    found = gauge.find(model)
    with pytest.raises(ValueError, match="directions: no parameter called 'nope'"):
        gauge.project_out({"nope": torch.ones(1, 2)}, found, state)
    with pytest.raises(ValueError, match=r"directions\['0\.bias'\]: expected shape"):
        gauge.project_out({"0.bias": torch.ones(5)}, found, state)
    with pytest.raises(ValueError, match="one common number of directions"):
        gauge.project_out({"0.bias": torch.ones(2, 5), "3.bias": torch.ones(1, 3)}, found, state)
    with pytest.raises(TypeError, match="gauges: expected a sequence of Gauge"):
        gauge.project_out({}, ["rescaling"], state)  # type: ignore[list-item]  # the point


def test_projection_in_given_weights() -> None:
    """Against weighted least squares, dense."""
    _, _, state, found = case("mlp")
    draw = torch.Generator().manual_seed(6)
    weights = {
        k: torch.rand(v.shape, dtype=torch.float64, generator=draw) + 0.1
        for k, v in state.items()
        if k != "3.bias"
    }
    x = {k: torch.randn(3, *v.shape, dtype=torch.float64, generator=draw) for k, v in state.items()}
    out = flatten(gauge.project_out(x, found, state, metric=weights), state)
    w = torch.cat([weights.get(k, torch.ones_like(v)).reshape(-1) for k, v in state.items()])
    tangents = torch.cat([flatten(g.tangents(state), state) for g in found])
    gram = (tangents * w) @ tangents.T
    flat = flatten(x, state)
    expected = flat - torch.linalg.solve(gram, (tangents * w) @ flat.T).T @ tangents
    assert torch.allclose(out, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_dimensions_against_dense_tangents(name: str) -> None:
    model, _, state, found = case(name)
    counted = gauge.quotient_dimension(model, found)
    rank = gauge.orthonormal_tangents(found, state)[1]
    draw = torch.Generator().manual_seed(5)
    generic = {
        k: torch.randn(v.shape, dtype=torch.float64, generator=draw) for k, v in state.items()
    }
    assert counted.parameters == sum(v.numel() for v in state.values())
    assert counted.group == sum(g.dimension for g in found)
    assert counted.orbit == rank and counted.quotient == counted.parameters - rank
    assert counted.orbit_bounds == (rank, rank) and counted.reason == ""
    assert counted.generic_orbit == gauge.orthonormal_tangents(found, generic)[1]
    assert counted.special == (rank < counted.generic_orbit)


@pytest.mark.parametrize(
    ("widths", "quotient"),
    [
        # Products of rank r form a manifold of dimension r (m + n − r). Where all factors have full
        # rank the fibre is one orbit unless a layer is wider than both neighbours.
        ((4, 2, 2, 3), 2 * (4 + 3 - 2)),
        ((4, 3, 2, 3), 2 * (4 + 3 - 2) + 1),
        ((3, 6, 2), 3 * 2),
        ((2, 3, 4, 4), 2 * (2 + 4 - 2)),
    ],
)
def test_dimensions_of_linear_chains(widths: tuple[int, ...], quotient: int) -> None:
    model = linear_chain(*widths).double()
    found = [g for g in gauge.find(model) if g.likelihood is None]
    counted = gauge.quotient_dimension(model, found)
    state = {k: v.detach() for k, v in model.named_parameters()}
    assert counted.orbit == gauge.orthonormal_tangents(found, state)[1]
    if widths != (2, 3, 4, 4):
        assert counted.quotient == quotient
    else:  # the fibre has directions that no group element moves along
        assert counted.quotient >= quotient


def test_dimensions_at_special_states() -> None:
    model = mlp().double()
    found = gauge.find(model)
    state = {k: v.detach().clone() for k, v in model.named_parameters()}
    assert gauge.quotient_dimension(state, found).orbit == 5 + 3 + 4
    state["0.weight"][2] = 0
    state["0.bias"][2] = 0
    state["3.weight"][:, 2] = 0
    counted = gauge.quotient_dimension(state, found)
    assert (counted.orbit, counted.generic_orbit, counted.special) == (11, 12, True)
    assert counted.quotient == counted.parameters - 11
    # a gauge given twice counts once
    assert gauge.quotient_dimension(state, found * 2).orbit == 11
    # equal classes: a rescaling of 3 -> 5 moves the readers as a class shift does, not the writers
    state["5.weight"][:] = 1
    assert gauge.quotient_dimension(state, found).orbit == 11
    state["3.weight"][:] = 0
    state["3.bias"][:] = 0
    assert gauge.quotient_dimension(state, found).orbit == 4 + 4  # of 0 -> 3 and class shifts


def test_dimensions_of_a_large_model_without_dense_tangents() -> None:
    """1.3 million parameters, a group of dimension 2048; bounds where units do not suffice."""
    model = nn.Sequential(
        nn.Linear(128, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 128)
    )
    state = {k: v.detach().clone() for k, v in model.named_parameters()}
    at = [torch.arange(1024)[:, None]] * 2
    found: list[gauge.Gauge] = []
    for i, (p, q) in enumerate((("0", "2"), ("2", "4"))):
        slots = (
            Slot(f"{p}.weight", 0, at[i], 1024, 1),
            Slot(f"{p}.bias", 0, at[i], 1024, 1),
            Slot(f"{q}.weight", 1, at[i], 1024, -1),
        )
        names = (f"{p}.weight", f"{p}.bias", f"{q}.weight")
        found.append(gauge.Rescaling(p, "R", names, (1024,), None, slots, True))
    counted = gauge.quotient_dimension(state, found)
    assert counted.orbit == counted.generic_orbit == 2048
    state["0.weight"][7] = 0
    state["0.bias"][7] = 0
    counted = gauge.quotient_dimension(state, found)
    assert counted.orbit is None and counted.quotient is None and counted.special is None
    assert counted.orbit_bounds == (2047, 2048)
    assert "the orbit through the state: more than 50,000,000 numbers" in counted.reason
    with pytest.raises(TypeError, match=r"model_or_state: expected a torch\.nn\.Module or"):
        gauge.quotient_dimension(3, found)  # type: ignore[arg-type]  # the point
