"""Scaled dot-product attention as one operation, computed tile by tile.

``deaddir::attention`` is what :func:`whole_attention` makes of
``F.scaled_dot_product_attention`` while a model is recorded, so that a rule can treat attention as
a whole. Rows of queries are independent: cut into tiles of rows, no step holds more than a tile
of the (L, S) matrix of weights, and memory is linear in the sequence length. (Our choice; letters:
N leading extents, H heads of keys, G query heads per key head, L queries, S keys, E and V head
sizes.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Elements of the largest tile: on a CPU the tiles in use stay in cache.
_TILE = {"cpu": 1 << 16}
_DEVICE_TILE = 1 << 23
_SMALL = 1 << 12  # tiles below this cost more in calls than they save
_FEWEST_ROWS = 32  # matrix products of fewer rows are slow


@dataclass(frozen=True)
class Shape:
    """Extents of one attention; ``lead`` are those of the query before L and E."""

    lead: tuple[int, ...]
    n: int
    h: int
    g: int
    queries: int
    keys: int
    e: int
    v: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Shape:
        """Read them off (..., H G, L, E), (..., H, S, E) and (..., H, S, V)."""
        *lead, queries, e = query.shape
        h, keys = key.shape[-3], key.shape[-2]
        n = math.prod(lead[:-1])
        return cls(tuple(lead), n, h, lead[-1] // h, queries, keys, e, value.shape[-1])

    @property
    def heads(self) -> int:
        """Key heads over all leading extents."""
        return self.n * self.h

    def split_queries(self, x: Tensor) -> Tensor:
        """(*front, *lead, L, i) -> (*front, N, H, G, L, i), also for outputs and masks."""
        front = x.shape[: x.ndim - len(self.lead) - 2]
        return x.reshape(*front, self.n, self.h, self.g, *x.shape[-2:])

    def split_keys(self, x: Tensor) -> Tensor:
        """(*front, ..., H, S, i) -> (*front, N, H, S, i)."""
        front = x.shape[: x.ndim - len(self.lead) - 2]
        return x.reshape(*front, self.n, self.h, *x.shape[-2:])

    def empty(self, like: Tensor, *front: int) -> tuple[Tensor, Tensor]:
        """Room for an output, as (*front, *lead, L, V) and as (*front, N, H, G, L, V).

        Heads lie next to each other in memory: joining them afterwards copies nothing.
        """
        size = (self.n, self.queries, self.h, self.g, self.v)
        split = like.new_empty(*front, *size).movedim(-4, -2)
        shape = (*front, *self.lead, self.queries, self.v)
        return split.flatten(-4, -3).view(shape), split


@dataclass(frozen=True)
class Plan:
    """How much of an attention is computed at once.

    Attributes:
        heads: key heads of a block.
        rows: queries of a tile.
        points: points of a tile; fewer than all only where heads is 1.
    """

    heads: int
    rows: int
    points: int

    @classmethod
    def of(cls, shape: Shape, points: int, device: str) -> Plan:
        """Tiles no larger than the output, unless they are small or a single row."""
        row = shape.g * shape.keys
        most = max(_TILE.get(device, _DEVICE_TILE), _FEWEST_ROWS * row)
        limit = min(most, max(_SMALL, points * shape.heads * shape.g * shape.queries * shape.v))
        rows = max(1, min(shape.queries, limit // row))
        at_once = max(1, min(points, limit // (rows * row)))
        heads = (
            limit // (at_once * rows * row) if at_once == points and rows == shape.queries else 1
        )
        return cls(max(1, min(shape.heads, heads)), rows, at_once)


def scratch_elements(shape: Shape, device: str) -> int:
    """Numbers :class:`Plan` makes a rule hold beyond its arguments and result, per point.

    Tiles (six where the weights are recomputed because some score moved far), and the operands of
    a block of heads laid out for matrix products.
    """
    plan = Plan.of(shape, 1, device)
    row = shape.g * plan.rows
    keys = shape.keys * (8 * shape.e + 5 * shape.v)
    queries = row * (8 * shape.e + 5 * shape.v)
    return plan.heads * (6 * row * shape.keys + keys + queries)


@dataclass(frozen=True)
class Block:
    """Some heads: ``n`` and ``h`` slice (N, H), one of them without a cut in the other."""

    n: slice
    h: slice

    def take(self, x: Tensor, front: int = 0) -> Tensor:
        """Heads of (P, N, H, ...) as (b, P, ...), or of (N, H, ...) as (b, ...)."""
        if front:
            x = x[:, self.n, self.h]
            order = (1, 2, 0, *range(3, x.ndim))
            return x.permute(order).reshape(-1, x.shape[0], *x.shape[3:])
        x = x[self.n, self.h]
        return x.reshape(-1, *x.shape[2:])


def blocks(shape: Shape, plan: Plan) -> Iterator[Block]:
    """Cut the heads: whole leading extents, or heads of one of them."""
    if plan.heads >= shape.h:
        step = plan.heads // shape.h
        for i in range(0, shape.n, step):
            yield Block(slice(i, min(i + step, shape.n)), slice(0, shape.h))
        return
    for i in range(shape.n):
        for j in range(0, shape.h, plan.heads):
            yield Block(slice(i, i + 1), slice(j, min(j + plan.heads, shape.h)))


@dataclass(frozen=True)
class Masks:
    """What hides keys from queries: a mask spread over (N, H, G, L, S), and causality."""

    mask: Tensor | None
    causal: bool

    @classmethod
    def of(cls, shape: Shape, mask: Tensor | None, causal: bool) -> Masks:
        """From an argument of attention, which may leave extents out or at 1."""
        if mask is not None:
            mask = spread(shape, mask)
        return cls(mask, causal)

    def apply(self, scores: Tensor, block: Block, rows: slice) -> Tensor:
        """Mask scores (b, G rows, S) in place."""
        shown = scores.unflatten(1, (-1, rows.stop - rows.start))
        self.hide_later(shown, rows)
        if self.mask is not None:
            add_mask(shown, block.take(self.mask[..., rows, : scores.shape[-1]]))
        return scores

    def reach(self, block: Block, rows: slice, seen: int) -> int:
        """Of the first ``seen`` keys, those up to the last that a query of a tile sees."""
        if self.mask is None:
            return seen
        mask = self.mask[block.n, block.h, :, rows, :seen]
        shown = mask if mask.dtype == torch.bool else mask != -math.inf
        used = shown.any((0, 1, 2, 3)).nonzero()
        return int(used[-1]) + 1 if len(used) else 1

    def hide_later(self, scores: Tensor, rows: slice) -> None:
        """Causality for scores (..., rows, S), in place."""
        if self.causal:
            i = torch.arange(rows.start, rows.stop, device=scores.device)
            j = torch.arange(scores.shape[-1], device=scores.device)
            scores.masked_fill_(j > i.unsqueeze(1), -math.inf)

    def weights(self, scores: Tensor) -> Tensor:
        """Softmax over keys; a query that sees none has weights 0, as in torch."""
        y = torch.softmax(scores, -1)
        if self.mask is not None:
            y.masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0)
        return y


def add_mask(scores: Tensor, mask: Tensor) -> None:
    """Add a mask to scores in place; a boolean one keeps where it is true."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(mask.logical_not(), -math.inf)
    else:
        scores += mask


def spread(shape: Shape, mask: Tensor, front: int = 0) -> Tensor:
    """A mask (*front, ...) broadcast to (*front, N, H, G, L, S)."""
    size = (*shape.lead, shape.queries, shape.keys)
    ones = (1,) * (len(size) + front - mask.ndim)
    mask = mask.reshape(*mask.shape[:front], *ones, *mask.shape[front:])
    return shape.split_queries(mask.expand(*mask.shape[:front], *size))


def row_tiles(shape: Shape, plan: Plan, causal: bool) -> Iterator[tuple[slice, int]]:
    """Tiles of queries, each with the number of leading keys it can see."""
    for start in range(0, shape.queries, plan.rows):
        stop = min(start + plan.rows, shape.queries)
        yield slice(start, stop), min(stop, shape.keys) if causal else shape.keys


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """softmax(scale Q K^T + mask) V, (..., H G, L, V), tile by tile.

    Args:
        query, key, value: (..., H G, L, E), (..., H, S, E), (..., H, S, V); query head i reads
            key head i // G.
        mask: None, or broadcastable to (..., H G, L, S): boolean (True is seen) or added.
        causal: whether query i sees only the keys up to i.
        scale: factor of the scores.
    """
    shape = Shape.of(query, key, value)
    plan = Plan.of(shape, 1, query.device.type)
    out, split = shape.empty(query)
    masks = Masks.of(shape, mask, causal)
    q, k, v = shape.split_queries(query), shape.split_keys(key), shape.split_keys(value)
    for block in blocks(shape, plan):
        kb, vb = block.take(k), block.take(v)
        for rows, visible in row_tiles(shape, plan, causal):
            seen = masks.reach(block, rows, visible)
            qb = block.take(q[..., rows, :]).flatten(1, 2) * scale
            scores = torch.bmm(qb, kb[:, :seen].mT)
            y = masks.weights(masks.apply(scores, block, rows))
            part = torch.bmm(y, vb[:, :seen])
            at = split[block.n, block.h, :, rows]
            at.copy_(part.view(at.shape))
    return out


@torch.library.custom_op(
    "deaddir::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale)"
    " -> Tensor",
)
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """:func:`attend` as an operation ``torch.ops.deaddir.attention``, without a derivative."""
    return attend(query, key, value, mask, causal, scale)


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    return Shape.of(query, key, value).empty(query)[0]


OPERATION = torch.ops.deaddir.attention.default

# Recording --------------------------------------------------------------------------------------

_TORCH = torch._C._nn.scaled_dot_product_attention
_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


def _leads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool
) -> list[tuple[int, ...]] | None:
    """Extents before the last two of each operand after broadcasting; None where that fails."""
    given = [tuple(x.shape[:-2]) for x in (query, key, value)]
    try:
        if grouped:
            (q, k, v) = (x[-1] for x in given)
            if k != v or q % k:
                return None
            common = torch.broadcast_shapes(*(x[:-1] for x in given))
            leads = [(*common, x[-1]) for x in given]
        else:
            leads = [tuple(torch.broadcast_shapes(*given))] * 3
        size = torch.Size((*leads[0], query.shape[-2], key.shape[-2]))
        if mask is not None and torch.broadcast_shapes(mask.shape, size) != size:
            return None
    except (RuntimeError, IndexError):
        return None
    return leads


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether operands are of the kinds and sizes that are computed here."""
    given = (query, key, value)
    return (
        all(x.dtype == query.dtype and x.ndim >= 2 and x.numel() for x in given)
        and not any(x.is_nested or torch._C._functorch.is_batchedtensor(x) for x in given)
        and query.dtype in (torch.float64, torch.float32)
        and (mask is None or mask.dtype in (torch.bool, query.dtype))
        and query.shape[-1] == key.shape[-1]
        and key.shape[-2] == value.shape[-2]
    )


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` as one operation, or as torch has it where it cannot be.

    Left to torch: dropout, half precision, vmap inside the model, empty operands and arguments it
    would refuse.
    """
    leads = None
    both = is_causal and attn_mask is not None
    if dropout_p == 0 and not both and _is_plain(query, key, value, attn_mask):
        leads = _leads(query, key, value, attn_mask, enable_gqa)
    if leads is None:
        return _TORCH(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = (
        x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:])
        for x, lead in zip((query, key, value), leads, strict=True)
    )
    single = query.ndim == 2
    if single:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    out = attention(query, key, value, attn_mask, is_causal, scale)
    return out.squeeze(0) if single else out


class _Calls(TorchFunctionMode):
    """Catches the function however a model came by it."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return (_whole if func is _TORCH else func)(*args, **(kwargs or {}))


def _by_name(*args: Any, **kwargs: Any) -> Tensor:
    return (_whole if _RECORDING.get() else _TORCH)(*args, **kwargs)


@contextmanager
def whole_attention() -> Iterator[None]:
    """Within: ``F.scaled_dot_product_attention`` is ``torch.ops.deaddir.attention``.

    A function mode is off while it handles a call, as ``F.multi_head_attention_forward`` is one:
    what torch's own functions look up by name is therefore replaced as well.
    """
    before = F.scaled_dot_product_attention
    token = _RECORDING.set(True)
    F.scaled_dot_product_attention = _by_name
    try:
        with _Calls():
            yield
    finally:
        F.scaled_dot_product_attention = before
        _RECORDING.reset(token)
