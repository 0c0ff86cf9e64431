"""What a sampler's estimate of λ tends to, so that an LLC can be compared with λ itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import orders
from deaddir_fast.theory.volume import VolumeLaw, volume_law

Array = NDArray[np.float64]

REFERENCES = ("population", "truth", "minimum")
LARGEST_BETA = 1e3  # the nodes grow as sqrt(beta),
LARGEST_RATE = 100  # and as the largest (h_i + 1)/(2 k_i)
REACH = 9.0  # standard deviations of the noise: what is left out is below 1e-18
NODES = 16  # Gauss-Legendre nodes a panel
TAIL = 80.0  # log(1/K) beyond the posterior's scale where sqrt(n β K) is below exp(-40)
CUT = 750.0  # exp(-CUT) is zero


def sampled_estimate(
    k: int | Sequence[int],
    n: float,
    *,
    beta: float | None = None,
    h: int | Sequence[int | Fraction] | None = None,
    scale: float = 0.5,
    two_sided: bool = True,
    reference: str = "minimum",
) -> float:
    """Return the expectation of a sampler's estimate n β (<L_n> - L_n(w*)) of λ, at finite n.

    Exact, by integration over posterior and data sets, for the model x ~ N(g(w), 1) with
    g = sqrt(2 scale) ∏ w_i^(k_i) at the truth g = 0, so K = scale ∏ w_i^(2 k_i), with w on the box
    [-1, 1]^d (or [0, 1]^d) and prior ∏ |w_i|^h_i. WBIC and SGLD estimators of the local learning
    coefficient are of this form, without their sampling error. β multiplies n L_n; it is no
    learning rate. Independent directions (each with outputs of its own) add.

    As n grows at fixed β the estimate tends to

    * ``"population"``: λ, like λ - (m-1)/log(n β): the sampler runs on the expected loss;
    * ``"truth"``: λ - β nu(β) (w* the true parameter; L_n the training loss);
    * ``"minimum"``: λ - β nu(β) + β/2 where g takes both signs, + β/4 where it takes one (w* the
      minimum of the training loss on the box, as at a trained checkpoint).

    For a regular direction the last is 1/2 at every β; a singular one is over- or underestimated.
    The limits are derived from Watanabe's equations of state (2009, 2018), nu being
    ``singular_fluctuation``; the integral over V(ε) of ``volume_law`` is our choice.

    Args:
        k: (d,) orders >= 0 of a normal crossing, or one order.
        n: number of samples, > 0 (> 1 if ``beta`` is left out).
        beta: inverse temperature in (0, 1e3]; 1/log n (WBIC) by default.
        h: (d,) prior exponents > -1, integers or Fractions; flat prior if ``None``.
        scale: K at the corner of the box, > 0. On [-a, a]^d it is c a^(2 Σ k_i).
        two_sided: whether the box reaches to both sides of w = 0.
        reference: ``"population"``, ``"truth"`` or ``"minimum"``.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    checked = orders("k", k, 0)
    law = volume_law(checked, h)
    if law.terms[-1][0] > LARGEST_RATE:
        raise _check.fail("h", h, f"(h_i + 1) / (2 k_i) at most {LARGEST_RATE}")
    n = _check.positive("n", n)
    if beta is None:
        if n <= 1:
            raise _check.fail("n", n, "a number above 1 where beta is 1/log n")
        beta = 1 / math.log(n)
    beta = _check.positive("beta", beta)
    if beta > LARGEST_BETA:
        raise _check.fail("beta", beta, f"at most {LARGEST_BETA:g}")
    size = n * beta * _check.positive("scale", scale)
    if not isinstance(two_sided, bool):
        raise _check.fail("two_sided", two_sided, "True or False", TypeError)
    _check.choice("reference", reference, REFERENCES)
    both = two_sided and any(v % 2 for v in checked)
    spread = 0.0 if reference == "population" else math.sqrt(2 * beta)
    mean = _mean(law, size, spread, both)
    return mean + _depth(size, spread, both) if reference == "minimum" else mean


def _mean(law: VolumeLaw, size: float, spread: float, both: bool) -> float:
    """E_Z of the posterior mean of s² - Z s, s = ±sqrt(n β K), Z ~ N(0, spread²).

    The prior of t = log(K(corner)/K) has density -dV/dt; s² - Z s is n β (L_n - L_n(w0)).
    """
    farthest = REACH * spread
    t, weight = _panels(size, farthest, float(law.terms[-1][0]))
    prior = np.array([math.exp(-v) * law.density(math.exp(-v)) for v in t])
    # K beyond the last node is zero to rounding and only adds its prior mass.
    end = max(math.log(size), 0.0) + TAIL
    s = np.append(np.exp(0.5 * (math.log(size) - t)), 0.0)
    with np.errstate(divide="ignore"):
        log_weight = np.log(np.append(weight * prior, law(math.exp(-end))))
    if both:
        s, log_weight = np.concatenate([-s, s]), np.concatenate([log_weight, log_weight])
    if spread == 0:
        return float(_posterior_mean(s, log_weight, np.zeros(1))[0])
    # The mean varies with Z over a unit; the trapezoidal rule is then exact to rounding.
    step = min(0.1, 0.1 / spread)
    count = math.ceil(REACH / step)
    x = step * np.arange(-count, count + 1, dtype=np.float64)
    density = np.exp(-0.5 * x * x)
    means = np.concatenate(
        [
            _posterior_mean(s, log_weight, part)
            for part in np.array_split(spread * x, 1 + count // 64)
        ]
    )
    return float((density * means).sum() / density.sum())


def _posterior_mean(s: Array, log_weight: Array, z: Array) -> Array:
    """Mean of s² - z s under weights exp(-s² + z s), for every z."""
    loss = s * s - z[:, None] * s
    exponent = log_weight - loss
    weights = np.exp(exponent - exponent.max(1, keepdims=True))
    return np.asarray((weights * loss).sum(1) / weights.sum(1))


def _panels(size: float, farthest: float, rate: float) -> tuple[Array, Array]:
    """Nodes and weights in t = log(K(corner)/K) where the posterior has weight for |Z| <= farthest.

    s = exp((log size - t)/2); beyond s = farthest/2 + sqrt(CUT) the posterior vanishes, and the
    narrowest bump, at s = farthest/2, has width 1/sqrt(2) in s. ``rate`` is the steepest
    exponential in the prior of t.
    """
    top = math.log(size)
    start = max(0.0, top - 2 * math.log(farthest / 2 + math.sqrt(CUT)))
    stop = max(top, 0.0) + TAIL
    edges = [start]
    while edges[-1] < stop:
        s = math.exp(0.5 * (top - edges[-1]))
        edges.append(edges[-1] + min(1.0, 1.5 / max(s, 1.0), 6.0 / rate))
    edges[-1] = stop
    x, w = np.polynomial.legendre.leggauss(NODES)
    left, width = np.array(edges[:-1]), np.diff(edges)
    t = left[:, None] + 0.5 * width[:, None] * (x + 1)
    return t.ravel(), (0.5 * width[:, None] * w).ravel()


def _depth(size: float, spread: float, both: bool) -> float:
    """-E min(s² - Z s) over |s| <= S = sqrt(size), half of that where s > 0 only.

    The minimum is -Z²/4, or S² - |Z| S where Z/2 is outside the box.
    """
    edge = math.sqrt(size)
    a = 2 * edge / spread
    outside = math.erfc(a / math.sqrt(2))
    bell = math.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    inner = 0.25 * spread**2 * (1 - outside - 2 * a * bell)
    outer = 2 * edge * spread * bell - size * outside
    return (inner + outer) * (1.0 if both else 0.5)
