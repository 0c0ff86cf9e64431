"""A curved fibre and an isolated dead point look alike on a straight line; relaxed they do not.

Models (y - x²) and (y, x²) at 0 have the same Fisher metric there and the same curvature 4t² along
x, but the first has a fibre along the parabola (λ = 1/2) and the second none (λ = 3/4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import deaddir_fast as dd
from bench.figures._models import ONE, MeanMap, axis
from bench.figures._style import COLOURS, GREY, MARK, array

SIZE = (10.5, 4.3)
CASES = (
    ("y − x²", lambda p: torch.stack([p[1] - p[0] ** 2])),
    ("(y, x²)", lambda p: torch.stack([p[1], p[0] ** 2])),
)


def measure(quick: bool) -> dict[str, Any]:
    """Raw and relaxed Schur curvature along x, margins, and λ by ``read_triple``."""
    radii = torch.logspace(-3, -0.3, 8 if quick else 20, dtype=torch.float64)
    along = {"theta": axis(0, 2)[None]}
    rows = []
    for name, function in CASES:
        model = MeanMap(function, (0.0, 0.0))
        found = dd.schur_curvature(model, ONE, along, radii, likelihood="gaussian")
        triple = dd.read_triple(model, ONE, likelihood="gaussian")
        rows.append(
            {
                "name": name,
                "radii": radii,
                "raw": found.raw[0],
                "schur": found.schur[0],
                "verdict": found.verdicts[0],
                "rlct": str(triple.rlct),
            }
        )
    return {"rows": rows}


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Level sets of K with the fibre, and curvature against distance."""
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    x, y = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(-0.6, 1.2, 201))
    for ax, row, k, colour in zip(
        axes, measured["rows"], ((y - x**2) ** 2, y**2 + x**4), COLOURS, strict=False
    ):
        ax.contour(x, y, k, levels=np.geomspace(1e-3, 1, 9), colors=GREY, linewidths=0.7)
        ax.annotate("", (0.9, 0), (0, 0), arrowprops={"arrowstyle": "->", "color": colour})
        if row["name"] == CASES[0][0]:
            ax.plot(x[0], x[0] ** 2, color=colour, lw=2)
            ax.text(0, 0.62, "fibre K = 0", color=colour, fontsize=8.5, ha="center")
        ax.plot(0, 0, "o", color=colour)
        ax.set(title=f"f = {row['name']}:  λ = {row['rlct']}", xlabel="x", ylabel="y")
        ax.set_aspect("equal")
    ax = axes[2]
    ax.set_xscale("log")
    ax.set_yscale("log")
    for row, colour in zip(measured["rows"], COLOURS, strict=False):
        t, raw, schur = (array(row[k]) for k in ("radii", "raw", "schur"))
        ax.plot(t, raw, color=colour, lw=4 if colour == COLOURS[0] else 1.2, alpha=0.5)
        kept = schur > 0
        ax.plot(t[kept], schur[kept], color=colour, **MARK)
        if not kept.any():
            ax.text(0.04, 0.9, "relaxed y − x²: exactly 0", color=colour, transform=ax.transAxes)
    ax.text(0.04, 0.82, "lines: raw, 4t² for both", color=GREY, transform=ax.transAxes)
    ax.text(0.04, 0.74, "points: relaxed (y, x²)", color=COLOURS[1], transform=ax.transAxes)
    ax.set(
        title="Curvature along x", xlabel="distance t", ylabel="raw uᵀFu and its Schur complement"
    )
