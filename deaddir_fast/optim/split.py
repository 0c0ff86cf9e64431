"""The shared-moment step where the parts of a group lie on several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.ops._adam import direction, scalars, store
from deaddir_fast.ops.scaled_adam import scale
from deaddir_fast.ops.shared_adam import spread


def split_shared_adam(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    row_group: Tensor | None,
    col_group: Tensor | None,
    hyper: Tensor,
    groups: Sequence[Any],
    *,
    maximize: bool,
    seed: int,
) -> None:
    """As ``ops.shared_adam`` on one matrix, with means over the parts that all processes hold.

    ``v`` (b, a) is the same on all processes of ``groups``. In plain torch: the sums have to cross
    processes between the two passes of the kernel.
    """
    h = scalars(hyper, m.dtype)
    s = scale(row, col)
    gradient = -g.to(m.dtype) if maximize else g.to(m.dtype)
    gradient = gradient if s is None else gradient * s
    m.copy_(m + h.rise1 * (gradient - m))
    sums = torch.stack([gradient.square(), torch.ones_like(gradient)])
    for dim, group in ((1, row_group), (2, col_group)):
        if group is not None:
            size = [*sums.shape]
            size[dim] = v.shape[dim - 1]
            sums = sums.new_zeros(size).index_add(dim, group.long(), sums)
    for process_group in groups:
        torch.distributed.all_reduce(sums, group=process_group)
    v.copy_(h.fall2 * v + h.rise2 * sums[0] / sums[1])
    u = direction(m, spread(v, row_group, col_group), h)
    step = h.lr * u if s is None else h.lr * s * u
    store(w, h.keep * w.to(m.dtype) - step, seed, hyper[7], 0)
