"""What a scan returns: the report as data, and the ways to look at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from deaddir_fast.scan.read_report import read


@dataclass(frozen=True)
class ScanReport:
    """A finished scan.

    Attributes:
        folder: where report.json, spectra.safetensors and report.html lie.
        data: the content of report.json, non-finite numbers as floats.
    """

    folder: Path
    data: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> ScanReport:
        """From a scan's folder.

        Raises:
            ValueError: it holds no finished scan of this version.
        """
        return cls(Path(folder), read(Path(folder)).report)

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """{layer name: its entry}."""
        return {layer["name"]: layer for layer in self.data["layers"]}

    @property
    def verdict(self) -> str:
        """What is known of λ."""
        return str(self.data["totals"]["lambda"]["verdict"])

    def spectrum(self, layer: str, factor: str = "A") -> Tensor:
        """(d,) fp64 eigenvalues of "A" or "G" of a layer, ascending.

        Raises:
            KeyError: there is no such layer.
        """
        key = f"{factor}/{layer}"
        with safe_open(self.folder / "spectra.safetensors", "pt") as file:
            if key not in file.keys():  # noqa: SIM118 # not a dict
                raise KeyError(f"no spectrum {key!r} in {str(self.folder)!r}")
            return file.get_tensor(key)

    def explain(self, console: Console | None = None) -> None:
        """Print which route and kernel each layer took, its FLOP, bytes and share of the bound."""
        table = Table(title="What each layer's factors took", title_justify="left")
        for column in ("layer", "route", "GFLOP", "MB moved", "ms", "of the bound"):
            table.add_column(column, justify="left" if column in ("layer", "route") else "right")
        for layer in self.data["layers"]:
            cost = layer["cost"]
            seconds, share = cost["seconds"], cost["share_of_bound"]
            table.add_row(
                layer["name"],
                cost["route"],
                f"{cost['flops'] / 1e9:.2f}",
                f"{cost['bytes'] / 1e6:.1f}",
                "" if seconds is None else f"{seconds * 1e3:.1f}",
                "" if share is None else f"{share:.0%}",
            )
        (console or Console()).print(table)

    def __str__(self) -> str:
        t, m = self.data["totals"], self.data["model"]
        bound = t["lambda"]
        return (
            f"{m['source']}: {len(self.data['layers'])} layers, {t['scanned']:,} of "
            f"{t['parameters']:,} parameters; null by layer {t['dead']:,} (gauge {t['gauge']:,}, "
            f"algebraic {t['algebraic']:,}, data {t['data']:,}, singular {t['singular']:,}, "
            f"unresolved {t['unresolved']:,}); {bound['lower']:g} ≤ λ ≤ {bound['upper']:g}; "
            f"{self.folder / 'report.html'}"
        )
