"""(w^T A w)(v^T G v) on a GPU: two quadratic forms, each one pass over its matrix.

One program multiplies a rectangle of the matrix, some rows by a chunk of the columns, with a block
of directions, multiplies the result by the same directions again and sums it to one number for
each direction. Nothing of size (p, i) is stored. Few directions are the usual case, bound by the
bytes of the matrix; then all of them sit in one block and the matrix is read once. Otherwise
programs that share a rectangle follow each other, and the L2 cache serves it, and a copy of the
matrix with aligned rows pays where they are not. The directions are the columns of the product,
because the matrix units take few columns but not few rows.

No atomics: the partial sums of the rectangles are added in a second step, in fp64 and in a fixed
order. The rectangles depend on shapes alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import interpreted
from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels._device import limits
from deaddir_fast.kernels._product import product_dtype, store


@triton.jit
def form_kernel(
    square_ptr,
    rows_ptr,
    out_ptr,
    i,
    p,
    square_row,
    rows_row,
    STORED: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Partial sums of rows square rows^T; square is (i, i), rows (p, i), out (parts, p).

    ``STORED``: square ends in zeros like an operand of a product, as rows always does.
    """
    blocks = (p + BLOCK_P - 1) // BLOCK_P
    chunks = (i + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    part = program // blocks
    direction = (program % blocks) * BLOCK_P
    row = (part // chunks) * BLOCK
    column = (part % chunks) * CHUNK
    rows_end = (i + 15) // 16 * 16  # the compiler sees that it is a multiple of 16
    square_end = rows_end if STORED else i

    r = tl.arange(0, BLOCK)
    q = tl.arange(0, BLOCK_P)
    d = tl.arange(0, DEPTH)
    inside_row = r < i - row
    inside_direction = q < p - direction
    square = square_ptr + row.to(tl.int64) * square_row
    rows = rows_ptr + direction.to(tl.int64) * rows_row
    square_offset = r[:, None] * square_row + d[None, :]
    rows_offset = d[:, None] + q[None, :] * rows_row

    total = tl.zeros((BLOCK, BLOCK_P), TOTAL)
    for start in range(column, min(column + CHUNK, i), DEPTH):
        left = tl.load(
            square + start + square_offset,
            mask=inside_row[:, None] & (d[None, :] < square_end - start),
            other=0.0,
        )
        right = tl.load(
            rows + start + rows_offset,
            mask=(d[:, None] < rows_end - start) & inside_direction[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=TOTAL)

    again = tl.load(
        rows + row + (r[:, None] + q[None, :] * rows_row),
        mask=(r[:, None] < rows_end - row) & inside_direction[None, :],
        other=0.0,
    )
    # beyond the edge an infinite direction has met a zero
    terms = tl.where(inside_row[:, None], total * again.to(TOTAL), 0.0)
    place = out_ptr + part.to(tl.int64) * p + direction
    tl.store(place + q, tl.sum(terms, 0), mask=inside_direction)


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Rows of the matrix and directions of a program, depth of a step, warps, pipeline stages."""

    block: int
    rows: int
    depth: int
    warps: int
    stages: int


#: By the type of the operands, from many directions to few.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: (Config(64, 64, 64, 4, 3), Config(64, 16, 64, 4, 4)),
    torch.float16: (Config(64, 64, 64, 4, 3), Config(64, 16, 64, 4, 4)),
    torch.float32: (Config(64, 64, 16, 4, 2), Config(64, 16, 32, 4, 3)),
    torch.float64: (Config(64, 64, 16, 8, 3), Config(64, 16, 16, 4, 3)),
}

#: Up to this many directions a copy of the matrix would cost more than unaligned loads.
FEW = 16

#: Columns of the matrix that one program takes: with few rows of tiles this fills the device.
CHUNK = 512


def shared_bytes(config: Config, dtype: torch.dtype) -> int:
    """Shared memory of the pipeline, or of a change of layout in the epilogue, in bytes."""
    slabs = config.stages * (config.block + config.rows) * config.depth * dtype.itemsize
    return max(slabs, config.block * config.rows * max(4, dtype.itemsize))


def parts(i: int, block: int) -> int:
    """Return the number of rectangles of an (i, i) matrix."""
    return -(-i // block) * -(-i // CHUNK)


def prune(configs: Sequence[Config], dtype: torch.dtype, shared_limit: int) -> list[Config]:
    """Keep the configurations that fit in a block's shared memory."""
    return [c for c in configs if shared_bytes(c, dtype) <= shared_limit]


def choose(configs: Sequence[Config], dtype: torch.dtype, p: int, shared_limit: int) -> Config:
    """Pick the fewest directions a program that still take all p at once, or the most there are."""
    fitting = prune(configs, dtype, shared_limit)
    if not fitting:
        raise ValueError(f"no configuration fits in {shared_limit} bytes of shared memory")
    enough = [c for c in fitting if c.rows >= p]
    return min(enough, key=lambda c: c.rows) if enough else max(fitting, key=lambda c: c.rows)


#: Below this many entries in the larger factor, launching costs as much as reading.
WORTHWHILE_ENTRIES = 2048**2


def worthwhile(A: Tensor, G: Tensor, v: Tensor, w: Tensor) -> bool:
    """Whether the kernel beats the reference: it saves the fp32 copy of large 16-bit factors."""
    narrow = A.dtype.itemsize == 2 and A.dtype == G.dtype == v.dtype == w.dtype
    return narrow and len(v) > 0 and max(A.numel(), G.numel()) >= WORTHWHILE_ENTRIES


# --- launcher -------------------------------------------------------------------------------------


def kron_quadratic_rank1(
    A: Tensor,
    G: Tensor,
    v: Tensor,
    w: Tensor,
    total: torch.dtype,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    widen: bool | None = None,
) -> Tensor:
    """Return (w^T A w)(v^T G v), each factor clamped at 0.

    Args:
        A: (i, i).
        G: (o, o).
        v: (p, o).
        w: (p, i).
        total: fp32, or fp64 if any input is: the type of sums and result.
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        config: overrides `choose`.
        widen: see `product_dtype`.
    """
    options = {"precision": precision, "config": config, "widen": widen}
    return (_form(A, w, total, **options) * _form(G, v, total, **options)).to(total)


def _form(
    square: Tensor,
    rows: Tensor,
    total: torch.dtype,
    *,
    precision: str,
    config: Config | None,
    widen: bool | None,
) -> Tensor:
    """Return (p,) rows square rows^T in fp64, clamped at 0."""
    p, i = rows.shape
    if p == 0 or i == 0:
        return rows.new_zeros(p, dtype=torch.float64)
    dtype = product_dtype(total, square, rows, widen=widen)
    if config is None:
        config = choose(CONFIGS[dtype], dtype, p, limits(square.device)[0])
    rows, square = store(rows, dtype), square.to(dtype)
    few = config.rows <= FEW
    if not few:
        square = store(square, dtype)
    elif square.stride(1) != 1:
        square = square.contiguous()
    out = torch.empty((parts(i, config.block), p), dtype=total, device=rows.device)
    with torch.cuda.device_of(square):
        form_kernel[(len(out) * -(-p // config.rows),)](
            square,
            rows,
            out,
            i,
            p,
            square.stride(0),
            rows.stride(0),
            STORED=not few,
            TOTAL=tl.float64 if total == torch.float64 else tl.float32,
            PRECISION="ieee" if interpreted() and precision.startswith("bf16") else precision,
            BLOCK=config.block,
            BLOCK_P=config.rows,
            DEPTH=config.depth,
            CHUNK=CHUNK,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out.sum(0, dtype=torch.float64).clamp(min=0)


# --- ahead-of-time cases --------------------------------------------------------------------------


def _case(dtype: torch.dtype, config: Config, *, odd: bool) -> Case:
    name = NAMES[dtype]
    total = "fp64" if dtype == torch.float64 else "fp32"
    few = config.rows <= FEW
    constants: dict[str, Any] = {
        "STORED": not few,
        "TOTAL": tl.float64 if total == "fp64" else tl.float32,
        "PRECISION": "ieee",
        "BLOCK": config.block,
        "BLOCK_P": config.rows,
        "DEPTH": config.depth,
        "CHUNK": CHUNK,
    }
    signature = {
        "square_ptr": f"*{name}",
        "rows_ptr": f"*{name}",
        "out_ptr": f"*{total}",
        **dict.fromkeys(("i", "p", "square_row", "rows_row"), "i32"),
    }
    unaligned = {"i", "p"} if odd else {"p"}
    if odd and few:
        unaligned |= {"square_row"}
    return Case(
        kernel=form_kernel,
        label=name + " odd" * odd,
        signature=signature,
        constants=constants,
        warps=config.warps,
        stages=config.stages,
        aligned=tuple(x for x in signature if x not in unaligned),
        unit=name,
        shared_bound=shared_bytes(config, dtype),
    )


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    return [
        _case(dtype, config, odd=odd)
        for dtype, configs in CONFIGS.items()
        for config in configs
        for odd in (False, True)
    ]
