"""Fisher quadratic form of a linear read-out followed by a softmax, on a GPU.

    z = W h + bias,   dz_p = W dh_p + dW_p h,   out_pn = Var_{y ~ softmax(z_n)} dz_pny

One program takes a tile of samples, a block of directions and a range of classes, which it walks
in tiles: logits and tangents of a tile are sums in registers (a piece of W, once loaded, multiplies
h and every dh of the block), are reduced to a state per row (`_online_softmax`), and are forgotten.
Logits and tangents, n c of each, never reach memory. A second kernel merges the ranges in order.

The grid counts samples fastest, so that the programs at work at one time share rows of W.

16-bit operands of one type go to the matrix units as they are and are summed in fp32. Operands of
mixed types are widened first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _online_softmax as online
from deaddir_fast.kernels import interpreted
from deaddir_fast.kernels._case import NAMES, Case
from deaddir_fast.kernels._device import limits
from deaddir_fast.kernels._online_softmax import (
    anchor_of,
    exponential,
    finite,
    join,
    merge,
    moments,
    nonzero,
    store_state,
    weigh,
)


@triton.jit
def linear_softmax_fisher_kernel(
    h_ptr,
    dh_ptr,
    w_ptr,
    bias_ptr,
    dw_ptr,
    state_ptr,
    p,
    n,
    c,
    d,
    span,
    w_stride,
    MOVING: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of directions, a tile of samples and ``span`` classes.

    h is (n, d), dh (p, n, d), W (c, d) with row stride w_stride, bias (c,) and, if MOVING, dW
    (p, c, d); the states are (splits, 5, p, n).
    """
    # Tiles of samples are neighbours in the grid: they meet the same rows of W in the cache.
    tiles = tl.cdiv(n, BLOCK_N)
    blocks = tl.cdiv(p, BLOCK_P)
    program = tl.program_id(0)
    first_sample = program % tiles * BLOCK_N
    program = program // tiles
    direction = program % blocks * BLOCK_P
    split = program // blocks
    # Offsets within a tile fit in 32 bits (the launcher sees to it). Rows beyond the last sample,
    # class or direction read the last one: masks would hold registers through the loops. Such
    # samples and directions are not stored, such classes get the logit -inf.
    r = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    k = tl.arange(0, DEPTH)
    sample_line = tl.cast(first_sample, tl.int64) * d
    sample_offset = tl.minimum(r, n - 1 - first_sample)[:, None] * d + k[None, :]

    top = tl.full((BLOCK_N,), -float("inf"), TOTAL)
    mass = tl.zeros((BLOCK_N,), TOTAL)
    anchor = (tl.zeros((BLOCK_N,), TOTAL),) * BLOCK_P
    offset = anchor
    variance = anchor
    for first in range(split * span, tl.minimum(split * span + span, c), BLOCK_C):
        class_row = tl.minimum(column, c - 1 - first)[:, None]
        w_line = w_ptr + tl.cast(first, tl.int64) * w_stride
        w_offset = class_row * w_stride + k[None, :]
        z = tl.zeros((BLOCK_N, BLOCK_C), TOTAL)
        tangent = (tl.zeros((BLOCK_N, BLOCK_C), TOTAL),) * BLOCK_P
        for start in range(0, d, DEPTH):
            deep = (k < d - start)[None, :]
            w = tl.load(w_line + start + w_offset, mask=deep, other=0.0)
            x = tl.load(h_ptr + sample_line + start + sample_offset, mask=deep, other=0.0)
            z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION, out_dtype=TOTAL)
            sums = ()
            for j in tl.static_range(BLOCK_P):
                y_line = dh_ptr + tl.cast(tl.minimum(direction + j, p - 1), tl.int64) * n * d
                y = tl.load(y_line + sample_line + start + sample_offset, mask=deep, other=0.0)
                dz = tl.dot(y, tl.trans(w), tangent[j], input_precision=PRECISION, out_dtype=TOTAL)
                sums += (dz,)
            tangent = sums
        if MOVING:
            # a loop of its own: the pieces of dW take the place of those of dh in shared memory
            class_offset = class_row * d + k[None, :]
            for start in range(0, d, DEPTH):
                deep = (k < d - start)[None, :]
                x = tl.load(h_ptr + sample_line + start + sample_offset, mask=deep, other=0.0)
                sums = ()
                for j in tl.static_range(BLOCK_P):
                    v_line = tl.cast(tl.minimum(direction + j, p - 1), tl.int64) * c + first
                    v = tl.load(dw_ptr + v_line * d + start + class_offset, mask=deep, other=0.0)
                    dz = tl.dot(
                        x, tl.trans(v), tangent[j], input_precision=PRECISION, out_dtype=TOTAL
                    )
                    sums += (dz,)
                tangent = sums

        known = column < c - first
        z += tl.load(bias_ptr + first + column, mask=known, other=0.0)[None, :]
        z = tl.where(known[None, :], z, -float("inf"))
        new_top, new_mass, share, largest = weigh(z)
        keep = top >= new_top
        top, mass, part, new_part = join(top, mass, new_top, new_mass)
        merged = ((), (), ())
        for j in tl.static_range(BLOCK_P):
            new_anchor = anchor_of(share, largest, tangent[j])
            new_offset, new_variance = moments(tangent[j] - new_anchor[:, None], share)
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
    live = r < n - first_sample
    for j in tl.static_range(BLOCK_P):
        at = tl.cast(direction + j, tl.int64) * n + first_sample + r
        at += split * 5 * plane
        stored = live & (direction + j < p)
        store_state(state_ptr, at, plane, stored, top, mass, anchor[j], offset[j], variance[j])


# --- configurations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tile (directions, samples, classes), features per step, warps, pipeline stages."""

    directions: int
    samples: int
    classes: int
    depth: int
    warps: int
    stages: int


_HALF = (
    Config(2, 64, 128, 32, 8, 3),
    Config(1, 64, 128, 64, 8, 3),
    Config(1, 64, 64, 32, 4, 2),
)

#: By the type of the operands; for each block of directions the larger tile first.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: _HALF,
    torch.float16: _HALF,
    torch.float32: (Config(2, 64, 64, 16, 8, 2), Config(1, 32, 32, 16, 4, 2)),
    torch.float64: (Config(2, 16, 32, 16, 8, 2), Config(1, 32, 32, 16, 8, 2)),
}


def shared_bytes(config: Config, dtype: torch.dtype, *, moving: bool) -> int:
    """Shared memory of the pipelines: pieces of h, dh and W, or if ``moving`` of h and dW."""
    rows = (1 + config.directions) * config.samples + config.classes
    if moving:
        rows = max(rows, config.samples + config.directions * config.classes)
    return config.stages * rows * config.depth * dtype.itemsize


def prune(
    configs: Sequence[Config], dtype: torch.dtype, shared_limit: int, *, moving: bool
) -> list[Config]:
    """Keep the configurations that fit in a block's shared memory."""
    return [c for c in configs if shared_bytes(c, dtype, moving=moving) <= shared_limit]


def work(config: Config, p: int, *, moving: bool) -> int:
    """Products of a tile of samples and a tile of classes that p directions cost."""
    return -(-p // config.directions) * (1 + config.directions * (1 + moving))


def programs(config: Config, p: int, n: int) -> int:
    """Return the number of programs that cover directions and samples."""
    return -(-p // config.directions) * -(-n // config.samples)


def choose(
    configs: Sequence[Config], dtype: torch.dtype, p: int, shared_limit: int, *, moving: bool
) -> Config:
    """Pick the block of directions with the fewest products, and its largest tile."""
    fitting = prune(configs, dtype, shared_limit, moving=moving)
    if not fitting:
        raise ValueError(f"no configuration fits in {shared_limit} bytes of shared memory")
    return min(fitting, key=lambda config: work(config, p, moving=moving))  # of equals the first


#: Products of numbers from which the matrix units, which multiply 16-bit types an order faster than
#: the reference multiplies fp32, outweigh what is not tuned in the kernel.
WORTHWHILE_PRODUCTS = 2**32


def worthwhile(h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None) -> bool:
    """Whether the kernel beats the reference, by size and type alone."""
    del bias
    one_type = h.dtype == dh.dtype == W.dtype and (dW is None or dW.dtype == W.dtype)
    products = (1 + dh.shape[0]) * h.shape[0] * W.numel()
    return one_type and h.dtype.itemsize == 2 and products >= WORTHWHILE_PRODUCTS


# --- launcher -------------------------------------------------------------------------------------

#: Programs for each multiprocessor where samples alone do not make as many.
WAVES = 2


def linear_softmax_fisher(
    h: Tensor,
    dh: Tensor,
    W: Tensor,
    bias: Tensor | None,
    dW: Tensor | None,
    out: Tensor,
    *,
    precision: str = "ieee",
    config: Config | None = None,
    span: int | None = None,
    widen: bool | None = None,
) -> None:
    """Write the variances of W dh + dW h under softmax(W h + bias).

    Args:
        h: (n, d), d < 2^24.
        dh: (p, n, d).
        W: (c, d), c >= 1.
        bias: (c,) or None.
        dW: (p, c, d) or None.
        out: (p, n), contiguous; fp64 if any input is, else fp32.
        precision: of fp32 products: "ieee", or "tf32", "tf32x3", "bf16x3", "bf16x6".
        config: overrides `choose`.
        span: classes of one split, a multiple of config.classes; by default as many splits as
            fill the device.
        widen: copy 16-bit operands to fp32 first; by default if their types differ, and for bf16
            in the interpreter, which multiplies the bit patterns of bf16 as integers.
    """
    p, n, _ = dh.shape
    c = W.shape[0]
    if p == 0 or n == 0:
        return
    operands = [h, dh, W] if dW is None else [h, dh, W, dW]
    if widen is None:
        widen = interpreted() and h.dtype == torch.bfloat16
    if widen or out.dtype == torch.float64 or len({x.dtype for x in operands}) > 1:
        operands = [x.to(out.dtype) for x in operands]
    operands = [_regular(x) for x in operands]
    h, dh, W = operands[:3]
    dtype, d = h.dtype, h.shape[1]
    shared_limit, processors = limits(h.device, interpreter=1)
    if config is None:
        config = choose(CONFIGS[dtype], dtype, p, shared_limit, moving=dW is not None)
    if W.stride(0) * config.classes >= 2**31:
        W = W.contiguous()  # offsets within a tile are 32-bit
    grid = programs(config, p, n)
    if span is None:
        splits, span = online.split(c, config.classes, grid, WAVES * processors)
    else:
        splits = -(-c // span)
    state = online.states(out, splits)
    with torch.cuda.device_of(h):
        linear_softmax_fisher_kernel[(grid * splits,)](
            h,
            dh.contiguous(),
            W,
            out.new_zeros(c) if bias is None else bias.to(out.dtype).contiguous(),
            W if dW is None else operands[3].contiguous(),
            state,
            p,
            n,
            c,
            d,
            span,
            W.stride(0),
            MOVING=dW is not None,
            TOTAL=online.total(dtype),
            PRECISION="ieee" if interpreted() and precision.startswith("bf16") else precision,
            BLOCK_P=config.directions,
            BLOCK_N=config.samples,
            BLOCK_C=config.classes,
            DEPTH=config.depth,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        online.merge_splits(state, out)


def _regular(x: Tensor) -> Tensor:
    """Make the features a multiple of 16, by zeros, in dense rows that start at 16 bytes.

    Then every piece arrives in 16-byte copies. Other rows would have to pass through registers,
    where the tiles leave no room.
    """
    missing = -x.shape[-1] % 16 if x.shape[-1] else 16
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    dense = x.stride(-1) == 1 and (x.ndim == 2 or x.is_contiguous())
    if dense and x.stride(-2) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# --- ahead-of-time cases --------------------------------------------------------------------------


def _case(dtype: torch.dtype, config: Config, *, moving: bool) -> Case:
    name = NAMES[dtype]
    wide = "fp64" if dtype == torch.float64 else "fp32"
    pointers = dict.fromkeys(("h_ptr", "dh_ptr", "w_ptr", "dw_ptr"), f"*{name}")
    pointers |= dict.fromkeys(("bias_ptr", "state_ptr"), f"*{wide}")
    integers = dict.fromkeys(("p", "n", "c", "d", "span", "w_stride"), "i32")
    return Case(
        kernel=linear_softmax_fisher_kernel,
        helpers=(
            exponential,
            finite,
            nonzero,
            weigh,
            anchor_of,
            moments,
            join,
            merge,
            store_state,
        ),
        label=name + " dW" * moving,
        signature={**pointers, **integers},
        constants={
            "MOVING": moving,
            "TOTAL": online.total(dtype),
            "PRECISION": "ieee",
            "BLOCK_P": config.directions,
            "BLOCK_N": config.samples,
            "BLOCK_C": config.classes,
            "DEPTH": config.depth,
        },
        warps=config.warps,
        stages=config.stages,
        aligned=(*pointers, "d", "span", "w_stride"),
        unit=name,
        shared_bound=shared_bytes(config, dtype, moving=moving),
    )


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    return [
        _case(dtype, config, moving=moving)
        for dtype, configs in CONFIGS.items()
        for config in configs
        for moving in (False, True)
    ]
