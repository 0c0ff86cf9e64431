"""Running sums Σ x xᵀ over rows that arrive a few at a time.

The sum is a packed triangle, read and written once for each update: 4 d² bytes in fp32. Rows are
held back until there are enough of them to pay for that, and multiplied in the precision they come
in (16-bit rows are summed in fp32). Updates happen after the same rows however the rows arrive, so
the bits of the result do not depend on how a stream was cut into batches (given the same rows).

Bound for n rows of width d: n d² FLOP, n d elements read and ⌈n / held⌉ 4 d² bytes of the triangle.
(Our choice.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import WORKSPACE, blocks
from deaddir_fast.ops.gram_packed import entries, gram_packed

#: Rows held back before an update: above this the triangle's traffic is below a tenth of the work.
ROWS = 2048


class GramSum:
    """Σ x xᵀ, Σ x and the number of rows.

    Attributes:
        packed: (d (d + 1) / 2,) lower triangle, row by row.
        sums: (d,), fp64.
        count: number of rows so far, those held back included.
    """

    def __init__(
        self, width: int, dtype: torch.dtype, device: torch.device, held: int = ROWS
    ) -> None:
        self._start((), width, dtype, device, held)

    def _start(
        self,
        lead: tuple[int, ...],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        held: int,
    ) -> None:
        self.lead, self.width, self.held = lead, width, held
        self.packed = torch.zeros(*lead, entries(width), dtype=dtype, device=device)
        self.sums = torch.zeros(*lead, width, dtype=torch.float64, device=device)
        self.count = 0
        self._buffer: Tensor | None = None
        self._filled = 0

    def add(self, rows: Tensor, scale: float = 1.0) -> None:
        """Add (m, d) rows, each x times ``scale``."""
        self.count += len(rows)
        if scale != 1.0:
            rows = rows * scale
        while len(rows):
            if not self._filled and len(rows) >= self.held:
                self._update(rows[: self.held])
                rows = rows[self.held :]
                continue
            if self._buffer is None or self._buffer.dtype != rows.dtype:
                self.flush()
                self._buffer = rows.new_empty(self.held, *self.lead, self.width)
            taken = min(len(rows), self.held - self._filled)
            self._buffer[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]
            if self._filled == self.held:
                self.flush()

    def flush(self) -> None:
        """Add the rows held back."""
        if self._filled and self._buffer is not None:
            rows, self._filled = self._buffer[: self._filled], 0
            self._update(rows)

    def _update(self, rows: Tensor) -> None:
        ones = rows.new_ones(1, len(rows))
        # A product, not sum(0): on a CPU the latter walks down columns of a wide matrix.
        if rows.dtype in (torch.float32, torch.float64):
            self.sums += (ones @ rows)[0]
        else:
            self.sums += rows.sum(0, dtype=torch.float32)
        if self.packed.dtype == torch.float64:
            # Squares of fp32 numbers are exact in fp64: no rounding before the sum.
            gram_packed(rows.double(), out=self.packed, beta=1.0)
        elif rows.dtype == torch.float64:
            self.packed += gram_packed(rows).to(self.packed.dtype)
        else:
            gram_packed(rows, out=self.packed, beta=1.0)

    def release(self) -> None:
        """Flush and give the buffer's memory back."""
        self.flush()
        self._buffer = None


class GroupedSum(GramSum):
    """The same for each of several groups at once: rows are (m, groups, d).

    One batched product serves all groups (depthwise convolutions have hundreds, a few numbers
    wide); its squares are formed for as many groups at a time as fit a bounded workspace.

    Attributes:
        packed: (groups, d (d + 1) / 2).
        sums: (groups, d), fp64.
    """

    def __init__(self, groups: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # Held back: as many as fill a bounded buffer.
        each = groups * width * dtype.itemsize
        self._start((groups,), width, dtype, device, max(64, min(ROWS, WORKSPACE // each)))

    def _update(self, rows: Tensor) -> None:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        each = (self.width + len(rows)) * self.width * wide.itemsize
        row, column = torch.tril_indices(self.width, self.width, device=rows.device)
        for some in blocks(rows.shape[1], each):
            # (groups, d, m): long rows make the fastest batch of products.
            x = rows[:, some].permute(1, 2, 0).to(wide).contiguous()
            self.sums[some] += x.sum(2)
            self.packed[some] += torch.bmm(x, x.mT)[:, row, column]


def unpack(packed: Tensor, width: int) -> Tensor:
    """(d, d) symmetric matrix from its packed lower triangle."""
    row, column = torch.tril_indices(width, width, device=packed.device)
    square = packed.new_empty(width, width)
    square[row, column] = packed
    square[column, row] = packed
    return square
