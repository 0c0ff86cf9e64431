"""Likelihoods on a network's outputs: Fisher quadratic forms, divergences, labels and scores.

Index letters: ``c`` classes or outputs, always the last dimension; ``...`` any leading dimensions
(samples, tokens, points), broadcast against each other. Outputs ``z`` are natural parameters:
logits (categorical, Bernoulli), means (Gaussian), log-rates (Poisson), so that the Fisher of the
outputs H(z) is also the Hessian of the loss in z.

Divergences take the *difference* of two outputs, because a difference of nearby outputs cannot be
recovered from the outputs; every term summed is non-negative, so a divergence of 1e-30 keeps its
relative accuracy. (Our choice; the identities are textbook exponential-family ones.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deaddir_fast import _check


def exp_remainder(x: Tensor) -> Tensor:
    """e^x - 1 - x >= 0 elementwise, to a few units in the last place everywhere."""
    # Coefficients 2 x^k / (k + 2)!: enough of them for |x| < 1/2.
    terms = 13 if x.dtype == torch.float64 else 7
    series = torch.ones_like(x)
    for k in range(terms, 0, -1):
        series.mul_(x).mul_(1.0 / (k + 2)).add_(1.0)
    series.mul_(x).mul_(x).mul_(0.5)
    small = x.abs() < 0.5
    if bool(small.all()):
        return series
    return torch.where(small, series, torch.expm1(x) - x)


def _multiply_sum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


class Likelihood(ABC):
    """p(y | z) for outputs z; subclass it to add a likelihood of your own.

    Attributes:
        name: what reports call it.
    """

    name: str = "likelihood"

    @abstractmethod
    def whiten(self, z: Tensor, dz: Tensor) -> Tensor:
        """(..., c), (..., c) -> (..., c): e linear in ``dz`` with |e|^2 = dz^T H(z) dz."""

    @abstractmethod
    def kl(self, z: Tensor, delta: Tensor) -> Tensor:
        """(..., c), (..., c) -> (...,): KL(p(.|z) || p(.|z + delta)), exact near 0."""

    @abstractmethod
    def noise(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random numbers that determine labels; reuse them for nearby outputs (common noise)."""

    @abstractmethod
    def label(self, z: Tensor, noise: Tensor) -> Tensor:
        """Labels distributed as p(.|z) when ``noise`` is drawn by :meth:`noise`."""

    @abstractmethod
    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """(..., c), labels -> (..., c): d log p(y|z) / dz."""

    def fisher(self, z: Tensor, dz: Tensor) -> Tensor:
        """(..., c), (..., c) -> (...,): dz^T H(z) dz, summed over the last dimension only."""
        e = self.whiten(z, dz)
        return _multiply_sum(e, e)

    def project(self, dz: Tensor) -> Tensor:
        """``dz`` without the part the likelihood cannot see."""
        return dz

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels drawn from p(.|z)."""
        return self.label(z, self.noise(z, generator))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _uniform(shape: torch.Size, z: Tensor, generator: torch.Generator | None) -> Tensor:
    device = z.device if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator).to(z.device)


class Categorical(Likelihood):
    """Softmax over the last dimension; labels are class indices of shape (...)."""

    name = "categorical"

    @staticmethod
    def _centre(p: Tensor, z: Tensor, x: Tensor) -> Tensor:
        # Relative to the likeliest class first: its own deviation is then a sum of the small
        # others and not a rounded difference, which keeps saturated samples accurate.
        top = z.argmax(-1, keepdim=True)
        if top.ndim != x.ndim or top.shape[:-1] != x.shape[:-1]:
            top = top.expand(*x.shape[:-1], 1)
        x = x - x.gather(-1, top)
        return x.sub_((p * x).sum(-1, keepdim=True))

    def fisher(self, z: Tensor, dz: Tensor) -> Tensor:
        """Var over y ~ softmax(z) of dz_y: (...,)."""
        z, dz = torch.broadcast_tensors(z, dz)
        p = torch.softmax(z, -1)
        d = self._centre(p, z, dz)
        return d.square_().mul_(p).sum(-1)

    def whiten(self, z: Tensor, dz: Tensor) -> Tensor:
        """sqrt(p) (dz - sum p dz): (..., c)."""
        p = torch.softmax(z, -1)
        shape = torch.broadcast_shapes(z.shape, dz.shape)
        return p.sqrt() * self._centre(p, z, dz.expand(shape))

    def kl(self, z: Tensor, delta: Tensor) -> Tensor:
        """log1p(sum p (e^d - 1 - d)) with d centred under p: every term is non-negative."""
        p = torch.softmax(z, -1)
        delta = delta.expand(torch.broadcast_shapes(z.shape, delta.shape))
        d = self._centre(p, z, delta)
        # Beyond this exponent e^d overflows although p e^d need not.
        limit = 80.0 if d.dtype != torch.float64 else 700.0
        large = (d > limit).any(-1)
        if not bool(large.any()):
            return torch.log1p(_multiply_sum(p, exp_remainder(d)))
        direct = torch.logsumexp(torch.log_softmax(z, -1) + d, -1)
        exact = torch.log1p(_multiply_sum(p, exp_remainder(d.clamp(max=limit))))
        return torch.where(large, direct, exact)

    def project(self, dz: Tensor) -> Tensor:
        """``dz`` minus its mean over classes (softmax does not see a common shift)."""
        return dz - dz.mean(-1, keepdim=True)

    def noise(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers of shape (...)."""
        return _uniform(z.shape[:-1], z, generator)

    def label(self, z: Tensor, noise: Tensor) -> Tensor:
        """Class indices (...) by inverting the cumulative distribution."""
        return self.label_of(torch.softmax(z, -1), noise)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """onehot(y) - p, with 1 - p_y as the sum of the other probabilities."""
        return self.score_of_(torch.softmax(z, -1), y)

    @staticmethod
    def label_of(p: Tensor, noise: Tensor) -> Tensor:
        """Class indices (...) from probabilities (..., c)."""
        cumulative = p.cumsum(-1, dtype=torch.float64)
        limit = noise.unsqueeze(-1) * cumulative[..., -1:]
        shape = torch.broadcast_shapes(cumulative.shape[:-1], limit.shape[:-1])
        cumulative = cumulative.expand(*shape, p.shape[-1]).contiguous()
        found = torch.searchsorted(cumulative, limit.expand(*shape, 1).contiguous()).squeeze(-1)
        return found.clamp_(max=p.shape[-1] - 1)  # of NaN it is c

    @staticmethod
    def score_of_(p: Tensor, y: Tensor) -> Tensor:
        """Scores (..., c) in the place of probabilities."""
        index = y.expand(p.shape[:-1]).unsqueeze(-1)
        p.scatter_(-1, index, 0.0)
        rest = p.sum(-1, keepdim=True)
        return p.neg_().scatter_(-1, index, rest)


class Gaussian(Likelihood):
    """Independent normal outputs with mean z and a given variance; labels have the shape of z.

    Args:
        variance: a positive number, or a tensor of shape (c,) (or one that broadcasts to it).
    """

    name = "gaussian"

    def __init__(self, variance: float | Tensor = 1.0) -> None:
        if isinstance(variance, Tensor):
            if not bool(((variance > 0) & torch.isfinite(variance)).all()):
                raise _check.fail("variance", variance, "finite positive entries")
            self.variance: float | Tensor = variance.detach()
        else:
            self.variance = _check.positive("variance", variance)

    def _of(self, z: Tensor) -> Tensor | float:
        v = self.variance
        return v.to(z.device, z.dtype) if isinstance(v, Tensor) else v

    def whiten(self, z: Tensor, dz: Tensor) -> Tensor:
        """dz / sqrt(variance)."""
        return dz.expand(torch.broadcast_shapes(z.shape, dz.shape)) / self._of(z) ** 0.5

    def kl(self, z: Tensor, delta: Tensor) -> Tensor:
        """|delta|^2 / (2 variance)."""
        return self.fisher(z, delta) / 2

    def noise(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers of the shape of z."""
        device = z.device if generator is None else generator.device
        return torch.randn(z.shape, dtype=z.dtype, device=device, generator=generator).to(z.device)

    def label(self, z: Tensor, noise: Tensor) -> Tensor:
        """z + sqrt(variance) noise."""
        return z + self._of(z) ** 0.5 * noise

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """(y - z) / variance."""
        return (y - z) / self._of(z)

    def __repr__(self) -> str:
        return f"Gaussian(variance={self.variance})"


class Bernoulli(Likelihood):
    """Independent binary outputs with logits z; labels have the shape of z."""

    name = "bernoulli"

    def whiten(self, z: Tensor, dz: Tensor) -> Tensor:
        """sqrt(p (1 - p)) dz."""
        return (torch.sigmoid(z) * torch.sigmoid(-z)).sqrt() * dz

    def kl(self, z: Tensor, delta: Tensor) -> Tensor:
        """log1p(p R((1-p) delta) + (1-p) R(-p delta)), R(x) = e^x - 1 - x, summed over c."""
        p, q = torch.sigmoid(z), torch.sigmoid(-z)
        up, down = q * delta, -p * delta
        limit = 80.0 if up.dtype != torch.float64 else 700.0
        large = torch.maximum(up, down) > limit
        exact = torch.log1p(
            p * exp_remainder(up.clamp(max=limit)) + q * exp_remainder(down.clamp(max=limit))
        )
        if bool(large.any()):
            one, zero = F.logsigmoid(z) + up, F.logsigmoid(-z) + down
            exact = torch.where(large, torch.logaddexp(one, zero), exact)
        return exact.sum(-1)

    def noise(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers of the shape of z."""
        return _uniform(z.shape, z, generator)

    def label(self, z: Tensor, noise: Tensor) -> Tensor:
        """1 where the noise is below p."""
        return (noise < torch.sigmoid(z.double())).to(z.dtype)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """y - p, formed without cancellation: y (1 - p) - (1 - y) p."""
        return y * torch.sigmoid(-z) - (1 - y) * torch.sigmoid(z)


class Poisson(Likelihood):
    """Independent counts with log-rates z; labels have the shape of z."""

    name = "poisson"

    def whiten(self, z: Tensor, dz: Tensor) -> Tensor:
        """e^(z/2) dz."""
        return torch.exp(z / 2) * dz

    def kl(self, z: Tensor, delta: Tensor) -> Tensor:
        """e^z (e^delta - 1 - delta), summed over c."""
        return _multiply_sum(torch.exp(z), exp_remainder(delta))

    def noise(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Uniform numbers of the shape of z."""
        return _uniform(z.shape, z, generator)

    def label(self, z: Tensor, noise: Tensor) -> Tensor:
        """Counts by inverting the cumulative distribution."""
        from scipy.stats import poisson  # slow to import and only needed here

        counts = poisson.ppf(noise.cpu().numpy(), torch.exp(z.double()).cpu().numpy())
        return torch.as_tensor(counts).to(z.device, z.dtype)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        """y - rate."""
        return y - torch.exp(z)


_NAMED: dict[str, type[Likelihood]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
}


def get(likelihood: Any) -> Likelihood:
    """A :class:`Likelihood` from its name or from an instance.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    names = ", ".join(repr(name) for name in _NAMED)
    if isinstance(likelihood, str):
        if likelihood not in _NAMED:
            raise _check.fail("likelihood", likelihood, f"one of {names} or a Likelihood")
        return _NAMED[likelihood]()
    raise _check.fail("likelihood", likelihood, f"one of {names} or a Likelihood", TypeError)
