"""What a scan has on disk while it runs: enough to go on after a kill at any moment.

    scan.json           settings and fingerprints; another model, data or setting is refused
    state/factors/N/    sums of layer N, and of those that share its inputs, over the shards done
                        so far, and which they are (one file, replaced)
    state/layers/N.json what has been read of layer N
    report.json, spectra.safetensors, report.html   at the end

Every file is written beside its place, flushed and renamed: it is whole or not there. No file
depends on how many processes there are: each process writes those of its own layers, so a scan may
go on with fewer or more. A kill between two files of one shard leaves some layers a shard ahead;
they skip it when it is summed again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deaddir_fast._files import replace_file
from deaddir_fast.fisher.factors import KronFactors
from deaddir_fast.scan.report import plain, to_json

SCHEMA = 1


class Store:
    """A scan's folder.

    Args:
        folder: made if it is not there.
        settings: what the numbers depend on; must equal that of the scan begun there.
        resume: whether to go on with what is there; if not, an old scan is removed.

    Raises:
        ValueError: the folder holds a scan of something else, or something that is not a scan.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(plain(settings)))
        head = folder / "scan.json"
        before = self._read(head) if head.exists() else None
        if before is not None and not resume:
            self.clear()
            before = None
        if before is not None:
            self._check(before)
        else:
            if folder.exists() and not self._ours():
                raise ValueError(
                    f"out: {str(folder)!r} is not empty and holds no scan; expected a new folder"
                )
            content = {"schema": SCHEMA, "settings": self.settings}
            replace_file(head, lambda path: path.write_text(to_json(content), encoding="utf-8"))

    def _ours(self) -> bool:
        if not self.folder.is_dir():
            return False
        # scan.json is the first file written, and the last that is removed.
        return {p.name for p in self.folder.iterdir()} <= {".scan.json.partial"}

    def _read(self, head: Path) -> dict[str, Any]:
        """What scan.json says, if a scan has written it."""
        try:
            content = json.loads(head.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"out: {str(head)!r} cannot be read: {error}") from None
        if (
            not isinstance(content, dict)
            or not isinstance(content.get("schema"), int)
            or not isinstance(content.get("settings"), dict)
        ):
            raise ValueError(f"out: {str(head)!r} is not of a scan; expected a new folder")
        return content

    def _check(self, content: dict[str, Any]) -> None:
        if content["schema"] != SCHEMA:
            raise ValueError(
                f"out: {str(self.folder)!r} holds a scan of version {content['schema']}, expected "
                f"{SCHEMA}; use another folder, or resume=False to start again"
            )
        before = content["settings"]
        keys = sorted(set(before) | set(self.settings))
        other = [k for k in keys if before.get(k) != self.settings.get(k)]
        if other:
            listed = "; ".join(
                f"{k} was {_short(before.get(k))}, is {_short(self.settings.get(k))}" for k in other
            )
            raise ValueError(
                f"out: {str(self.folder)!r} holds a scan of something else ({listed}); use another "
                "folder, or resume=False to start again"
            )

    def clear(self) -> None:
        """Remove everything a scan puts there."""
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        for name in ("report.json", "spectra.safetensors", "report.html", "scan.json"):
            (self.folder / name).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove half-written files that a kill has left; before anything is written."""
        for part in self.folder.glob("state/**/.*.partial"):
            part.unlink(missing_ok=True)

    def space_for(self, needed: int) -> None:
        """Refuse before the work what the disk cannot hold.

        Raises:
            OSError: fewer than ``needed`` bytes are free.
        """
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                28,
                f"the scan needs {needed / 1e9:.1f} GB of disk for its state, {free / 1e9:.1f} GB "
                "are free",
                str(self.folder),
            )

    def _factors(self, index: int) -> Path:
        return self.folder / "state" / "factors" / str(index)

    def load_factors(self, index: int) -> KronFactors | None:
        """Sums of layer ``index`` and its followers over the shards done so far."""
        folder = self._factors(index)
        if not (folder / "factors.safetensors").exists():
            return None
        try:
            return KronFactors.load(folder)
        except Exception:
            # A file of a crashed machine: the shards are computed again.
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def save_factors(self, index: int, factors: KronFactors) -> None:
        """Replace the sums on disk."""
        factors.save(self._factors(index))

    def load_layer(self, index: int) -> dict[str, Any] | None:
        """What has been read of a layer, or None."""
        path = self.folder / "state" / "layers" / f"{index}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_layer(self, index: int, reading: Mapping[str, Any]) -> None:
        """Keep what has been read of a layer."""
        path = self.folder / "state" / "layers" / f"{index}.json"
        text = to_json(reading)
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))

    def write(self, name: str, write: Callable[[Path], object]) -> Path:
        """A final file of the scan."""
        path = self.folder / name
        replace_file(path, write)
        return path


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
