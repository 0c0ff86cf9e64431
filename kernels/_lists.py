"""Lists of tensors in one launch: tables of pointers and sizes, and of the work they make.

A table is one int64 tensor on the device: a row of `fields` numbers for each tensor of the list
(addresses, sizes, flags; 0 is the address of what is absent), then one entry for each program of a
launch, the number of its tensor in the high half and its own number in that tensor in the low one.

A table is a pure function of its key: whatever is in it was computed from addresses, sizes and
options that are all in the key, so that a hit cannot be stale, whatever was freed and allocated
since. The cache is bounded. A table goes to the device from pinned memory without waiting; other
streams than the one it was copied on wait for it. A table that a captured graph reads is kept for
good, because the graph goes on reading its memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tables that are kept, and their bytes; one list of tensors needs one to three.
SIZE = 256
BYTES = 64 * 2**20

#: Triton's types.
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

Build = Callable[..., np.ndarray]


@dataclass(frozen=True)
class _Entry:
    table: Tensor
    stream: int
    event: Any


_cache: OrderedDict[Hashable, _Entry] = OrderedDict()
_captured: dict[int, Any] = {}


def table(build: Build, device: torch.device, *key: Any) -> Tensor:
    """Return ``build(*key)``, an array of int64, as a tensor on the device.

    Args:
        build: a pure function; the same array for the same key, whatever else happens.
        key: its hashable arguments.

    Raises:
        RuntimeError: a graph is being captured and the table is not there yet.
    """
    name = (build, device, key)
    entry = _cache.get(name)
    if entry is None:
        refuse_capture(device)
        entry = _copied(build(*key), device)
        _cache[name] = entry
        size = sum(e.table.nbytes for e in _cache.values())
        while len(_cache) > SIZE or (size > BYTES and len(_cache) > 1):
            size -= _cache.popitem(last=False)[1].table.nbytes
    else:
        _cache.move_to_end(name)
    if device.type == "cuda":
        if capturing(device):
            keep(entry.table)
        else:
            stream = torch.cuda.current_stream(device)
            if stream.cuda_stream != entry.stream:
                stream.wait_event(entry.event)
                entry.table.record_stream(stream)
    return entry.table


def clear() -> None:
    """Forget the tables that no graph holds."""
    _cache.clear()


def capturing(device: torch.device) -> bool:
    """Whether launches on this device go to a graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Refuse to build during the capture of a graph: its replays would read freed memory."""
    if capturing(device):
        raise RuntimeError(
            "the tables of this list of tensors are not built yet, and cannot be while a CUDA "
            "graph is captured; run the operation once on the same tensors before the capture"
        )


def keep(*tensors: Tensor) -> None:
    """Keep what a captured graph reads for the rest of the process."""
    _captured.update((id(t), t) for t in tensors)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device, from pinned memory and without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _copied(values: np.ndarray, device: torch.device) -> _Entry:
    if values.dtype != np.int64:
        raise TypeError(f"a table holds int64, not {values.dtype}")
    result = upload(values.reshape(-1), device)
    if device.type != "cuda":
        return _Entry(result, 0, None)
    stream = torch.cuda.current_stream(device)
    return _Entry(result, stream.cuda_stream, stream.record_event())


def addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Addresses of tensors, 0 for None."""
    try:
        return tuple(map(Tensor.data_ptr, tensors))  # most lists have no None: half the time
    except TypeError:
        return tuple(0 if t is None else t.data_ptr() for t in tensors)


def shapes(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Shapes of matrices."""
    return tuple([t.shape for t in tensors])


def pack(rows: Sequence[Sequence[int]], *programs: Sequence[int]) -> np.ndarray:
    """Lay out a table: the rows of the tensors, then the programs of each launch.

    Args:
        rows: numbers of each tensor, all as many.
        programs: for each launch the number of programs of each tensor.
    """
    parts = [np.asarray(rows, dtype=np.int64).reshape(-1)]
    parts += [entries(counts) for counts in programs]
    return np.concatenate(parts)


def entries(counts: Sequence[int]) -> np.ndarray:
    """One entry for each program: its tensor in the high half, its number there in the low one."""
    count = np.asarray(counts, dtype=np.int64)
    if (count >= 2**31).any() or count.sum() >= 2**31:
        raise ValueError(f"a launch of {int(count.sum())} programs: too many for a grid")
    which = np.repeat(np.arange(len(count), dtype=np.int64), count)
    first = np.cumsum(count) - count
    return (which << 32) | (np.arange(len(which), dtype=np.int64) - first[which])


@triton.jit
def entry(table_ptr, programs, FIELDS: tl.constexpr):
    """The row of the tensor that this program works on, its number, the program's number in it.

    ``programs`` is where the entries of the launch start.
    """
    packed = tl.load(table_ptr + programs + tl.program_id(0))
    tensor = packed >> 32
    number = packed & 0xFFFFFFFF
    return table_ptr + tensor * FIELDS, tensor, number
