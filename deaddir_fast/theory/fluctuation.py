"""Watanabe's singular fluctuation of one direction of order k."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import prior_exponent

Array = NDArray[np.float64]

LARGEST_BETA = 1e6  # the cost grows as sqrt(beta); beyond, use fluctuation_limits
LARGEST_RLCT = 100  # the rule below resolves log-widths down to 1/(2 sqrt(100))
FAR = 16.0  # |Z| from where the mass near s = 0 is below exp(-FAR²/4) of the bump at Z/2
CHUNK = 256  # values of Z at a time


def _checked(k: int, h: int | Fraction, two_sided: bool) -> tuple[int, Fraction, bool]:
    """Order, threshold (h+1)/(2k), and whether both signs of s = η^k occur."""
    k = _check.integer("k", k, 1)
    exponent = prior_exponent("h", h)
    if not isinstance(two_sided, bool):
        raise _check.fail("two_sided", two_sided, "True or False", TypeError)
    rlct = (exponent + 1) / (2 * k)
    if rlct > LARGEST_RLCT:
        raise _check.fail("h", h, f"(h + 1) / (2 k) at most {LARGEST_RLCT}")
    return k, rlct, two_sided and k % 2 == 1


def _near(z: Array, rlct: float, both: bool) -> Array:
    """Var s under |s|^(2λ-1) exp(z s - s²) by a double-exponential rule on s = exp(τ - exp(-τ)).

    The map turns the integrable singularity at 0 and the Gaussian tail into double-exponential
    decay, where the trapezoidal rule converges geometrically. All terms are positive and the
    weights are normalised before the central moments are taken, so nothing cancels.
    """
    tau = np.arange(-math.log(40 / min(rlct, 0.04)), 4.0, 0.015)  # weight exp(-80) at the left
    log_s = tau - np.exp(-tau)
    s = np.exp(log_s)
    log_weight = 2 * rlct * log_s + np.log1p(np.exp(-tau)) - s * s
    if both:
        s, log_weight = np.concatenate([-s, s]), np.concatenate([log_weight, log_weight])
    exponent = log_weight + z[:, None] * s
    weight = np.exp(exponent - exponent.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    mean = weight @ s
    return np.asarray((weight * (s - mean[:, None]) ** 2).sum(1))


def _far(z: Array, rlct: float) -> Array:
    """Var s for z >= FAR by the trapezoidal rule around the mode, of width about 1/sqrt(2)."""
    power = 2 * rlct - 1
    mode = (0.25 * (z + np.sqrt(z * z + 8 * power)))[:, None]
    v = np.arange(-7.0, 7.0, 0.1)
    log_weight = power * np.log1p(v / mode) + (z[:, None] - 2 * mode) * v - v * v
    weight = np.exp(log_weight)
    weight /= weight.sum(1, keepdims=True)
    mean = weight @ v
    return np.asarray((weight * (v - mean[:, None]) ** 2).sum(1))


def _variance(z: Array, rlct: float, both: bool) -> Array:
    """Var s under |s|^(2λ-1) exp(z s - s²), on the line or on s > 0, for every z."""
    result = np.empty_like(z)
    for start in range(0, len(z), CHUNK):
        part = z[start : start + CHUNK]
        part = np.abs(part) if both else part
        far = part >= FAR
        value = np.empty_like(part)
        value[far] = _far(part[far], rlct)
        value[~far] = _near(part[~far], rlct, both)
        result[start : start + CHUNK] = value
    return result


def singular_fluctuation(
    k: int, *, beta: float = 1.0, h: int | Fraction = 0, two_sided: bool = True
) -> float:
    """Singular fluctuation nu(β) of one direction with K = c η^(2k) and prior |η|^h.

    nu = E_Z Var_{π_Z}[η^k] with π_Z(η) ∝ |η|^h exp(Z η^k - η^(2k)) and Z ~ N(0, 2β): the scaling
    limit of the posterior at inverse temperature β (Watanabe 2009, 2018), c and n having been
    scaled out. With y = η^k / sqrt(β) the same number is β E_ξ Var[y] under
    |y|^(2λ-1) exp(-β y² + β ξ y), ξ ~ N(0, 2), λ = (h+1)/(2k). The functional variance tends to
    2nu/β and the Gibbs loss to λ/β + nu; texts that call half the limit of the functional variance
    the fluctuation mean nu/β.

    nu is not a function of λ alone: for odd k on a two-sided domain η^k takes both signs and nu is
    larger; for even k, or where the domain is η > 0, only s = η^k > 0 occurs.

    Args:
        k: KL order >= 1.
        beta: inverse temperature, 0 < beta <= 1e6.
        h: prior (or Jacobian) exponent > -1, an integer or a Fraction.
        two_sided: whether the parameter has a neighbourhood on both sides of 0.

    Returns:
        nu with an absolute error below 1e-8 (measured below 1e-12 for k <= 12, 0.01 <= beta <= 10).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    k, rlct, both = _checked(k, h, two_sided)
    beta = _check.positive("beta", beta)
    if beta > LARGEST_BETA:
        raise _check.fail("beta", beta, f"at most {LARGEST_BETA:g} (see fluctuation_limits)")
    # Var has its nearest complex poles at |Im Z| about 1 for small λ and π/(2 sqrt(λ)) for large λ,
    # so this step leaves the trapezoidal rule at rounding level.
    spread = math.sqrt(2 * beta)
    step = min(0.2, 0.1 / (spread * max(1.0, 2 * math.sqrt(rlct))))
    count = math.ceil(9.0 / step)
    x: Array = step * np.arange(-count, count + 1, dtype=np.float64)
    density = np.exp(-0.5 * x * x)
    variance = _variance(spread * x, float(rlct), both)
    return float((density * variance).sum() / density.sum())


def fluctuation_limits(
    k: int, *, h: int | Fraction = 0, two_sided: bool = True
) -> tuple[float, float]:
    """nu(β) as β -> 0 and as β -> ∞.

    β -> 0: the variance at Z = 0, which is λ with both signs of η^k and λ - (Γ(λ+½)/Γ(λ))² with
    one. β -> ∞: ½ with both signs, ¼ with one, whatever k is. Arguments and errors as in
    ``singular_fluctuation``.
    """
    k, exact, both = _checked(k, h, two_sided)
    rlct = float(exact)
    if both:
        return rlct, 0.5
    return rlct - math.exp(2 * (math.lgamma(rlct + 0.5) - math.lgamma(rlct))), 0.25
