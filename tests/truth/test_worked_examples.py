"""The worked examples against closed forms and against sampled volumes."""

import math
from fractions import Fraction

import pytest
import torch

from deaddir_fast import theory
from truth.worked_examples import EXAMPLES, as_model

BY_NUMBER = {e.number: e for e in EXAMPLES}
HALF = Fraction(1, 2)

CLOSED_FORMS = {
    1: theory.additive([2, 1]),
    2: theory.additive([1, math.inf]),  # y - x^2 is a coordinate
    3: theory.additive([2, math.inf]),
    4: theory.additive([1, math.inf]),
    5: theory.normal_crossing([1, 1]),
    6: theory.normal_crossing([1, 2]),
    7: theory.arrangement([(1, 0), (0, 1), (1, -1)]),
    8: theory.normal_crossing([1, 1, 1]),
    9: theory.monomial_ideal([(3, 0), (0, 2)]),  # non-degenerate: the polyhedron decides below 1/2
    10: theory.monomial_ideal([(3, 0), (0, 2)]),
    11: theory.monomial_ideal([(2, 0), (0, 4)]),
    12: theory.monomial_ideal([(2, 0), (1, 1), (0, 4)]),
    13: theory.monomial_ideal([(1, 1), (0, 3)]),
    14: theory.normal_crossing([2], [1]),  # polar coordinates: r^4 with Jacobian r
    15: theory.normal_crossing([2], [2]),
    16: theory.normal_crossing([2, 1], [2, 0]),  # blow-up: r^4 g^2 with g smooth on the sphere
    # x = y x': y^4 (x'^2 - z)^2 with Jacobian y
    17: theory.normal_crossing([2, 1], [1, 0]),
    18: theory.monomial_ideal([(1, 0, 0), (0, 1, 1)]),
    19: theory.odd_two_layer(2),
    20: theory.reduced_rank_regression(2, 2, 2, 0),
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: str(e.number))
def test_closed_form(example):
    assert (example.rlct, example.multiplicity) == CLOSED_FORMS[example.number]
    assert isinstance(example.rlct, Fraction)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: str(e.number))
def test_models(example):
    generator = torch.Generator().manual_seed(example.number)
    noise = torch.randn(example.dim, example.dim, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(noise)
    plain, inputs = as_model(example)
    turned, _ = as_model(example, rotation)
    assert plain(inputs).shape[0] == inputs.shape[0] == 1
    assert plain(inputs).abs().max() < 1e-15 and turned(inputs).abs().max() < 1e-15
    step = torch.randn(example.dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        plain.w += rotation @ step
        turned.w += step
    torch.testing.assert_close(turned(inputs), plain(inputs))
    torch.testing.assert_close(plain(inputs)[0], example.function(example.w0 + rotation @ step))
    assert plain(inputs).abs().max() > 1e-6
    (gradient,) = torch.autograd.grad(turned(inputs).sum(), list(turned.parameters()))
    assert gradient.shape == (example.dim,) and gradient.dtype == torch.float64


def test_the_rotated_cusp_is_the_cusp():
    half = math.sqrt(0.5)
    w = torch.tensor([0.3, -0.7], dtype=torch.float64)
    turned = torch.stack([half * (w[0] + w[1]), half * (w[1] - w[0])])
    torch.testing.assert_close(BY_NUMBER[10].function(w), BY_NUMBER[9].function(turned))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: str(e.number))
def test_sampled_volume(example):
    """Slope of log vol{K < ε} over the box of side 1 around w0, its log factor taken out."""
    generator = torch.Generator().manual_seed(0)
    function = torch.func.vmap(example.function)
    values = []
    for _ in range(12):
        u = torch.rand(200_000, example.dim, generator=generator, dtype=torch.float64) - 0.5
        values.append(0.5 * (function(example.w0 + u) ** 2).sum(1))
    k = torch.cat(values).sort().values
    few, many = 400, 20_000
    small, large = math.log(k[few]), math.log(k[many])
    slope = math.log(many / few) / (large - small)
    slope += (example.multiplicity - 1) * math.log(small / large) / (large - small)
    assert abs(slope - float(example.rlct)) < 0.06 * max(1.0, float(example.rlct))
