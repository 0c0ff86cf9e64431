"""Gram matrix on a GPU: out = beta out + alpha x^T diag(weight) x, square or packed.

One program computes one square tile of the lower triangle, counted along a one-dimensional grid,
and stores it twice: as it is and mirrored. Each element is stored by one program, so the result is
symmetric to the last bit and the same on every run. Both operands are slabs of rows of x, no
transposed copy is made. Addresses are 64-bit.

16-bit inputs go to the matrix units as they are and are summed in fp32. With a weight the launcher
widens them first: weight * x has more digits than the input type holds. (Widening inside the kernel
would be cheaper, but on sm_100 Triton 3.7 takes "ieee" products of fp32 operands that were loaded
as 16-bit in tf32, although the weighted operand no longer fits; `deaddir_fast.kernels.aot` refuses
such code.)
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


@triton.jit
def triangle(t):
    """Row and column of entry ``t`` (int64) of a lower triangle counted row by row."""
    row = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    # A grid has fewer than 2^31 tiles; there the fp32 root is off by less than one row (up to
    # 2^22 rows), and integers settle it.
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    return row, t - row * (row + 1) // 2


@triton.jit
def gram_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    n,
    i,
    x_stride,
    out_stride,
    alpha: tl.float64,
    beta: tl.float64,
    WEIGHTED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PACKED: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile; x is (n, i) with row stride x_stride, out (i, i) with out_stride, or packed."""
    row_tile, column_tile = triangle(tl.program_id(0).to(tl.int64))
    first_row = row_tile * BLOCK
    first_column = column_tile * BLOCK
    # Offsets within a tile fit in 32 bits (the launcher sees to it) and save half the registers.
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, DEPTH)
    inside_row = first_row + r < i
    inside_column = first_column + r < i
    total = tl.zeros((BLOCK, BLOCK), TOTAL)
    for start in range(0, n, DEPTH):
        line = x_ptr + tl.cast(start, tl.int64) * x_stride
        offset = d[:, None] * x_stride + r[None, :]
        live = d < n - start
        left = tl.load(
            line + first_row + offset, mask=live[:, None] & inside_row[None, :], other=0.0
        )
        right = tl.load(
            line + first_column + offset, mask=live[:, None] & inside_column[None, :], other=0.0
        )
        if WEIGHTED:
            weight = tl.load(weight_ptr + start + d, mask=live, other=0.0).to(TOTAL)
            right = right * weight[:, None]
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=TOTAL)

    if TOTAL == tl.float64:
        total = total * alpha
    else:
        total = total * tl.cast(alpha, tl.float32)
    lower = (row_tile > column_tile) | (r[:, None] >= r[None, :])
    inside = inside_row[:, None] & inside_column[None, :]
    if PACKED:
        inside = inside & lower
        entry = out_ptr + (first_row * (first_row + 1) // 2 + first_column)
        entry += (r * first_row.to(tl.int32) + r * (r + 1) // 2)[:, None] + r[None, :]
    else:
        entry = out_ptr + (first_row * out_stride + first_column)
        entry += r[:, None] * out_stride + r[None, :]
    if ACCUMULATE:
        before = tl.load(entry, mask=inside, other=0.0)
        if TOTAL == tl.float64:
            total += before * beta
        else:
            total += before * tl.cast(beta, tl.float32)
    if PACKED:
        tl.store(entry, total, mask=inside)
    else:
        # A mask that follows the diagonal would break up vector stores: on the diagonal the tile
        # is made symmetric in registers and stored whole, elsewhere its transpose is stored too.
        transposed = tl.trans(total)
        tl.store(entry, tl.where(lower, total, transposed), mask=inside)
        if row_tile > column_tile:
            mirrored = out_ptr + (first_column * out_stride + first_row)
            mirrored += r[:, None] * out_stride + r[None, :]
            tl.store(mirrored, transposed, mask=inside_column[:, None] & inside_row[None, :])


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of the output (block x block), rows of x per step, warps, pipeline stages."""

    block: int
    depth: int
    warps: int
    stages: int


#: By the type of the operands, from the largest tile to the smallest.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    torch.float16: (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    torch.float32: (Config(128, 16, 8, 3), Config(64, 16, 4, 3)),
    torch.float64: (Config(64, 16, 8, 3), Config(32, 16, 4, 3)),
}


def candidates(dtype: torch.dtype, *, weighted: bool, packed: bool) -> tuple[Config, ...]:
    """List the configurations for a variant, from the largest tile to the smallest.

    A weighted operand passes through registers, and packed stores are masked element by element:
    both spill at 128 x 128.
    """
    return tuple(c for c in CONFIGS[dtype] if c.block <= 64 or not (weighted or packed))


def shared_bytes(config: Config, dtype: torch.dtype) -> int:
    """Shared memory of the pipeline (both slabs in each stage) or of the transpose, in bytes."""
    slabs = config.stages * 2 * config.block * config.depth * dtype.itemsize
    return max(slabs, config.block**2 * max(4, dtype.itemsize))


def tiles(i: int, block: int) -> int:
    """Return the number of tiles of the lower triangle, the size of the grid."""
    side = -(-i // block)
    return side * (side + 1) // 2


def prune(configs: Sequence[Config], dtype: torch.dtype, shared_limit: int) -> list[Config]:
    """Keep the configurations that fit in a block's shared memory."""
    return [c for c in configs if shared_bytes(c, dtype) <= shared_limit]


def choose(
    configs: Sequence[Config], dtype: torch.dtype, i: int, shared_limit: int, processors: int
) -> Config:
    """Pick the largest tile that still gives every multiprocessor a tile, else the smallest."""
    fitting = prune(configs, dtype, shared_limit)
    if not fitting:
        raise ValueError(f"no configuration fits in {shared_limit} bytes of shared memory")
    for config in fitting:
        if tiles(i, config.block) >= processors:
            return config
    return min(fitting, key=lambda c: c.block)


#: From this many inputs on, half the arithmetic beats the vendor's full product (published
#: figures: 1.2x at 2048, slower at 1024).
WORTHWHILE_INPUTS = 2048


def worthwhile(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernel beats the vendor's full product, by size and type alone."""
    del weight
    return x.shape[1] >= WORTHWHILE_INPUTS and x.dtype in (torch.bfloat16, torch.float16)


# --- launcher -------------------------------------------------------------------------------------


def gram(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    alpha: float,
    beta: float,
    *,
    packed: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
    widen: bool | None = None,
) -> None:
    """Set out to beta out + alpha x^T diag(weight) x.

    Args:
        out: (i, i) with unit column stride, or contiguous (i (i + 1) / 2,) if packed; fp32, or
            fp64 if x or weight is. Not read if beta is 0.
        x: (n, i).
        weight: (n,) or None.
        alpha: factor of the product.
        beta: factor of out.
        packed: store the lower triangle row by row.
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        config: overrides `choose`.
        widen: copy 16-bit inputs to fp32 first; by default where there is a weight, and for bf16
            in the interpreter, which multiplies the bit patterns of bf16 as integers.
    """
    n, i = x.shape
    if i == 0:
        return
    if widen is None:
        widen = weight is not None or (interpreted() and x.dtype == torch.bfloat16)
    if out.dtype == torch.float64 or (widen and x.dtype.itemsize == 2):
        x = x.to(out.dtype)
    if config is None:
        allowed = candidates(x.dtype, weighted=weight is not None, packed=packed)
        config = choose(allowed, x.dtype, i, *limits(x.device))
    # Offsets within a slab of x are 32-bit.
    if x.stride(1) != 1 or x.stride(0) < i or x.stride(0) * config.depth >= 2**31:
        x = x.contiguous()
    with torch.cuda.device_of(x):
        gram_kernel[(tiles(i, config.block),)](
            x,
            x if weight is None else weight.contiguous(),
            out,
            n,
            i,
            x.stride(0),
            0 if packed else out.stride(0),
            alpha,
            beta,
            WEIGHTED=weight is not None,
            ACCUMULATE=beta != 0,
            PACKED=packed,
            TOTAL=tl.float64 if out.dtype == torch.float64 else tl.float32,
            PRECISION="ieee" if interpreted() and precision.startswith("bf16") else precision,
            BLOCK=config.block,
            DEPTH=config.depth,
            num_warps=config.warps,
            num_stages=config.stages,
        )


# --- ahead-of-time cases --------------------------------------------------------------------------


def _case(
    dtype: torch.dtype, config: Config, *, weighted: bool = False, packed: bool = False
) -> Case:
    name = NAMES[dtype]
    total = "fp64" if dtype == torch.float64 else "fp32"
    constants: dict[str, Any] = {
        "WEIGHTED": weighted,
        "ACCUMULATE": True,
        "PACKED": packed,
        "TOTAL": tl.float64 if total == "fp64" else tl.float32,
        "PRECISION": "ieee",
        "BLOCK": config.block,
        "DEPTH": config.depth,
    }
    signature = {
        "x_ptr": f"*{name}",
        "weight_ptr": f"*{name}",
        "out_ptr": f"*{total}",
        "n": "i32",
        "i": "i32",
        "x_stride": "i32",
        "out_stride": "i32",
        "alpha": "fp64",
        "beta": "fp64",
    }
    return Case(
        kernel=gram_kernel,
        helpers=(triangle,),
        label=name + " weighted" * weighted + " packed" * packed,
        signature=signature,
        constants=constants,
        warps=config.warps,
        stages=config.stages,
        aligned=("x_ptr", "weight_ptr", "out_ptr", "n", "i", "x_stride", "out_stride"),
        unit=name,
        shared_bound=shared_bytes(config, dtype),
    )


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    return [
        _case(dtype, config, weighted=weighted, packed=packed)
        for dtype in CONFIGS
        for weighted in (False, True)
        if not weighted or dtype.itemsize > 2  # 16-bit inputs with a weight are widened first
        for packed in (False, True)
        for config in candidates(dtype, weighted=weighted, packed=packed)
    ]
