"""From streams of (a, g) to the sums Σ a aᵀ and Σ g gᵀ of every layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.fisher.accumulate import GramSum, GroupedSum, diagonal
from deaddir_fast.fisher.factors import LayerFactors
from deaddir_fast.nets.layers.base import Cut, Layer
from deaddir_fast.nets.layers.embedding import Embedding
from deaddir_fast.nets.survey import Survey

#: A head of more outputs than this has no matrix G: its softmax form is used instead.
LARGEST_HEAD = 8192


class NotShared(ValueError):
    """Two layers that received one tensor on the first samples do not on others."""


@dataclass
class _Sums:
    a: GramSum | None  # none where another layer's is used, or A is no matrix
    g: GramSum | None  # none where the head's G is a diagonal
    counts: Tensor | None = None  # embeddings
    diagonal: Tensor | None = None  # the head's G
    rows: int = 0


class Collector:
    """Sums of all layers over the batches it is shown.

    Callbacks for :class:`deaddir_fast.nets.streams.Streams`; call :meth:`begin` before a batch and
    :meth:`end_pass` after each backward pass.

    Args:
        survey: the layers.
        dtype: of the sums; None follows the rows (fp64 for fp64, else fp32).
        kfac: "expand" (one row per token) or "reduce" (a averaged, g summed over tokens).
        closed_head: whether the head's G is held as the diagonal given by :meth:`head_diagonal`.
        scale: factor of every gradient (1/√draws).
    """

    def __init__(
        self,
        survey: Survey,
        *,
        dtype: torch.dtype | None,
        kfac: str,
        closed_head: bool,
        scale: float = 1.0,
    ) -> None:
        self.survey, self.dtype, self.kfac = survey, dtype, kfac
        self.closed_head = survey.head if closed_head else None
        self.scale = scale
        self._with_ones = {
            survey.leaders.get(name, name)
            for name, layer in survey.layers.items()
            if layer.bias is not None
        }
        self.samples = 0
        self.notes: dict[str, None] = {}
        self._sums: dict[str, _Sums] = {}
        self._n = 0
        self._mask: Tensor | None = None
        self._inputs: dict[str, tuple[Tensor, int]] = {}  # of leaders, while followers are due
        self._followers = Counter(survey.leaders.values())
        self._due = self._followers.copy()
        self._pending: dict[str, Tensor] = {}
        self._averaged: dict[str, tuple[Tensor, int]] = {}

    def begin(self, n: int, mask: Tensor | None) -> None:
        """Start a batch of n samples.

        Args:
            n: number of samples.
            mask: (n, t) which tokens count, or None for all.
        """
        self._n, self._mask = n, mask
        self.samples += n
        self._inputs.clear()
        self._due = self._followers.copy()

    def _of(self, layer: Layer, like: Tensor) -> _Sums:
        if layer.name not in self._sums:
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            dtype = self.dtype or wide

            def start(width: int, alpha: float, ones: bool) -> GramSum:
                where: tuple[torch.dtype, torch.device] = (dtype, like.device)
                if layer.groups > 1:
                    return GroupedSum(layer.groups, width, *where, alpha=alpha, ones=ones)
                return GramSum(width, *where, alpha=alpha, ones=ones)

            own = layer.form == "matrix" and layer.name not in self.survey.leaders
            closed = layer.name == self.closed_head
            self._sums[layer.name] = _Sums(
                start(layer.inputs, 1.0, layer.name in self._with_ones) if own else None,
                # The factor of the gradients goes to the product, which costs nothing.
                None if closed else start(layer.outputs, self.scale**2, False),
            )
        return self._sums[layer.name]

    def _kept(self, layer: Layer, rows: Tensor, cut: Cut | None = None) -> Tensor:
        """(m, ...): the rows that count, of (n, t, ...)."""
        if self._mask is not None:
            keep = layer.keep(self._mask, rows, cut)
            if keep is not None:
                return rows[keep]
            if rows.shape[1] > 1 and layer.kind != "norm":
                self._padded(layer)
        return rows.flatten(0, 1)

    def _padded(self, layer: Layer) -> None:
        self.notes[f"{layer.name}: its rows do not match the mask; rows of padding are counted"] = (
            None
        )

    def on_input(self, layer: Layer, x: Tensor) -> None:
        """Take what a layer receives."""
        n = self._n
        if layer.form == "one":
            self._of(layer, x)
            return
        if isinstance(layer, Embedding):
            self._count(layer, x)
            return
        leader = self.survey.leaders.get(layer.name)
        if leader is not None:
            seen = self._inputs.get(leader)
            if seen is None or seen[0] is not x or seen[1] != x._version:
                raise NotShared(
                    f"model: {layer.name} and {leader} received one tensor on the first samples "
                    "but not on these; pass share_inputs=False"
                )
            self._of(layer, x)
            self._due[leader] -= 1
            if not self._due[leader]:
                del self._inputs[leader]  # not kept alive for longer than needed
            return
        if self._followers[layer.name]:
            self._inputs[layer.name] = (x, x._version)
        if self.kfac == "reduce":
            self._average(layer, x)
            return
        for piece, cut in layer.pieces(x, n):
            total = self._of(layer, piece).a
            assert total is not None
            total.add(self._kept(layer, piece, cut))

    def _count(self, layer: Embedding, x: Tensor) -> None:
        rows = layer.rows(x, self._n)[..., 0]
        keep = None if self._mask is None else layer.keep(self._mask, rows.unsqueeze(-1))
        dtype = next(layer.module.parameters()).dtype
        sums = self._of(layer, torch.empty(0, dtype=dtype, device=x.device))
        counts = layer.counts(rows, keep).to(torch.float64)
        sums.counts = counts if sums.counts is None else sums.counts + counts
        sums.rows += int(rows.numel() if keep is None else keep.sum())

    def _average(self, layer: Layer, x: Tensor) -> None:
        if layer.routed or layer.layout == "unknown":
            raise ValueError(
                f"kfac: 'reduce' needs rows that belong to samples, {layer.name} has none"
            )
        mean, aligned = layer.average(x, self._n, self._mask)
        if not aligned:
            self._padded(layer)
        calls = self.survey.calls.get(layer.name, 1)
        total, seen = self._averaged.pop(layer.name, (torch.zeros_like(mean), 0))
        total, seen = total + mean / calls, seen + 1
        if seen < calls:
            self._averaged[layer.name] = (total, seen)
            return
        into = self._of(layer, total).a
        assert into is not None
        into.add(total)

    def on_gradient(self, layer: Layer, grad: Tensor, x: Tensor | None) -> None:
        """Take the gradient of what a layer returns."""
        if layer.name == self.closed_head:
            return
        g = layer.gradients(grad, self._n, x)
        several = self.survey.calls.get(layer.name, 1) > 1
        if layer.kind == "norm" or self.kfac == "reduce":
            g = g.sum(1)
            if several:
                # Uses of one weight add up inside the square.
                held = self._pending.get(layer.name)
                self._pending[layer.name] = g if held is None else held + g
                return
            self._add_gradient(layer, g)
            return
        self._add_gradient(layer, self._kept(layer, g))

    def _add_gradient(self, layer: Layer, g: Tensor) -> None:
        total = self._of(layer, g).g
        assert total is not None
        total.add(g)

    def end_pass(self) -> None:
        """A backward pass is over."""
        for name, g in self._pending.items():
            self._add_gradient(self.survey.layers[name], g)
        self._pending.clear()

    def head_diagonal(self, z: Tensor, mask: Tensor | None) -> None:
        """Add the diagonal of the softmax Fisher, Σ p (1 − p), of outputs (n, ..., c)."""
        assert self.closed_head is not None
        rows = z.detach().reshape(-1, z.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1)]
        sums = self._of(self.survey.layers[self.closed_head], rows)
        if sums.diagonal is None:
            sums.diagonal = torch.zeros(z.shape[-1], dtype=torch.float64, device=z.device)
        # Few enough for the passes over them to stay in cache.
        for some in rows.split(max(1, (1 << 18) // z.shape[-1])):
            p = torch.softmax(some if some.dtype == torch.float64 else some.float(), -1)
            # 1 − p of the likeliest class is the sum of the others: p may be 1 to rounding.
            top = p.argmax(-1, keepdim=True)
            largest = p.gather(-1, top)
            p.scatter_(-1, top, 0.0)
            variance = largest.mul_(p.sum(-1, keepdim=True))
            p.addcmul_(p, p, value=-1.0).scatter_(-1, top, variance)
            sums.diagonal += (p.new_ones(1, len(p)) @ p)[0]

    def result(self) -> dict[str, LayerFactors]:
        """Factors of every layer that was used."""
        layers: dict[str, LayerFactors] = {}
        for name, layer in self.survey.layers.items():
            sums = self._sums.get(name)
            if sums is None:
                self.notes[f"{name}: not used by any of the inputs"] = None
                continue
            for total in (sums.a, sums.g):
                if total is not None:
                    total.release()
            layers[name] = self._factors(layer, sums, layers)
        return layers

    def _factors(self, layer: Layer, sums: _Sums, before: dict[str, LayerFactors]) -> LayerFactors:
        leader = self.survey.leaders.get(layer.name)
        rows, empty = sums.rows, torch.zeros(0, dtype=torch.float64)
        if leader is not None:
            a, ones, rows = before[leader].A_sum, before[leader].A_ones, before[leader].rows
        elif sums.counts is not None:
            a, ones = sums.counts, empty
        elif layer.form == "one":
            a, ones, rows = empty, empty, self.samples
        else:
            assert sums.a is not None
            a, ones, rows = sums.a.packed, sums.a.sums, sums.a.count
        if sums.g is None:
            assert sums.diagonal is not None
            g, form = sums.diagonal, "diagonal"
        else:
            g, form = sums.g.packed, "matrix"
        of_a = diagonal(a) if layer.form == "matrix" else a
        of_g = diagonal(g) if form == "matrix" else g
        # Squares: what is not finite in a row, or overflows in a sum, does so on the diagonal.
        for what, total in (("inputs", of_a), ("gradients", of_g)):
            if not bool(torch.isfinite(total).all()):
                self.notes[f"{layer.name}: its {what} are not all finite"] = None
        return LayerFactors(
            layer.name, layer.kind, layer.weight, layer.bias, layer.form, form,
            layer.inputs, layer.outputs, layer.groups, a, ones, g, rows, self.samples, leader,
        )  # fmt: skip
