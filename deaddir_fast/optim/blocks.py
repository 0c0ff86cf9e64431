"""The paper's step on blocks of weights that rescale against one another.

A unit is a row of L blocks, b = 1..L, whose scales multiply to one: the incoming and the outgoing
weights of a hidden unit (L = 2), or the L layers of a chain. With rho_b the norm of block b after
weight decay and q_b = <g, W> its radial gradient,

    the total sum q_1 + ... + q_L over sqrt(L) takes a scalar Adam step, spread over the log norms;
    the zero-sum modes (pure gauge, zero up to rounding) take none unless ``vertical``;
    the tangential part of rho_b g takes a per-coordinate Adam step (``ops.block_adam``).

A tangential unit step has length rho_b for a block of one unit, and rho_b over the square root of
the number of rows for a whole layer, so that a learning rate means the same in both.

Source: "Dead Directions" (arXiv 2606.05957), DDCAdam: pairs and chains; the constants are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.ops._adam import direction, scalars
from deaddir_fast.ops.block_adam import block_adam
from deaddir_fast.ops.block_products import block_products
from deaddir_fast.optim.claims import Chain, Units
from deaddir_fast.optim.layout import COLS, ROWS, Layout


@dataclass(frozen=True, eq=False)
class Blocks:
    """Units made of blocks, and where the blocks lie.

    Attributes:
        anchor: name of the parameter that keeps the scalar state.
        layouts: the matrices.
        blocks: per matrix the block of every row or column; block b of unit u is u L + b.
        dims: per matrix 0 where rows belong to blocks, 1 where columns do.
        units, length: number of units, and L.
        breadth: (L,) rows that a block stands for.
        biases: names of the hidden biases of a chain after the first, with the number of blocks
            whose scales multiply to theirs.
    """

    anchor: str
    layouts: tuple[Layout, ...]
    blocks: tuple[Tensor, ...]
    dims: tuple[int, ...]
    units: int
    length: int
    breadth: tuple[int, ...]
    biases: tuple[tuple[str, int], ...] = ()

    @property
    def names(self) -> list[str]:
        """Parameters that take this step, biases of a chain included."""
        return list(dict.fromkeys([lay.name for lay in self.layouts] + [n for n, _ in self.biases]))


def of_pair(found: Units, layouts: Mapping[str, Layout]) -> Blocks:
    """Incoming weights and bias of a unit against its outgoing weights."""
    chosen, blocks, dims = [], [], []
    for slot, owner in zip(found.slots, found.owner, strict=True):
        layout = layouts[slot.parameter]
        chosen.append(layout)
        dims.append(layout.side(slot))
        unit = owner[layout.entries(slot)]
        blocks.append((2 * unit + (slot.exponent < 0)).to(torch.int32))
    return Blocks(
        found.slots[0].parameter,
        tuple(chosen),
        tuple(blocks),
        tuple(dims),
        found.count,
        2,
        (1, 1),
    )


def of_chain(chain: Chain, layouts: Mapping[str, Layout]) -> Blocks:
    """Whole layers against one another; the first bias belongs to the first layer."""
    chosen = [layouts[w] for w in chain.weights]
    number = list(range(len(chosen)))
    first = chain.biases[0]
    if first is not None:
        chosen.append(layouts[first])
        number.append(0)
    later = [(b, n + 1) for n, b in enumerate(chain.biases) if b is not None and n > 0]
    return Blocks(
        chain.weights[0],
        tuple(chosen),
        tuple(
            torch.full((layout.cols if layout.rows == 1 else layout.rows,), n, dtype=torch.int32)
            for layout, n in zip(chosen, number, strict=True)
        ),
        tuple(COLS if layout.rows == 1 else ROWS for layout in chosen),
        1,
        len(chain.weights),
        tuple(layouts[w].rows for w in chain.weights),
        tuple(later),
    )


def zero_sum_modes(length: int) -> Tensor:
    """(L - 1, L) fp64: the cosine basis of the vectors that sum to zero (DCT-II), orthonormal."""
    k = torch.arange(1, length, dtype=torch.float64)[:, None]
    b = torch.arange(length, dtype=torch.float64) + 0.5
    return math.sqrt(2 / length) * torch.cos(math.pi / length * k * b)


def step(
    blocks: Blocks,
    where: Sequence[Tensor],
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    radial_state: tuple[Tensor, Tensor],
    vertical_state: tuple[Tensor, Tensor] | None,
    hyper: Tensor,
    *,
    maximize: bool,
    seed: int,
) -> Tensor:
    """Take the step in place.

    Args:
        blocks: the units.
        where: ``blocks.blocks`` on the device of the parameters.
        ws, gs, ms, vs: matrices of the layouts: parameters, gradients, moments.
        radial_state: (units,) moments of the radial gradient.
        vertical_state: (units, L - 1) moments of the gauge modes, or None to leave them alone.
        hyper, maximize, seed: as in ``ops.scaled_adam``.

    Returns:
        (L,): reach of every block of the first unit, before the step: for a chain the scale of
        a layer's output against its input.
    """
    length = blocks.length
    sums = block_products(ws, gs, where, blocks.dims, blocks.units * length)
    h = scalars(hyper, sums.dtype)
    norms = h.keep.abs() * sums[0].sqrt()
    inner = h.keep * (-sums[1] if maximize else sums[1])
    modes = inner.reshape(blocks.units, length)
    total = modes.sum(1) / math.sqrt(length)
    radial = _scalar_adam(total, *radial_state, hyper)[:, None].expand(-1, length)
    radial = radial / math.sqrt(length)
    if vertical_state is not None:
        basis = zero_sum_modes(length).to(modes)
        radial = radial + _scalar_adam(modes @ basis.T, *vertical_state, hyper) @ basis
    breadth = torch.tensor(blocks.breadth, dtype=sums.dtype, device=sums.device)
    reach = norms.reshape(blocks.units, length) / breadth.sqrt()
    block_adam(
        ws,
        gs,
        ms,
        vs,
        where,
        blocks.dims,
        norms,
        inner,
        radial.reshape(-1).contiguous(),
        reach.reshape(-1),
        hyper,
        maximize=maximize,
        seed=seed,
    )
    return reach[0] if blocks.units else reach.new_ones(length)


def _scalar_adam(g: Tensor, m: Tensor, v: Tensor, hyper: Tensor) -> Tensor:
    """Moments updated in place; the step -lr m' / (sqrt(v') + eps)."""
    h = scalars(hyper, g.dtype)
    m.copy_(m + h.rise1 * (g - m))
    v.copy_(h.fall2 * v + h.rise2 * g * g)
    return -h.lr * direction(m, v, h)
