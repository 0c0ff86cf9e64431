"""Optimizer steps on lists of matrices: k matrices (o, i) of one size, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.problems._problem import Draw, Form, Problem, Sizes, wide
from deaddir_fast import ops

#: lr is large, so that a wrong step shows beside the rounding of 16-bit parameters.
LR, BETA1, BETA2, EPS, DECAY, STEP = 0.5, 0.9, 0.98, 1e-8, 0.125, 3
HYPER = (LR, BETA1, BETA2, EPS, DECAY, 1 - BETA1**STEP, 1 - BETA2**STEP, STEP)

SMALL: tuple[Sizes, ...] = (
    {"k": 2, "o": 12, "i": 10},
    {"k": 1, "o": 1, "i": 1},
    {"k": 1, "o": 0, "i": 4},
    {"k": 3, "o": 260, "i": 1096},
)


def _elements(s: Sizes) -> int:
    return s["k"] * s["o"] * s["i"]


# --------------------------------------------------------------------------------------- squares


def _build_squares(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    w = draw.normal(s["k"], s["o"], s["i"])
    return w, wide(draw.normal(s["k"], s["i"])).abs() + 0.5


def _rows(w: Tensor, col: Tensor) -> Tensor:
    return ops.scaled_squares(list(w), [None] * len(w), list(col), [0] * len(w))


def _columns(w: Tensor, col: Tensor) -> Tensor:
    return ops.scaled_squares(list(w), [None] * len(w), list(col), [1] * len(w))


def _each_rows(w: Tensor, col: Tensor) -> Tensor:
    return torch.cat([(wide(x) * c).square().sum(1) for x, c in zip(w, col, strict=True)])


def _each_columns(w: Tensor, col: Tensor) -> Tensor:
    return torch.cat([(wide(x) * c).square().sum(0) for x, c in zip(w, col, strict=True)])


def _each_norm(w: Tensor, col: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(wide(x) * c, dim=1) for x, c in zip(w, col, strict=True)]
    return torch.cat(norms).square()


def _each_product(w: Tensor, col: Tensor) -> Tensor:
    return torch.cat([wide(x).square() @ c.square() for x, c in zip(w, col, strict=True)])


# ------------------------------------------------------------------------------------------ steps


def _build(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    """w, g, m, v stacked, and the hyper-parameters."""
    shape = (s["k"], s["o"], s["i"])
    w, g = draw.normal(*shape), draw.normal(*shape)
    m, v = wide(draw.normal(*shape)), wide(draw.normal(*shape)).abs()
    return w, g, m, v, torch.tensor(HYPER, dtype=torch.float64, device=draw.device)


def _build_scaled(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    row = wide(draw.normal(s["k"], s["o"])).abs() + 0.5
    col = wide(draw.normal(s["k"], s["i"])).abs() + 0.5
    return *_build(s, draw), row, col


def _build_shared(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    """Heads of 128 rows, or of 4 where there are less."""
    w, g, m, v, hyper = _build(s, draw)
    head = 128 if s["o"] >= 128 else 4
    group = torch.arange(s["o"], device=w.device, dtype=torch.int32) // head
    return w, g, m, v[:, : -(-s["o"] // head)].contiguous(), hyper, group


def _moved(args: tuple[Any, ...]) -> float:
    """w, m, v are read and written, g is read."""
    w, g, m, v = args[:4]
    return 2 * (w.nbytes + m.nbytes + v.nbytes) + g.nbytes


def _moved_shared(args: tuple[Any, ...]) -> float:
    """As above, but that g is read twice."""
    return _moved(args) + args[1].nbytes


def _read(*args: Any) -> Tensor:
    """All that a step writes."""
    w, _, m, v = args[:4]
    return torch.cat([x.to(m.dtype).flatten() for x in (w, m, v)])


def _none(w: Tensor) -> list[None]:
    return [None] * len(w)


def _ours(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor) -> None:
    ops.scaled_adam(list(w), list(g), list(m), list(v), _none(w), _none(w), hyper)


def _ours_rounded(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor) -> None:
    ops.scaled_adam(list(w), list(g), list(m), list(v), _none(w), _none(w), hyper, seed=1)


def _ours_scaled(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, row: Tensor, col: Tensor
) -> None:
    ops.scaled_adam(list(w), list(g), list(m), list(v), list(row), list(col), hyper)


def _ours_shared(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, group: Tensor) -> None:
    maps = [group] * len(w)
    ops.shared_adam(
        list(w), list(g), list(m), list(v), _none(w), _none(w), maps, _none(w), hyper
    )  # fmt: skip


def _step(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, scale: Tensor | None, shared: Any
) -> None:
    """Any of the steps as it is written without kernels; ``shared`` averages and spreads v."""
    x = wide(g) if scale is None else wide(g) * scale
    m.lerp_(x, 1 - BETA1)
    square = x * x
    v.mul_(BETA2).add_(square if shared is None else shared[0](square), alpha=1 - BETA2)
    second = v if shared is None else shared[1](v)
    u = m / HYPER[5] / ((second / HYPER[6]).sqrt() + EPS)
    u = u if scale is None else u * scale
    w.copy_((1 - LR * DECAY) * wide(w) - LR * u)


def _eager(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor) -> None:
    for args in zip(w, g, m, v, strict=True):
        _step(*args, hyper, None, None)


def _eager_scaled(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, row: Tensor, col: Tensor
) -> None:
    for *args, r, c in zip(w, g, m, v, row, col, strict=True):
        _step(*args, hyper, r[:, None] * c, None)


def _eager_shared(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, group: Tensor) -> None:
    heads, rows = v.shape[1], w.shape[1]
    index = group.long()
    count = torch.zeros(heads, dtype=v.dtype, device=v.device).index_add(
        0, index, torch.ones(rows, dtype=v.dtype, device=v.device)
    )

    def mean(x: Tensor) -> Tensor:
        return x.new_zeros(heads, x.shape[1]).index_add(0, index, x) / count[:, None]

    for args in zip(w, g, m, v, strict=True):
        _step(*args, hyper, None, (mean, lambda second: second[index]))


def _heads(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, group: Tensor) -> None:
    """The same where heads are neighbouring rows of one number, as a view."""
    heads, rows = v.shape[1], w.shape[1]
    if rows == 0 or rows % heads:
        raise NotImplementedError("heads of one size are needed")
    size = rows // heads

    def mean(x: Tensor) -> Tensor:
        return x.view(heads, size, -1).mean(1)

    for args in zip(w, g, m, v, strict=True):
        _step(*args, hyper, None, (mean, lambda second: second.repeat_interleave(size, 0)))


def _fused(w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor) -> None:
    if w.dtype != m.dtype:
        raise NotImplementedError("fused AdamW takes parameters and state of one type")
    _call_fused(list(w), list(g), list(m), list(v))


def _call_fused(
    ws: Sequence[Tensor], gs: Sequence[Tensor], ms: Sequence[Tensor], vs: Sequence[Tensor]
) -> None:
    """One step of ``torch.optim.AdamW(fused=True)`` without its bookkeeping."""
    number = torch.full((), float(STEP), device=ws[0].device)
    torch._fused_adamw_(
        ws, gs, ms, vs, [], [number] * len(ws), lr=LR, beta1=BETA1, beta2=BETA2,
        weight_decay=DECAY, eps=EPS, amsgrad=False, maximize=False,
    )  # fmt: skip


def _fused_scaled(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, row: Tensor, col: Tensor
) -> None:
    """Fused AdamW on w / s, with the gradients times s."""
    if w.dtype != m.dtype:
        raise NotImplementedError("fused AdamW takes parameters and state of one type")
    scale = row[:, :, None] * col[:, None]
    z, x = w / scale, g * scale
    _call_fused(list(z), list(x), list(m), list(v))
    torch.mul(z, scale, out=w)


FUSED = Form("AdamW(fused=True)", "torch's own kernel on lists", _fused)
EAGER = Form("AdamW by operations", "the formula on each matrix", _eager)

PROBLEMS = (
    Problem(
        name="scaled_squares_rows",
        op="scaled_squares",
        build=_build_squares,
        ours=_rows,
        truth=_each_rows,
        flops=lambda s: 3 * _elements(s),
        small=SMALL,
        by_element=True,
        forms=(
            Form("(w * col).square().sum(1)", "what everyone writes, on each matrix", _each_rows),
            Form("vector_norm(w * col)^2", "one reduction less", _each_norm),
            Form("w^2 @ col^2", "as a product with a vector", _each_product),
        ),
        contiguous=True,
        registered=lambda w, col: (list(w), _none(w), list(col), [0] * len(w)),
    ),
    Problem(
        name="scaled_squares_columns",
        op="scaled_squares",
        build=_build_squares,
        ours=_columns,
        truth=_each_columns,
        flops=lambda s: 3 * _elements(s),
        small=SMALL,
        by_element=True,
        forms=(Form("(w * col).square().sum(0)", "what everyone writes", _each_columns),),
        contiguous=True,
        registered=lambda w, col: (list(w), _none(w), list(col), [1] * len(w)),
    ),
    Problem(
        name="adamw",
        op="scaled_adam_",
        build=_build,
        ours=_ours,
        truth=_eager,
        flops=lambda s: 15 * _elements(s),
        small=SMALL,
        by_element=False,
        forms=(FUSED, EAGER),
        contiguous=True,
        written=_read,
        moved=_moved,
        registered=lambda w, g, m, v, hyper: (
            *(list(x) for x in (w, g, m, v)), _none(w), _none(w), hyper, False, -1,
        ),
    ),
    Problem(
        name="adamw_rounded",
        op="scaled_adam_",
        build=_build,
        ours=_ours_rounded,
        truth=_eager,
        flops=lambda s: 25 * _elements(s),
        small=SMALL,
        by_element=False,
        forms=(EAGER,),
        contiguous=True,
        written=_read,
        moved=_moved,
        registered=lambda w, g, m, v, hyper: (
            *(list(x) for x in (w, g, m, v)), _none(w), _none(w), hyper, True, 2,
        ),
    ),
    Problem(
        name="scaled_adam",
        op="scaled_adam_",
        build=_build_scaled,
        ours=_ours_scaled,
        truth=_eager_scaled,
        flops=lambda s: 18 * _elements(s),
        small=SMALL,
        by_element=False,
        forms=(
            Form("AdamW(fused=True) on w / s", "scale, torch's kernel, scale back", _fused_scaled),
            Form("by operations", "the formula on each matrix", _eager_scaled),
        ),
        contiguous=True,
        written=_read,
        moved=_moved,
        registered=lambda w, g, m, v, hyper, row, col: (
            *(list(x) for x in (w, g, m, v, row, col)), hyper, False, -1,
        ),
    ),
    Problem(
        name="shared_adam",
        op="shared_adam_",
        build=_build_shared,
        ours=_ours_shared,
        truth=_eager_shared,
        flops=lambda s: 17 * _elements(s),
        small=SMALL,
        by_element=False,
        forms=(
            Form("by operations, index_add", "for any groups", _eager_shared),
            Form("by operations, mean of a view", "for heads that are neighbours", _heads),
        ),
        contiguous=True,
        written=_read,
        moved=_moved_shared,
        registered=lambda w, g, m, v, hyper, group: (
            *(list(x) for x in (w, g, m, v)), _none(w), _none(w), [group] * len(w), _none(w),
            hyper, False, -1,
        ),
    ),
)  # fmt: skip
