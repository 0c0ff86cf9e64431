"""Attention chains: the gradient's slope against blocks above, for each number of blocks below."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

import deaddir_fast as dd
from bench.figures._models import attention_chain
from bench.figures._style import COLOURS, GREY

SIZE = (10.5, 4.3)

WIDTH = 8


def measure(quick: bool) -> dict[str, Any]:
    """Slopes of G at every output map of chains of 1 to 6 blocks."""
    t = torch.logspace(-4, -1.5, 8, dtype=torch.float64)
    rows = []
    for depth in range(1, 4 if quick else 7):
        torch.manual_seed(depth)
        model = attention_chain(depth, WIDTH)
        x = 2 * torch.randn(16, 4, WIDTH, dtype=torch.float64)
        probe = dd.freeze_probe(model, x, t=t, likelihood="gaussian")
        for p in range(depth):
            fit = probe[f"{p}.o"].fits["backward"]
            value = probe[f"{p}.v"].fits["backward"]
            rows.append(
                {
                    "below": p,
                    "above": depth - 1 - p,
                    "output": fit.slope,
                    "value": value.slope,
                    "verdict": probe[f"{p}.o"].verdicts["backward"],
                }
            )
    return {"rows": rows}


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """One line a number of blocks below; the plateau and the crossing."""
    left, right = figure.subplots(1, 2)
    rows = measured["rows"]
    deepest = max(r["above"] for r in rows)
    for p, colour in zip(range(3), COLOURS, strict=False):
        mine = sorted((r["above"], r["output"]) for r in rows if r["below"] == p)
        if not mine:
            continue
        ks = list(range(deepest + 1 - p))
        left.plot(ks, [min(4 * k, 4 * p + 8) for k in ks], color=colour, lw=1)
        left.plot(*zip(*mine, strict=True), "o", color=colour)
        last = min(4 * ks[-1], 4 * p + 8)
        left.annotate(
            f"p = {p}",
            (ks[-1], last),
            (2, 7),
            textcoords="offset points",
            ha="center",
            color=colour,
        )
    left.axvline(2, color=GREY, lw=0.8, ls=":")
    left.text(2.08, 0.3, "p = 0 crosses at k = 2", color=GREY, fontsize=8)
    left.set(
        title="Output map: min(4k, 4p + 8)",
        xlabel="blocks above, k",
        ylabel="slope of G (points: measured)",
        xlim=(-0.3, deepest + 0.4),
    )
    gaps = [r["value"] - r["output"] for r in rows]
    right.axhline(2, color=GREY, lw=0.8)
    right.plot(range(len(gaps)), gaps, "o", ms=4, color=COLOURS[0])
    right.set(
        title="Value map minus output map: 2",
        xlabel="blocks of all chains, in turn",
        ylabel="difference of slopes",
        ylim=(0, 4),
        xticks=[],
    )
