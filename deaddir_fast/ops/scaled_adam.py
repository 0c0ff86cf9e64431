"""AdamW in scaled coordinates: the step on w / s, s_oi = row_o col_i, taken on w in place.

Index letters: o rows, i columns of each matrix of a list. With s = row_o col_i

    g~ = g s,   m, v <- Adam moments of g~,   w <- (1 - lr wd) w - lr s m' / (sqrt(v') + eps)

with m', v' bias-corrected as in ``torch.optim.AdamW``; without scales it is AdamW. If s moves with
w under a rescaling of units (w -> c w, g -> g / c, s -> c s), then g~, m, v never see it and the
step moves with w: the path-norm frame of DDCAdam.

Bound: w, m, v read and written and g read once, 28 bytes an element in fp32 (24 with bf16
parameters and gradients: 2 + 2 + 2 for those, 16 for the state, and 2 more where w is rounded);
about 15 FLOP an element. Bound by memory.

Source: AdamW (Loshchilov & Hutter 2019) in the coordinates w / s; our choice of coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deaddir_fast.ops._adam import (
    check_matrices,
    check_step,
    check_vectors,
    scalars,
    store,
    update_moments,
)
from deaddir_fast.ops._dispatch import call


def scale(row: Tensor | None, col: Tensor | None) -> Tensor | None:
    """The scale of every element, broadcastable to the matrix, or None for ones."""
    if row is None:
        return col
    return row[:, None] if col is None else row[:, None] * col


def reference_(
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
    """Take the step in plain torch."""
    for k, (w, g, m, v) in enumerate(zip(ws, gs, ms, vs, strict=True)):
        h = scalars(hyper, m.dtype)
        s = scale(rows[k], cols[k])
        gradient = -g.to(m.dtype) if maximize else g.to(m.dtype)
        u = update_moments(gradient if s is None else gradient * s, m, v, h)
        step = h.lr * u if s is None else h.lr * s * u
        new = h.keep * w.to(m.dtype) - step
        store(w, new, seed, hyper[7], k)


def fake_(
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
    """Nothing is returned; ``ws``, ``ms`` and ``vs`` are written."""


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
) -> None:
    """One AdamW step in the coordinates w / (row_o col_i), in place on several matrices.

    Args:
        ws: k contiguous (o, i) parameters of one dtype; fp64, fp32, bf16 or fp16. Written.
        gs: their gradients, of the same dtype.
        ms, vs: first and second moments of the scaled gradients; fp64 for fp64, else fp32. Written.
        rows: k vectors (o,) or None (ones), of the state's dtype.
        cols: k vectors (i,) or None.
        hyper: (8,) fp64 on the same device, see ``_adam.hyper``.
        maximize: step up the gradient.
        seed: >= 0 rounds bf16 parameters stochastically, reproducibly by (seed, step, position in
            the list, offset); -1 rounds to nearest.

    Raises:
        ValueError, TypeError: an argument of the wrong kind, length, shape, dtype or device.
        RuntimeError: a parameter requires grad outside ``torch.no_grad()``.
    """
    dtype = check_step(ws, gs, ms, hyper, seed)
    check_matrices("vs", vs, ws, dtype)
    device = hyper.device
    check_vectors("rows", rows, [w.shape[0] for w in ws], dtype, device)
    check_vectors("cols", cols, [w.shape[1] for w in ws], dtype, device)
    call(
        "scaled_adam_",
        list(ws),
        list(gs),
        list(ms),
        list(vs),
        list(rows),
        list(cols),
        hyper,
        maximize,
        seed,
    )
