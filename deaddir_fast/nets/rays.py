"""Curvature and divergence of a network along rays theta0 + r u.

For a unit direction u: F(r) = u^T F(theta0 + r u) u, with F the Fisher matrix under the model's
own labels, and K(r) = KL(p_theta0 || p_(theta0 + r u)); means over samples, sums over tokens. Along
a dead direction of KL order k, F ~ b r^(2k-2) and r^2 F / (2 K) -> k^2 (Dead Directions,
arXiv 2606.05957; the pointwise identity is derived).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deaddir_fast import _check
from deaddir_fast.nets import dual, graph
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.attention import whole_attention
from deaddir_fast.nets.dual_values import Still
from deaddir_fast.nets.precision import ieee
from deaddir_fast.nets.weights import Directions, Points, RankOne, check_directions, weight_bytes
from deaddir_fast.ops import softmax_fisher

KINDS = ("exact", "mc", "empirical")

# Bytes of one pass on a CPU, small enough to stay in cache and in memory the allocator reuses.
# Full-rank directions form W0 + r U once per pass, or read U once, which more samples have to pay
# for. At radius 0 little is done per value next to the products, which more samples speed up.
_CPU_WORKING_SET = {"low": 30 << 20, "still": 60 << 20, "full": 240 << 20}
_FEWEST_SAMPLES = {"low": 16, "still": 32, "full": 256}


@dataclass(frozen=True)
class Chunking:
    """How the work was cut to stay within the memory budget.

    Attributes:
        samples, directions, radii: the largest chunk.
        chunks: number of passes through the graph.
        estimate: bytes one pass is estimated to need beyond the model, its inputs and directions.
        budget: bytes allowed.
    """

    samples: int
    directions: int
    radii: int
    chunks: int
    estimate: int
    budget: int


@dataclass(frozen=True)
class RayCurvature:
    """Directional Fisher curvature and KL divergence on a grid of directions and radii.

    All tensors are fp64 on the CPU.

    Attributes:
        radii: (r,).
        fisher: (p, r), u^T F(theta0 + r u) u for unit u.
        kl: (p, r), KL(p_theta0 || p_(theta0 + r u)), in nats.
        stderr: (p, r), standard error of ``fisher`` over samples (nan for a single sample).
        kl_stderr: (p, r), the same for ``kl``.
        kind: which Fisher: "exact" (type 2, the expectation over labels in closed form), "mc"
            (labels sampled from the model) or "empirical" (labels from the data: not the Fisher
            matrix, its rates can differ).
        likelihood: name of the likelihood.
        samples: n.
        norms: (p,), norms of the directions before scaling to 1.
        chunking: how the work was cut.
        notes: what limits these numbers (precision, operations without an exact rule, kinks).
    """

    radii: Tensor
    fisher: Tensor
    kl: Tensor
    stderr: Tensor
    kl_stderr: Tensor
    kind: str
    likelihood: str
    samples: int
    norms: Tensor = field(repr=False)
    chunking: Chunking
    notes: tuple[str, ...]

    def pointwise_order(self) -> Tensor:
        """(p, r): sqrt(r^2 F / (2 K)), the KL order read at each radius without a fit.

        Tends to k as r -> 0; nan where K is 0 (on a fibre, and at radius 0).
        """
        ratio = self.radii.square() * (self.fisher / (2 * self.kl))
        return torch.where(self.kl > 0, ratio, torch.nan).sqrt()


class _Moments:
    """Mean and spread over samples, merged chunk by chunk; squares are scaled, not underflowed."""

    def __init__(self, points: int) -> None:
        self.count = 0
        self.mean = torch.zeros(points, dtype=torch.float64)
        self.scale = torch.zeros(points, dtype=torch.float64)
        self.squares = torch.zeros(points, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """(P, n) more values."""
        n = values.shape[1]
        mean = values.mean(1)
        shift = mean - self.mean
        spread = values - mean.unsqueeze(1)
        scale = torch.maximum(spread.abs().amax(1), torch.maximum(shift.abs(), self.scale))
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        total = self.count + n
        self.squares = (
            self.squares * (self.scale / safe).square()
            + (spread / safe.unsqueeze(1)).square().sum(1)
            + (shift / safe).square() * (self.count * n / total if self.count else 0.0)
        )
        self.mean = self.mean + shift * (n / total)
        self.scale, self.count = scale, total

    def stderr(self) -> Tensor:
        """(P,): standard error of the mean."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return self.scale * (self.squares / (self.count - 1) / self.count).sqrt()


def check_radii(radii: Any) -> Tensor:
    """Check real, finite radii; (r,) fp64 on the CPU."""
    try:
        values = torch.as_tensor(radii)
    except (TypeError, ValueError, RuntimeError):
        raise _check.fail("radii", radii, "a sequence of real numbers", TypeError) from None
    if values.is_complex() or values.dtype == torch.bool:
        raise _check.fail("radii", radii, "real numbers", TypeError)
    if isinstance(radii, (Sequence, Iterator)) or not isinstance(radii, Tensor):
        # as_tensor rounds Python floats to the default dtype
        values = torch.as_tensor(radii, dtype=torch.float64)
    values = values.detach().to("cpu", torch.float64)
    values = values.reshape(1) if values.ndim == 0 else values
    if values.ndim != 1 or values.numel() == 0:
        raise _check.fail("radii", radii, "a non-empty one-dimensional sequence")
    if not bool(torch.isfinite(values).all()):
        raise _check.fail("radii", radii, "finite numbers")
    return values


def _check_model(model: Any, inputs: Any) -> tuple[dict[str, Tensor], torch.dtype]:
    if not isinstance(model, nn.Module):
        raise _check.fail("model", model, "a torch.nn.Module", TypeError)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    if not parameters:
        raise ValueError("model: expected parameters, the module has none")
    for name, value in parameters.items():
        if value.dtype not in (torch.float64, torch.float32):
            raise TypeError(
                f"model: parameter {name!r} is {str(value.dtype).removeprefix('torch.')}, too "
                "coarse for curvature along rays; expected float64 or float32 (model.double())"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"model: parameter {name!r} has entries that are not finite")
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor) and x.is_floating_point() and bool(torch.isnan(x).any()):
            raise ValueError("inputs: expected no nan")
    single = any(v.dtype == torch.float32 for v in parameters.values())
    return parameters, torch.float32 if single else torch.float64


def _default_budget(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(0.5 * free)
    return 1 << 30


def _plan(
    n: int,
    p: int,
    r: int,
    per_point: float,
    shared: float,
    budget: int,
    target: int,
    fewest: int,
) -> tuple[int, int, int]:
    """Chunk sizes (samples, directions, radii) from bytes per (sample, point) and per sample."""
    few = min(n, fewest)
    samples = int(target / (p * r * per_point + shared))
    if samples >= few:
        return _divisor(n, samples), p, r
    points = int((max(target, min(budget, r * few * per_point)) / few - shared) / per_point)
    if points < 1:
        few = min(n, int(budget / (per_point + shared)))
        points = 1
    if points < r:
        return few, 1, points
    return few, min(points // r, p), r


def _divisor(n: int, largest: int) -> int:
    """A chunk size that cuts n evenly if one is near ``largest``: every size is one capture."""
    largest = min(n, largest)
    for size in range(largest, largest // 2, -1):
        if n % size == 0:
            return size
    return largest


def _even(total: int, largest: int) -> list[tuple[int, int]]:
    """Cut ``total`` into as few nearly equal ranges as ``largest`` allows: at most two sizes."""
    count = -(-total // largest)
    small, extra = divmod(total, count)
    stops = [0]
    for k in range(count):
        stops.append(stops[-1] + small + (1 if k < extra else 0))
    return list(pairwise(stops))


def _outputs(z: Tensor, n: int, categorical: bool) -> None:
    """Check the model's output against the likelihood."""
    if z.ndim == 0 or z.shape[0] != n:
        raise _check.fail("model", z, f"an output that leads with the {n} samples it was given")
    if not z.is_floating_point():
        raise _check.fail("model", z, "floating-point outputs", TypeError)
    if categorical and (z.ndim < 2 or z.shape[-1] < 2):
        raise _check.fail("model", z, "outputs (samples, ..., classes) with at least two classes")


def _check_targets(targets: Any, z: Tensor, n: int, likelihood: likelihoods.Likelihood) -> Tensor:
    """Labels of the data, of the shape the likelihood wants for all samples."""
    categorical = isinstance(likelihood, likelihoods.Categorical)
    shape = (n, *(z.shape[1:-1] if categorical else z.shape[1:]))
    if not isinstance(targets, Tensor):
        raise _check.fail("targets", targets, f"a tensor of shape {shape}", TypeError)
    if tuple(targets.shape) != shape:
        raise _check.fail("targets", targets, f"shape {shape}")
    if categorical:
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise _check.fail("targets", targets, "integer class indices", TypeError)
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= z.shape[-1]:
            raise ValueError(
                f"targets: expected class indices in 0..{z.shape[-1] - 1}, got {low}..{high}"
            )
        return targets.long()
    if not bool(torch.isfinite(targets).all()):
        raise _check.fail("targets", targets, "finite values")
    return targets.double()


@dataclass
class Recording:
    """Captures of one model that several calls share; its parameters must stay what they are.

    Attributes:
        captures: by number of samples, with all parameters exposed.
    """

    captures: dict[int, graph.Capture] = field(default_factory=dict)


class _Rays:
    """One call of :func:`ray_curvature`: the model, its captures and what is read from them."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        directions: Directions,
        likelihood: likelihoods.Likelihood,
        recording: Recording | None,
    ) -> None:
        self.model, self.inputs, self.directions = model, inputs, directions
        self.likelihood = likelihood
        self.names = tuple(directions.slices) if recording is None else None
        self.captures = {} if recording is None else recording.captures
        self.notes: set[str] = set()
        self.checked = False

    def capture(self, samples: Any) -> graph.Capture:
        """The forward for this many samples, recorded on these if no other recording will do."""
        size = graph.batch_size(samples)
        if size not in self.captures:
            self.captures[size] = self._fitting(samples) or graph.capture(
                self.model, samples, names=self.names, keep_attention=True
            )
        return self.captures[size]

    def _fitting(self, samples: Any) -> graph.Capture | None:
        """A recording of another number of samples that holds for these too, if there is one."""
        known = next((x for size, x in self.captures.items() if size > 1), None)
        if known is None or not known.names_no_extent():
            return None
        # What the model does may still depend on their number.
        direct = self._direct(known.parameters, samples)
        return None if self._differ(known.replay(samples), direct) else known

    def _direct(self, parameters: dict[str, Tensor], samples: Any) -> Tensor:
        with graph.readable_attention(), whole_attention():  # no (T, T) matrix here either
            return graph.call_model(self.model, parameters, samples)

    @staticmethod
    def _differ(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return True
        scale = float(b.nan_to_num().abs().max()) if b.numel() else 0.0
        near = torch.finfo(b.dtype).eps ** 0.4 * max(scale, torch.finfo(b.dtype).tiny)
        return not bool(torch.isclose(a, b, rtol=0, atol=near, equal_nan=True).all())

    def forward(self, samples: Any, points: Points, parameters: dict[str, Any]) -> dual.Dual:
        """Output, its difference and its derivative on some samples at some points."""
        capture = self.capture(samples)
        out, notes = dual.run(capture, capture.bind(samples), parameters, points)
        self.notes |= notes
        if not self.checked:
            self._check_path(samples, points, out)
            self.checked = True
        return out

    def _check_path(self, samples: Any, points: Points, out: dual.Dual) -> None:
        """Compare one point, on fewer samples, with the model itself."""
        at = int(points.value.abs().argmax())
        d = at // points.r
        moved = {}
        known = dict(self.model.named_parameters())
        for name, u in self.directions.slices.items():
            base = known[name].detach()
            part = (
                RankOne(u.v[d : d + 1], u.w[d : d + 1]) if isinstance(u, RankOne) else u[d : d + 1]
            )
            dense = part.dense(base.shape) if isinstance(part, RankOne) else part
            moved[name] = base + points.value[at] * dense[0]
        few = min((graph.batch_size(samples) + 1) // 2, 8)
        direct = self._direct(moved, graph.slice_batch(samples, 0, few))
        recorded = out.base[:few] + out.delta[at, :few]
        if self._differ(recorded, direct):
            worst = float((recorded - direct).abs().max()) if recorded.shape == direct.shape else 0
            raise ValueError(
                "model: expected a function of each sample on its own and of its parameters; on "
                f"fewer samples, away from theta0, its output differs by {worst:.3g}"
            )


def ray_curvature(
    model: nn.Module,
    inputs: Any,
    directions: Mapping[str, Tensor | RankOne],
    radii: Any,
    *,
    likelihood: str | likelihoods.Likelihood = "categorical",
    fisher: str = "exact",
    targets: Tensor | None = None,
    draws: int = 1,
    seed: int = 0,
    memory_budget: int | None = None,
) -> RayCurvature:
    """Fisher curvature and KL divergence of a model along rays theta0 + r u.

    The exact Fisher takes no labels, draws no samples and stores no activations: all points of a
    chunk go through one dual forward (:mod:`deaddir_fast.nets.dual`) and the likelihood closes the
    expectation. Differences of outputs are propagated, not subtracted, so that in fp64 a KL of
    1e-30 is still relatively accurate. Where every radius is 0 only derivatives are propagated.

    Args:
        model: a module in eval mode with fp64 (exact) or fp32 (labelled) parameters. Half
            precision is refused. Its current parameters are theta0.
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments); samples n lead.
        directions: {parameter name: (p, *shape)}, missing parameters count as 0; a
            :class:`~deaddir_fast.nets.weights.RankOne` may stand for a matrix parameter. Each of
            the p directions is scaled to unit global norm. Slices that are zero or of rank one are
            detected and cost less.
        radii: (r,) real numbers; 0 and negative ones are allowed.
        likelihood: "categorical" (softmax over the last dimension), "gaussian" (unit variance),
            "bernoulli", "poisson" or a :class:`~deaddir_fast.nets.likelihood.Likelihood`.
            Sequence outputs (n, t, c) are summed over tokens and averaged over samples.
        fisher: "exact"; "mc" samples labels from the model, with common random numbers over all
            radii and directions; "empirical" takes ``targets``, whose rates need not be those of
            the Fisher matrix (with interpolated labels 4k - 2 instead of 2k - 2).
        targets: labels for "empirical": class indices (n, ...) or values of the outputs' shape.
        draws: label draws per sample for "mc".
        seed: seed of those draws.
        memory_budget: bytes for intermediate values; 1 GiB on a CPU and half the free memory on
            CUDA by default. Results do not depend on it beyond rounding.

    Returns:
        :class:`RayCurvature`.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
        NotImplementedError: naming an operation that torch cannot differentiate forward.
    """
    return read_rays(
        model, inputs, directions, radii, likelihood, fisher, targets, draws, seed, memory_budget
    )[0]


def read_rays(
    model: nn.Module,
    inputs: Any,
    directions: Mapping[str, Tensor | RankOne],
    radii: Any,
    likelihood: str | likelihoods.Likelihood,
    fisher: str,
    targets: Tensor | None,
    draws: int,
    seed: int,
    memory_budget: int | None,
    *,
    keep: bool = False,
    recording: Recording | None = None,
) -> tuple[RayCurvature, Tensor | None]:
    """What :func:`ray_curvature` returns and, if asked to ``keep`` it, the curvature per sample.

    The latter is (p, r, n), fp64 on the CPU. Calls for one model and inputs of one kind may share
    a ``recording``.
    """
    parameters, dtype = _check_model(model, inputs)
    n = graph.batch_size(inputs)
    if n == 0:
        raise ValueError("inputs: expected at least one sample, got 0")
    grid = check_radii(radii)
    lik = likelihoods.get(likelihood)
    _check.choice("fisher", fisher, KINDS)
    if (targets is not None) != (fisher == "empirical"):
        raise _check.fail(
            "targets", targets, "labels with fisher='empirical', and only then", ValueError
        )
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise _check.fail("draws", draws, "a positive integer")
    device = next(iter(parameters.values())).device
    budget = _default_budget(device) if memory_budget is None else memory_budget
    budget = int(_check.positive("memory_budget", budget))
    rays = check_directions(directions, parameters)
    order = rays.order()
    rays = rays if bool((order == torch.arange(rays.count)).all()) else rays.take(order)
    with torch.no_grad(), ieee(device):
        work = _Rays(model, inputs, rays, lik, recording)
        return _read(
            work, rays, order, grid, lik, fisher, targets, draws, seed, budget, dtype, keep
        )


def _read(
    work: _Rays,
    rays: Directions,
    order: Tensor,
    radii: Tensor,
    lik: likelihoods.Likelihood,
    kind: str,
    targets: Tensor | None,
    draws: int,
    seed: int,
    budget: int,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[RayCurvature, Tensor | None]:
    inputs = work.inputs
    n, p, r = graph.batch_size(inputs), rays.count, len(radii)
    few = min(n, 2)
    probe = work.capture(graph.slice_batch(inputs, 0, few))
    z = _sample_output(probe)
    _outputs(z, few, isinstance(lik, likelihoods.Categorical))
    still = not bool(radii.any())
    per_point, shared = (x / few for x in dual.working_bytes(probe, set(rays.slices), still))
    per_point += 8 * 6 * (z.numel() // few)
    on_cpu = z.device.type == "cpu"
    formed = weight_bytes(rays, probe.parameters, r)
    fixed = 0 if still else formed  # products with W + r U only form it for other radii
    room = budget - fixed
    if room < per_point + shared:
        need = int(fixed + per_point + shared) + 1
        raise _check.fail("memory_budget", budget, f"at least {need} bytes (one sample, one point)")
    structure = "full" if formed else "still" if still else "low"
    target = min(room, _CPU_WORKING_SET[structure]) if on_cpu else room
    fewest = _FEWEST_SAMPLES[structure]
    samples, some, radii_at_once = _plan(n, p, r, per_point, shared, room, target, fewest)
    if targets is not None:
        targets = _check_targets(targets, z, n, lik)
    noise = _noise(lik, z, n, draws, seed) if kind == "mc" else []

    like = next(iter(probe.parameters.values()), z)
    moments = torch.zeros(4, p, r, dtype=torch.float64)
    each = torch.empty(p, r, n, dtype=torch.float64) if keep else None
    parts = _even(n, samples)
    cuts = [(d, q) for d in _even(p, some) for q in _even(r, radii_at_once)]
    most = max(stop - start for start, stop in parts)
    wide, deep = max(b - a for (a, b), _ in cuts), max(v - u for _, (u, v) in cuts)
    for c, ((a, b), (u, v)) in enumerate(cuts):
        chunk = rays.take(slice(a, b))
        points = Points.make(chunk.norms, radii[u:v], like)
        work.directions = chunk
        work.checked = c > 0
        curvature, divergence = _Moments(points.count), _Moments(points.count)
        values: dict[str, Any] | None = None
        for start, stop in parts:
            batch = graph.slice_batch(inputs, start, stop)
            if values is None:
                values = dual.parameter_values(work.capture(batch), chunk, points)
            out = work.forward(batch, points, values)
            labels = [x[start:stop] for x in noise]
            if targets is not None:
                labels = [targets[start:stop]]
            f, k = _readings(lik, kind, out, labels)
            f = f.cpu()
            if each is not None:
                each[a:b, u:v, start:stop] = f.view(b - a, v - u, -1)
            curvature.add(f)
            divergence.add(k.cpu())
        found = (curvature.mean, curvature.stderr(), divergence.mean, divergence.stderr())
        moments[:, a:b, u:v] = torch.stack(found).view(4, b - a, v - u)
    back = torch.argsort(order)
    f, f_error, k, k_error = (x[back] for x in moments)
    if dtype == torch.float32:
        work.notes.add("float32: relative accuracy about 1e-6, with a floor near 1e-14 of the peak")
    if not bool(torch.isfinite(f).all() & torch.isfinite(k).all()):
        work.notes.add("some readings are not finite: the outputs overflow there")
    if n == 1:
        work.notes.add("one sample: no standard error")
    estimate = int(most * (wide * deep * per_point + shared) + fixed)
    chunking = Chunking(most, wide, deep, len(cuts) * len(parts), estimate, budget)
    result = RayCurvature(
        radii,
        f,
        k,
        f_error,
        k_error,
        kind,
        lik.name,
        n,
        rays.norms[back],
        chunking,
        tuple(sorted(work.notes)),
    )
    return result, None if each is None else each[back]


def _sample_output(capture: graph.Capture) -> Tensor:
    node = next(x for x in capture.graph.nodes if x.op == "output")
    (value,) = (x for x in node.all_input_nodes[:1])
    meta = value.meta.get("val")
    assert isinstance(meta, Tensor)
    return meta


def _noise(lik: likelihoods.Likelihood, z: Tensor, n: int, draws: int, seed: int) -> list[Tensor]:
    """Label noise for all samples at once, so that chunking cannot change it."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.zeros((), dtype=torch.float64, device=z.device).expand(n, *z.shape[1:])
    shape = shape.unsqueeze(-1) if z.ndim == 1 else shape
    return [lik.noise(shape, generator) for _ in range(draws)]


def _readings(
    lik: likelihoods.Likelihood, kind: str, out: dual.Dual, labels: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Per-sample curvature and divergence, (P, n) each, in fp64."""

    def per_sample(x: Tensor) -> Tensor:
        return x.flatten(2).sum(2) if x.ndim > 2 else x

    z0 = out.base.double()
    still = isinstance(out, Still)
    if still and kind == "exact" and isinstance(lik, likelihoods.Categorical):
        classes = z0.shape[-1]
        f = softmax_fisher(z0.reshape(-1, classes), out.dot.reshape(len(out.dot), -1, classes))
        f = per_sample(f.view(out.dot.shape[:-1]))
        return f, torch.zeros_like(f)
    delta, dot = out.delta.double(), out.dot.double()
    if z0.ndim == 1:
        z0, delta, dot = z0.unsqueeze(-1), delta.unsqueeze(-1), dot.unsqueeze(-1)
        labels = [y.unsqueeze(-1) if y.ndim == 1 else y for y in labels]

    k = dot.new_zeros(dot.shape[:2]) if still else per_sample(lik.kl(z0, delta))
    z = z0 + delta
    if kind == "exact":
        return per_sample(lik.fisher(z, dot)), k
    total: Tensor | None = None
    for y in labels:
        y = lik.label(z, y) if kind == "mc" else y
        score = per_sample((lik.score(z, y) * dot).sum(-1)).square()
        total = score if total is None else total + score
    assert total is not None
    return total / len(labels), k
