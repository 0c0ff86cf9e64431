"""Rates of composed blocks: MLP chains add, attention chains stop at the scores' route."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import deaddir_fast as dd
from bench.figures._models import attention_chain
from bench.figures._style import COLOURS, GREY
from deaddir_fast.rates.primitives import MLP

SIZE = (10.5, 4.3)

DEPTHS = (6, 8, 12)  # MLP blocks
ATTENTION = (4, 6)
WIDTH = 16


def _slopes(model: nn.Module, x: torch.Tensor, t: torch.Tensor, kept: str) -> list[dict[str, Any]]:
    probe = dd.freeze_probe(model, x, t=t, likelihood="gaussian")
    return [
        {
            "layer": layer.name,
            "quantity": quantity,
            "predicted": layer.predicted(quantity),
            "measured": fit.slope,
            "stderr": fit.stderr,
            "verdict": layer.verdicts[quantity],
        }
        for layer in probe.layers
        for quantity, fit in layer.fits.items()
        if kept in ("all", layer.name.rpartition(".")[2]) and quantity != "fisher"
    ]


def measure(quick: bool) -> dict[str, Any]:
    """Slopes of every layer of MLP chains, and of the output maps of attention chains."""
    torch.manual_seed(0)
    t = torch.logspace(-4, -1.5, 8, dtype=torch.float64)
    found: dict[str, Any] = {"width": WIDTH, "mlp": {}, "attention": {}}
    for n in DEPTHS[:1] if quick else DEPTHS:
        model = nn.Sequential(*(MLP(WIDTH, WIDTH, "gelu") for _ in range(n))).double()
        x = torch.randn(48, WIDTH, dtype=torch.float64)
        found["mlp"][str(n)] = _slopes(model, x, t, "all")
    for n in ATTENTION[:1] if quick else ATTENTION:
        model = attention_chain(n, WIDTH)
        x = 2 * torch.randn(16, 4, WIDTH, dtype=torch.float64)
        rows = [r for r in _slopes(model, x, t, "o") if r["quantity"] == "backward"]
        for row in rows:
            row["below"] = int(row["layer"].partition(".")[0])
            row["above"] = n - 1 - row["below"]
        found["attention"][str(n)] = rows
    return found


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Measured against predicted slopes; attention's against the sum that does not hold."""
    left, right = figure.subplots(1, 2)
    top = max(r["predicted"] for rows in measured["mlp"].values() for r in rows)
    left.plot([0, top], [0, top], color=GREY, lw=0.8, zorder=0)
    for (n, rows), colour, size in zip(measured["mlp"].items(), COLOURS, (9, 6, 3.5), strict=False):
        left.plot(
            [r["predicted"] for r in rows],
            [r["measured"] for r in rows],
            "o",
            ms=size,
            mfc="none" if size > 4 else colour,
            color=colour,
            label=f"{n} blocks",
        )
    left.set(
        title="MLP chains: rates add",
        xlabel="predicted slope (sum over blocks)",
        ylabel="measured slope of A and G",
    )
    left.legend(frameon=False, loc="upper left")
    deepest = max(r["above"] for rows in measured["attention"].values() for r in rows)
    ks = range(deepest + 1)
    right.plot(ks, [4 * k for k in ks], "--", color=GREY, lw=1, label="sum of blocks, 4k")
    for (n, rows), colour, marker in zip(
        measured["attention"].items(), COLOURS, "os", strict=False
    ):
        right.plot(
            [r["above"] for r in rows],
            [r["measured"] for r in rows],
            marker,
            color=colour,
            label=f"{n} blocks, measured",
        )
        right.plot(
            [r["above"] for r in rows],
            [min(4 * r["above"], 4 * r["below"] + 8) for r in rows],
            color=colour,
            lw=1,
            label=f"{n} blocks, min(4k, 4p + 8)",
        )
    right.set(
        title="Attention chains: scores cap the gradient",
        xlabel="blocks above the output map, k",
        ylabel="slope of G at the output map",
        yticks=range(0, 4 * deepest + 1, 4),
    )
    right.legend(frameon=False, loc="upper left", fontsize=8)
