"""The demo's picture: curvature along rays, the Fisher spectrum, orders without a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator

from deaddir_fast.scan.demo_digits import DigitsReading
from deaddir_fast.scan.demo_exact import Ray

# Okabe & Ito's palette, told apart with every common colour blindness (pink and orange darkened,
# so that they can be read as text). Chains first; the digits network's directions have their own.
CHAIN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B3608C")
COLOUR_OF_KIND = {"live": "#333333", "gauge line": "#B88600"}
LIVE, DEAD = "#0072B2", "#D55E00"
INK, GREY = "#222222", "#8a8a8a"
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "deaddir_fast",
}


def _spread(positions: list[float], least: float) -> list[float]:
    """Move labels apart to at least ``least``, keeping their order and their middle."""
    ranking = np.argsort(positions)
    placed = np.array(positions, dtype=float)[ranking]
    for _ in range(200):
        gaps = np.diff(placed)
        tight = np.flatnonzero(gaps < least - 1e-9)
        if tight.size == 0:
            break
        for i in tight:
            push = (least - (placed[i + 1] - placed[i])) / 2
            if push > 0:
                placed[i] -= push
                placed[i + 1] += push
    out = np.empty_like(placed)
    out[ranking] = placed
    return out.tolist()


def _styles(rays: list[Ray]) -> list[tuple[str, str]]:
    """Colour and marker of each ray."""
    chains = iter(CHAIN_COLOURS)
    return [
        (next(chains), "o") if ray.kind == "chain" else (COLOUR_OF_KIND[ray.kind], "s")
        for ray in rays
    ]


def _curvature(ax: Axes, rays: list[Ray], digits: DigitsReading | None) -> None:
    """Points, the fitted power and its window, and a label at the left end of each line."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    first, last = rays[0].radii[0], rays[0].radii[-1]
    whole = np.geomspace(first, last, 200)
    starts, levels = [], []
    for ray, (colour, marker) in zip(rays, _styles(rays), strict=True):
        t, f = np.array(ray.radii), np.array(ray.fisher)
        ax.plot(t, f, marker, ms=3.8, mfc="white", mec=colour, mew=0.9, zorder=3)
        if ray.fit.resolved:
            power = ray.fit.curve(whole, leading=True)
            ax.plot(whole, power, "--", lw=0.8, color=colour, zorder=2)
            inside = np.geomspace(*ray.fit.window, 100)
            ax.fill_between(
                inside,
                ray.fit.curve(inside, leading=True) / 2.5,
                ray.fit.curve(inside, leading=True) * 2.5,
                color=colour,
                alpha=0.18,
                lw=0,
                zorder=1,
            )
        shown = np.log10(f[f > 0])
        starts.append(float(shown[0]))
        levels += [float(shown.min()), float(shown.max())]
    if digits is not None and digits.gauge_curvature > 0:
        ax.axhline(digits.gauge_curvature, lw=0.8, ls=":", color=GREY, zorder=0)
        ax.annotate(
            "rounding: what a gauge direction of the digits network reads at t = 0",
            (last, digits.gauge_curvature),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=GREY,
        )
        levels.append(float(np.log10(digits.gauge_curvature)))
    low, high = min(levels), max(levels)
    ax.set_ylim(10 ** (low - 2), 10 ** (high + 2))
    ax.set_xlim(first / 12, last * 1.5)
    ax.xaxis.set_major_locator(FixedLocator([10.0**e for e in range(-4, 1)]))
    ax.xaxis.set_minor_locator(NullLocator())
    labels = _spread(starts, (high - low) / 13)
    for ray, (colour, _), y in zip(rays, _styles(rays), labels, strict=True):
        reading = f"k = {ray.fit.order:.2f}" if ray.fit.resolved else "order not resolved"
        ax.annotate(
            f"{ray.name}\n{reading}",
            (first, 10**y),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=colour,
            fontsize=9,
            linespacing=1.2,
        )
    ax.text(
        0.985,
        0.2,
        "points: exact Fisher curvature, no fit\ndashed: fitted power $t^{\\,2(k-1)}$\n"
        "band: window in which that power dominates",
        transform=ax.transAxes,
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=GREY,
        linespacing=1.5,
    )
    ax.set_xlabel("distance t from the true point along a unit direction u")
    ax.set_ylabel("curvature  uᵀF(θ₀ + t u) u   (nats per t²)")
    ax.set_title("Curvature dies as a power of t, and its slope 2(k − 1) gives the order k")


def _spectrum(ax: Axes, digits: DigitsReading) -> None:
    """Fisher eigenvalues of the digits network, ranked."""
    values = np.maximum(np.array(digits.singular_values) ** 2, 1e-40)
    rank = digits.rank
    index = np.arange(1, len(values) + 1)
    ax.set_yscale("log")
    ax.plot(index[:rank], values[:rank], ".", ms=3, color=LIVE)
    ax.plot(index[rank:], values[rank:], ".", ms=3, color=DEAD)
    tolerance = digits.tolerance**2
    ax.axhline(tolerance, lw=0.8, ls="--", color=GREY)
    ax.annotate(
        "tolerance",
        (1, tolerance),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8.5,
        color=GREY,
    )
    ax.axvspan(rank + 0.5, len(values) + 0.5, color=DEAD, alpha=0.06, lw=0)
    if len(values) > rank:
        ends = values[rank - 1], values[rank]
        ax.annotate(
            "",
            (rank, ends[1]),
            xytext=(rank, ends[0]),
            arrowprops={"arrowstyle": "<->", "lw": 0.8, "color": INK, "shrinkA": 2, "shrinkB": 2},
        )
        decades = np.log10(ends[0] / ends[1])
        ax.annotate(
            f"gap: {decades:.0f} decades",
            (rank, np.sqrt(ends[0] * ends[1]) * 1e3),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
        )
        ax.text(
            (rank + len(values)) / 2,
            0.97,
            f"{digits.dead} dead",
            ha="center",
            va="top",
            color=DEAD,
            transform=ax.get_xaxis_transform(),
        )
    ax.text(
        rank / 2,
        0.97,
        f"{rank} live",
        ha="center",
        va="top",
        color=LIVE,
        transform=ax.get_xaxis_transform(),
    )
    ax.set_ylim(top=values[0] * 1e5)
    ax.set_xlabel("rank of the eigenvalue")
    ax.set_ylabel("Fisher eigenvalue (nats)")
    ax.set_title("Fisher spectrum of the digits network")


def _pointwise(ax: Axes, rays: list[Ray]) -> None:
    """The order at each radius, without a fit."""
    ax.set_xscale("log")
    top = max(r.expected for r in rays)
    for k in range(1, int(top) + 1):
        ax.axhline(k, lw=0.6, color=GREY, alpha=0.5, zorder=0)
    for ray, (colour, marker) in zip(rays, _styles(rays), strict=True):
        style: Any = {"ms": 3.0, "lw": 1, "mfc": "white", "mew": 0.8}
        ax.plot(ray.radii, ray.pointwise, "-", marker=marker, color=colour, **style)
    ax.set_ylim(0.5, top + 0.5)
    ax.set_yticks(range(1, int(top) + 1))
    ax.set_xlabel("distance t")
    ax.set_ylabel("order read at t:  √(t²F / 2K)")
    ax.set_title("Without a fit: t²F / 2K → k²")


def draw(rays: list[Ray], digits: DigitsReading | None) -> Figure:
    """The whole figure; without the digits network, two panels."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, hspace=0.06, wspace=0.06)
        figure = Figure(figsize=(10.5, 9.2), layout=engine)
        grid = figure.add_gridspec(2, 2, height_ratios=(1.45, 1))
        _curvature(figure.add_subplot(grid[0, :]), rays, digits)
        _pointwise(figure.add_subplot(grid[1, 1] if digits else grid[1, :]), rays)
        if digits is not None:
            _spectrum(figure.add_subplot(grid[1, 0]), digits)
    return figure


def save(figure: Figure, folder: Path) -> None:
    """Write curvature.png and curvature.svg."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / "curvature.png", dpi=170)
        figure.savefig(folder / "curvature.svg", metadata={"Date": None})
