"""Random singularities of known (λ, m): right, or flagged with bounds that contain the truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from truth.random_singularities import Case, crossing_case, monomial_case

from reading.functions import holds, read

torch.set_num_threads(1)


def resolved(make: Callable[[int], Case], seeds: range) -> int:
    """How many of them are resolved; all of them hold."""
    cases = [make(seed) for seed in seeds]
    return sum(holds(read(c.function, [0.0] * c.dim), c.rlct, c.multiplicity) for c in cases)


def test_monomial_ideals() -> None:
    assert resolved(monomial_case, range(6)) >= 5


def test_crossings() -> None:
    assert resolved(crossing_case, range(6)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_two_hundred_monomial_ideals(block: int) -> None:
    assert resolved(monomial_case, range(20 * block, 20 * block + 20)) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("block", range(5))
def test_hundred_crossings(block: int) -> None:
    assert resolved(crossing_case, range(20 * block, 20 * block + 20)) >= 16
