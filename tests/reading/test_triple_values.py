"""What a triple predicts: the quartet, other temperatures, and what a sampler reports."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import deaddir_fast as dd
from reading.functions import ONE, Function, read

torch.set_num_threads(1)


def test_quartet_of_a_regular_model() -> None:
    found = read(lambda w: w * 2, [0.3, -1.0, 2.0])
    q = found.quartet()
    assert (q.bayes_generalisation, q.bayes_training, q.gibbs_training) == pytest.approx(
        (1.5, -1.5, 0.0), abs=1e-12
    )
    assert found.quartet(2.0).gibbs_generalisation == pytest.approx(1.5 / 2 + 1.5)


@pytest.mark.parametrize("beta", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("k", [2, 3])
def test_one_live_and_one_singular_direction(k: int, beta: float) -> None:
    """(y, x^k): sums over both, at the temperature read or another."""
    model = Function(lambda w: torch.stack([w[1], w[0] ** k]), [0.0, 0.0])
    found = dd.read_triple(model, ONE, likelihood="gaussian", beta=beta)
    assert (found.beta, found.singular) == (beta, ((k, 0),))
    nu = 0.5 + dd.theory.singular_fluctuation(k, beta=beta)
    assert found.fluctuation == pytest.approx(nu, rel=1e-12)
    rlct = 0.5 + 1 / (2 * k)
    assert vars(found.quartet()) == pytest.approx(vars(dd.theory.quartet(rlct, nu, beta)))
    other = dd.read_triple(model, ONE, likelihood="gaussian")
    assert vars(other.quartet(beta)) == pytest.approx(vars(found.quartet()))
    for reference in ("population", "truth", "minimum"):
        exact = sum(
            dd.theory.sampled_estimate(order, 1e12, beta=beta, reference=reference)
            for order in (1, k)
        )
        assert found.sampled_estimate(reference=reference) == pytest.approx(exact, abs=1e-9)
        assert other.sampled_estimate(beta, reference=reference) == pytest.approx(exact, abs=1e-9)


def test_nothing_to_learn() -> None:
    found = read(lambda w: 0 * w[0] * w[1], [0.0, 0.3])
    assert set(vars(found.quartet()).values()) == {0.0}
    assert found.sampled_estimate() == 0.0


def test_what_is_not_resolved_is_not_predicted() -> None:
    crossing = read(lambda w: w[0] * w[1], [0.0, 0.0])
    assert crossing.sampled_estimate(reference="population") == 0.5
    for call in (crossing.quartet, crossing.sampled_estimate, crossing.fluctuation_at):
        with pytest.raises(ValueError, match=r"triple: expected a resolved ν.*correlated"):
            call()
    kinked = read(lambda w: torch.relu(w[0]), [0.0])
    with pytest.raises(ValueError, match=r"triple: expected a resolved λ.*kink"):
        kinked.sampled_estimate(reference="population")
    with pytest.raises(ValueError, match="triple: expected a resolved ν"):
        kinked.quartet()


def test_errors_name_the_argument() -> None:
    found = read(lambda w: w[0] ** 2, [0.0])
    for bad in (0.0, -1.0, math.nan, math.inf):
        for call in (found.quartet, found.sampled_estimate, found.fluctuation_at):
            with pytest.raises(ValueError, match=r"^beta: "):
                call(bad)
    with pytest.raises(ValueError, match=r"^reference: "):
        found.sampled_estimate(reference="mean")


@pytest.mark.parametrize(("p", "q"), [(2, 3), (3, 4)])
def test_crossing_branches_have_no_confident_fluctuation(p: int, q: int) -> None:
    """K = |a|²|b|² in p + q variables, turned: λ = min(p, q)/2 from one blow-up and the fibre.

    ν depends on how the singular directions meet: it is not r/2.
    """
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(p + q, p + q, dtype=torch.float64, generator=draw)).Q

    def f(w: Tensor) -> Tensor:
        v = turn @ w
        return torch.outer(v[:p], v[p:]).flatten()

    found = read(f, [0.0] * (p + q))
    assert found.resolved
    assert (found.rlct, found.multiplicity) == (Fraction(min(p, q), 2), 1)
    assert found.fluctuation != found.fluctuation
    assert found.fluctuation_verdict.startswith("unresolved")
    with pytest.raises(ValueError, match="ν"):
        found.quartet()
