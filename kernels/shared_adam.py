"""Scaled AdamW with a second moment shared by groups, on a GPU: all tensors of a list at once.

First pass: the mean of squares of the scaled gradient over groups of rows times groups of columns,
and with it the new second moment. One program takes a tile of rows by columns; in either dimension
its lanes are pieces of groups, or the members of one piece (`_groups`), gathered through the sorted
order of the map, and it walks along what remains of the pieces. Where groups are cut into several
pieces, their sums are partial ones, which another launch adds in order. Last pass: the step, with
the shared moment gathered (`_adam`).

No atomics: the order of additions depends on the maps alone. Bound by memory: g is read twice, w
and m are read and written once. Columns of g that are read in the order of the matrix are loaded
16 bytes a lane, others one element a lane, which coalesces where neighbours in the order are
neighbours in the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _adam as adam
from deaddir_fast.kernels import _lists as lists
from deaddir_fast.kernels._adam import average, divide, step_program
from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels._device import limits
from deaddir_fast.kernels._groups import Axis, Layout, grouping
from deaddir_fast.kernels._lists import entry

#: Numbers in the row of a matrix for the first pass: addresses of g, of the scales of rows and
#: columns, and of v; columns of g; where its partial sums start, or -1; for rows and then for
#: columns address of the groups (0: each alone), members, pieces, groups, together; whether columns
#: are loaded in order.
FIELDS = 17


@triton.jit
def pieces(numbers_ptr, members, count, together, first, LANES: tl.constexpr):
    """Of each lane: its piece, begin and end of its members, where it starts in them."""
    lane = tl.arange(0, LANES)
    piece = first + tl.where(together, 0, lane)
    known = piece < count
    alone = numbers_ptr.to(tl.int64) == 0
    listed = known & (alone == 0)
    begin = tl.load(numbers_ptr + members + piece, mask=listed, other=0)
    end = tl.load(numbers_ptr + members + count + piece, mask=listed, other=0)
    begin = tl.where(known & alone, piece, begin)
    end = tl.where(known & alone, piece + 1, end)
    return piece, begin, end, tl.where(together, lane, 0)


@triton.jit
def member(numbers_ptr, place, known):
    """The rows or columns at these places of the order."""
    listed = numbers_ptr.to(tl.int64) != 0
    found = tl.load(numbers_ptr + place, mask=known & listed, other=0)
    return tl.where(listed, found, place)


@triton.jit
def tile_squares(
    row_ptr,
    row_begin,
    row_end,
    row_shift,
    col_begin,
    col_end,
    col_shift,
    col_first,
    G: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    IN_ORDER: tl.constexpr,
):
    """Sums of squares of each lane's members, (BLOCK_R, BLOCK_C)."""
    g_ptr = tl.load(row_ptr).to(tl.pointer_type(G))
    row_scale = tl.load(row_ptr + 1).to(tl.pointer_type(STATE))
    col_scale = tl.load(row_ptr + 2).to(tl.pointer_type(STATE))
    has_row = tl.load(row_ptr + 1) != 0
    has_col = tl.load(row_ptr + 2) != 0
    row_numbers = tl.load(row_ptr + 6).to(tl.pointer_type(tl.int32))
    col_numbers = tl.load(row_ptr + 11).to(tl.pointer_type(tl.int32))
    rows_together = tl.load(row_ptr + 10) != 0
    cols_together = tl.load(row_ptr + 15) != 0
    row_stride = tl.where(rows_together, BLOCK_R, 1)
    col_stride = tl.where(cols_together, BLOCK_C, 1)
    row_trips = (tl.max(row_end - row_begin, 0) + row_stride - 1) // row_stride
    col_trips = (tl.max(col_end - col_begin, 0) + col_stride - 1) // col_stride
    if IN_ORDER:
        # the rounding is exact, and the compiler sees the factor
        width = tl.load(row_ptr + 4) // VECTOR * VECTOR
        g_ptr = tl.multiple_of(g_ptr, 16)
        col_scale = tl.multiple_of(col_scale, 16)
        in_order = col_first // VECTOR * VECTOR
        in_order_end = tl.max(col_end, 0) // VECTOR * VECTOR
    else:
        width = tl.load(row_ptr + 4)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), STATE)
    for i in range(row_trips):
        row_place = row_begin + row_shift + i * row_stride
        row_known = row_place < row_end
        row = member(row_numbers, row_place, row_known)
        s_row = tl.load(row_scale + row, mask=row_known & has_row, other=1.0)
        lines = g_ptr + row.to(tl.int64) * width
        for j in range(col_trips):
            if IN_ORDER:
                col = in_order + j * BLOCK_C + c
                col_known = col < in_order_end
            else:
                place = col_begin + col_shift + j * col_stride
                col_known = place < col_end
                col = member(col_numbers, place, col_known)
            s_col = tl.load(col_scale + col, mask=col_known & has_col, other=1.0)
            known = row_known[:, None] & col_known[None, :]
            g = tl.load(lines[:, None] + col[None, :], mask=known, other=0.0).to(STATE)
            x = g * (s_row[:, None] * s_col[None, :])
            total += tl.where(known, x * x, 0.0)
    return total


@triton.jit(do_not_specialize=["programs"])
def shared_moments_kernel(
    table_ptr,
    part_ptr,
    hyper_ptr,
    programs,
    FIELDS: tl.constexpr,
    G: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sums over a tile of pieces: partial ones, or with them the new v where groups are whole."""
    row_ptr, _, number = entry(table_ptr, programs, FIELDS)
    v_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(STATE))
    part = tl.load(row_ptr + 5)
    row_numbers = tl.load(row_ptr + 6).to(tl.pointer_type(tl.int32))
    row_pieces = tl.load(row_ptr + 8)
    rows_together = tl.load(row_ptr + 10) != 0
    col_numbers = tl.load(row_ptr + 11).to(tl.pointer_type(tl.int32))
    col_pieces = tl.load(row_ptr + 13)
    cols_together = tl.load(row_ptr + 15) != 0
    in_order = tl.load(row_ptr + 16) != 0

    col_tile = tl.where(cols_together, 1, BLOCK_C)
    row_tile = tl.where(rows_together, 1, BLOCK_R)
    col_tiles = (col_pieces + col_tile - 1) // col_tile
    # members and pieces are counted in 32 bits, elements and sums in 64
    row_first = (number // col_tiles * row_tile).to(tl.int32)
    col_first = (number % col_tiles * col_tile).to(tl.int32)
    row_piece, row_begin, row_end, row_shift = pieces(
        row_numbers, tl.load(row_ptr + 7), row_pieces, rows_together, row_first, BLOCK_R
    )
    col_piece, col_begin, col_end, col_shift = pieces(
        col_numbers, tl.load(row_ptr + 12), col_pieces, cols_together, col_first, BLOCK_C
    )
    total = tl.zeros((BLOCK_R, BLOCK_C), STATE)
    if in_order:
        # of members side by side the first column, or of single columns side by side
        start = tl.where(cols_together, tl.min(col_begin, 0), col_first)
        total = tile_squares(row_ptr, row_begin, row_end, row_shift, col_begin, col_end, col_shift,
                             start, G, STATE, BLOCK_R, BLOCK_C, VECTOR, True)  # fmt: skip
    else:
        total = tile_squares(row_ptr, row_begin, row_end, row_shift, col_begin, col_end, col_shift,
                             col_first, G, STATE, BLOCK_R, BLOCK_C, VECTOR, False)  # fmt: skip
    # what lies side by side is one piece: its first lane gets the sum
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    if rows_together:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], (BLOCK_R, BLOCK_C))
    if cols_together:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], (BLOCK_R, BLOCK_C))
    row_known = (row_piece < row_pieces) & ((r == 0) | (rows_together == 0))
    col_known = (col_piece < col_pieces) & ((c == 0) | (cols_together == 0))
    known = row_known[:, None] & col_known[None, :]
    place = row_piece.to(tl.int64)[:, None] * col_pieces + col_piece[None, :]
    if part < 0:
        row_count = (row_end - row_begin).to(STATE)
        count = row_count[:, None] * (col_end - col_begin).to(STATE)[None, :]
        v = tl.load(v_ptr + place, mask=known, other=0.0)
        v = average(v, divide(total, count, STATE), hyper_ptr, STATE)
        tl.store(v_ptr + place, v, mask=known)
    else:
        tl.store(part_ptr + part + place, total, mask=known)


@triton.jit(do_not_specialize=["programs"])
def merge_pieces_kernel(
    table_ptr,
    part_ptr,
    hyper_ptr,
    programs,
    FIELDS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The new v of one group of rows and BLOCK_C groups of columns, from the sums of pieces."""
    row_ptr, _, number = entry(table_ptr, programs, FIELDS)
    v_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(STATE))
    part = part_ptr + tl.load(row_ptr + 5)
    row_numbers = tl.load(row_ptr + 6).to(tl.pointer_type(tl.int32))
    row_pieces = tl.load(row_ptr + 8)
    row_listed = tl.load(row_ptr + 6) != 0
    col_numbers = tl.load(row_ptr + 11).to(tl.pointer_type(tl.int32))
    col_pieces = tl.load(row_ptr + 13)
    col_groups = tl.load(row_ptr + 14)
    col_listed = tl.load(row_ptr + 11) != 0
    tiles = (col_groups + BLOCK_C - 1) // BLOCK_C
    row_group = number // tiles
    col_group = number % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    known = col_group < col_groups

    # the pieces of a group, and the number of its members; alone: one piece, one member
    row_first_ptr = row_numbers + tl.load(row_ptr + 7) + 2 * row_pieces + row_group
    row_begin = tl.load(row_first_ptr, mask=row_listed, other=0).to(tl.int64)
    row_end = tl.load(row_first_ptr + 1, mask=row_listed, other=0).to(tl.int64)
    row_count_ptr = row_first_ptr + tl.load(row_ptr + 9) + 1
    row_count = tl.load(row_count_ptr, mask=row_listed, other=1).to(tl.int64)
    row_begin = tl.where(row_listed, row_begin, row_group)
    row_end = tl.where(row_listed, row_end, row_group + 1)
    col_first_ptr = col_numbers + tl.load(row_ptr + 12) + 2 * col_pieces + col_group
    listed = known & col_listed
    col_begin = tl.load(col_first_ptr, mask=listed, other=0).to(tl.int64)
    col_end = tl.load(col_first_ptr + 1, mask=listed, other=0).to(tl.int64)
    col_count = tl.load(col_first_ptr + col_groups + 1, mask=listed, other=1).to(tl.int64)
    col_begin = tl.where(known & (col_listed == 0), col_group, col_begin)
    col_end = tl.where(known & (col_listed == 0), col_group + 1, col_end)

    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), STATE)
    for first in range(row_begin, row_end, BLOCK_R):
        row = first + r
        for j in range(tl.max(col_end - col_begin, 0)):
            col = col_begin + j
            inside = (row < row_end)[:, None] & (col < col_end)[None, :]
            place = row[:, None] * col_pieces + col[None, :]
            total += tl.load(part + place, mask=inside, other=0.0)
    mean = divide(tl.sum(total, 0), (row_count * col_count).to(STATE), STATE)
    place = row_group * col_groups + col_group
    v = tl.load(v_ptr + place, mask=known, other=0.0)
    tl.store(v_ptr + place, average(v, mean, hyper_ptr, STATE), mask=known)


@triton.jit(do_not_specialize=["programs", "steps", "seed", "maximize"])
def shared_adam_kernel(
    table_ptr,
    hyper_ptr,
    programs,
    steps,
    seed,
    maximize,
    FIELDS: tl.constexpr,
    W: tl.constexpr,
    STATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The step on ``steps`` blocks of one tensor, v being new already."""
    step_program(
        table_ptr, hyper_ptr, programs, steps, seed, maximize,
        FIELDS, W, STATE, True, STOCHASTIC, BLOCK, VECTOR,
    )  # fmt: skip


# --- configurations -------------------------------------------------------------------------------

#: Rows and columns of a tile of the first pass, and what of a group goes where.
ROWS = Axis(lanes=8, each=16, together=256, large=8)
COLUMNS = Axis(lanes=128, each=32, together=1024, large=48)
WARPS = 4

#: Pieces of rows and groups of columns of a tile of the second pass.
MERGE_ROWS, MERGE_COLUMNS = 32, 32


def tiles(rows: Layout, cols: Layout) -> int:
    """Programs of the first pass on one matrix."""
    result = 1
    for layout, axis in ((rows, ROWS), (cols, COLUMNS)):
        result *= layout.pieces if layout.together else -(-layout.pieces // axis.lanes)
    return result


def merges(rows: Layout, cols: Layout) -> int:
    """Programs of the second pass on one matrix: none where groups are whole."""
    if not (rows.split or cols.split):
        return 0
    return rows.groups * -(-cols.groups // MERGE_COLUMNS)


def in_order(cols: Layout, width: int, addresses: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the columns of a tile are neighbours, and start at multiples of 16 bytes."""
    count = adam.vector(dtype)
    aligned = width % count == 0 and all(x % 16 == 0 for x in addresses)
    single = not cols.together and cols.groups == cols.n and cols.runs
    return aligned and (single or (cols.together and cols.runs and cols.even))


#: Below this many elements in all the launches cost more than the passes over memory.
WORTHWHILE_ELEMENTS = 2**14


def worthwhile(ws: Sequence[Tensor]) -> bool:
    """Whether three launches beat the reference's thirty for each matrix: but for tiny lists."""
    return len(ws) > 1 or sum(w.numel() for w in ws) >= WORTHWHILE_ELEMENTS


# --- launcher -------------------------------------------------------------------------------------


def build_moments(
    gs: Sequence[int],
    vs: Sequence[int],
    rows: Sequence[int],
    cols: Sequence[int],
    row_numbers: Sequence[int],
    col_numbers: Sequence[int],
    row_layouts: Sequence[Layout],
    col_layouts: Sequence[Layout],
    dtype: torch.dtype,
) -> np.ndarray:
    """The table of the first two passes, from addresses and layouts."""
    table, programs, finishing, part = [], [], [], 0
    for k, (a, b) in enumerate(zip(row_layouts, col_layouts, strict=True)):
        split = a.split or b.split
        table.append(
            (
                *(gs[k], rows[k], cols[k], vs[k], b.n, part if split else -1),
                *(row_numbers[k], a.n, a.pieces, a.groups, int(a.together)),
                *(col_numbers[k], b.n, b.pieces, b.groups, int(b.together)),
                int(in_order(b, b.n, (gs[k], cols[k]), dtype)),
            )
        )
        part += a.pieces * b.pieces if split else 0
        programs.append(tiles(a, b))
        finishing.append(merges(a, b))
    return lists.pack(table, programs, finishing)


def build_steps(
    ws: Sequence[int],
    gs: Sequence[int],
    ms: Sequence[int],
    vs: Sequence[int],
    rows: Sequence[int],
    cols: Sequence[int],
    row_groups: Sequence[int],
    col_groups: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    widths: Sequence[int],
    dtype: torch.dtype,
    block: int,
    steps: int,
) -> np.ndarray:
    """The table of the last pass, from addresses and shapes."""
    table = []
    for k, (o, i) in enumerate(shapes):
        # v is as long as a row where columns are not grouped; else it is gathered
        placed = (cols[k], col_groups[k], 0 if col_groups[k] else vs[k])
        table.append(
            (
                *(ws[k], gs[k], ms[k], vs[k], rows[k], cols[k], o * i, max(1, i)),
                adam.flags((ws[k], gs[k], ms[k]), placed, i, dtype),
                *(row_groups[k], col_groups[k], widths[k]),
            )
        )
    return lists.pack(table, [-(-o * i // (block * steps)) for o, i in shapes])


def shared_adam(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    row_groups: Sequence[Tensor | None],
    col_groups: Sequence[Tensor | None],
    hyper: Tensor,
    *,
    maximize: bool = False,
    seed: int = -1,
    config: adam.Config | None = None,
    steps: int | None = None,
) -> None:
    """Take one step in place; arguments as in ``ops.shared_adam``.

    Args:
        config: overrides that of the dtype.
        steps: blocks of a program, by default as many as still fill the device.

    Raises:
        ValueError: an entry of a map is no group.
    """
    sizes = tuple([w.numel() for w in ws])
    filled = [k for k, size in enumerate(sizes) if size]
    if not filled:
        return
    dtype, device, state = ws[0].dtype, hyper.device, vs[0].dtype
    config = config or adam.CONFIGS[dtype]
    if steps is None:
        steps = adam.steps(sizes, config.block, limits(device, interpreter=1)[1])
    down = [grouping(row_groups[k], ws[k].shape[0], vs[k].shape[0], ROWS) for k in filled]
    across = [grouping(col_groups[k], ws[k].shape[1], vs[k].shape[1], COLUMNS) for k in filled]
    row_layouts, col_layouts = tuple(x for x, _ in down), tuple(x for x, _ in across)
    numbers = [[x for _, x in down], [x for _, x in across]]
    if lists.capturing(device):
        lists.keep(*(x for some in numbers for x in some if x is not None))
    pairs = list(zip(row_layouts, col_layouts, strict=True))
    count, finishing = sum(tiles(*p) for p in pairs), sum(merges(*p) for p in pairs)
    split = sum(a.pieces * b.pieces for a, b in pairs if a.split or b.split)
    wide = lists.TYPES[state]
    with torch.cuda.device_of(hyper):
        part = torch.empty(split, dtype=state, device=device) if split else vs[0]
        chosen = ([x[k] for k in filled] for x in (gs, vs, rows, cols))
        table = lists.table(
            build_moments, device,
            *(lists.addresses(x) for x in (*chosen, *numbers)), row_layouts, col_layouts, dtype,
        )  # fmt: skip
        start = len(filled) * FIELDS
        shared_moments_kernel[(count,)](
            table,
            part,
            hyper,
            start,
            FIELDS=FIELDS,
            G=lists.TYPES[dtype],
            STATE=wide,
            BLOCK_R=ROWS.lanes,
            BLOCK_C=COLUMNS.lanes,
            VECTOR=adam.vector(dtype),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        if finishing:
            merge_pieces_kernel[(finishing,)](
                table,
                part,
                hyper,
                start + count,
                FIELDS=FIELDS,
                STATE=wide,
                BLOCK_R=MERGE_ROWS,
                BLOCK_C=MERGE_COLUMNS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        every = (ws, gs, ms, vs, rows, cols, row_groups, col_groups)
        table = lists.table(
            build_steps, device, *(lists.addresses(x) for x in every), lists.shapes(ws),
            tuple(v.shape[1] for v in vs), dtype, config.block, steps,
        )  # fmt: skip
        shared_adam_kernel[(adam.programs(sizes, config.block * steps),)](
            table,
            hyper,
            len(ws) * adam.FIELDS,
            steps,
            adam.signed32(seed),
            int(maximize),
            **adam.constants(dtype, config, seed),
            num_warps=config.warps,
            enable_fp_fusion=False,
        )


# --- ahead-of-time cases --------------------------------------------------------------------------


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    result = adam.cases(shared_adam_kernel, ())
    for dtype in adam.CONFIGS:
        wide = "fp64" if dtype == torch.float64 else "fp32"
        constants = {
            "G": lists.TYPES[dtype],
            "BLOCK_R": ROWS.lanes,
            "BLOCK_C": COLUMNS.lanes,
            "VECTOR": adam.vector(dtype),
        }
        result.append(_case(shared_moments_kernel, NAMES[dtype], wide, "vectors", constants))
    for wide in ("fp32", "fp64"):
        constants = {"BLOCK_R": MERGE_ROWS, "BLOCK_C": MERGE_COLUMNS}
        result.append(_case(merge_pieces_kernel, wide, wide, "sums", constants))
    return result


def _case(kernel: Any, label: str, wide: str, unit: str, constants: dict[str, Any]) -> Case:
    state = {"fp32": tl.float32, "fp64": tl.float64}[wide]
    pointers = {"table_ptr": "*i64", "part_ptr": f"*{wide}", "hyper_ptr": "*fp64"}
    return Case(
        kernel=kernel,
        label=label,
        signature={**pointers, "programs": "i32"},
        constants={"FIELDS": FIELDS, "STATE": state, **constants},
        warps=WARPS,
        stages=3,
        aligned=tuple(pointers),
        unit=unit,
        helpers=(entry, pieces, member, tile_squares, average, divide),
        fusion=False,
    )
