"""C++ kernels for the optimizer steps of scaled coordinates."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._cpu._launch import extension, kernel


def written(*lists: list[Tensor]) -> None:
    """Tell autograd of tensors written through raw pointers, which torch does not see."""
    torch.autograd.graph.increment_version([t for t in chain(*lists) if not t.is_inference()])


def _scaled_squares(
    ws: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None], dims: list[int]
) -> Tensor:
    total = sum(w.shape[dim] for w, dim in zip(ws, dims, strict=True))
    out = torch.empty(total, dtype=accumulation(*ws))
    extension().scaled_squares(ws, rows, cols, dims, out, torch.get_num_threads())
    return out


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
    threads = torch.get_num_threads()
    extension().scaled_adam(ws, gs, ms, vs, rows, cols, hyper, maximize, seed, threads)
    written(ws, ms, vs)


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
    threads = torch.get_num_threads()
    extension().shared_adam(
        ws, gs, ms, vs, rows, cols, row_groups, col_groups, hyper, maximize, seed, threads
    )
    written(ws, ms, vs)


scaled_squares = kernel(_scaled_squares)
scaled_adam_ = kernel(_scaled_adam_)
shared_adam_ = kernel(_shared_adam_)
