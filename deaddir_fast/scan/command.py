"""``deaddir scan``: from names of a model and a file to a report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deaddir_fast import _check
from deaddir_fast.scan import load_model as models
from deaddir_fast.scan.dry_run import dry_run, show
from deaddir_fast.scan.load_data import load_data
from deaddir_fast.scan.ranks import launched
from deaddir_fast.scan.run import scan
from deaddir_fast.scan.scan_report import ScanReport

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; see ``deaddir scan --help``."""

    model: str
    data: Path
    out: Path
    likelihood: str | None
    fisher: str
    layers: list[str] | None
    directions: int
    batch: int
    length: int | None
    samples: int | None
    draws: int
    seed: int
    ray_samples: int
    shards: int | None
    units: list[int] | None
    device: str | None
    dtype: str | None
    offline: bool
    strict: bool
    fresh: bool


@contextmanager
def own_errors() -> Iterator[None]:
    """Errors of the module that was named, or of a package that is missing, are the user's to see.

    Raises:
        ValueError: in their place.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ValueError(str(error)) from error


def dry(request: Request, console: Console) -> None:
    """``--dry-run``: the estimate alone."""
    with own_errors():
        estimate(request, console)


def estimate(request: Request, console: Console) -> None:
    """Print what the scan will take, with no weights loaded."""
    found = models.plan_model(request.model, allow_download=not request.offline)
    tokens, sure = _count_tokens(request, found)
    show(dry_run(found, tokens, draws=request.draws), request.model, tokens, console)
    if not sure:
        console.print("not known: tokens of the text: taken as a quarter of its characters")


def _count_tokens(request: Request, found: models.ModelPlan) -> tuple[int, bool]:
    try:
        data = load_data(
            request.data,
            length=request.length or found.maximum_length,
            batch=request.batch,
            samples=request.samples,
            seed=request.seed,
            vocabulary=found.vocabulary,
        )
        return max(data.tokens, 1), True
    except (TypeError, ValueError):
        # Text, which needs the tokenizer: an estimate will do here.
        size = request.data.stat().st_size
        if request.samples is not None and (request.length or found.maximum_length):
            size = min(size, 4 * request.samples * (request.length or found.maximum_length or 1))
        return max(size // 4, 1), False


def run(request: Request, console: Console) -> ScanReport:
    """Load, scan, print; under torchrun together with the other processes.

    Raises:
        As ``load_model``, ``load_data`` and ``scan``.
    """
    wanted = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with launched(torch.device(wanted)) as device:
        return _run(request, console, device)


def _run(request: Request, console: Console, device: torch.device) -> ScanReport:
    dtype = None
    if request.dtype is not None:
        dtype = getattr(torch, _check.choice("dtype", request.dtype, DTYPES))
    with own_errors():
        estimate(request, console)
        loaded = models.load_model(
            request.model, dtype=dtype, device=device, allow_download=not request.offline
        )
    data = load_data(
        request.data,
        tokenizer=loaded.tokenizer,
        length=request.length or loaded.maximum_length,
        batch=request.batch,
        samples=request.samples,
        pad_id=loaded.pad_id,
        vocabulary=loaded.vocabulary,
        mask=loaded.takes_mask,
        seed=request.seed,
    )
    for note in (*loaded.notes, *data.notes):
        console.print(f"note: {note}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not request.strict else "default", UserWarning)
        report = scan(
            loaded.model,
            OnDevice(data, device),
            out=request.out,
            likelihood=request.likelihood or loaded.likelihood,
            fisher=request.fisher,
            layers=request.layers,
            directions_per_layer=request.directions,
            draws=request.draws,
            seed=request.seed,
            ray_samples=request.ray_samples,
            shards=request.shards,
            units=request.units or (),
            strict=request.strict,
            resume=not request.fresh,
            source=loaded.source,
            fingerprint=loaded.fingerprint,
        )
    summary(report, console)
    return report


class OnDevice:
    """Data whose batches are moved to a device."""

    def __init__(self, data: Any, device: torch.device) -> None:
        self.data, self.device = data, device
        self.source, self.fingerprint = data.source, data.fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: int) -> Any:
        """Batch ``index``."""
        from torch.utils import _pytree as pytree

        given = self.data.batch(index)
        return pytree.tree_map(
            lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x, given
        )

    def labels(self, index: int) -> Any:
        """Labels of batch ``index``, or None."""
        found = self.data.labels(index)
        return None if found is None else found.to(self.device)


def summary(report: ScanReport, console: Console) -> None:
    """The findings as a table, one line a layer."""
    console.print(f"{report.data['model']['source']}: what was read", soft_wrap=True)
    table = Table()
    for column in ("layer", "kind", "A: rank", "G: rank", "gauge", "algebraic", "data", "singular",
                   "open", "orders"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
    for layer in report.data["layers"]:
        dead = layer["dead"]
        orders = [
            _order(d["order"])
            for d in layer["directions"]
            if d["order"] is not None and d["class"] not in ("live",)
        ]
        table.add_row(
            layer["name"],
            layer["kind"],
            f"{layer['A']['rank']}/{layer['A']['dimension']}",
            f"{layer['G']['rank']}/{layer['G']['dimension']}",
            *(f"{dead[k]:,}" for k in ("gauge", "algebraic", "data", "singular", "unresolved")),
            " ".join(orders),
        )
    console.print(table)
    console.print(str(report), soft_wrap=True)


def _order(order: float) -> str:
    if math.isinf(order):
        return "inf"
    return f"{round(order)}" if abs(order - round(order)) < 0.01 else f"{order:.2f}"
