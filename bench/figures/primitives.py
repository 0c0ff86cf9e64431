"""Every primitive: measured slopes over seeds beside the predicted ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import deaddir_fast as dd
from bench.figures._style import COLOURS, GREY
from deaddir_fast.rates.primitives import chain

SIZE = (9.5, 5.2)

SPECS = (
    "linear*3",
    "linear+bias*3",
    "mlp:relu*2",
    "mlp:gelu*2",
    "mlp:relu2*2",
    "glu*2",
    "swiglu*2",
    "attention*2",
    "residual(mlp:gelu)*2",
    "linear, layer_norm, linear",
    "linear, rms_norm, linear*2",
    "moe:gelu*2",
)
QUANTITIES = ("forward", "backward", "fisher")


def measure(quick: bool) -> dict[str, Any]:
    """Deviations from the prediction, every layer and quantity, over seeds."""
    rows: dict[str, dict[str, list[list[float]]]] = {}
    unread: list[str] = []
    t = torch.logspace(-3, -0.5, 14, dtype=torch.float64)
    for spec in SPECS[:3] if quick else SPECS:
        kinds: dict[str, list[list[float]]] = {q: [] for q in QUANTITIES}
        for seed in range(2 if quick else 5):
            torch.manual_seed(seed)
            model = chain(spec)
            with torch.no_grad():  # a unit that ReLUs let through
                for p in model.parameters():
                    if p.ndim > 1:
                        p[0, 0] = p[0, 0].abs() + 0.2
            x = torch.randn(24, 3, 4, dtype=torch.float64)
            probe = dd.freeze_probe(model, x, t=t, likelihood="gaussian")
            for layer in probe.layers:
                for quantity, fit in layer.fits.items():
                    if fit.verdict == "resolved":
                        kinds[quantity].append([layer.predicted(quantity), fit.slope])
                    else:
                        unread.append(f"{spec} {layer.name} {quantity}: {fit.verdict}")
        rows[spec] = kinds
    return {"rows": rows, "unread": unread}


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Sizes of the deviations, one row a primitive; the line of agreement."""
    ax = figure.subplots()
    names = list(measured["rows"])
    least, most = 1e-17, 1.0
    ax.axvspan(least, 0.05, color="#e9eef3", zorder=0)
    ax.set_xscale("log")
    for k, name in enumerate(names):
        for j, (quantity, colour) in enumerate(zip(QUANTITIES, COLOURS, strict=False)):
            pairs = np.array(measured["rows"][name][quantity])
            if not pairs.size:
                continue
            off = np.abs(pairs[:, 1] - pairs[:, 0]).clip(least * 3)
            ax.plot(off, np.full(len(off), k + 0.22 * (j - 1)), "|", ms=7, color=colour)
        predicted = sorted({p for q in QUANTITIES for p, _ in measured["rows"][name][q]})
        slopes = ", ".join(f"{p:g}" for p in predicted)
        ax.text(1.5 * most, k, slopes, va="center", fontsize=8, color=GREY)
    ax.text(1.5 * most, -0.9, "predicted slopes", fontsize=8, color=GREY)
    for quantity, colour in zip(("A", "G", "Fisher"), COLOURS, strict=False):
        ax.plot([], [], "|", color=colour, label=quantity)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(
        title="|measured − predicted| slope, every layer and seed (shaded: below 0.05)",
        xlabel="deviation of the slope",
        xlim=(least, most),
    )
    ax.legend(frameon=False, loc="upper right", ncol=3)
