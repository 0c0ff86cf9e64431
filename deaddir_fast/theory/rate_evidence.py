"""Exact evidence and Student posteriors of log curvature = linear part + analytic bend + noise.

Our choice. Along a ray the curvature is a power times an analytic function of t, so its logarithm
is ``X beta + h(t)`` with ``h(t) = sum_j c_j (t/T)^j`` and no constant term. The coefficients get
independent normal priors of standard deviation ``g sigma rho^(j-1)/j``, where sigma is the
(unknown) noise: for given (g, rho) everything is conjugate, the slope has a Student posterior and
the evidence is closed. Large g means a bend that is large compared with the noise, which includes
noise-free data, where the width of the slope's posterior is the truncation error of the bend and
not a residual scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, stdtr

Array = NDArray[np.float64]
Integers = NDArray[np.intp]
Mask = NDArray[np.bool_]

# Bend size in units of the noise, from none to far above rounding.
RATIOS: Array = np.concatenate([[0.0], np.logspace(-1.5, 15.0, 56)])
_STEP = float(np.log(RATIOS[2] / RATIOS[1]))
# Prior on the bend at the upper end T of the window: none at all, or lognormal.
NO_BEND = 0.6
BEND_MEDIAN, BEND_SPREAD = 0.4, 1.0
# Prior sigma^(NOISE - 1) on the noise, between log-uniform (0) and uniform (1; Gelman 2006): of the
# noise levels that an interpolating bend leaves open, the larger ones count more.
NOISE = 0.5
# Taylor terms of the bend, and the number of their combinations that are kept.
SERIES, TERMS = 80, 14
# Domains of analyticity tried: (mapped, rho).
FAMILIES = (
    (False, 0.25),
    (False, 0.5),
    (False, 0.75),
    (False, 0.95),
    (True, 0.4),
    (True, 0.7),
    (True, 0.95),
)


@dataclass(frozen=True)
class Posterior:
    """Evidence and Student posteriors for a batch of B designs and all G bend ratios.

    ``log_evidence`` (B, G); ``mean``, ``spread`` (B, G): location and scale of the Student
    posterior of the target coefficient with ``dof`` (B,) degrees of freedom; ``sigma`` (B, G):
    noise scale; ``beta`` (B, G, q) and ``bend`` (B, G, J): posterior means.
    """

    log_evidence: Array
    mean: Array
    spread: Array
    dof: Array
    sigma: Array
    beta: Array
    bend: Array


def _monomials(x: Array, rho: float, terms: int) -> Array:
    """Columns ``rho^(j-1) x^j / j``."""
    j = np.arange(1, terms + 1)
    return x[..., None] ** j * rho ** (j - 1) / j


@cache
def _compression(rho: float) -> Array:
    """Rotation (SERIES, TERMS) of the series onto the few combinations visible on [0, 1].

    Up to rounding the rotated features have the same covariance as the whole series.
    """
    grid = 0.5 - 0.5 * np.cos(np.pi * (np.arange(4 * SERIES) + 0.5) / (4 * SERIES))
    return np.linalg.svd(_monomials(grid, rho, SERIES))[2][:TERMS].T


def bend_features(t: Array, top: Array, family: Integers, *, even: bool) -> Array:
    """Features of h on [0, top] with unit normal coefficients, shape (B, n, TERMS).

    With x = t/T (its square if ``even``) and u = x, or 2x/(1+x) in the mapped families, ``h =
    sum_j c_j u^j`` with ``c_j ~ N(0, (rho^(j-1)/j)^2)``: the coefficients of the logarithm of an
    analytic function whose nearest zero or pole is at u = 1/rho. The map opens the disk on the side
    of negative t, where alone a curvature that is positive on (0, T] can have its zeros close by.
    Rows beyond the top are clipped: they carry no weight.
    """
    x = np.minimum(t[None, :] / top[:, None], 1.0)
    x = x**2 if even else x
    out = np.empty((*x.shape, TERMS))
    for value in np.unique(family):
        at = family == value
        mapped, rho = FAMILIES[value]
        u = 2 * x[at] / (1 + x[at]) if mapped else x[at]
        out[at] = _monomials(u, rho, SERIES) @ _compression(rho)
    return out


def posterior(y: Array, x: Array, phi: Array, w: Array, target: int, rounding: float) -> Posterior:
    """Posterior of ``beta[target]`` in ``y = x beta + phi c + noise/w``; weight 0 leaves a row out.

    y, w (B, n); x (B, n, q); phi (B, n, J). ``rounding``: smallest noise that y can have.
    """
    n_used = (w > 0).sum(axis=1)
    q = x.shape[-1]
    dof = (n_used - q - NOISE).astype(float)
    xw, pw, yw = x * w[..., None], phi * w[..., None], (y * w)[..., None]
    basis, tri = np.linalg.qr(xw)
    inner_y = np.swapaxes(basis, 1, 2) @ yw
    inner_p = np.swapaxes(basis, 1, 2) @ pw
    rest_y = yw - basis @ inner_y
    rest_p = pw - basis @ inner_p
    u, s, vt = np.linalg.svd(rest_p, full_matrices=False)
    d = (np.swapaxes(u, 1, 2) @ rest_y)[..., 0]
    # What the bend columns cannot reach, as a vector: a difference of squares would cancel.
    unreached = rest_y - u @ d[..., None]
    outside = (unreached[..., 0] ** 2).sum(axis=1)
    g2 = RATIOS[None, :, None] ** 2
    dee = 1.0 + g2 * s[:, None, :] ** 2
    rss = (d[:, None, :] ** 2 / dee).sum(axis=-1) + outside[:, None]
    rss = rss + (n_used[:, None]) * rounding**2
    sigma = np.sqrt(rss / dof[:, None])
    det = np.log(np.abs(np.diagonal(tri, axis1=1, axis2=2))).sum(axis=1)
    log_w = np.where(w > 0, np.log(np.where(w > 0, w, 1.0)), 0.0).sum(axis=1)
    log_evidence = (
        (gammaln(dof / 2) - dof / 2 * np.log(np.pi) - det + log_w)[:, None]
        - 0.5 * np.log(dee).sum(axis=-1)
        - dof[:, None] / 2 * np.log(rss)
    )
    shrink = g2 * s[:, None, :] / dee
    bend = (shrink * d[:, None, :]) @ vt
    inverse = np.linalg.inv(tri)
    beta = ((inverse @ inner_y)[..., 0])[:, None, :] - bend @ np.swapaxes(inverse @ inner_p, 1, 2)
    through = (inverse[:, target, None, :] @ inner_p) @ np.swapaxes(vt, 1, 2)
    unseen = ((inverse[:, target, None, :] @ inner_p)[:, 0, :] ** 2).sum(-1) - (
        through[:, 0, :] ** 2
    ).sum(-1)
    variance = (
        (inverse[:, target, :] ** 2).sum(axis=-1)[:, None]
        + (through**2 * g2 / dee).sum(axis=-1)
        + g2[..., 0] * np.maximum(unseen, 0.0)[:, None] * (s.shape[-1] < phi.shape[-1])
    )
    return Posterior(
        log_evidence, beta[..., target], sigma * np.sqrt(variance), dof, sigma, beta, bend
    )


def log_prior_bend(sigma: Array) -> Array:
    """Log prior mass of each bend ratio, given the noise it implies; sigma (B, G)."""
    tau = np.log(np.maximum(RATIOS[1:], 1e-300)[None, :] * sigma[:, 1:])
    z = (tau - np.log(BEND_MEDIAN)) / BEND_SPREAD
    density = -0.5 * z**2 - np.log(BEND_SPREAD * np.sqrt(2 * np.pi))
    bent = np.log(1 - NO_BEND) + np.log(_STEP) + density
    return np.concatenate([np.full((sigma.shape[0], 1), np.log(NO_BEND)), bent], axis=1)


def mixture_quantile(
    mean: Array, spread: Array, dof: Array, weight: Array, levels: tuple[float, ...]
) -> list[float]:
    """Quantiles of a mixture of Student distributions, by bisection to 1e-5 of their spread."""
    heavy = weight > 1e-2 * weight.max()
    tolerance = 1e-5 * float(spread[heavy].min())
    ends = float((mean - 400 * spread).min()), float((mean + 400 * spread).max())
    known: list[tuple[float, float]] = [(ends[0], 0.0), (ends[1], 1.0)]
    found = []
    for level in levels:
        # Points evaluated for the other levels bracket this one already.
        a = max(at for at, below in known if below < level)
        b = min(at for at, below in known if below >= level)
        while b - a > tolerance:
            middle = 0.5 * (a + b)
            if not a < middle < b:
                break
            below = float(weight @ stdtr(dof, (middle - mean) / spread))
            known.append((middle, below))
            a, b = (middle, b) if below < level else (a, middle)
        found.append(0.5 * (a + b))
    return found
