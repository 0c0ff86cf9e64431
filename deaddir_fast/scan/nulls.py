"""Null spaces of a layer's factors, split into what always holds and what holds on the data.

W may move along v wᵀ with A w = 0 without changing any output on the data (the layer's own output
stays the same), whatever v is: those directions are flat, exactly. With G v = 0 the output moves
where, to first order, nothing downstream sees it: the order of such a direction has to be measured.
Inputs made up at random tell apart what the architecture implies (a LayerNorm's kernel, a shift of
all classes) from what these data leave undetermined (unused inputs, dead units). (Our choice.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.fisher.kron import Settings, as_batch, list_of_seeds, output_mask
from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.nets.layers.embedding import Embedding
from deaddir_fast.nets.sharded import is_sharded, whole
from deaddir_fast.nets.streams import Streams
from deaddir_fast.nets.survey import Survey
from deaddir_fast.scan.spectra import Spectrum, rounding


@dataclass(frozen=True, eq=False)
class Null:
    """Null space of one factor.

    Attributes:
        always: (d, p) orthonormal basis of what is null on made-up inputs too; of a diagonal, (p,)
            indices.
        here: (d, q) or (q,): its complement, null on the data only.
        dimension: d.
        checked: whether made-up inputs reached the layer at all.
    """

    always: Tensor
    here: Tensor
    dimension: int
    checked: bool

    def part(self, always: bool) -> Tensor:
        """One of the two."""
        return self.always if always else self.here

    def count(self, always: bool) -> int:
        """Dimension of one of the two."""
        return self.part(always).shape[-1]

    def random(self, always: bool, columns: int, generator: torch.Generator) -> Tensor:
        """(d, columns) generic vectors in one of the two."""
        basis = self.part(always)
        mixed = torch.randn(basis.shape[-1], columns, generator=generator, dtype=torch.float64)
        if basis.ndim == 2:
            return basis @ mixed
        out = torch.zeros(self.dimension, columns, dtype=torch.float64)
        out[basis] = mixed
        return out

    def without(self, vector: Tensor) -> Null:
        """The null space without a vector, if that lies in one of its parts."""
        return Null(
            _without(self.always, vector), _without(self.here, vector), self.dimension, self.checked
        )


def _without(basis: Tensor, vector: Tensor) -> Tensor:
    if basis.ndim == 1 or not basis.shape[1]:
        return basis
    inside = basis.mT @ vector
    if float(inside.norm()) < 0.999:
        return basis
    rest = basis - torch.outer(basis @ inside, inside) / float(inside @ inside)
    left, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    return left[:, sizes > 0.5]


@dataclass
class _Projected:
    """Σ of made-up rows projected onto a null space, and their whole energy."""

    basis: Tensor
    precision: torch.dtype
    energy: float = 0.0
    rows: int = 0
    gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        wide = rows.to(torch.float64)
        inside = wide @ self.basis.to(wide.device)
        gram = inside.mT @ inside
        self.gram = gram if self.gram is None else self.gram + gram
        self.energy += float(wide.square().sum())
        self.rows += len(rows)

    def split(self) -> Null:
        if self.gram is None or not self.rows or not self.energy:
            return Null(self.basis[:, :0], self.basis, len(self.basis), False)
        values, turn = torch.linalg.eigh(self.gram.cpu())
        floor = rounding(self.precision, torch.float64, self.basis.shape[0]) * self.energy
        count = int((values <= floor).sum())
        turned = self.basis @ turn
        return Null(turned[:, :count], turned[:, count:], len(self.basis), True)


def split_nulls(
    model: nn.Module,
    survey: Survey,
    spectra: Mapping[str, tuple[Spectrum, Spectrum]],
    batches: Iterable[Any],
    settings: Settings,
    precision: torch.dtype,
) -> dict[str, tuple[Null, Null]]:
    """Split the null spaces of A and G of every layer.

    Args:
        model, survey: as for the factors.
        spectra: (A, G) of each layer, with eigenvectors.
        batches: made-up inputs.
        settings: of the factors; one draw of labels is used.
        precision: what the activations are good to.

    Returns:
        (null space of A, null space of G) for each layer whose factors are matrices.
    """
    inputs: dict[str, _Projected] = {}
    outputs: dict[str, _Projected] = {}
    for name, (a, g) in spectra.items():
        layer = survey.layers[name]
        if layer.groups > 1:
            continue
        if a.form == "matrix" and a.null.shape[1]:
            inputs[name] = _Projected(a.null, precision)
        if g.form == "matrix" and g.null.shape[1]:
            outputs[name] = _Projected(g.null, precision)
    # All processes of a sharded model must run it, whichever layers are theirs.
    if inputs or outputs or is_sharded(model):
        _run(model, survey, inputs, outputs, batches, settings)
    found = {}
    for name, (a, g) in spectra.items():
        if survey.layers[name].groups > 1:
            continue
        found[name] = (
            inputs[name].split() if name in inputs else _plain(a, survey.layers[name]),
            outputs[name].split() if name in outputs else _plain(g, None),
        )
    return found


def _plain(spectrum: Spectrum, layer: Layer | None) -> Null:
    """Of a diagonal, whose null vectors are unit vectors; or nothing."""
    d = spectrum.dimension
    if spectrum.form != "diagonal" or layer is None or not spectrum.dead:
        empty = torch.zeros(d, 0, dtype=torch.float64)
        return Null(empty, empty, d, False)
    index = (spectrum.diagonal <= spectrum.tolerance).nonzero()[:, 0]
    padding = layer.padding if isinstance(layer, Embedding) else None
    never = index == (-1 if padding is None else padding)
    return Null(index[never], index[~never], d, True)


def _run(
    model: nn.Module,
    survey: Survey,
    inputs: dict[str, _Projected],
    outputs: dict[str, _Projected],
    batches: Iterable[Any],
    settings: Settings,
) -> None:
    n = 0

    def on_input(layer: Layer, x: Tensor) -> None:
        projected = inputs.get(layer.name)
        if projected is None:
            return
        for piece, _ in layer.pieces(x, n):
            rows = piece.flatten(0, 1)
            if layer.bias is not None:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            projected.add(rows)

    def on_gradient(layer: Layer, grad: Tensor, x: Tensor | None) -> None:
        with whole(layer.module) if layer.kind == "norm" else nullcontext():
            if layer.name in outputs:
                outputs[layer.name].add(layer.gradients(grad, n, x).flatten(0, 1))

    with Streams(model, survey, on_input=on_input, on_gradient=on_gradient) as streams:
        for given in batches:
            batch = as_batch(given, "mc")
            n = batch.n
            z = streams.forward(batch.inputs, n)
            mask = output_mask(z, batch, settings.likelihood)
            seed = next(list_of_seeds(z, batch, mask, 0, settings), None)
            if seed is not None:
                streams.backward(z, seed)
