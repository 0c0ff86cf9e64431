"""The demo's picture: curvature along rays, the Fisher spectrum, orders without a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deaddir_fast.scan.demo_digits import DigitsReading
from deaddir_fast.scan.demo_exact import Ray

# Okabe & Ito's palette, told apart with every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY = "#222222", "#8a8a8a"
STYLE: dict[str, Any] = {
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


def _curvature(ax: Axes, rays: list[Ray]) -> None:
    """Points, fitted line in its window, and a label at the left end of each line."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends = []
    for ray, colour in zip(rays, COLOURS, strict=False):
        t, f = np.array(ray.radii), np.array(ray.fisher)
        ax.plot(t, f, "o", ms=3.6, mfc="white", mec=colour, mew=0.9, zorder=3)
        if ray.fit.resolved:
            lo, hi = ray.fit.window
            whole = np.geomspace(t[0], t[-1], 200)
            ax.plot(whole, ray.fit.curve(whole, leading=True), "--", lw=0.7, color=colour, zorder=2)
            inside = np.geomspace(lo, hi, 100)
            ax.plot(
                inside,
                ray.fit.curve(inside),
                "-",
                lw=5,
                color=colour,
                alpha=0.22,
                zorder=1,
                solid_capstyle="butt",
            )
        seen = f[f > 0]
        ends.append(float(np.log10(seen[-1])) if seen.size else 0.0)
    low = min(float(np.log10(np.array(r.fisher)[np.array(r.fisher) > 0].min())) for r in rays)
    high = max(ends)
    ax.set_ylim(10 ** (low - 2), 10 ** (high + 1.5))
    ax.set_xlim(rays[0].radii[0] * 0.7, rays[0].radii[-1] * 1.4)
    starts = [float(np.log10(next(v for v in r.fisher if v > 0))) for r in rays]
    for ray, colour, y in zip(rays, COLOURS, _spread(starts, (high - low) / 16), strict=False):
        fit = ray.fit
        reading = f"k = {fit.order:.2f}" if fit.resolved else "order not resolved"
        ax.annotate(
            f"{ray.name}\n{reading}",
            (0, 10**y),
            xycoords=("axes fraction", "data"),
            xytext=(-54, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=colour,
            fontsize=9,
            linespacing=1.15,
        )
    ax.set_xlabel("distance t from the true point, along a unit direction u")
    ax.set_ylabel("curvature uᵀF(θ₀ + t u) u   (nats per t²)")
    ax.set_title("Curvature vanishes as a power of t: slope 2(k − 1) gives the order k")


def _spectrum(ax: Axes, digits: DigitsReading) -> None:
    """Fisher eigenvalues of the digits network, ranked."""
    values = np.maximum(np.array(digits.singular_values) ** 2, 1e-40)
    rank = digits.rank
    index = np.arange(1, len(values) + 1)
    ax.set_yscale("log")
    ax.plot(index[:rank], values[:rank], ".", ms=3, color=COLOURS[0])
    ax.plot(index[rank:], values[rank:], ".", ms=3, color=COLOURS[1])
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
    ax.axvspan(rank + 0.5, len(values) + 0.5, color=COLOURS[1], alpha=0.06, lw=0)
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
            color=COLOURS[1],
            transform=ax.get_xaxis_transform(),
        )
    ax.text(
        rank / 2,
        0.97,
        f"{rank} live",
        ha="center",
        va="top",
        color=COLOURS[0],
        transform=ax.get_xaxis_transform(),
    )
    ax.set_ylim(top=values[0] * 1e5)
    ax.set_xlabel("eigenvalue, ranked")
    ax.set_ylabel("Fisher eigenvalue (nats)")
    ax.set_title(f"Digits network, {digits.parameters} parameters: live and dead")


def _pointwise(ax: Axes, rays: list[Ray]) -> None:
    """The order at each radius, without a fit."""
    ax.set_xscale("log")
    top = max(r.expected for r in rays)
    for k in range(1, int(top) + 1):
        ax.axhline(k, lw=0.6, color=GREY, alpha=0.5, zorder=0)
    for ray, colour in zip(rays, COLOURS, strict=False):
        ax.plot(ray.radii, ray.pointwise, "-o", ms=2.8, lw=1, mfc="white", mew=0.8, color=colour)
    ax.set_ylim(0.5, top + 0.5)
    ax.set_yticks(range(1, int(top) + 1))
    ax.set_xlabel("distance t")
    ax.set_ylabel("√(t²F / 2K)")
    ax.set_title("One radius is enough: t²F / 2K → k²")


def draw(rays: list[Ray], digits: DigitsReading | None) -> Figure:
    """The whole figure; without the digits network, two panels."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 9.2), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1.45, 1))
        _curvature(figure.add_subplot(grid[0, :]), rays)
        _pointwise(figure.add_subplot(grid[1, 1] if digits else grid[1, :]), rays)
        if digits is not None:
            _spectrum(figure.add_subplot(grid[1, 0]), digits)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.06, wspace=0.06)
    return figure


def save(figure: Figure, folder: Path) -> None:
    """Write curvature.png and curvature.svg."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / "curvature.png", dpi=170)
        figure.savefig(folder / "curvature.svg", metadata={"Date": None})
