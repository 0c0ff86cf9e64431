"""Directional curvature layer by layer, head by head, and of all layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.fisher.factors import KronFactors
from deaddir_fast.fisher.kron import (
    MOST_PASSES,
    Batch,
    Settings,
    as_batches,
    check_settings,
    list_of_seeds,
    output_mask,
)
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.nets.layers.heads import Heads, heads_of
from deaddir_fast.nets.layers.linear import Linear
from deaddir_fast.nets.layers.scores import Slices, contract, from_matrix, of_bias, scores
from deaddir_fast.nets.streams import Streams
from deaddir_fast.nets.survey import Survey, survey
from deaddir_fast.nets.weights import Directions, RankOne, check_directions
from deaddir_fast.ops.kron_quadratic import kron_quadratic

METHODS = ("exact", "kfac", "cheapest")


@dataclass(frozen=True)
class LayerProbe:
    """Curvature of the slices in one layer, the rest of each direction left out.

    Attributes:
        curvature, stderr: (p,) u_lᵀ F u_l for the slice u_l of each unit direction, and its
            standard error over samples (nan for one sample, and for K-FAC).
        heads: {label: (p,)} of the part in each attention head.
        method: "exact" or "kfac".
        flops: of its contraction, over all samples.
    """

    curvature: Tensor
    stderr: Tensor
    heads: dict[str, Tensor]
    method: str
    flops: float


@dataclass(frozen=True)
class LayerCurvature:
    """Directional Fisher curvature at the current parameters; tensors are fp64 on the CPU.

    Attributes:
        curvature, stderr: (p,) uᵀFu of the whole unit directions, layers summed inside the square,
            and its standard error over samples. nan where a layer was read by K-FAC, which does
            not see the terms between layers.
        layers: {name: what its slice contributes alone}. Their sum differs from ``curvature`` by
            the terms between layers: for a symmetry that spans two layers these cancel.
        per_sample: (p, n).
        norms: (p,) norms of the directions before scaling to 1.
        kind: "exact", "mc" or "empirical": which Fisher.
        samples: n.
        notes: what limits these numbers.
    """

    curvature: Tensor
    stderr: Tensor
    layers: dict[str, LayerProbe]
    per_sample: Tensor = field(repr=False)
    norms: Tensor = field(repr=False)
    kind: str
    samples: int
    notes: tuple[str, ...]


def layer_curvature(
    model: nn.Module,
    batches: Any,
    directions: Mapping[str, Tensor | RankOne],
    *,
    likelihood: str | likelihoods.Likelihood = "categorical",
    fisher: str = "exact",
    method: str = "exact",
    factors: KronFactors | None = None,
    heads: bool = False,
    draws: int = 1,
    seed: int = 0,
    most_passes: int = MOST_PASSES,
) -> LayerCurvature:
    """uᵀFu of directions, split by layers and heads, from one stream of (a, g).

    For each output gradient the score of a sample is Σ_layers Σ_t gᵀUa; its square is averaged.
    One pass of the streams serves all directions and all layers: n·t·o·i FLOP a direction and layer
    times two (full rank), n·t·(o + i) times two (rank one), plus a forward and a backward pass for
    activations per output gradient. With c outputs the exact Fisher takes c − 1 or c such passes:
    for the total alone, ``dd.point_curvature`` needs none of them.

    Args:
        model: in evaluation mode, of any floating-point dtype.
        batches: as for ``kron_factors``.
        directions: {parameter: (p, *shape)}, missing parameters count as 0; or a ``RankOne`` for a
            matrix. Scaled to unit norm over all parameters; rank-one slices are found.
        likelihood, fisher, draws, seed, most_passes: as for ``kron_factors``.
        method: "exact"; "kfac" from ``factors``, for every layer; or "cheapest": K-FAC in the
            layers where it takes fewer FLOP than the samples do, exact in the others.
        factors: of ``kron_factors``, for the latter two.
        heads: whether to split attention layers by heads.

    Returns:
        :class:`LayerCurvature`.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, a parameter in no layer, or a
            layer whose rows cannot be told apart by sample.
    """
    settings = check_settings(
        likelihood, fisher, "expand", draws, seed, None, True, 0, most_passes
    )  # fmt: skip
    _check.choice("method", method, METHODS)
    if method != "exact" and not isinstance(factors, KronFactors):
        raise _check.fail("factors", factors, f"KronFactors for method={method!r}", TypeError)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    given = check_directions(directions, parameters)
    given_batches = list(as_batches(batches, fisher))
    if not given_batches:
        raise ValueError("batches: expected at least one sample, got none")
    largest = max(given_batches, key=lambda b: b.n)
    # All layers, so that none that shares a weight with another is missed.
    found = survey(model, largest.inputs)
    slices = {
        name: part
        for name, layer in found.layers.items()
        if (part := _slices(layer, given, parameters)) is not None
    }
    covered = {w for name in slices for w in _names(found.layers[name])}
    missing = [k for k in given.slices if k not in covered]
    if missing:
        raise ValueError(
            f"directions: no layer is known for {missing[0]!r}; dd.point_curvature takes any "
            "parameter"
        )
    by_kfac = _by_kfac(found, slices, method, factors, given_batches)
    where = heads_of(model, found) if heads else {}
    reader = _Reader(found, slices, by_kfac, where, given.norms)
    with Streams(
        model,
        found,
        on_gradient=reader.on_gradient,
        keep=lambda layer: layer.name in reader.exact,
    ) as streams:
        first = 0
        for batch in given_batches if reader.exact else ():
            _read(streams, reader, batch, first, settings)
            first += batch.n
    return _result(reader, factors, settings, given)


def _names(layer: Layer) -> list[str]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _slices(layer: Layer, given: Directions, parameters: Mapping[str, Tensor]) -> Slices | None:
    own = {name: given.slices[name] for name in _names(layer) if name in given.slices}
    if not own:
        return None
    weight = own.get(layer.weight)
    bias = None if layer.bias is None else own.get(layer.bias)
    if isinstance(weight, RankOne) and isinstance(layer, Linear) and not isinstance(bias, RankOne):
        v, w = (weight.w, weight.v) if layer.transposed else (weight.v, weight.w)
        return Slices(None, v, w, bias)
    dense = {
        k: u.dense(parameters[k].shape) if isinstance(u, RankOne) else u for k, u in own.items()
    }
    matrix = layer.directions(dense)
    assert matrix is not None
    return from_matrix(layer, matrix)


def _by_kfac(
    found: Survey,
    slices: Mapping[str, Slices],
    method: str,
    factors: KronFactors | None,
    batches: Sequence[Batch],
) -> set[str]:
    if method == "exact":
        return set()
    assert factors is not None
    samples = sum(b.n for b in batches)
    chosen = set()
    for name in slices:
        layer = found.layers[name]
        if name not in factors:
            if method == "kfac":
                raise ValueError(f"factors: none of the layer {name!r}")
            continue
        # Two triangular products against one product with each sample's gradient; for rank one,
        # two quadratic forms against two products with each row.
        size = layer.inputs + layer.outputs
        rows = samples * max(1, found.tokens.get(name, 1))
        cheaper = rows > size / 4 if slices[name].low else samples > size / 2
        if method == "kfac" or cheaper:
            chosen.add(name)
    return chosen


class _Reader:
    """Scores of all layers in a pass, squared and added when it ends."""

    def __init__(
        self,
        found: Survey,
        slices: dict[str, Slices],
        by_kfac: set[str],
        heads: Mapping[str, Heads],
        norms: Tensor,
    ) -> None:
        self.survey, self.slices, self.by_kfac = found, slices, by_kfac
        self.exact = [name for name in slices if name not in by_kfac]
        self.heads = {k: v for k, v in heads.items() if k in self.exact}
        self.norms = norms
        self.n = 0
        self.pending: dict[str, Tensor] = {}
        self.pending_heads: dict[tuple[str, str], Tensor] = {}
        self.squares: dict[Any, Tensor] = {}
        self.done: dict[Any, list[Tensor]] = {}

    def begin(self, n: int) -> None:
        """Start a batch."""
        self.n = n
        self.squares = {}

    def on_gradient(self, layer: Layer, grad: Tensor, x: Tensor | None) -> None:
        """Take the scores of one use of one layer."""
        if layer.name not in self.exact:
            return
        assert x is not None
        u = self.slices[layer.name]
        _add(self.pending, layer.name, scores(layer, x, grad, self.n, u))
        found = self.heads.get(layer.name)
        if found is None:
            return
        g, a = layer.gradients(grad, self.n, x), layer.rows(x, self.n)
        for label, (start, stop) in zip(found.labels, found.ranges, strict=True):
            if found.axis == "outputs":
                part = _plain(a, g[..., start:stop], u.outputs(start, stop))
            else:
                part = _plain(a[..., start:stop], g, u.inputs(start, stop))
            _add(self.pending_heads, (layer.name, label), part)

    def end_pass(self, weight: float) -> None:
        """Square the scores of one backward pass."""
        total: Tensor | None = None
        for name, part in self.pending.items():
            wide = part.double().cpu() / self.norms[:, None]
            total = wide if total is None else total + wide
            _add(self.squares, name, wide.square() * weight)
        for key, part in self.pending_heads.items():
            wide = part.double().cpu() / self.norms[:, None]
            _add(self.squares, key, wide.square() * weight)
        if total is not None:
            _add(self.squares, None, total.square() * weight)
        self.pending, self.pending_heads = {}, {}

    def end_batch(self) -> None:
        """Keep what each sample contributed."""
        keys: list[Any] = [None, *self.exact]
        keys += [(k, label) for k, h in self.heads.items() for label in h.labels]
        for key in keys:
            zero = torch.zeros(len(self.norms), self.n, dtype=torch.float64)
            self.done.setdefault(key, []).append(self.squares.get(key, zero))


def _plain(a: Tensor, g: Tensor, u: Slices) -> Tensor:
    a, g = a.contiguous(), g.contiguous()
    part = contract(a, g, u)
    return part if u.bias is None else part + of_bias(u.bias, g)


def _add(into: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    held = into.get(key)
    into[key] = value if held is None else held + value


def _read(streams: Streams, reader: _Reader, batch: Batch, first: int, settings: Settings) -> None:
    reader.begin(batch.n)
    z = streams.forward(batch.inputs, batch.n)
    mask = output_mask(z, batch, settings.likelihood)
    weight = 1 / settings.draws if settings.fisher == "mc" else 1.0
    held: Tensor | None = None
    for seed in list_of_seeds(z, batch, mask, first, settings):
        if held is not None:
            streams.backward(z, held, last=False)
            reader.end_pass(weight)
        held = seed
    if held is not None:
        streams.backward(z, held)
        reader.end_pass(weight)
    reader.end_batch()


def _moments(each: Tensor) -> tuple[Tensor, Tensor]:
    n = each.shape[1]
    if n < 2:
        return each.mean(1), torch.full_like(each[:, 0], torch.nan)
    return each.mean(1), each.std(1) / n**0.5


def _result(
    reader: _Reader, factors: KronFactors | None, settings: Settings, given: Directions
) -> LayerCurvature:
    p = given.count
    layers: dict[str, LayerProbe] = {}
    for name, u in reader.slices.items():
        layer = reader.survey.layers[name]
        if name in reader.by_kfac:
            assert factors is not None
            curvature = _kfac(factors, name, layer, u) / given.norms.square()
            cost = float(p * layer.outputs * layer.inputs * (layer.outputs + layer.inputs))
            layers[name] = LayerProbe(
                curvature, torch.full_like(curvature, torch.nan), {}, "kfac", cost
            )
            continue
        each = torch.cat(reader.done[name], 1)
        curvature, stderr = _moments(each)
        rows = each.shape[1] * max(1, reader.survey.tokens.get(name, 1))
        size = layer.outputs + layer.inputs if u.low else layer.outputs * layer.inputs
        by_head = {
            label: torch.cat(reader.done[(name, label)], 1).mean(1)
            for label in (reader.heads[name].labels if name in reader.heads else ())
        }
        layers[name] = LayerProbe(curvature, stderr, by_head, "exact", 2.0 * p * rows * size)
    samples = sum(part.shape[1] for part in reader.done.get(None, []))
    notes = []
    if reader.by_kfac:
        notes.append("layers read by K-FAC: terms between layers are not seen, no total is given")
        nan = torch.full((p,), torch.nan, dtype=torch.float64)
        total, stderr, each = nan, nan, torch.zeros(p, 0, dtype=torch.float64)
    else:
        each = torch.cat(reader.done[None], 1)
        total, stderr = _moments(each)
    if settings.fisher == "mc":
        notes.append(f"labels drawn from the model, {settings.draws} for each output")
    if settings.fisher == "empirical":
        notes.append("labels of the data: not the Fisher matrix, its rates differ")
    return LayerCurvature(
        total, stderr, layers, each, given.norms, settings.fisher, samples, tuple(notes)
    )


def _kfac(factors: KronFactors, name: str, layer: Layer, u: Slices) -> Tensor:
    f = factors[name]
    a, g = f.A.double().cpu(), f.G.double().cpu()
    if u.low:
        assert u.v is not None and u.w is not None
        matrix = u.v.double().cpu().unsqueeze(2) * u.w.double().cpu().unsqueeze(1)
    else:
        assert u.u is not None
        matrix = u.u.double().cpu()
    if layer.groups > 1:
        raise ValueError(f"method: K-FAC of the grouped layer {name} is not supported here")
    if layer.bias is not None and layer.kind != "norm":
        bias = u.bias
        column = matrix.new_zeros(matrix.shape[:2]) if bias is None else bias.double().cpu()
        matrix = torch.cat([matrix, column.unsqueeze(-1)], -1)
    if a.ndim == 1 or g.ndim == 1:
        left = g[:, None] * matrix if g.ndim == 1 else g @ matrix
        right = matrix * a if a.ndim == 1 else matrix @ a
        return (left * right).sum((1, 2))
    return kron_quadratic(a, g, matrix)
