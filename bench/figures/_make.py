"""Measure, write the numbers, read them back and draw: one PNG, SVG and JSON for each figure."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench import results
from bench.figures import Entry
from deaddir_fast.scan.plots import STYLE
from deaddir_fast.scan.report import Staged, to_json

DPI = 170


def paint(entry: Entry, measured: dict[str, Any]) -> Figure:
    """Draw a figure from its numbers."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=entry.size, layout="constrained")
        entry.draw(figure, measured)
        figure.canvas.draw()  # layout and tick labels under this style
    return figure


def make(entry: Entry, out: Path, quick: bool = False) -> Path:
    """Write NAME.json, NAME.png and NAME.svg into ``out``, all or none; returns the PNG's path."""
    start = time.perf_counter()
    content = {
        "figure": entry.name,
        "caption": entry.caption,
        "quick": quick,
        "machine": results.machine(f"{results.cpu_name()}, {os.cpu_count()} cores"),
        "measured": entry.measure(quick),
    }
    content["seconds"] = round(time.perf_counter() - start, 2)
    text = to_json(content)
    # What is drawn is what was written.
    figure = paint(entry, json.loads(text)["measured"])
    with Staged(out) as folder, matplotlib.rc_context(STYLE):
        (folder / f"{entry.name}.json").write_text(text)
        figure.savefig(folder / f"{entry.name}.png", dpi=DPI)
        figure.savefig(folder / f"{entry.name}.svg", metadata={"Date": None})
    return out / f"{entry.name}.png"
