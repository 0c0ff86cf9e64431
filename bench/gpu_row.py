"""One row of `bench.gpu`: gate at full size, memory, time against torch eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import accuracy
from bench.cases import NAMES, Case
from bench.gpu_checks import message
from bench.gpu_device import Device, cold_copies, times
from bench.problems._problem import Draw, in_fp64
from bench.table import OURS, milliseconds, split
from bench.timing import percentiles
from deaddir_fast._backend import backend

SECONDS = 1.0


def rows(case: Case, device: Device, peaks: dict[str, Any], compiled: bool) -> list[dict[str, Any]]:
    """Measure one case: a row for each implementation."""
    try:
        torch._dynamo.reset()
        return _rows(case, device, peaks, compiled)
    except Exception as error:  # building the inputs or the truth
        row = _row(case, OURS, peaks, 0)
        return [row | {"error": None, "gate": message(error)}]
    finally:
        device.free()


def _rows(
    case: Case, device: Device, peaks: dict[str, Any], compiled: bool
) -> list[dict[str, Any]]:
    problem = case.of
    args = problem.build(case.sizes, Draw(case.dtype, device.name))
    truth = problem.result(problem.truth, in_fp64(args))
    device.free()
    moved = problem.bytes(args, truth)

    def ours(*args: Any) -> Any:
        with backend("triton"):
            return problem.ours(*args)

    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Callable[..., Any]] = {}
    stored = problem.written is not None

    def enter(name: str, run: Callable[..., Any]) -> None:
        """Gate an implementation; it is timed if it passes."""
        limit = accuracy.limit(case.dtype, ours=name == OURS, stored=stored)
        row = _row(case, name, peaks, moved)
        try:
            given = problem.fresh(args)
            result, extra = device.peak_memory(lambda: run(*given))
            if problem.written is not None:
                result = problem.written(*given)
        except NotImplementedError as error:
            if name != OURS:  # the formulation does not apply here
                return
            found[name] = row | {"error": None, "gate": message(error)}
            return
        except Exception as error:  # whatever it raises is the finding
            found[name] = row | {"error": None, "gate": message(error)}
            return
        error = accuracy.error(result, truth, by_element=problem.by_element)
        row |= {"error": error} | ({} if extra is None else {"extra_bytes": extra})
        if error <= limit:
            running[name] = run
        else:
            row["gate"] = f"error {error:.1e} above {limit:.0e}"
        found[name] = row

    enter(OURS, ours)
    for form in problem.forms:
        enter(form.name, form.run)
    eager = [name for name in running if name != OURS]
    if compiled and eager:
        given = problem.fresh(args)
        once = {n: device.once(lambda n=n: running[n](*given)) for n in eager}
        best = min(once, key=once.__getitem__)
        backend_name = "inductor" if device.name == "cuda" else "aot_eager"
        build = torch.compile(running[best], backend=backend_name, dynamic=False)
        name = f"torch.compile: {best}"
        enter(name, build)
        if name in running:  # the first call compiled: its peak is not that of the code
            _, extra = device.peak_memory(lambda: build(*given))
            found[name] |= {} if extra is None else {"extra_bytes": extra}
    copies = cold_copies(device, problem.fresh(args))
    calls = {
        name: lambda k, run=run: run(*copies[k % len(copies)]) for name, run in running.items()
    }
    if calls:
        for name, samples in times(device, calls, OURS, SECONDS).items():
            row = found[name]
            row |= percentiles(samples) | {"rounds": len(samples)}
            if "floor" in row:
                row["share"] = row["floor"] / row["p50"]
    for row in found.values():
        row.pop("floor", None)
    return list(found.values())


def _row(case: Case, name: str, peaks: dict[str, Any], moved: float) -> dict[str, Any]:
    """What is known before anything runs; ``floor`` is the time of the bound."""
    work = float(case.of.flops(case.sizes))
    row: dict[str, Any] = {
        "case": case.name,
        "implementation": name,
        "problem": case.problem,
        "op": case.of.op,
        "shape": dict(case.sizes),
        "dtype": NAMES[case.dtype],
        "route": "Triton" if name == OURS else "torch",
        "gate": "ok",
        "flops": work,
        "bytes": moved,
    }
    if peaks:
        arithmetic, memory = work / peaks["matmul"][NAMES[case.dtype]], moved / peaks["copy"]
        row["bound"] = "arithmetic" if arithmetic >= memory else "memory"
        row["floor"] = max(arithmetic, memory)
    if name == OURS:
        row |= {k: v for k in ("target", "memory") if (v := getattr(case, k))}
        row |= {"share_target": case.share} if case.share else {}
    return row


def cells(group: list[dict[str, Any]]) -> tuple[str, ...]:
    """The cells of one case in the printed table."""
    ours, best = split(group)
    shape = " ".join(f"{k}={v}" for k, v in ours["shape"].items())
    name = f"{ours['problem']} {shape} {ours['dtype']}"
    green = ours["gate"] == "ok"
    time = rate = share = "—"
    if "p50" in ours:
        low, middle, high = (milliseconds(ours[q]) for q in ("p20", "p50", "p80"))
        time = f"{middle} ({low}–{high})"
        if ours.get("bound") == "arithmetic":
            rate = f"{ours['flops'] / ours['p50'] / 1e12:.1f} TFLOP/s"
        else:
            rate = f"{ours['bytes'] / ours['p50'] / 1e12:.2f} TB/s"
        share = f"{100 * ours['share']:.0f} %" if "share" in ours else "—"
    other = "—" if best is None else f"{milliseconds(best['p50'])} {best['implementation']}"
    ratio = f"{best['p50'] / ours['p50']:.2f}" if green and best and "p50" in ours else "—"
    extra = [row.get("extra_bytes") for row in (ours, best or {})]
    memory = " / ".join("—" if x is None else f"{x / 2**20:.0f} MiB" for x in extra)
    error = "∞" if ours["error"] is None else f"{ours['error']:.0e}"
    return name, time, other, ratio, rate, share, memory, error, "ok" if green else ours["gate"]
