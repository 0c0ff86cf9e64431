"""What works on this machine: versions, threads, instruction sets, routes per operation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "scipy", "safetensors", "matplotlib", "scikit-learn")


def versions() -> dict[str, str | None]:
    """Installed versions by name; None where a package is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def examine() -> dict[str, Any]:
    """Everything `deaddir doctor` prints, ready for JSON."""
    import torch

    from deaddir_fast import __version__, _native
    from deaddir_fast._backend import routes, unavailable

    extension = _native.extension
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "deaddir_fast": __version__,
        "versions": versions(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "extension": dict(extension.build_info()) if extension is not None else None,
        "extension_missing": _native.why_not,
        "unavailable": {route: unavailable(route) for route in ("reference", "cpu", "triton")},
        "operations": _by_function(routes()),
    }


def _by_function(rows: dict[str, Any]) -> dict[str, Any]:
    """One row per public function: a form that writes in place runs on the plain one's kernels."""
    return {
        name.removesuffix("_"): row
        for name, row in rows.items()
        if not name.endswith("_") or name.removesuffix("_") not in rows
    }


def show(found: dict[str, Any], console: Any) -> None:
    """Print what :func:`examine` found on a rich console."""
    from rich.table import Table
    from rich.text import Text

    plain = Table(title="deaddir doctor", title_justify="left", show_header=False, box=None)
    plain.add_column(style="bold", no_wrap=True)
    plain.add_column()
    plain.add_row("deaddir_fast", found["deaddir_fast"])
    for name, version in found["versions"].items():
        plain.add_row(name, version or "[dim]not installed[/dim]")
    plain.add_row("platform", found["platform"])
    plain.add_row("cores", f"{found['cores']}, torch uses {found['torch_threads']} threads")
    plain.add_row("GPUs", ", ".join(found["gpus"]) or "[dim]none that torch sees[/dim]")
    built = found["extension"]
    if built is None:
        plain.add_row("C++ kernels", Text(str(found["extension_missing"]), "yellow"))
    else:
        plain.add_row(
            "C++ kernels",
            f"{built['isa']} in use (built for {', '.join(built['isas'])}; {built['compiler']})",
        )
    console.print(plain)

    reasons: list[str] = []
    table = Table(title="Routes", title_justify="left", header_style="bold")
    table.add_column("operation", no_wrap=True)
    routes = list(next(iter(found["operations"].values()), {}))
    for route in routes:
        table.add_column(route)
    for name, row in found["operations"].items():
        cells: list[str | Text] = [name]
        for route in routes:
            reason = row[route]
            if reason is None:
                cells.append(Text("works", "green"))
            elif reason == "no kernel for this operation":
                cells.append(Text("no kernel", "dim"))
            else:
                if reason not in reasons:
                    reasons.append(reason)
                cells.append(Text(f"no [{reasons.index(reason) + 1}]", "yellow"))
        table.add_row(*cells)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(Text(f"[{number}] {reason}", "yellow"))
