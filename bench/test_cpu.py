"""The operations on this CPU against torch: `make bench`, or `python -m pytest bench/test_cpu.py`.

Every implementation is checked against fp64 first; one that fails is not timed. The others take
turns in one process, and medians are compared. No test fails for being slow.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench import memory
from bench.cases import CPU, Case
from bench.measure import OURS, Measured, threads_set
from bench.table import split


@pytest.mark.parametrize("case", CPU, ids=lambda case: case.name.replace(" ", "-"))
def test_case(benchmark: Any, case: Case, collected: Any, request: pytest.FixtureRequest) -> None:
    with threads_set(collected.threads):
        measured = Measured(case, collected.threads)
        race = measured.race
        rounds = race.rounds(request.config.getoption("--seconds"))
        if measured.green:
            benchmark.pedantic(race.first, setup=race.others, rounds=rounds)
        else:  # the others are still worth knowing
            for _ in range(rounds):
                race.others()
    rows = measured.rows()
    if case.weigh:
        for row in rows:
            if row["gate"] == "ok":
                row["extra_bytes"] = memory.extra(
                    case.name, row["implementation"], collected.threads
                )
    collected.add(rows)
    ours, best = split(rows)
    benchmark.extra_info.update(
        route=ours["route"],
        error=ours["error"],
        bound=ours["bound"],
        share=ours.get("share"),
        best=best and best["implementation"],
        best_error=best and best["error"],
        ratio=best["p50"] / ours["p50"] if best and "p50" in ours else None,
        errors={row["implementation"]: row["error"] for row in rows},
        extra_bytes={row["implementation"]: row.get("extra_bytes") for row in rows},
    )
    assert measured.gates[OURS].problem == ""
