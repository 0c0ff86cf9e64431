"""Batched matrix product on a GPU, with what follows it fused into the epilogue.

The Kronecker operations are pairs of products (U A, then G times that), so one kernel serves them
all: out[b] = left[b] right[b], left stored as it is or transposed, with a batch stride of 0 where a
factor is shared. One program computes one tile. The epilogue stores it, divides it by
another tile, or reduces it to one number (against another tile, or squared), so that a quadratic
form never writes its second product. Tiles are counted along a one-dimensional grid in groups of
rows that share operands in the L2 cache. No atomics: the sums of the tiles are added in a second
step, in fp64 and in a fixed order. Addresses of tiles are 64-bit, offsets inside a tile 32-bit.

Operands are stored in rows of a multiple of 16 elements, with zeros at the end: loads are 16 bytes
wide then, whatever the layer (the factor of a layer with a bias has one input more than a power of
2). The launchers copy what is not stored so, at a cost of order p o i against p o i (o + i).

A product runs in one type: 16-bit on the matrix units with fp32 sums, fp32 in "ieee" unless told
otherwise, fp64. Operands of different types are widened by the launcher, not in the kernel (see
`deaddir_fast.kernels.gram` for why).

An fp32 matrix still meets the matrix units if the other operand is bf16: it is the exact sum of
three bf16 matrices (24 bits of significand are three times 8), so the product is three products of
bf16, summed in fp32. The pieces are written by the product that made the matrix and lie one after
the other; the loop over the depth runs through all of them.

Source: grouped tile order from the Triton matrix multiplication tutorial; splitting into bf16
pieces as in Henry, Tang & Heinecke 2019; the fusions are our choice.
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
    right_piece,
    right_batch,
    right_row,
    other_batch,
    other_row,
    out_piece,
    out_batch,
    out_row,
    LEFT_TRANSPOSED: tl.constexpr,
    PIECES: tl.constexpr,
    OUT_PIECES: tl.constexpr,
    OUT_STORED: tl.constexpr,
    START: tl.constexpr,
    EPILOGUE: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of left (m, k) times right (k, n).

    ``START`` says from where on the operands are not zero along the depth: "zero" (everywhere),
    "row" (left[r, d] = 0 for d < r) or "column" (right[d, c] = 0 for d < c). ``EPILOGUE`` is
    "store", "divide" (by other), "dot" (sum of the tile times other) or "square" (sum of squares);
    the sums go to out[b, tile]. ``OUT_STORED``: rows of out end in zeros, like those of operands.
    """
    # Sizes are rounded up in place: calls are slow in the interpreter.
    row_tiles = (m + BLOCK - 1) // BLOCK
    column_tiles = (n + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    batch = (program // (row_tiles * column_tiles)).to(tl.int64)
    tile = program % (row_tiles * column_tiles)
    group = tile // (GROUP * column_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    place = tile - group * GROUP * column_tiles
    row = (group * GROUP + place % height) * BLOCK
    column = (place // height) * BLOCK
    # stored extents: the compiler sees that they are multiples of 16
    stored_m, stored_n, stored_k = ((m + 15) // 16 * 16, (n + 15) // 16 * 16, (k + 15) // 16 * 16)

    r = tl.arange(0, BLOCK)
    d = tl.arange(0, DEPTH)
    left_tile = left_ptr + batch * left_batch
    right_tile = right_ptr + batch * right_batch + column
    if LEFT_TRANSPOSED:
        left_tile += row
        left_offset = d[None, :] * left_row + r[:, None]
        left_inside = r[:, None] < stored_m - row
        left_depth = k
    else:
        left_tile += row.to(tl.int64) * left_row
        left_offset = r[:, None] * left_row + d[None, :]
        left_inside = r[:, None] < m - row
        left_depth = stored_k
    right_offset = d[:, None] * right_row + r[None, :]
    right_inside = r[None, :] < stored_n - column

    first = 0
    if START == "row":
        first = row
    if START == "column":
        first = column
    steps = (k - first + DEPTH - 1) // DEPTH
    total = tl.zeros((BLOCK, BLOCK), TOTAL)
    for step in range(0, PIECES * steps):
        here = right_tile
        if PIECES == 1:
            start = first + step * DEPTH
        else:  # the smallest piece first
            start = (step % steps) * DEPTH
            here += tl.cast(PIECES - 1 - step // steps, tl.int64) * right_piece
        begin = tl.cast(start, tl.int64)
        left = tl.load(
            left_tile + begin * (left_row if LEFT_TRANSPOSED else 1) + left_offset,
            mask=left_inside & (d[None, :] < left_depth - start),
            other=0.0,
        )
        right = tl.load(
            here + begin * right_row + right_offset,
            mask=right_inside & (d[:, None] < k - start),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=TOTAL)

    inside_row = r[:, None] < m - row
    inside = inside_row & (r[None, :] < n - column)
    inside_stored = inside_row & (r[None, :] < stored_n - column)
    if EPILOGUE == "dot" or EPILOGUE == "divide":
        other_tile = other_ptr + (batch * other_batch + row.to(tl.int64) * other_row + column)
        other = tl.load(
            other_tile + (r[:, None] * other_row + r[None, :]), mask=inside_stored, other=1.0
        )
        if EPILOGUE == "dot":
            total = total * other
        else:
            total = total / tl.where(inside, other, 1.0)
    if EPILOGUE == "square":
        total = total * total
    if EPILOGUE == "dot" or EPILOGUE == "square":
        # beyond the edge an infinite operand has met a zero
        total = tl.where(inside, total, 0.0)
        # over the whole tile at once: Triton 3.7 fails on sm_100 at one axis after the other
        tl.store(out_ptr + batch * out_batch + tile, tl.sum(total))
    else:
        entry = out_ptr + (batch * out_batch + row.to(tl.int64) * out_row + column)
        entry += r[:, None] * out_row + r[None, :]
        if OUT_STORED:
            total = tl.where(inside, total, 0.0)
            inside = inside_stored
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


# --- operands -------------------------------------------------------------------------------------


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


def width(size: int) -> int:
    """Return the elements of a stored row."""
    return -(-size // 16) * 16


#: Offsets inside a tile are 32-bit: the largest block or depth, times a stride, has to fit.
_STRIDE_LIMIT = 2**31 // 256


def store(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x (..., r, c) in ``dtype`` as (..., r, width(c)), zero beyond c.

    No copy is made where x is stored so already.
    """
    c = x.shape[-1]
    aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:-1])
    fits = x.stride(-1) == 1 and x.stride(-2) < _STRIDE_LIMIT
    if x.dtype == dtype and c == width(c) and aligned and fits:
        return x
    out = x.new_zeros((*x.shape[:-1], width(c)), dtype=dtype)
    out[..., :c] = x
    return out


def rows(x: Tensor) -> Tensor:
    """View (p, o, i) as (1, p o, i) where that needs no copy."""
    p, o, i = x.shape
    if p > 1 and o > 1 and x.stride(0) != o * x.stride(1):
        return x
    row = x.stride(1) if o > 1 else x.stride(0)
    return x.as_strided((1, p * o, i), (0, row, 1)) if row < _STRIDE_LIMIT else x


# --- launchers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """What is multiplied: ``left`` (b, m, k) and ``right`` (b, k, n), as `store` leaves them.

    A transposed ``left`` is stored as (b, k, m). ``right`` may be the pieces (3, b, k, n) of a
    matrix. ``start`` is where the depth starts: at "zero", at the first "row" or at the first
    "column" of the tile. ``precision`` is that of fp32 products: "ieee", or "tf32", "tf32x3",
    "bf16x3", "bf16x6". ``config`` overrides `choose`.
    """

    left: Tensor
    right: Tensor
    m: int
    n: int
    k: int
    left_transposed: bool = False
    start: str = "zero"
    precision: str = "ieee"
    config: Config | None = None

    def write(self, out: Tensor, divisor: Tensor | None = None) -> None:
        """Set out to the product, divided by a stored (m, n) matrix if there is one.

        ``out`` is (b, m, n) or (b, m, width(n)), or (3, b, m, width(n)) in bf16 for the pieces;
        contiguous rows.
        """
        self._launch(out, divisor, "store" if divisor is None else "divide", self._config())

    def sum(self, other: Tensor | None = None) -> Tensor:
        """Return the (b,) sums of the product times ``other``, or of its squares, in fp64.

        ``other`` is stored as (b, m, width(n)) in the type of the sums.
        """
        config = self._config()
        total = torch.float64 if self.left.dtype == torch.float64 else torch.float32
        shape = (len(self.left), tiles(self.m, self.n, config.block))
        parts = torch.empty(shape, dtype=total, device=self.left.device)
        self._launch(parts, other, "square" if other is None else "dot", config)
        return parts.sum(1, dtype=torch.float64)

    def _config(self) -> Config:
        if self.config is not None:
            return self.config
        dtype, shape = self.left.dtype, (len(self.left), self.m, self.n)
        return choose(CONFIGS[dtype], dtype, shape, *limits(self.left.device))

    def _launch(self, out: Tensor, other: Tensor | None, epilogue: str, config: Config) -> None:
        left, right = self.left, self.right
        pieces, out_pieces = (x.shape[0] if x.ndim == 4 else 1 for x in (right, out))
        stores = epilogue in ("store", "divide")
        precision = self.precision
        if interpreted() and precision.startswith("bf16"):
            precision = "ieee"
        with torch.cuda.device_of(left):
            product_kernel[(len(left) * tiles(self.m, self.n, config.block),)](
                left,
                right,
                left if other is None else other,
                out,
                self.m,
                self.n,
                self.k,
                left.stride(0),
                left.stride(1),
                right.stride(0) if pieces > 1 else 0,
                right.stride(-3),
                right.stride(-2),
                other.stride(0) if other is not None and other.ndim == 3 else 0,
                0 if other is None else other.stride(-2),
                out.stride(0) if out_pieces > 1 else 0,
                out.stride(-3) if stores else out.stride(0),
                out.stride(-2) if stores else 0,
                LEFT_TRANSPOSED=self.left_transposed,
                PIECES=pieces,
                OUT_PIECES=out_pieces,
                OUT_STORED=stores and out.shape[-1] != self.n,
                START=self.start,
                EPILOGUE=epilogue,
                TOTAL=tl.float64 if left.dtype == torch.float64 else tl.float32,
                PRECISION=precision,
                BLOCK=config.block,
                DEPTH=config.depth,
                GROUP=GROUP,
                num_warps=config.warps,
                num_stages=config.stages,
            )


def write_shared(out: Tensor, u: Tensor, right: Tensor, i: int, **options: Any) -> None:
    """Set out to u right for one (i, i) matrix ``right``; ``options`` are those of `Product`.

    All rows are one product where they follow each other in memory. ``out`` is contiguous.
    """
    flat = rows(u)
    product = Product(flat, right.expand(len(flat), -1, -1), flat.shape[1], i, i, **options)
    product.write(out.view(*out.shape[:-3], *flat.shape[:2], out.shape[-1]))


# --- ahead-of-time cases --------------------------------------------------------------------------


def cases(
    dtype: torch.dtype,
    label: str,
    *,
    epilogue: str = "store",
    out: torch.dtype | None = None,
    start: str = "zero",
    pieces: int = 1,
    out_pieces: int = 1,
    out_stored: bool = True,
    left_transposed: bool = False,
) -> list[Case]:
    """List the compilations of a variant with operands of ``dtype``: all configurations, sizes."""
    name = NAMES[dtype]
    total = "fp64" if dtype == torch.float64 else "fp32"
    strides = ("left_batch", "left_row", "right_piece", "right_batch", "right_row")
    strides += ("other_batch", "other_row", "out_piece", "out_batch", "out_row")
    signature = {
        "left_ptr": f"*{name}",
        "right_ptr": f"*{name}",
        "other_ptr": f"*{total}" if epilogue in ("dot", "divide") else f"*{name}",
        "out_ptr": f"*{total if out is None else NAMES[out]}",
        **dict.fromkeys(("m", "n", "k", *strides), "i32"),
    }
    found = []
    for config in CONFIGS[dtype]:
        for odd in (False, True):
            # sizes may be odd, and then the rows of a result that is not stored like an operand
            unaligned = {"m", "n", "k"} if odd else set()
            if odd and not out_stored:
                unaligned |= {"out_batch", "out_row"}
            constants: dict[str, Any] = {
                "LEFT_TRANSPOSED": left_transposed,
                "PIECES": pieces,
                "OUT_PIECES": out_pieces,
                "OUT_STORED": odd and out_stored and epilogue in ("store", "divide"),
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
                label=f"{name} {label}" + " odd" * odd,
                signature=signature,
                constants=constants,
                warps=config.warps,
                stages=config.stages,
                aligned=tuple(x for x in signature if x not in unaligned),
                unit=name,
                shared_bound=shared_bytes(config, dtype),
            )
            found.append(case)
    return found
