"""The device that `bench.gpu` measures: time, memory and ceilings on it.

A GPU, or the CPU with Triton's interpreter, where the same steps run and times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.results import cpu_name
from bench.timing import HOPELESS_ROUNDS, hopeless

Calls = Mapping[str, Callable[[int], Any]]

#: Clock cycles that the device sleeps before each round, so that the whole round is queued before
#: its first kernel starts: events then enclose the kernels and not the gaps between launches.
SLEEP = 4_000_000


class Interpreter:
    """The CPU, interpreting the kernels."""

    name = "cpu"
    note = "Triton's interpreter on a CPU, tiny sizes: times mean nothing."
    l2_bytes = 0

    def describe(self) -> dict[str, Any]:
        """What identifies the device."""
        return {"device": f"{cpu_name()} (Triton's interpreter)"}

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_memory(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """The result, and no measure of memory."""
        return call(), None

    def rounds(self, calls: Calls, count: Mapping[str, int]) -> dict[str, list[float]]:
        """Times of calls in turns."""
        return {n: [self.once(lambda n=n, k=k: calls[n](k)) for k in range(2)] for n in calls}

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call itself: there are no graphs."""
        return call

    def free(self) -> None:
        """Nothing is cached."""

    def alive(self) -> bool:
        """A CPU always answers."""
        return True


class Gpu:
    """A CUDA device (or ROCm, which torch calls by the same name)."""

    name = "cuda"
    note = ""

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.l2_bytes = getattr(self.properties, "L2_cache_size", 0) or 64 * 2**20

    def describe(self) -> dict[str, Any]:
        """What identifies the device."""
        return {
            "device": self.properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "multiprocessors": self.properties.multi_processor_count,
            "memory_bytes": self.properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "cuda": torch.version.cuda or torch.version.hip,
        }

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, between events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_memory(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """The result, and the peak of allocated memory over what was allocated before."""
        self.free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def rounds(self, calls: Calls, count: Mapping[str, int]) -> dict[str, list[float]]:
        """Times of calls in turns; call k of an implementation gets k, to choose its inputs."""
        events: dict[str, list[Any]] = {name: [] for name in calls}
        for k in range(max(count.values(), default=0)):
            torch.cuda._sleep(SLEEP)
            for name, call in calls.items():
                if k < count[name]:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    call(k)
                    end.record()
                    events[name].append((start, end))
            torch.cuda.synchronize()
        return {n: [s.elapsed_time(e) / 1e3 for s, e in pairs] for n, pairs in events.items()}

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The replay of a graph of the call, which is not made."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def free(self) -> None:
        """Give cached memory back."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def alive(self) -> bool:
        """Whether the device still computes: an illegal access fails every later call."""
        try:
            return float(torch.ones(1, device="cuda").sum()) == 1.0
        except RuntimeError:
            return False


Device = Interpreter | Gpu


def times(device: Device, calls: Calls, first: str, seconds: float) -> dict[str, list[float]]:
    """Times of each call, in turns, in about ``seconds``; ``first`` is timed in every round."""
    for call in calls.values():  # compile, choose algorithms, fill the allocator
        call(0)
    once = {name: device.once(lambda call=call: call(1)) for name, call in calls.items()}
    out = hopeless({name: s for name, s in once.items() if name != first})
    left = seconds - HOPELESS_ROUNDS * sum(once[name] for name in out)
    each = sum(s for name, s in once.items() if name not in out) + 2e-3
    rounds = int(np.clip(left / each, 10, 100))
    return device.rounds(calls, {n: HOPELESS_ROUNDS if n in out else rounds for n in calls})


def cold_copies(device: Device, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Enough copies of the inputs that a round never finds them in the cache."""
    moved = sum(x.nbytes for x in args if isinstance(x, Tensor))
    count = int(np.clip(4 * device.l2_bytes / max(1, moved) + 1, 2, 32))
    return [args] + [
        tuple(x.clone() if isinstance(x, Tensor) else x for x in args) for _ in range(count - 1)
    ]


# --- ceilings -------------------------------------------------------------------------------------


def ceilings(device: Device, tiny: bool) -> dict[str, Any]:
    """What a plain copy moves (bytes per second, read and written) and plain products compute."""
    size = 64 if tiny else 8192
    source = torch.ones(2**12 if tiny else 2**29, device=device.name)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median(device, lambda: target.copy_(source))
    rates = {}
    for name, dtype in (
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("tf32", torch.float32),
        ("fp32", torch.float32),
        ("fp64", torch.float64),
    ):
        settings = torch.backends.cuda.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "tf32" if name == "tf32" else "ieee"
        try:
            a, b = torch.randn(2, size, size, device=device.name).to(dtype)
            rates[name] = 2 * size**3 / _median(device, lambda a=a, b=b: a @ b)
        finally:
            settings.fp32_precision = before
    device.free()
    return {"copy": copy, "matmul": rates}


def _median(device: Device, call: Callable[[], Any]) -> float:
    return float(np.median(times(device, {"": lambda k: call()}, "", 0.2)[""]))
