"""The arithmetic of orders against loops over entries, and against numbers at small t."""

import math

import pytest
import torch

from deaddir_fast.rates.tropical import (
    INF,
    Germ,
    clamp_germ,
    contract,
    fold,
    plus,
    power_germ,
    pull,
    pull_product,
    through,
)

NAN = math.nan


def _orders(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([0.0, 1.0, 2.0, 3.5, INF], dtype=torch.float64)
    return choices[torch.randint(len(choices), shape, generator=generator)]


@pytest.mark.parametrize("seed", range(5))
def test_matrix_product_is_min_plus(seed):
    a, b = _orders(3, 4, seed=seed), _orders(4, 5, seed=seed + 100)
    expected = (a[:, :, None] + b[None]).amin(1)
    assert torch.equal(contract(torch.mm, a, b, expected), expected)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_a_product_are_min_plus_with_the_transpose(seed):
    b, g = _orders(4, 5, seed=seed), _orders(3, 5, seed=seed + 50)
    expected = (g[:, None, :] + b[None]).amin(2)
    assert torch.equal(pull_product(torch.mm, g, b, (3, 4)), expected)


@pytest.mark.parametrize("seed", range(3))
def test_sums_and_their_transpose(seed):
    x = _orders(3, 4, seed=seed)
    assert torch.equal(through(lambda v: v.sum(1), x, x.sum(1)), x.amin(1))
    g = _orders(3, seed=seed + 9)
    assert torch.equal(pull(lambda v: v.sum(1), g, (3, 4)), g[:, None].expand(3, 4))


def test_an_exact_zero_stays_one_whatever_it_meets():
    a, b = torch.tensor([INF, INF, 1.0]), torch.tensor([-2.0, INF, -1.0])
    assert plus(a, b).tolist() == [INF, INF, 0.0]


def test_what_is_not_known_is_not_lost():
    a = torch.tensor([[NAN, 1.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.zeros(2, 1, dtype=torch.float64)
    found = contract(torch.mm, a, b, torch.zeros(2, 1))
    assert math.isnan(found[0, 0])
    assert found[1, 0] == 0
    assert math.isnan(through(lambda v: v.sum(1), a, a.sum(1))[0])
    assert math.isnan(pull(lambda v: v.sum(1), a[:, 0], (2, 2))[0, 0])


def test_fold_takes_the_smallest_over_broadcast_axes():
    x = _orders(2, 3, 4, seed=1)
    assert torch.equal(fold(x, (3, 1)), x.amin(0).amin(1, keepdim=True))


FUNCTIONS = [
    (torch.tanh, Germ(1)),
    (torch.relu, Germ(1)),
    (torch.nn.functional.gelu, Germ(1)),
    (torch.exp, Germ(1, constant=True)),
    (torch.cos, Germ(2, constant=True)),
    (lambda x: x**3, power_germ(3)),
    (torch.sqrt, power_germ(0.5)),
    (torch.rsqrt, power_germ(-0.5)),
    (lambda x: x.clamp(-1, 1), clamp_germ(-1, 1)),
    (lambda x: x.clamp(min=0), clamp_germ(0, None)),
    (lambda x: x.clamp(0.5, 1), clamp_germ(0.5, 1)),
]


@pytest.mark.parametrize(("function", "germ"), FUNCTIONS)
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_functions_start_as_they_say(function, germ, order):
    """Log-log slopes of φ(t^v) and φ'(t^v) between two small t."""
    t = torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    x = (1.3 * t**order).requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    at = torch.tensor([order], dtype=torch.float64)

    def rate(v):
        low, high = v.detach().abs().tolist()
        return INF if low == high == 0 else math.log(high / low) / math.log(10)

    assert rate(y) == pytest.approx(float(germ.value(at)), abs=0.02)
    assert rate(slope) == pytest.approx(float(germ.slope(at)), abs=0.02)


def test_a_logarithm_has_no_power():
    assert math.isnan(Germ(1, singular=True).value(torch.tensor([1.0]))[0])
    assert Germ(1, singular=True).value(torch.tensor([0.0]))[0] == 0
