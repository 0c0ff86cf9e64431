"""Raw against relaxed Schur curvature, and the selection rule, where both are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

import deaddir_fast as dd
from deaddir_fast.reading import cross_check
from deaddir_fast.reading.schur import Point
from reading.functions import ONE, Function
from reading.test_networks import Tanh, data, linear_chain, stratum

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
D = torch.float64
RADII = torch.logspace(-3, -0.5, 13, dtype=D)


def at(
    f: Callable[[Tensor], Tensor], point: list[float], *lines: list[float], relax: bool = True
) -> dd.SchurCurvature:
    return dd.schur_curvature(
        Function(f, point),
        ONE,
        {"w": torch.tensor(lines, dtype=D)},
        RADII,
        likelihood="gaussian",
        relax=relax,
    )


def fits(found: dd.SchurCurvature) -> tuple[list[dd.RateFit], list[dd.RateFit]]:
    return dd.fit_rate(found.radii, found.raw), dd.fit_rate(found.radii, found.schur, kl=found.kl)


def test_parabola_against_a_point() -> None:
    """y - x² and (y, x²) have the same Fisher along x, 4t²; only the second keeps it."""
    fibre = at(lambda w: w[1] - w[0] ** 2, [0.0, 0.0], [1.0, 0.0])
    point = at(lambda w: torch.stack([w[1], w[0] ** 2]), [0.0, 0.0], [1.0, 0.0])
    for found in (fibre, point):
        torch.testing.assert_close(found.raw[0], 4 * RADII**2)
        assert found.line_orders.tolist() == [2.0]
    assert fibre.schur.abs().max() == 0 and fibre.kl.abs().max() == 0
    assert fibre.relaxed_orders.tolist() == [math.inf]
    torch.testing.assert_close(fibre.moved[0], RADII**2)
    torch.testing.assert_close(point.schur[0], 4 * RADII**2)
    torch.testing.assert_close(point.kl[0], RADII**4 / 2)
    torch.testing.assert_close(point.pointwise_order()[0], torch.full_like(RADII, 2.0))
    assert point.relaxed_orders.tolist() == [2.0]
    (raw,), (schur,) = fits(fibre)
    assert (raw.verdict, raw.integer_order) == ("resolved", 2)
    assert (schur.verdict, schur.order) == ("flat", math.inf)
    (raw,), (schur,) = fits(point)
    assert raw.integer_order == schur.integer_order == 2 and schur.verdict == "resolved"
    # ratio = 2 E[ab]²/E[a²]: 2 for a ∥ b and 0 for a ⊥ b; λ_g = 1.
    assert fibre.ratios.tolist() == pytest.approx([2.0])
    assert fibre.margins.tolist() == pytest.approx([4.0])
    assert fibre.verdicts[0].startswith("selection rule not met")
    assert "curved fibre" in fibre.verdicts[0]
    assert point.ratios.tolist() == pytest.approx([0.0])
    assert point.verdicts == ("transversal",)
    assert fibre.gram_floor == point.gram_floor == pytest.approx(1.0)


def test_the_straight_line_spoils_the_schur_complement() -> None:
    """(y - x², x(y - x²)): at (t, 0) it is t⁴/(1 + t²), on the fibre 0.

    J_x = (-2t, -3t²), J_y = (1, t) there: (det)²/|J_y|² = t⁴/(1 + t²).
    """

    def f(w: Tensor) -> Tensor:
        g = w[1] - w[0] ** 2
        return torch.stack([g, w[0] * g])

    straight = at(f, [0.0, 0.0], [1.0, 0.0], relax=False)
    torch.testing.assert_close(straight.schur[0], RADII**4 / (1 + RADII**2))
    torch.testing.assert_close(straight.raw[0], 4 * RADII**2 + 9 * RADII**4)
    assert straight.moved.abs().max() == 0 and not straight.relaxed
    relaxed = at(f, [0.0, 0.0], [1.0, 0.0])
    assert relaxed.schur.abs().max() == 0


def test_relaxing_changes_the_order() -> None:
    """(y - x², x³): raw 2, relaxed 3, exactly 9t⁴ as the relaxed point is (t, t²)."""
    found = at(lambda w: torch.stack([w[1] - w[0] ** 2, w[0] ** 3]), [0.0, 0.0], [1.0, 0.0])
    torch.testing.assert_close(found.schur[0], 9 * RADII**4, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.kl[0], RADII**6 / 2, rtol=1e-6, atol=0)
    assert found.relaxed_orders.tolist() == [3.0] and found.line_orders.tolist() == [2.0]
    (raw,), (schur,) = fits(found)
    assert (raw.integer_order, schur.integer_order) == (2, 3)


def test_hyperbola() -> None:
    """xy - 1 at (1, 1): along (1, -1) F = 2(t/√2 ...)² grows, the fibre is a curve."""
    found = at(lambda w: w[0] * w[1] - 1, [1.0, 1.0], [1.0, -1.0])
    torch.testing.assert_close(found.raw[0], RADII**2, rtol=1e-9, atol=0)  # f = -t²/2 on the line
    assert found.schur.abs().max() == 0
    assert found.relaxed_orders.tolist() == [math.inf]
    assert found.gram_floor == pytest.approx(2.0)
    assert found.margins.tolist() == pytest.approx([4.0])  # 2 (½ √2)²/¼ = 4 against λ_g/2 = 1


def test_the_rule_is_sufficient_only() -> None:
    """(y + x², c x²): of order 2 after relaxing for every c, the rule holds for c² > 3.

    a = (1, c), b = (1, 0): 2/(1 + c²) < ½.
    """
    for c, held in ((1.0, False), (1.7, False), (1.75, True)):
        found = at(
            lambda w, c=c: torch.stack([w[1] + w[0] ** 2, c * w[0] ** 2]), [0.0, 0.0], [1.0, 0.0]
        )
        assert found.ratios.tolist() == pytest.approx([2 / (1 + c * c)])
        assert (found.verdicts[0] == "transversal") is held
        assert found.relaxed_orders.tolist() == [2.0]
        torch.testing.assert_close(found.schur[0], 4 * c**2 * RADII**2)
        # The rule's promise: the smallest eigenvalue on (u, live) is at least half of F_uu.
        for t in RADII[:4]:
            j = torch.tensor([[2 * t, 1.0], [2 * c * t, 0.0]], dtype=D)
            smallest = torch.linalg.svdvals(j)[-1] ** 2
            assert not held or smallest >= 2 * t**2 * (1 + c * c) * (1 - 1e-3)


def test_both_sides_radius_zero_and_scaling() -> None:
    radii = torch.tensor([-0.1, 0.0, 0.1], dtype=D)
    found = dd.schur_curvature(
        Function(lambda w: torch.stack([w[1] - w[0] ** 2, w[0] ** 3]), [0.0, 0.0]),
        ONE,
        {"w": torch.tensor([[-5.0, 0.0]], dtype=D)},
        radii,
        likelihood="gaussian",
    )
    torch.testing.assert_close(found.schur[0], 9 * radii**4)
    torch.testing.assert_close(found.raw[0], 4 * radii**2 + 9 * radii**4)


def test_live_directions() -> None:
    found = at(lambda w: torch.stack([w[1], w[0] ** 2]), [0.0, 0.0], [0.0, 1.0], [1.0, 1.0])
    assert all(v.startswith("live") for v in found.verdicts)
    assert found.margins.isnan().all() and found.relaxed_orders.isnan().all()
    assert found.schur[0].abs().max() == 0


def test_nothing_live() -> None:
    found = at(lambda w: w[0] ** 3, [0.0], [1.0])
    assert (found.live, found.gram_floor, found.verdicts) == (0, math.inf, ("transversal",))
    assert found.margins.tolist() == [0.0]
    torch.testing.assert_close(found.schur, found.raw)


def test_kinks_are_unclear() -> None:
    found = at(lambda w: torch.stack([w[1], torch.relu(w[0]) ** 2]), [0.0, 0.0], [1.0, 0.0])
    assert found.verdicts[0].startswith("unclear")


def dense_schur(model: nn.Module, x: Tensor, live: Tensor, u: Tensor, theta: Tensor) -> float:
    """The Schur complement from a dense Fisher by autograd, for a Gaussian likelihood."""
    names = [k for k, _ in model.named_parameters()]
    shapes = [v.shape for _, v in model.named_parameters()]
    sizes = [s.numel() for s in shapes]

    def outputs(flat: Tensor) -> Tensor:
        parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        state = dict(zip(names, parts, strict=True))
        return torch.func.functional_call(model, state, x).reshape(-1)

    j = torch.func.jacrev(outputs)(theta) / len(x) ** 0.5
    fisher = j.T @ j
    across = live.T @ fisher @ u
    return float(u @ fisher @ u - across @ torch.linalg.solve(live.T @ fisher @ live, across))


@pytest.mark.parametrize("relax", [True, False])
def test_against_a_dense_fisher(relax: bool) -> None:
    """A tanh network with two equal units: same numbers from 𝐅 itself at the same point."""
    model = Tanh(2, 2)
    model.a.weight.data = torch.tensor([[0.8, -0.3], [0.8, -0.3]], dtype=D)
    model.b.weight.data = torch.tensor([[1.2, 0.7]], dtype=D)
    x = data(30, 2)
    dead = dd.dead_directions(model, x, likelihood="gaussian")
    some = [i for i, k in enumerate(dead.orders.tolist()) if k == 2]
    assert some
    radii = torch.tensor([0.3, 0.1], dtype=D)
    found = dd.schur_curvature(
        model, x, dead.select(some), radii, likelihood="gaussian", relax=relax
    )
    theta0 = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    null = torch.cat([v.reshape(len(dead), -1) for v in dead.directions.values()], 1)
    live = torch.linalg.svd(null, full_matrices=True)[2][len(dead) :].T
    for i, u in enumerate(null[some]):
        for r, t in enumerate(radii):
            theta = theta0 + t * u
            if relax:
                theta = minimum(model, x, live, theta)
            exact = dense_schur(model, x, live, u, theta)
            assert float(found.schur[i, r]) == pytest.approx(exact, rel=1e-6)
            assert float(found.raw[i, r]) == pytest.approx(
                float(dense_raw(model, x, u, theta0 + t * u)), rel=1e-9
            )


def dense_raw(model: nn.Module, x: Tensor, u: Tensor, theta: Tensor) -> float:
    empty = torch.zeros(len(u), 0, dtype=D)
    return dense_schur(model, x, empty, u, theta)


def minimum(model: nn.Module, x: Tensor, live: Tensor, theta: Tensor) -> Tensor:
    """Least squares over the live coordinates by scipy, to rounding."""
    names = [k for k, _ in model.named_parameters()]
    shapes = [v.shape for _, v in model.named_parameters()]
    sizes = [s.numel() for s in shapes]
    target = model(x).detach().reshape(-1)

    def outputs(flat: Tensor) -> Tensor:
        parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        state = dict(zip(names, parts, strict=True))
        return torch.func.functional_call(model, state, x).reshape(-1) - target

    found = least_squares(
        lambda y: outputs(theta + live @ torch.from_numpy(y)).detach().numpy(),
        torch.zeros(live.shape[1], dtype=D).numpy(),
        jac=lambda y: (
            torch.func.jacrev(outputs)(theta + live @ torch.from_numpy(y)) @ live
        ).numpy(),
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    return theta + live @ torch.from_numpy(found.x)


def test_reduced_rank_network() -> None:
    """A 2-2-2 linear network of rank 1: gauge orbits are curved, two directions are singular."""
    model, x = stratum(2, 2, 2, 1, 1, 1), data(20, 2)
    dead = dd.dead_directions(model, x, likelihood="gaussian")
    found = dd.schur_curvature(model, x, dead.directions, RADII, likelihood="gaussian")
    raw, schur = fits(found)
    assert found.relaxed_orders.tolist() == dead.orders.tolist()
    for kind, one, other, verdict in zip(dead.kinds, raw, schur, found.verdicts, strict=True):
        assert one.integer_order == 2
        assert other.order == pytest.approx(math.inf if kind == "gauge" else 2.0, abs=1e-6)
        assert other.resolved
        assert verdict.startswith("selection rule not met" if kind == "gauge" else "transversal")
    assert dead.count("gauge") == 3 and dead.count("singular") == 2


def test_tanh_network() -> None:
    """Two equal tanh units: one singular direction of order 2 and a straight fibre."""
    model, x = Tanh(1, 2), data(20, 1)
    model.a.weight.data.fill_(0.8)
    model.b.weight.data = torch.tensor([[1.2, 0.7]], dtype=D)
    dead = dd.dead_directions(model, x, likelihood="gaussian")
    found = dd.schur_curvature(model, x, dead.directions, RADII, likelihood="gaussian")
    assert dead.kinds == ("singular", "fibre")
    assert found.line_orders.tolist() == [2.0, math.inf]
    _, (singular, fibre) = fits(found)
    assert (singular.verdict, singular.integer_order) == ("resolved", 2)
    assert (fibre.verdict, fibre.order) == ("flat", math.inf)
    assert found.verdicts[1].startswith("flat")


def test_categorical_outputs() -> None:
    """A dead hidden unit of a softmax network: w_out · tanh(w_in x) with both zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)).double()
    model[0].weight.data[1] = 0.0
    model[2].weight.data[:, 1] = 0.0
    u = {"0.weight": torch.zeros(1, 2, 2, dtype=D), "2.weight": torch.zeros(1, 3, 2, dtype=D)}
    u["0.weight"][0, 1] = torch.tensor([0.6, -0.4], dtype=D)
    u["2.weight"][0, :, 1] = torch.tensor([0.5, -0.2, 0.1], dtype=D)
    x = data(40, 2)
    found = dd.schur_curvature(model, x, u, RADII)
    rays = dd.ray_curvature(model, x, u, RADII)
    torch.testing.assert_close(found.raw, rays.fisher, rtol=1e-8, atol=1e-25)
    assert found.relaxed_orders.tolist() == [2.0]
    (fit,) = dd.fit_rate(found.radii, found.schur, kl=found.kl)
    assert (fit.verdict, fit.integer_order) == ("resolved", 2)
    straight = dd.schur_curvature(model, x, u, RADII, relax=False)
    torch.testing.assert_close(straight.kl, rays.kl, rtol=1e-6, atol=1e-20)
    assert (found.kl <= straight.kl * (1 + 1e-9)).all()


def test_an_unconverged_point_is_nan() -> None:
    """sin cannot make up for a shift above 1: no live correction exists beyond it."""
    found = dd.schur_curvature(
        Function(lambda w: torch.sin(w[1]) - w[0] ** 2, [0.0, 0.0]),
        ONE,
        {"w": torch.tensor([[1.0, 0.0]], dtype=D)},
        [0.1, 0.5, 1.5],
        likelihood="gaussian",
    )
    assert found.schur[0, :2].tolist() == [0.0, 0.0]
    assert found.schur[0, 2].isnan() and found.kl[0, 2].isnan()
    assert found.raw.isfinite().all()


def test_arguments() -> None:
    model, x = linear_chain(2, 2, 1), data(5, 2)
    u = {"0.weight": torch.ones(1, 2, 2, dtype=D)}
    with pytest.raises((TypeError, ValueError), match="radii"):
        dd.schur_curvature(model, x, u, ["a"])
    with pytest.raises(ValueError, match="directions"):
        dd.schur_curvature(model, x, {"nope": u["0.weight"]}, [0.1], likelihood="gaussian")
    with pytest.raises(TypeError, match="relax"):
        dd.schur_curvature(model, x, u, [0.1], relax=1)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="max_order"):
        dd.schur_curvature(model, x, u, [0.1], likelihood="gaussian", max_order=1)
    with pytest.raises((TypeError, ValueError), match="likelihood"):
        dd.schur_curvature(model, x, u, [0.1], likelihood="gausian")


def test_a_triple_reports_the_rule_and_the_curvature() -> None:
    found = dd.read_triple(
        Function(lambda w: torch.stack([w[1] + w[0] ** 2, w[0] ** 2]), [0.0, 0.0]),
        ONE,
        likelihood="gaussian",
    )
    assert found.resolved and found.selection_margin == pytest.approx(2.0)
    assert any("0 of 1 singular lines" in text for text in found.rests_on)
    assert any("agrees along 1 of 1" in text for text in found.rests_on)
    plain = dd.read_triple(Function(lambda w: 2 * w, [0.0, 0.0]), ONE, likelihood="gaussian")
    assert plain.selection_margin != plain.selection_margin


def test_a_disagreement_flags_the_triple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curvatures of order 3 where the coefficients say 2."""

    def other(local: object, vector: Tensor, t: float, start: None) -> Point:
        return Point(9 * t**4, 9 * t**4, t**6 / 2, 1e-28, 1e-28, vector)

    monkeypatch.setattr(cross_check, "schur_point", other)
    f = Function(lambda w: torch.stack([w[1], w[0] ** 2]), [0.0, 0.0])
    found = dd.read_triple(f, ONE, likelihood="gaussian")
    assert not found.resolved and found.rlct != found.rlct
    assert "reads k=3.00" in found.verdict
    assert (found.lower, found.upper) == (0.5, 1)
    assert found.fluctuation_verdict.startswith("unresolved")
