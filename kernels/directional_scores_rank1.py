"""Scores of samples along rank-one directions on a GPU: out_pn = sum_t (g_nt.v_p)(a_nt.w_p).

One program takes a tile of rows (samples, with some tokens of each) and of directions, computes
x = g v^T and y = a w^T over the whole depths, and sums x * y over the tokens of each sample. What
it leaves for each sample, direction and run of tokens is summed in fp64, in a fixed order.
Directions lie next to each other in the grid, so that for many of them g and a come from the cache.

Bound by memory for p below some tens: g and a are read once.

16-bit operands of one type go to the matrix units as they are and are summed in fp32; operands of
different types are widened first. Padded rows are masked before tokens are summed: they hold
0 * inf = NaN where a direction is not finite.

Source: our choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels._case import Case
from deaddir_fast.kernels._device import limits
from deaddir_fast.kernels.directional_scores import (
    Block,
    case,
    directions_first,
    matrix_precision,
    rows_of,
    same_type,
    vector_loads,
    write_scores,
)
from deaddir_fast.ops._blocks import accumulation


@triton.jit
def project(
    x_ptr,
    direction_ptr,
    depth,
    x_stride,
    direction_stride,
    row,
    live_row,
    live_direction,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Products (BLOCK_R, BLOCK_P) of the given rows of x (int64) with directions."""
    c = tl.arange(0, BLOCK_P)
    d = tl.arange(0, DEPTH)
    line = x_ptr + row * x_stride
    total = tl.zeros((BLOCK_R, BLOCK_P), TOTAL)
    for start in range(0, depth, DEPTH):
        live = d < depth - start
        left = tl.load(
            line[:, None] + (start + d)[None, :],
            mask=live_row[:, None] & live[None, :],
            other=0.0,
        )
        right = tl.load(
            direction_ptr + start + (d[:, None] + c[None, :] * direction_stride),
            mask=live[:, None] & live_direction[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=TOTAL)
    return total


@triton.jit
def directional_scores_rank1_kernel(
    a_ptr,
    g_ptr,
    v_ptr,
    w_ptr,
    partial_ptr,
    n,
    t,
    i,
    o,
    p,
    a_stride,
    g_stride,
    v_stride,
    w_stride,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """BLOCK_R / TOKENS samples, TOKENS tokens of each, BLOCK_P directions.

    a is (n t, i), g (n t, o), v (p, o), w (p, i); partial[run of tokens, sample, direction].
    """
    SAMPLES: tl.constexpr = BLOCK_R // TOKENS
    runs = tl.cdiv(t, TOKENS)
    p_tiles = tl.cdiv(p, BLOCK_P)
    first_direction = tl.program_id(0) % p_tiles * BLOCK_P
    run = tl.program_id(0) // p_tiles % runs
    first_sample = (tl.program_id(0) // p_tiles // runs).to(tl.int64) * SAMPLES

    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_P)
    sample = first_sample + r // TOKENS
    token = run * TOKENS + r % TOKENS
    live_row = (sample < n) & (token < t)
    live_direction = first_direction + c < p
    row = sample * t + token
    v_tile = v_ptr + tl.cast(first_direction, tl.int64) * v_stride
    w_tile = w_ptr + tl.cast(first_direction, tl.int64) * w_stride
    # fmt: off
    x = project(g_ptr, v_tile, o, g_stride, v_stride, row, live_row, live_direction,
                TOTAL, PRECISION, BLOCK_R, BLOCK_P, DEPTH)
    y = project(a_ptr, w_tile, i, a_stride, w_stride, row, live_row, live_direction,
                TOTAL, PRECISION, BLOCK_R, BLOCK_P, DEPTH)
    # fmt: on
    products = tl.where(live_row[:, None], x * y, 0.0)
    if TOKENS > 1:
        products = tl.sum(tl.reshape(products, (SAMPLES, TOKENS, BLOCK_P)), axis=1)
    s = first_sample + tl.arange(0, SAMPLES)
    slot = partial_ptr + (run.to(tl.int64) * n + s) * p + first_direction
    inside = (s < n)[:, None] & live_direction[None, :]
    tl.store(slot[:, None] + c[None, :], products, mask=inside)


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile (rows x directions), depth of a step, warps, pipeline stages."""

    rows: int
    directions: int
    depth: int
    warps: int
    stages: int


#: By the type of the operands, from the most directions to the fewest.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: (Config(64, 64, 64, 8, 3), Config(64, 16, 64, 4, 4)),
    torch.float16: (Config(64, 64, 64, 8, 3), Config(64, 16, 64, 4, 4)),
    torch.float32: (Config(64, 64, 16, 4, 3), Config(64, 16, 32, 8, 3)),
    torch.float64: (Config(64, 32, 16, 8, 3), Config(64, 16, 16, 8, 3)),
}

#: Tokens of one sample in a tile.
TOKENS = (64, 16, 4, 1)


def shared_bytes(config: Config, dtype: torch.dtype) -> int:
    """Shared memory of the pipeline in bytes."""
    return config.stages * (config.rows + config.directions) * config.depth * dtype.itemsize


def prune(configs: Sequence[Config], dtype: torch.dtype, shared_limit: int) -> list[Config]:
    """Keep the configurations that fit in a block's shared memory."""
    return [c for c in configs if shared_bytes(c, dtype) <= shared_limit]


def choose(configs: Sequence[Config], dtype: torch.dtype, p: int, shared_limit: int) -> Config:
    """Pick the narrowest tile that holds all directions, else the widest."""
    fitting = prune(configs, dtype, shared_limit)
    if not fitting:
        raise ValueError(f"no configuration fits in {shared_limit} bytes of shared memory")
    return next((c for c in reversed(fitting) if c.directions >= p), fitting[0])


def tokens_in_tile(t: int) -> int:
    """Return the most tokens of a sample in one tile that leave at most a fifth of it empty."""
    return next(k for k in TOKENS if -(-t // k) * k * 4 <= t * 5)


#: From this many rows on every multiprocessor has a few tiles.
WORTHWHILE_ROWS = 2**15


def worthwhile(a: Tensor, g: Tensor, v: Tensor, w: Tensor) -> bool:
    """Whether the kernel beats the reference, by size and type alone.

    For 16-bit operands of one type the reference writes and reads widened copies.
    """
    if not vector_loads(a, g, v, w):
        return False
    return a.shape[:-1].numel() >= WORTHWHILE_ROWS and min(a.shape[-1], g.shape[-1]) >= 64


# --- launcher -------------------------------------------------------------------------------------


def directional_scores_rank1(a: Tensor, g: Tensor, v: Tensor, w: Tensor, **options: Any) -> Tensor:
    """Return sum_t (g.v)(a.w) for each direction v w^T and sample.

    Args:
        a: (n, i) or (n, t, i).
        g: (n, o) or (n, t, o).
        v: (p, o).
        w: (p, i).
        options: those of `score_blocks`.

    Returns:
        (p, n), fp64 if any argument is, else fp32.
    """
    out = v.new_zeros((v.shape[0], a.shape[0]), dtype=accumulation(a, g, v, w))
    return write_scores(out, score_blocks(a, g, v, w, **options))


def score_blocks(
    a: Tensor,
    g: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    widen: bool | None = None,
    workspace: int | None = None,
) -> Iterator[Block]:
    """Yield blocks of scores; none where there is nothing to sum.

    Args:
        a: (n, i) or (n, t, i).
        g: (n, o) or (n, t, o).
        v: (p, o).
        w: (p, i).
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        config: overrides `choose`.
        widen: copy 16-bit operands to fp32 first; by default where types differ, and for bf16 in
            the interpreter, which multiplies the bit patterns of bf16 as integers.
        workspace: bytes of partial sums held at a time, one sample and direction at least.
    """
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    (n, t, i), (p, o) = a.shape, v.shape
    if 0 in (n, t, i, o, p):
        return
    a, g, v, w = same_type((a, g, v, w), widen)
    if config is None:
        config = choose(CONFIGS[a.dtype], a.dtype, p, limits(a.device)[0])
    a, g = rows_of(a, 1), rows_of(g, 1)
    v, w = rows_of(v[:, None], config.directions), rows_of(w[:, None], config.directions)
    runs = -(-t // min(tokens_in_tile(t), config.rows))
    for samples, directions in directions_first(n, p, runs * 8, workspace):
        some = slice(samples.start * t, samples.stop * t)
        scores = _scores(
            a[some], g[some], v[directions], w[directions], t, config, matrix_precision(precision)
        )
        yield samples, directions, scores


def _scores(
    a: Tensor, g: Tensor, v: Tensor, w: Tensor, t: int, config: Config, precision: str
) -> Tensor:
    """Scores (p, n) in fp64."""
    (rows, i), (p, o) = a.shape, v.shape
    n, tokens = rows // t, min(tokens_in_tile(t), config.rows)
    runs = -(-t // tokens)
    partial = a.new_empty((runs, n, p), dtype=torch.float64)
    grid = -(-p // config.directions) * runs * -(-n * tokens // config.rows)
    with torch.cuda.device_of(a):
        directional_scores_rank1_kernel[(grid,)](
            a,
            g,
            v,
            w,
            partial,
            n,
            t,
            i,
            o,
            p,
            a.stride(0),
            g.stride(0),
            v.stride(0),
            w.stride(0),
            TOTAL=tl.float64 if a.dtype == torch.float64 else tl.float32,
            PRECISION=precision,
            BLOCK_R=config.rows,
            BLOCK_P=config.directions,
            DEPTH=config.depth,
            TOKENS=tokens,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return partial.sum(0).mT


# --- ahead-of-time cases --------------------------------------------------------------------------


def _case(dtype: torch.dtype, config: Config, tokens: int) -> Case:
    constants = {
        "BLOCK_R": config.rows,
        "BLOCK_P": config.directions,
        "DEPTH": config.depth,
        "TOKENS": tokens,
    }
    return case(
        directional_scores_rank1_kernel,
        dtype,
        "a_ptr g_ptr v_ptr w_ptr",
        "n t i o p a_stride g_stride v_stride w_stride",
        constants,
        config=config,
        shared=shared_bytes(config, dtype),
        helpers=(project,),
        label=f"tokens {tokens}",
    )


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    return [
        _case(dtype, config, tokens)
        for dtype, configs in CONFIGS.items()
        for config in configs
        for tokens in TOKENS
    ]
