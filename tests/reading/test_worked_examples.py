"""Functions with known (λ, m): read right, or unresolved with bounds that contain the truth."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from truth.worked_examples import EXAMPLES, Example, as_model

from deaddir_fast import read_triple
from deaddir_fast.theory import singular_fluctuation
from reading.functions import ONE, Function, holds, read, turn

torch.set_num_threads(1)
BY_NUMBER = {e.number: e for e in EXAMPLES}
OPEN = {19, 20}  # no rule decides them
BENT = {8, 17, *OPEN}  # nor these in curved coordinates
Q = Fraction


@pytest.mark.parametrize(
    "example",
    [pytest.param(e, marks=[pytest.mark.slow] if e.number == 19 else []) for e in EXAMPLES],
    ids=lambda e: str(e.number),
)
def test_straight(example: Example) -> None:
    model, inputs = as_model(example)
    resolved = holds(
        read_triple(model, inputs, likelihood="gaussian"), example.rlct, example.multiplicity
    )
    assert resolved or example.number in OPEN


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bend", [0.0, 0.2], ids=["rotated", "warped"])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: str(e.number))
def test_other_coordinates(example: Example, bend: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = example.dim
    curve = bend * torch.randn(d, d, d, generator=generator, dtype=torch.float64)
    frame = turn(d, seed)

    def moved(v: Tensor) -> Tensor:
        bent = torch.einsum("ijk,j,k->i", curve, v, v)
        return example.function(example.w0 + frame @ v + bent)

    resolved = holds(read(moved, [0.0] * d), example.rlct, example.multiplicity)
    assert resolved or example.number in (BENT if bend else OPEN)


@pytest.mark.parametrize("number", [5, 8, 10, 12, 14, 17, 18])
def test_rotated(number: int) -> None:
    example = BY_NUMBER[number]
    model, inputs = as_model(example, turn(example.dim, 4))
    found = read_triple(model, inputs, likelihood="gaussian")
    assert holds(found, example.rlct, example.multiplicity)


@pytest.mark.parametrize(("one", "other"), [(1, 2), (9, 11), (15, 16)])
def test_pairs_are_told_apart(one: int, other: int) -> None:
    found = [read_triple(*as_model(BY_NUMBER[k]), likelihood="gaussian") for k in (one, other)]
    assert found[0].rlct != found[1].rlct


def test_rotation_is_seen_through() -> None:
    """9 and 10 are the same curve: same λ, and directions that differ by the rotation."""
    straight, rotated = (
        read_triple(*as_model(BY_NUMBER[k]), likelihood="gaussian") for k in (9, 10)
    )
    assert (straight.rlct, straight.multiplicity) == (rotated.rlct, rotated.multiplicity)


def test_crossing_depends_on_the_point() -> None:
    """(xy)²: 1/2 twice at the crossing, once on a branch, where the other direction is live."""
    at_origin = read(lambda w: w[0] * w[1], [0.0, 0.0])
    on_branch = read(lambda w: w[0] * w[1], [1.0, 0.0])
    assert (at_origin.rlct, at_origin.multiplicity, at_origin.rank) == (Q(1, 2), 2, 0)
    assert (on_branch.rlct, on_branch.multiplicity, on_branch.rank) == (Q(1, 2), 1, 1)
    assert on_branch.fluctuation == pytest.approx(0.5)
    assert on_branch.fluctuation_verdict == "resolved"
    assert at_origin.fluctuation_verdict != "resolved"


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_one_direction(k: int) -> None:
    """x^k: λ = 1/(2k), with the universal fluctuation of that order."""
    found = read(lambda w: w[0] ** k, [0.0])
    assert holds(found, Q(1, 2 * k), 1)
    assert found.fluctuation == pytest.approx(singular_fluctuation(k), rel=1e-10)
    assert found.directions.kinds == ("singular",)
    assert found.directions.orders.tolist() == [k]


# Terms beyond the order that is looked for: never a confident wrong number.
HIGH: list[tuple[str, Callable[[Tensor], Tensor], int, Fraction, int]] = [
    ("x^9", lambda w: w[0] ** 9, 1, Q(1, 18), 1),
    ("x^10", lambda w: w[0] ** 10, 1, Q(1, 20), 1),
    ("x^20", lambda w: w[0] ** 20, 1, Q(1, 40), 1),
    ("1-cos(x^6)", lambda w: 1 - torch.cos(w[0] ** 6), 1, Q(1, 24), 1),
    ("small x^10", lambda w: 1e-8 * w[0] ** 10, 1, Q(1, 20), 1),
    ("x y^10", lambda w: w[0] * w[1] ** 10, 2, Q(1, 20), 1),
    ("x², y^10", lambda w: torch.stack([w[0] ** 2, w[1] ** 10]), 2, Q(3, 10), 1),
    ("x²-y^10", lambda w: w[0] ** 2 - w[1] ** 10, 2, Q(3, 10), 1),
    ("x², y^20", lambda w: torch.stack([w[0] ** 2, w[1] ** 20]), 2, Q(11, 40), 1),
    ("(x-y²)², y^10", lambda w: torch.stack([(w[0] - w[1] ** 2) ** 2, w[1] ** 10]), 2, Q(3, 10), 1),
    ("(x-y²)²-y^12", lambda w: (w[0] - w[1] ** 2) ** 2 - w[1] ** 12, 2, Q(7, 24), 1),
    ("x-y², y^10", lambda w: torch.stack([w[0] - w[1] ** 2, w[1] ** 10]), 2, Q(11, 20), 1),
    ("xy, z^10", lambda w: torch.stack([w[0] * w[1], w[2] ** 10]), 3, Q(11, 20), 2),
    ("xy+z^10", lambda w: w[0] * w[1] + w[2] ** 10, 3, Q(1, 2), 1),
    ("x²-y²z+z^9", lambda w: w[0] ** 2 - w[1] ** 2 * w[2] + w[2] ** 9, 3, Q(1, 2), 1),
    ("x²-y²z+yz^9", lambda w: w[0] ** 2 - w[1] ** 2 * w[2] + w[1] * w[2] ** 9, 3, Q(1, 2), 1),
    ("x(y-z)+y^9", lambda w: w[0] * (w[1] - w[2]) + w[1] ** 9, 3, Q(1, 2), 1),
    ("x²+y²+z^10", lambda w: w[0] ** 2 + w[1] ** 2 + w[2] ** 10, 3, Q(11, 20), 1),
]


@pytest.mark.parametrize(("name", "f", "d", "rlct", "m"), HIGH, ids=[h[0] for h in HIGH])
def test_orders_beyond_the_highest(
    name: str, f: Callable[[Tensor], Tensor], d: int, rlct: Fraction, m: int
) -> None:
    holds(read(f, [0.0] * d), rlct, m)


KINKS: list[tuple[str, Callable[[Tensor], Tensor], int, Fraction]] = [
    ("relu(x)", lambda w: torch.relu(w[0]), 1, Q(0)),
    ("relu(-x)", lambda w: torch.relu(-w[0]), 1, Q(0)),
    ("clamp", lambda w: w[0].clamp(0, 1), 1, Q(0)),
    ("relu(x), y", lambda w: torch.stack([torch.relu(w[0]), w[1]]), 2, Q(1, 2)),
    ("relu(x+y)", lambda w: torch.relu(w[0] + w[1]), 2, Q(0)),
    ("relu(x-y)", lambda w: torch.relu(w[0] - w[1]), 2, Q(0)),
    ("relu(x)²", lambda w: torch.relu(w[0]) ** 2, 1, Q(0)),
    ("max(x,y)", lambda w: torch.maximum(w[0], w[1]), 2, Q(1, 2)),
    ("|x|³", lambda w: w[0].abs() ** 3, 1, Q(1, 6)),
    ("x³ | x²", lambda w: torch.where(w[0] > 0, w[0] ** 3, w[0] ** 2), 1, Q(1, 6)),
    ("amax", lambda w: w.amax(), 3, Q(1, 2)),
]


@pytest.mark.parametrize(("name", "f", "d", "rlct"), KINKS, ids=[k[0] for k in KINKS])
def test_kinks(name: str, f: Callable[[Tensor], Tensor], d: int, rlct: Fraction) -> None:
    """K vanishes on half of a line under relu: λ = 0. Kinks are read right or not resolved."""
    holds(read(f, [0.0] * d), rlct, 1)


SCALES: list[tuple[str, Callable[[Tensor], Tensor], int, Fraction, int]] = [
    ("x⁴+y⁴", lambda w: (1e4 * w[0]) ** 4 + w[1] ** 4, 2, Q(1, 4), 1),
    ("x²-y⁴", lambda w: 1e6 * ((1e3 * w[0]) ** 2 - (0.1 * w[1]) ** 4), 2, Q(3, 8), 1),
    (
        "x⁴, x²y, xy³, y⁶",
        lambda w: torch.stack(
            [
                (1e3 * w[0]) ** 4,
                (1e3 * w[0]) ** 2 * w[1] / 10,
                1e3 * w[0] * (w[1] / 10) ** 3,
                (w[1] / 10) ** 6,
            ]
        ),
        2,
        Q(3, 10),
        1,
    ),
    (
        "x⁴, y⁴, z⁴",
        lambda w: torch.stack([(1e3 * w[0]) ** 4, w[1] ** 4, (1e-2 * w[2]) ** 4]),
        3,
        Q(3, 8),
        1,
    ),
    (
        "x²+y²+z²",
        lambda w: (1e4 * w[0]) ** 2 + w[1] ** 2 + (1e-4 * w[2]) ** 2,
        3,
        Q(3, 4),
        1,
    ),
]


@pytest.mark.parametrize(("name", "f", "d", "rlct", "m"), SCALES, ids=[s[0] for s in SCALES])
def test_units_of_parameters(
    name: str, f: Callable[[Tensor], Tensor], d: int, rlct: Fraction, m: int
) -> None:
    holds(read(f, [0.0] * d), rlct, m)


@pytest.mark.parametrize("eps", [1e-4, 1e-7, 1e-9])
def test_small_coefficients(eps: float) -> None:
    holds(read(lambda w: w[0] ** 2 - eps * w[1] ** 4, [0.0, 0.0]), Q(3, 8), 1)
    holds(read(lambda w: w[0] ** 2 + eps * w[1] ** 2, [0.0, 0.0]), Q(1, 2), 1)
    holds(read(lambda w: torch.stack([w[0], eps * w[1] ** 3]), [0.0, 0.0]), Q(2, 3), 1)
    holds(read(lambda w: w[0] ** 3 + eps * w[0] ** 2, [0.0]), Q(1, 4), 1)


def test_flat_to_all_orders() -> None:
    found = read(lambda w: 0 * w[0] * w[1], [0.0, 0.3])
    assert holds(found, Q(0), 1)
    assert set(found.directions.kinds) <= {"fibre", "gauge"}


def test_nothing_dead() -> None:
    found = read(lambda w: w * 2, [0.3, -1.0, 2.0])
    assert holds(found, Q(3, 2), 1)
    assert found.fluctuation == pytest.approx(1.5)
    assert len(found.directions) == 0


def test_prior_and_temperature() -> None:
    """A prior |x|^h: λ = (1 + h)/(2k); β moves ν and leaves λ alone."""
    model = Function(lambda w: w[0] ** 2, [0.0])
    for h in (0, 1, 4):
        found = read_triple(model, ONE, likelihood="gaussian", prior_exponent=h)
        assert found.rlct == Q(1 + h, 4)
        assert found.fluctuation == pytest.approx(singular_fluctuation(2, h=h), rel=1e-10)
    cold = read_triple(model, ONE, likelihood="gaussian", beta=3.0)
    assert cold.rlct == Q(1, 4)
    assert cold.fluctuation == pytest.approx(singular_fluctuation(2, beta=3.0), rel=1e-10)
