"""AdamW in scaled coordinates on a GPU: one launch for all tensors of a list.

See `_adam` for the step of a block, `_lists` for the table that says who does what. Bound by
memory: w, m, v are read and written once, g is read once; scales come from the cache.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deaddir_fast.kernels import _adam as adam
from deaddir_fast.kernels import _lists as lists
from deaddir_fast.kernels._adam import step_program
from deaddir_fast.kernels._case import Case
from deaddir_fast.kernels._device import limits


@triton.jit(do_not_specialize=["programs", "steps", "seed", "maximize"])
def scaled_adam_kernel(
    table_ptr,
    hyper_ptr,
    programs,
    steps,
    seed,
    maximize,
    FIELDS: tl.constexpr,
    W: tl.constexpr,
    STATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``steps`` blocks of one tensor; the entries of the launch start at ``programs``."""
    step_program(
        table_ptr, hyper_ptr, programs, steps, seed, maximize,
        FIELDS, W, STATE, False, STOCHASTIC, BLOCK, VECTOR,
    )  # fmt: skip


# --- launcher -------------------------------------------------------------------------------------

#: Below this many elements in all the launches cost more than the passes over memory.
WORTHWHILE_ELEMENTS = 2**14


def worthwhile(ws: Sequence[Tensor]) -> bool:
    """Whether one launch beats the reference's twenty for each matrix: but for tiny lists."""
    return len(ws) > 1 or sum(w.numel() for w in ws) >= WORTHWHILE_ELEMENTS


def build(
    ws: Sequence[int],
    gs: Sequence[int],
    ms: Sequence[int],
    vs: Sequence[int],
    rows: Sequence[int],
    cols: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    block: int,
    steps: int,
) -> np.ndarray:
    """The table, from addresses and shapes."""
    table = []
    for w, g, m, v, row, col, (o, i) in zip(ws, gs, ms, vs, rows, cols, shapes, strict=True):
        flag = adam.flags((w, g, m, v), (col,) if row or col else (), i, dtype)
        table.append((w, g, m, v, row, col, o * i, max(1, i), flag, 0, 0, 0))
    return lists.pack(table, [-(-o * i // (block * steps)) for o, i in shapes])


def scaled_adam(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    hyper: Tensor,
    *,
    maximize: bool = False,
    seed: int = -1,
    config: adam.Config | None = None,
    steps: int | None = None,
) -> None:
    """Take one step in place; arguments as in ``ops.scaled_adam``.

    Args:
        config: overrides that of the dtype.
        steps: blocks of a program, by default as many as still fill the device.
    """
    sizes = tuple([w.numel() for w in ws])
    if sum(sizes) == 0:
        return
    dtype, device = ws[0].dtype, hyper.device
    config = config or adam.CONFIGS[dtype]
    if steps is None:
        steps = adam.steps(sizes, config.block, limits(device, interpreter=1)[1])
    every = [lists.addresses(x) for x in (ws, gs, ms, vs, rows, cols)]
    with torch.cuda.device_of(hyper):
        table = lists.table(build, device, *every, lists.shapes(ws), dtype, config.block, steps)
        scaled_adam_kernel[(adam.programs(sizes, config.block * steps),)](
            table,
            hyper,
            len(ws) * adam.FIELDS,
            steps,
            adam.signed32(seed),
            int(maximize),
            **adam.constants(dtype, config, seed),
            num_warps=config.warps,
            enable_fp_fusion=False,
        )


# --- ahead-of-time cases --------------------------------------------------------------------------


def aot() -> list[Case]:
    """List the compilations that have to succeed without a device: all that can be launched."""
    return adam.cases(scaled_adam_kernel, ())
