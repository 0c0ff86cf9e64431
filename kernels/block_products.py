"""Squared norms of blocks and their products with the gradient on a GPU, for a list of matrices.

One program takes a piece, some neighbouring rows or columns, and keeps the sums of its tile of
elements in registers until the end; a second launch joins the sums of each block in order, in fp64.
No atomics: the result depends on shapes and blocks alone. Bound by memory: w and g are read once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _blocks as plans
from deaddir_fast.kernels import _lists as lists
from deaddir_fast.kernels._blocks import join_sums, piece_at
from deaddir_fast.kernels._case import NAMES, Case


@triton.jit(do_not_specialize=["first", "lines", "slots"])
def block_products_kernel(
    table_ptr,
    plan_ptr,
    part_ptr,
    first,
    lines,
    slots,
    W: tl.constexpr,
    STATE: tl.constexpr,
    FIELDS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums of the lines of one piece, from the one numbered ``first`` on."""
    row_ptr, _, _, columns, dim, line, count, begin, end, slot = piece_at(
        table_ptr, plan_ptr, lines, first + tl.program_id(0), FIELDS, PIECE
    )
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(W))
    g_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(W))
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    by_row = dim == 0
    step = tl.where(by_row, BLOCK_C, BLOCK_R)
    squares = tl.zeros((BLOCK_R, BLOCK_C), STATE)
    products = tl.zeros((BLOCK_R, BLOCK_C), STATE)
    for along in range(begin, end, step):
        row = tl.where(by_row, line, along)
        column = tl.where(by_row, along, line)
        inside = (r < tl.where(by_row, count, end - along))[:, None] & (
            c < tl.where(by_row, end - along, count)
        )[None, :]
        place = row * columns + column + (r[:, None] * columns + c[None, :])
        w = tl.load(w_ptr + place, mask=inside, other=0.0).to(STATE)
        g = tl.load(g_ptr + place, mask=inside, other=0.0).to(STATE)
        squares += w * w
        products += g * w
    if by_row:
        tl.store(part_ptr + slot + r, tl.sum(squares, 1), mask=r < count)
        tl.store(part_ptr + slots + slot + r, tl.sum(products, 1), mask=r < count)
    else:
        tl.store(part_ptr + slot + c, tl.sum(squares, 0), mask=c < count)
        tl.store(part_ptr + slots + slot + c, tl.sum(products, 0), mask=c < count)


@triton.jit(do_not_specialize=["first", "ranks", "order", "start", "ids", "slots", "count"])
def join_blocks_kernel(
    plan_ptr,
    part_ptr,
    out_ptr,
    first,
    ranks,
    order,
    start,
    ids,
    slots,
    count,
    STATE: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sums of BLOCKS blocks, from the rank ``first`` on; the second dimension of the grid is that
    of what is summed.
    """
    rank = first + tl.program_id(0) * BLOCKS
    what = tl.program_id(1).to(tl.int64)
    join_sums(
        plan_ptr, order, start, ids, part_ptr + what * slots, out_ptr + what * count,
        rank, tl.minimum(rank + BLOCKS, ranks), STATE, BLOCKS, DEPTH,
    )  # fmt: skip


#: Blocks of a program that joins sums, and slots at a time: where blocks have few slots, and many.
JOINS = ((32, 4), (1, 256))

#: Slots of a block, in the mean, from which on they are many.
MANY = 16

WARPS = 4


def join(plan: plans.Plan, part: Tensor, out: Tensor, first: int) -> None:
    """Join the sums of the blocks from the rank ``first`` on: part (n, slots), out (n, count)."""
    ranks = plan.ranks - first
    if ranks == 0:
        return
    _, order, start, ids, _ = plan.offsets
    slots = int(plan.start[-1] - plan.start[first])
    blocks, depth = JOINS[slots >= MANY * ranks]
    join_blocks_kernel[(-(-ranks // blocks), len(part))](
        plan.table(part.device),
        part,
        out,
        first,
        plan.ranks,
        order,
        start,
        ids,
        part.shape[1],
        out.shape[1],
        STATE=lists.TYPES[out.dtype],
        BLOCKS=blocks,
        DEPTH=depth,
        num_warps=WARPS,
    )


#: Below this many elements the launches cost more than the passes over memory.
WORTHWHILE_ELEMENTS = 2**16


def worthwhile(ws: Sequence[Tensor]) -> bool:
    """Whether two launches beat several for each matrix: for many matrices, or large ones."""
    return len(ws) > 2 or sum(w.numel() for w in ws) >= WORTHWHILE_ELEMENTS


# --- launcher -------------------------------------------------------------------------------------


def block_products(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    blocks: Sequence[Tensor],
    dims: Sequence[int],
    out: Tensor,
    *,
    group: int = plans.GROUP,
) -> None:
    """Write the squared norms of blocks and their products with the gradient.

    Args:
        ws, gs, blocks, dims: as in ``ops.block_products``.
        out: (2, count); fp64 for fp64, else fp32.
        group: elements of a piece.
    """
    out.zero_()
    if sum(w.numel() for w in ws) == 0:
        return
    device, dtype = out.device, ws[0].dtype
    plan = plans.plan_of(ws, blocks, dims, out.shape[1], grouped=False, group=group)
    part = torch.empty((2, plan.slots), dtype=out.dtype, device=device)
    addresses = lists.addresses(ws), lists.addresses(gs)
    with torch.cuda.device_of(out):
        table = lists.table(
            plans.build, device, *addresses, *addresses, lists.shapes(ws), tuple(dims)
        )
        _, first, second, end = plan.large
        for (rows, columns), begin, stop in (
            (plans.TILES[0], first, second),
            (plans.TILES[1], second, end),
        ):
            if begin == stop:
                continue
            block_products_kernel[(stop - begin,)](
                table,
                plan.table(device),
                part,
                begin,
                plan.offsets[-1],
                plan.slots,
                W=lists.TYPES[dtype],
                STATE=lists.TYPES[out.dtype],
                FIELDS=plans.FIELDS,
                PIECE=plans.PIECE,
                BLOCK_R=rows,
                BLOCK_C=columns,
                num_warps=WARPS,
            )
        join(plan, part, out, 0)


# --- ahead-of-time cases --------------------------------------------------------------------------


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    result = []
    for dtype, name in NAMES.items():
        total = "fp64" if dtype == torch.float64 else "fp32"
        result += [
            Case(
                kernel=block_products_kernel,
                label=name,
                signature={
                    **dict.fromkeys(("table_ptr", "plan_ptr"), "*i64"),
                    "part_ptr": f"*{total}",
                    **dict.fromkeys(("first", "lines", "slots"), "i32"),
                },
                constants={
                    "W": lists.TYPES[dtype],
                    "STATE": tl.float64 if total == "fp64" else tl.float32,
                    "FIELDS": plans.FIELDS,
                    "PIECE": plans.PIECE,
                    "BLOCK_R": rows,
                    "BLOCK_C": columns,
                },
                warps=WARPS,
                stages=3,
                aligned=("table_ptr", "plan_ptr", "part_ptr"),
                unit="sums",
                helpers=(piece_at,),
            )
            for rows, columns in plans.TILES
        ]
    for total, state in (("fp32", tl.float32), ("fp64", tl.float64)):
        integers = ("first", "ranks", "order", "start", "ids", "slots", "count")
        result += [
            Case(
                kernel=join_blocks_kernel,
                label=total,
                signature={
                    "plan_ptr": "*i64",
                    **dict.fromkeys(("part_ptr", "out_ptr"), f"*{total}"),
                    **dict.fromkeys(integers, "i32"),
                },
                constants={"STATE": state, "BLOCKS": blocks, "DEPTH": depth},
                warps=WARPS,
                stages=3,
                aligned=("plan_ptr", "part_ptr", "out_ptr"),
                unit="sums",
                helpers=(join_sums,),
            )
            for blocks, depth in JOINS
        ]
    return result
