"""Command line of the training comparison."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench import results

DEFAULT = results.ROOT / "out" / "train"  # not under version control


def main(arguments: list[str] | None = None) -> int:
    """Train, compare and report."""
    # One thread a training, below numpy too; set before it is loaded, and for the workers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from bench.train import report
    from bench.train.compare import Plan, compare
    from bench.train.optimizers import RECIPES
    from bench.train.problems import PROBLEMS

    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description="Small trainings by DDCAdam, AdamW, SGD and Muon; goes on after a kill.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny problems, under a minute")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=DEFAULT, help="runs, scans and the figure")
    parser.add_argument("--results", type=Path, help="JSON (default: bench/results/train-...)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1:
        parser.error(f"--jobs: expected a positive number, got {chosen.jobs}")
    folder = chosen.out / "quick" if chosen.quick else chosen.out
    plan = Plan(
        problems=tuple(chosen.problems),
        optimizers=tuple(chosen.optimizers),
        rates=2 if chosen.quick else 5,
        seeds=2 if chosen.quick else 3,
        rounds=3 if chosen.quick else 40,
        quick=chosen.quick,
        folder=folder,
        jobs=1 if chosen.quick else chosen.jobs,
    )
    found = compare(plan)
    content = {
        "machine": results.machine(f"{results.cpu_name()}, {os.cpu_count()} cores"),
        **found,
    }
    default = folder / "results.json" if chosen.quick else report.path_of()
    path = chosen.results or default
    results.write(path, content)
    content = results.read(path)  # what is printed and drawn is what was written
    report.draw(content, folder / "figure.png")
    print(report.markdown(content))
    print(f"written: {path}, {folder / 'figure.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
