"""The path-norm frame moves with the group, and the metric made from it is invariant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast import gauge
from deaddir_fast.gauge.rescaling import Slot
from gauge.flows import MODELS, State, case, distance, elements, transport, transport_directions

F64 = torch.float64


def directions(state: State, p: int = 3, seed: int = 5) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p, *v.shape, dtype=F64, generator=draw) for k, v in state.items()}


def gram(x: State) -> Tensor:
    flat = torch.cat([v.flatten(1) for v in x.values()], 1)
    return flat @ flat.T


@pytest.mark.parametrize("name", MODELS)
def test_metric_is_invariant_and_the_euclidean_one_is_not(name: str) -> None:
    _, _, state, found = case(name)
    moves = elements(found)
    there = transport(found, moves, state)
    x = directions(state)
    moved = transport_directions(found, moves, state, x)
    here_frame, there_frame = gauge.frame(state, found), gauge.frame(there, found)
    assert here_frame.remarks == there_frame.remarks == ()
    here, after = gram(here_frame.push(x)), gram(there_frame.push(moved))
    assert (after - here).abs().max() <= 1e-10 * here.abs().max()
    assert (gram(moved) - gram(x)).abs().max() > 1e-2 * gram(x).abs().max()
    assert distance(here_frame.pull(here_frame.push(x)), x) <= 1e-13


@pytest.mark.parametrize("name", MODELS)
def test_each_gauge_moves_its_own_part_alone(name: str) -> None:
    """φ -> |c| φ, S -> C S Cᵀ, shifts add; φ and S of the other gauges stay as they are."""
    _, _, state, found = case(name)
    before = {id(s.gauge): s for s in gauge.frame(state, found).steps}
    assert len(before) == sum(g.dimension > 0 for g in found)
    for g in found:
        if not g.dimension:
            continue
        e = g.random_element(torch.Generator().manual_seed(2))
        for step in gauge.frame(g.act(state, e), found).steps:
            old, new = before[id(step.gauge)].element, step.element
            if isinstance(step.gauge, gauge.Rescaling):
                expected = old * (e.abs() if step.gauge is g else 1)
                assert torch.allclose(new, expected, rtol=1e-11)
            elif isinstance(step.gauge, gauge.GeneralLinear):
                c = e if step.gauge is g else torch.eye(old.shape[-1], dtype=F64)
                expected = c @ old @ old.mT @ c.mT
                assert torch.allclose(new @ new.mT, expected, rtol=1e-9, atol=1e-11)
            elif isinstance(step.gauge, gauge.ComplexRescaling):
                expected = old[:, 0] * (e.norm(dim=1) if step.gauge is g else 1)
                assert torch.allclose(new[:, 0], expected, rtol=1e-11) and not new[:, 1].any()
            elif step.gauge is g:
                # a class shift also shifts what a translation before it hands on to the bias
                n = e.numel() - (isinstance(g, gauge.ClassShift) and g.bias is not None)
                assert torch.allclose(new[:n], (old + e)[:n], rtol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_projection_moves_with_the_group(name: str) -> None:
    _, _, state, found = case(name)
    moves = elements(found)
    there = transport(found, moves, state)
    x = directions(state)
    moved = transport_directions(found, moves, state, x)
    errors = {}
    for metric in ("invariant", "euclidean"):
        here = gauge.project_out(x, found, state, metric=metric)
        after = gauge.project_out(moved, found, there, metric=metric)
        errors[metric] = distance(after, transport_directions(found, moves, state, here))
        # both are projections along the orbits
        again = gauge.project_out(here, found, state, metric=metric)
        assert distance(again, here) <= 1e-11
        for g in (g for g in found if g.dimension):
            gone = gauge.project_out(g.tangents(state), [g], state, metric=metric)
            size = max(float(v.abs().max()) for v in g.tangents(state).values())
            assert max(float(v.abs().max()) for v in gone.values()) <= 1e-11 * size
    assert errors["invariant"] <= 1e-10
    assert errors["euclidean"] > 1e-2


def test_path_norms_by_hand() -> None:
    _, _, state, found = case("mlp")
    w1, b1, w2, b2 = (state[k] for k in ("0.weight", "0.bias", "3.weight", "3.bias"))
    one = ((w1.square().sum(1) + b1.square()) / 5).sqrt()
    two = (((w2 * one).square().sum(1) + b2.square()) / 6).sqrt()
    made = gauge.frame(state, [g for g in found if g.likelihood is None])
    assert [s.gauge for s in made.steps] == list(found[:2])
    assert torch.allclose(made.steps[0].element, one, rtol=1e-14)
    assert torch.allclose(made.steps[1].element, two, rtol=1e-14)
    assert torch.allclose(made.tensor("3.weight"), two[:, None] / one, rtol=1e-14)
    assert torch.allclose(made.tensor("3.bias"), two, rtol=1e-14)
    assert torch.equal(made.tensor("5.bias"), torch.ones(3, dtype=F64))
    assert [a for a, _ in made.factors["3.weight"]] == [(1,), (0,)]
    x = directions(state)
    for k, v in made.push(x).items():
        assert torch.allclose(v, x[k] / made.tensor(k), rtol=1e-14)


@pytest.mark.parametrize("name", ["mlp", "conv", "gated", "shared", "tied"])
def test_diagonal_frame_moves_like_the_parameter(name: str) -> None:
    _, _, state, found = case(name)
    found = tuple(g for g in found if isinstance(g, gauge.Rescaling))
    moves = elements(found)
    ones = {k: torch.ones_like(v) for k, v in state.items()}
    scale = transport(found, moves, ones)
    before, after = gauge.frame(state, found), gauge.frame(transport(found, moves, state), found)
    for k in state:
        if (
            name == "conv" and k == "4.bias"
        ):  # its frame is that of the bias with the mean folded in
            continue
        assert torch.allclose(after.tensor(k), scale[k].abs() * before.tensor(k), rtol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_represents_the_differential(name: str) -> None:
    """<grad, x> in the metric is g · x, and without gauges grad is g."""
    _, _, state, found = case(name)
    g = {k: v[0] for k, v in directions(state, 1, seed=8).items()}
    x = directions(state)
    made = gauge.frame(state, found)
    raised = {k: v[None] for k, v in made.gradient(g).items()}
    pairing = sum((made.push(raised)[k] * made.push(x)[k]).flatten(1).sum(1) for k in state)
    plain = sum((g[k] * x[k]).flatten(1).sum(1) for k in state)
    assert torch.allclose(pairing, plain, rtol=1e-11)
    assert distance(gauge.frame(state, []).gradient(g), g) == 0


def test_linear_blocks_have_the_gram_metric() -> None:
    """One GL(2) between W (2, 4) and R (3, 2): tr Xᵀ S⁻¹ Y + tr Z S Vᵀ with S = W Wᵀ / 4."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    found = gauge.find(model)[:1]
    x = directions(state, 2)
    s = state["0.weight"] @ state["0.weight"].T / 4
    u, v = x["0.weight"], x["1.weight"]
    expected = (u[0] * torch.linalg.solve(s, u[1])).sum() + (v[0] @ s * v[1]).sum()
    made = gauge.frame(state, found)
    assert torch.allclose(gram(made.push(x))[0, 1], expected, rtol=1e-11)
    with pytest.raises(ValueError, match=r"'0\.weight' has no diagonal frame"):
        made.tensor("0.weight")


def wide() -> tuple[State, list[gauge.Gauge]]:
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.Linear(6, 2, bias=False)).double()
    return {k: v.detach() for k, v in model.named_parameters()}, gauge.find(model)[:1]


def test_layers_wider_than_both_neighbours_have_no_invariant_metric() -> None:
    """C = 1 + u vᵀ with v ⟂ im W, R u = 0 fixes the state and is unipotent on directions."""
    state, found = wide()
    w, r = state["0.weight"], state["1.weight"]
    v = torch.linalg.qr(w, mode="complete").Q[:, -1]
    u = torch.linalg.svd(r).Vh[-1]
    c = (torch.eye(6, dtype=F64) + torch.outer(u, v))[None]
    assert distance(found[0].act(state, c), state) <= 1e-14
    made = gauge.frame(state, found)
    assert "neither writers nor readers span 1 of 1 blocks" in made.remarks[0]
    with pytest.raises(ValueError, match="metric: no invariant one here, general linear"):
        gauge.project_out(directions(state), found, state, metric="invariant")


def test_what_the_fallback_of_wide_layers_is_equivariant_under() -> None:
    state, found = wide()
    x = directions(state)
    draw = torch.Generator().manual_seed(4)
    turn = 1.7 * torch.linalg.qr(torch.randn(1, 6, 6, dtype=F64, generator=draw)).Q
    before = gram(gauge.frame(state, found).push(x))
    for e, good in ((turn, True), (found[0].random_element(draw), False)):
        moved = transport_directions(found, [e], state, x)
        after = gram(gauge.frame(found[0].act(state, e), found).push(moved))
        assert ((after - before).abs().max() <= 1e-11 * before.abs().max()) == good


def test_fallbacks_of_a_unit() -> None:
    """No writers: readers, inversely. Nothing: 1. Both equivariant where there is an orbit."""
    _, _, state, found = case("mlp")
    state = {k: v.clone() for k, v in state.items()}
    for j in (1, 3):
        state["0.weight"][j] = 0
        state["0.bias"][j] = 0
    state["3.weight"][:, 3] = 0
    phi = gauge.frame(state, found[:1]).steps[0].element
    assert torch.allclose(phi[1], 1 / state["3.weight"][:, 1].square().mean().sqrt(), rtol=1e-14)
    assert phi[3] == 1
    moves = elements(found)
    there = transport(found, moves, state)
    x = directions(state)
    here = gauge.project_out(x, found, state, metric="invariant")
    moved = transport_directions(found, moves, state, x)
    after = gauge.project_out(moved, found, there, metric="invariant")
    assert distance(after, transport_directions(found, moves, state, here)) <= 1e-10


def test_blocks_wait_for_their_neighbours() -> None:
    """2 -> 3 -> 4 -> 4: readers tell GL(4), then in its frame readers tell GL(3)."""
    widths = ((2, 3), (3, 4), (4, 4))
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in widths)).double()
    state = {k: v.detach() for k, v in model.named_parameters()}
    found = [g for g in gauge.find(model) if g.likelihood is None]
    made = gauge.frame(state, found)
    assert made.remarks == () and len(made.steps) == 2
    moves = elements(found)
    x = directions(state)
    moved = transport_directions(found, moves, state, x)
    before = gram(made.push(x))
    after = gram(gauge.frame(transport(found, moves, state), found).push(moved))
    assert (after - before).abs().max() <= 1e-9 * before.abs().max()
    readers = state["1.weight"]
    four = state["2.weight"].T @ state["2.weight"] / 4  # S⁻¹ of GL(4)
    three = torch.linalg.inv(readers.T @ four @ readers / 4)
    root = next(s.element for s in made.steps if s.gauge is found[0])[0]
    assert torch.allclose(root @ root.T, three, rtol=1e-9)


def test_units_without_entries_of_their_own_are_refused() -> None:
    """A layer between units of one gauge alone: its diagonal never moves, the rest not apart."""
    slot = torch.arange(2)[:, None]
    g = gauge.Rescaling(
        "test",
        "R^2",
        ("w",),
        (2,),
        None,
        (Slot("w", 0, slot, 2, 1), Slot("w", 1, slot, 2, -1)),
        True,
    )
    state = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)}
    assert "2 units have no entry" in gauge.frame(state, [g]).remarks[0]
    with pytest.raises(ValueError, match="2 units have no entry"):
        gauge.project_out({"w": state["w"][None]}, [g], state, metric="invariant")


def test_exponents() -> None:
    """w -> c² w, v -> v / c³: φ is the square root of the norm, from readers its cube root."""
    at = torch.arange(3)[:, None]
    slots = (Slot("w", 0, at, 3, 2), Slot("v", 0, at, 3, -3))
    g = gauge.Rescaling("test", "R^3", ("w", "v"), (3,), None, slots, True)
    state = {"w": torch.tensor([4.0, 9.0, 0.0], dtype=F64), "v": torch.full((3,), 8.0, dtype=F64)}
    made = gauge.frame(state, [g])
    assert torch.allclose(made.steps[0].element, torch.tensor([2.0, 3.0, 0.5], dtype=F64))
    assert torch.allclose(made.tensor("w"), torch.tensor([4.0, 9.0, 0.25], dtype=F64))
    e = g.random_element()
    after = gauge.frame(g.act(state, e), [g]).steps[0].element
    assert torch.allclose(after, e * made.steps[0].element, rtol=1e-13)


def test_single_precision() -> None:
    _, _, state, found = case("residual")
    state = {k: v.float() for k, v in state.items()}
    moves = elements(found)
    x = {k: v.float() for k, v in directions(state).items()}
    moved = transport_directions(found, moves, state, x)
    there = transport(found, moves, state)
    here = gauge.project_out(x, found, state, metric="invariant")
    after = gauge.project_out(moved, found, there, metric="invariant")
    assert all(v.dtype == torch.float32 for v in after.values())
    assert distance(after, transport_directions(found, moves, state, here)) <= 1e-4


def test_bad_arguments_are_named() -> None:
    _, _, state, found = case("mlp")
    with pytest.raises(TypeError, match="gauges: expected a sequence of Gauge"):
        gauge.frame(state, ["rescaling"])  # type: ignore[list-item]  # the point
    with pytest.raises(ValueError, match=r"state: no parameter called '0\.weight'"):
        gauge.frame({}, found)
    with pytest.raises(ValueError, match=r"state: expected finite numbers, '0\.bias' has others"):
        gauge.frame({**state, "0.bias": state["0.bias"] * torch.nan}, found)
    with pytest.raises(ValueError, match="name: no parameter called 'nope'"):
        gauge.frame(state, found).tensor("nope")
    with pytest.raises(ValueError, match="metric: expected one of 'euclidean', 'invariant'"):
        gauge.project_out({}, found, state, metric="riemann")
    with pytest.raises(TypeError, match="metric: expected 'euclidean', 'invariant' or a mapping"):
        gauge.project_out({}, found, state, metric=3)  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="metric: no parameter called 'nope'"):
        gauge.project_out({}, found, state, metric={"nope": torch.ones(1)})
    with pytest.raises(ValueError, match=r"metric\['0\.bias'\]: expected finite positive"):
        gauge.project_out({}, found, state, metric={"0.bias": torch.zeros(5)})
