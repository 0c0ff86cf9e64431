"""A scan's folder read back: report.json, checked key by key, and its spectra."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deaddir_fast._check import describe
from deaddir_fast.scan.report import SCHEMA

CLASSES = ("gauge", "algebraic", "data", "singular", "unresolved")  # of dead dimensions
SPECTRA = "spectra.safetensors"

Check = Callable[[Any, str], Any]  # (value, where in the file) -> value, converted


class ReportError(ValueError):
    """A folder, a file or a key that is not what a scan writes; the message names it."""


def _bad(where: str, value: Any, expected: str) -> ReportError:
    return ReportError(f"{where}: expected {expected}, got {describe(value)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _bad(where, value, "a string")
    return value


def _truth(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(where, value, "true or false")
    return value


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _bad(where, value, "a whole number >= 0")
    return value


def _number(value: Any, where: str) -> float:
    """A float; the strings "inf", "-inf", "nan" and exact fractions are read as written."""
    if isinstance(value, dict) and "exact" in value and "value" in value:
        return _number(value["value"], f"{where}.value")
    if value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _bad(where, value, 'a number or "inf", "-inf", "nan"')
    return float(value)


def _defined(value: Any, where: str) -> float:
    """A number; nan for null, where a factor of rank 0 has no smallest eigenvalue, say."""
    return math.nan if value is None else _number(value, where)


def _any(value: Any, where: str) -> Any:
    return value


def _maybe(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _one_of(*allowed: str) -> Check:
    def check(value: Any, where: str) -> str:
        if value not in allowed:
            raise _bad(where, value, "one of " + ", ".join(repr(a) for a in allowed))
        return str(value)

    return check


def _list(check: Check, size: int | None = None) -> Check:
    def each(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or (size is not None and len(value) != size):
            raise _bad(where, value, "a list" if size is None else f"a list of {size}")
        return [check(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return each


def _mapping(check: Check) -> Check:
    def each(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _bad(where, value, "an object")
        return {k: check(v, f"{where}.{k}") for k, v in value.items()}

    return each


def _object(**keys: Check) -> Check:
    """Every key is required; keys not listed are kept as they are."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _bad(where, value, "an object")
        for key in keys:
            if key not in value:
                raise ReportError(f"{where}: the key {key!r} is missing")
        return {k: keys.get(k, _any)(v, f"{where}.{k}") for k, v in value.items()}

    return check


_FACTOR = _object(
    form=_one_of("matrix", "diagonal", "one"),
    dimension=_count,
    rank=_count,
    rank_limit=_count,
    dead=_count,
    top=_defined,
    bottom=_defined,
    trace=_defined,
    log_pseudo_det=_defined,
    tolerance=_defined,
    ambiguous=_count,
    verdict=_text,
)
_DIRECTION = _object(
    label=_text,
    gauge=_maybe(_text),
    kfac=_maybe(_number),
    curvature=_maybe(_number),
    stderr=_maybe(_number),
    radii=_list(_number),
    fisher=_list(_number),
    fisher_stderr=_list(_number),
    kl=_list(_number),
    order=_maybe(_number),
    interval=_maybe(_list(_number, 2)),
    jet=_maybe(_number),
    predicted=_maybe(_number),
    contribution=_maybe(_number),
    verdict=_text,
    why=_text,
    **{"class": _one_of(*CLASSES, "live")},
)
_LAYER = _object(
    name=_text,
    kind=_text,
    type=_text,
    depth=_count,
    block=_maybe(_count),
    inputs=_count,
    outputs=_count,
    bias=_truth,
    parameters=_count,
    rows=_count,
    samples=_count,
    shares_inputs_with=_maybe(_text),
    A=_FACTOR,
    G=_FACTOR,
    dead=_object(block=_count, **dict.fromkeys(CLASSES, _count)),
    directions=_list(_DIRECTION),
    cost=_object(
        route=_text,
        flops=_maybe(_number),
        bytes=_maybe(_number),
        seconds=_maybe(_number),
        share_of_bound=_maybe(_number),
    ),
    verdict=_text,
    notes=_list(_text),
)
_REPORT = _object(
    created=_text,
    versions=_mapping(_text),
    device=_text,
    model=_object(
        source=_text, parameters=_count, dtype=_text, fingerprint=_text, **{"class": _text}
    ),
    data=_object(source=_text, samples=_count, tokens=_maybe(_count), fingerprint=_text),
    settings=_mapping(_any),
    cost=_object(seconds=_mapping(_number), peak_bytes=_maybe(_number), flops=_maybe(_number)),
    layers=_list(_LAYER),
    skipped=_list(_object(name=_text, type=_text, parameters=_count, why=_text)),
    gauges=_list(_object(name=_text, group=_text, dimension=_count, parameters=_list(_text))),
    totals=_object(
        parameters=_count,
        scanned=_count,
        dead=_count,
        **dict.fromkeys(CLASSES, _count),
        **{"lambda": _object(lower=_number, upper=_number, verdict=_text)},
    ),
    notes=_list(_text),
)


@dataclass(frozen=True)
class Scan:
    """A scan as read from its folder.

    ``report`` is report.json with numbers in place of "inf" and "nan"; ``spectra`` maps "A/<layer>"
    and "G/<layer>" to eigenvalues in ascending order, fp64.
    """

    folder: Path
    report: dict[str, Any]
    spectra: dict[str, NDArray[np.float64]]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The layers in order of the forward pass."""
        return sorted(self.report["layers"], key=lambda layer: layer["depth"])

    def spectrum(self, layer: dict[str, Any], factor: str) -> NDArray[np.float64] | None:
        """Eigenvalues of the layer's ``factor`` ("A" or "G"), ascending; None if not stored.

        A layer that shares its inputs with another may leave A to that one.
        """
        found = self.spectra.get(f"{factor}/{layer['name']}")
        shared = layer["shares_inputs_with"]
        if found is None and factor == "A" and shared is not None:
            found = self.spectra.get(f"A/{shared}")
        return found


def check(content: Any, file: str) -> dict[str, Any]:
    """The content of a report.json, checked and with its numbers as floats.

    Raises:
        ReportError: naming ``file``, the key, what was found there and what was expected.
    """
    if not isinstance(content, dict):
        raise _bad(file, content, "an object")
    if content.get("kind") != "scan":
        raise ReportError(
            f'{file}: not the report of a scan (its "kind" is {content.get("kind")!r})'
        )
    if content.get("schema") != SCHEMA:
        raise ReportError(
            f"{file}: schema {content.get('schema')!r}, this version reads schema {SCHEMA}; "
            "use the version of deaddir_fast that wrote it, or scan again"
        )
    report: dict[str, Any] = _REPORT(content, file)
    seen: set[str] = set()
    for i, layer in enumerate(report["layers"]):
        where = f"{file}.layers[{i}]"
        if layer["name"] in seen:
            raise ReportError(f"{where}.name: the layer {layer['name']!r} is listed twice")
        seen.add(layer["name"])
        for j, direction in enumerate(layer["directions"]):
            points = len(direction["radii"])
            for key in ("fisher", "fisher_stderr", "kl"):
                # no errors and no divergences is a reading too; a different number of them is not
                if len(direction[key]) not in ((points,) if key == "fisher" else (0, points)):
                    raise ReportError(
                        f"{where}.directions[{j}].{key}: {len(direction[key])} values "
                        f"for {points} radii"
                    )
    return report


def _spectra(file: Path) -> dict[str, NDArray[np.float64]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        loaded = load_file(file)
    except SafetensorError as error:
        raise ReportError(f"{file}: not a readable safetensors file ({error})") from None
    for key, values in loaded.items():
        if values.ndim != 1 or values.dtype != np.float64:
            raise ReportError(
                f"{file}: {key!r} is {values.dtype} of shape {values.shape}, "
                "expected a vector of float64"
            )
        if not (np.isfinite(values).all() and np.all(np.diff(values) >= 0)):
            raise ReportError(f"{file}: {key!r} is not finite numbers in ascending order")
    return dict(loaded)


def read(folder: Path) -> Scan:
    """Read a scan's folder.

    Raises:
        ReportError: if it is not the folder of a finished scan of this schema.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    file = folder / "report.json"
    if not file.is_file():
        if any(folder.rglob("*.safetensors")):
            raise ReportError(
                f"{folder}: a scan that has not finished (no report.json yet); run the same "
                "`deaddir scan` again, it goes on where it stopped"
            )
        raise ReportError(f"{folder}: not a scan (no report.json)")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{file}: not valid JSON ({error})") from None
    report = check(content, str(file))
    if not (folder / SPECTRA).is_file():
        raise ReportError(f"{folder}: a scan that has not finished ({SPECTRA} is missing)")
    return Scan(folder, report, _spectra(folder / SPECTRA))


def finite(value: float | None) -> bool:
    """Whether there is a number at all, and a finite one."""
    return value is not None and math.isfinite(value)
