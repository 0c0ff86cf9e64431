"""Singular fluctuation of one direction of order k, against posteriors of x ~ N(t^k, 1).

Points: data sets of n samples drawn at t = 0, flat prior on [-1, 1]; ν is half the functional
variance Σ_i Var_t[log p(x_i|t)], averaged over data sets, each posterior integrated on a grid.
Bars: ``theory.singular_fluctuation`` with both signs of t and on t > 0 only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

import deaddir_fast as dd
from bench.figures._style import DEAD, GREY, LIVE, MARK, array

SIZE = (9.0, 5.2)
ORDERS = tuple(range(1, 9))
SAMPLES, SETS, GRID = 1000, 4000, 4001


def functional_variances(k: int, x: np.ndarray, grid: int, two_sided: bool) -> np.ndarray:
    """Half the functional variance for each data set: (sets, n) -> (sets,).

    log p(x|t) = x s - s²/2 + const with s = t^k, so the sum over samples needs the data's first two
    moments and the posterior moments of s and s² only.
    """
    t = np.linspace(-1 if two_sided else 0, 1, grid)
    s = t**k
    weight = np.ones(grid)
    weight[[0, -1]] = 0.5  # trapezoidal
    n, mean, square = x.shape[1], x.mean(1), (x**2).sum(1)
    result = np.empty(len(x))
    for start in range(0, len(x), 250):
        part = slice(start, start + 250)
        log = n * (mean[part, None] * s - s * s / 2)
        posterior = weight * np.exp(log - log.max(1, keepdims=True))
        posterior /= posterior.sum(1, keepdims=True)
        one, two = posterior @ s, posterior @ (s * s)
        var_s = posterior @ s**2 - one**2
        var_q = posterior @ s**4 - two**2
        cov = posterior @ s**3 - one * two
        result[part] = square[part] * var_s - n * mean[part] * cov + n * var_q / 4
    return result / 2


def measure(quick: bool) -> dict[str, Any]:
    """Exact values and Monte Carlo means with standard errors."""
    rng = np.random.default_rng(0)
    sets = SETS // 20 if quick else SETS
    rows = []
    for k in ORDERS:
        row: dict[str, Any] = {"k": k}
        for name, both in (("two_sided", True), ("one_sided", False)):
            x = rng.standard_normal((sets, SAMPLES))
            nu = functional_variances(k, x, GRID, both)
            row[name] = {
                "exact": dd.theory.singular_fluctuation(k, two_sided=both),
                "mean": nu.mean(),
                "stderr": nu.std(ddof=1) / np.sqrt(sets),
            }
        rows.append(row)
    return {"beta": 1.0, "samples": SAMPLES, "sets": sets, "rows": rows}


SIDES = (
    ("two_sided", LIVE, "t of both signs", 0.06),
    ("one_sided", DEAD, "t > 0 only", -0.06),
)


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Values above, deviations in standard errors below."""
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    rows = measured["rows"]
    k = np.array([row["k"] for row in rows])
    for name, colour, label, shift in SIDES:
        exact, mean, error = (
            array([row[name][c] for row in rows]) for c in ("exact", "mean", "stderr")
        )
        top.plot(k, exact, lw=1, color=colour, zorder=1)
        top.plot(k, exact, "_", ms=16, mew=1.4, color=colour, zorder=2)
        top.errorbar(k, mean, 2 * error, color=colour, elinewidth=1, capsize=2.5, **MARK)
        low.errorbar(
            k + shift, (mean - exact) / error, 2, color=colour, elinewidth=1, capsize=2.5, **MARK
        )
        at = 2 if name == "two_sided" else 1
        top.annotate(
            label,
            (k[at], exact[at]),
            xytext=(12, 6) if name == "two_sided" else (8, -14),
            textcoords="offset points",
            color=colour,
            fontsize=9.5,
        )
    fine = np.linspace(k[0], k[-1], 200)
    top.plot(fine, 1 / (2 * fine), ":", lw=1.2, color=GREY)
    top.annotate("λ = 1/(2k)", (k[-1], 1 / (2 * k[-1])), xytext=(0, -14),
                 textcoords="offset points", color=GREY, ha="right", fontsize=9)  # fmt: skip
    top.set_ylim(0, 0.55)
    top.set_ylabel("singular fluctuation ν(k, β = 1)")
    top.set_title("ν of a direction depends on k and on the signs that $t^k$ takes")
    top.text(
        0.99,
        0.97,
        f"bars: exact;  circles: {measured['sets']} data sets of {measured['samples']} samples\n"
        "from N(0, 1), posterior of $x \\sim N(t^k, 1)$, ± 2 standard errors",
        transform=top.transAxes,
        ha="right",
        va="top",
        color=GREY,
        fontsize=8.5,
        linespacing=1.4,
    )
    low.axhline(0, lw=0.7, color=GREY, zorder=0)
    low.axhspan(-2, 2, color=GREY, alpha=0.12, lw=0, zorder=0)
    low.set_ylim(-5, 5)
    low.set_xticks(k)
    low.set_xlabel("KL order k")
    low.set_ylabel("deviation / s.e.")
