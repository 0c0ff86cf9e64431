"""AdamW in scaled coordinates on a GPU: one launch for all tensors of a list.

See `_adam` for the step of a block, `_lists` for the table that says who does what. Bound by memory:
w, m, v are read and written once, g is read once; scales come from the cache.
"""

import triton
import triton.language as tl

from deaddir_fast.kernels._adam import step_program


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
