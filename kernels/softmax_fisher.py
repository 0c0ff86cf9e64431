"""Variance of tangents under a softmax on a GPU: one pass over logits and tangents.

One program of a single warp takes a tile of rows (samples) and walks along their classes, so that
sums over classes are sums of registers and shuffles: no shared memory, no barrier. The weights of a
tile of logits serve a block of directions. Where samples are few and classes many, the classes
of a row are split over programs, whose states a second kernel merges in order (`_online_softmax`).

Bound by memory: logits are read once for each block of directions, tangents once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _online_softmax as online
from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels._device import limits
from deaddir_fast.kernels._online_softmax import (
    anchor_of,
    excess,
    exponential,
    finite,
    join,
    merge,
    moments,
    nonzero,
    power_of_two,
    store_result,
    store_state,
    weigh,
)


@triton.jit
def softmax_fisher_kernel(
    logits_ptr,
    tangent_ptr,
    out_ptr,
    p,
    n,
    c,
    span,
    logits_stride,
    direction_stride,
    sample_stride,
    TOTAL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A block of directions, a tile of samples and ``span`` classes.

    logits is (n, c) with row stride logits_stride; tangent is (p, n, c) with strides
    direction_stride and sample_stride; out is (p, n), or states (splits, 5, p, n) if SPLIT.
    """
    # Blocks of directions are neighbours in the grid: they meet the same logits in the cache.
    blocks = tl.cdiv(p, BLOCK_P)
    tiles = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    direction = program % blocks * BLOCK_P
    program = program // blocks
    split = program // tiles
    sample = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last sample or direction read the last one, and are not stored: masks hold
    # registers.
    row = tl.minimum(sample, n - 1).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    tangent_row = tangent_ptr + row * sample_stride
    column = tl.arange(0, BLOCK_C)

    top = tl.full((BLOCK_N,), -float("inf"), TOTAL)
    mass = tl.zeros((BLOCK_N,), TOTAL)
    anchor = (tl.zeros((BLOCK_N,), TOTAL),) * BLOCK_P
    offset = anchor
    variance = anchor
    for first in range(split * span, tl.minimum(split * span + span, c), BLOCK_C):
        known = (first + column < c)[None, :]
        here = (first + column)[None, :]
        z = tl.load(logits_row[:, None] + here, mask=known, other=-float("inf")).to(TOTAL)
        new_top, new_mass, share, largest = weigh(z)
        keep = top >= new_top
        top, mass, part, new_part = join(top, mass, new_top, new_mass)
        merged = ((), (), ())
        for j in tl.static_range(BLOCK_P):
            which = tl.cast(tl.minimum(direction + j, p - 1), tl.int64)
            tangent_line = tangent_row + which * direction_stride
            t = tl.load(tangent_line[:, None] + here, mask=known, other=0.0).to(TOTAL)
            new_anchor = anchor_of(share, largest, t)
            new_offset, new_variance = moments(t - new_anchor[:, None], share)
            a, o, v = merge(
                keep,
                part,
                new_part,
                anchor[j],
                offset[j],
                variance[j],
                new_anchor,
                new_offset,
                new_variance,
            )
            merged = (merged[0] + (a,), merged[1] + (o,), merged[2] + (v,))
        anchor = merged[0]
        offset = merged[1]
        variance = merged[2]

    plane = tl.cast(p, tl.int64) * n
    for j in tl.static_range(BLOCK_P):
        at = tl.cast(direction + j, tl.int64) * n + sample
        stored = (sample < n) & (direction + j < p)
        if SPLIT:
            at += split * 5 * plane
            store_state(out_ptr, at, plane, stored, top, mass, anchor[j], offset[j], variance[j])
        else:
            store_result(out_ptr, at, stored, mass, variance[j])


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile of one warp: directions, samples and classes."""

    directions: int
    samples: int
    classes: int


def table(narrow: int, wide: int, blocks: tuple[int, ...]) -> tuple[Config, ...]:
    """List tiles of ``narrow`` logits in several rows and of ``wide`` logits in one.

    Every row of a tile has a state, in each lane that shares the row: ``blocks`` of directions fit
    in registers beside one row only.
    """
    return (
        Config(1, narrow // 16, 16),
        Config(1, narrow // 64, 64),
        *(Config(directions, 1, wide) for directions in blocks),
    )


#: By the type of the operands.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: table(256, 512, (1, 4)),
    torch.float16: table(256, 512, (1, 4)),
    torch.float32: table(256, 512, (1, 4)),
    torch.float64: table(128, 256, (1, 2)),
}

#: Shared memory of a program at most: a value per row changes lanes. Every device has that.
SHARED_BYTES = 256

#: Warps a multiprocessor needs to keep memory busy.
WARPS = 16


def choose(configs: tuple[Config, ...], p: int, c: int) -> Config:
    """Pick the narrowest tile that takes a row whole, else the widest."""
    tile = min((x.classes for x in configs if x.classes >= c), default=0)
    tile = tile or max(x.classes for x in configs)
    fitting = [x for x in configs if x.classes == tile]
    # a block of which more than a third is empty reads less often but computes more
    return max((x for x in fitting if x.directions * 2 <= 3 * p), key=lambda x: x.directions)


def programs(config: Config, p: int, n: int) -> int:
    """Return the number of programs that cover directions and samples."""
    return -(-p // config.directions) * -(-n // config.samples)


#: Below this many tangent entries the launches, not the passes over memory, take the time.
WORTHWHILE_ENTRIES = 2**20


def worthwhile(logits: Tensor, stacked: Tensor) -> bool:
    """Whether one pass over memory beats the many of the reference, by size alone."""
    del logits
    return stacked.numel() >= WORTHWHILE_ENTRIES


# --- launcher -------------------------------------------------------------------------------------


def softmax_fisher(
    logits: Tensor,
    tangent: Tensor,
    out: Tensor,
    *,
    config: Config | None = None,
    span: int | None = None,
) -> None:
    """Write the variances of tangents under softmax(logits).

    Args:
        logits: (n, c), c >= 1.
        tangent: (p, n, c).
        out: (p, n), contiguous; fp64 if logits or tangent is, else fp32.
        config: overrides `choose`.
        span: classes of one split, a multiple of config.classes; by default as many splits as
            fill the device.
    """
    p, n, c = tangent.shape
    if p == 0 or n == 0:
        return
    if logits.dtype != tangent.dtype:
        logits, tangent = logits.to(out.dtype), tangent.to(out.dtype)
    logits, tangent = online.row_major(logits), online.row_major(tangent)
    if config is None:
        config = choose(CONFIGS[tangent.dtype], p, c)
    grid = programs(config, p, n)
    if span is None:
        wanted = WARPS * limits(tangent.device, interpreter=1)[1]
        splits, span = online.split(c, config.classes, grid, wanted)
    else:
        splits = -(-c // span)
    state = online.states(out, splits) if splits > 1 else out
    with torch.cuda.device_of(tangent):
        softmax_fisher_kernel[(grid * splits,)](
            logits,
            tangent,
            state,
            p,
            n,
            c,
            span,
            logits.stride(0),
            tangent.stride(0),
            tangent.stride(1),
            TOTAL=online.total(tangent.dtype),
            SPLIT=splits > 1,
            BLOCK_P=config.directions,
            BLOCK_N=config.samples,
            BLOCK_C=config.classes,
            num_warps=1,
        )
        if splits > 1:
            online.merge_splits(state, out)


# --- ahead-of-time cases --------------------------------------------------------------------------


def case(
    kernel: Any,
    helpers: tuple[Any, ...],
    dtype: torch.dtype,
    config: Config,
    *,
    divided: bool,
    even: bool,
) -> Case:
    """One compilation of this kernel, or of another with its signature.

    ``divided``: classes are split; ``even``: c and the strides are multiples of 16.
    """
    name = NAMES[dtype]
    wide = "fp64" if dtype == torch.float64 else "fp32"
    pointers = dict(zip(kernel.arg_names, (f"*{name}", f"*{name}", f"*{wide}"), strict=False))
    constants = {
        "TOTAL": online.total(dtype),
        "SPLIT": divided,
        "BLOCK_P": config.directions,
        "BLOCK_N": config.samples,
        "BLOCK_C": config.classes,
    }
    strides = dict.fromkeys(("c", "logits_stride", "direction_stride", "sample_stride"), "i32")
    return Case(
        kernel=kernel,
        helpers=helpers,
        label=name + " split" * divided + " even" * even,
        signature={**pointers, "p": "i32", "n": "i32", "span": "i32", **strides},
        constants={name: value for name, value in constants.items() if name in kernel.arg_names},
        warps=1,
        stages=3,
        aligned=(*pointers, "span", *(strides if even else ())),
        unit="elementwise",
        shared_bound=SHARED_BYTES,
    )


def cases(
    kernel: Any, helpers: tuple[Any, ...], configs: dict[torch.dtype, tuple[Config, ...]]
) -> list[Case]:
    """List all that can be launched: only rows that need more than one tile are split."""
    return [
        case(kernel, helpers, dtype, config, divided=divided, even=even)
        for dtype, some in configs.items()
        for config in some
        for divided in ((False, True) if config.classes == some[-1].classes else (False,))
        for even in (False, True)
    ]


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device."""
    helpers = (
        excess,
        power_of_two,
        exponential,
        finite,
        nonzero,
        weigh,
        anchor_of,
        moments,
        join,
        merge,
        store_result,
        store_state,
    )
    return cases(softmax_fisher_kernel, helpers, CONFIGS)
