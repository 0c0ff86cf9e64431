"""Sums of squares of scaled rows or columns on a GPU: one launch for all matrices of a list.

One program takes a tile of rows by columns and walks along the dimension that is summed, over a
span of fixed length; sums stay in registers until the end. Where a matrix has more than one span,
a second launch adds their sums in order. No atomics: the result depends on shapes alone, and not on
the other matrices of the list. Bound by memory: the matrices are read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _lists as lists
from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels._lists import entry

#: Numbers in the row of a matrix: addresses of w and of the scales of rows and columns, rows,
#: columns, the dimension that stays, whether rows start at multiples of 16 bytes, where its sums
#: start in the partial ones and in the result, spans.
FIELDS = 10


@triton.jit
def add_squares(
    row_ptr,
    out_ptr,
    tile,
    span,
    W: tl.constexpr,
    STATE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store the sums of one tile of lines over one span of ``SPAN`` tiles."""
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(W))
    row_scale = tl.load(row_ptr + 1).to(tl.pointer_type(STATE))
    col_scale = tl.load(row_ptr + 2).to(tl.pointer_type(STATE))
    has_row = tl.load(row_ptr + 1) != 0
    has_col = tl.load(row_ptr + 2) != 0
    height = tl.load(row_ptr + 3)
    if ALIGNED:
        # not a hint: the rounding is exact, and the compiler sees the factor
        width = tl.load(row_ptr + 4) // VECTOR * VECTOR
        w_ptr = tl.multiple_of(w_ptr, 16)
        col_scale = tl.multiple_of(col_scale, 16)
    else:
        width = tl.load(row_ptr + 4)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), STATE)
    if DIM == 0:
        row = tile * BLOCK_R + r
        inside_row = row < height
        s_row = tl.load(row_scale + row, mask=inside_row & has_row, other=1.0)
        lines = w_ptr + row[:, None] * width
        end = tl.minimum(span * SPAN + SPAN, (width + BLOCK_C - 1) // BLOCK_C)
        for first in range(span * SPAN, end):
            column = first * BLOCK_C + c
            inside = column < width
            s_col = tl.load(col_scale + column, mask=inside & has_col, other=1.0)
            known = inside_row[:, None] & inside[None, :]
            w = tl.load(lines + column[None, :], mask=known, other=0.0).to(STATE)
            x = w * s_row[:, None] * s_col[None, :]
            total += tl.where(known, x * x, 0.0)
        tl.store(out_ptr + span * height + row, tl.sum(total, 1), mask=inside_row)
    else:
        column = tile * BLOCK_C + c
        inside_col = column < width
        s_col = tl.load(col_scale + column, mask=inside_col & has_col, other=1.0)
        end = tl.minimum(span * SPAN + SPAN, (height + BLOCK_R - 1) // BLOCK_R)
        for first in range(span * SPAN, end):
            row = first * BLOCK_R + r
            inside = row < height
            s_row = tl.load(row_scale + row, mask=inside & has_row, other=1.0)
            known = inside[:, None] & inside_col[None, :]
            place = w_ptr + row[:, None] * width + column[None, :]
            w = tl.load(place, mask=known, other=0.0).to(STATE)
            x = w * s_row[:, None] * s_col[None, :]
            total += tl.where(known, x * x, 0.0)
        tl.store(out_ptr + span * width + column, tl.sum(total, 0), mask=inside_col)


@triton.jit(do_not_specialize=["programs"])
def scaled_squares_kernel(
    table_ptr,
    out_ptr,
    programs,
    FIELDS: tl.constexpr,
    W: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN_R: tl.constexpr,
    SPAN_C: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sums of one tile of lines over one span; spans are in tiles."""
    row_ptr, _, number = entry(table_ptr, programs, FIELDS)
    dim = tl.load(row_ptr + 5)
    aligned = tl.load(row_ptr + 6) != 0
    out = out_ptr + tl.load(row_ptr + 7)
    spans = tl.load(row_ptr + 9)
    tile = number // spans
    span = number - tile * spans
    if dim == 0:
        if aligned:
            add_squares(row_ptr, out, tile, span, W, STATE, 0,
                        BLOCK_R, BLOCK_C, SPAN_C, VECTOR, True)  # fmt: skip
        else:
            add_squares(row_ptr, out, tile, span, W, STATE, 0,
                        BLOCK_R, BLOCK_C, SPAN_C, VECTOR, False)  # fmt: skip
    else:
        if aligned:
            add_squares(row_ptr, out, tile, span, W, STATE, 1,
                        BLOCK_R, BLOCK_C, SPAN_R, VECTOR, True)  # fmt: skip
        else:
            add_squares(row_ptr, out, tile, span, W, STATE, 1,
                        BLOCK_R, BLOCK_C, SPAN_R, VECTOR, False)  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def merge_spans_kernel(
    table_ptr,
    part_ptr,
    out_ptr,
    programs,
    FIELDS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the spans of ``BLOCK`` sums of one matrix, in order."""
    row_ptr, _, number = entry(table_ptr, programs, FIELDS)
    dim = tl.load(row_ptr + 5)
    length = tl.load(row_ptr + 3 + dim)
    spans = tl.load(row_ptr + 9)
    part = part_ptr + tl.load(row_ptr + 7)
    out = out_ptr + tl.load(row_ptr + 8)
    lane = number * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK), STATE)
    for first in range(0, spans, BLOCK_S):
        span = first + s
        known = (span < spans)[:, None] & (lane < length)[None, :]
        total += tl.load(part + span[:, None] * length + lane[None, :], mask=known, other=0.0)
    tl.store(out + lane, tl.sum(total, 0), mask=lane < length)


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Rows and columns of a tile, tiles of a span in either direction, warps."""

    rows: int
    columns: int
    span_rows: int
    span_columns: int
    warps: int


#: By the type of the matrices. A span has 2^14 elements (2^13 in fp64).
CONFIGS: dict[torch.dtype, Config] = {
    torch.float64: Config(8, 128, 8, 8, 4),
    torch.float32: Config(16, 128, 8, 8, 4),
    torch.bfloat16: Config(16, 128, 8, 8, 4),
    torch.float16: Config(16, 128, 8, 8, 4),
}

#: Spans and sums of a tile of the second launch.
MERGE_SPANS, MERGE = 16, 64


def tiles(rows: int, columns: int, dim: int, config: Config) -> tuple[int, int]:
    """Tiles of lines of a matrix, and spans that their sums are cut into (1 at least)."""
    lines, block = (rows, config.rows) if dim == 0 else (columns, config.columns)
    if dim == 0:
        along, span = columns, config.columns * config.span_columns
    else:
        along, span = rows, config.rows * config.span_rows
    return -(-lines // block), max(1, -(-along // span))


def vector(dtype: torch.dtype) -> int:
    """Elements whose number divides a row where all of its rows start at multiples of 16 bytes."""
    return 16 // min(dtype.itemsize, 4)


#: Below this many elements the launches cost more than the passes over memory.
WORTHWHILE_ELEMENTS = 2**16


def worthwhile(ws: Sequence[Tensor]) -> bool:
    """Whether one launch beats several for each matrix: for many matrices, or large ones."""
    return len(ws) > 4 or sum(w.numel() for w in ws) >= WORTHWHILE_ELEMENTS


# --- launcher -------------------------------------------------------------------------------------


def build(
    ws: Sequence[int],
    rows: Sequence[int],
    cols: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    dims: Sequence[int],
    dtype: torch.dtype,
    config: Config,
) -> np.ndarray:
    """The table, from addresses and shapes."""
    table, programs, merges = [], [], []
    part = out = 0
    for w, row, col, (o, i), dim in zip(ws, rows, cols, shapes, dims, strict=True):
        count, spans = tiles(o, i, dim, config)
        even = i % vector(dtype) == 0 and w % 16 == 0 and col % 16 == 0
        table.append((w, row, col, o, i, dim, int(even), part, out, spans))
        length = i if dim else o
        part, out = part + spans * length, out + length
        programs.append(count * spans)
        merges.append(-(-length // MERGE))
    return lists.pack(table, programs, merges)


def scaled_squares(
    ws: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    dims: Sequence[int],
    out: Tensor,
    *,
    config: Config | None = None,
) -> None:
    """Write the sums of squares of the scaled rows or columns of each matrix, one after another.

    Args:
        ws: (o, i) matrices, contiguous, of one dtype and device.
        rows, cols: vectors of the dtype of ``out``, or None.
        dims: 0 for a sum of each row, 1 of each column.
        out: one vector; fp64 for fp64, else fp32.
        config: overrides that of the dtype.
    """
    if out.numel() == 0:
        return
    dtype, device = ws[0].dtype, out.device
    config = config or CONFIGS[dtype]
    shapes = lists.shapes(ws)
    cut = [(*tiles(*s, d, config), s[d]) for s, d in zip(shapes, dims, strict=True)]
    programs = sum(count * spans for count, spans, _ in cut)
    split = any(spans > 1 for _, spans, length in cut if length)
    part = out
    if split:
        part = torch.empty(sum(s * n for _, s, n in cut), dtype=out.dtype, device=device)
    state = lists.TYPES[out.dtype]
    with torch.cuda.device_of(out):
        table = lists.table(
            build, device, lists.addresses(ws), lists.addresses(rows), lists.addresses(cols),
            shapes, tuple(dims), dtype, config,
        )  # fmt: skip
        scaled_squares_kernel[(programs,)](
            table,
            part,
            len(ws) * FIELDS,
            FIELDS=FIELDS,
            W=lists.TYPES[dtype],
            STATE=state,
            BLOCK_R=config.rows,
            BLOCK_C=config.columns,
            SPAN_R=config.span_rows,
            SPAN_C=config.span_columns,
            VECTOR=vector(dtype),
            num_warps=config.warps,
        )
        if split:
            merge_spans_kernel[(sum(-(-n // MERGE) for _, _, n in cut),)](
                table,
                part,
                out,
                len(ws) * FIELDS + programs,
                FIELDS=FIELDS,
                STATE=state,
                BLOCK_S=MERGE_SPANS,
                BLOCK=MERGE,
                num_warps=4,
            )


# --- ahead-of-time cases --------------------------------------------------------------------------


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    result = []
    for dtype, config in CONFIGS.items():
        state = tl.float64 if dtype == torch.float64 else tl.float32
        wide = "fp64" if dtype == torch.float64 else "fp32"
        result.append(
            Case(
                kernel=scaled_squares_kernel,
                label=NAMES[dtype],
                signature={"table_ptr": "*i64", "out_ptr": f"*{wide}", "programs": "i32"},
                constants={
                    "FIELDS": FIELDS,
                    "W": lists.TYPES[dtype],
                    "STATE": state,
                    "BLOCK_R": config.rows,
                    "BLOCK_C": config.columns,
                    "SPAN_R": config.span_rows,
                    "SPAN_C": config.span_columns,
                    "VECTOR": vector(dtype),
                },
                warps=config.warps,
                stages=3,
                aligned=("table_ptr", "out_ptr"),
                unit="vectors",
                helpers=(entry, add_squares),
            )
        )
    for wide, state in (("fp32", tl.float32), ("fp64", tl.float64)):
        pointers = {"part_ptr": f"*{wide}", "out_ptr": f"*{wide}"}
        result.append(
            Case(
                kernel=merge_spans_kernel,
                label=wide,
                signature={"table_ptr": "*i64", **pointers, "programs": "i32"},
                constants={
                    "FIELDS": FIELDS,
                    "STATE": state,
                    "BLOCK_S": MERGE_SPANS,
                    "BLOCK": MERGE,
                },
                warps=4,
                stages=3,
                aligned=("table_ptr", *pointers),
                unit="sums",
                helpers=(entry,),
            )
        )
    return result
