"""The comparison: every problem by every optimizer, at its learning rates and by several seeds."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.train import problems, run
from bench.train.optimizers import RECIPES
from bench.train.outcome import outcome
from bench.train.problems import PROBLEMS, Problem
from bench.train.run import Spec
from bench.train.timing import timing
from deaddir_fast._progress import Bars, stages


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        problems, optimizers: names.
        rates: learning rates of each grid that are tried.
        seeds: trainings at the best one.
        rounds: of the timing.
        quick: whether the problems are the tiny ones.
        folder: of the runs and scans.
        jobs: trainings at a time, each in one thread.
    """

    problems: tuple[str, ...]
    optimizers: tuple[str, ...]
    rates: int
    seeds: int
    rounds: int
    quick: bool
    folder: Path
    jobs: int

    @property
    def runs(self) -> Path:
        """Folder of the trainings."""
        return self.folder / "runs"

    def problem(self, name: str) -> Problem:
        """A problem at the size that is run."""
        return problem(name, self.quick)

    def grid(self, optimizer: str) -> tuple[float, ...]:
        """Learning rates tried: the middle of the optimizer's grid if not all."""
        grid = RECIPES[optimizer].grid
        first = (len(grid) - self.rates) // 2
        return grid[first : first + self.rates]


def problem(name: str, quick: bool) -> Problem:
    """A problem, or the tiny one of that name."""
    return problems.quick(PROBLEMS[name]) if quick else PROBLEMS[name]


def train_one(name: str, quick: bool, which: Spec, runs: Path) -> dict[str, Any]:
    """One training in one thread: the same numbers on any number of cores."""
    torch.set_num_threads(1)
    return run.train(problem(name, quick), which, runs)


def outcome_of(name: str, quick: bool, which: Spec, folder: Path) -> dict[str, Any]:
    """Drift and readable layers of a finished training."""
    return outcome(problem(name, quick), which, folder / "runs", folder / "scans")


def _end_with_parent() -> None:
    """A worker whose parent was killed has nobody to work for."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _workers(jobs: int) -> Iterator[Executor | None]:
    """Processes to work in; with one job it is this process."""
    if jobs == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _all(
    pool: Executor | None,
    task: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    advance: Callable[[int], None],
) -> list[Any]:
    """Results of a task for each of the arguments, in their order."""
    if pool is None:
        found = []
        for one in arguments:
            found.append(task(*one))
            advance(1)
        return found
    futures = [pool.submit(task, *one) for one in arguments]
    for future in as_completed(futures):
        future.result()
        advance(1)
    return [future.result() for future in futures]


def final(result: dict[str, Any], part: str = "train") -> float:
    """The loss at the end of a training; infinite if it diverged."""
    value = float(result["curve"][-1][part])
    return math.inf if result["diverged"] or not math.isfinite(value) else value


def compare(plan: Plan, progress: bool | None = None) -> dict[str, Any]:
    """Run everything that is not on disk yet.

    Returns:
        ``settings``, ``problems`` and ``rows``, one for each problem and optimizer.
    """
    torch.set_num_threads(1)
    pairs = [(p, o) for p in plan.problems for o in plan.optimizers]
    with stages(progress) as bars, _workers(plan.jobs) as pool:
        grids = _grids(plan, pairs, pool, bars)
        best = {pair: min(grid, key=final) for pair, grid in grids.items()}
        seeds, moved = _seeds(plan, best, pool, bars)
        specs = {pair: Spec(**result["spec"]) for pair, result in best.items()}
        sound = [pair for pair in pairs if math.isfinite(final(best[pair]))]
        arguments = [(p, plan.quick, specs[p, o], plan.folder) for p, o in sound]
        found = _all(pool, outcome_of, arguments, bars.task("scans", len(sound)))
        outcomes = dict(zip(sound, found, strict=True))
    times: dict[tuple[str, str], dict[str, Any]] = {}
    with stages(progress) as bars:  # alone: the workers are gone
        advance = bars.task("timing", len(plan.problems))
        for name in plan.problems:
            for row in timing(plan.problem(name), plan.optimizers, plan.rounds):
                times[name, row.pop("optimizer")] = row
            advance(1)
    return {
        "settings": {
            "quick": plan.quick,
            "seeds": plan.seeds,
            "warm_up": run.WARM_UP,
            "last": run.LAST,
            "weight_decay": 0.0,
            "threads": 1,
            "dtype": "fp32",
        },
        "problems": [_about(plan.problem(name)) for name in plan.problems],
        "rows": [
            {
                "problem": pair[0],
                "optimizer": pair[1],
                "lr": specs[pair].lr,
                "edge": specs[pair].lr in (plan.grid(pair[1])[0], plan.grid(pair[1])[-1]),
                "grid": [{"lr": r["spec"]["lr"], "train": final(r)} for r in grids[pair]],
                "train": [final(r) for r in seeds[pair]],
                "held": [final(r, "held") for r in seeds[pair]],
                "curves": [r["curve"] for r in seeds[pair]],
                "moved": final(moved[pair]),
                **times[pair],
                **outcomes.get(pair, {"drift": None, "scan": None}),
            }
            for pair in pairs
        ],
    }


def _about(one: Problem) -> dict[str, Any]:
    size = sum(p.numel() for p in one.model(0).parameters())
    keys = ("name", "about", "steps", "batch", "smoothing")
    return {**{k: getattr(one, k) for k in keys}, "parameters": size}


Pair = tuple[str, str]


def _grids(
    plan: Plan, pairs: Sequence[Pair], pool: Executor | None, bars: Bars
) -> dict[Pair, list[dict[str, Any]]]:
    """Results of each pair at its learning rates, from the first seed."""
    todo = [(p, o, lr) for p, o in pairs for lr in plan.grid(o)]
    specs = [run.spec(plan.problem(p), o, lr, 0) for p, o, lr in todo]
    arguments = [(s.problem, plan.quick, s, plan.runs) for s in specs]
    results = _all(pool, train_one, arguments, bars.task("grids", len(todo)))
    found: dict[Pair, list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for (p, o, _), result in zip(todo, results, strict=True):
        found[p, o].append(result)
    return found


def _seeds(
    plan: Plan, best: dict[Pair, dict[str, Any]], pool: Executor | None, bars: Bars
) -> tuple[dict[Pair, list[dict[str, Any]]], dict[Pair, dict[str, Any]]]:
    """Results at the best learning rate: of all seeds, and of the first from a moved start."""
    todo = []
    for (p, o), result in best.items():
        lr = result["spec"]["lr"]
        todo += [run.spec(plan.problem(p), o, lr, seed) for seed in range(1, plan.seeds)]
        todo.append(run.spec(plan.problem(p), o, lr, 0, moved=True))
    arguments = [(s.problem, plan.quick, s, plan.runs) for s in todo]
    results = _all(pool, train_one, arguments, bars.task("seeds", len(todo)))
    seeds = {pair: [result] for pair, result in best.items()}
    moved = {}
    for s, result in zip(todo, results, strict=True):
        if s.moved:
            moved[s.problem, s.optimizer] = result
        else:
            seeds[s.problem, s.optimizer].append(result)
    return seeds, moved
