"""What a scan knows of λ: bounds from flat directions.

λ ≤ (d − f) / 2 where K stays zero on an f-dimensional manifold through the point. Two kinds of
directions make it up: parts of a weight with A w = 0, which leave every activation on the data as
it is, so that they are flat in all layers at once; and orbits of verified symmetries. Moving a
point of the first kind along an orbit keeps K zero, so the dimension is that of the span of both.
λ ≥ rank(F) / 2 ≥ half the rank of any block of F known exactly (the norms').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.gauge.base import Gauge
from deaddir_fast.nets.survey import Survey
from deaddir_fast.scan.candidates import to_parameters
from deaddir_fast.scan.nulls import Null
from deaddir_fast.scan.spectra import Spectrum

#: Bytes of the matrix of all orbit tangents, above which symmetries are left out of the bound.
LARGEST_TANGENTS = 1 << 30


def bound(
    model: nn.Module,
    survey: Survey,
    spectra: Mapping[str, tuple[Spectrum, Spectrum]],
    nulls: Mapping[str, tuple[Null, Null]],
    readings: Mapping[str, Sequence[Mapping[str, Any]]],
    gauges: Sequence[Gauge],
) -> dict[str, Any]:
    """Bounds on λ of the whole model on the data given.

    Null spaces count where their rank is resolved: where samples limit it more data would raise it,
    where eigenvalues are close to rounding some may be small and not zero. One that a ray
    contradicts does not count. For the lower bound, eigenvalues close to rounding count as zero.
    """
    d = sum(p.numel() for p in model.parameters())
    flat = 0
    counted: dict[str, Null] = {}
    weights: set[str] = set()
    for name, (a, _) in spectra.items():
        layer = survey.layers[name]
        usable = a.form != "one" and layer.groups == 1 and survey.calls.get(name, 1) == 1
        # What is null for one use of a weight is not so for another.
        if survey.sharers(name) or layer.weight in weights:
            continue
        if not usable or a.verdict != "resolved" or contradicted(readings.get(name, ())):
            continue
        weights.add(layer.weight)
        flat += a.dead * layer.outputs
        if a.dead:
            counted[name] = nulls[name][0]
    orbits, left_out = _beyond(model, survey, spectra, counted, gauges)
    norms = [g for name, (_, g) in spectra.items() if survey.layers[name].kind == "norm"]
    lower = max((g.rank - g.ambiguous for g in norms), default=0)
    rests = [
        f"{flat:,} dimensions in which inputs of layers have no component on the data, to rounding"
    ]
    if gauges:
        some = "symmetries left out: too many for memory"
        along = f"{orbits:,} more along orbits of verified symmetries"
        rests += ([along] if orbits or not left_out else []) + ([some] if left_out else [])
    return {
        "lower": lower / 2,
        "upper": (d - flat - orbits) / 2,
        "flat": flat,
        "orbits": orbits,
        "verdict": "unresolved: bounds only",
        "rests_on": "; ".join(rests),
    }


def contradicted(readings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a ray along null inputs of a layer, which must be flat, was not."""
    return any(r["part"] == "inputs" and r["class"] == "unresolved" for r in readings)


def _beyond(
    model: nn.Module,
    survey: Survey,
    spectra: Mapping[str, tuple[Spectrum, Spectrum]],
    counted: Mapping[str, Null],
    gauges: Sequence[Gauge],
) -> tuple[int, bool]:
    """(dimensions that orbits add to the parts counted, whether some were left out)."""
    state = {k: v.detach().double() for k, v in model.named_parameters()}
    names = [k for k in state if any(k in g.parameters for g in gauges)]
    room = LARGEST_TANGENTS // max(1, 8 * sum(state[k].numel() for k in names))
    rows, fitting = 0, []
    for g in sorted(gauges, key=lambda g: g.dimension):
        if g.dimension and rows + g.dimension <= room:
            fitting.append(g)
            rows += g.dimension
    left_out = len(fitting) < sum(g.dimension > 0 for g in gauges)
    if not rows:
        return 0, left_out
    moved: dict[str, Tensor] = {
        k: torch.zeros(rows, *state[k].shape, dtype=torch.float64) for k in names
    }
    at = 0
    for g in fitting:
        for k, value in g.tangents(state).items():
            moved[k][at : at + g.dimension] = value.cpu()
        at += g.dimension
    lengths = torch.cat([v.flatten(1) for v in moved.values()], 1).norm(dim=1)
    for name, null in counted.items():
        layer = survey.layers[name]
        own = {k: moved[k] for k in (layer.weight, layer.bias) if k in moved}
        if not own:
            continue
        u = layer.directions(own)
        assert u is not None
        u = _without(u, null, spectra[name][0])
        for k, value in to_parameters(layer, u, state).items():
            if k in moved:
                moved[k] = value
    matrix = torch.cat([v.flatten(1) for v in moved.values()], 1)
    matrix = matrix[lengths > 0] / lengths[lengths > 0, None]
    if not matrix.numel():
        return 0, left_out
    values = torch.linalg.svdvals(torch.linalg.qr(matrix.mT, mode="r").R)
    return int((values > 1e-9 * values[0]).sum()) if float(values[0]) > 0 else 0, left_out


def _without(u: Tensor, null: Null, a: Spectrum) -> Tensor:
    """(p, o, width) less what lies in the null space of A."""
    parts = (null.always, null.here)
    if sum(part.shape[-1] for part in parts) < a.dead:
        return torch.zeros_like(u)  # its basis is not known: nothing of it is counted
    for part in parts:
        if part.ndim == 1:
            u = u.clone()
            u[..., part] = 0.0
        else:
            u = u - (u @ part) @ part.mT
    return u
