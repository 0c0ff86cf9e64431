"""Mean and variance under a softmax whose classes arrive in tiles, shared by the kernels.

What is known of some of the classes is the state

    top       largest logit
    mass      sum of e^(z - top)
    anchor    tangent at the likeliest class (of several, the largest)
    offset    mean of the tangent, minus the anchor
    variance  variance of the tangent

and two states merge into that of the union, with the pairwise update of Chan, Golub & LeVeque 1983:
every term of the variance is positive, so it keeps its digits however small, and no mean is formed
that dwarfs it. No classes at all are the state top = -inf, all else 0; a union of probability 0 has
no variance (NaN).
"""

from math import factorial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels._case import Case

#: 1/2!, 1/3!, ...: e^x - 1 - x = x^2 (1/2! + x/3! + ...)
SERIES = tl.constexpr(tuple(1 / factorial(k) for k in range(2, 12)))


@triton.jit
def excess(x):
    """E(x) = e^x - 1 - x for |x| <= 1, to full relative accuracy.

    In fp64 from E(x/8), for which 10 terms do instead of 17: constants of 64 bits fill the scalar
    registers of an AMD GPU. E(2y) = 2 E(y) + (y + E(y))^2.
    """
    if x.dtype == tl.float64:
        y = 0.125 * x
        series = tl.zeros_like(x)
        for k in tl.static_range(10):
            series = series * y + SERIES[9 - k]
        series = series * y * y
        for _ in tl.static_range(3):
            series = 2.0 * series + (y + series) * (y + series)
            y = 2.0 * y
        return series
    else:
        series = tl.zeros_like(x)
        for k in tl.static_range(10):
            series = series * x + SERIES[9 - k]
        return series * x * x


@triton.jit
def power_of_two(k):
    """2^k in fp64, for -1022 <= k <= 1023."""
    return ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponential(x):
    """e^x for x <= 88 (-inf gives 0), to two roundings and with gradual underflow.

    fp32: the exponential of a GPU is 2^y at the rounded y = x log2(e); at x = -80 that costs five
    bits, and results below 2^-126 are flushed to 0. fp64: the series of `excess` does for it too.
    """
    if x.dtype == tl.float64:
        x = tl.where(x < -750.0, -750.0, x)
        k = tl.floor(x * 1.4426950408889634 + 0.5)
        # log(2) in two pieces, the first of 32 bits: k times it is exact
        r = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10
        power = 1.0 + (r + excess(r))
        k = k.to(tl.int32)
        half = k >> 1  # 2^k itself may be no normal number
        return power * power_of_two(half) * power_of_two(k - half)
    else:
        x = tl.where(x < -110.0, -110.0, x)
        y = x * 1.44269502162933349609375  # log2(e), rounded
        lost = tl.fma(x, 1.44269502162933349609375, -y)
        lost = tl.fma(x, 1.925963033500011e-8, lost)  # the rest of log2(e)
        low = y < -64.0
        power = tl.exp2(tl.where(low, y + 64.0, y))
        power = tl.fma(power, lost * 0.6931471805599453, power)
        return power * tl.where(low, 5.421010862427522e-20, 1.0)  # 2^-64


@triton.jit
def finite(top):
    """The maximum of no classes as 0, so that their weights are 0 and not NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def nonzero(mass):
    """The mass of no classes as 1, so that their shares are 0 and not NaN."""
    return tl.where(mass == 0.0, 1.0, mass)


@triton.jit
def weigh(z):
    """Top, mass, shares of the mass and the largest share in each row of a tile of logits."""
    top = tl.max(z, 1)
    weight = exponential(z - finite(top)[:, None])
    mass = tl.sum(weight, 1)
    largest = tl.where(mass == 0.0, 0.0, 1.0 / nonzero(mass))  # e^0 is 1
    return top, mass, weight * largest[:, None], largest


@triton.jit
def anchor_of(share, largest, tangent):
    """The tangent at the likeliest class of each row; one that exists, so that equal ones cancel.

    A maximum needs no index to be carried along and no second look at memory.
    """
    return tl.max(tl.where(share == largest[:, None], tangent, -float("inf")), 1)


@triton.jit
def moments(x, share):
    """Mean and variance of each row of a tile, both relative to the anchor."""
    offset = tl.sum(share * x, 1)
    y = x - offset[:, None]
    return offset, tl.sum(share * y * y, 1)


@triton.jit
def join(top, mass, new_top, new_mass):
    """Top and mass of a union, and the share of either side in it."""
    joint = tl.maximum(top, new_top)
    old = mass * exponential(top - finite(joint))
    new = new_mass * exponential(new_top - finite(joint))
    total = old + new
    scale = 1.0 / nonzero(total)
    return joint, total, old * scale, new * scale


@triton.jit
def merge(keep, part, new_part, anchor, offset, variance, new_anchor, new_offset, new_variance):
    """Anchor, offset and variance of a union; ``keep`` is where the old top stays the largest."""
    step = (new_anchor - anchor) + (new_offset - offset)
    # part * step first: an empty side must not turn a large step into 0 * inf
    between = (part * step) * (new_part * step)
    variance = part * variance + new_part * new_variance + between
    offset = tl.where(keep, offset + new_part * step, new_offset - part * step)
    return tl.where(keep, anchor, new_anchor), offset, variance


@triton.jit
def store_result(out_ptr, at, inside, mass, variance):
    """Write the variances of whole rows."""
    tl.store(out_ptr + at, tl.where(mass == 0.0, float("nan"), variance), mask=inside)


@triton.jit
def store_state(state_ptr, at, plane, inside, top, mass, anchor, offset, variance):
    """Write a state of part of the classes: five planes, ``plane`` (int64) elements apart."""
    state_ptr += at
    tl.store(state_ptr, top, mask=inside)
    tl.store(state_ptr + plane, mass, mask=inside)
    tl.store(state_ptr + 2 * plane, anchor, mask=inside)
    tl.store(state_ptr + 3 * plane, offset, mask=inside)
    tl.store(state_ptr + 4 * plane, variance, mask=inside)


@triton.jit
def merge_splits_kernel(state_ptr, out_ptr, plane, splits, BLOCK: tl.constexpr):
    """Merge states (splits, 5, plane) in order and write the variances (plane,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    step = tl.cast(plane, tl.int64)
    state_ptr += at
    top = tl.load(state_ptr, mask=inside, other=0.0)
    mass = tl.load(state_ptr + step, mask=inside, other=1.0)
    anchor = tl.load(state_ptr + 2 * step, mask=inside, other=0.0)
    offset = tl.load(state_ptr + 3 * step, mask=inside, other=0.0)
    variance = tl.load(state_ptr + 4 * step, mask=inside, other=0.0)
    for _ in range(1, splits):
        state_ptr += 5 * step
        new_top = tl.load(state_ptr, mask=inside, other=0.0)
        new_mass = tl.load(state_ptr + step, mask=inside, other=1.0)
        new_anchor = tl.load(state_ptr + 2 * step, mask=inside, other=0.0)
        new_offset = tl.load(state_ptr + 3 * step, mask=inside, other=0.0)
        new_variance = tl.load(state_ptr + 4 * step, mask=inside, other=0.0)
        keep = top >= new_top
        top, mass, part, new_part = join(top, mass, new_top, new_mass)
        anchor, offset, variance = merge(
            keep, part, new_part, anchor, offset, variance, new_anchor, new_offset, new_variance
        )
    store_result(out_ptr, at, inside, mass, variance)


# --- launching ------------------------------------------------------------------------------------

#: Planes of a state, and variances that one program merges.
PLANES = 5
BLOCK = 128


def states(out: Tensor, splits: int, planes: int = PLANES) -> Tensor:
    """Workspace for the states of each split."""
    return out.new_empty((splits, planes, *out.shape))


def merge_splits(state: Tensor, out: Tensor, kernel: Any = merge_splits_kernel) -> None:
    """Merge states (splits, planes, p, n) into results (p, n)."""
    grid = (-(-out.numel() // BLOCK),)
    kernel[grid](state, out, out.numel(), state.shape[0], BLOCK=BLOCK, num_warps=4)


def split(length: int, tile: int, programs: int, wanted: int) -> tuple[int, int]:
    """Cut ``length`` classes, whole tiles, so that ``programs`` become about ``wanted``.

    Returns the number of splits and the classes of each, the last of which may have fewer.
    """
    tiles = -(-length // tile)
    splits = max(1, min(tiles, wanted // max(1, programs)))
    each = -(-tiles // splits)
    return -(-tiles // each), each * tile


def row_major(x: Tensor) -> Tensor:
    """Copy ``x`` only if its last dimension is not laid out densely."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


# --- ahead-of-time cases --------------------------------------------------------------------------


def total(dtype: torch.dtype) -> Any:
    """Triton's type of the sums over operands of a type."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def merge_cases(kernel: Any, helpers: tuple[Any, ...]) -> list[Case]:
    """List the compilations of a kernel that merges states."""
    return [
        Case(
            kernel=kernel,
            helpers=helpers,
            label=name,
            signature={
                "state_ptr": f"*{name}",
                "out_ptr": f"*{name}",
                "plane": "i32",
                "splits": "i32",
            },
            constants={"BLOCK": BLOCK},
            warps=4,
            stages=3,
            aligned=("state_ptr", "out_ptr"),
            unit="elementwise",
            shared_bound=1,
        )
        for name in ("fp32", "fp64")
    ]


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device."""
    helpers = (excess, power_of_two, exponential, finite, nonzero, join, merge, store_result)
    return merge_cases(merge_splits_kernel, helpers)
