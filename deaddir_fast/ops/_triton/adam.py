"""Triton kernels of the optimizer steps on lists of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import Kernel
from deaddir_fast.ops._triton._launch import problem

#: Rows and columns are counted in 32 bits, with a block to spare.
EXTENT = 2**31 - 2**16


def _matrices_problem(ws: list[Tensor], *rest: Any) -> str | None:
    if any(max(w.shape) >= EXTENT for w in ws):
        return f"the Triton kernels count rows and columns in 32 bits, and there are over {EXTENT}"
    return problem(ws, *rest)


def _step_problem(ws: list[Tensor], *rest: Any) -> str | None:
    filled = [w.data_ptr() for w in ws if w.numel()]
    if len(set(filled)) < len(filled):
        return "a matrix is in the list twice, and the Triton kernels take all at once"
    return _matrices_problem(ws, *rest)


def _written(*lists: list[Tensor]) -> None:
    """Count the writes through raw pointers, which torch does not see."""
    torch.autograd.graph.increment_version(
        [t for tensors in lists for t in tensors if not t.is_inference()]
    )


def _scaled_squares(
    ws: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None], dims: list[int]
) -> Tensor:
    from deaddir_fast.kernels import scaled_squares as kernel

    dtype = accumulation(*ws)
    if not ws:
        return torch.zeros(0, dtype=dtype)
    total = sum(w.shape[dim] for w, dim in zip(ws, dims, strict=True))
    out = ws[0].new_empty(total, dtype=dtype)
    kernel.scaled_squares(ws, rows, cols, dims, out)
    return out


def _scaled_squares_worthwhile(ws: list[Tensor], *rest: Any) -> bool:
    if not ws or not ws[0].is_cuda:  # the interpreter is for tests
        return False
    from deaddir_fast.kernels import scaled_squares as kernel

    return kernel.worthwhile(ws)


def _scaled_adam_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    hyper: Tensor,
    maximize: bool,
    seed: int,
) -> None:
    from deaddir_fast.kernels import scaled_adam as kernel

    kernel.scaled_adam(ws, gs, ms, vs, rows, cols, hyper, maximize=maximize, seed=seed)
    _written(ws, ms, vs)


def _scaled_adam_worthwhile(ws: list[Tensor], *rest: Any) -> bool:
    if not ws or not ws[0].is_cuda:
        return False
    from deaddir_fast.kernels import scaled_adam as kernel

    return kernel.worthwhile(ws)


def _shared_adam_(
    ws: list[Tensor],
    gs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    row_groups: list[Tensor | None],
    col_groups: list[Tensor | None],
    hyper: Tensor,
    maximize: bool,
    seed: int,
) -> None:
    from deaddir_fast.kernels import shared_adam as kernel

    kernel.shared_adam(
        ws, gs, ms, vs, rows, cols, row_groups, col_groups, hyper, maximize=maximize, seed=seed
    )
    _written(ws, ms, vs)


def _shared_adam_worthwhile(ws: list[Tensor], *rest: Any) -> bool:
    if not ws or not ws[0].is_cuda:
        return False
    from deaddir_fast.kernels import shared_adam as kernel

    return kernel.worthwhile(ws)


scaled_squares = Kernel("triton", _scaled_squares, _matrices_problem, _scaled_squares_worthwhile)
scaled_adam_ = Kernel("triton", _scaled_adam_, _step_problem, _scaled_adam_worthwhile)
shared_adam_ = Kernel("triton", _shared_adam_, _step_problem, _shared_adam_worthwhile)
