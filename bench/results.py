"""Results on disk: one JSON file for each machine, rows and what they were measured with.

    {"machine": {...}, "peaks": {...}, "rows": [{"case", "implementation", "problem", "shape",
     "dtype", "threads", "route", "error", "gate", "flops", "bytes", "bound", "rounds",
     "p20", "p50", "p80" (seconds), "share", "extra_bytes", ...}, ...]}

Fields that were not measured are missing. A gate other than "ok" says why there is no time.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent / "results"


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_file() -> Path:
    """Where results of this machine's processor go."""
    return FOLDER / f"cpu-{slug(cpu_name())}-{os.cpu_count()}-cores.json"


def revision() -> str:
    """The git revision, marked where the working tree differs from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def machine(device: str) -> dict[str, Any]:
    """Versions and names of what was measured with."""
    import torch

    from deaddir_fast import __version__, _native

    built = dict(_native.extension.build_info()) if _native.extension is not None else {}
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": device,
        "cores": os.cpu_count(),
        "deaddir_fast": __version__,
        "revision": revision(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "compiler": built.get("compiler"),
        "isa": built.get("isa"),
    }


def _plain(value: Any) -> Any:
    """Round to six digits; JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write(path: Path, content: dict[str, Any]) -> None:
    """Write all or nothing: a process killed half-way leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    head = {k: v for k, v in content.items() if k != "rows"}
    text = json.dumps(_plain(head), indent=1)[:-2]
    rows = ",\n".join("  " + json.dumps(_plain(row)) for row in content["rows"])
    beside.write_text(f'{text},\n "rows": [\n{rows}\n ]\n}}\n')
    beside.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote."""
    return json.loads(path.read_text())
