"""The rule for attention as a whole: differences and derivatives tile by tile.

With scores s and their difference d, weights y = softmax(s) and values v,

    attention(r) - attention(0) = (sum y e v(r) - t y v(r)) / (1 + t) + y (v(r) - v(0)),

e = expm1(d - sum y d) and t = sum y e: softmax(s + d) = y (1 + e) / (1 + t), and as e is centred
t is of second order, so that nothing cancels. (Our derivation; the shapes of
:mod:`deaddir_fast.nets.attention`, with points P before the rows of a block of b heads.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.nets.attention import (
    OPERATION,
    Block,
    Masks,
    Plan,
    Shape,
    add_mask,
    blocks,
    row_tiles,
    spread,
)
from deaddir_fast.nets.dual_registry import RULES, moving, parts
from deaddir_fast.nets.dual_values import Context, Discrete, Dual, fill, to_dual

_FAR = 30.0  # beyond it the exponential may overflow, and subtraction loses nothing


def _product(x: Tensor, y: Tensor) -> Tensor:
    """(b, P, R, i) times (b, i, o), or times (b, P, i, o)."""
    if y.ndim == 3:
        return torch.bmm(x.flatten(1, 2), y).unflatten(1, x.shape[1:3])
    return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).unflatten(0, x.shape[:2])


def _from_shared(y: Tensor, x: Tensor) -> Tensor:
    """(b, R, S) times (b, P, S, o), as (b, P, R, o)."""
    wide = torch.bmm(y, x.transpose(1, 2).flatten(2))
    return wide.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


@dataclass(frozen=True)
class _Call:
    """An attention whose operands are split into heads; differences None where nothing moves."""

    shape: Shape
    masks: Masks
    scale: float
    q: tuple[Any, Any, Any]
    k: tuple[Any, Any, Any]
    v: tuple[Any, Any, Any]
    mask: tuple[Any, Any]  # difference and derivative of a mask that is added
    seen: Any  # a boolean mask that moves, at each point

    @property
    def products_move(self) -> bool:
        """Whether queries or keys move."""
        return self.q[1] is not None or self.k[1] is not None

    @property
    def scores_move(self) -> bool:
        """Whether the weights depend on the point."""
        return self.products_move or self.mask[0] is not None or self.seen is not None


class _Keys:
    """Keys and values of a block of heads, laid out for matrix products."""

    def __init__(self, call: _Call, block: Block) -> None:
        self.k0, self.v0 = block.take(call.k[0]), block.take(call.v[0])
        self.delta = self.dot = self.at = self.k0
        if call.k[1] is not None:
            dk, tk = block.take(call.k[1], 1), block.take(call.k[2], 1)
            self.at = self.k0.unsqueeze(1) + dk
            # q(r) k(r) - q0 k0 = dq k(r) + q0 dk, and (q k)' = tq k(r) + q(r) tk
            both = call.q[1] is not None
            self.delta = torch.cat([self.at, dk], -1) if both else dk
            self.dot = torch.cat([self.at, tk], -1) if both else tk
        self.values = self.v0
        self.shift: Any = None
        self.slope: Any = None
        if call.v[1] is not None:
            self.shift, self.slope = block.take(call.v[1], 1), block.take(call.v[2], 1)
            self.values = self.v0.unsqueeze(1) + self.shift


class _Tile:
    """Some queries of a block of heads: everything the points share."""

    def __init__(self, call: _Call, keys: _Keys, block: Block, rows: slice, seen: int) -> None:
        self.call, self.keys, self.block, self.rows, self.seen = call, keys, block, rows, seen
        q0, dq, tq = call.q
        self.q0 = block.take(q0[..., rows, :]).flatten(1, 2) * call.scale
        self.delta = self.dot = self.at = self.q0.unsqueeze(1)
        if dq is not None:
            dq = block.take(dq[..., rows, :], 1).flatten(2, 3) * call.scale
            tq = block.take(tq[..., rows, :], 1).flatten(2, 3) * call.scale
            self.at = self.at + dq
            both = call.k[1] is not None
            still = self.q0.unsqueeze(1).expand(dq.shape)
            self.delta = torch.cat([dq, still], -1) if both else dq
            self.dot = torch.cat([tq, self.at], -1) if both else tq
        self.y = call.masks.weights(self._base_scores())
        self.base = torch.bmm(self.y, keys.v0[:, :seen])
        self.shift = None if keys.shift is None else _from_shared(self.y, keys.shift[:, :, :seen])

    def _base_scores(self) -> Tensor:
        scores = torch.bmm(self.q0, self.keys.k0[:, : self.seen].mT)
        return self.call.masks.apply(scores, self.block, self.rows)

    def _product(self, left: Tensor, right: Tensor, at: slice) -> Tensor:
        """Queries times keys at the points ``at``, (b, p, R, S)."""
        p = at.stop - at.start
        left = left.expand(-1, p, -1, -1) if left.shape[1] == 1 else left[:, at]
        return _product(left, self._keys(right, at).mT)

    def _keys(self, x: Tensor, at: slice) -> Tensor:
        return x[:, : self.seen] if x.ndim == 3 else x[:, at, : self.seen]

    def _mask(self, mask: Tensor, at: slice) -> Tensor:
        """A mask (P, N, H, G, L, S) for this tile, (b, p, G, rows, S)."""
        return self.block.take(mask[at][..., self.rows, : self.seen], 1)

    def _shared_mask(self) -> Tensor:
        """The mask at theta0, (b, 1, G, rows, S)."""
        mask = self.call.masks.mask
        assert mask is not None
        return self.block.take(mask[..., self.rows, : self.seen]).unsqueeze(1)

    def _scores(self, left: Tensor, right: Tensor, mask: Any, at: slice) -> Tensor:
        """Difference or derivative of the scores, (b, p, R, S)."""
        if self.call.products_move:
            scores = self._product(left, right, at)
            return scores if mask is None else scores.add_(self._mask(mask, at).flatten(2, 3))
        if mask is not None:
            return self._mask(mask, at).flatten(2, 3).clone()
        b, r, s = self.y.shape
        return self.y.new_zeros(b, at.stop - at.start, r, s)

    def _weights_at(self, at: slice) -> Tensor:
        """The weights at the points, from the scores there."""
        call = self.call
        scores = self._product(self.at, self.keys.at, at)
        shown = scores.unflatten(2, (-1, self.rows.stop - self.rows.start))
        call.masks.hide_later(shown, self.rows)
        if call.seen is not None:
            add_mask(shown, self._mask(call.seen, at))
        elif call.masks.mask is not None:
            mask = self._shared_mask()
            add_mask(shown, mask if call.mask[0] is None else mask + self._mask(call.mask[0], at))
        return call.masks.weights(scores)

    def _far(self, d: Tensor, at: slice) -> Tensor:
        """Rows (b, p, R, 1) of which some difference of a score in use is not small."""
        seen = (self._base_scores() > -math.inf).unsqueeze(1)
        far = (~(d <= _FAR) & seen).any(-1, keepdim=True)
        if self.call.seen is not None:
            now = self._mask(self.call.seen, at)
            before = self._shared_mask()
            far |= (now != before).flatten(2, 3).any(-1, keepdim=True)
        return far

    def move(self, at: slice) -> tuple[Tensor, Tensor]:
        """Difference and derivative at the points ``at``, each (b, p, R, V)."""
        call, keys, y = self.call, self.keys, self.y.unsqueeze(1)
        shift: Any = None if self.shift is None else self.shift[:, at]
        if not call.scores_move:
            return shift, _from_shared(self.y, keys.slope[:, at, : self.seen])
        values = self._keys(keys.values, at)
        d = self._scores(self.delta, keys.delta, call.mask[0], at)
        part = y * d
        d -= part.sum(-1, keepdim=True)
        weights = None
        if call.seen is not None or not bool(d.amax() <= _FAR):
            far, weights = self._far(d, at), self._weights_at(at)
            d.masked_fill_(far, 0).clamp_(max=_FAR)
        part = torch.mul(y, d.expm1_(), out=part)
        total = part.sum(-1, keepdim=True)
        if weights is not None:
            part = torch.where(far, weights - y, (part - total * y) / (1 + total))
            weights = torch.where(far, weights, y + part)
            total = torch.zeros_like(total)
        del d
        delta = _product(part, values)
        base = self.base.unsqueeze(1) if shift is None else self.base.unsqueeze(1) + shift
        delta.addcmul_(base, total, value=-1).div_(1 + total)
        if shift is not None:
            delta += shift
        # y (1 + e), that is 1 + total times the weights at the point
        weights = part.add_(y) if weights is None else weights
        d = self._scores(self.dot, keys.dot, call.mask[1], at).mul_(weights)
        d.addcmul_(weights, d.sum(-1, keepdim=True) / (1 + total), value=-1)
        dot = _product(d, values)
        if keys.slope is not None:
            dot += _product(weights, keys.slope[:, at, : self.seen])
        return delta, dot.div_(1 + total)


def _attention(
    ctx: Context, op: Any, q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float
) -> Any:
    base_of = [x.base if moving(x) else x for x in (q, k, v, mask)]
    dtype = base_of[0].dtype
    q, k, v = (to_dual(x, dtype) if isinstance(x, Discrete) else x for x in (q, k, v))
    if isinstance(mask, Discrete) and mask.base.dtype != torch.bool:
        mask = to_dual(mask, dtype)
    shape = Shape.of(*base_of[:3])
    points = ctx.points.count
    added = [spread(shape, x, 1) for x in parts(mask)[1:]] if isinstance(mask, Dual) else [None] * 2
    call = _Call(
        shape,
        Masks.of(shape, base_of[3], causal),
        scale,
        _split(shape.split_queries, q),
        _split(shape.split_keys, k),
        _split(shape.split_keys, v),
        (added[0], added[1]),
        spread(shape, mask.point, 1) if isinstance(mask, Discrete) else None,
    )
    base, base_split = shape.empty(base_of[0])
    delta, delta_split = shape.empty(base, points)
    dot, dot_split = shape.empty(base, points)
    plan = Plan.of(shape, points, base.device.type)
    out = (base_split.unsqueeze(0), delta_split, dot_split)
    for block in blocks(shape, plan):
        _fill_block(call, plan, points, block, out)
    return Dual(base, delta, dot)


# Functions, so that what one block or tile holds is gone before the next one.


def _fill_block(
    call: _Call, plan: Plan, points: int, block: Block, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    keys = _Keys(call, block)
    for rows, visible in row_tiles(call.shape, plan, call.masks.causal):
        seen = call.masks.reach(block, rows, visible) if call.seen is None else visible
        _fill_tile(_Tile(call, keys, block, rows, seen), plan, points, out)


def _fill_tile(tile: _Tile, plan: Plan, points: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
    base, delta, dot = out
    _write(base, tile, slice(0, 1), tile.base.unsqueeze(1))
    for start in range(0, points, plan.points):
        at = slice(start, min(start + plan.points, points))
        for part, found in zip((delta, dot), tile.move(at), strict=True):
            _write(part, tile, at, found)


def _split(split: Any, x: Any) -> tuple[Any, Any, Any]:
    base, delta, dot = parts(x)
    if delta is None:
        return split(base), None, None
    return split(base), *(split(fill(t, base.shape)) for t in (delta, dot))


def _write(out: Tensor, tile: _Tile, at: slice, found: Tensor) -> None:
    """(b, p, G rows, V) into (P, N, H, G, L, V)."""
    target = out[at, tile.block.n, tile.block.h, :, tile.rows].permute(1, 2, 0, 3, 4, 5)
    target.copy_(found.reshape(target.shape))


RULES[OPERATION.overloadpacket] = _attention
