"""KL(softmax(z) || softmax(z + delta)) on a GPU, exact near zero: one pass over the logits.

For classes a with share w_a and tangent delta, and x = delta - mean, let D_a = log E_a[e^x] >= 0;
over all classes that is the divergence (`deaddir_fast.ops.softmax_kl`). Parts of the classes merge
without a second pass: if their means lie s_a away from the joint mean, then

    e^D - 1 = sum_a w_a (e^(s_a + D_a) - 1 - s_a)
            = sum_a w_a (e^s_a (e^D_a - 1) + (e^s_a - 1 - s_a))

of which the second form, near zero, has positive terms only: no digit is lost however small D is.
A class is a part with D = 0. Above e^50 the sum is taken in the log. (Our choice.)

Classes of probability 0 that gain mass are kept apart, as the log of the sum of their
e^(z + delta); it is inf if a class has lost all its mass.

The programs are those of `softmax_fisher`; about 70 operations an entry against 4 or 2 bytes read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _online_softmax as online
from deaddir_fast.kernels._case import Case
from deaddir_fast.kernels._device import limits
from deaddir_fast.kernels._online_softmax import (
    anchor_of,
    excess,
    exponential,
    finite,
    join,
    nonzero,
    power_of_two,
    weigh,
)
from deaddir_fast.kernels.softmax_fisher import WARPS, Config, cases, choose, programs, table


@triton.jit
def log1p(f):
    """log(1 + f) for f >= 0, to full relative accuracy.

    fp64: log(u) f / (u - 1) at the rounded u = 1 + f, which asks for a logarithm good near 1
    (Higham 2002, section 1.14.1). fp32: 2 artanh(f / (2 + f)) up to 1.
    """
    u = 1.0 + f
    if f.dtype == tl.float64:
        near = tl.where(u == 1.0, f, tl.log(u) * (f / (u - 1.0)))
        return tl.where(f <= 1.0, near, tl.log(u))
    else:
        s = f / (2.0 + f)
        square = s * s
        series = tl.zeros_like(f)
        for k in tl.static_range(8):
            series = series * square + 1.0 / (2 * (7 - k) + 1)
        return tl.where(f <= 1.0, 2.0 * s * series, tl.log(u))


@triton.jit
def reference_exponent(peak):
    """The exponent taken out of a sum: ``peak`` where the sum might overflow, else 0."""
    return tl.where(peak > 50.0, peak, 0.0)


@triton.jit
def kept(out):
    """What is left beside terms above e^50 of terms of order 1: nothing (but NaN stays NaN)."""
    return tl.where(out > 0.0, 0.0, 1.0)


@triton.jit
def undo(total, out):
    """log(1 + total e^out), from a sum from which e^out has been taken."""
    return tl.where(out > 0.0, out + tl.log(total), log1p(total))


@triton.jit
def part(share, exponent, s, divergence, out):
    """share (e^(s + D) - 1 - s) e^-out, where exponent = log(share) + s + D."""
    large = exponential(exponent - out) - share * (1.0 + s) * kept(out)
    bounded = tl.where(s > 1.0, 1.0, s)
    growth = exponential(bounded)
    own = tl.where(bounded < -1.0, growth - 1.0 - bounded, excess(bounded))
    small = share * (growth * (divergence + excess(divergence)) + own) * kept(out)
    return tl.where((s > 1.0) | (divergence > 1.0), large, small)


@triton.jit
def log_sum(a, b):
    """log(e^a + e^b), also of infinite a and b."""
    unbounded = (a == float("inf")) | (b == float("inf"))
    a = tl.where(a == float("inf"), 0.0, a)
    b = tl.where(b == float("inf"), 0.0, b)
    top = finite(tl.maximum(a, b))
    total = top + tl.log(exponential(a - top) + exponential(b - top))
    return tl.where(unbounded, total + float("inf"), total)


@triton.jit
def tile_divergence(z, moved, share, largest, log_share):
    """Anchor, offset, D and log of the gained mass for each row of a tile."""
    absent = z == -float("inf")
    leaving = moved == -float("inf")
    delta = tl.where(absent | leaving, 0.0, moved - z)
    anchor = anchor_of(share, largest, delta)
    x = delta - anchor[:, None]
    offset = tl.sum(share * x, 1)
    x -= offset[:, None]

    exponent = log_share + x
    out = reference_exponent(tl.max(exponent, 1))
    certain = moved == float("inf")
    gained = tl.where(absent & (certain == 0), moved, -float("inf"))
    most = finite(tl.max(gained, 1))
    # one exponential serves all: classes gained, far above the mean, and the others
    far = x > 1.0
    argument = tl.where(far, exponent - out[:, None], x)
    power = exponential(tl.where(absent, moved - most[:, None], argument))
    scaled = share * kept(out)[:, None]
    near = tl.where(x < -1.0, power - 1.0 - x, excess(x))
    terms = tl.where(far, power - scaled * (1.0 + x), scaled * near)
    divergence = undo(tl.sum(tl.where(absent, 0.0, terms), 1), out)

    power = tl.where(absent, tl.where(certain, float("inf"), power), 0.0)
    power = tl.where(leaving & (absent == 0), float("inf"), power)
    return anchor, offset, divergence, most + tl.log(tl.sum(power, 1))


@triton.jit
def merge_divergence(
    keep,
    share,
    new_share,
    log_share,
    new_log_share,
    anchor,
    offset,
    divergence,
    new_anchor,
    new_offset,
    new_divergence,
):
    """Anchor, offset and D of a union; ``keep`` is where the old top stays the largest."""
    step = (new_anchor - anchor) + (new_offset - offset)
    s = -new_share * step
    new_s = share * step
    exponent = log_share + s + divergence
    new_exponent = new_log_share + new_s + new_divergence
    out = reference_exponent(tl.maximum(exponent, new_exponent))
    total = part(share, exponent, s, divergence, out)
    total += part(new_share, new_exponent, new_s, new_divergence, out)
    offset = tl.where(keep, offset - s, new_offset - new_s)
    return tl.where(keep, anchor, new_anchor), offset, undo(total, out)


@triton.jit
def log_shares(top, mass, new_top, new_mass, joint, total):
    """Logs of the shares of the two sides of a union, also where a share underflows."""
    common = finite(joint)
    log_total = tl.log(nonzero(total))
    return (
        (top - common) + (tl.log(nonzero(mass)) - log_total),
        (new_top - common) + (tl.log(nonzero(new_mass)) - log_total),
    )


@triton.jit
def finish(top, mass, anchor, offset, divergence, gained):
    """Divergence of whole rows, gained mass included."""
    exponent = (gained - (top + anchor)) - tl.log(mass) - offset
    bounded = tl.where(gained == float("inf"), 0.0, exponent)
    out = reference_exponent(tl.maximum(divergence, bounded))
    total = part(1.0, divergence, 0.0 * divergence, divergence, out) + exponential(bounded - out)
    result = undo(total, out)
    result = tl.where(gained == -float("inf"), divergence, result)
    result = tl.where(gained == float("inf"), divergence + float("inf"), result)
    return tl.where(mass == 0.0, float("nan"), result)


@triton.jit
def softmax_kl_kernel(
    logits_ptr,
    moved_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One of p points, a tile of samples and ``span`` classes.

    logits is (n, c) with row stride logits_stride; moved is (p, n, c) with strides
    direction_stride and sample_stride; out is (p, n), or states (splits, 6, p, n) if SPLIT.
    """
    # Points are neighbours in the grid: they meet the same logits in the cache.
    tiles = tl.cdiv(n, BLOCK_N)
    point = tl.cast(tl.program_id(0) % p, tl.int64)
    program = tl.program_id(0) // p
    split = program // tiles
    sample = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last sample read the last one, and are not stored: masks hold registers.
    row = tl.minimum(sample, n - 1).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    moved_row = moved_ptr + (point * direction_stride + row * sample_stride)
    column = tl.arange(0, BLOCK_C)

    top = tl.full((BLOCK_N,), -float("inf"), TOTAL)
    mass = tl.zeros((BLOCK_N,), TOTAL)
    anchor = tl.zeros((BLOCK_N,), TOTAL)
    offset = tl.zeros((BLOCK_N,), TOTAL)
    divergence = tl.zeros((BLOCK_N,), TOTAL)
    gained = tl.full((BLOCK_N,), -float("inf"), TOTAL)
    for first in range(split * span, tl.minimum(split * span + span, c), BLOCK_C):
        known = (first + column < c)[None, :]
        here = (first + column)[None, :]
        z = tl.load(logits_row[:, None] + here, mask=known, other=-float("inf")).to(TOTAL)
        moved = tl.load(moved_row[:, None] + here, mask=known, other=-float("inf")).to(TOTAL)
        new_top, new_mass, share, largest = weigh(z)
        log_share = (z - finite(new_top)[:, None]) - tl.log(nonzero(new_mass))[:, None]
        new_anchor, new_offset, new_divergence, new_gained = tile_divergence(
            z, moved, share, largest, log_share
        )
        keep = top >= new_top
        joint, total, old_part, new_part = join(top, mass, new_top, new_mass)
        log_old, log_new = log_shares(top, mass, new_top, new_mass, joint, total)
        anchor, offset, divergence = merge_divergence(
            keep,
            old_part,
            new_part,
            log_old,
            log_new,
            anchor,
            offset,
            divergence,
            new_anchor,
            new_offset,
            new_divergence,
        )
        gained = log_sum(gained, new_gained)
        top = joint
        mass = total

    plane = tl.cast(p, tl.int64) * n
    at = point * n + sample
    stored = sample < n
    if SPLIT:
        state = out_ptr + (at + split * 6 * plane)
        tl.store(state, top, mask=stored)
        tl.store(state + plane, mass, mask=stored)
        tl.store(state + 2 * plane, anchor, mask=stored)
        tl.store(state + 3 * plane, offset, mask=stored)
        tl.store(state + 4 * plane, divergence, mask=stored)
        tl.store(state + 5 * plane, gained, mask=stored)
    else:
        tl.store(out_ptr + at, finish(top, mass, anchor, offset, divergence, gained), mask=stored)


@triton.jit
def merge_kl_splits_kernel(state_ptr, out_ptr, plane, splits, BLOCK: tl.constexpr):
    """Merge states (splits, 6, plane) in order and write the divergences (plane,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    step = tl.cast(plane, tl.int64)
    state_ptr += at
    top = tl.load(state_ptr, mask=inside, other=0.0)
    mass = tl.load(state_ptr + step, mask=inside, other=1.0)
    anchor = tl.load(state_ptr + 2 * step, mask=inside, other=0.0)
    offset = tl.load(state_ptr + 3 * step, mask=inside, other=0.0)
    divergence = tl.load(state_ptr + 4 * step, mask=inside, other=0.0)
    gained = tl.load(state_ptr + 5 * step, mask=inside, other=0.0)
    for _ in range(1, splits):
        state_ptr += 6 * step
        new_top = tl.load(state_ptr, mask=inside, other=0.0)
        new_mass = tl.load(state_ptr + step, mask=inside, other=1.0)
        new_anchor = tl.load(state_ptr + 2 * step, mask=inside, other=0.0)
        new_offset = tl.load(state_ptr + 3 * step, mask=inside, other=0.0)
        new_divergence = tl.load(state_ptr + 4 * step, mask=inside, other=0.0)
        new_gained = tl.load(state_ptr + 5 * step, mask=inside, other=0.0)
        keep = top >= new_top
        joint, total, part, new_part = join(top, mass, new_top, new_mass)
        log_old, log_new = log_shares(top, mass, new_top, new_mass, joint, total)
        anchor, offset, divergence = merge_divergence(
            keep,
            part,
            new_part,
            log_old,
            log_new,
            anchor,
            offset,
            divergence,
            new_anchor,
            new_offset,
            new_divergence,
        )
        gained = log_sum(gained, new_gained)
        top = joint
        mass = total
    result = finish(top, mass, anchor, offset, divergence, gained)
    tl.store(out_ptr + at, result, mask=inside)


# --- configurations -------------------------------------------------------------------------------

#: By the type of the operands.
CONFIGS: dict[torch.dtype, tuple[Config, ...]] = {
    torch.bfloat16: table(128, 256, (1,)),
    torch.float16: table(128, 256, (1,)),
    torch.float32: table(128, 256, (1,)),
    torch.float64: (Config(1, 4, 16), Config(1, 1, 64)),  # 128 classes spill on gfx942
}

#: Planes of a state.
PLANES = 6

# --- launcher -------------------------------------------------------------------------------------


def softmax_kl(
    logits: Tensor,
    logits_t: Tensor,
    out: Tensor,
    *,
    config: Config | None = None,
    span: int | None = None,
) -> None:
    """Write KL(softmax(logits) || softmax(logits_t)).

    Args:
        logits: (n, c), c >= 1.
        logits_t: (q, n, c).
        out: (q, n), contiguous; fp64 if logits or logits_t is, else fp32.
        config: overrides `choose`.
        span: classes of one split, a multiple of config.classes; by default as many splits as
            fill the device.
    """
    q, n, c = logits_t.shape
    if q == 0 or n == 0:
        return
    if logits.dtype != logits_t.dtype:
        logits, logits_t = logits.to(out.dtype), logits_t.to(out.dtype)
    logits, logits_t = online.row_major(logits), online.row_major(logits_t)
    if config is None:
        config = choose(CONFIGS[logits_t.dtype], q, c)
    grid = programs(config, q, n)
    if span is None:
        wanted = WARPS * limits(logits_t.device, interpreter=1)[1]
        splits, span = online.split(c, config.classes, grid, wanted)
    else:
        splits = -(-c // span)
    state = online.states(out, splits, PLANES) if splits > 1 else out
    with torch.cuda.device_of(logits_t):
        softmax_kl_kernel[(grid * splits,)](
            logits,
            logits_t,
            state,
            q,
            n,
            c,
            span,
            logits.stride(0),
            logits_t.stride(0),
            logits_t.stride(1),
            TOTAL=online.total(logits_t.dtype),
            SPLIT=splits > 1,
            BLOCK_N=config.samples,
            BLOCK_C=config.classes,
            num_warps=1,
        )
        if splits > 1:
            online.merge_splits(state, out, merge_kl_splits_kernel)


# --- ahead-of-time cases --------------------------------------------------------------------------


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    shared = (excess, power_of_two, exponential, finite, nonzero, join)
    merging = (
        log1p,
        reference_exponent,
        kept,
        undo,
        part,
        log_sum,
        merge_divergence,
        log_shares,
        finish,
    )
    helpers = (*shared, weigh, anchor_of, *merging, tile_divergence)
    return [
        *cases(softmax_kl_kernel, helpers, CONFIGS),
        *online.merge_cases(merge_kl_splits_kernel, (*shared, *merging)),
    ]
