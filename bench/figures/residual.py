"""Depth: a chain loses its dead direction, a residual network keeps it."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import deaddir_fast as dd
from bench.figures._style import COLOURS, GREY
from deaddir_fast.rates.primitives import MLP, Residual

SIZE = (10.5, 4.3)

WIDTH, SCALES = 12, (0.3, 0.1, 0.03)


def _turned_down(depth: int, t: float, skip: bool) -> list[nn.Module]:
    """Blocks whose unit 0 carries t, its couplings cut; branches pair non-negatively with skips."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(depth):
        block = MLP(WIDTH, WIDTH, "relu").double()
        with torch.no_grad():
            for weight in (block.fc1.weight, block.fc2.weight):
                weight.abs_()
                weight[0], weight[:, 0] = 0.0, 0.0
                weight[0, 0] = t
        blocks.append(Residual(block) if skip else block)
    return blocks


def _unit_profile(blocks: list[nn.Module], x: Tensor) -> list[float]:
    sizes = [float(x[:, 0].square().mean().sqrt())]
    with torch.no_grad():
        for block in blocks:
            x = block(x)
            sizes.append(float(x[:, 0].square().mean().sqrt()))
    return [s / sizes[0] for s in sizes]


def measure(quick: bool) -> dict[str, Any]:
    """Size of the unit along depth, with and without skips, and slopes of both."""
    depth = 3 if quick else 8
    x = torch.randn(256, WIDTH, dtype=torch.float64).abs()
    profiles = [
        {"skip": skip, "t": t, "size": _unit_profile(_turned_down(depth, t, skip), x)}
        for skip in (False, True)
        for t in SCALES
    ]
    sweep = torch.logspace(-2.5, -0.5, 12, dtype=torch.float64)
    slopes = []
    for skip in (False, True):
        blocks = _turned_down(depth, 1.0, skip)
        model = nn.Sequential(*blocks)
        probe = dd.freeze_probe(model, x, t=sweep, likelihood="gaussian")
        for layer in probe.layers:
            if layer.name.endswith("fc1"):
                fit = layer.fits["forward"]
                block = int(layer.name.partition(".")[0])
                predicted = layer.predicted("forward")
                slopes.append(
                    {"skip": skip, "block": block, "slope": fit.slope, "predicted": predicted}
                )
    return {"profiles": profiles, "slopes": slopes}


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Profiles on the left, slopes against depth on the right."""
    left, right = figure.subplots(1, 2)
    for profile in measured["profiles"]:
        colour = COLOURS[SCALES.index(profile["t"])]
        left.plot(
            profile["size"],
            "o-" if profile["skip"] else "s--",
            ms=3.5,
            lw=1,
            color=colour,
            label=f"{'residual' if profile['skip'] else 'chain'}, t = {profile['t']:g}",
        )
    left.axhline(1, color=GREY, lw=0.8)
    left.set_yscale("log")
    left.set(
        title="The unit along depth",
        xlabel="blocks passed",
        ylabel="rms of the unit / rms at the input",
    )
    left.legend(frameon=False, fontsize=8)
    for skip, colour in ((False, COLOURS[1]), (True, COLOURS[0])):
        rows = [r for r in measured["slopes"] if r["skip"] == skip]
        blocks = [r["block"] for r in rows]
        right.plot(blocks, [r["predicted"] for r in rows], color=colour, lw=1)
        right.plot(
            blocks,
            [r["slope"] for r in rows],
            "o" if skip else "s",
            color=colour,
            label="residual: 0 at every depth" if skip else "chain: 4 a block",
        )
    right.set(
        title="Slope of A at each block (lines: predicted)",
        xlabel="block",
        ylabel="slope in t",
    )
    right.legend(frameon=False)
