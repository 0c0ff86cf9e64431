"""The tangential Adam step of blocks on a GPU, for a list of matrices.

The products <u, w0> of a block with its direction are needed before any of it moves. A group of
small blocks is one program's: it updates the moments, joins the sums of its blocks, and passes
over its elements again while they are in the L2 cache, so that memory sees w, m, v read and written
and g read once. Large blocks take three launches (moments, sums, new weights), the last of which
reads w, m, v again and forms the direction anew.

No atomics: the result depends on values, shapes and blocks alone. The arithmetic is that of the
reference operation by operation, see `_adam`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _adam as adam
from deaddir_fast.kernels import _blocks as plans
from deaddir_fast.kernels import _lists as lists
from deaddir_fast.kernels._adam import divide, hashed, root, scalars, stream_key
from deaddir_fast.kernels._blocks import join_sums, piece_at
from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels.block_products import WORTHWHILE_ELEMENTS, join


@triton.jit
def rounded_at(value, key, place):
    """Round fp32 stochastically to bf16, by the offsets of the elements in their matrix."""
    pair = place >> 1
    mixed = hashed(key ^ pair.to(tl.uint32) ^ hashed((pair >> 32).to(tl.uint32)))
    noise = tl.where((place & 1) == 0, mixed & 0xFFFF, mixed >> 16)
    pattern = value.to(tl.uint32, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    cut = ((pattern + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(finite, cut, value).to(tl.bfloat16)


@triton.jit
def tangent_of(block_ptr, lane, known, norms_ptr, inner_ptr, STATE: tl.constexpr):
    """rho and q / rho^2 of the blocks of some lines; 1 and 0 outside of the chart and the piece."""
    block = tl.load(block_ptr + lane, mask=known, other=0)
    rho = tl.load(norms_ptr + block, mask=known, other=0.0)
    q = tl.load(inner_ptr + block, mask=known, other=0.0)
    inside = rho > 0
    rho = tl.where(inside, rho, 1.0)
    return rho, tl.where(inside, divide(q, rho * rho, STATE), 0.0)


@triton.jit
def move_of(
    block_ptr, lane, known, norms_ptr, radial_ptr, reach_ptr, overlap_ptr, STATE: tl.constexpr
):
    """<u, w0> / rho^2, exp(radial) and reach of the blocks of some lines; 0, 1, 1 elsewhere."""
    block = tl.load(block_ptr + lane, mask=known, other=0)
    rho = tl.load(norms_ptr + block, mask=known, other=0.0)
    overlap = tl.load(overlap_ptr + block, mask=known, other=0.0)
    radial = tl.load(radial_ptr + block, mask=known, other=0.0)
    reach = tl.load(reach_ptr + block, mask=known, other=0.0)
    inside = rho > 0
    rho = tl.where(inside, rho, 1.0)
    back = tl.where(inside, divide(overlap, rho * rho, STATE), 0.0)
    grow = tl.exp(tl.where(inside, radial, 0.0).to(tl.float64)).to(STATE)
    return back, grow, tl.where(inside, reach, 1.0)


@triton.jit
def moments_piece(
    table_ptr, plan_ptr, lines, piece, norms_ptr, inner_ptr, hyper_ptr, part_ptr, maximize,
    W: tl.constexpr, STATE: tl.constexpr, FIELDS: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Update the moments of a piece; store the sums of u w0 of its lines."""
    _, eps, keep, rise1, rise2, fall2, scale1, root2 = scalars(hyper_ptr, STATE)
    row_ptr, block_ptr, _, columns, dim, line, count, begin, end, slot = piece_at(
        table_ptr, plan_ptr, lines, piece, FIELDS, PIECE
    )
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(W))
    g_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(W))
    m_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(STATE))
    v_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(STATE))
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    by_row = dim == 0
    # the lines are rows or columns: of the other dimension come ones and zeros
    rho_r, along_r = tangent_of(block_ptr, r, by_row & (r < count), norms_ptr, inner_ptr, STATE)
    rho_c, along_c = tangent_of(block_ptr, c, (dim == 1) & (c < count), norms_ptr, inner_ptr, STATE)
    rho = rho_r[:, None] * rho_c[None, :]
    towards = along_r[:, None] + along_c[None, :]
    step = tl.where(by_row, BLOCK_C, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), STATE)
    for along in range(begin, end, step):
        row = tl.where(by_row, line, along)
        column = tl.where(by_row, along, line)
        inside = (r < tl.where(by_row, count, end - along))[:, None] & (
            c < tl.where(by_row, end - along, count)
        )[None, :]
        place = row * columns + column + (r[:, None] * columns + c[None, :])
        w0 = keep * tl.load(w_ptr + place, mask=inside, other=0.0).to(STATE)
        g = tl.load(g_ptr + place, mask=inside, other=0.0).to(STATE)
        m = tl.load(m_ptr + place, mask=inside, other=0.0)
        v = tl.load(v_ptr + place, mask=inside, other=0.0)
        g = tl.where(maximize != 0, -g, g)
        g = rho * (g - towards * w0)
        m = m + rise1 * (g - m)
        v = fall2 * v + rise2 * g * g
        tl.store(m_ptr + place, m, mask=inside)
        tl.store(v_ptr + place, v, mask=inside)
        u = divide(m * scale1, divide(root(v, STATE), root2, STATE) + eps, STATE)
        total += tl.where(inside, u * w0, 0.0)  # beyond the edge 0 / 0 where eps is 0
    if by_row:
        tl.store(part_ptr + slot + r, tl.sum(total, 1), mask=r < count)
    else:
        tl.store(part_ptr + slot + c, tl.sum(total, 0), mask=c < count)


@triton.jit
def apply_piece(
    table_ptr, plan_ptr, lines, piece, norms_ptr, radial_ptr, reach_ptr, overlap_ptr, hyper_ptr,
    seed,
    W: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr, FIELDS: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the new weights of a piece whose moments are up to date."""
    lr, eps, keep, _, _, _, scale1, root2 = scalars(hyper_ptr, STATE)
    row_ptr, block_ptr, matrix, columns, dim, line, count, begin, end, _ = piece_at(
        table_ptr, plan_ptr, lines, piece, FIELDS, PIECE
    )
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(W))
    m_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(STATE))
    v_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(STATE))
    key = 0
    if STOCHASTIC:
        key = stream_key(seed, hyper_ptr, matrix)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    by_row = dim == 0
    back_r, grow_r, reach_r = move_of(
        block_ptr, r, by_row & (r < count), norms_ptr, radial_ptr, reach_ptr, overlap_ptr, STATE
    )
    back_c, grow_c, reach_c = move_of(
        block_ptr, c, (dim == 1) & (c < count), norms_ptr, radial_ptr, reach_ptr, overlap_ptr, STATE
    )
    back = back_r[:, None] + back_c[None, :]
    grow = grow_r[:, None] * grow_c[None, :]
    length = lr * (reach_r[:, None] * reach_c[None, :])
    step = tl.where(by_row, BLOCK_C, BLOCK_R)
    for along in range(begin, end, step):
        row = tl.where(by_row, line, along)
        column = tl.where(by_row, along, line)
        inside = (r < tl.where(by_row, count, end - along))[:, None] & (
            c < tl.where(by_row, end - along, count)
        )[None, :]
        place = row * columns + column + (r[:, None] * columns + c[None, :])
        w0 = keep * tl.load(w_ptr + place, mask=inside, other=0.0).to(STATE)
        m = tl.load(m_ptr + place, mask=inside, other=0.0)
        v = tl.load(v_ptr + place, mask=inside, other=0.0)
        u = divide(m * scale1, divide(root(v, STATE), root2, STATE) + eps, STATE)
        new = grow * w0 - length * (u - back * w0)
        if STOCHASTIC:
            tl.store(w_ptr + place, rounded_at(new, key, place), mask=inside)
        else:
            tl.store(w_ptr + place, new.to(W), mask=inside)


@triton.jit(
    do_not_specialize=["first", "groups", "order", "start", "ids", "lines", "maximize", "seed"]
)
def block_adam_kernel(
    table_ptr, plan_ptr, norms_ptr, inner_ptr, radial_ptr, reach_ptr, hyper_ptr, part_ptr,
    overlap_ptr, first, groups, order, start, ids, lines, maximize, seed,
    W: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr, FIELDS: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The whole step of one group of blocks; the table of the groups starts at ``groups``."""
    at = plan_ptr + groups + (first + tl.program_id(0)) * 4
    begin = tl.load(at)
    end = tl.load(at + 1)
    for piece in range(begin, end):
        moments_piece(
            table_ptr, plan_ptr, lines, piece, norms_ptr, inner_ptr, hyper_ptr, part_ptr, maximize,
            W, STATE, FIELDS, PIECE, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    tl.debug_barrier()  # what one thread wrote, others read
    join_sums(
        plan_ptr, order, start, ids, part_ptr, overlap_ptr, tl.load(at + 2), tl.load(at + 3),
        STATE, BLOCKS, 4,
    )  # fmt: skip
    tl.debug_barrier()
    for piece in range(begin, end):
        apply_piece(
            table_ptr, plan_ptr, lines, piece, norms_ptr, radial_ptr, reach_ptr, overlap_ptr,
            hyper_ptr, seed, W, STATE, STOCHASTIC, FIELDS, PIECE, BLOCK_R, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "lines", "maximize"])
def moments_kernel(
    table_ptr, plan_ptr, norms_ptr, inner_ptr, hyper_ptr, part_ptr, first, lines, maximize,
    W: tl.constexpr, STATE: tl.constexpr, FIELDS: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The moments of one piece of large blocks."""
    moments_piece(
        table_ptr, plan_ptr, lines, first + tl.program_id(0), norms_ptr, inner_ptr, hyper_ptr,
        part_ptr, maximize, W, STATE, FIELDS, PIECE, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "lines", "seed"])
def apply_kernel(
    table_ptr, plan_ptr, norms_ptr, radial_ptr, reach_ptr, overlap_ptr, hyper_ptr, first, lines,
    seed,
    W: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr, FIELDS: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The new weights of one piece of large blocks."""
    apply_piece(
        table_ptr, plan_ptr, lines, first + tl.program_id(0), norms_ptr, radial_ptr, reach_ptr,
        overlap_ptr, hyper_ptr, seed, W, STATE, STOCHASTIC, FIELDS, PIECE, BLOCK_R, BLOCK_C,
    )  # fmt: skip


#: With fewer the tiles do not fit in the registers.
WARPS = 8


def worthwhile(ws: Sequence[Tensor]) -> bool:
    """Whether a few launches beat a dozen for each matrix: for several matrices, or large ones."""
    return len(ws) > 1 or sum(w.numel() for w in ws) >= WORTHWHILE_ELEMENTS


# --- launcher -------------------------------------------------------------------------------------


def constants(dtype: torch.dtype, tile: tuple[int, int]) -> dict[str, Any]:
    """What all of the kernels are compiled for."""
    return {
        "W": lists.TYPES[dtype],
        "STATE": tl.float64 if dtype == torch.float64 else tl.float32,
        "FIELDS": plans.FIELDS,
        "PIECE": plans.PIECE,
        "BLOCK_R": tile[0],
        "BLOCK_C": tile[1],
    }


def block_adam(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    blocks: Sequence[Tensor],
    dims: Sequence[int],
    norms: Tensor,
    inner: Tensor,
    radial: Tensor,
    reach: Tensor,
    hyper: Tensor,
    *,
    maximize: bool = False,
    seed: int = -1,
    group: int = plans.GROUP,
) -> None:
    """Take one step in place; arguments as in ``ops.block_adam``.

    Args:
        group: elements of a group of small blocks, and of a piece of a large one.
    """
    if sum(w.numel() for w in ws) == 0:
        return
    device, dtype = hyper.device, ws[0].dtype
    plan = plans.plan_of(ws, blocks, dims, len(norms), grouped=True, group=group)
    part = torch.empty((1, plan.slots), dtype=norms.dtype, device=device)
    overlap = torch.empty((1, len(norms)), dtype=norms.dtype, device=device)
    stochastic = seed >= 0 and dtype == torch.bfloat16
    groups, order, start, ids, lines = plan.offsets
    every = [lists.addresses(x) for x in (ws, gs, ms, vs)]
    launch = {"num_warps": WARPS, "enable_fp_fusion": False}
    bits, sign = adam.signed32(seed), int(maximize)
    with torch.cuda.device_of(hyper):
        table = lists.table(plans.build, device, *every, lists.shapes(ws), tuple(dims))
        plan_table = plan.table(device)
        second, end = plan.kinds
        for tile, begin, stop in ((0, 0, second), (1, second, end)):
            if begin == stop:
                continue
            block_adam_kernel[(stop - begin,)](
                table, plan_table, norms, inner, radial, reach, hyper, part, overlap, begin,
                groups, order, start, ids, lines, sign, bits,
                STOCHASTIC=stochastic, BLOCKS=plans.GROUP_BLOCKS,
                **constants(dtype, plans.TILES[tile]), **launch,
            )  # fmt: skip
        rank, first, second, end = plan.large
        large = [(t, b, s) for t, b, s in ((0, first, second), (1, second, end)) if b != s]
        for tile, begin, stop in large:
            moments_kernel[(stop - begin,)](
                table, plan_table, norms, inner, hyper, part, begin, lines, sign,
                **constants(dtype, plans.TILES[tile]), **launch,
            )  # fmt: skip
        join(plan, part, overlap, rank)
        for tile, begin, stop in large:
            apply_kernel[(stop - begin,)](
                table, plan_table, norms, radial, reach, overlap, hyper, begin, lines, bits,
                STOCHASTIC=stochastic, **constants(dtype, plans.TILES[tile]), **launch,
            )  # fmt: skip


# --- ahead-of-time cases --------------------------------------------------------------------------

_COMMON = (divide, hashed, root, scalars, stream_key, piece_at)

#: The kernels, the functions that they call, and whether they write parameters.
_KERNELS = (
    (
        block_adam_kernel,
        (*_COMMON, rounded_at, tangent_of, move_of, moments_piece, apply_piece, join_sums),
        True,
    ),
    (moments_kernel, (*_COMMON, tangent_of, moments_piece), False),
    (apply_kernel, (*_COMMON, rounded_at, move_of, apply_piece), True),
)


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    result = []
    for kernel, helpers, writes in _KERNELS:
        for dtype, name in NAMES.items():
            total = "fp64" if dtype == torch.float64 else "fp32"
            pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
            signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(
                pointers, f"*{total}"
            )
            signature |= dict.fromkeys(("table_ptr", "plan_ptr"), "*i64") | {"hyper_ptr": "*fp64"}
            both = (False, True) if writes and dtype == torch.bfloat16 else (False,)
            for stochastic in both:
                for tile in plans.TILES:
                    given = constants(dtype, tile)
                    if writes:
                        given["STOCHASTIC"] = stochastic
                    if "BLOCKS" in kernel.arg_names:
                        given["BLOCKS"] = plans.GROUP_BLOCKS
                    result.append(
                        Case(
                            kernel=kernel,
                            label=name + " stochastic" * stochastic,
                            signature=signature,
                            constants=given,
                            warps=WARPS,
                            stages=3,
                            aligned=tuple(pointers),
                            unit="sums",
                            helpers=helpers,
                            fusion=False,
                        )
                    )
    return result
