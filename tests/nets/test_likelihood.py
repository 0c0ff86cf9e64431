"""Likelihoods against high-precision arithmetic, autograd and sums over labels."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from deaddir_fast.nets import likelihood as lk

torch.set_num_threads(1)
getcontext().prec = 80


def _exact_kl_categorical(z: list[float], delta: list[float]) -> float:
    a = [Decimal(x) for x in z]
    b = [Decimal(x) + Decimal(d) for x, d in zip(z, delta, strict=True)]
    za, zb = sum(x.exp() for x in a), sum(x.exp() for x in b)
    return float(sum((x.exp() / za) * (x - y) for x, y in zip(a, b, strict=True)) + (zb / za).ln())


@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1e-4, 0.3, 3.0, 60.0, 900.0])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_categorical_kl_matches_80_digits(scale: float, spread: float) -> None:
    g = torch.Generator().manual_seed(0)
    z = spread * torch.randn(6, dtype=torch.float64, generator=g)
    delta = scale * torch.randn(6, dtype=torch.float64, generator=g)
    got = lk.Categorical().kl(z, delta).item()
    want = _exact_kl_categorical(z.tolist(), delta.tolist())
    assert want > 0
    assert got == pytest.approx(want, rel=2e-13)


def test_categorical_fisher_of_a_saturated_sample_is_relatively_accurate() -> None:
    # p = (1 - e, e): variance e (1 - e) d^2, with e far below the rounding of 1.
    z = torch.tensor([0.0, -100.0], dtype=torch.float64)
    dz = torch.tensor([0.3, 1.7], dtype=torch.float64)
    e = math.exp(-100.0)
    assert lk.Categorical().fisher(z, dz).item() == pytest.approx(e * 1.4**2, rel=1e-13)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 0.7, 20.0])
def test_bernoulli_and_poisson_kl_match_80_digits(scale: float) -> None:
    for z0, sign in ((-3.0, 1), (0.2, -1), (40.0, 1), (40.0, -1)):
        z = torch.tensor([z0], dtype=torch.float64)
        delta = torch.tensor([sign * scale], dtype=torch.float64)
        got = lk.Bernoulli().kl(z, delta).item()
        want = _exact_kl_categorical([z0, 0.0], [delta.item(), 0.0])
        assert got == pytest.approx(want, rel=1e-13)
        d = Decimal(delta.item())
        want = float(Decimal(z0).exp() * (d.exp() - 1 - d))
        assert lk.Poisson().kl(z, delta).item() == pytest.approx(want, rel=1e-13)


def test_gaussian_kl_and_fisher() -> None:
    z = torch.zeros(2, 3, dtype=torch.float64)
    delta = torch.tensor([1e-15, 2e-15, -2e-15], dtype=torch.float64)
    lik = lk.Gaussian(variance=0.5)
    torch.testing.assert_close(
        lik.kl(z, delta),
        torch.full((2,), 9e-30, dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )
    torch.testing.assert_close(lik.fisher(z, delta), 2 * lik.kl(z, delta), rtol=1e-15, atol=0)
    per_output = lk.Gaussian(torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64))
    want = torch.tensor(1 + 1 + 2.0, dtype=torch.float64) * 1e-30
    torch.testing.assert_close(per_output.fisher(z[0], delta), want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["categorical", "gaussian", "bernoulli", "poisson"])
def test_fisher_whiten_and_curvature_of_kl_agree(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(4, 5, dtype=torch.float64, generator=g)
    dz = torch.randn(3, 4, 5, dtype=torch.float64, generator=g)
    lik = lk.get(name)
    f = lik.fisher(z, dz)
    assert f.shape == (3, 4)
    torch.testing.assert_close(f, lik.whiten(z, dz).square().sum(-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(f, lik.fisher(z, lik.project(dz)), rtol=1e-12, atol=0)
    t = 1e-9
    torch.testing.assert_close(2 * lik.kl(z, t * dz) / t**2, f, rtol=1e-7, atol=0)
    linear = lik.whiten(z, 2 * dz[0] - 3 * dz[1])
    torch.testing.assert_close(linear, 2 * lik.whiten(z, dz[0]) - 3 * lik.whiten(z, dz[1]))


def _log_density(name: str, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if name == "categorical":
        return torch.log_softmax(z, -1).gather(-1, y[..., None]).sum()
    if name == "gaussian":
        return -0.5 * (y - z).square().sum()
    if name == "bernoulli":
        return torch.distributions.Bernoulli(logits=z).log_prob(y).sum()
    return torch.distributions.Poisson(z.exp()).log_prob(y).sum()


@pytest.mark.parametrize("name", ["categorical", "gaussian", "bernoulli", "poisson"])
def test_scores_are_gradients_and_their_second_moment_is_the_fisher(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    z0 = torch.randn(3, dtype=torch.float64, generator=g)
    draws = 200_000
    z = z0.expand(draws, 3)
    lik = lk.get(name)
    y = lik.sample(z, g)
    score = lik.score(z, y)
    probe = z[:50].clone().requires_grad_()
    (grad,) = torch.autograd.grad(_log_density(name, probe, y[:50]), probe)
    torch.testing.assert_close(score[:50], grad, rtol=1e-12, atol=1e-14)
    dz = torch.randn(3, dtype=torch.float64, generator=g)
    squares = (score @ dz).square()
    error = (squares.mean() - lik.fisher(z0, dz)).abs()
    assert error < 5 * squares.std() / draws**0.5


def test_common_noise_couples_labels() -> None:
    g = torch.Generator().manual_seed(3)
    z = torch.randn(1000, 4, dtype=torch.float64, generator=g)
    lik = lk.Categorical()
    noise = lik.noise(z, g)
    near = lik.label(z + 1e-9 * torch.randn(1000, 4, dtype=torch.float64, generator=g), noise)
    assert torch.equal(near, lik.label(z, noise))


def test_get_refuses_what_it_does_not_know() -> None:
    assert isinstance(lk.get(lk.Gaussian(2.0)), lk.Gaussian)
    with pytest.raises(ValueError, match="likelihood: expected one of 'categorical'"):
        lk.get("cauchy")
    with pytest.raises(TypeError, match="likelihood"):
        lk.get(3)
    for bad in (0.0, -1.0, float("inf"), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="variance"):
            lk.Gaussian(bad)
