"""The data a scan reads: files of text, token ids or features, as batches in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.scan import data_files
from deaddir_fast.scan.data_files import Array, Contents, Ragged

IGNORED = -100  # the label of padding, as in transformers

_REFUSED = (".npz", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".json", ".parquet", ".gz", ".zip")
_ROWS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Data:
    """Samples in a fixed order, read when they are asked for.

    Attributes:
        source: the file.
        kind: "tokens" or "floats".
        fingerprint: 32 hex digits over the samples as they are read, whatever file they come from
            and however they are batched: BLAKE2b of ids or values, shapes and labels.
        samples: how many.
        tokens: how many without padding; of floats, the samples.
        size: samples of a batch (the last one may be smaller).
        notes: how the file was cut into samples, and what was left out.
    """

    source: str
    kind: str
    fingerprint: str
    samples: int
    tokens: int
    size: int
    notes: tuple[str, ...]
    _rows: Ragged | Array = field(repr=False)
    _labels: Ragged | Array | None = field(repr=False)
    _index: np.ndarray = field(repr=False)  # (samples, 3): row, start, stop
    _pad: int = field(repr=False)
    _mask: bool = field(repr=False)
    _dtype: torch.dtype | None = field(repr=False)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.samples // self.size)

    def _of(self, batch: int) -> np.ndarray:
        if not 0 <= batch < len(self):
            raise IndexError(f"batch: expected 0 <= batch < {len(self)}, got {batch}")
        return self._index[batch * self.size : (batch + 1) * self.size]

    def batch(self, index: int) -> dict[str, Tensor] | Tensor:
        """One batch; the ones before it are not read.

        Returns:
            Token ids: ``input_ids`` and ``attention_mask``, both (n, t) int64, padded on the right
            to the longest of the batch (only the ids, not in a dict, with ``mask=False``).
            Floats: (n, ...).

        Raises:
            IndexError: if there is no such batch.
        """
        chosen = self._of(index)
        if self.kind == "floats":
            values = torch.stack([self._rows.row(int(row)) for row, _, _ in chosen])
            return values if self._dtype is None else values.to(self._dtype)
        parts = [self._rows.part(*map(int, sample)) for sample in chosen]
        longest = max(len(part) for part in parts)
        ids = torch.full((len(parts), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for k, part in enumerate(parts):
            ids[k, : len(part)] = part
            mask[k, : len(part)] = 1
        return {"input_ids": ids, "attention_mask": mask} if self._mask else ids

    def labels(self, index: int) -> Tensor | None:
        """Labels of one batch: (n, ...), of tokens (n, t) with -100 at padding; None if none."""
        if self._labels is None:
            return None
        parts = [_label(self._labels, sample, self.kind) for sample in self._of(index)]
        if self.kind == "floats" or parts[0].ndim == 0:
            return torch.stack(parts)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=IGNORED)

    def batches(self) -> Iterator[dict[str, Tensor] | Tensor]:
        """All batches in order, every time anew."""
        return (self.batch(k) for k in range(len(self)))

    def shards(self, count: int) -> list[range]:
        """At most ``count`` ranges of batches, in order, none empty, as even as can be."""
        count = min(_check.integer("count", count, 1), len(self))
        edges = [k * len(self) // count for k in range(count + 1)]
        return [range(a, b) for a, b in pairwise(edges)]


def _label(labels: Ragged | Array, sample: np.ndarray, kind: str) -> Tensor:
    row, start, stop = map(int, sample)
    label = labels.row(row)
    return label[start:stop] if kind == "tokens" and label.ndim else label


# ------------------------------------------------------------------------------------------ text


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids the tokenizer puts before and after a text."""
    plain, whole = _ids(tokenizer, ["a"])[0], list(tokenizer(["a"])["input_ids"][0])
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(f"tokenizer: cannot tell its special tokens ({plain} became {whole})")


def _tokenized(
    path: Path, found: Contents, tokenizer: Any, length: int | None, notes: list[str]
) -> Contents:
    """Texts as rows of ids; long ones in consecutive pieces, each with the special tokens."""
    if tokenizer is None:
        raise ValueError(
            f"FILE: {path} holds text, but the model has no tokenizer; expected token ids or "
            "floats (.npy, .safetensors, or .jsonl with input_ids)"
        )
    before, after = _special(tokenizer)
    room = None if length is None else length - len(before) - len(after)
    if room is not None and room < 1:
        least = len(before) + len(after) + 1
        raise _check.fail("length", length, f"at least {least}, with the special tokens")
    rows, lines, labels, empty, cut = [], [], [], 0, 0
    assert found.texts is not None
    for k, ids in enumerate(_ids(tokenizer, found.texts) if found.texts else []):
        empty += not ids
        step = len(ids) if room is None else room
        pieces = [ids[s : s + step] for s in range(0, len(ids), step or 1)]
        cut += len(pieces) > 1
        if found.labels is not None and len(pieces) > 1:
            raise ValueError(
                f"{path}, line {found.lines[k]}: a labelled text of {len(ids)} tokens does not fit "
                f"into length {length}"
            )
        rows += [np.asarray([*before, *piece, *after], dtype=np.int64) for piece in pieces]
        lines += [found.lines[k]] * len(pieces)
        if found.labels is not None and pieces:
            labels.append(found.labels.row(k).numpy())
    notes.append(found.note + (f", {cut} longer than {length} tokens and cut" if cut else ""))
    if empty:
        notes.append(f"{empty} texts without a token left out")
    return Contents(
        rows=Ragged(rows, lines) if rows else None,
        labels=Ragged(labels, lines) if labels else None,
    )


# ---------------------------------------------------------------------------------------- samples


def _ends(path: Path, rows: Ragged | Array, mask: Ragged | Array | None) -> np.ndarray:
    """(rows, 2): where the tokens of each row start and stop."""
    widths = rows.lengths if isinstance(rows, Ragged) else np.full(len(rows), rows.shape[1])
    out = np.stack([np.zeros(len(rows), dtype=np.int64), widths], 1)
    if mask is None:
        return out
    for a in range(0, len(rows), 1 if isinstance(mask, Ragged) else _ROWS_AT_ONCE):
        part = mask.row(a)[None] if isinstance(mask, Ragged) else mask[a : a + _ROWS_AT_ONCE]
        ones = part == 1
        count, start = ones.sum(1), ones.int().argmax(1)
        last = part.shape[1] - ones.flip(1).int().argmax(1)
        wrong = ((part != 0) & ~ones).any(1) | (count == 0) | (last - start != count)
        if bool(wrong.any()):
            row = a + int(wrong.int().argmax())
            raise ValueError(
                f"{path}, {rows.where(row)}: attention_mask: expected 0 and 1 with one run of ones"
            )
        out[a : a + len(part)] = torch.stack([start, last], 1).numpy()
    return out


def _pieces(ends: np.ndarray, length: int | None) -> np.ndarray:
    """(samples, 3): row, start, stop of consecutive pieces of at most ``length``."""
    starts, stops = ends.T
    sizes = stops - starts
    counts = np.ones_like(sizes) if length is None else -(-sizes // length)
    row = np.repeat(np.arange(len(ends)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = starts[row] + nth * (length or 0)
    stop = stops[row] if length is None else np.minimum(start + length, stops[row])
    return np.stack([row, start, stop], 1)


def _check_ids(path: Path, rows: Any, sample: np.ndarray, ids: Tensor, top: int | None) -> None:
    wrong = ids < 0 if top is None else (ids < 0) | (ids >= top)
    if bool(wrong.any()):
        at = int(wrong.int().argmax())
        below = "" if top is None else f" and < {top}, the vocabulary"
        raise ValueError(
            f"{path}, {rows.where(int(sample[0]))}: input_ids: expected ids >= 0{below}, got "
            f"{int(ids[at])} at position {int(sample[1]) + at}"
        )


def _bytes(values: Tensor) -> np.ndarray:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy()


def _examine(
    path: Path, found: Contents, index: np.ndarray, kind: str, vocabulary: int | None
) -> str:
    """Look at every sample that will be read: its fingerprint, or the error it deserves."""
    digest = hashlib.blake2b(digest_size=16)
    assert found.rows is not None
    for sample in index:
        row = int(sample[0])
        if kind == "tokens":
            values = found.rows.part(*map(int, sample))
            _check_ids(path, found.rows, sample, values, vocabulary)
        else:
            values = found.rows.row(row)
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{path}, {found.rows.where(row)}: expected finite numbers")
        parts = [values] if found.labels is None else [values, _label(found.labels, sample, kind)]
        for part in parts:
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(_bytes(part))
    return digest.hexdigest()


def _contents(path: Path, text_field: str) -> Contents:
    ending = path.suffix.lower()
    if ending in _REFUSED:
        raise ValueError(f"FILE: expected text, .jsonl, .npy or .safetensors, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"FILE: no file {path}")
    if ending in (".jsonl", ".ndjson"):
        return data_files.jsonl(path, text_field)
    readers = {".npy": data_files.npy, ".safetensors": data_files.safetensors}
    return readers.get(ending, data_files.text)(path)


def load_data(
    path: str | Path,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    batch: int = 16,
    samples: int | None = None,
    text_field: str = "text",
    pad_id: int | None = None,
    vocabulary: int | None = None,
    mask: bool = True,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Data:
    """Samples of a file.

    - Text (any other ending, UTF-8): a sample is a paragraph if there are blank lines, else a line.
    - ``.jsonl``: a line is an object with ``input_ids``, or with text in ``text_field``; optional
      ``labels`` (a number, or one for each id) and, with ids, ``attention_mask``.
    - ``.npy``: integers (n, t), or (t,) for one stream, are token ids; floats (n, ...) features.
    - ``.safetensors``: ``input_ids`` (n, t) with optional ``attention_mask``, or float ``inputs``
      (n, ...); optional ``labels``.

    Text is tokenised once and kept as ids; arrays are memory-mapped. Samples longer than
    ``length`` are cut into consecutive samples, of text each with the special tokens. Padding in a
    file counts only if its ``attention_mask`` says so. Nothing is unpickled.

    Args:
        path: the file.
        tokenizer: of transformers, or a callable like it; for text.
        length: most tokens of a sample; the tokenizer's own limit by default, for text.
        batch: samples of a batch.
        samples: at most this many, drawn with ``seed`` and kept in the order of the file.
        text_field: name of the text in JSONL.
        pad_id: id at padding; the tokenizer's, or 0, by default.
        vocabulary: ids have to be below it.
        mask: whether batches of ids hold ``attention_mask``. Without it they are plain tensors,
            for models that take nothing else, and samples of a batch must have one length.
        dtype: of float batches; as in the file by default.
        seed: see ``samples``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line or row, the field, what was expected and what is there.
        TypeError: for arguments of another type.
    """
    path = Path(path)
    batch = _check.integer("batch", batch, 1)
    length = None if length is None else _check.integer("length", length, 1)
    samples = None if samples is None else _check.integer("samples", samples, 1)
    seed = _check.integer("seed", seed, 0)
    if dtype is not None and dtype not in _check.FLOATING:
        raise _check.fail("dtype", dtype, "float64, float32, bfloat16, float16 or None")
    notes: list[str] = []
    found = _contents(path, text_field)
    if found.texts is not None:
        own = getattr(tokenizer, "model_max_length", None)
        if length is None and isinstance(own, int) and own < 10**9:
            length = own
        found = _tokenized(path, found, tokenizer, length, notes)
    if found.rows is None:
        raise ValueError(f"FILE: {path} is empty: expected at least one sample")
    kind = "floats" if isinstance(found.rows, Array) and found.rows.floating else "tokens"
    if kind == "tokens":
        ends = _ends(path, found.rows, found.mask)
        index = _pieces(ends, length)
        long = len(index) - len(ends)
        if long and found.labels is not None and found.labels.row(0).ndim == 0:
            row = int(index[np.flatnonzero(np.diff(index[:, 0]) == 0)[0], 0])
            raise ValueError(
                f"{path}, {found.rows.where(row)}: a sample with one label does not fit into "
                f"length {length}"
            )
        if long:
            notes.append(f"{len(ends)} rows, cut into {len(index)} of at most {length} tokens")
    else:
        index = np.stack([np.arange(len(found.rows)), *np.ones((2, len(found.rows)), int)], 1)
        index[:, 1] = 0
    if samples is not None and samples < len(index):
        notes.append(f"{samples} of {len(index)} samples, drawn with seed {seed}")
        drawn = np.random.default_rng(seed).choice(len(index), samples, replace=False)
        index = index[np.sort(drawn)]
    sizes = index[:, 2] - index[:, 1]
    if not mask and kind == "tokens":
        firsts = sizes[np.arange(len(sizes)) // batch * batch]
        if bool((sizes != firsts).any()):
            raise ValueError(
                f"FILE: {path} holds samples of different lengths, which need padding, and the "
                "model takes no attention_mask; expected one length, or batch=1"
            )
    if pad_id is None:
        pad_id = getattr(tokenizer, "pad_token_id", None)
    return Data(
        source=str(path),
        kind=kind,
        fingerprint=_examine(path, found, index, kind, vocabulary),
        samples=len(index),
        tokens=int(sizes.sum()),
        size=batch,
        notes=tuple(notes),
        _rows=found.rows,
        _labels=found.labels,
        _index=index,
        _pad=0 if pad_id is None else _check.integer("pad_id", pad_id, 0),
        _mask=mask,
        _dtype=dtype,
    )
