"""Running sums Σ x xᵀ over rows that arrive a few at a time.

The sum is a packed triangle, read and written once for each update: 4 d² bytes in fp32. Rows are
held back until there are enough of them to pay for that, and multiplied in the precision they come
in (16-bit rows are summed in fp32). Updates happen after the same rows however the rows arrive, so
the bits of the result do not depend on how a stream was cut into batches (given the same rows).

Bound for n rows of width d: n d² FLOP, n d elements read and ⌈n / held⌉ 4 d² bytes of the triangle.
(Our choice.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import WORKSPACE, blocks
from deaddir_fast.ops.gram_packed import entries, gram_packed

#: Rows held back before an update: above this the triangle's traffic is below a tenth of the work.
ROWS = 2048


class GramSum:
    """α Σ x xᵀ, Σ x and the number of rows.

    Args:
        width: d.
        dtype: of the triangle, fp32 or fp64.
        device: where the rows are.
        held: rows held back before an update.
        alpha: factor of the triangle.
        ones: whether Σ x is kept.

    Attributes:
        packed: (d (d + 1) / 2,) lower triangle, row by row; complete after :meth:`release`.
        sums: (d,), fp64; (0,) without ``ones``.
        count: number of rows so far, those held back included.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        held: int = ROWS,
        *,
        alpha: float = 1.0,
        ones: bool = True,
    ) -> None:
        self._start((), width, dtype, device, held, alpha, ones)

    def _start(
        self,
        lead: tuple[int, ...],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        held: int,
        alpha: float,
        ones: bool,
    ) -> None:
        self.lead, self.width, self.held, self.alpha = lead, width, held, alpha
        # The first update writes it: zeros would be two more passes over fresh memory.
        self.packed = torch.empty(*lead, entries(width), dtype=dtype, device=device)
        self.sums = torch.zeros(*lead, width if ones else 0, dtype=torch.float64, device=device)
        self.count = 0
        self._begun = False
        self._buffer: Tensor | None = None
        self._filled = 0

    def add(self, rows: Tensor) -> None:
        """Add (m, d) rows; they are copied or used at once."""
        self.count += len(rows)
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
        if self.sums.numel():
            # A product, not sum(0): on a CPU the latter walks down columns of a wide matrix.
            if rows.dtype in (torch.float32, torch.float64):
                self.sums += (rows.new_ones(1, len(rows)) @ rows)[0]
            else:
                self.sums += rows.sum(0, dtype=torch.float32)
        beta, self._begun = float(self._begun), True
        if self.packed.dtype == torch.float64:
            # Squares of fp32 numbers are exact in fp64: no rounding before the sum.
            gram_packed(rows.double(), out=self.packed, alpha=self.alpha, beta=beta)
        elif rows.dtype != torch.float64:
            gram_packed(rows, out=self.packed, alpha=self.alpha, beta=beta)
        elif beta:
            self.packed += gram_packed(rows, alpha=self.alpha).to(self.packed.dtype)
        else:
            self.packed.copy_(gram_packed(rows, alpha=self.alpha))

    def release(self) -> None:
        """Flush and give the buffer's memory back."""
        self.flush()
        self._buffer = None
        if not self._begun:
            self.packed.zero_()
            self._begun = True


def diagonal(packed: Tensor) -> Tensor:
    """(..., d) diagonal of packed lower triangles (..., d (d + 1) / 2)."""
    size = packed.shape[-1]
    width = (math.isqrt(8 * size + 1) - 1) // 2
    index = torch.arange(1, width + 1, device=packed.device)
    return packed[..., index * (index + 1) // 2 - 1]


class GroupedSum(GramSum):
    """The same for each of several groups at once: rows are (m, groups, d).

    One batched product serves all groups (depthwise convolutions have hundreds, a few numbers
    wide); its squares are formed for as many groups at a time as fit a bounded workspace.

    Attributes:
        packed: (groups, d (d + 1) / 2).
        sums: (groups, d), fp64.
    """

    def __init__(
        self,
        groups: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        alpha: float = 1.0,
        ones: bool = True,
    ) -> None:
        # Held back: as many as fill a bounded buffer.
        held = max(64, min(ROWS, WORKSPACE // max(1, groups * width * dtype.itemsize)))
        self._start((groups,), width, dtype, device, held, alpha, ones)

    def _update(self, rows: Tensor) -> None:
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        each = (self.width + len(rows)) * self.width * wide.itemsize
        row, column = torch.tril_indices(self.width, self.width, device=rows.device)
        if not self._begun:
            self.packed.zero_()
            self._begun = True
        if self.packed.dtype == torch.float64:
            wide = torch.float64
        for some in blocks(rows.shape[1], each):
            # (groups, d, m): long rows make the fastest batch of products.
            x = rows[:, some].permute(1, 2, 0).to(wide).contiguous()
            if self.sums.numel():
                self.sums[some] += x.sum(2)
            self.packed[some] += self.alpha * torch.bmm(x, x.mT)[:, row, column]


def unpack(packed: Tensor, width: int) -> Tensor:
    """(d, d) symmetric matrix from its packed lower triangle."""
    row, column = torch.tril_indices(width, width, device=packed.device)
    square = packed.new_empty(width, width)
    square[row, column] = packed
    square[column, row] = packed
    return square
