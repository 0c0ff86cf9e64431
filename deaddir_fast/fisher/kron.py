"""Kronecker factors of a model's Fisher from batches of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast._progress import stages
from deaddir_fast.fisher.collect import LARGEST_HEAD, Collector
from deaddir_fast.fisher.factors import KronFactors
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets import seeds
from deaddir_fast.nets.graph import batch_size
from deaddir_fast.nets.rays import KINDS
from deaddir_fast.nets.streams import Streams
from deaddir_fast.nets.survey import Survey, survey

#: Backward passes per batch above which the exact Fisher is refused.
MOST_PASSES = 4096


@dataclass(frozen=True)
class Batch:
    """One batch: what the model takes, which of its tokens count, and labels if there are any."""

    inputs: Any
    targets: Tensor | None
    mask: Tensor | None
    n: int


def as_batch(given: Any, fisher: str) -> Batch:
    """Read one item of ``batches``.

    Labels that travel with the inputs ("labels" of a dict) are not shown to the model, which would
    compute a loss from them. An "attention_mask" (n, t) of a dict says which tokens count.
    """
    targets = None
    if fisher == "empirical" and isinstance(given, (tuple, list)):
        if len(given) != 2 or not isinstance(given[1], Tensor):
            raise _check.fail("batches", given, "pairs (inputs, targets) for the empirical Fisher")
        given, targets = given
    mask = None
    if isinstance(given, Mapping):
        given = dict(given)
        labels = given.pop("labels", None)
        targets = labels if targets is None else targets
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.dtype != torch.bool and bool((mask < 0).any()):
                raise _check.fail("batches", mask, "an attention_mask of ones and zeros")
            mask = mask.bool()
            mask = None if bool(mask.all()) else mask
        else:
            mask = None
    if fisher == "empirical" and targets is None:
        raise ValueError(
            "batches: the empirical Fisher needs pairs (inputs, targets), got inputs alone"
        )
    return Batch(given, targets if fisher == "empirical" else None, mask, batch_size(given))


def as_batches(batches: Any, fisher: str) -> Iterator[Batch]:
    """Read ``batches``; a tensor or a dict is one batch."""
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        raise _check.fail("batches", batches, "an iterable of inputs", TypeError)
    for given in batches:
        batch = as_batch(given, fisher)
        if batch.n:
            yield batch


@dataclass(frozen=True)
class Settings:
    """How factors are computed; see :func:`kron_factors`."""

    likelihood: likelihoods.Likelihood
    fisher: str
    kfac: str
    draws: int
    seed: int
    dtype: torch.dtype | None
    share_inputs: bool
    largest_head: int
    most_passes: int


class Pass:
    """Factors of one stretch of batches; the scan makes one for each shard.

    Attributes:
        agree: for a model spread over processes, which must all run as many backward passes: the
            largest of the numbers that they give. Missing ones are made up with zeros.
    """

    agree: Callable[[int], int] | None = None

    def __init__(self, model: nn.Module, found: Survey, settings: Settings) -> None:
        self.settings, self.model = settings, model
        self.laid_out = found.samples > 1
        if not settings.share_inputs:
            found = _alone(found)
        head = found.head
        closed = (
            head is not None
            and isinstance(settings.likelihood, likelihoods.Categorical)
            and found.layers[head].outputs > settings.largest_head
        )
        self.collector = Collector(
            found,
            dtype=settings.dtype,
            kfac=settings.kfac,
            closed_head=closed,
            scale=settings.draws**-0.5 if settings.fisher == "mc" else 1.0,
        )
        self.streams = Streams(
            model,
            found,
            on_input=self.collector.on_input,
            on_gradient=self.collector.on_gradient,
        )

    def __enter__(self) -> Pass:
        self.streams.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.streams.__exit__(*error)

    def add(self, batch: Batch, first: int) -> None:
        """Add one batch whose first sample has index ``first`` in the whole data."""
        s, collector = self.settings, self.collector
        if batch.n > 1 and not self.laid_out:
            self._lay_out(batch)
        collector.begin(batch.n, batch.mask)
        z = self.streams.forward(batch.inputs, batch.n)
        mask = output_mask(z, batch, s.likelihood)
        if mask is None and batch.mask is not None and z.ndim > 2:
            collector.notes["the outputs do not match the mask; those of padding are counted"] = (
                None
            )
        if collector.closed_head is not None:
            collector.head_diagonal(z, mask)
        passes = list_of_seeds(z, batch, mask, first, s)
        if self.agree is not None:
            here = sum(1 for _ in passes)
            zeros = repeat(torch.zeros_like(z), self.agree(here) - here)
            passes = chain(list_of_seeds(z, batch, mask, first, s), zeros)
        held: Tensor | None = None
        for seed in passes:
            if held is not None:
                self.streams.backward(z, held, last=False)
                collector.end_pass()
            held = seed
        if held is not None:
            self.streams.backward(z, held)
            collector.end_pass()

    def _lay_out(self, batch: Batch) -> None:
        """Find the layouts that one sample could not tell."""
        layers = self.streams.survey.layers
        self.streams.__exit__()
        try:
            again = survey(self.model, batch.inputs, layers=list(layers))
        finally:
            self.streams.__enter__()
        for name, layer in layers.items():
            if name not in again.layers:
                why = next((s.why for s in again.skipped if s.name == name), "it is not used")
                raise ValueError(
                    f"batches: with one sample in the first batch {name} seemed to be a layer, but "
                    f"{why}; begin with a batch of two samples at least"
                )
            layer.layout = again.layers[name].layout
        self.laid_out = True


def _alone(found: Survey) -> Survey:
    return replace(found, leaders={})


def output_mask(z: Tensor, batch: Batch, likelihood: likelihoods.Likelihood) -> Tensor | None:
    """(n, t) which output positions count."""
    if z.ndim < 2 or z.shape[0] != batch.n:
        raise _check.fail(
            "model", z, f"an output (samples, ..., c) that leads with the {batch.n} samples given"
        )
    if not z.is_floating_point():
        raise _check.fail("model", z, "floating-point outputs", TypeError)
    if isinstance(likelihood, likelihoods.Categorical) and z.shape[-1] < 2:
        raise _check.fail("model", z, "outputs (samples, ..., classes) with at least two classes")
    mask = batch.mask
    if mask is None or z.ndim < 3:
        return None
    return mask if tuple(z.shape[:-1]) == tuple(mask.shape) else None


def list_of_seeds(
    z: Tensor, batch: Batch, mask: Tensor | None, first: int, s: Settings
) -> Iterator[Tensor]:
    """The output gradients of one batch, lazily.

    Raises:
        ValueError: more backward passes than allowed.
    """
    if s.fisher == "exact":
        count = seeds.exact_count(z, s.likelihood)
        if count > s.most_passes:
            raise ValueError(
                f"fisher: 'exact' takes {count} backward passes a batch for outputs of shape "
                f"{tuple(z.shape[1:])} a sample; expected at most {s.most_passes}: use "
                "fisher='mc', or raise most_passes"
            )
        return seeds.exact(z, s.likelihood, mask)
    if s.fisher == "empirical":
        assert batch.targets is not None
        return iter([seeds.empirical(z, s.likelihood, batch.targets, mask)])
    return (
        seeds.sampled(z, s.likelihood, seeds.noise(z, s.likelihood, first, d, s.seed, mask), mask)
        for d in range(s.draws)
    )


def check_settings(
    likelihood: Any,
    fisher: str,
    kfac: str,
    draws: int,
    seed: int,
    dtype: torch.dtype | None,
    share_inputs: bool,
    largest_head: int,
    most_passes: int,
) -> Settings:
    """Check the options of :func:`kron_factors`."""
    if dtype not in (None, torch.float32, torch.float64):
        raise _check.fail("dtype", dtype, "torch.float32, torch.float64 or None")
    return Settings(
        likelihoods.get(likelihood),
        _check.choice("fisher", fisher, KINDS),
        _check.choice("kfac", kfac, ("expand", "reduce")),
        _check.integer("draws", draws, 1),
        _check.integer("seed", seed, 0),
        dtype,
        bool(share_inputs),
        _check.integer("largest_head", largest_head, 0),
        _check.integer("most_passes", most_passes, 1),
    )


def kron_factors(
    model: nn.Module,
    batches: Any,
    *,
    likelihood: str | likelihoods.Likelihood = "categorical",
    fisher: str = "exact",
    layers: Sequence[str] | None = None,
    kfac: str = "expand",
    draws: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    share_inputs: bool = True,
    largest_head: int = LARGEST_HEAD,
    most_passes: int = MOST_PASSES,
    strict: bool = False,
    progress: bool | None = None,
) -> KronFactors:
    """Kronecker factors A and G of every layer's Fisher block (K-FAC).

    A is the mean over samples and tokens of a aᵀ (a layer's inputs, with a trailing 1 where there
    is a bias), G the mean over samples of the sum over tokens of g gᵀ (gradients of log p(y|x) with
    respect to its outputs), so that A ⊗ G approximates the block of F = E[s sᵀ], exactly where a
    and g are independent: deep linear networks, and the scale and shift of norms, whose exact block
    is G with A = 1. Sources: Martens & Grosse 2015; Eschenhagen et al. 2023 for shared weights.

    Bound for a batch of n samples of t tokens with one seed: 2 n t i o FLOP a layer forwards, as
    many backwards (none below the first layer), and n t (i² + o²) for the triangles of A and G,
    where an ordinary backward pass spends 2 n t i o on weight gradients: as much for a square
    layer, (r + 1/r) / 2 times as much for o = r i, and n t i² less for each layer that
    shares its A with another. Memory: activations that the backward pass needs, triangles of
    4 (i² + o²) / 2 bytes in fp32, and one layer's gradient at a time; bytes moved are those of a
    forward and a backward pass, with a and g read once more while they are in cache. Before the
    first batch two of its samples pass the model twice (the survey).

    K-FAC drops the terms between layers, so it does not see that a symmetry spanning two layers is
    null: use ``dd.ray_curvature`` for those directions.

    Args:
        model: a module in evaluation mode, of any floating-point dtype; its ``requires_grad`` flags
            are put back.
        batches: an iterable of inputs, each a tensor, a tuple (positional) or a dict (keyword
            arguments) that leads with samples; a single tensor or dict is one batch. A dict's
            "attention_mask" (n, t) says which tokens count; its "labels" are not passed on. For
            ``fisher="empirical"`` pairs (inputs, targets), or dicts with "labels" aligned with
            the outputs; class -100 is ignored.
        likelihood: "categorical", "gaussian", "bernoulli", "poisson" or a Likelihood; outputs of
            sequence models are summed over tokens.
        fisher: "exact" (type 2: no labels, one backward pass per output coordinate), "mc" (labels
            drawn from the model, ``draws`` passes) or "empirical" (labels of the data; not the
            Fisher matrix).
        layers: names or patterns of the layers wanted; all by default.
        kfac: "expand" or "reduce", for weights shared over tokens.
        draws, seed: of the sampled labels. Each sample has numbers of its own, so the result
            depends on neither batch size nor padding.
        dtype: of the sums, fp32 or fp64; by default that of the activations, at least fp32.
        share_inputs: whether layers that receive one tensor share A.
        largest_head: a categorical output layer with more classes has no matrix G; its diagonal
            Σ p (1 − p) is kept.
        most_passes: limit of backward passes per batch for "exact".
        strict: raise instead of warn for parameters that no layer stands for.
        progress: a progress bar on stderr; by default on a terminal only.

    Returns:
        A mapping from layer name to factors that unpack as (A, G, count).

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    settings = check_settings(
        likelihood, fisher, kfac, draws, seed, dtype, share_inputs, largest_head, most_passes
    )
    stream = as_batches(batches, fisher)
    first = next(stream, None)
    if first is None:
        raise ValueError("batches: expected at least one sample, got none")
    found = survey(model, first.inputs, layers=layers, strict=strict)
    if not found.layers:
        raise ValueError("model: none of its modules is a layer that factors are known for")
    index = 0
    one = isinstance(batches, (Tensor, Mapping))
    total = 1 if one else len(batches) if hasattr(batches, "__len__") else None
    with Pass(model, found, settings) as work, stages(progress) as bars:
        advance = bars.task("factors", total)
        batch: Batch | None = first
        while batch is not None:
            work.add(batch, index)
            index += batch.n
            advance(1)
            batch = next(stream, None)
        factors = work.collector.result()
    return KronFactors(factors, describe(settings), tuple(work.collector.notes))


def describe(settings: Settings) -> dict[str, Any]:
    """What a manifest says of the settings."""
    from deaddir_fast import __version__

    return {
        "fisher": settings.fisher,
        "likelihood": repr(settings.likelihood),
        "kfac": settings.kfac,
        "draws": settings.draws if settings.fisher == "mc" else None,
        "seed": settings.seed if settings.fisher == "mc" else None,
        "dtype": None if settings.dtype is None else str(settings.dtype).removeprefix("torch."),
        "versions": {"deaddir_fast": __version__, "torch": torch.__version__},
    }
