"""Peak extra memory of one implementation, in a process of its own.

    python -m bench.memory CASE IMPLEMENTATION THREADS

The child draws the inputs, runs the implementation on a small problem (libraries load, threads
start), resets the peak of its resident memory and makes one call. Growth of that peak over the
memory resident before the call is what the call needed beyond its inputs, its result included.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: glibc keeps freed blocks below a threshold that it raises as it goes; memory kept from building
#: the inputs would hide what the call takes.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def extra(case: str, implementation: str, threads: int) -> int:
    """Bytes of peak extra memory, measured in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", case, implementation, str(threads)],
        cwd=ROOT,
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{case}, {implementation}: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["extra_bytes"])


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> bool:
    """Set the peak to what is resident now; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _child(name: str, implementation: str, threads: int) -> int:
    import torch

    from bench.cases import CPU
    from bench.measure import implementations
    from bench.problems._problem import Draw

    torch.set_num_threads(threads)
    case = next(c for c in CPU if c.name == name)
    call = implementations(case.of)[implementation]
    args = case.of.build(case.sizes, Draw(case.dtype, "cpu"))
    for sizes in (case.of.small[0], case.of.small[-1]):
        call(*case.of.build(sizes, Draw(case.dtype, "cpu")))
    return growth(lambda: call(*args))


def growth(call: Callable[[], object]) -> int:
    """Bytes by which resident memory rose above what it was, at its highest in one call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if _reset_peak():
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    print(json.dumps({"extra_bytes": _child(sys.argv[1], sys.argv[2], int(sys.argv[3]))}))
