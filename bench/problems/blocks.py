"""The step on blocks of units: k matrices (o, i) of one size, in place.

Matrices 0, 2, ... are divided by rows and 1, 3, ... by columns, as the incoming and the outgoing
weights of units are. Every row or column is a block, or every matrix, as a layer of a chain is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.problems import adam
from bench.problems._problem import Draw, Form, Problem, Sizes, wide
from bench.problems.adam import HYPER, LR, SMALL
from deaddir_fast import ops

KEEP = 1 - LR * adam.DECAY

#: Numbers of the blocks of all rows (pairs, o) and of all columns (pairs, i), int32.
Blocks = tuple[Tensor, Tensor]


def _units(s: Sizes, device: str) -> Blocks:
    """A block for every row, or for every column."""
    lines = torch.arange(s["o"] + s["i"], dtype=torch.int32, device=device)
    first = len(lines) * torch.arange(s["k"], dtype=torch.int32, device=device)[:, None]
    rows, cols = lines[: s["o"]], lines[s["o"] :]
    return first[: (s["k"] + 1) // 2] + rows, first[: s["k"] // 2] + cols


def _layers(s: Sizes, device: str) -> Blocks:
    """A block for every matrix."""
    number = torch.arange(s["k"], dtype=torch.int32, device=device)[:, None]
    return number[::2].repeat(1, s["o"]), number[1::2].repeat(1, s["i"])


def _divided(rows: Tensor, cols: Tensor, k: int) -> tuple[list[Tensor], list[int]]:
    """The blocks and the dimension of every matrix."""
    return [(rows, cols)[n % 2][n // 2] for n in range(k)], [n % 2 for n in range(k)]


def _build(divide: Callable[[Sizes, str], Blocks]) -> Callable[[Sizes, Draw], tuple[Any, ...]]:
    """w, g, m, v stacked, hyper-parameters, blocks; then norms, inner, radial, reach (4, b).

    g and m have a good part along w, which the step takes out. Entries of rho g are of order 1.
    """

    def build(s: Sizes, draw: Draw) -> tuple[Any, ...]:
        shape = (s["k"], s["o"], s["i"])
        rows, cols = divide(s, draw.device)
        count = 1 + max((int(x.max()) for x in (rows, cols) if x.numel()), default=-1)
        w = draw.normal(*shape)
        size = (w.numel() / max(1, count)) ** 0.5  # that of rho
        g = draw.normal(*shape, scale=1 / max(1.0, size)).add_(w, alpha=0.5 / max(1.0, size))
        m, v = wide(draw.normal(*shape)).add_(wide(w), alpha=0.5), wide(draw.normal(*shape)).abs()
        squares, inner = _products_by_operations(w, g, rows, cols, count)
        norms = KEEP * squares.sqrt()
        radial = 0.1 * wide(draw.normal(count))
        blocks = torch.stack([norms, KEEP * inner, radial, norms / max(1.0, size)])
        hyper = torch.tensor(HYPER, dtype=torch.float64, device=draw.device)
        return w, g, m, v, hyper, rows, cols, blocks

    return build


def _build_products(s: Sizes, draw: Draw) -> tuple[Any, ...]:
    w, g, _, _, _, rows, cols, blocks = _build(_units)(s, draw)
    return w, g, rows, cols, blocks.shape[1]


# -------------------------------------------------------------------------------------- products


def _products(w: Tensor, g: Tensor, rows: Tensor, cols: Tensor, count: int) -> Tensor:
    return ops.block_products(list(w), list(g), *_divided(rows, cols, len(w)), count)


def _each(
    line_sum: Callable[[Tensor, Tensor, int], Tensor],
) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """The sums of each matrix over its lines, joined by blocks."""

    def run(w: Tensor, g: Tensor, rows: Tensor, cols: Tensor, count: int) -> Tensor:
        out = torch.zeros(2, count, dtype=wide(w[:0]).dtype, device=w.device)
        for x, y, block, dim in zip(w, g, *_divided(rows, cols, len(w)), strict=True):
            x, y = wide(x), wide(y)
            sums = torch.stack([line_sum(x, x, 1 - dim), line_sum(y, x, 1 - dim)])
            out.index_add_(1, block, sums)
        return out

    return run


_products_by_operations = _each(lambda x, y, dim: (x * y).sum(dim))
_products_by_vecdot = _each(lambda x, y, dim: torch.linalg.vecdot(x, y, dim=dim))
_products_by_einsum = _each(lambda x, y, dim: torch.einsum("oi,oi->o" if dim else "oi,oi->i", x, y))


# ------------------------------------------------------------------------------------------ steps


def _ours(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, rows: Tensor, cols: Tensor,
    blocks: Tensor,
) -> None:  # fmt: skip
    divided = _divided(rows, cols, len(w))
    ops.block_adam(list(w), list(g), list(m), list(v), *divided, *blocks, hyper)


def _registered(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, rows: Tensor, cols: Tensor,
    blocks: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    lists = (list(x) for x in (w, g, m, v))
    return *lists, *_divided(rows, cols, len(w)), *blocks, hyper, False, -1


def _direction(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Adam's direction by the formula."""
    m.lerp_(x, 1 - adam.BETA1)
    v.mul_(adam.BETA2).addcmul_(x, x, value=1 - adam.BETA2)
    return m / HYPER[5] / ((v / HYPER[6]).sqrt() + adam.EPS)


def _fused_direction(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """The same as what torch's kernel takes off a parameter that is zero."""
    zero = torch.zeros_like(x)
    adam.call_fused([zero], [x], [m], [v])
    return zero.div_(-LR)


def _by_operations(direction: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., None]:
    """The step as it is written without kernels, on each matrix."""

    def run(
        w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, rows: Tensor, cols: Tensor,
        blocks: Tensor,
    ) -> None:  # fmt: skip
        norms, inner, radial, reach = blocks
        squares = norms.square().where(norms > 0, 1)
        overlap = torch.zeros_like(norms)
        kept = []
        for x, y, *moments, block, dim in zip(
            w, g, m, v, *_divided(rows, cols, len(w)), strict=True
        ):
            w0 = KEEP * wide(x)
            rho, along = (t[block].unsqueeze(1 - dim) for t in (norms, inner / squares))
            u = direction(rho * (wide(y) - along * w0), *moments)
            overlap.index_add_(0, block, (u * w0).sum(1 - dim))
            kept.append((x, w0, u, block, dim))
        for x, w0, u, block, dim in kept:
            grow, step, back = (
                t[block].unsqueeze(1 - dim) for t in (radial.exp(), LR * reach, overlap / squares)
            )
            x.copy_(grow * w0 - step * (u - back * w0))

    return run


def _moved_layers(args: tuple[Any, ...]) -> float:
    """w, m, v are read and written and g is read, then w, m, v are read again: 40 bytes in fp32."""
    w, _, m, v = args[:4]
    return adam.moved(args) + w.nbytes + m.nbytes + v.nbytes


def _moved_units(args: tuple[Any, ...]) -> float:
    """The same for columns, where they are tall; rows are read once: 28 bytes."""
    w, _, m, v = args[:4]
    tall = (len(w) // 2) / max(1, len(w))
    return adam.moved(args) + tall * (w.nbytes + m.nbytes + v.nbytes)


def _step(
    name: str, divide: Callable[[Sizes, str], Blocks], moved: Callable[..., float]
) -> Problem:
    return Problem(
        name=name,
        op="block_adam_",
        build=_build(divide),
        ours=_ours,
        truth=_by_operations(_direction),
        flops=lambda s: 25 * adam.elements(s),
        small=SMALL,
        by_element=False,
        forms=(
            Form(
                "AdamW(fused=True) between",
                "torch's kernel on rho g",
                _by_operations(_fused_direction),
            ),
            Form("by operations", "the formula on each matrix", _by_operations(_direction)),
        ),
        contiguous=True,
        written=adam.read,
        moved=moved,
        registered=_registered,
    )


PROBLEMS = (
    Problem(
        name="block_products",
        op="block_products",
        build=_build_products,
        ours=_products,
        truth=_products_by_operations,
        flops=lambda s: 4 * adam.elements(s),
        small=SMALL,
        by_element=False,
        forms=(
            Form("(w * w).sum(), (g * w).sum()", "what everyone writes", _products_by_operations),
            Form("vecdot", "no products in memory", _products_by_vecdot),
            Form("einsum", "as batched products of vectors", _products_by_einsum),
        ),
        contiguous=True,
        registered=lambda w, g, rows, cols, count: (
            list(w), list(g), *_divided(rows, cols, len(w)), count,
        ),
    ),
    _step("block_adam", _units, _moved_units),
    _step("block_adam_layers", _layers, _moved_layers),
)  # fmt: skip
