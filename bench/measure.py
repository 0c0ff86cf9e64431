"""One case on the CPU: gate every implementation on fp64, then time those that pass, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import accuracy
from bench.cases import NAMES, Case
from bench.problems import Problem
from bench.problems._problem import Draw, in_fp64
from bench.timing import Race, percentiles
from deaddir_fast import _backend
from deaddir_fast.ops._dispatch import OPS

OURS = "ours"


def route(problem: Problem) -> str:
    """The route that is measured: "cpu" where the operation has a C++ kernel, else "auto"."""
    compiled = any(kernel.route == "cpu" for kernel in OPS[problem.op].kernels)
    return "cpu" if compiled and _backend.unavailable("cpu") is None else "auto"


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Let torch and our kernels use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def implementations(problem: Problem) -> dict[str, Callable[..., Tensor]]:
    """Ours on its route first, then the torch formulations, by name."""
    chosen = route(problem)

    def ours(*args: Any) -> Tensor:
        with _backend.backend(chosen):
            return problem.ours(*args)

    return {OURS: ours, **{form.name: form.run for form in problem.forms}}


@dataclass
class Gate:
    """The error of an implementation, and why it is not to be trusted (empty: it is)."""

    error: float
    problem: str = ""


def gate(
    case: Case, name: str, run: Callable[..., Any], args: tuple[Any, ...], truth: Tensor
) -> Gate | None:
    """Compare one implementation with the truth; None where it does not apply here."""
    stored = case.of.written is not None
    limit = accuracy.limit(case.dtype, ours=name == OURS, stored=stored)
    try:
        result = case.of.result(run, args)
    except NotImplementedError:
        return None
    except Exception as error:  # whatever it raises is the finding
        return Gate(float("inf"), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    found = accuracy.error(result, truth, by_element=case.of.by_element)
    return Gate(found, "" if found <= limit else f"error {found:.1e} above {limit:.0e}")


class Measured:
    """A case, gated and ready to be timed by ``race``."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case, self.threads = case, threads
        self.args = case.of.build(case.sizes, Draw(case.dtype, "cpu"))
        truth = case.of.result(case.of.truth, in_fp64(self.args))
        self.gates: dict[str, Gate] = {}
        racing: dict[str, Callable[[], Tensor]] = {}
        for name, run in implementations(case.of).items():
            found = gate(case, name, run, self.args, truth)
            if found is not None:
                self.gates[name] = found
                if not found.problem:
                    racing[name] = _bind(run, case.of.fresh(self.args))
        self.green = OURS in racing  # ours agrees with the truth
        self.race = Race((OURS, racing.pop(OURS, lambda: None)), racing)
        self.moved = case.of.bytes(self.args, truth)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each implementation, as results are stored (but for `against_bound`)."""
        case = self.case
        rows = []
        for name, gate in self.gates.items():
            samples = self.race.samples.get(name, []) if not gate.problem else []
            row: dict[str, Any] = {
                "case": case.name,
                "implementation": name,
                "problem": case.problem,
                "shape": dict(case.sizes),
                "dtype": NAMES[case.dtype],
                "threads": self.threads,
                "route": _route_name(case.of) if name == OURS else "torch",
                "error": gate.error,
                "gate": gate.problem or "ok",
                "flops": float(case.of.flops(case.sizes)),
                "bytes": self.moved,
                "rounds": len(samples),
            }
            if samples:
                row |= percentiles(samples)
            if name == OURS:
                row |= {k: v for k in ("target", "memory") if (v := getattr(case, k))}
            rows.append(row)
        return rows


def against_bound(row: dict[str, Any], ceilings: tuple[dict[str, float], float]) -> None:
    """Enter which bound is the higher, and what part of the time it accounts for."""
    rates, bandwidth = ceilings
    arithmetic = row["flops"] / rates["fp64" if row["dtype"] == "fp64" else "fp32"]
    memory = row["bytes"] / bandwidth
    row["bound"] = "arithmetic" if arithmetic >= memory else "memory"
    if "p50" in row:
        row["share"] = max(arithmetic, memory) / row["p50"]


def _bind(run: Callable[..., Tensor], args: tuple[Any, ...]) -> Callable[[], Tensor]:
    return lambda: run(*args)


def _route_name(problem: Problem) -> str:
    return "C++" if route(problem) == "cpu" else "reference"
