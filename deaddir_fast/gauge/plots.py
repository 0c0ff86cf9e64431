"""The picture of a training's drift from the conserved quantities; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe & Ito's palette, told apart with every common colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B3608C", "#B88600", "#56B4E9")
INK, GREY = "#222222", "#8a8a8a"
MOST = 12  # lines told apart by name; the rest of a deep network is drawn grey
STYLE: Any = {
    "font.size": 9.5,
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
    "text.parse_math": False,  # names of layers may hold dollar signs
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "deaddir_fast",
}


def drift_figure(report: Mapping[str, Any]) -> Figure:
    """See ``drift.plot_drift``."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.6), layout=ConstrainedLayoutEngine())
        ax = figure.subplots()
        times = np.array(report["times"], dtype=float)
        rows = report["gauges"]
        final = [-1.0 if r["last"] is None else r["last"] for r in rows]
        named = set(np.argsort(final)[::-1][:MOST].tolist())
        positive = False
        for i, row in enumerate(rows):
            values = np.array([np.nan if d is None else d for d in row["drift"]], dtype=float)
            values[values <= 0] = np.nan  # a logarithmic axis has no zero
            positive = positive or bool(np.isfinite(values).any())
            turn = i // len(COLOURS)
            ax.plot(
                times,
                values,
                color=COLOURS[i % len(COLOURS)] if i in named else "#d0d0d0",
                ls=("-", "--", ":", "-.")[turn % 4] if i in named else "-",
                lw=1.4 if i in named else 0.8,
                zorder=2 if i in named else 1,
                label=f"{row['name']}, {row['group']}" if i in named else None,
            )
        if positive:
            ax.set_yscale("log")
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2)
        else:
            text = "no drift" if rows else "no gauge that conserves anything"
            ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center")
        ax.set_xlabel("time")
        ax.set_ylabel("relative drift of what gradient flow conserves")
    return figure
