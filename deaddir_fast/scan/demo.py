"""``deaddir demo``: read networks whose answers are known, then one trained on real data."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from deaddir_fast import __version__
from deaddir_fast.scan import demo_digits, demo_exact, doctor, report, tables
from deaddir_fast.scan.demo_digits import DigitsReading
from deaddir_fast.scan.demo_exact import ExactCase, Ray


def _fit(ray: Ray) -> dict[str, Any]:
    fit = asdict(ray.fit)
    del fit["law"]
    content = {k: v for k, v in vars(ray).items() if k != "fit"}
    return {**content, "fit": fit, "agrees": ray.agrees}


def content(
    cases: list[ExactCase],
    chains: list[Ray],
    digits: DigitsReading | None,
    skipped: dict[str, str],
    arguments: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The report as plain data; see ``report.CONVENTIONS``."""
    exact = []
    for c in cases:
        row = {**vars(c), "agrees": c.agrees}
        for where in ("local", "deepest"):
            row[where] = {
                "rlct": getattr(c, where).rlct,
                "multiplicity": getattr(c, where).multiplicity,
                "source": row.pop(f"{where}_source"),
            }
        exact.append(row)
    return {
        "schema": report.SCHEMA,
        "conventions": report.CONVENTIONS,
        "deaddir_fast": __version__,
        "versions": doctor.versions(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "dtype": "float64",
        "arguments": arguments,
        "seconds": seconds,
        "exact": exact,
        "chains": [_fit(ray) for ray in chains],
        "digits": None
        if digits is None
        else {
            **vars(digits),
            "rays": [_fit(ray) for ray in digits.rays],
            "explained": digits.explained,
        },
        "skipped": skipped,
    }


def run(
    out: Path, *, seed: int = 0, quick: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run the demo, print its tables and write its report.

    Args:
        out: folder for report.json, curvature.png and curvature.svg; made if missing. The files
            appear together at the end, or not at all.
        seed: of every random draw.
        quick: fewer and smaller cases.
        console: where to print.

    Returns:
        The content of report.json before encoding.

    Raises:
        OSError: the folder cannot be written.
    """
    console = console or Console()
    start = time.perf_counter()
    cases: list[ExactCase] = []
    chains: list[Ray] = []
    digits: DigitsReading | None = None
    skipped: dict[str, str] = {}
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    with report.Staged(out) as folder, Progress(*columns, console=console) as progress:
        one = progress.add_task("triples against closed forms", total=demo_exact.count_cases(quick))
        two = progress.add_task(
            "orders of dead-unit chains", total=demo_exact.count_chains(quick), start=False
        )
        three = progress.add_task("handwritten digits", total=3, start=False)
        four = progress.add_task("picture and report", total=2, start=False)
        for case in demo_exact.exact_cases(seed, quick):
            cases.append(case)
            progress.advance(one)
        progress.start_task(two)
        for ray in demo_exact.chains(seed, quick):
            chains.append(ray)
            progress.advance(two)
        progress.start_task(three)
        done = 0

        def tell(text: str) -> None:
            nonlocal done
            progress.update(three, description=f"handwritten digits: {text}", completed=done)
            done += 1

        try:
            digits = demo_digits.read_digits(seed, quick, tell)
            progress.update(three, description="handwritten digits", completed=3)
        except ImportError as error:
            skipped["digits"] = (
                f"scikit-learn is needed for the digits ({error}); pip install 'deaddir_fast[demo]'"
            )
            progress.update(three, description="handwritten digits: skipped")
            progress.stop_task(three)
        progress.start_task(four)
        curves = chains + (digits.rays if digits else [])
        try:
            from deaddir_fast.scan import plots

            plots.save(plots.draw(curves, digits), folder)
        except ImportError as error:
            skipped["picture"] = (
                f"matplotlib is needed for the picture ({error}); pip install 'deaddir_fast[plot]'"
            )
        progress.advance(four)
        found = content(
            cases,
            chains,
            digits,
            skipped,
            {"seed": seed, "quick": quick},
            time.perf_counter() - start,
        )
        (folder / "report.json").write_text(report.to_json(found), encoding="utf-8")
        progress.advance(four)
    console.print(tables.exact(cases))
    for note in tables.exact_notes(cases):
        console.print(note)
    console.print(tables.rays(curves))
    if digits is not None:
        tables.digits(digits, console)
    for reason in skipped.values():
        console.print(Text(f"skipped: {reason}", "yellow"))
    names = sorted(p.name for p in out.iterdir() if p.name in WRITTEN)
    console.print(
        Text(f"wrote {', '.join(names)} to {out} in {time.perf_counter() - start:.0f} s", "bold")
    )
    return found


WRITTEN = ("report.json", "curvature.png", "curvature.svg")


def disagreements(found: dict[str, Any]) -> list[str]:
    """Names of exact cases and directions whose reading is not what mathematics says."""
    rays = found["chains"] + (found["digits"]["rays"] if found["digits"] else [])
    return [row["name"] for row in found["exact"] + rays if not row["agrees"]]
