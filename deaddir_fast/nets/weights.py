"""Perturbed weights that stay structured: W(r) = W0 + r U without a copy of W per point.

Points are (direction, radius) pairs, direction major. Along each direction a weight moves by a
matrix U that is zero, of rank one (v w^T) or full; runs of neighbouring directions with the same
structure are stored together. Index letters: p directions, r radii, P = p r points, o outputs,
i inputs, m rows (samples and tokens).

The factored product for rank-one directions is our choice: with [d; a'] the difference and the
tangent of the activations, one product with W0 serves all points, and U costs two dot products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deaddir_fast import _check


@dataclass(frozen=True)
class RankOne:
    """Directions of rank one for one parameter of shape (o, ...): U_p = v_p w_p^T.

    Args:
        v: (p, o).
        w: (p, i), with i the product of the parameter's remaining extents.
    """

    v: Tensor
    w: Tensor

    def dense(self, shape: Sequence[int]) -> Tensor:
        """(p, *shape)."""
        return (self.v.unsqueeze(2) * self.w.unsqueeze(1)).reshape(-1, *shape)


# Entries of W(r) formed at once where full-rank directions need them.
_WEIGHTS_AT_ONCE = 1 << 20

Slices = dict[str, "Tensor | RankOne"]


def rank_one_factors(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross approximation of matrices (p, o, i): v (p, o), w (p, i) and where v w^T is exact.

    The row and the column through the largest entry determine a rank-one matrix; it counts as
    exact where every entry agrees to a few roundings of the largest entry. Zero is rank one.
    """
    v, w, worst, pivot = _cross(u)
    return v, w, worst <= 8 * torch.finfo(u.dtype).eps * pivot


def _clearly_not_rank_one(u: Tensor, norms: Tensor) -> Tensor:
    """Where a few rows of matrices (p, o, i) of these norms (p,) already show it; (p,).

    A cross through the largest of a few entries misses a rank-one matrix by a few times the
    rounding of the largest entry of all, which the norm bounds.
    """
    _, _, worst, _ = _cross(u[:, :: -(-u.shape[1] // 8)])
    return worst > 64 * torch.finfo(u.dtype).eps * norms.to(worst.device)


def _cross(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v (p, o), w (p, i), the largest error of v w^T and the largest entry, (p,) each."""
    p, _, i = u.shape
    flat = u.reshape(p, -1)
    at = flat.abs().argmax(1)
    rows, cols, each = at // i, at % i, torch.arange(p, device=u.device)
    pivot = flat[each, at]
    v, w = u[each, :, cols], u[each, rows, :]
    safe = torch.where(pivot == 0, torch.ones_like(pivot), pivot)
    v = v / safe.unsqueeze(1)
    worst = torch.stack(
        [(u[d] - torch.outer(v[d], w[d])).abs().max() for d in range(p)]  # one at a time: memory
    )
    return v, w, worst, pivot.abs()


def _matrix(u: Tensor) -> Tensor:
    return u.reshape(u.shape[0], u.shape[1], -1)


@dataclass(frozen=True)
class Directions:
    """Checked directions: per parameter its slices, per direction its norm and structure.

    Attributes:
        count: p.
        slices: parameter name -> (p, *shape) or :class:`RankOne`; zero slices are left out.
        kinds: parameter name -> (p,) integers: 0 zero, 1 rank one, 2 full.
        norms: (p,) fp64 global norms of the directions as given.
    """

    count: int
    slices: Slices
    kinds: dict[str, Tensor]
    norms: Tensor

    def take(self, index: Tensor | slice) -> Directions:
        """A subset of the directions, in the order of ``index`` (a slice makes no copy)."""

        def pick(x: Tensor) -> Tensor:
            return x[index if isinstance(index, slice) else index.to(x.device)]

        kinds = {k: pick(v) for k, v in self.kinds.items()}
        keep = [k for k, v in kinds.items() if bool((v > 0).any())]
        slices: Slices = {}
        for name in keep:
            u = self.slices[name]
            slices[name] = RankOne(pick(u.v), pick(u.w)) if isinstance(u, RankOne) else pick(u)
        norms = pick(self.norms)
        return Directions(len(norms), slices, {k: kinds[k] for k in keep}, norms)

    def order(self) -> Tensor:
        """A permutation that puts directions with the same structure next to each other."""
        keys = list(zip(*(self.kinds[k].tolist() for k in sorted(self.kinds)), strict=True))
        return torch.tensor(sorted(range(self.count), key=lambda d: keys[d]))


def _checked_slice(name: str, u: Any, value: Tensor) -> Tensor | RankOne:
    argument = f"directions[{name!r}]"
    if isinstance(u, RankOne):
        if value.ndim < 2:
            raise ValueError(f"{argument}: expected a tensor (the parameter is a vector)")
        v = _check.tensor(f"{argument}.v", u.v, ndim=2).detach()
        w = _check.tensor(f"{argument}.w", u.w, ndim=2).detach()
        _check.size(f"{argument}.v", v, 1, value.shape[0], "rows of the parameter")
        _check.size(f"{argument}.w", w, 1, value[0].numel(), "columns of the parameter")
        _check.size(f"{argument}.w", w, 0, v.shape[0], "number of directions in v")
        return RankOne(v.to(value.device, value.dtype), w.to(value.device, value.dtype))
    u = _check.tensor(argument, u).detach()
    if u.ndim != value.ndim + 1 or u.shape[1:] != value.shape:
        shape = ", ".join(["p", *(str(s) for s in value.shape)])
        raise _check.fail(argument, u, f"shape ({shape}): directions, then the parameter's shape")
    return u.to(value.device, value.dtype)


def _square_norms(u: Tensor | RankOne) -> Tensor:
    if isinstance(u, RankOne):
        return _square_norms(u.v) * _square_norms(u.w)
    if u.ndim > 2 and u.dtype == torch.float32:
        # Rows in fp32, many times faster; entries whose squares underflow do not count then.
        rows = torch.linalg.vector_norm(u.flatten(2), dim=2)
        squares = rows.double().square().sum(1).cpu()
        if bool(((squares > 1e-16) & (squares < 1e30)).all()):
            return squares
    flat = u.reshape(len(u), -1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square().cpu()


def check_directions(directions: Any, parameters: Mapping[str, Tensor]) -> Directions:
    """Check directions against a model's parameters and detect their structure.

    Args:
        directions: parameter name -> tensor (p, *shape) or :class:`RankOne`.
        parameters: the model's parameters.

    Raises:
        TypeError, ValueError: naming the entry that is wrong.
    """
    if not isinstance(directions, Mapping):
        raise _check.fail("directions", directions, "a dict {parameter name: tensor}", TypeError)
    if not directions:
        raise ValueError("directions: expected at least one parameter, got an empty dict")
    slices: Slices = {}
    counts: dict[str, int] = {}
    for name, u in directions.items():
        if name not in parameters:
            known = ", ".join(list(parameters)[:8])
            raise ValueError(
                f"directions: no parameter called {name!r} in the model (it has {known}"
                f"{', ...' if len(parameters) > 8 else ''})"
            )
        slices[name] = _checked_slice(name, u, parameters[name])
        first = slices[name]
        counts[name] = len(first.v) if isinstance(first, RankOne) else len(first)
    if len(set(counts.values())) != 1:
        raise ValueError(f"directions: expected one number of directions, got {counts}")
    count = next(iter(counts.values()))
    if count == 0:
        raise ValueError("directions: expected at least one direction, got 0")
    norms = torch.zeros(count, dtype=torch.float64)
    kinds: dict[str, Tensor] = {}
    for name, u in list(slices.items()):
        squares = _square_norms(u)
        if not bool(torch.isfinite(squares).all()):
            at = int((~torch.isfinite(squares)).nonzero()[0])
            raise ValueError(f"directions[{name!r}]: direction {at} is not finite")
        norms += squares
        kind = torch.full((count,), 2)
        if isinstance(u, RankOne):
            kind[:] = 1
        elif u.ndim > 2:
            maybe = ~_clearly_not_rank_one(_matrix(u), squares.sqrt())
            if bool(maybe.any()):
                whole = bool(maybe.all())
                v, w, exact = rank_one_factors(_matrix(u if whole else u[maybe]))
                kind[maybe.cpu().nonzero()[exact.cpu(), 0]] = 1
                if whole and bool(exact.all()):
                    slices[name] = RankOne(v, w)
        kind[squares == 0] = 0
        kinds[name] = kind
    norms = norms.sqrt()
    if bool((norms == 0).any()):
        at = int((norms == 0).nonzero()[0])
        raise ValueError(f"directions: direction {at} is zero, so it cannot be scaled to norm 1")
    live = [k for k in slices if bool((kinds[k] > 0).any())]
    return Directions(count, {k: slices[k] for k in live}, {k: kinds[k] for k in live}, norms)


@dataclass(frozen=True)
class Points:
    """The points theta0 + r u of one chunk, direction major.

    Attributes:
        p: number of directions.
        radii: (r,); P = p r.
        value: (P,) what multiplies U in the perturbation, radius / |direction|.
        tangent: (P,) what multiplies U in the derivative, 1 / |direction|.
        at_base: whether some radius is 0.
        still: whether every radius is 0: only derivatives are propagated then.
    """

    p: int
    radii: Tensor
    value: Tensor
    tangent: Tensor
    at_base: bool
    still: bool

    @property
    def r(self) -> int:
        """Number of radii."""
        return len(self.radii)

    @property
    def count(self) -> int:
        """P."""
        return self.p * self.r

    @classmethod
    def make(cls, norms: Tensor, radii: Tensor, like: Tensor) -> Points:
        """Points of directions with these norms (p,) at radii (r,), as numbers like ``like``."""
        value = (radii / norms.unsqueeze(1)).flatten().to(like.device, like.dtype)
        tangent = (1 / norms).repeat_interleave(len(radii)).to(like.device, like.dtype)
        radii = radii.to(like.device, like.dtype)
        at_base, still = bool((radii == 0).any()), not bool(value.any())
        return cls(len(norms), radii, value, tangent, at_base, still)

    def part(self, start: int, stop: int) -> slice:
        """The points of directions ``start:stop``."""
        return slice(start * self.r, stop * self.r)


def weight_bytes(directions: Directions, parameters: Mapping[str, Tensor], radii: int) -> int:
    """Memory that products with full-rank directions need for W(r), whatever the samples."""
    most = 0
    for name, kind in directions.kinds.items():
        value = parameters[name]
        if value.ndim >= 2 and bool((kind == 2).any()):
            formed = max(value.numel(), min(radii * value.numel() * len(kind), _WEIGHTS_AT_ONCE))
            most = max(most, 2 * formed * value.element_size())
    return most


@dataclass(frozen=True)
class Run:
    """Directions ``start:stop``, all of rank one (``v``, ``w``) or all full (``u``)."""

    start: int
    stop: int
    v: Tensor | None = None  # (d, o)
    w: Tensor | None = None  # (d, i)
    u: Tensor | None = None  # (d, o, i)

    def dense(self) -> Tensor:
        """(d, o, i)."""
        if self.u is not None:
            return self.u
        assert self.v is not None and self.w is not None
        return self.v.unsqueeze(2) * self.w.unsqueeze(1)


def runs(u: Tensor | RankOne, kinds: Tensor) -> list[Run]:
    """Split one parameter's slices (matrix parameters) into runs of equal structure."""
    found: list[Run] = []
    list_of_kinds = kinds.tolist()
    start = 0
    for stop in range(1, len(list_of_kinds) + 1):
        if stop < len(list_of_kinds) and list_of_kinds[stop] == list_of_kinds[start]:
            continue
        kind = list_of_kinds[start]
        if kind and isinstance(u, RankOne):
            found.append(Run(start, stop, v=u.v[start:stop], w=u.w[start:stop]))
        elif kind == 1 and isinstance(u, Tensor):
            v, w, _ = rank_one_factors(_matrix(u[start:stop]))
            found.append(Run(start, stop, v=v, w=w))
        elif kind and isinstance(u, Tensor):
            found.append(Run(start, stop, u=_matrix(u[start:stop])))
        start = stop
    return found


def no_difference(base: Tensor) -> Tensor:
    """The difference of a value at theta0: zeros (1, *S), one for all points, without memory."""
    return base.new_zeros(()).expand(1, *base.shape)


def _along(x: Tensor, w: Tensor) -> Tensor:
    """(d r, m, i), (d, i) -> (d r, m, 1): rows times the vector of their direction."""
    d, (points, m, i) = len(w), x.shape
    rows = x.reshape(d, -1, i)
    if rows.shape[1] * i < 1 << 14 or x.device.type != "cpu":
        return torch.bmm(rows, w.unsqueeze(2)).view(points, m, 1)
    # Batched products with one column are several times slower than matrix-vector ones on a CPU.
    out = x.new_empty(d, rows.shape[1])
    for k in range(d):
        torch.mv(rows[k], w[k], out=out[k])
    return out.view(points, m, 1)


@dataclass(frozen=True)
class Weight:
    """A perturbed parameter with at least two dimensions, not yet used.

    Attributes:
        base: its value at theta0 as the graph sees it (after ``flip`` and ``lead``).
        shape: the shape of the parameter itself.
        runs: how it moves.
        flip: whether the graph has transposed it (matrices only).
        lead: extents the graph has put in front of it by expanding.
    """

    base: Tensor
    shape: tuple[int, ...]
    points: Points
    runs: tuple[Run, ...]
    flip: bool = False
    lead: tuple[int, ...] = ()

    def transposed(self, base: Tensor) -> Weight:
        """The same weight after a matrix transpose."""
        return replace(self, base=base, flip=not self.flip)

    def expanded(self, base: Tensor) -> Weight:
        """The same weight after ``expand`` put dimensions in front of it."""
        return replace(self, base=base, lead=tuple(base.shape[: base.ndim - len(self.shape)]))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Difference and tangent as tensors (P, *base.shape)."""
        points = self.points
        matrix = (self.shape[0], math.prod(self.shape[1:]))
        delta = self.base.new_zeros(points.count, *matrix)
        for run in self.runs:
            u = run.dense().unsqueeze(1).expand(-1, points.r, -1, -1)
            delta[points.part(run.start, run.stop)] = u.flatten(0, 1)
        if points.still:
            dot = delta.mul_(points.tangent.view(-1, 1, 1))
            return no_difference(self.base), self._shaped(dot)
        dot = delta * points.tangent.view(-1, 1, 1)
        delta = delta.mul_(points.value.view(-1, 1, 1))
        return self._shaped(delta), self._shaped(dot)

    def _shaped(self, x: Tensor) -> Tensor:
        x = x.view(-1, *self.shape)
        if self.flip:
            x = x.transpose(-1, -2)
        lead = (1,) * len(self.lead)
        return x.view(-1, *lead, *x.shape[1:]).expand(-1, *self.base.shape) if lead else x

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the parameter by index (an embedding): difference and tangent, (P, ..., i)."""
        points = self.points
        tail = (*index.shape, math.prod(self.shape[1:]))
        rows = self.base.new_zeros(points.p, *tail)
        for run in self.runs:
            if run.u is not None:
                rows[run.start : run.stop] = run.u[:, index]
            else:
                assert run.v is not None and run.w is not None
                w = run.w.view(len(run.w), *(1,) * index.ndim, -1)
                rows[run.start : run.stop] = run.v[:, index].unsqueeze(-1) * w
        wide = rows.unsqueeze(1).expand(-1, points.r, *tail).flatten(0, 1)
        ones = (1,) * len(tail)
        if points.still:
            dot = wide.mul_(points.tangent.view(-1, *ones))
            return no_difference(dot[0]), dot
        return wide * points.value.view(-1, *ones), wide * points.tangent.view(-1, *ones)

    def product(
        self,
        x: Tensor,
        delta: Tensor | None,
        dot: Tensor | None,
        bias: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Difference and tangent of ``x @ W + b`` for rows x: each (P, m, o).

        Args:
            x: (m, i) at theta0.
            delta, dot: (P, m, i) difference and tangent of x, or None where x does not move.
            bias: difference and tangent (P, o) of b.
        """
        matrix = self.base[(0,) * len(self.lead)] if self.lead else self.base
        points, m, o = self.points, x.shape[0], matrix.shape[1]
        if points.still:
            y = self._tangent(matrix, x, dot, None if bias is None else bias[1])
            return no_difference(y[0]), y
        low = [run for run in self.runs if run.u is None]
        full = [run for run in self.runs if run.u is not None]
        out = [x.new_empty(points.count, m, o) for _ in range(2)]
        self._unperturbed(matrix, full, delta, dot, out)
        for run in low:
            whole = run.start == 0 and run.stop == points.p and bias is not None
            self._rank_one(run, x, delta, dot, out, bias if whole else None)
            bias = None if whole else bias
        for run in full:
            self._full(run, matrix, x, delta, dot, out)
        if bias is not None:
            out[0].add_(bias[0].unsqueeze(1))
            out[1].add_(bias[1].unsqueeze(1))
        return out[0], out[1]

    def _tangent(
        self, matrix: Tensor, x: Tensor, dot: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """``dot @ W + x @ U + b`` at radius 0: one product with W and one with each U."""
        points, m, o = self.points, x.shape[0], matrix.shape[1]
        out = x.new_empty(points.count, m, o)
        beta = 1
        if dot is not None:
            torch.mm(dot.flatten(0, 1), matrix, out=out.flatten(0, 1))
        elif sum(run.stop - run.start for run in self.runs) == points.p:
            beta = 0
        else:
            out.zero_()
        for run in self.runs:
            at = points.part(run.start, run.stop)
            tangent = points.tangent[at]
            if run.u is None:
                assert run.v is not None and run.w is not None
                inner, outer = (run.w, run.v) if self.flip else (run.v, run.w)
                left = (inner @ x.t()).repeat_interleave(points.r, 0).unsqueeze(2)
                right = (outer.repeat_interleave(points.r, 0) * tangent.unsqueeze(1)).unsqueeze(1)
                if bias is not None and len(outer) == points.p:
                    # Both in one pass over the result.
                    left = torch.cat([left, torch.ones_like(left)], 2)
                    right = torch.cat([right, bias.unsqueeze(1)], 1)
                    bias = None
                out[at].baddbmm_(left, right, beta=beta)
                continue
            for k, scale in zip(range(at.start, at.stop), tangent.tolist(), strict=True):
                u = run.u[k // points.r - run.start]
                out[k].addmm_(x, u.t() if self.flip else u, beta=beta, alpha=scale)
        return out if bias is None else out.add_(bias.unsqueeze(1))

    def _unperturbed(
        self,
        matrix: Tensor,
        full: list[Run],
        delta: Tensor | None,
        dot: Tensor | None,
        out: list[Tensor],
    ) -> None:
        # Full runs multiply by W0 + r U themselves.
        if delta is None or dot is None:
            out[0].zero_()
            out[1].zero_()
            return
        start = 0
        for run in [*full, None]:
            stop = run.start if run else self.points.p
            at = self.points.part(start, stop)
            start = run.stop if run else stop
            for x, y in zip((delta, dot), out, strict=True):
                if at.start < at.stop:
                    torch.mm(x[at].flatten(0, 1), matrix, out=y[at].flatten(0, 1))

    def _rank_one(
        self,
        run: Run,
        x: Tensor,
        delta: Tensor | None,
        dot: Tensor | None,
        out: list[Tensor],
        bias: tuple[Tensor, Tensor] | None,
    ) -> None:
        assert run.v is not None and run.w is not None
        points = self.points
        at, m = points.part(run.start, run.stop), x.shape[0]
        inner, outer = (run.w, run.v) if self.flip else (run.v, run.w)
        outer = outer.repeat_interleave(points.r, 0)
        value, tangent = points.value[at].view(-1, 1, 1), points.tangent[at].view(-1, 1, 1)
        columns = 1 if bias is None else 2
        left = x.new_ones(2, len(outer), m, columns)
        s = (inner @ x.t()).repeat_interleave(points.r, 0).unsqueeze(2)
        if delta is not None and dot is not None:
            s = s.add_(_along(delta[at], inner))
            left[1, ..., :1] = s * tangent + _along(dot[at], inner) * value
        else:
            left[1, ..., :1] = s * tangent
        left[0, ..., :1] = s.mul_(value)
        for k in range(2):
            right = outer.unsqueeze(1)
            if bias is not None:
                right = torch.stack([outer, bias[k]], 1)
            out[k][at].baddbmm_(left[k], right)

    def _full(
        self,
        run: Run,
        matrix: Tensor,
        x: Tensor,
        delta: Tensor | None,
        dot: Tensor | None,
        out: list[Tensor],
    ) -> None:
        assert run.u is not None
        points, m, o = self.points, x.shape[0], matrix.shape[1]
        block = max(1, _WEIGHTS_AT_ONCE // (points.r * matrix.numel()))
        radii = points.radii.view(1, -1, 1, 1)
        for start in range(run.start, run.stop, block):
            stop = min(start + block, run.stop)
            at, d = points.part(start, stop), stop - start
            u = run.u[start - run.start : stop - run.start]
            u = u.transpose(1, 2) if self.flip else u  # (d, i, o)
            u = u * points.tangent[at][:: points.r].view(-1, 1, 1)
            moved = torch.matmul(x, u).unsqueeze(1)  # (d, 1, m, o), shared by the radii
            y0, y1 = (y[at].view(d, points.r, m, o) for y in out)
            if delta is None or dot is None:
                torch.mul(moved, radii, out=y0)
                y1.copy_(moved.expand_as(y1))
                continue
            # W(r) for these points: with it the difference and the tangent take one product each.
            if points.r * matrix.numel() <= _WEIGHTS_AT_ONCE:
                w = torch.addcmul(matrix, u.unsqueeze(1), radii).flatten(0, 1)
                torch.bmm(delta[at], w, out=out[0][at])
                torch.bmm(dot[at], w, out=out[1][at])
            else:
                for j, k in enumerate(range(at.start, at.stop)):
                    w = torch.addcmul(matrix, u[0], points.radii[j])
                    torch.mm(delta[k], w, out=out[0][k])
                    torch.mm(dot[k], w, out=out[1][k])
            y0.addcmul_(moved, radii)
            y1.add_(moved)
            out[1][at].view(d, points.r * m, o).baddbmm_(delta[at].reshape(d, points.r * m, -1), u)
