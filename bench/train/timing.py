"""CPU time of a step and memory of the state, the optimizers taking turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from bench.train.optimizers import RECIPES, state_bytes
from bench.train.problems import Problem
from bench.train.run import take_step

RATE = 1e-5  # the weights hardly move
WARM = 3


def timing(problem: Problem, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Time forward, backward and step of each optimizer, in rounds over all of them.

    CPU time of this process, which does not count what others take of a shared machine; in one
    thread it is what a clock shows on an idle one.

    Returns:
        For each: ``seconds`` (20th, 50th, 80th percentile of a whole step), ``optimizer_seconds``
        (of the optimizers' part alone), ``ratio`` (median over rounds of the whole step over
        AdamW's in the same round, None without AdamW), ``optimizer_ratio`` (the same of the
        optimizers' part), ``state_bytes`` and ``parameter_bytes``.
    """
    batch = problem.sample(0, 0)
    takers = []
    for name in names:
        model = problem.model(0)
        takers.append((name, model, RECIPES[name].make(model, RATE, problem.gauges())))
    whole: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[float]] = {name: [] for name in names}
    for k in range(WARM + rounds):
        for name, model, optimizers in takers[k % len(takers) :] + takers[: k % len(takers)]:
            start = time.process_time()
            take_step(problem, model, optimizers, batch)
            seconds = time.process_time() - start
            start = time.process_time()
            for optimizer in optimizers:
                optimizer.step()
            if k >= WARM:
                whole[name].append(seconds)
                parts[name].append(time.process_time() - start)
    return [
        {
            "optimizer": name,
            "seconds": _percentiles(whole[name]),
            "optimizer_seconds": _percentiles(parts[name]),
            "ratio": _ratio(whole, name),
            "optimizer_ratio": _ratio(parts, name),
            "state_bytes": state_bytes(optimizers, model),
            "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        }
        for name, model, optimizers in takers
    ]


def _percentiles(values: list[float]) -> list[float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return [fifths[0], statistics.median(values), fifths[-1]]


def _ratio(times: dict[str, list[float]], name: str) -> float | None:
    if "AdamW" not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times["AdamW"], strict=True))
