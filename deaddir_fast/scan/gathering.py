"""What each process has read of its layers, brought to the one that writes the report."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from deaddir_fast.fisher.factors import KronFactors, LayerFactors
from deaddir_fast.nets.survey import Survey
from deaddir_fast.scan.nulls import Null
from deaddir_fast.scan.ranks import Ranks
from deaddir_fast.scan.spectra import Spectrum

_VECTORS = ("null", "low", "high", "diagonal")
_NUMBERS = tuple(f.name for f in fields(Spectrum) if f.name not in (*_VECTORS, "values"))
_SUMS = ("A_sum", "A_ones", "G_sum")
_LAYER = tuple(f.name for f in fields(LayerFactors) if f.name not in _SUMS)


@dataclass
class Findings:
    """What the report is made of, by layer.

    Attributes:
        factors: sums (of the layers of other processes only their descriptions, after
            :func:`gather`).
        spectra, nulls: of A and G (of others only eigenvalues and dimensions).
        readings: rays.
        notes: {place of the layer in the survey: what is to be said of its rays}.
        seconds: time each layer's sums took, all processes together.
        halved, chunk: how often memory ran out, and the samples of a pass in the end.
        peak: most bytes of memory that a process used.
    """

    factors: KronFactors
    spectra: dict[str, tuple[Spectrum, Spectrum]]
    nulls: dict[str, tuple[Null, Null]]
    readings: dict[str, list[dict[str, Any]]]
    notes: dict[int, list[str]]
    seconds: dict[str, float]
    halved: int
    chunk: int
    peak: int


def gather(ranks: Ranks, found: Findings, survey: Survey, *, bases: bool) -> Findings | None:
    """The findings of all processes on the first one, None on the others.

    Args:
        ranks: the processes.
        found: by this one.
        survey: of the model.
        bases: whether the null spaces of A are needed themselves, not their dimensions alone.

    Raises:
        RankError: another process failed.
    """
    if ranks.size == 1:
        return found
    told = {
        "layers": {n: {k: getattr(f, k) for k in _LAYER} for n, f in found.factors.items()},
        "spectra": {
            n: [{k: getattr(s, k) for k in _NUMBERS} for s in both]
            for n, both in found.spectra.items()
        },
        "nulls": {
            n: [
                {
                    "parts": [_described(x.always), _described(x.here)],
                    "dimension": x.dimension,
                    "checked": x.checked,
                }
                for x in both
            ]
            for n, both in found.nulls.items()
        },
        "readings": found.readings,
        "notes": {str(k): v for k, v in found.notes.items()},
        "seconds": found.seconds,
        "halved": found.halved,
        "chunk": found.chunk,
        "peak": found.peak,
    }
    heard = ranks.exchange(told)
    if not ranks.first:
        for both in found.spectra.values():
            for s in both:
                ranks.send(s.values, 0).wait()
        for null, _ in found.nulls.values() if bases else ():
            for part in (null.always, null.here):
                if part.numel():
                    ranks.send(part, 0).wait()
        return None
    layers = dict(found.factors)
    spectra, nulls, readings = dict(found.spectra), dict(found.nulls), dict(found.readings)
    notes, seconds = dict(found.notes), dict(found.seconds)
    for source, said in enumerate(heard):
        if source == ranks.rank:
            continue
        for name, plain in said["layers"].items():
            empty: dict[str, Any] = {k: torch.zeros(0, dtype=torch.float64) for k in _SUMS}
            layers[name] = LayerFactors(**plain, **empty)
        for name, both in said["spectra"].items():
            a, g = (_spectrum(numbers, ranks, source) for numbers in both)
            spectra[name] = (a, g)
        for name, both in said["nulls"].items():
            a_null, g_null = (_null(x) for x in both)
            if bases:
                a_null = _with_basis(a_null, both[0], ranks, source)
            nulls[name] = (a_null, g_null)
        readings.update(said["readings"])
        notes.update({int(k): v for k, v in said["notes"].items()})
        for name, time in said["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + time
    order = [n for n in survey.layers if n in layers]
    return replace(
        found,
        factors=KronFactors({n: layers[n] for n in order}, found.factors.meta),
        spectra={n: spectra[n] for n in order},
        nulls=nulls,
        readings={n: readings[n] for n in order},
        notes=notes,
        seconds=seconds,
        halved=sum(said["halved"] for said in heard),
        chunk=min(said["chunk"] for said in heard),
        peak=max(said["peak"] for said in heard),
    )


def _spectrum(numbers: dict[str, Any], ranks: Ranks, source: int) -> Spectrum:
    shape = (numbers["dimension"],)
    values = ranks.receive(shape, torch.float64, torch.device("cpu"), source)
    empty: dict[str, Any] = {k: torch.zeros(0, dtype=torch.float64) for k in _VECTORS}
    return Spectrum(**numbers, values=values, **empty)


def _described(x: Tensor) -> tuple[list[int], str]:
    return list(x.shape), str(x.dtype).removeprefix("torch.")


def _null(told: dict[str, Any]) -> Null:
    # Of its parts only the dimensions: no numbers.
    always, here = (torch.zeros(0, shape[-1]) for shape, _ in told["parts"])
    return Null(always, here, told["dimension"], told["checked"])


def _with_basis(null: Null, told: dict[str, Any], ranks: Ranks, source: int) -> Null:
    parts = []
    for shape, kind in told["parts"]:
        size, dtype = tuple(shape), getattr(torch, kind)
        cpu = torch.device("cpu")
        empty = not torch.Size(size).numel()
        parts.append(
            torch.zeros(size, dtype=dtype) if empty else ranks.receive(size, dtype, cpu, source)
        )
    return replace(null, always=parts[0], here=parts[1])
