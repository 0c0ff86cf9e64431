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
    """Deviations, one row a primitive; the band of agreement."""
    ax = figure.subplots()
    names = list(measured["rows"])
    ax.axvspan(-0.05, 0.05, color="#e9eef3", zorder=0)
    for k, name in enumerate(names):
        for j, (quantity, colour) in enumerate(zip(QUANTITIES, COLOURS, strict=False)):
            pairs = np.array(measured["rows"][name][quantity])
            if not pairs.size:
                continue
            off = pairs[:, 1] - pairs[:, 0]
            ax.plot(
                off,
                np.full(len(off), k + 0.22 * (j - 1)),
                "|",
                ms=8,
                color=colour,
                label={"forward": "A", "backward": "G", "fisher": "Fisher"}[quantity]
                if k == 0
                else None,
            )
        predicted = sorted({p for q in QUANTITIES for p, _ in measured["rows"][name][q]})
        ax.text(
            0.128, k, ", ".join(f"{p:g}" for p in predicted), va="center", fontsize=8, color=GREY
        )
    ax.text(0.128, -0.9, "predicted slopes", fontsize=8, color=GREY)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set(
        title="Measured minus predicted slope, every layer and seed (band: ± 0.05)",
        xlabel="deviation",
        xlim=(-0.125, 0.125),
    )
    ax.legend(frameon=False, loc="lower left", ncol=3)
