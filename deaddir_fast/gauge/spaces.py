"""Unit spaces: the sets that axes of tensors are indexed by, and what ties them together.

Every axis longer than 1 of every parameter starts as a space of its own. Operations unify spaces
("entry i here is entry i there"), reshapes split one into a product (heads x features of a head)
and cuts into a sum (gate above up). What is left in the end are leaves; those that no operation
fixed may be permuted wherever they occur.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class Space:
    """``size`` places: a leaf, the product or the sum of ``parts``, or another space's alias.

    Attributes:
        size: number of places, at least 1.
        fixed: some operation tells the places of this leaf apart.
        touched: some operation that is no mere movement of data has met this leaf.
        parts: None for a leaf.
        product: ``parts`` are the factors of a product, outermost first; else summands in order.
        alias: the space this one was unified with.
    """

    size: int
    fixed: bool = False
    touched: bool = False
    parts: list[Space] | None = None
    product: bool = False
    alias: Space | None = None

    def root(self) -> Space:
        """The representative of this space."""
        space = self
        while space.alias is not None:
            space = space.alias
        if space is not self:
            self.alias = space
        return space


Axis = list[Space]  # the factors whose product indexes an axis, outermost first


def factors(axis: Iterable[Space]) -> Axis:
    """The factors of an axis as far as they are known: leaves and sums."""
    out: Axis = []
    for space in axis:
        root = space.root()
        if root.product:
            out += factors(root.parts or ())
        elif root.size > 1:
            out.append(root)
    return out


def summands(space: Space) -> list[Space]:
    """The summands of a space as far as they are known: leaves and products."""
    root = space.root()
    if root.parts is None or root.product:
        return [root]
    return [s for part in root.parts for s in summands(part)]


def leaves(axis: Iterable[Space]) -> Iterator[Space]:
    """All leaves below an axis."""
    for space in axis:
        root = space.root()
        if root.parts is None:
            yield root
        else:
            yield from leaves(root.parts)


def freeze(axis: Iterable[Space]) -> None:
    """The places of this axis are told apart."""
    for leaf in leaves(axis):
        leaf.fixed = True


def touch(axis: Iterable[Space]) -> None:
    """An operation other than a movement of data meets this axis."""
    for leaf in leaves(axis):
        leaf.touched = True


def size(axis: Iterable[Space]) -> int:
    """Number of places of an axis."""
    return math.prod(s.size for s in axis)


def _child(space: Space, places: int) -> Space:
    return Space(places, space.fixed, space.touched)


def split(space: Space, outer: int) -> tuple[Space, Space] | None:
    """Make a space the product of ``outer`` places and the rest; None where that cannot be.

    A sum of equal stretches (steps in time, one after the other) becomes fixed places times one
    stretch.
    """
    inner = space.size // outer
    if space.size % outer or any(s.size % inner for s in summands(space)[1:]):
        return None
    if space.parts is None:
        parts = (_child(space, outer), _child(space, inner))
    else:
        parts = (Space(outer, fixed=True), Space(inner))
        for part in summands(space):
            unify([part], [Space(part.size // inner, fixed=True), parts[1]])
    space.parts, space.product = list(parts), True
    return parts


def cut(space: Space, at: int) -> bool:
    """Make ``at`` a boundary between summands; False where that cannot be."""
    for part in summands(space):
        if at == 0:
            return True
        if at < part.size:
            if part.parts is not None:
                return False
            part.parts = [_child(part, at), _child(part, part.size - at)]
            return True
        at -= part.size
    return at == 0


def segment(axis: Axis, start: int, stop: int) -> Axis | None:
    """The places ``start:stop`` of an axis as an axis; None where that cannot be told."""
    known = factors(axis)
    if not known:
        return None
    first, *rest = known
    inner = size(rest)
    if start % inner or stop % inner:
        return None
    start, stop = start // inner, stop // inner
    if not (cut(first, start) and cut(first, stop)):
        return None
    place, inside = 0, []
    for part in summands(first):
        if start <= place < stop:
            inside.append(part)
        place += part.size
    outer = inside[0] if len(inside) == 1 else Space(stop - start, parts=inside)
    return [s for s in (outer, *rest) if s.size > 1 or s.parts is not None]


def whole(axis: Axis) -> Space:
    """An axis as one space."""
    if len(axis) == 1:
        return axis[0]
    return Space(size(axis), parts=list(axis), product=True)


def unify(a: Iterable[Space], b: Iterable[Space]) -> None:
    """Entry i of one axis is entry i of the other; both are frozen where they do not fit."""
    left, right = factors(a)[::-1], factors(b)[::-1]
    while left and right:
        x, y = left.pop(), right.pop()
        if x is y:
            continue
        if x.size == y.size:
            _merge(x, y)
            continue
        big, small, stack = (x, y, left) if x.size > y.size else (y, x, right)
        parts = split(big, small.size)
        if parts is None:
            freeze([x, y, *left, *right])
            return
        stack.append(parts[1])
        _merge(parts[0], small)


def _merge(x: Space, y: Space) -> None:
    if x.parts is not None and y.parts is None:
        x, y = y, x
    if x.parts is not None:
        _merge_sums(x, y)
    fixed, touched = (x.fixed, x.touched) if x.parts is None else (False, False)
    x.alias, x.parts = y, None
    if fixed:
        freeze([y])
    if touched:
        touch([y])


def _merge_sums(x: Space, y: Space) -> None:
    left, right = summands(x)[::-1], summands(y)[::-1]
    while left and right:
        a, b = left.pop().root(), right.pop().root()
        if a.size == b.size:
            unify([a], [b])
            continue
        big, small, stack = (a, b, left) if a.size > b.size else (b, a, right)
        if big.parts is not None:
            if big.product:
                freeze([a, b, *left, *right])
                return
            stack += summands(big)[::-1]
            (right if stack is left else left).append(small)
            continue
        big.parts = [_child(big, small.size), _child(big, big.size - small.size)]
        stack.append(big.parts[1])
        unify([big.parts[0]], [small])


def coordinates(axis: Sequence[Space]) -> dict[Space, np.ndarray | None]:
    """For each leaf the place in it of every entry of an axis: (size,), -1 where it has none.

    None for a leaf that is met twice at one entry.
    """
    out: dict[Space, np.ndarray | None] = {}
    total = size(axis)
    inner = total
    for space in axis:
        inner //= space.size
        place = np.arange(total) // inner % space.size
        for leaf, own in _own(space.root()).items():
            if leaf in out or own is None:
                out[leaf] = None
            else:
                out[leaf] = own[place]
    return out


def _own(root: Space) -> dict[Space, np.ndarray | None]:
    if root.parts is None:
        return {root: np.arange(root.size)}
    if root.product:
        return coordinates(root.parts)
    out: dict[Space, np.ndarray | None] = {}
    start = 0
    for part in summands(root):
        for leaf, own in coordinates([part]).items():
            if own is None or out.get(leaf, ()) is None:
                out[leaf] = None
                continue
            everywhere = out.setdefault(leaf, np.full(root.size, -1))
            assert everywhere is not None
            everywhere[start : start + part.size] = own
        start += part.size
    return out
