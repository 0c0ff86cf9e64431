"""Pictures of a comparison: dead dimensions by class, changes over depth, spectra on each other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deaddir_fast.scan.plots import DEAD, GREY, LIVE
from deaddir_fast.scan.plots_scan import (
    compact,
    heat,
    log_axis,
    new_figure,
    panel_note,
    styled,
    thin,
)
from deaddir_fast.scan.positions import grid, short
from deaddir_fast.scan.read_report import CLASSES, Scan

if TYPE_CHECKING:
    from deaddir_fast.scan.compare import Comparison

SIDES = ((LIVE, "a"), (DEAD, "b"))
# fell, stayed, grew: blue and orange apart from the palest grey
FELL_GREW = LinearSegmentedColormap.from_list("fell-grew", [LIVE, "#e9e9e9", DEAD])


@styled
def class_totals(comparison: Comparison) -> Figure:
    """Dead dimensions by class in both scans, a panel each: their sizes differ by decades."""
    figure = new_figure(9.5, 2.1)
    for ax, kind in zip(figure.subplots(1, len(CLASSES)), CLASSES, strict=True):
        both = comparison.totals[kind]
        for i, (colour, side) in enumerate(SIDES):
            ax.bar(i, both[side], 0.7, color=colour)
            ax.annotate(
                compact(both[side]),
                (i, both[side]),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
        ax.set_xticks([0, 1], ["a", "b"])
        ax.set_ylim(0, 1.2 * max(1, both["a"], both["b"]))
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: compact(v)))
        ax.set_title(kind)
    return figure


def _mean(values: list[float | None]) -> float:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


@styled
def change_maps(comparison: Comparison) -> Figure:
    """Layer x depth: change of the dead share and of ranks, distances of spectra."""
    # the grid sorts rows and columns by dead dimensions of one side; here by both together
    layers = [
        layer | {"dead": {"block": layer["dead"]["block"]["a"] + layer["dead"]["block"]["b"]}}
        for layer in comparison.layers
    ]
    laid = grid(layers)
    original = {layer["name"]: layer for layer in comparison.layers}

    def values(of: Any) -> Any:
        out = np.full((len(laid.rows), len(laid.columns)), np.nan)
        for place, cell in laid.cells.items():
            out[place] = _mean([of(original[layer["name"]]) for layer in cell])
        return out

    def dead_share(layer: dict[str, Any]) -> float:
        return float(layer["dead"]["block"]["change"] / max(1, layer["parameters"]))

    signed = [
        ("dead share", values(dead_share)),
        ("rank of A", values(lambda layer: layer["A"]["rank"]["change"])),
        ("rank of G", values(lambda layer: layer["G"]["rank"]["change"])),
    ]
    apart = [
        ("distance of A (nats)", values(lambda layer: layer["A"]["distance"])),
        ("distance of G (nats)", values(lambda layer: layer["G"]["distance"])),
    ]
    figure = new_figure(12, max(4.4, 2 * (0.95 + 0.235 * len(laid.rows))))
    axes = figure.subplots(2, 3)
    for i, (title, shown) in enumerate(signed + apart):
        ax = axes.flat[i]
        size = float(np.nanmax(np.abs(shown), initial=0.0))
        change = i < len(signed)
        norm = Normalize(-(size or 1) if change else 0, size or 1)
        mesh = heat(ax, laid, shown, norm, cmap=FELL_GREW if change else "cividis", rows=i % 3 == 0)
        ax.set_title(("change of " if change else "") + title)
        bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=14)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(4)
        bar.update_ticks()
    axes.flat[-1].axis("off")
    panel_note(axes.flat[-1], "blue: less in b, orange: more in b\nsmall dot: not known there")
    return figure


@styled
def volumes(comparison: Comparison) -> Figure:
    """Change of the logarithm of the pseudo-determinants of A and G over depth."""
    figure = new_figure(9.5, 2.6)
    ax = figure.add_subplot()
    depth = [layer["depth"] for layer in comparison.layers]
    for factor, colour, marker in (("A", LIVE, "o"), ("G", DEAD, "s")):
        change = [layer[factor]["log_pseudo_det"]["change"] for layer in comparison.layers]
        shown = [math.nan if v is None or math.isinf(v) else v for v in change]
        ax.plot(depth, shown, marker, ms=3.5, color=colour, label=factor)
    ax.axhline(0, lw=0.6, color=GREY, zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.set_xlabel("depth of the layer in a")
    ax.set_ylabel("change of ln det")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return figure


@styled
def spectra_on_each_other(a: Scan, b: Scan, names: list[str]) -> Figure:
    """Spectra of A and G of the named layers in both scans: a blue, b orange and dashed."""
    one = {layer["name"]: layer for layer in a.layers}
    two = {layer["name"]: layer for layer in b.layers}
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(6.0 * columns, 0.4 + 1.95 * rows)
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        for j, factor in enumerate("AG"):
            ax = axes[row, 2 * column + j]
            ax.set_title(factor + (f"  {short(name)}" if j == 0 else ""))
            spectra = [side.spectrum(layers[name], factor) for side, layers in ((a, one), (b, two))]
            known = [v for v in spectra if v is not None and (v > 0).any()]
            if not known:
                panel_note(ax, "not stored")
                ax.set_xticks([])
                ax.set_yticks([])
                continue
            log_axis(ax, "y")
            top = max(float(v[-1]) for v in known)
            tolerances = [layers[name][factor]["tolerance"] for layers in (one, two)]
            floors = [t for t in tolerances if 0 < t < math.inf]
            low = max(min(float(v[v > 0].min()) for v in known), 1e-3 * min(floors, default=0.0))
            low = min(low, top / 10)
            for values, (colour, side), dash in zip(spectra, SIDES, ("-", "--"), strict=True):
                if values is not None and len(values):
                    rank, falling = thin(values)
                    ax.plot(rank, np.maximum(falling, low), dash, lw=1.2, color=colour, label=side)
            for tolerance, (colour, _) in zip(tolerances, SIDES, strict=True):
                if 0 < tolerance < math.inf:
                    ax.axhline(tolerance, lw=0.7, ls=":", color=colour)
            ax.set_ylim(low / 3, top * 4)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if i + columns >= len(names):
                ax.set_xlabel("rank of the eigenvalue")
            if i == 0 and j == 0:
                ax.legend(loc="lower left")
    for ax in axes.flat[2 * len(names) :]:
        ax.axis("off")
    return figure
