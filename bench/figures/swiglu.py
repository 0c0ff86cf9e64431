"""SwiGLU: forward rate 3 where an MLP has 2, and a doubling of whatever enters."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

import deaddir_fast as dd
from bench.figures._style import COLOURS
from deaddir_fast.rates.primitives import chain

SIZE = (10.5, 4.3)

BLOCKS = ("mlp:gelu", "glu", "swiglu", "bilinear")


def _output_moment(spec: str, t: torch.Tensor, x: torch.Tensor) -> dict[str, Any]:
    """E[a²] of the unit after the blocks: the input of a linear map put behind them."""
    torch.manual_seed(0)
    model = chain(f"{spec}, linear")
    probe = dd.freeze_probe(model, x, t=t, likelihood="gaussian")
    last = probe.layers[-1]
    return {
        "t": t.tolist(),
        "moment": last.forward.tolist(),
        "slope": last.fits["forward"].slope,
        "predicted": last.predicted("forward"),
    }


def measure(quick: bool) -> dict[str, Any]:
    """Moments behind one block of each kind, and slopes behind 1 to 3 blocks."""
    x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.logspace(-2.5, -0.3, 14, dtype=torch.float64)
    one = {spec: _output_moment(spec, t, x) for spec in BLOCKS}
    many = {
        spec: [
            {"blocks": n, **_output_moment(f"{spec}*{n}", t, x)}
            for n in range(1, 3 if quick else 4)
        ]
        for spec in ("mlp:gelu", "swiglu")
    }
    return {"one": one, "many": many}


def draw(figure: Figure, measured: dict[str, Any]) -> None:
    """Curves of one block; slopes of chains."""
    left, right = figure.subplots(1, 2)
    for (spec, row), colour in zip(measured["one"].items(), COLOURS, strict=False):
        first = row["moment"][0]
        t0 = row["t"][0]
        left.loglog(
            row["t"], row["moment"], "o", ms=4, color=colour, label=f"{spec}: {row['slope']:.2f}"
        )
        left.loglog(
            row["t"], [first * (t / t0) ** row["predicted"] for t in row["t"]], color=colour, lw=0.8
        )
    left.set(
        title="One block: slope of E[a²]",
        xlabel="t",
        ylabel="second moment of the unit (lines: predicted power)",
    )
    left.legend(frameon=False, title="measured slope")
    for (spec, rows), colour in zip(
        measured["many"].items(), (COLOURS[0], COLOURS[2]), strict=True
    ):
        n = [r["blocks"] for r in rows]
        right.plot(n, [r["predicted"] for r in rows], color=colour, lw=1)
        law = "6(2ⁿ − 1)" if spec == "swiglu" else "4n"
        right.plot(n, [r["slope"] for r in rows], "o", color=colour, label=f"{spec}: {law}")
    right.set(
        title="Chains (lines: predicted)",
        xlabel="blocks, n",
        ylabel="slope of E[a²]",
        xticks=n,
    )
    right.legend(frameon=False)
