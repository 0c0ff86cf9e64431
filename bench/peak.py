"""What this machine reaches: fused multiply-adds and memory bandwidth, measured.

    python -m bench.peak

The FMA peak comes from compiled code (`deaddir_fast._C.fma_peak`) where the extension has it, else
from the best large matrix product of torch, and is labelled as what it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from deaddir_fast import _native


def _best(call: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _matmul(dtype: torch.dtype) -> float:
    size = 1536 if dtype == torch.float64 else 2048
    a, b = torch.randn(2, size, size, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out))


def flops(threads: int) -> tuple[dict[str, float], str]:
    """FLOP/s in fp32 and fp64, and where they come from."""
    compiled = getattr(_native.extension, "fma_peak", None)
    if compiled is not None:
        rates = {name: max(compiled(threads, name == "fp64") for _ in range(3)) for name in TYPES}
        return rates, "multiply-adds in registers"
    return {name: _matmul(dtype) for name, dtype in TYPES.items()}, "best torch matmul"


TYPES = {"fp32": torch.float32, "fp64": torch.float64}


def bandwidth() -> dict[str, float]:
    """Bytes per second of a large copy (read and written) and of a large sum (read)."""
    x = torch.ones(2**26)  # 256 MiB, far beyond the caches
    y = torch.empty_like(x)
    moved = x.numel() * x.itemsize
    return {
        "copy": 2 * moved / _best(lambda: y.copy_(x)),
        "sum": moved / _best(lambda: x.sum()),
    }


def measure(threads: int) -> dict[str, Any]:
    """All of it, with ``threads`` threads and with one."""
    before = torch.get_num_threads()
    found: dict[str, Any] = {}
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            rates, found["source"] = flops(count)
            found[f"{count} threads" if count > 1 else "1 thread"] = {
                "flops": rates,
                "bytes": bandwidth(),
            }
    finally:
        torch.set_num_threads(before)
    return found


def better(one: Any, other: Any) -> Any:
    """The larger of each pair of rates of two measurements."""
    if isinstance(one, dict):
        return {name: better(value, other[name]) for name, value in one.items()}
    return max(one, other)


def ceilings(peaks: dict[str, Any], threads: int) -> tuple[dict[str, float], float]:
    """FLOP/s by type, and the better of the two bandwidths, for so many threads."""
    at = peaks[f"{threads} threads" if threads > 1 else "1 thread"]
    return at["flops"], max(at["bytes"].values())


if __name__ == "__main__":
    import json

    print(json.dumps(measure(torch.get_num_threads()), indent=2))
