"""What the optimizer steps share: hyper-parameters, random bits, the step of a block of elements.

A matrix is cut into blocks of consecutive elements. The arithmetic is that of the reference,
operation by operation in IEEE arithmetic: correctly rounded division and square root, and no fused
multiply-adds (the launches pass ``enable_fp_fusion=False``), which a kernel bound by memory can
afford. So results do not depend on block, path or device, and random bits are those of the
reference.

Of a block three copies are compiled. Where it lies in one row (or nothing depends on the place)
everything is loaded by vectors; where it crosses rows, the scales and the shared moments are
gathered and the rest is loaded by vectors; where it is the last of its matrix, or an address is
no multiple of 16 bytes, all is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels._lists import TYPES, entry

#: Numbers in the row of a tensor, and their order: addresses of w, g, m, v and of the scales of
#: rows and columns; elements, columns, flags; addresses of the groups of rows and columns, columns
#: of v (0 where v is not shared).
FIELDS = 12

#: Flags: the lists of elements start at multiples of 16 bytes; so does every row of what depends
#: on the column; nothing depends on row or column.
ALIGNED, EVEN, PLAIN = 1, 2, 4

ONE_ROW = tl.constexpr(0)
WHOLE = tl.constexpr(1)
MASKED = tl.constexpr(2)


@triton.jit
def hashed(x):
    """The mixing function of 32 bits of the reference."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stream_key(seed, hyper_ptr, tensor):
    """The key of a tensor's random bits: of the low 32 bits of the seed, the step, its number."""
    step = tl.load(hyper_ptr + 7).to(tl.int64).to(tl.uint32)
    return hashed(hashed(hashed(seed.to(tl.uint32)) ^ step) ^ tensor.to(tl.uint32))


@triton.jit
def rounded(value, key, start, lane):
    """Round fp32 stochastically to bf16; ``start`` is a multiple of the number of lanes.

    That number is even, so that a pair of elements has both its halves here, and a carry from the
    low half of a pair's number into the high one does not happen inside a block.
    """
    pair = start >> 1
    mixed = hashed((pair >> 32).to(tl.uint32)) ^ key
    bits = hashed((pair.to(tl.uint32) + (lane >> 1).to(tl.uint32)) ^ mixed)
    noise = tl.where((lane & 1) == 0, bits & 0xFFFF, bits >> 16)
    pattern = value.to(tl.uint32, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    cut = ((pattern + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(finite, cut, value).to(tl.bfloat16)


@triton.jit
def divide(x, y, STATE: tl.constexpr):
    """The correctly rounded quotient."""
    if STATE == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def root(x, STATE: tl.constexpr):
    """The correctly rounded square root."""
    if STATE == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def scalars(hyper_ptr, STATE: tl.constexpr):
    """lr, eps, keep, rise1, rise2, fall2, scale1, root2 of ``ops._adam.Scalars``."""
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    eps = tl.load(hyper_ptr + 3)
    decay = tl.load(hyper_ptr + 4)
    one = tl.load(hyper_ptr + 5)
    two = tl.load(hyper_ptr + 6)
    return (
        lr.to(STATE),
        eps.to(STATE),
        (1 - lr * decay).to(STATE),
        (1 - beta1).to(STATE),
        (1 - beta2).to(STATE),
        beta2.to(STATE),
        (1 / one).to(STATE),
        tl.sqrt(two).to(STATE),
    )


@triton.jit
def average(v, square, hyper_ptr, STATE: tl.constexpr):
    """The new second moment, from the mean of squares of the new gradients."""
    beta2 = tl.load(hyper_ptr + 2)
    return beta2.to(STATE) * v + (1 - beta2).to(STATE) * square


@triton.jit
def read(ptr, mask, other, MODE: tl.constexpr):
    """Load, masked where the block is."""
    if MODE == MASKED:
        return tl.load(ptr, mask=mask, other=other)
    else:
        return tl.load(ptr)


@triton.jit
def write(ptr, value, mask, MODE: tl.constexpr):
    """Store, masked where the block is."""
    if MODE == MASKED:
        tl.store(ptr, value, mask=mask)
    else:
        tl.store(ptr, value)


@triton.jit
def step_block(
    row_ptr,
    values,
    start,
    line,
    first,
    width,
    size,
    key,
    maximize,
    W: tl.constexpr,
    STATE: tl.constexpr,
    SHARED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    MODE: tl.constexpr,
):
    """Take the step on the elements from ``start`` on; the first is in row line, column first.

    ``values`` are those of `scalars`.
    """
    lr, eps, keep, rise1, rise2, fall2, scale1, root2 = values
    # casts are spelled out: a hint on the result of a call would be lost when it is inlined
    w_ptr = tl.load(row_ptr).to(tl.pointer_type(W))
    g_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(W))
    m_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(STATE))
    v_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(STATE))
    row_scale = tl.load(row_ptr + 4).to(tl.pointer_type(STATE))
    col_scale = tl.load(row_ptr + 5).to(tl.pointer_type(STATE))
    has_row = tl.load(row_ptr + 4) != 0
    has_col = tl.load(row_ptr + 5) != 0
    if MODE != MASKED:
        w_ptr = tl.multiple_of(w_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)

    lane = tl.arange(0, BLOCK)
    inside = lane < size - start
    known_row = has_row
    known_col = has_col
    if MODE == ONE_ROW:
        col_scale = tl.multiple_of(col_scale, 16)
        column = first // VECTOR * VECTOR + lane
        down = 0
    else:
        # 32 bits are enough: the launcher bounds the width
        position = (first + lane).to(tl.uint32)
        down = position // width.to(tl.uint32)
        column = (position - down * width.to(tl.uint32)).to(tl.int32)
        down = down.to(tl.int32)
        if MODE == MASKED:
            known_row = has_row & inside
            known_col = has_col & inside
    scale = tl.load(row_scale + line + down, mask=known_row, other=1.0) * tl.load(
        col_scale + column, mask=known_col, other=1.0
    )

    g = read(g_ptr + start + lane, inside, 0.0, MODE).to(STATE)
    m = read(m_ptr + start + lane, inside, 0.0, MODE)
    w = read(w_ptr + start + lane, inside, 0.0, MODE).to(STATE)
    g = tl.where(maximize != 0, -g, g) * scale
    m = m + rise1 * (g - m)
    write(m_ptr + start + lane, m, inside, MODE)
    if SHARED:
        row_group = tl.load(row_ptr + 9).to(tl.pointer_type(tl.int32))
        col_group = tl.load(row_ptr + 10).to(tl.pointer_type(tl.int32))
        groups = tl.load(row_ptr + 11)
        grouped_row = tl.load(row_ptr + 9) != 0
        grouped_col = tl.load(row_ptr + 10) != 0
        known_row = grouped_row
        known_col = grouped_col
        if MODE == ONE_ROW:
            col_group = tl.multiple_of(col_group, 16)
        elif MODE == MASKED:
            known_row = grouped_row & inside
            known_col = grouped_col & inside
        across = tl.load(row_group + line + down, mask=known_row, other=0)
        across = tl.where(grouped_row, across.to(tl.int64), line + down)
        if MODE == ONE_ROW:
            if grouped_col:
                along = tl.load(col_group + column)
                v = tl.load(v_ptr + across * groups + along)
            else:
                v = tl.load(v_ptr + tl.multiple_of(across * groups, VECTOR) + column)
        else:
            along = tl.load(col_group + column, mask=known_col, other=0)
            along = tl.where(grouped_col, along, column)
            v = read(v_ptr + across * groups + along, inside, 0.0, MODE)
    else:
        v = read(v_ptr + start + lane, inside, 0.0, MODE)
        v = fall2 * v + rise2 * g * g
        write(v_ptr + start + lane, v, inside, MODE)
    u = divide(m * scale1, divide(root(v, STATE), root2, STATE) + eps, STATE)
    new = keep * w - lr * scale * u
    if STOCHASTIC:
        write(w_ptr + start + lane, rounded(new, key, start, lane), inside, MODE)
    else:
        write(w_ptr + start + lane, new.to(W), inside, MODE)


@triton.jit
def step_program(
    table_ptr,
    hyper_ptr,
    programs,
    steps,
    seed,
    maximize,
    FIELDS: tl.constexpr,
    W: tl.constexpr,
    STATE: tl.constexpr,
    SHARED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Take the step on ``steps`` blocks of one tensor."""
    row_ptr, tensor, number = entry(table_ptr, programs, FIELDS)
    size = tl.load(row_ptr + 6)
    width = tl.load(row_ptr + 7)
    flags = tl.load(row_ptr + 8)
    key = 0
    if STOCHASTIC:
        key = stream_key(seed, hyper_ptr, tensor)
    values = scalars(hyper_ptr, STATE)
    begin = number * steps
    end = tl.minimum(begin + steps, (size + BLOCK - 1) // BLOCK)
    for block in range(begin, end):
        start = block * BLOCK
        line = start // width
        first = (start - line * width).to(tl.int32)
        whole = ((flags & 1) != 0) & (start + BLOCK <= size)
        one_row = ((flags & 4) != 0) | (((flags & 2) != 0) & (first + BLOCK <= width))
        if whole & one_row:
            step_block(row_ptr, values, start, line, first, width, size, key, maximize,
                       W, STATE, SHARED, STOCHASTIC, BLOCK, VECTOR, ONE_ROW)  # fmt: skip
        elif whole:
            step_block(row_ptr, values, start, line, first, width, size, key, maximize,
                       W, STATE, SHARED, STOCHASTIC, BLOCK, VECTOR, WHOLE)  # fmt: skip
        else:
            step_block(row_ptr, values, start, line, first, width, size, key, maximize,
                       W, STATE, SHARED, STOCHASTIC, BLOCK, VECTOR, MASKED)  # fmt: skip


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Elements of a block and warps of a program: 16 bytes or more a lane of the narrowest type."""

    block: int
    warps: int


#: By the type of the parameters. Chosen by registers and bytes in flight, not by timing: a kernel
#: that writes its inputs must not be tuned on them.
CONFIGS: dict[torch.dtype, Config] = {
    torch.float64: Config(512, 4),
    torch.float32: Config(1024, 4),
    torch.bfloat16: Config(1024, 4),
    torch.float16: Config(1024, 4),
}

#: Blocks that one program may take, from many to few. Many keep the table short and the pointers
#: in registers; few fill the device.
STEPS = (16, 8, 4, 2, 1)

#: Programs for each multiprocessor that fill a device several times over.
PROGRAMS = 32


@lru_cache(maxsize=256)
def steps(sizes: tuple[int, ...], block: int, processors: int) -> int:
    """Blocks of a program: the most that still make `PROGRAMS` for each multiprocessor."""
    for count in STEPS:
        if programs(sizes, block * count) >= PROGRAMS * processors:
            return count
    return STEPS[-1]


@lru_cache(maxsize=256)
def programs(sizes: tuple[int, ...], elements: int) -> int:
    """Programs of so many elements that take these tensors."""
    return sum(-(-size // elements) for size in sizes)


def vector(dtype: torch.dtype) -> int:
    """Elements whose number divides a row where all of its rows start at multiples of 16 bytes."""
    return 16 // min(dtype.itemsize, 4)


def flags(elements: Sequence[int], columns: Sequence[int], width: int, dtype: torch.dtype) -> int:
    """Say what the addresses of one tensor allow.

    Args:
        elements: addresses of what is as long as the matrix.
        columns: addresses of what depends on the place: scales (0 for one of two that is absent),
            shared moments and their groups. Empty if nothing does.
        width: columns of the matrix.
    """
    result = 0
    if all(x % 16 == 0 for x in elements):
        result |= ALIGNED
    if width % vector(dtype) == 0 and all(x % 16 == 0 for x in columns):
        result |= EVEN
    if not columns:
        result |= PLAIN
    return result


def signed32(seed: int) -> int:
    """The low 32 bits as the int32 that has them: one type, whatever the seed."""
    low = seed & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low


def constants(dtype: torch.dtype, config: Config, seed: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "FIELDS": FIELDS,
        "W": TYPES[dtype],
        "STATE": tl.float64 if dtype == torch.float64 else tl.float32,
        "STOCHASTIC": seed >= 0 and dtype == torch.bfloat16,
        "BLOCK": config.block,
        "VECTOR": vector(dtype),
    }


# --- ahead-of-time cases --------------------------------------------------------------------------

HELPERS = (
    entry,
    hashed,
    stream_key,
    rounded,
    divide,
    root,
    scalars,
    read,
    write,
    step_block,
    step_program,
)


def cases(kernel: Any, helpers: tuple[Any, ...]) -> list[Case]:
    """All compilations of a kernel that takes the step."""
    signature = {"table_ptr": "*i64", "hyper_ptr": "*fp64"}
    integers = dict.fromkeys(("programs", "steps", "seed", "maximize"), "i32")
    return [
        Case(
            kernel=kernel,
            label=NAMES[dtype] + " stochastic" * (seed >= 0),
            signature={**signature, **integers},
            constants=constants(dtype, config, seed),
            warps=config.warps,
            stages=3,
            aligned=tuple(signature),
            unit="vectors",
            helpers=(*HELPERS, *helpers),
            fusion=False,
        )
        for dtype, config in CONFIGS.items()
        for seed in ((-1, 0) if dtype == torch.bfloat16 else (-1,))
    ]
