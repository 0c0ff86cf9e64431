"""Batched matrix product on a GPU, with what follows it fused into the epilogue.

The Kronecker operations are pairs of products (U A, then G times that), so one kernel serves them
all: out[b] = left[b] right[b] for (b, m, k) and (b, k, n), any strides, a batch stride of 0 where a
factor is shared. One program computes one tile. The epilogue stores it, divides it by another tile,
or reduces it to one number (against another tile, or squared), so that a quadratic form never
writes its second product. Tiles are counted along a one-dimensional grid in groups of rows that
share operands in the L2 cache. No atomics: the sums of the tiles are added in a second step, in
fp64 and in a fixed order. Addresses of tiles are 64-bit, offsets inside a tile 32-bit.

A product runs in one type: 16-bit on the matrix units with fp32 sums, fp32 in "ieee" unless told
otherwise, fp64. Operands of different types are widened by the launcher, not in the kernel (see
`deaddir_fast.kernels.gram` for why).

An fp32 matrix still meets the matrix units if the other operand is bf16: it is the exact sum of
three bf16 matrices (24 bits of significand are three times 8), so the product is three products of
bf16, summed in fp32. The pieces are written by the product that made the matrix and lie one after
the other; the loop over the depth runs through all of them.

Source: grouped tile order from the Triton matrix multiplication tutorial; reduction in the epilogue
as in QuACK; exact splitting of operands is Ozaki et al. 2012, with bf16 as in Henry et al. 2019;
their use here is our choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import interpreted
from deaddir_fast.kernels._case import Case


@triton.jit
def truncate(x):
    """The leading 8 bits of the significand of a finite fp32 number: exact in bf16."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def product_kernel(
    left_ptr,
    right_ptr,
    other_ptr,
    out_ptr,
    m,
    n,
    k,
    left_batch,
    left_row,
    left_depth,
    right_piece,
    right_batch,
    right_depth,
    right_column,
    other_batch,
    other_row,
    out_piece,
    out_batch,
    out_row,
    PIECES: tl.constexpr,
    OUT_PIECES: tl.constexpr,
    START: tl.constexpr,
    EPILOGUE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of left right.

    ``START`` says from where on the operands are not zero along the depth: "zero" (everywhere),
    "row" (left[r, d] = 0 for d < r) or "column" (right[d, c] = 0 for d < c). ``EPILOGUE`` is
    "store", "divide" (by other), "dot" (sum of the tile times other) or "square" (sum of squares);
    the sums go to out[b, tile]. Other and out have unit column stride.
    """
    row_tiles = tl.cdiv(m, BLOCK)
    column_tiles = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    batch = (program // (row_tiles * column_tiles)).to(tl.int64)
    tile = program % (row_tiles * column_tiles)
    group = tile // (GROUP * column_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    place = tile - group * GROUP * column_tiles
    row = (group * GROUP + place % height) * BLOCK
    column = (place // height) * BLOCK
    first_row = row.to(tl.int64)
    first_column = column.to(tl.int64)

    r = tl.arange(0, BLOCK)
    d = tl.arange(0, DEPTH)
    inside_row = r < m - row
    inside_column = r < n - column
    left_tile = left_ptr + (batch * left_batch + first_row * left_row)
    right_tile = right_ptr + (batch * right_batch + first_column * right_column)
    left_offset = r[:, None] * left_row + d[None, :] * left_depth
    right_offset = d[:, None] * right_depth + r[None, :] * right_column

    first = 0
    if START == "row":
        first = row
    if START == "column":
        first = column
    steps = tl.cdiv(k - first, DEPTH)
    total = tl.zeros((BLOCK, BLOCK), TOTAL)
    for step in range(0, PIECES * steps):
        if PIECES == 1:
            start = first + step * DEPTH
            here = right_tile
        else:  # the smallest piece first
            piece = PIECES - 1 - step // steps
            start = first + (step % steps) * DEPTH
            here = right_tile + tl.cast(piece, tl.int64) * right_piece
        live = d < k - start
        left = tl.load(
            left_tile + tl.cast(start, tl.int64) * left_depth + left_offset,
            mask=inside_row[:, None] & live[None, :],
            other=0.0,
        )
        right = tl.load(
            here + tl.cast(start, tl.int64) * right_depth + right_offset,
            mask=live[:, None] & inside_column[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=TOTAL)

    inside = inside_row[:, None] & inside_column[None, :]
    if EPILOGUE == "dot" or EPILOGUE == "divide":
        other_tile = other_ptr + (batch * other_batch + first_row * other_row + first_column)
        other_offset = r[:, None] * other_row + r[None, :]
        other = tl.load(other_tile + other_offset, mask=inside, other=1.0)
    if EPILOGUE == "dot" or EPILOGUE == "square":
        if EPILOGUE == "dot":
            terms = total * other
        else:
            terms = total * total
        # beyond the edge an infinite operand has met a zero
        terms = tl.where(inside, terms, 0.0)
        # over the whole tile at once: Triton 3.7 fails on sm_100 at one axis after the other
        tl.store(out_ptr + batch * out_batch + tile, tl.sum(terms))
    else:
        if EPILOGUE == "divide":
            total = total / other
        entry = out_ptr + (batch * out_batch + first_row * out_row + first_column)
        entry += r[:, None] * out_row + r[None, :]
        if OUT_PIECES == 1:
            tl.store(entry, total.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            for piece in tl.static_range(OUT_PIECES):
                finite = tl.abs(total) < float("inf")
                head = tl.where(finite, truncate(total), total)
                place = entry + tl.cast(out_piece, tl.int64) * piece
                tl.store(place, head.to(out_ptr.dtype.element_ty), mask=inside)
                total = tl.where(finite, total - head, 0.0)


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of the output (block x block), depth of a step, warps, pipeline stages."""

    block: int
    depth: int
    warps: int
    stages: int


#: By the type of the operands, from the largest tile to the smallest.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: (Config(128, 64, 8, 3), Config(64, 64, 8, 3)),
    torch.float16: (Config(128, 64, 8, 3), Config(64, 64, 8, 3)),
    torch.float32: (Config(128, 16, 8, 3), Config(64, 32, 8, 3)),
    torch.float64: (Config(64, 16, 8, 3), Config(32, 16, 4, 3)),
}

#: Rows of tiles that walk through the columns together.
GROUP = 8

#: bf16 numbers whose sum is an fp32 number.
PIECES = 3


def shared_bytes(config: Config, dtype: torch.dtype) -> int:
    """Shared memory of the pipeline, or of a change of layout in the epilogue, in bytes."""
    slabs = config.stages * 2 * config.block * config.depth * dtype.itemsize
    return max(slabs, config.block**2 * max(4, dtype.itemsize))


def tiles(m: int, n: int, block: int) -> int:
    """Return the number of tiles of one (m, n) product."""
    return -(-m // block) * -(-n // block)


def prune(configs: Sequence[Config], dtype: torch.dtype, shared_limit: int) -> list[Config]:
    """Keep the configurations that fit in a block's shared memory."""
    return [c for c in configs if shared_bytes(c, dtype) <= shared_limit]


def choose(
    configs: Sequence[Config],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    shared_limit: int,
    processors: int,
) -> Config:
    """Pick the largest tile that gives each multiprocessor one of (b, m, n), else the smallest."""
    fitting = prune(configs, dtype, shared_limit)
    if not fitting:
        raise ValueError(f"no configuration fits in {shared_limit} bytes of shared memory")
    b, m, n = shape
    for config in fitting:
        if b * tiles(m, n, config.block) >= processors:
            return config
    return min(fitting, key=lambda c: c.block)


def device_limits(device: torch.device) -> tuple[int, int]:
    """Shared memory of a block in bytes, and multiprocessors."""
    if device.type != "cuda":  # the interpreter, where small tiles are fast
        return 64 * 1024, 2**31
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return shared or properties.shared_memory_per_block, properties.multi_processor_count


# --- launchers ------------------------------------------------------------------------------------


def product_dtype(total: torch.dtype, *operands: Tensor, widen: bool | None = None) -> torch.dtype:
    """Return the type in which operands are multiplied: 16-bit if all are of one such type.

    ``widen`` takes fp32 instead; by default for bf16 in the interpreter, which multiplies the bit
    patterns of bf16 as integers.
    """
    dtype = operands[0].dtype
    if widen is None:
        widen = interpreted() and dtype == torch.bfloat16
    narrow = dtype.itemsize == 2 and all(x.dtype == dtype for x in operands)
    return dtype if total == torch.float32 and narrow and not widen else total


#: Offsets inside a tile are 32-bit: the largest block or depth, times a stride, has to fit.
_STRIDE_LIMIT = 2**31 // 256


def dense(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy where neither rows nor columns have unit stride."""
    strides = x.stride()[-2:]
    return x if 1 in strides and max(strides) < _STRIDE_LIMIT else x.contiguous()


def product(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    divisor: Tensor | None = None,
    start: str = "zero",
    precision: str = "ieee",
    config: Config | None = None,
) -> None:
    """Set out to left right, or to (left right) / divisor.

    Args:
        out: (b, m, n), or (3, b, m, n) in bf16 for the pieces of the result; unit column stride.
        left: (b, m, k), fp16, bf16, fp32 or fp64; expanded where it is shared.
        right: (b, k, n) of the same type, or pieces (3, b, k, n).
        divisor: (m, n).
        start: where the depth starts: "zero", "row" or "column" of the tile.
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        config: overrides `choose`.
    """
    if out.numel() == 0:
        return
    config = config or _config(left, right)
    epilogue = "store" if divisor is None else "divide"
    _launch(out, left, right, divisor, epilogue, start, precision, config)


def product_sum(
    left: Tensor,
    right: Tensor,
    other: Tensor | None,
    *,
    start: str = "zero",
    precision: str = "ieee",
    config: Config | None = None,
) -> Tensor:
    """Return sum_mn (left right) other, or the sum of squares of left right without other.

    Args:
        left, right, start, precision, config: as for `product`.
        other: (b, m, n) with unit column stride, in the type of the sums.

    Returns:
        (b,) in fp64, each tile summed in the type of the sums.
    """
    config = config or _config(left, right)
    b, m = left.shape[:2]
    total = torch.float64 if left.dtype == torch.float64 else torch.float32
    parts = torch.empty(
        (b, tiles(m, right.shape[-1], config.block)), dtype=total, device=left.device
    )
    epilogue = "square" if other is None else "dot"
    _launch(parts, left, right, other, epilogue, start, precision, config)
    return parts.sum(1, dtype=torch.float64)


def _config(left: Tensor, right: Tensor) -> Config:
    b, m = left.shape[:2]
    configs, limits = CONFIGS[left.dtype], device_limits(left.device)
    return choose(configs, left.dtype, (b, m, right.shape[-1]), *limits)


def _launch(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    other: Tensor | None,
    epilogue: str,
    start: str,
    precision: str,
    config: Config,
) -> None:
    b, m, k = left.shape
    pieces = right.shape[0] if right.ndim == 4 else 1
    n = right.shape[-1]
    stored = epilogue in ("store", "divide")
    with torch.cuda.device_of(left):
        product_kernel[(b * tiles(m, n, config.block),)](
            left,
            right,
            left if other is None else other,
            out,
            m,
            n,
            k,
            *left.stride(),
            right.stride(0) if pieces > 1 else 0,
            *right.stride()[-3:],
            other.stride(0) if other is not None and other.ndim == 3 else 0,
            0 if other is None else other.stride(-2),
            out.stride(0) if out.ndim == 4 else 0,
            out.stride(-3) if stored else out.stride(0),
            out.stride(-2) if stored else 0,
            PIECES=pieces,
            OUT_PIECES=out.shape[0] if out.ndim == 4 else 1,
            START=start,
            EPILOGUE=epilogue,
            TOTAL=tl.float64 if left.dtype == torch.float64 else tl.float32,
            PRECISION="ieee" if interpreted() and precision.startswith("bf16") else precision,
            BLOCK=config.block,
            DEPTH=config.depth,
            GROUP=GROUP,
            num_warps=config.warps,
            num_stages=config.stages,
        )


# --- ahead-of-time cases --------------------------------------------------------------------------

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def cases(
    dtype: torch.dtype,
    label: str,
    *,
    epilogue: str = "store",
    out: torch.dtype | None = None,
    start: str = "zero",
    pieces: int = 1,
    out_pieces: int = 1,
    left_transposed: bool = False,
    right_transposed: bool = False,
) -> list[Case]:
    """List one compilation per configuration of a variant with operands of type ``dtype``."""
    name = NAMES[dtype]
    total = "fp64" if dtype == torch.float64 else "fp32"
    integers = ("m", "n", "k", "left_batch", "left_row", "left_depth", "right_piece")
    integers += ("right_batch", "right_depth", "right_column", "other_batch", "other_row")
    integers += ("out_piece", "out_batch", "out_row")
    signature = {
        "left_ptr": f"*{name}",
        "right_ptr": f"*{name}",
        "other_ptr": f"*{total}" if epilogue in ("dot", "divide") else f"*{name}",
        "out_ptr": f"*{total if out is None else NAMES[out]}",
        **dict.fromkeys(integers, "i32"),
    }
    found = []
    for config in CONFIGS[dtype]:
        constants: dict[str, Any] = {
            # a launch compiles a stride of 1 into the code
            ("left_row" if left_transposed else "left_depth"): 1,
            ("right_depth" if right_transposed else "right_column"): 1,
            "PIECES": pieces,
            "OUT_PIECES": out_pieces,
            "START": start,
            "EPILOGUE": epilogue,
            "TOTAL": tl.float64 if total == "fp64" else tl.float32,
            "PRECISION": "ieee",
            "BLOCK": config.block,
            "DEPTH": config.depth,
            "GROUP": GROUP,
        }
        case = Case(
            kernel=product_kernel,
            helpers=(truncate,),
            label=f"{name} {label}",
            signature=signature,
            constants=constants,
            warps=config.warps,
            stages=config.stages,
            aligned=tuple(n for n in signature if n not in constants),
            unit=name,
            shared_bound=shared_bytes(config, dtype),
        )
        found.append(case)
    return found
