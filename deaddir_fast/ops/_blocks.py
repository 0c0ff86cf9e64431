"""Cutting a large extent into blocks that fit a fixed workspace, and the accumulation dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Bytes of temporary storage a reference may hold at once. The cut depends on shapes alone, so a
#: result does not depend on the machine's memory.
WORKSPACE = 64 * 2**20


def blocks(length: int, bytes_each: int, workspace: int | None = None) -> Iterator[slice]:
    """Cut ``range(length)`` into slices of at most ``workspace`` bytes, one item at least.

    A length of 0 gives one empty slice, so that concatenating the pieces always works.
    """
    budget = WORKSPACE if workspace is None else workspace
    step = max(1, budget // max(1, bytes_each))
    for start in range(0, max(1, length), step):
        yield slice(start, min(length, start + step))


def accumulation(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of sums and results: fp64 if any input is, else fp32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32
