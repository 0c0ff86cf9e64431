"""Scores of the samples of a layer on a GPU: out_pn = sum_t g_nt^T U_p a_nt.

Two exact forms, chosen by cost (`preferred`):

    factorised   (g_nt U_p) . a_nt for each row nt                2 n t p o i    FLOP
    contracted   M_n = sum_t g_nt a_nt^T first, then <M_n, U_p>   2 n o i (t + p) FLOP

Factorised, one program computes a tile (rows x inputs) of g U_p over the whole depth o, multiplies
it by the tile of a where it stands and sums over its inputs. Contracted, one program computes the
same tile (outputs x inputs) of M for four samples, keeps the four in registers and takes their
inner products with every U_p, so that each element read of U serves four samples. Neither g U_p nor
M goes to memory: a tile leaves one number for each direction and row or sample in a workspace,
which is summed over tiles and tokens in fp64, in a fixed order. Blocks of scores come out one by
one, for `directional_scores` to write and `deaddir_fast.kernels.directional_curvature` to square
and add.

16-bit operands of one type go to the matrix units as they are and are summed in fp32; operands of
different types are widened first. M is not rounded: its products with U are in the type of sums.
Loads are masked with zeros, and since 0 * inf is NaN, tiles are masked again where a padded lane
would be summed into a value that is kept.

Source: our choice. The CPU kernel (csrc/directional_scores.cpp) chooses between the same forms.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import interpreted
from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels._device import limits
from deaddir_fast.ops._blocks import accumulation, blocks

#: Samples whose tiles of M one program of the contracted form holds.
SAMPLES = 4


@triton.jit
def directional_scores_factorised_kernel(
    a_ptr,
    g_ptr,
    U_ptr,
    partial_ptr,
    rows,
    i,
    o,
    p,
    a_stride,
    g_stride,
    U_step,
    U_stride,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of one direction; a is (rows, i), g (rows, o), U (p, o, i) with step and row stride.

    partial[column tile, direction, row] is set to the sum over the inputs of the tile.
    """
    row_tiles = tl.cdiv(rows, BLOCK_R)
    column_tiles = tl.cdiv(i, BLOCK_I)
    direction = tl.program_id(0) // (row_tiles * column_tiles)
    place = tl.program_id(0) % (row_tiles * column_tiles)
    # GROUP row tiles go through the column tiles together and read each slab of U from the cache.
    first_tile = place // (GROUP * column_tiles) * GROUP
    tall = tl.minimum(row_tiles - first_tile, GROUP)
    place = place % (GROUP * column_tiles)
    first_row = (first_tile + place % tall).to(tl.int64) * BLOCK_R
    column_tile = place // tall
    first_column = column_tile * BLOCK_I

    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_I)
    d = tl.arange(0, DEPTH)
    live_row = first_row + r < rows
    live_column = first_column + c < i
    # Offsets within a tile fit in 32 bits; the launcher sees to it.
    g_tile = g_ptr + first_row * g_stride
    U_tile = U_ptr + direction.to(tl.int64) * U_step + first_column
    total = tl.zeros((BLOCK_R, BLOCK_I), TOTAL)
    for start in range(0, o, DEPTH):
        live = d < o - start
        left = tl.load(
            g_tile + start + (r[:, None] * g_stride + d[None, :]),
            mask=live_row[:, None] & live[None, :],
            other=0.0,
        )
        right = tl.load(
            U_tile + tl.cast(start, tl.int64) * U_stride + (d[:, None] * U_stride + c[None, :]),
            mask=live[:, None] & live_column[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=TOTAL)

    inside = live_row[:, None] & live_column[None, :]
    a_tile = a_ptr + first_row * a_stride + first_column
    a = tl.load(a_tile + (r[:, None] * a_stride + c[None, :]), mask=inside, other=0.0)
    products = tl.where(inside, total * a.to(TOTAL), 0.0)
    slot = (column_tile.to(tl.int64) * p + direction) * rows + first_row
    tl.store(partial_ptr + slot + r, tl.sum(products, axis=1), mask=live_row)


@triton.jit
def outer(
    a_ptr,
    g_ptr,
    tokens,
    a_stride,
    g_stride,
    live_row,
    live_column,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Tile of sum_t g_t a_t^T over the tokens of one sample, zero outside."""
    r = tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_I)
    d = tl.arange(0, DEPTH)
    total = tl.zeros((BLOCK_O, BLOCK_I), TOTAL)
    for start in range(0, tokens, DEPTH):
        at = tl.cast(start, tl.int64)
        live = d < tokens - start
        # Transposed by its addresses: transposed after the load, a tile cannot be copied to shared
        # memory asynchronously before sm_90.
        left = tl.load(
            g_ptr + at * g_stride + (r[:, None] + d[None, :] * g_stride),
            mask=live_row[:, None] & live[None, :],
            other=0.0,
        )
        right = tl.load(
            a_ptr + at * a_stride + (d[:, None] * a_stride + c[None, :]),
            mask=live[:, None] & live_column[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=TOTAL)
    return tl.where(live_row[:, None] & live_column[None, :], total, 0.0)


@triton.jit
def directional_scores_contracted_kernel(
    a_ptr,
    g_ptr,
    U_ptr,
    partial_ptr,
    n,
    t,
    i,
    o,
    p,
    a_stride,
    g_stride,
    U_step,
    U_stride,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of M of four samples, and its inner products with every direction.

    a is (n t, i), g (n t, o), U (p, o, i) with step and row stride; partial[tile, direction,
    sample] is set to the sum over the tile.
    """
    groups = tl.cdiv(n, 4)
    tile = tl.program_id(0) // groups
    sample = tl.program_id(0) % groups * 4
    first_row = tile // tl.cdiv(i, BLOCK_I) * BLOCK_O
    first_column = tile % tl.cdiv(i, BLOCK_I) * BLOCK_I
    r = tl.arange(0, BLOCK_O)
    c = tl.arange(0, BLOCK_I)
    live_row = first_row + r < o
    live_column = first_column + c < i

    a_step = tl.cast(t, tl.int64) * a_stride
    g_step = tl.cast(t, tl.int64) * g_stride
    a0 = a_ptr + sample * a_step + first_column
    g0 = g_ptr + sample * g_step + first_row
    t1 = tl.where(sample + 1 < n, t, 0)  # an absent sample has no tokens
    t2 = tl.where(sample + 2 < n, t, 0)
    t3 = tl.where(sample + 3 < n, t, 0)
    # fmt: off
    m0 = outer(a0, g0, t, a_stride, g_stride, live_row, live_column,
               TOTAL, PRECISION, BLOCK_O, BLOCK_I, DEPTH)
    m1 = outer(a0 + a_step, g0 + g_step, t1, a_stride, g_stride, live_row, live_column,
               TOTAL, PRECISION, BLOCK_O, BLOCK_I, DEPTH)
    m2 = outer(a0 + 2 * a_step, g0 + 2 * g_step, t2, a_stride, g_stride, live_row, live_column,
               TOTAL, PRECISION, BLOCK_O, BLOCK_I, DEPTH)
    m3 = outer(a0 + 3 * a_step, g0 + 3 * g_step, t3, a_stride, g_stride, live_row, live_column,
               TOTAL, PRECISION, BLOCK_O, BLOCK_I, DEPTH)
    # fmt: on

    inside = live_row[:, None] & live_column[None, :]
    U_tile = U_ptr + tl.cast(first_row, tl.int64) * U_stride + first_column
    slot = partial_ptr + tile.to(tl.int64) * p * n + sample
    lane = tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]  # as `join` below nests
    for _ in tl.range(0, p, num_stages=STAGES):
        u = tl.load(U_tile + (r[:, None] * U_stride + c[None, :]), mask=inside, other=0.0)
        u = u.to(TOTAL)
        s01 = tl.join(tl.sum(m0 * u, axis=1), tl.sum(m1 * u, axis=1))
        s23 = tl.join(tl.sum(m2 * u, axis=1), tl.sum(m3 * u, axis=1))
        # the four sums cross the warps together
        tl.store(slot + lane, tl.sum(tl.join(s01, s23), axis=0), mask=sample + lane < n)
        U_tile += U_step
        slot += n


# --- forms and configurations ---------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Form, tile (rows or outputs x inputs), depth of a step, warps, pipeline stages."""

    form: str
    height: int
    width: int
    depth: int
    warps: int
    stages: int


#: By the type of the operands, from the largest tile to the smallest within each form.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    **{
        half: (
            Config("factorised", 128, 128, 64, 8, 3),
            Config("factorised", 64, 64, 64, 8, 3),
            Config("contracted", 64, 128, 64, 8, 3),
            Config("contracted", 64, 64, 32, 4, 3),
        )
        for half in (torch.bfloat16, torch.float16)
    },
    torch.float32: (
        Config("factorised", 128, 128, 16, 8, 3),
        Config("factorised", 64, 64, 16, 4, 3),
        Config("contracted", 64, 64, 16, 4, 3),
    ),
    torch.float64: (
        Config("factorised", 64, 64, 16, 8, 3),
        Config("factorised", 32, 32, 16, 4, 3),
        Config("contracted", 32, 32, 16, 4, 3),
    ),
}


def preferred(t: int, p: int, dtype: torch.dtype) -> str:
    """Pick the form by its cost for each sample, output and input, in products of the matrix units.

    The products of M with U run on the vector units; for 16-bit operands they count eight times (an
    estimate from data sheets).
    """
    direction = 8 if dtype.itemsize == 2 else 1
    return "contracted" if t + direction * p < t * p else "factorised"


def candidates(dtype: torch.dtype, form: str) -> tuple[Config, ...]:
    """List the configurations of a form, from the largest tile to the smallest."""
    return tuple(c for c in CONFIGS[dtype] if c.form == form)


def shared_bytes(config: Config, dtype: torch.dtype) -> int:
    """Shared memory in bytes: slabs of both operands in each stage, then tiles of a or of U."""
    slabs = config.stages * (config.height + config.width) * config.depth * dtype.itemsize
    tile = config.height * config.width * dtype.itemsize
    return max(slabs, tile if config.form == "factorised" else (config.stages - 1) * tile)


def prune(configs: Sequence[Config], dtype: torch.dtype, shared_limit: int) -> list[Config]:
    """Keep the configurations that fit in a block's shared memory."""
    return [c for c in configs if shared_bytes(c, dtype) <= shared_limit]


def tiles(config: Config, i: int, o: int) -> int:
    """Return the partial sums left for each direction and each row or sample."""
    across = -(-i // config.width)
    return across if config.form == "factorised" else across * -(-o // config.height)


def programs(config: Config, n: int, t: int, i: int, o: int, p: int) -> int:
    """Return the size of the grid."""
    if config.form == "factorised":
        return p * -(-n * t // config.height) * tiles(config, i, o)
    return -(-n // SAMPLES) * tiles(config, i, o)


def choose(
    configs: Sequence[Config],
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    shared_limit: int,
    processors: int,
) -> Config:
    """Pick the largest tile that gives every multiprocessor a program, else the smallest.

    ``shape`` is (n, t, i, o, p).
    """
    fitting = prune(configs, dtype, shared_limit)
    if not fitting:
        raise ValueError(f"no configuration fits in {shared_limit} bytes of shared memory")
    for config in fitting:
        if programs(config, *shape) >= processors:
            return config
    return fitting[-1]


#: From this many products of one form or the other a launch is worth its overhead.
WORTHWHILE_PRODUCTS = 2**32


def worthwhile(a: Tensor, g: Tensor, U: Tensor) -> bool:
    """Whether the kernels beat the reference, by size and type alone.

    For 16-bit operands of one type the reference multiplies widened copies without matrix units;
    in fp32 and fp64 it has the vendor's products, which no published figure says we beat.
    """
    if not vector_loads(a, g, U):
        return False
    return a.numel() * U.shape[0] * U.shape[1] >= WORTHWHILE_PRODUCTS


def vector_loads(*tensors: Tensor) -> bool:
    """Whether all are 16-bit, of one type, in rows that can be loaded sixteen elements at a time.

    Other rows are read element by element, through registers that the contracted form lacks.
    """
    types = {x.dtype for x in tensors}
    sizes = [k for x in tensors for k in (x.shape[-1], *x.stride()[:-1])]
    return types in ({torch.bfloat16}, {torch.float16}) and all(k % 16 == 0 for k in sizes)


# --- launcher -------------------------------------------------------------------------------------


#: Samples, directions and their scores (directions, samples) in fp64.
Block = tuple[slice, slice, Tensor]


def directional_scores(a: Tensor, g: Tensor, U: Tensor, **options: Any) -> Tensor:
    """Return sum_t g^T U a for each direction and sample.

    Args:
        a: (n, i) or (n, t, i).
        g: (n, o) or (n, t, o).
        U: (p, o, i).
        options: those of `score_blocks`.

    Returns:
        (p, n), fp64 if any argument is, else fp32.
    """
    out = U.new_zeros((U.shape[0], a.shape[0]), dtype=accumulation(a, g, U))
    return write_scores(out, score_blocks(a, g, U, **options))


def score_blocks(
    a: Tensor,
    g: Tensor,
    U: Tensor,
    *,
    precision: str = "ieee",
    form: str | None = None,
    config: Config | None = None,
    widen: bool | None = None,
    workspace: int | None = None,
) -> Iterator[Block]:
    """Yield blocks of scores; none where there is nothing to sum.

    Args:
        a: (n, i) or (n, t, i).
        g: (n, o) or (n, t, o).
        U: (p, o, i).
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        form: "factorised" or "contracted", by default `preferred`.
        config: overrides ``form`` and `choose`.
        widen: copy 16-bit operands to fp32 first; by default where types differ, and for bf16 in
            the interpreter, which multiplies the bit patterns of bf16 as integers.
        workspace: bytes of partial sums held at a time, one sample and direction at least.
    """
    if a.ndim == 2:
        a, g = a[:, None], g[:, None]
    n, t, i = a.shape
    p, o, _ = U.shape
    if 0 in (n, t, i, o, p):
        return
    a, g, U = same_type((a, g, U), widen)
    if config is None:
        form = preferred(t, p, a.dtype) if form is None else form
        config = choose(candidates(a.dtype, form), a.dtype, (n, t, i, o, p), *limits(a.device))
    a, g = (rows_of(x, max(config.height, config.depth)) for x in (a, g))
    if U.stride(2) != 1 or U.stride(1) * max(config.height, config.depth) >= 2**31:
        U = U.contiguous()

    each = tiles(config, i, o) * 8
    if config.form == "factorised":
        cuts = samples_first(n, p, each * t, workspace)
        launch = _factorised
    else:
        # M is computed again for each block of directions, so they are cut last
        cuts = directions_first(n, p, each, workspace, SAMPLES)
        launch = _contracted
    for samples, directions in cuts:
        some = slice(samples.start * t, samples.stop * t)
        scores = launch(a[some], g[some], U[directions], t, config, matrix_precision(precision))
        yield samples, directions, scores


def _factorised(a: Tensor, g: Tensor, U: Tensor, t: int, config: Config, precision: str) -> Tensor:
    """Scores (p, n) in fp64."""
    (rows, i), (p, o, _) = a.shape, U.shape
    partial = a.new_empty((tiles(config, i, o), p, rows), dtype=torch.float64)
    with torch.cuda.device_of(a):
        directional_scores_factorised_kernel[(programs(config, rows, 1, i, o, p),)](
            a,
            g,
            U,
            partial,
            rows,
            i,
            o,
            p,
            a.stride(0),
            g.stride(0),
            U.stride(0),
            U.stride(1),
            TOTAL=tl.float64 if a.dtype == torch.float64 else tl.float32,
            PRECISION=precision,
            BLOCK_R=config.height,
            BLOCK_I=config.width,
            DEPTH=config.depth,
            GROUP=8,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return partial.sum(0).view(p, rows // t, t).sum(2)


def _contracted(a: Tensor, g: Tensor, U: Tensor, t: int, config: Config, precision: str) -> Tensor:
    """Scores (p, n) in fp64."""
    (rows, i), (p, o, _) = a.shape, U.shape
    n = rows // t
    partial = a.new_empty((tiles(config, i, o), p, n), dtype=torch.float64)
    with torch.cuda.device_of(a):
        directional_scores_contracted_kernel[(programs(config, n, t, i, o, p),)](
            a,
            g,
            U,
            partial,
            n,
            t,
            i,
            o,
            p,
            a.stride(0),
            g.stride(0),
            U.stride(0),
            U.stride(1),
            TOTAL=tl.float64 if a.dtype == torch.float64 else tl.float32,
            PRECISION=precision,
            BLOCK_O=config.height,
            BLOCK_I=config.width,
            DEPTH=config.depth,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return partial.sum(0)


# --- shared with the rank-one kernel --------------------------------------------------------------


def same_type(tensors: Sequence[Tensor], widen: bool | None) -> Iterator[Tensor]:
    """Yield the tensors in one type: their own, or that of sums where they differ."""
    types = {x.dtype for x in tensors}
    if widen is None:
        widen = interpreted() and torch.bfloat16 in types
    dtype = accumulation(*tensors) if widen or len(types) > 1 else types.pop()
    return (x.to(dtype) for x in tensors)


def rows_of(x: Tensor, reach: int) -> Tensor:
    """View (n, t, d) as (n t, d) with unit stride in d, copied where it has to be.

    Offsets up to ``reach`` rows ahead have to fit in 32 bits.
    """
    rows = x.reshape(-1, x.shape[2])
    return rows.contiguous() if rows.stride(1) != 1 or rows.stride(0) * reach >= 2**31 else rows


def matrix_precision(precision: str) -> str:
    """Return the precision for `tl.dot`; the interpreter lacks the modes made of bf16 pieces."""
    return "ieee" if interpreted() and precision.startswith("bf16") else precision


def samples_first(
    n: int, p: int, bytes_each: int, workspace: int | None
) -> Iterator[tuple[slice, slice]]:
    """Cut n samples x p directions into blocks of all samples, where those of one direction fit."""
    for samples in blocks(n, bytes_each, workspace):
        for directions in blocks(p, bytes_each * (samples.stop - samples.start), workspace):
            yield samples, directions


def directions_first(
    n: int, p: int, bytes_each: int, workspace: int | None, least: int = 1
) -> Iterator[tuple[slice, slice]]:
    """Cut n samples x p directions into blocks of all directions, where ``least`` samples fit."""
    for directions in blocks(p, bytes_each * least, workspace):
        for samples in blocks(n, bytes_each * (directions.stop - directions.start), workspace):
            yield samples, directions


def write_scores(out: Tensor, found: Iterable[Block]) -> Tensor:
    """Write blocks of scores where they belong in ``out`` (p, n), and return it."""
    for samples, directions, scores in found:
        out[directions, samples] = scores
    return out


# --- ahead-of-time cases --------------------------------------------------------------------------


def case(
    kernel: Any,
    dtype: torch.dtype,
    pointers: str,
    sizes: str,
    constants: dict[str, Any],
    *,
    config: Any,
    shared: int,
    helpers: tuple[Any, ...] = (),
    label: str = "",
) -> Case:
    """Make the case of a kernel with operands ``pointers``, fp64 partial sums and ``sizes``."""
    name = NAMES[dtype]
    total = tl.float64 if dtype == torch.float64 else tl.float32
    signature = {x: f"*{name}" for x in pointers.split()} | {"partial_ptr": "*fp64"}
    signature |= {x: "i32" for x in sizes.split()}
    return Case(
        kernel=kernel,
        helpers=helpers,
        label=f"{name} {label}".strip(),
        signature=signature,
        constants={"TOTAL": total, "PRECISION": "ieee", **constants},
        warps=config.warps,
        stages=config.stages,
        aligned=tuple(x for x in signature if x not in ("n", "t", "p", "rows")),
        unit=name,
        shared_bound=shared,
    )


def _case(dtype: torch.dtype, config: Config) -> Case:
    strides = "a_stride g_stride U_step U_stride"
    shared = shared_bytes(config, dtype)
    tile = {"BLOCK_I": config.width, "DEPTH": config.depth}
    if config.form == "factorised":
        return case(
            directional_scores_factorised_kernel,
            dtype,
            "a_ptr g_ptr U_ptr",
            f"rows i o p {strides}",
            {"BLOCK_R": config.height, **tile, "GROUP": 8},
            config=config,
            shared=shared,
        )
    return case(
        directional_scores_contracted_kernel,
        dtype,
        "a_ptr g_ptr U_ptr",
        f"n t i o p {strides}",
        {"BLOCK_O": config.height, **tile, "STAGES": config.stages},
        config=config,
        shared=shared,
        helpers=(outer,),
    )


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    return [_case(dtype, config) for dtype, configs in CONFIGS.items() for config in configs]
