"""The classified null space of the exact Fisher."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deaddir_fast as dd
from reading.functions import ONE, Function

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
D = torch.float64


def found(f: Callable[[Tensor], Tensor], point: list[float]) -> dd.DeadDirections:
    return dd.dead_directions(Function(f, point), ONE, likelihood="gaussian")


def test_basis_is_the_null_space() -> None:
    """Orthonormal, killed by the dense Fisher, and complete."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    x = torch.randn(40, 2, dtype=D)
    result = dd.dead_directions(model, x, likelihood="categorical")
    vectors = torch.cat([v.reshape(len(result), -1) for v in result.directions.values()], 1)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(result), dtype=D))
    state = {k: v.detach() for k, v in model.named_parameters()}
    rows = torch.func.jacrev(lambda s: torch.func.functional_call(model, s, x))(state)
    jacobian = torch.cat([rows[k].flatten(2) for k in state], -1)
    p = model(x).softmax(-1).detach()
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("nci,ncd,ndj->ij", jacobian, metric, jacobian) / len(x)
    assert float((fisher @ vectors.T).abs().max()) < 1e-12 * float(fisher.abs().max())
    assert torch.linalg.matrix_rank(fisher, hermitian=True) == result.rank
    assert result.rank + len(result) == result.dimension
    torch.testing.assert_close(
        result.singular_values[: result.rank].square(),
        torch.linalg.eigvalsh(fisher).flip(0)[: result.rank],
        rtol=1e-6,
        atol=1e-14,
    )


def test_kinds() -> None:
    """(x², y³, 0·z): two singular directions with their orders and a fibre."""
    result = found(lambda w: torch.stack([w[0] ** 2, w[1] ** 3 + 0 * w[2]]), [0.0] * 3)
    assert sorted(result.kinds) == ["fibre", "singular", "singular"]
    assert result.verdict == "resolved"
    by_order = {float(k): v for k, v in zip(result.orders, result.directions["w"], strict=True)}
    for order, axis in ((2.0, 0), (3.0, 1), (math.inf, 2)):
        assert abs(float(by_order[order][axis])) == pytest.approx(1.0)


def test_counts_on_the_quotient() -> None:
    """Two ReLU units on one input: what is dead, and what of it the rescalings do not explain."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model = model.double()
    model[0].weight.data = torch.ones(2, 1, dtype=D)
    model[2].weight.data = torch.tensor([[1.0, 2.0]], dtype=D)
    counts = dd.dead_directions(model, ONE.new_ones(3, 1), likelihood="gaussian").counts
    # f = (a1 b1 + a2 b2) x: of 4 parameters one direction is live, two are orbits, one is flat
    assert (counts.total, counts.gauge, counts.quotient) == (3, 2, 1)
    assert (counts.fibre, counts.singular, counts.unresolved) == (1, 0, 0)
    said = "3 dead: gauge 2, 1 on the quotient (fibre 1, singular 0, unresolved 0)"
    assert str(counts) == said
    mixed = found(lambda w: torch.stack([w[0] ** 2, w[1] ** 3 + 0 * w[2]]), [0.0] * 3).counts
    assert (mixed.total, mixed.gauge, mixed.quotient, mixed.singular) == (3, 0, 3, 2)


def test_curved_fibre() -> None:
    """y = x²: the straight line has order 2, the fibre itself is flat."""
    result = found(lambda w: w[1] - w[0] ** 2, [0.0, 0.0])
    assert result.kinds == ("fibre",)
    assert result.line_orders.tolist() == [2.0]
    assert result.orders.tolist() == [math.inf]


def test_singular_after_relaxing() -> None:
    """(y − x², x³): the line has order 2 and what is left 3."""
    result = found(lambda w: torch.stack([w[1] - w[0] ** 2, w[0] ** 3]), [0.0, 0.0])
    assert result.kinds == ("singular",)
    assert (result.orders.tolist(), result.line_orders.tolist()) == ([3.0], [2.0])


def test_order_above_the_highest_is_not_a_confident_fibre() -> None:
    for f in (
        lambda w: w[0] ** 10,
        lambda w: torch.stack([w[0] ** 10, w[1]]),
        lambda w: torch.stack([w[0] ** 10, w[1] ** 2]),
    ):
        result = found(f, [0.0, 0.0])
        kinds = dict(zip(result.kinds, result.directions["w"], strict=True))
        flat = [v for k, v in kinds.items() if k == "fibre" and abs(float(v[0])) > 0.5]
        assert not flat or result.verdict != "resolved"


@pytest.mark.parametrize(
    "f",
    [
        lambda w: torch.relu(w[0]) + 0 * w[1],
        lambda w: torch.relu(w[0] + w[1]),
        lambda w: torch.relu(w[0]) * w[1],
        lambda w: w[0].abs() * w[1],
    ],
)
def test_kinks_are_not_resolved(f: Callable[[Tensor], Tensor]) -> None:
    assert found(f, [0.0, 0.0]).verdict.startswith("unresolved: ")


def test_symmetries_are_gauge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    result = dd.dead_directions(model, torch.randn(30, 2, dtype=D), likelihood="gaussian")
    # GL(3) acts on rank-2 factors with 9 tangents, the stabiliser being trivial only up to rank.
    assert result.count("gauge") == len(result) == 12 - 4
    assert result.gauges


def test_categorical_shift_is_gauge_only_there() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    x = torch.randn(30, 2, dtype=D)
    assert dd.dead_directions(model, x, likelihood="categorical").kinds == ("gauge",) * 3
    assert len(dd.dead_directions(model, x, likelihood="gaussian")) == 0


def test_rank_grows_with_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    few = dd.dead_directions(model, torch.randn(4, 5, dtype=D), likelihood="gaussian")
    assert (few.rank, few.rank_half, few.rows) == (4, 2, 4)
    many = dd.dead_directions(model, torch.randn(80, 5, dtype=D), likelihood="gaussian")
    assert many.rank == many.rank_half == many.dimension == 22


def test_all_and_none_dead() -> None:
    result = found(lambda w: 0 * w, [0.5, -0.5])
    assert (result.rank, len(result)) == (0, 2)
    result = found(lambda w: 3 * w, [0.5, -0.5])
    assert (result.rank, len(result)) == (2, 0)
    assert result.directions["w"].shape == (0, 2)


def test_rounding_of_a_computed_direction_is_no_order() -> None:
    """Equal tanh units: b_1 - b_2 is a straight fibre, known to the digits of the split only."""

    def f(w: Tensor) -> Tensor:
        x = torch.linspace(-1, 2, 7, dtype=D)
        return w[2] * torch.tanh(w[0] * x) + w[3] * torch.tanh(w[1] * x)

    result = found(f, [0.8, 0.8, 1.2, 0.7])
    assert result.kinds == ("singular", "fibre")
    assert result.line_orders.tolist() == [2.0, math.inf]


def test_select() -> None:
    result = found(lambda w: torch.stack([w[0] ** 2, w[1] ** 3]), [0.0, 0.0])
    part: dict[str, Tensor] = result.select([0])
    assert part["w"].shape == (1, 2)
    assert result.count("singular") == 2
