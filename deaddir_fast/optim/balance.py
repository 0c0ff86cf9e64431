"""One constant per gauge of the frame, fixed at the first step: what the learning rate means.

The frame is determined up to a constant per gauge, and the constant sets how a step is divided
between the writers and the readers of its units. It is chosen so that the starting point, in the
frame, has the least sum of squares: then the two sides are in balance, and at a start that is in
balance as it is (equal norms of neighbouring layers, the usual initialisations) the frame is about
1 and the step is about that of AdamW at the same learning rate. The constants are computed from
the weights in the frame, which no rescaling changes, so they are the same at gauge equivalent
starts. Units written by vectors alone (scales of normalisation layers) keep 1: there AdamW's step
on a scale near 1 is the same as ours.

Source: our choice; layer-wise form of the equi-normalisation of Stock et al. 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deaddir_fast.optim.frame import Frame
from deaddir_fast.optim.layout import COLS, ROWS, Layout, shard_groups

_ROWS_AT_ONCE = 1024
Sums = dict[tuple[int, ...], float]


def constants(
    frame: Frame,
    matrices: Sequence[Tensor],
    layouts: Sequence[Layout],
    parameters: Mapping[str, Tensor],
    shifted: Mapping[str, int],
    still: Mapping[str, Tensor],
) -> Tensor:
    """(gauges,) fp64 on the CPU, in the order of ``frame.order``; collective if sharded.

    Args:
        frame: with scales that do not contain constants.
        matrices, layouts: as given to the frame.
        parameters: name to parameter.
        shifted: {weight of a class shift: its class axis}; their means over classes do not count,
            as a shift would change them.
        still: {bias: entries that a softmax takes back}, which do not count for the same reason.
    """
    total: Sums = {}
    # All processes go through the same groups, whatever they hold of a parameter.
    parts: dict[tuple[Any, ...], Sums] = {}
    for name in dict.fromkeys(s.parameter for f in frame.order for s in f.slots):
        if over := tuple(shard_groups(parameters[name])):
            parts.setdefault(over, {})
    for n, row, col in frame.factors(frame.scales(matrices)):
        layout = layouts[n]
        w = _in_frame(matrices[n], row, col)
        over = tuple(shard_groups(parameters[layout.name]))
        if layout.name in shifted:
            axis = shifted[layout.name]
            summed = shard_groups(parameters[layout.name], (axis,))
            w = w - _class_mean(w, layout, axis, summed)
        if layout.name in still:
            gone = torch.isin(layout.within(COLS), still[layout.name])
            w = w.masked_fill(gone.to(w.device), 0)
        into = parts[over] if over else total
        for exponents, value in _sums(frame, w, layout).items():
            into[exponents] = into.get(exponents, 0.0) + value
    for over, sums in parts.items():
        for group in over:
            gathered: list[Sums] = [{}] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(gathered, sums, group=group)
            sums = {}
            for part in gathered:
                for exponents, value in part.items():
                    sums[exponents] = sums.get(exponents, 0.0) + value
        for exponents, value in sums.items():
            total[exponents] = total.get(exponents, 0.0) + value
    return torch.from_numpy(np.exp(balanced(total, _written_by_matrices(frame, parameters))))


def _in_frame(w: Tensor, row: Tensor | None, col: Tensor | None) -> Tensor:
    out = w.to(torch.float32) if w.dtype.itemsize < 4 else w.clone()
    if row is not None:
        out /= row.to(out)[:, None]
    if col is not None:
        out /= col.to(out)
    return out


def _class_mean(w: Tensor, layout: Layout, axis: int, groups: Sequence[Any]) -> Tensor:
    """Mean over classes, for classes along rows or columns of a plain matrix."""
    dim = ROWS if len(layout.order) > 1 and layout.order[0] == axis else COLS
    sums = w.sum(dim, keepdim=True)
    for group in groups:
        torch.distributed.all_reduce(sums, group=group)
    return sums / layout.shape[axis]


def _sums(frame: Frame, w: Tensor, layout: Layout) -> Sums:
    """Sums of squares of the parts of a matrix that different sets of gauges scale."""
    labels, exponents = zip(*(frame.labels(layout, side) for side in (ROWS, COLS)), strict=True)
    counts = [len(e) for e in exponents]
    out = torch.zeros(counts, dtype=torch.float64, device=w.device)
    rows, cols = (x.to(w.device) for x in labels)
    for start in range(0, w.shape[0], _ROWS_AT_ONCE):
        part = w[start : start + _ROWS_AT_ONCE].to(torch.float64).square()
        wide = part.new_zeros(part.shape[0], counts[1]).index_add_(1, cols, part)
        out.index_add_(0, rows[start : start + _ROWS_AT_ONCE], wide)
    found: Sums = {}
    for (i, one), (j, other) in itertools.product(*map(enumerate, exponents)):
        both = tuple(a + b for a, b in zip(one, other, strict=True))
        found[both] = found.get(both, 0.0) + float(out[i, j])
    return found


def _written_by_matrices(frame: Frame, parameters: Mapping[str, Tensor]) -> list[bool]:
    return [
        any(parameters[s.parameter].ndim > 1 for s in found.slots if s.exponent > 0)
        for found in frame.order
    ]


def balanced(sums: Mapping[tuple[int, ...], float], free: Sequence[bool]) -> np.ndarray:
    """x that minimises sum_b N_b exp(-2 e_b . x), with x_g = 0 where gauge g is not free.

    Args:
        sums: {exponents e_b, one per gauge: N_b >= 0}.
        free: per gauge. One with no positive sum on one of its sides is not free either: the
            minimum would be at infinity.

    Returns:
        (gauges,). Zeros where the sums are not finite.
    """
    x = np.zeros(len(free))
    rows = [(e, n) for e, n in sums.items() if any(e) and n > 0]
    if not rows or not all(np.isfinite(n) for _, n in rows):
        return x
    exponents = np.array([e for e, _ in rows], dtype=np.float64)
    weights = np.log([n for _, n in rows])
    weights -= weights.max()
    chosen = np.array(free) & (exponents > 0).any(0) & (exponents < 0).any(0)
    if not chosen.any():
        return x
    e = -2 * exponents[:, chosen]
    # A little of x^2 keeps a minimum at infinity away without moving a finite one noticeably.
    ridge = 1e-9

    def value(y: np.ndarray) -> float:
        return float(np.exp(weights + e @ y).sum() + 0.5 * ridge * y @ y)

    y = np.zeros(int(chosen.sum()))
    for _ in range(200):
        terms = np.exp(weights + e @ y)
        gradient = e.T @ terms + ridge * y
        hessian = (e * terms[:, None]).T @ e + ridge * np.eye(y.size)
        step = -np.linalg.solve(hessian, gradient)
        slope = float(gradient @ step)
        scale, before = 1.0, value(y)
        # Close to the minimum its value tells no more, and Newton's step needs no damping: the
        # constants have to agree between equivalent starts to rounding.
        if -slope > 1e-6 * before:
            scale = min(1.0, 2.0 / float(np.abs(e @ step).max()))
            while scale > 1e-10 and value(y + scale * step) > before + 0.25 * scale * slope:
                scale /= 2
        y = y + scale * step
        if scale == 1 and float(np.abs(step).max()) < 1e-15 * (1 + float(np.abs(y).max())):
            break
    x[chosen] = y
    return x
