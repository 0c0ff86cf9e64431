"""``dd.scan``: every layer of a model, read and written down."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast._progress import stages
from deaddir_fast.fisher.collect import LARGEST_HEAD
from deaddir_fast.fisher.factors import KronFactors, LayerFactors
from deaddir_fast.fisher.kron import MOST_PASSES, Settings, check_settings, describe
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets import seeds
from deaddir_fast.nets.graph import call_plainly, slice_batch
from deaddir_fast.nets.precision import narrowest
from deaddir_fast.nets.rays import Recording, check_radii
from deaddir_fast.nets.sharded import alone, check_kind, gathered, is_sharded, plain_type
from deaddir_fast.nets.survey import Survey, survey
from deaddir_fast.ops.gram_packed import entries
from deaddir_fast.reading.freeze import freeze_probe
from deaddir_fast.scan.batches import Batches
from deaddir_fast.scan.bound import bound
from deaddir_fast.scan.candidates import Candidate, candidates, kernel_of_norm
from deaddir_fast.scan.dealing import shares
from deaddir_fast.scan.factors import FactorStage, out_of_memory
from deaddir_fast.scan.gathering import Findings, gather
from deaddir_fast.scan.load_model import fingerprint as weights_fingerprint
from deaddir_fast.scan.measure import Readout, cast, measure, reading_copy
from deaddir_fast.scan.nulls import Null, split_nulls
from deaddir_fast.scan.plan import Plan, plan, triangles
from deaddir_fast.scan.ranks import current, together
from deaddir_fast.scan.report import to_json
from deaddir_fast.scan.scan_report import ScanReport
from deaddir_fast.scan.spectra import Spectrum, one, rounding, spectrum
from deaddir_fast.scan.store import Store
from deaddir_fast.scan.synthetic import made_up_like

SCHEMA = 1
#: Sums are held in fp64, where dead directions read 1e-10 and not 1e-7, up to this many bytes.
FP64_SUMS = 4 << 30
#: Models up to this many parameters are read in fp64, and searched for symmetries.
READ_IN_FP64 = 200_000_000
GAUGES_UP_TO = 2_000_000
#: Eigenvalues of larger factors are not computed by default.
LARGEST_SPECTRUM = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class _Options:
    directions: int
    radii: Tensor
    ray_samples: int
    shards: int
    largest_spectrum: int
    gauges: bool
    units: tuple[int, ...]


@together
def scan(
    model: nn.Module,
    batches: Any,
    *,
    out: str | Path,
    likelihood: str | likelihoods.Likelihood = "categorical",
    fisher: str = "mc",
    layers: Sequence[str] | None = None,
    directions_per_layer: int = 3,
    radii: Any = None,
    draws: int = 1,
    seed: int = 0,
    share_inputs: bool = True,
    ray_samples: int = 4,
    shards: int | None = None,
    sums: torch.dtype | None = None,
    fp64_up_to: int = READ_IN_FP64,
    largest_spectrum: int | None = None,
    gauges: bool | None = None,
    units: Sequence[int] = (),
    strict: bool = False,
    resume: bool = True,
    progress: bool | None = None,
    source: str | None = None,
    fingerprint: str | None = None,
) -> ScanReport:
    """Read every layer of a model: spectra of A and G, dead directions, rays, a bound on λ.

    Factors are summed shard by shard. The null space of each factor is split by made-up inputs
    into what the architecture implies and what these data leave open; generic directions of both,
    the kernel γ⁻¹ of a LayerNorm in front, a shift of all classes, and the smallest positive pair
    get rays of exact Fisher curvature, whose rates are fitted. Everything is written to ``out`` as
    it is found; the same call goes on after a crash and loses at most one shard.

    Where torch.distributed is initialised, all processes call this with the same arguments and all
    the data; ``out`` must be a folder they all see. Each sums every W-th shard and keeps, reads and
    measures its part of the layers; the report is the same as of one process. A model spread by
    ``fully_shard`` is gathered on every process if it is small enough for ``fp64_up_to``; a larger
    one is run as it is, without rays.

    Args:
        model: a module in evaluation mode.
        batches: as for ``kron_factors``; a sequence, or an object with ``__len__`` and
            ``batch(i)``, is not copied.
        out: folder of the scan.
        likelihood, fisher, layers, draws, seed, share_inputs, strict: as for ``kron_factors``.
        directions_per_layer: rays in each layer, besides one live direction to compare with; 0
            for none.
        radii: positive radii of the rays, by default eight from 1e-3 to 0.3.
        ray_samples: samples the rays are read on.
        shards: parts after each of which the sums are saved, by default up to 8; at least as many
            as there are processes keep all of them busy.
        sums: dtype of the sums, by default fp64 where they take less than 4 GB.
        fp64_up_to: models of up to this many parameters are read in fp64 (on a copy), where a dead
            direction reads 1e-14 of the trace and not 1e-10; larger ones in their own precision.
        largest_spectrum: dimension above which eigenvalues are not computed.
        gauges: whether to search the whole model for symmetries; by default up to two million
            parameters.
        units: channels whose rates are read as well: their weights scaled by t through all layers,
            predicted and measured slopes side by side (``dd.freeze_probe``).
        resume: go on with a scan of the same model, data and settings in ``out``; if False, an
            old scan there is removed.
        progress: progress bars on stderr; by default on a terminal only.
        source, fingerprint: what the report calls the model, and what identifies its weights.

    Returns:
        The report, also in ``out`` as report.json, spectra.safetensors and report.html.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or a folder that holds another
            scan.
        OSError: ``out`` cannot be written; what is there stays valid.
        RankError: another process failed.
    """
    if not isinstance(model, nn.Module):
        raise _check.fail("model", model, "a torch.nn.Module", TypeError)
    _check.choice("fisher", fisher, ("exact", "mc", "empirical"))
    size = sum(p.numel() for p in model.parameters())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    original = model
    if size <= _check.integer("fp64_up_to", fp64_up_to, 0):
        dtype = torch.float64
        model = reading_copy(gathered(model) if is_sharded(model) else model, dtype)
    elif is_sharded(model):
        check_kind(model)
    data = Batches(batches, fisher, dtype)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if largest_spectrum is None:
        largest_spectrum = LARGEST_SPECTRUM.get(device.type, 4096)
    options = _Options(
        _check.integer("directions_per_layer", directions_per_layer, 0),
        _radii(radii),
        _check.integer("ray_samples", ray_samples, 1),
        _check.integer("shards", 8 if shards is None else shards, 1),
        _check.integer(
            "largest_spectrum",
            LARGEST_SPECTRUM.get(device.type, 4096)
            if largest_spectrum is None
            else largest_spectrum,
            1,
        ),
        size <= GAUGES_UP_TO if gauges is None else gauges,
        tuple(_check.integer("units", unit, 0) for unit in units),
    )
    with warnings.catch_warnings():
        # What is skipped stands in the report.
        if not strict:
            warnings.simplefilter("ignore", UserWarning)
        # One sample would leave open where the samples are in each layer's tensors.
        several = next((i for i, n in enumerate(data.sizes) if n > 1), 0)
        found = survey(model, data[several].inputs, layers=layers, strict=strict)
    if is_sharded(model):
        found = found.without_sharing(alone(model))
    if not found.layers:
        raise ValueError("model: none of its modules is a layer that factors are known for")
    if sums is None:
        needed = sum(
            8 * x.groups * (entries(x.inputs) * (x.form == "matrix") + entries(x.outputs))
            for x in found.layers.values()
        )
        sums = torch.float64 if needed <= FP64_SUMS else torch.float32
    settings = check_settings(
        likelihood,
        fisher,
        "expand",
        draws,
        seed,
        sums,
        share_inputs,
        LARGEST_HEAD,
        MOST_PASSES,
    )
    work = _Scan(model, data, Path(out), found, settings, options, device, progress)
    work.source = source or plain_type(model).__name__
    work.fingerprint = fingerprint or weights_fingerprint(original)
    work.original_dtype = next(p.dtype for p in original.parameters() if p.is_floating_point())
    return work.run(resume)


def _radii(radii: Any) -> Tensor:
    if radii is None:
        return torch.logspace(-3, math.log10(0.3), 8, dtype=torch.float64)
    values = check_radii(radii)
    if not bool((values > 0).all()):
        raise _check.fail("radii", radii, "positive numbers")
    return values.sort().values


class _Scan:
    """One call of :func:`scan`."""

    source = ""
    fingerprint = ""
    original_dtype = torch.float32
    symmetries: Sequence[Any] = ()

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        out: Path,
        found: Survey,
        settings: Settings,
        options: _Options,
        device: torch.device,
        progress: bool | None,
    ) -> None:
        self.model, self.data, self.out, self.survey = model, data, out, found
        self.settings, self.options, self.device = settings, options, device
        self.progress, self.ranks, self.sharded = progress, current(), is_sharded(model)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.layer_notes: dict[int, list[str]] = {}
        #: What the activations are good to: some models cast to fp32 on their way.
        self.precision = narrowest(model, slice_batch(data[0].inputs, 0, 1), self.dtype)
        if self.precision != self.dtype:
            name = str(self.precision).removeprefix("torch.")
            self.notes.append(f"the model computes partly in {name}, whatever its parameters are")
        self.head = self._head()
        self.readout: Readout | None = None
        self.recording = Recording()
        self.ray_inputs: Any = None

    def _head(self) -> str | None:
        categorical = isinstance(self.settings.likelihood, likelihoods.Categorical)
        return self.survey.head if categorical else None

    @property
    def closed_head(self) -> str | None:
        """The head whose G is not formed."""
        head = self.head
        if head is None or self.survey.layers[head].outputs <= self.settings.largest_head:
            return None
        return head

    def identity(self) -> dict[str, Any]:
        """What a scan on disk must agree with to be gone on with."""
        o = self.options
        return {
            "model": self.fingerprint,
            "data": self.data.fingerprint,
            "activations": str(self.dtype).removeprefix("torch."),
            **{k: v for k, v in describe(self.settings).items() if k != "versions"},
            "layers": list(self.survey.layers),
            "directions_per_layer": o.directions,
            "radii": o.radii.tolist(),
            "ray_samples": o.ray_samples,
            "shards": len(self.data.shards(o.shards)),
            "largest_spectrum": o.largest_spectrum,
            "gauges": o.gauges,
            "sharded": self.sharded,
            "share_inputs": self.settings.share_inputs,
            "units": list(o.units),
        }

    def plan(self) -> Plan:
        """Costs of the factors."""
        passes = self.settings.draws if self.settings.fisher == "mc" else 1
        if self.settings.fisher == "exact":
            with torch.no_grad():
                z = call_plainly(self.model, slice_batch(self.data[0].inputs, 0, 1))
            passes = seeds.exact_count(z, self.settings.likelihood)
        self.passes = passes
        return plan(
            self.survey,
            self.data.tokens,
            self.data.samples,
            dtype=self.dtype,
            sums=self.settings.dtype or torch.float32,
            device=self.device,
            passes=passes,
            closed_head=self.closed_head,
            batch_samples=max(self.data.sizes),
        )

    @contextmanager
    def _stage(self, name: str) -> Any:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self, resume: bool) -> ScanReport:
        """All stages."""
        ranks = self.ranks
        costs = self.plan()
        if ranks.first:
            store = Store(self.out, self.identity(), resume=resume)
            store.tidy()
            store.space_for(costs.disk)
        ranks.barrier()
        if not ranks.first:
            store = Store(self.out, self.identity(), resume=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with stages(self.progress if ranks.first else False) as bars:
            with self._stage("factors"):
                dealt = shares(self.survey, self.closed_head, ranks.size)
                stage = FactorStage(
                    self.model, self.survey, self.settings, self.data, store, ranks, dealt
                )
                shards = self.data.shards(self.options.shards)
                factors = stage.run(shards, bars.task("factors", len(self.data)))
            with self._stage("spectra"):
                spectra = self._spectra(factors, bars.task("spectra", len(factors)))
            with self._stage("made-up inputs"):
                nulls = self._nulls(spectra)
            with self._stage("gauges"):
                gauges = self._gauges() if ranks.first else []
            with self._stage("rays"):
                readings = self._layers(
                    factors, spectra, nulls, store, bars.task("rays", len(factors))
                )
            probes = self._probes(bars.task("units", len(self.options.units)))
            mine = Findings(
                factors, spectra, nulls, readings, self.layer_notes, dict(stage.seconds),
                stage.halved, stage.chunk, _peak(self.device),
            )  # fmt: skip
            found = gather(ranks, mine, self.survey, bases=self.options.gauges)
        if found is not None:
            if found.halved:
                self.notes.insert(
                    0, f"memory ran out {found.halved} times: passes of {found.chunk} samples"
                )
            self.notes += stage.notes
            self.notes += [note for _, some in sorted(found.notes.items()) for note in some]
            known = bound(
                self.model,
                self.survey,
                found.spectra,
                found.nulls,
                found.readings,
                self.symmetries,
            )
            report = self._report(found, gauges, known, costs)
            report["probes"] = probes
            self._write(store, report, found.spectra)
        ranks.barrier()
        return ScanReport.read(self.out)

    # ------------------------------------------------------------------------------ the stages

    def _spectra(self, factors: KronFactors, advance: Any) -> dict[str, tuple[Spectrum, Spectrum]]:
        found: dict[str, tuple[Spectrum, Spectrum]] = {}
        sums = self.settings.dtype or torch.float32
        for name, f in factors.items():
            layer = self.survey.layers[name]
            leader = f.shares_inputs_with
            if f.form == "one":
                a = one()
            elif leader is not None and self.survey.layers[leader].width == layer.width:
                a = found[leader][0]
            else:
                a = self._one_spectrum(f, "A", sums)
            found[name] = (a, self._one_spectrum(f, "G", sums))
            advance(1)
        return found

    def _one_spectrum(self, f: LayerFactors, which: str, sums: torch.dtype) -> Spectrum:
        layer = self.survey.layers[f.name]
        width = layer.width if which == "A" else layer.outputs
        if which == "A":
            limit, form = f.rows, f.form
        else:
            rows = f.samples if layer.kind == "norm" else f.rows
            limit, form = rows * self.passes, f.output_form
        if form == "matrix" and width > self.options.largest_spectrum:
            return Spectrum.skipped(width, limit)
        matrix = (f.A if which == "A" else f.G).to(self.device)
        relative = rounding(self.precision, sums, width)
        try:
            return spectrum(matrix, relative=relative, limit=limit * layer.groups, form=form)
        except Exception as error:
            if not out_of_memory(error):
                raise
        return spectrum(matrix.cpu(), relative=relative, limit=limit * layer.groups, form=form)

    def _nulls(self, spectra: dict[str, tuple[Spectrum, Spectrum]]) -> dict[str, tuple[Null, Null]]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        most = max(1, min(len(self.data), 4))
        made_up = [made_up_like(self.data[i].inputs, self.survey, generator) for i in range(most)]
        once = replace(self.settings, fisher="mc", draws=1)
        return split_nulls(self.model, self.survey, spectra, made_up, once, self.precision)

    def _gauges(self) -> list[dict[str, Any]]:
        if not self.options.gauges or self.sharded:
            self.notes.append("the model was not searched for symmetries that span layers")
            return []
        from deaddir_fast.gauge import find

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.symmetries = find(self.model, slice_batch(self.data[0].inputs, 0, 16))
            except Exception as error:
                self.notes.append(f"the search for symmetries failed: {error}")
                return []
        kept = [
            g for g in self.symmetries
            if g.likelihood is None or g.likelihood == self.settings.likelihood.name
        ]  # fmt: skip
        self.symmetries = kept
        return [
            {
                "name": g.name,
                "group": g.group,
                "dimension": g.dimension,
                "parameters": list(g.parameters),
            }
            for g in kept
        ]

    def _kernel(self, name: str) -> tuple[str, Tensor] | None:
        norm = self.survey.fed_by.get(name)
        layer = self.survey.layers[name]
        if norm is None or layer.form != "matrix" or layer.groups > 1:
            return None
        module = dict(self.model.named_modules()).get(norm)
        if not isinstance(module, nn.LayerNorm) or module.weight is None:
            return None
        w = kernel_of_norm(layer, module.weight, module.bias)
        return None if w is None or len(w) != layer.width else (norm, w)

    def _layers(
        self,
        factors: KronFactors,
        spectra: dict[str, tuple[Spectrum, Spectrum]],
        nulls: dict[str, tuple[Null, Null]],
        store: Store,
        advance: Any,
    ) -> dict[str, list[dict[str, Any]]]:
        readings: dict[str, list[dict[str, Any]]] = {}
        places = {name: k for k, name in enumerate(self.survey.layers)}
        for name, f in factors.items():
            index = places[name]
            kept = store.load_layer(index)
            if kept is not None and kept.get("name") == name:
                readings[name], self.layer_notes[index] = kept["directions"], kept["notes"]
                advance(1)
                continue
            chosen: list[Candidate] = []
            notes = self.layer_notes[index] = []
            if self.options.directions and self.sharded:
                notes.append("no rays: the model is sharded, and too large to be gathered")
            elif self.options.directions:
                # Of the layer alone, so that a resumed scan draws the same.
                generator = torch.Generator().manual_seed(self.settings.seed + 7919 * (index + 1))
                chosen = candidates(
                    self.survey.layers[name],
                    spectra[name],
                    None if self.survey.sharers(name) else nulls.get(name),
                    self._kernel(name),
                    class_shift=name == self.head,
                    most=self.options.directions,
                    generator=generator,
                )
            readings[name] = self._measure(name, f, chosen, notes) if len(chosen) > 1 else []
            entry = {"name": name, "directions": readings[name], "notes": notes}
            store.save_layer(index, entry)
            advance(1)
        return readings

    def _reading_model(self) -> tuple[Readout, Any]:
        if self.readout is None:
            few = slice_batch(self.data[0].inputs, 0, self.options.ray_samples)
            dtype = self.dtype
            model = self.model
            if dtype not in (torch.float32, torch.float64):
                dtype = torch.float32
                model = reading_copy(model, dtype)
            self.readout = Readout(model).eval()
            self.ray_inputs = cast(few, dtype)
        return self.readout, self.ray_inputs

    def _measure(
        self, name: str, f: LayerFactors, chosen: list[Candidate], notes: list[str]
    ) -> list[dict[str, Any]]:
        readout, inputs = self._reading_model()
        if self.dtype != torch.float64:
            notes.append("rays are read in fp32: the model is too large for fp64")
        layer = self.survey.layers[name]
        try:
            return measure(
                readout,
                inputs,
                layer,
                chosen,
                self.options.radii,
                self.settings.likelihood,
                eps=torch.finfo(self.precision).eps,
                factors=(f.A, f.G),
                jets=self.precision == torch.float64,
                recording=self.recording,
            )
        except (ValueError, NotImplementedError) as error:
            notes.append(f"{name}: no rays: {error}")
            return []

    def _probes(self, advance: Any) -> list[dict[str, Any]]:
        """Known-t sweeps of the units asked for."""
        found: list[dict[str, Any]] = []
        if not self.options.units or not self.ranks.first:
            return found
        if self.sharded:
            self.notes.append("no rates of units: the model is sharded, and too large to gather")
            return found
        readout, inputs = self._reading_model()
        for unit in self.options.units:
            try:
                probe = freeze_probe(readout, inputs, unit, likelihood=self.settings.likelihood)
            except (ValueError, NotImplementedError) as error:
                self.notes.append(f"unit {unit}: no rates: {error}")
                continue
            rows = [
                {
                    "layer": layer.name.removeprefix("model."),
                    "quantity": quantity,
                    "slope": fit.slope,
                    "stderr": fit.stderr,
                    "predicted": float(layer.predicted(quantity)),
                    "verdict": layer.verdicts[quantity],
                }
                for layer in probe.layers
                for quantity, fit in layer.fits.items()
            ]
            found.append({"unit": unit, "rows": rows, "notes": list(probe.notes)})
            advance(1)
        return found

    # -------------------------------------------------------------------------------- the report

    def _report(
        self,
        found: Findings,
        gauges: list[dict[str, Any]],
        known: dict[str, Any],
        costs: Plan,
    ) -> dict[str, Any]:
        from deaddir_fast.scan.layer_report import layer_report, totals

        by_name = {c.name: c for c in costs.layers}
        layers = []
        for depth, (name, f) in enumerate(found.factors.items()):
            cost = by_name[name]
            seconds = found.seconds.get(name)
            if seconds is not None and self.device.type == "cpu" and seconds > 0:
                layer = self.survey.layers[name]
                work = triangles(
                    layer, cost.rows, name in self.survey.leaders, self.passes,
                    name == self.closed_head,
                )  # fmt: skip
                rate = costs.rate if self.settings.dtype != torch.float64 else costs.rate / 2
                cost = replace(cost, seconds=seconds, share_of_bound=work / rate / seconds)
            layers.append(
                layer_report(
                    self.survey,
                    f,
                    found.spectra[name],
                    None if self.survey.sharers(name) else found.nulls.get(name),
                    found.readings[name],
                    depth,
                    asdict(cost),
                    head=name == self.head,
                )
            )  # fmt: skip
        o = self.options
        return {
            "schema": SCHEMA,
            "kind": "scan",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                **describe(self.settings)["versions"],
                "python": platform.python_version(),
            },
            "device": _device(self.device),
            "model": {
                "source": self.source,
                "class": plain_type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "dtype": str(self.original_dtype).removeprefix("torch."),
                "fingerprint": self.fingerprint,
            },
            "data": {
                "source": self.data.source,
                "samples": self.data.samples,
                "tokens": self.data.tokens,
                "shards": len(self.data.shards(o.shards)),
                "fingerprint": self.data.fingerprint,
            },
            "settings": {
                "likelihood": self.settings.likelihood.name,
                "fisher": self.settings.fisher,
                "draws": self.settings.draws,
                "seed": self.settings.seed,
                "activations": str(self.dtype).removeprefix("torch."),
                "sums": str(self.settings.dtype).removeprefix("torch."),
                "directions_per_layer": o.directions,
                "radii": o.radii.tolist(),
                "ray_samples": o.ray_samples,
                "gauges": o.gauges,
            },
            "cost": {
                "seconds": self.seconds,
                "peak_bytes": found.peak,
                "flops": costs.flops,
                "planned_seconds": costs.seconds,
                "planned_bytes": costs.memory,
            },
            "layers": layers,
            "skipped": [asdict(s) for s in self.survey.skipped],
            "gauges": gauges,
            "totals": totals(layers, self.model, known, gauges, self.survey.tied),
            "notes": list(dict.fromkeys(self.notes)),
        }

    def _write(
        self,
        store: Store,
        report: dict[str, Any],
        spectra: dict[str, tuple[Spectrum, Spectrum]],
    ) -> None:
        values: dict[str, Tensor] = {}
        for name, (a, g) in spectra.items():
            values[f"A/{name}"] = a.values.contiguous().clone()
            values[f"G/{name}"] = g.values.contiguous().clone()
        store.write("spectra.safetensors", lambda path: save_file(values, path))
        text = to_json(report)
        store.write("report.json", lambda path: path.write_text(text, encoding="utf-8"))
        from deaddir_fast.scan.html import write_html

        write_html(self.out)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    machine = platform.processor() or platform.machine()
    return f"{device.type}: {machine}, {torch.get_num_threads()} threads"


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
