"""Weighted curves: known best weights, validity in any coordinates, and errors."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import Tensor
from truth.random_singularities import crossing_case, monomial_case, monomials
from truth.worked_examples import EXAMPLES, as_model

from deaddir_fast import WeightedBound, weighted_bound
from deaddir_fast.theory import monomial_ideal
from reading.functions import ONE, Function

Q = Fraction
CUSP = Function(lambda w: w[1] ** 2 - w[0] ** 3, [0.0, 0.0])


def bound(
    f: Callable[[Tensor], Tensor], d: int, frame: Tensor | None = None, **options: object
) -> WeightedBound:
    axes = torch.eye(d, dtype=torch.float64) if frame is None else frame
    model = Function(f, [0.0] * d)
    return weighted_bound(model, ONE, {"w": axes}, likelihood="gaussian", **options)


def test_cusp_in_both_coordinates() -> None:
    """(y² − x³)²: 5/12 in its own coordinates; turned by 45° the axes give 1/2 and no more."""
    found = bound(lambda w: w[1] ** 2 - w[0] ** 3, 2)
    assert (found.upper, found.weights, found.order) == (Q(5, 12), (2, 3), 6)
    assert found.verdict == "certified"
    half = 0.5**0.5

    def turned(w: Tensor) -> Tensor:
        x, y = half * (w[0] + w[1]), half * (w[1] - w[0])
        return y**2 - x**3

    assert bound(turned, 2).upper == Q(1, 2)
    frame = half * torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    found = bound(turned, 2, frame)
    assert (found.upper, found.weights) == (Q(5, 12), (2, 3))


def test_tacnode() -> None:
    found = bound(lambda w: w[0] ** 2 - w[1] ** 4, 2)
    assert (found.upper, found.weights, found.order) == (Q(3, 8), (2, 1), 4)


def test_parabola_is_only_bounded() -> None:
    """(y − x²)²: the truth is 1/2; weights in x and y give 3/4."""
    found = bound(lambda w: w[1] - w[0] ** 2, 2)
    assert (found.upper, found.weights) == (Q(3, 4), (1, 2))


def test_given_weights() -> None:
    """One weight vector: its own value, whatever is better."""
    found = bound(lambda w: w[1] ** 2 - w[0] ** 3, 2, weights=(1, 1))
    assert (found.upper, found.order, found.tried) == (Q(1, 2), 2, 1)
    found = bound(lambda w: w[1] ** 2 - w[0] ** 3, 2, weights=[3, 4])
    assert (found.upper, found.order) == (Q(7, 16), 8)


def test_prior() -> None:
    """|x|^h on the cusp: weights (2, 3) give (2 (h + 1) + 3)/12."""
    found = bound(lambda w: w[1] ** 2 - w[0] ** 3, 2, weights=(2, 3), prior_exponent=(2, 0))
    assert found.upper == Q(9, 12)
    same = bound(lambda w: w[1] ** 2 - w[0] ** 3, 2, weights=(2, 3), prior_exponent=1)
    assert same.upper == Q(10, 12)


def test_directions_left_out_count_one_half() -> None:
    """x² + z²: along x alone 1/4, and 1/2 for z."""
    model = Function(lambda w: torch.stack([w[0] ** 2, w[1]]), [0.0, 0.0])
    one = {"w": torch.tensor([[1.0, 0.0]], dtype=torch.float64)}
    found = weighted_bound(model, ONE, one, likelihood="gaussian")
    assert (found.upper, found.complement, found.weights) == (Q(3, 4), 1, (1,))


def test_order_beyond_the_highest() -> None:
    """What is flat to order 6 has order 7 at least."""
    found = bound(lambda w: w[0] ** 9, 1, max_order=6)
    assert (found.upper, found.order) == (Q(1, 14), 7)
    assert bound(lambda w: w[0] ** 9, 1, max_order=9).upper == Q(1, 18)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18])
def test_never_below_the_truth(number: int) -> None:
    example = next(e for e in EXAMPLES if e.number == number)
    model, inputs = as_model(example)
    (name, value), *_ = model.named_parameters()
    axes = torch.eye(value.numel(), dtype=torch.float64).reshape(-1, *value.shape)
    found = weighted_bound(model, inputs, {name: axes}, likelihood="gaussian")
    assert found.upper >= example.rlct


def test_random_cases() -> None:
    """Never below the truth, and never below the linear programme of a monomial ideal."""
    for seed in range(12):
        for case in (monomial_case(seed), crossing_case(seed)):
            assert bound(case.function, case.dim).upper >= case.rlct


def test_attains_the_linear_programme() -> None:
    """Monomial ideals whose best weights are small."""
    for corners in ([(2, 0), (0, 3)], [(4, 0), (1, 1), (0, 4)], [(2, 1, 0), (0, 2, 2), (3, 0, 1)]):
        best = monomial_ideal(corners).rlct
        found = bound(partial(monomials, corners), len(corners[0]), max_order=16)
        assert best <= found.upper < best * Q(6, 5)
    assert bound(lambda w: torch.stack([w[0] ** 2, w[1] ** 3]), 2).upper == Q(5, 12)


def test_kink_is_not_certified() -> None:
    assert bound(lambda w: torch.relu(w[0]) ** 2, 1).verdict.startswith("not certified: ")


def test_no_taylor_series() -> None:
    with pytest.raises(ValueError, match="model: its outputs have no finite Taylor"):
        bound(lambda w: torch.sqrt(w[0] ** 4 + w[1] ** 4), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1,)}, "weights: expected 2 entries"),
        ({"weights": (0, 1)}, r"weights\[0\]: expected an integer >= 1"),
        ({"weights": 3}, "weights: expected a sequence"),
        ({"max_order": 0}, "max_order: expected an integer >= 1"),
        ({"prior_exponent": -1}, "prior_exponent: expected an integer >= 0"),
        ({"prior_exponent": (1, 2, 3)}, "prior_exponent: expected an integer or 2"),
        ({"directions": {"v": torch.eye(2)}}, "directions: no parameter called 'v'"),
        ({"directions": {"w": torch.ones(2, 2)}}, "directions: expected linearly independent"),
        ({"directions": {"w": torch.zeros(1, 2)}}, "directions: direction 0 has norm 0"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"directions": {"w": torch.eye(2)}, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        weighted_bound(CUSP, ONE, likelihood="gaussian", **given)
