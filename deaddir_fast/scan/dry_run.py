"""Time and memory of a scan from the shapes of its weights alone, before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from deaddir_fast.fisher.collect import LARGEST_HEAD
from deaddir_fast.ops.gram_packed import entries
from deaddir_fast.scan.load_model import ModelPlan
from deaddir_fast.scan.plan import machine_rate
from deaddir_fast.scan.run import FP64_SUMS, READ_IN_FP64


@dataclass(frozen=True)
class DryRun:
    """What a scan will take.

    Attributes:
        parameters, weights: numbers, and bytes in the precision they are read in.
        activations, sums: dtypes they will be held in.
        matrices: how many weights have factors of their own.
        sums_bytes: of all factors; also what the state on disk takes, twice while it is replaced.
        flops: of the factors.
        rate, seconds: FLOP/s measured here, and the estimate that follows from it.
        unknown: what could not be taken into account.
    """

    parameters: int
    weights: int
    activations: str
    sums: str
    matrices: int
    sums_bytes: int
    flops: float
    rate: float
    seconds: float
    unknown: tuple[str, ...]


def dry_run(
    found: ModelPlan, tokens: int, *, draws: int = 1, device: torch.device | None = None
) -> DryRun:
    """Estimate from the shapes in a checkpoint's headers.

    Every matrix (o, i) counts as a layer of that size with one row a token; a square of more than
    8192 rows or columns that is the vocabulary's is an embedding or a head, which has no matrix on
    that side. Layers that share inputs are counted as if they did not.
    """
    device = device or torch.device("cpu")
    parameters = found.parameters or 0
    fp64 = parameters <= READ_IN_FP64
    size = 0
    flops = 0.0
    matrices = 0
    wide = found.vocabulary or 0
    for name, (shape, _) in found.shapes.items():
        if len(shape) < 2 or not name.endswith(("weight", "gate_up_proj", "down_proj")):
            continue
        o, i = shape[-2] if len(shape) != 4 else shape[0], shape[-1]
        if len(shape) == 4:
            i = shape[1] * shape[2] * shape[3]
        count = shape[0] if len(shape) == 3 else 1
        matrices += count
        flops += (2 + 2 * draws) * float(tokens) * o * i
        for side in (o, i):
            if side > LARGEST_HEAD and side == wide:
                size += side
                continue
            size += count * entries(side)
            flops += float(tokens) * side * (side + 1)
    sums = 8 * size <= FP64_SUMS
    rate = machine_rate(device, torch.float64 if fp64 else torch.float32)
    unknown = list(found.unknown)
    if not found.shapes:
        unknown.append("shapes: the estimate leaves the layers out")
    return DryRun(
        parameters,
        parameters * (8 if fp64 else 4),
        "float64" if fp64 else "as stored",
        "float64" if sums else "float32",
        matrices,
        size * (8 if sums else 4),
        flops,
        rate,
        flops / rate,
        tuple(unknown),
    )


def show(run: DryRun, source: str, tokens: int, console: Console) -> None:
    """Print the estimate."""
    console.print(f"{source}: what a scan of {tokens:,} tokens will take", soft_wrap=True)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("parameters", f"{run.parameters:,}"),
        (f"weights, read in {run.activations}", _bytes(run.weights)),
        (f"sums of {run.matrices} matrices in {run.sums}", _bytes(run.sums_bytes)),
        ("disk while it runs", _bytes(2 * run.sums_bytes)),
        ("arithmetic of the factors", f"{run.flops / 1e12:.3g} TFLOP"),
        (f"time at {run.rate / 1e9:.3g} GFLOP/s measured here", _time(run.seconds)),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("Spectra and rays come on top: about as long again for small models.")
    for line in run.unknown:
        console.print(f"not known: {line}")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
