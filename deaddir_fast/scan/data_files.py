"""What data files hold: texts, lists of ids, and arrays that are read row by row, never whole."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")


class Ragged:
    """Rows of different lengths (or single numbers), kept in one array.

    Args:
        rows: 1-d arrays or numbers.
        lines: line of the file each came from, for errors.
    """

    def __init__(self, rows: Sequence[Any], lines: Sequence[int]) -> None:
        parts = [np.atleast_1d(np.asarray(row)) for row in rows]
        self._flat = np.concatenate(parts)
        self._ends = np.cumsum([0, *(len(part) for part in parts)])
        self._lines = np.asarray(lines)
        self._single = bool(parts) and np.ndim(rows[0]) == 0
        self.lengths = np.diff(self._ends)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> Tensor:
        """One row, or one number as a scalar."""
        part = torch.from_numpy(self._flat[self._ends[index] : self._ends[index + 1]])
        return part[0] if self._single else part

    def part(self, index: int, start: int, stop: int) -> Tensor:
        """A stretch of one row."""
        first = self._ends[index]
        return torch.from_numpy(self._flat[first + start : first + stop])

    def where(self, index: int) -> str:
        """Where the row lies in the file."""
        return f"line {self._lines[index]}"


class Array(ABC):
    """A memory-mapped array, by rows.

    Attributes:
        shape: its shape.
        floating: float or integer.
    """

    shape: tuple[int, ...]
    floating: bool

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, part: Any) -> Tensor:
        """The part of the array that numpy's indexing would give."""

    def row(self, index: int) -> Tensor:
        """One row."""
        return self[index : index + 1][0]

    def part(self, index: int, start: int, stop: int) -> Tensor:
        """A stretch of one row of a table."""
        return self[index : index + 1, start:stop][0]

    def where(self, index: int) -> str:
        """Where the row lies in the file."""
        return f"row {index}"


class Npy(Array):
    """An array of a .npy file; integers come as int64, (t,) of them as (1, t).

    Raises:
        ValueError: if it is not such a file, holds Python objects, or numbers of another kind.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{path}: expected a .npy file of numbers that holds at least one ({error})"
            ) from None
        if not isinstance(self._mapped, np.ndarray):
            raise ValueError(f"{path}: expected a .npy file, got an archive of several arrays")
        kind, size = self._mapped.dtype.kind, self._mapped.dtype.itemsize
        if kind not in "iuf" or size > 8:
            raise ValueError(
                f"{path}: expected integers (token ids) or float16/32/64, got {self._mapped.dtype}"
            )
        self.floating = kind == "f"
        if self._mapped.ndim == 1 and not self.floating:
            self._mapped = self._mapped[None]
        self.shape = self._mapped.shape

    def __getitem__(self, part: Any) -> Tensor:
        values = self._mapped[part]
        dtype = values.dtype.newbyteorder("=") if self.floating else np.dtype(np.int64)
        return torch.from_numpy(np.array(values, dtype=dtype))


class Stored(Array):
    """A tensor of a safetensors file; integers come as int64."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._opened: Any = None
        part = self._slice()
        kind = str(part.get_dtype())
        if kind not in _FLOATS and kind not in _INTEGERS:
            raise ValueError(f"{path}: {name}: expected integers or floats, got {kind}")
        self.shape = tuple(part.get_shape())
        self.floating = kind in _FLOATS

    def _slice(self) -> Any:
        if self._opened is None:
            self._opened = safe_open(self._path, framework="pt")
        return self._opened.get_slice(self._name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(self, part: Any) -> Tensor:
        values = self._slice()[part]
        return values if self.floating else values.to(torch.int64)


@dataclass(frozen=True)
class Contents:
    """What a file holds: either texts, or rows with what belongs to them.

    Attributes:
        texts: one for each sample, or None.
        lines: line of the file each text starts on.
        rows: ids or floats, or None.
        mask: 1 at tokens and 0 at padding, or None.
        labels: a number or a row of numbers for each row or text, or None.
        note: how the file was taken apart.
    """

    texts: list[str] | None = None
    lines: list[int] = field(default_factory=list)
    rows: Ragged | Array | None = None
    mask: Ragged | Array | None = None
    labels: Ragged | Array | None = None
    note: str = ""


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, .jsonl, .npy or .safetensors; byte {error.start} is not "
            "UTF-8"
        ) from None


def text(path: Path) -> Contents:
    """Paragraphs (blank lines between them); without blank lines every line is a text."""
    whole = _decoded(path)
    texts, lines = [], []
    if re.search(r"\n[^\S\n]*\n", whole.strip()):
        kind, pattern = "paragraphs", r"\S[^\n]*(?:\n[^\n]*\S[^\n]*)*"
    else:
        kind, pattern = "lines", r"\S[^\n]*"
    line, before = 1, 0
    for match in re.finditer(pattern, whole):
        line += whole.count("\n", before, match.start())
        before = match.start()
        texts.append(match.group().strip())
        lines.append(line)
    return Contents(texts=texts, lines=lines, note=f"{len(texts)} {kind}")


def _numbers(value: Any, where: str, *, integers: bool) -> np.ndarray:
    """A list of numbers, or one number."""
    listed = value if isinstance(value, list) else [value]
    kinds = (int,) if integers else (int, float)
    for index, item in enumerate(listed):
        if isinstance(item, bool) or not isinstance(item, kinds):
            expected = "integers" if integers else "numbers"
            raise ValueError(f"{where}: expected {expected}, got {item!r} at position {index}")
    try:
        return np.asarray(value, dtype=np.int64 if integers else None)
    except OverflowError:
        raise ValueError(f"{where}: expected integers below 2^63") from None


def _line(content: str, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, got {error}") from None
    if not isinstance(row, dict) or not any(name in row for name in fields):
        names = " or ".join(repr(name) for name in fields)
        given = f"one with {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected a JSON object with {names}, got {given}")
    return row


def jsonl(path: Path, text_field: str) -> Contents:
    """One JSON object a line, with ``input_ids`` (which come first) or ``text_field``.

    The first line decides which; ``labels`` and ``attention_mask`` are on every line or on none.
    """
    fields: tuple[str, ...] = ("input_ids", text_field)
    rows: list[Any] = []
    extra: dict[str, list[Any]] = {"labels": [], "attention_mask": []}
    lines: list[int] = []
    for number, content in enumerate(_decoded(path).split("\n"), 1):
        if not content.strip():
            continue
        where = f"{path}, line {number}"
        row = _line(content, where, fields)
        if not lines:
            fields = ("input_ids",) if "input_ids" in row else (text_field,)
        value = row[fields[0]]
        if fields == (text_field,):
            if not isinstance(value, str):
                raise ValueError(
                    f"{where}: {text_field}: expected a string, got {type(value).__name__}"
                )
            rows.append(value)
        else:
            if not isinstance(value, list) or not value:
                raise ValueError(f"{where}: input_ids: expected a list of ids, got {value!r:.60}")
            rows.append(_numbers(value, f"{where}: input_ids", integers=True))
        for name, found in extra.items():
            if name in row:
                found.append(_extra(row[name], name, rows[-1], where))
            if len(found) not in (0, len(rows)):
                first = lines[0] if lines else number
                raise ValueError(
                    f"{where}: {name}: expected on every line or on none (line {first} "
                    f"{'lacks' if name in row else 'has'} it)"
                )
        lines.append(number)
    if not lines:
        return Contents(texts=[])
    labels = Ragged(extra["labels"], lines) if _alike(path, extra["labels"], lines) else None
    if fields == (text_field,):
        return Contents(texts=rows, lines=lines, labels=labels, note=f"{len(rows)} lines")
    mask = Ragged(extra["attention_mask"], lines) if extra["attention_mask"] else None
    return Contents(rows=Ragged(rows, lines), mask=mask, labels=labels)


def _extra(value: Any, name: str, row: Any, where: str) -> np.ndarray:
    numbers = _numbers(value, f"{where}: {name}", integers=name == "attention_mask")
    if isinstance(row, str):
        if name == "attention_mask" or numbers.ndim:
            raise ValueError(f"{where}: {name}: text has no tokens yet that it could belong to")
    elif (numbers.ndim or name == "attention_mask") and numbers.shape != row.shape:
        raise ValueError(
            f"{where}: {name}: expected {len(row)} numbers, one for each of input_ids, got "
            f"{numbers.size}"
        )
    return numbers


def _alike(path: Path, labels: list[np.ndarray], lines: list[int]) -> bool:
    """Whether there are labels; all of them lists or all of them numbers."""
    for label, line in zip(labels, lines, strict=False):
        if label.ndim != labels[0].ndim:
            raise ValueError(
                f"{path}, line {line}: labels: expected a "
                f"{'list' if labels[0].ndim else 'number'}, as on line {lines[0]}"
            )
    return bool(labels)


def npy(path: Path) -> Contents:
    """Token ids (n, t) or (t,), or float features (n, ...)."""
    found = Npy(path)
    if len(found.shape) < 2 or (not found.floating and len(found.shape) > 2):
        expected = "floats (n, ...)" if found.floating else "integers (n, t) or (t,)"
        raise ValueError(f"{path}: expected {expected}, got shape {found.shape}")
    return Contents(rows=found if 0 not in found.shape else None)


def safetensors(path: Path) -> Contents:
    """``input_ids`` (n, t) or ``inputs`` (n, ...), with ``attention_mask`` and ``labels``."""
    try:
        with safe_open(path, framework="np") as opened:
            names = set(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    keys = names & {"input_ids", "inputs"}
    if len(keys) != 1:
        raise ValueError(
            f"{path}: expected one tensor 'input_ids' or 'inputs', got {sorted(names)}"
        )
    key = keys.pop()
    rows = Stored(path, key)
    floating = key == "inputs"
    if rows.floating != floating or len(rows.shape) < 2 or (not floating and len(rows.shape) > 2):
        expected = "floats (n, ...)" if floating else "integers (n, t)"
        kind = "floats" if rows.floating else "integers"
        raise ValueError(f"{path}: {key}: expected {expected}, got {kind} of shape {rows.shape}")
    mask = Stored(path, "attention_mask") if "attention_mask" in names else None
    if mask is not None and (floating or mask.floating or mask.shape != rows.shape):
        raise ValueError(
            f"{path}: attention_mask: expected integers of the shape of input_ids, got "
            f"{mask.shape} beside {key} of {rows.shape}"
        )
    labels = Stored(path, "labels") if "labels" in names else None
    allowed = labels is None or labels.shape[:1] == rows.shape[:1]
    if labels is not None and not floating:
        allowed = labels.shape in (rows.shape[:1], rows.shape)
    if labels is not None and not allowed:
        each = "" if floating else f" or of the shape {rows.shape} of input_ids"
        raise ValueError(
            f"{path}: labels: expected one for each of {rows.shape[0]} samples{each}, got shape "
            f"{labels.shape}"
        )
    if 0 in rows.shape:
        return Contents()
    return Contents(rows=rows, mask=mask, labels=labels)
