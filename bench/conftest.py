"""Options of the benchmarks, and the results file that a complete run leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import peak, results
from bench.cases import CPU
from bench.measure import against_bound


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of every case"
    )
    group.addoption("--seconds", type=float, default=2.0, help="time for the rounds of each case")
    group.addoption(
        "--results",
        nargs="?",
        const="",
        default=None,
        metavar="FILE",
        help="write the rows of a complete run (default: bench/results/cpu-<machine>.json)",
    )


#: What became of the results file.
OUTCOME = pytest.StashKey[str]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if OUTCOME in config.stash:
        terminalreporter.write_line(config.stash[OUTCOME])


class Collected:
    """The rows of this run, and the ceilings that they are set against."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.load = os.getloadavg()[0]
        self.peaks = peak.measure(threads)
        self.rows: list[dict[str, Any]] = []

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows of a case."""
        self.rows += rows
        self._against_bounds(rows)

    def finish(self) -> None:
        """Measure the peaks again and keep the better: something else may have run before."""
        self.peaks = peak.better(self.peaks, peak.measure(self.threads))
        self._against_bounds(self.rows)

    def _against_bounds(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            against_bound(row, peak.ceilings(self.peaks, self.threads))


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest) -> Iterator[Collected]:
    """Collect rows; write them at the end if the run was complete."""
    option = request.config.getoption
    found = Collected(option("--threads"))
    yield found
    if option("--results") is None:
        return
    missing = {case.name for case in CPU} - {row["case"] for row in found.rows}
    if missing:
        request.config.stash[OUTCOME] = f"not written: {len(missing)} of {len(CPU)} cases not run"
        return
    found.finish()
    path = Path(option("--results")) if option("--results") else results.cpu_file()
    machine = results.machine(f"{results.cpu_name()}, {os.cpu_count()} cores")
    machine["load"] = found.load
    results.write(path, {"machine": machine, "peaks": found.peaks, "rows": found.rows})
    request.config.stash[OUTCOME] = f"written: {path}"
