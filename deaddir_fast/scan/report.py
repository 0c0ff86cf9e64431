"""Reports on disk: strict JSON, and folders in which a file is whole or not there."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

SCHEMA = 1

CONVENTIONS = {
    "non-finite": 'numbers that are not finite are the strings "inf", "-inf" and "nan"',
    "fraction": 'exact values are {"exact": "9/2", "value": 4.5}',
    "order": "KL order k: K grows like t^(2k) along the direction; inf where K stays zero",
    "forwards": "plain forward passes of the network over all inputs",
    "logarithms": "natural; divergences are in nats",
}


def plain(value: Any) -> Any:
    """The value in strict JSON's types, by the conventions above.

    Raises:
        TypeError: for what has no JSON form.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Fraction):
        return {"exact": str(value), "value": float(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"value: {type(value).__name__} has no JSON form")


def to_json(content: Any) -> str:
    """Strict JSON (no bare NaN or Infinity)."""
    return json.dumps(plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


class Staged:
    """A folder whose new files appear together when the block ends well, and not at all otherwise.

    Files are written to a hidden folder inside (the same disk, so renaming cannot fail half-way)
    and moved when the block is left. After an error or Ctrl-C the hidden folder is removed, and
    the folder itself too if it was made here.

    Raises:
        OSError: if the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[Path] = []

    def __enter__(self) -> Path:
        self.made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.hidden = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        except OSError:
            self._unmake()
            raise
        return self.hidden

    def _unmake(self) -> None:
        """Remove the folders made here that are still empty."""
        for made in self.made:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                for path in sorted(self.hidden.iterdir()):
                    os.replace(path, self.folder / path.name)
        finally:
            shutil.rmtree(self.hidden, ignore_errors=True)
            self._unmake()
