"""Command line of the figures."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import figures
from bench.results import ROOT

DEFAULT = ROOT / "out" / "figures"  # not under version control


def main(arguments: list[str] | None = None) -> int:
    """Draw figures; 0 if all were drawn, 1 if one failed."""
    known = figures.names()
    parser = argparse.ArgumentParser(
        prog="python -m bench.figures",
        description="Measure and draw: PNG, SVG and the numbers as JSON for each figure.",
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(known)}")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="folder (default: out/figures)")
    parser.add_argument("--quick", action="store_true", help="coarse, to see that it runs")
    chosen = parser.parse_args(arguments)
    for name in chosen.names:
        if name not in known:
            parser.error(f"no figure called {name!r}; there are {', '.join(known)}")

    # Fits factorise many small matrices: threads of the BLAS under numpy only cost time there.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from bench.figures._make import make  # matplotlib and torch: not for --help

    console = Console()
    failed = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name in chosen.names or known:
            task = progress.add_task(name)
            start = time.perf_counter()
            try:
                path = make(figures.load(name), chosen.out, chosen.quick)
            except Exception:
                failed.append(name)
                console.print(f"[red]failed[/red]  {name}")
                console.print(traceback.format_exc(), markup=False, highlight=False)
            else:
                console.print(
                    f"{name}: {path} ({time.perf_counter() - start:.1f} s)", soft_wrap=True
                )
            progress.remove_task(task)
    if failed:
        console.print(f"{len(failed)} failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
