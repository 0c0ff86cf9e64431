"""Divergence between categorical outputs, exact near zero: KL(softmax(z) || softmax(z + delta)).

Index letters: n samples, c classes, q points along a ray; logits is (n, c), logits_t is (q, n, c).

With x = delta - E_p[delta] the divergence is

    log E_p[e^x] = log1p( sum_y p_y (e^x_y - 1 - x_y) )

and every term of the sum is positive, so a value of 1e-30 has all its digits, given the
delta = logits_t - logits that the two tensors represent. The difference of log-likelihoods loses
everything below the rounding of the logits. e^x - 1 - x is its power series near 0, and
e^(log p + x) - p (1 + x) where e^x alone might overflow; a sum above e^50 is taken in the log.

A class with logit -inf has probability 0. It may be so in both, it may gain mass in logits_t; if
it loses all of its mass there, the divergence is inf.

Bound: about 40 q n c FLOP, q n c elements read.

Source: the identity is elementary; the paper (Dead Directions, arXiv 2606.05957) asks for KL along
rays whose order it reads.
"""

from __future__ import annotations

from math import factorial

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation, blocks
from deaddir_fast.ops._dispatch import call
from deaddir_fast.ops.softmax_fisher import centred, check

#: 1/2!, 1/3!, ...: e^x - 1 - x = x^2 (1/2! + x/3! + ...), to fp64 rounding for |x| <= 1/2.
SERIES = tuple(1 / factorial(k) for k in range(2, 17))


def reference(logits: Tensor, logits_t: Tensor) -> Tensor:
    """Return the divergence for each point in plain torch."""
    dtype = accumulation(logits, logits_t)
    q, n, c = logits_t.shape
    if n == 0:
        return logits_t.new_empty((q, n), dtype=dtype)
    z = logits.to(dtype)
    parts = [
        _divergence(z, logits_t[some].to(dtype)) for some in blocks(q, 8 * n * c * dtype.itemsize)
    ]
    return torch.cat(parts)


def _divergence(z: Tensor, moved: Tensor) -> Tensor:
    normaliser = torch.logsumexp(z, 1, keepdim=True)
    log_probability = z - normaliser
    probability = log_probability.exp()
    likeliest = z.argmax(1, keepdim=True)
    absent = (z == -torch.inf).expand_as(moved)
    lost = (moved == -torch.inf) & ~absent

    delta = torch.where(absent | lost, torch.zeros_like(moved), moved - z)
    x = centred(delta, probability, likeliest)
    shift = (delta - x).gather(-1, likeliest.expand(delta.shape[0], -1, -1))
    exponent = torch.where(absent, moved - normaliser - shift, log_probability + x)

    small = probability * _excess(x.clamp(max=1.0))
    large = exponent.exp() - probability * (1 + x)
    terms = torch.where(x <= 1, small, large)
    terms = torch.where(absent, exponent.exp(), terms)
    divergence = torch.where(
        exponent.amax(-1) > 50, torch.logsumexp(exponent, -1), terms.sum(-1).log1p()
    )
    return divergence + torch.where(lost.any(-1), torch.inf, 0.0)


def _excess(x: Tensor) -> Tensor:
    """Return e^x - 1 - x to full relative accuracy for x <= 1."""
    near = x.abs() <= 0.5
    y = torch.where(near, x, torch.zeros_like(x))
    series = torch.full_like(y, SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        series = series * y + coefficient
    return torch.where(near, series * y.square(), torch.expm1(x) - x)


def fake(logits: Tensor, logits_t: Tensor) -> Tensor:
    """Shape and dtype of the result."""
    return logits_t.new_empty(logits_t.shape[:2], dtype=accumulation(logits, logits_t))


def softmax_kl(logits: Tensor, logits_t: Tensor) -> Tensor:
    """Return KL(softmax(logits) || softmax(logits_t)), accurate however small.

    Args:
        logits: (n, c), c >= 1; -inf is a class of probability 0.
        logits_t: (q, n, c), the logits at q points.

    Returns:
        (q, n), never negative, in nats; fp64 if any input is, else fp32 (16-bit inputs are widened
        first). The relative error is a few roundings, given the difference of the two arguments.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, shape, dtype or device.
        RuntimeError: a tensor requires grad; no gradient is defined.
    """
    check("logits_t", logits, logits_t)
    return call("softmax_kl", logits, logits_t)
