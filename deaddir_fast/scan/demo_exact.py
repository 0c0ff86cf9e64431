"""First stage of the demo: networks whose triple and orders are known in closed form."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch

import deaddir_fast as dd
from deaddir_fast.scan import demo_models
from deaddir_fast.theory.log_threshold import LogThreshold

SAMPLES = 40  # random inputs of the linear networks; their second moment has full rank
RADII = torch.logspace(-4, 0, 33, dtype=torch.float64)


@dataclass(frozen=True)
class ExactCase:
    """A triple read beside its closed form.

    Attributes:
        name, point: the network and where in its fibre of true parameters it sits.
        local, local_source: (λ, m) at this very point, and where the formula comes from.
        deepest, deepest_source: the same at the deepest points of the fibre, the model's λ.
        rlct, multiplicity, fluctuation, lower, upper, verdict, fluctuation_verdict, rule,
        forwards: of the triple read.
        samples, seconds: inputs used and wall time.
    """

    name: str
    point: str
    local: LogThreshold
    local_source: str
    deepest: LogThreshold
    deepest_source: str
    rlct: Fraction | float
    multiplicity: int
    fluctuation: float
    lower: Fraction
    upper: Fraction | float
    verdict: str
    fluctuation_verdict: str
    rule: str
    forwards: float
    samples: int
    seconds: float

    @property
    def resolved(self) -> bool:
        """Whether λ and m were decided."""
        return self.verdict == "resolved"

    @property
    def agrees(self) -> bool:
        """Resolved and equal to the closed form, or bounds that contain it."""
        if self.resolved:
            return (self.rlct, self.multiplicity) == (self.local.rlct, self.local.multiplicity)
        return self.lower <= self.local.rlct <= self.upper


def _read(
    name: str,
    point: str,
    model: torch.nn.Module,
    x: torch.Tensor,
    local: tuple[LogThreshold, str],
    deepest: tuple[LogThreshold, str],
) -> ExactCase:
    start = time.perf_counter()
    triple = dd.read_triple(model, x, likelihood="gaussian")
    return ExactCase(
        name,
        point,
        *local,
        *deepest,
        triple.rlct,
        triple.multiplicity,
        triple.fluctuation,
        triple.lower,
        triple.upper,
        triple.verdict,
        triple.fluctuation_verdict,
        triple.rule,
        triple.forwards,
        triple.samples,
        time.perf_counter() - start,
    )


def reduced_rank(
    inputs: int,
    outputs: int,
    hidden: int,
    rank: int,
    rank_a: int,
    rank_b: int,
    point: str,
    seed: int,
) -> ExactCase:
    """Two linear layers at a point of given ranks."""
    generator = torch.Generator().manual_seed(seed)
    model = demo_models.reduced_rank_point(inputs, outputs, hidden, rank, rank_a, rank_b, generator)
    return _read(
        f"reduced rank {inputs}-{hidden}-{outputs}, rank {rank}",
        f"{point}: ranks {rank_a}, {rank_b}",
        model,
        demo_models.inputs_of_width(inputs, SAMPLES, generator),
        (
            dd.theory.reduced_rank_local(inputs, outputs, hidden, rank, rank_a, rank_b),
            "theory.reduced_rank_local",
        ),
        (
            dd.theory.reduced_rank_regression(inputs, outputs, hidden, rank),
            "theory.reduced_rank_regression",
        ),
    )


def deep_linear(widths: Sequence[int], ranks: Sequence[int], point: str, seed: int) -> ExactCase:
    """Generic linear layers of given ranks, at points where the fibre is smooth.

    There λ is half the codimension of the fibre, that is half the rank of the differential of the
    product: it is onto where the last layers together are onto, and has the dimension of the
    matrices of that rank where no product of the widths' bottleneck can have a larger one.

    Raises:
        ValueError: at other points, which have no closed form here.
    """
    generator = torch.Generator().manual_seed(seed)
    model = demo_models.deep_linear_point(widths, ranks, generator)
    weights = [p.detach() for p in model.parameters()]
    # Generic factors: the product has the smallest of the ranks.
    rank, (m, n) = min(ranks), (widths[0], widths[-1])
    after_first = torch.linalg.multi_dot(weights[:0:-1]) if len(weights) > 2 else weights[-1]
    if rank == min(widths) and all(
        k == min(pair) for k, pair in zip(ranks, pairwise(widths), strict=True)
    ):
        codimension, why = rank * (m + n - rank), "½ dim of the matrices of that rank"
    elif int(torch.linalg.matrix_rank(after_first)) == n:
        codimension, why = m * n, "½ number of outputs × inputs: the product map is onto"
    else:
        raise ValueError(f"ranks: no closed form for {tuple(ranks)} with widths {tuple(widths)}")
    return _read(
        f"deep linear {'-'.join(map(str, widths))}, rank {rank}",
        f"{point}: ranks {', '.join(map(str, ranks))}",
        model,
        demo_models.inputs_of_width(m, SAMPLES, generator),
        (LogThreshold(Fraction(codimension, 2), 1), f"smooth point, {why}"),
        (dd.theory.deep_linear(widths, rank), "theory.deep_linear"),
    )


def exact_cases(seed: int, quick: bool) -> Iterator[ExactCase]:
    """The triples, one at a time; :func:`count_cases` says how many."""
    yield reduced_rank(4, 3, 3, 1, 2, 2, "generic point", seed)
    yield deep_linear((4, 3, 2, 3), (3, 2, 2), "generic point", seed)
    if quick:
        return
    yield reduced_rank(4, 3, 3, 1, 1, 3, "other component", seed)
    yield reduced_rank(3, 3, 3, 2, 2, 2, "crossing", seed)
    yield reduced_rank(3, 2, 2, 1, 1, 1, "deepest stratum", seed)
    yield deep_linear((4, 3, 3, 2), (1, 3, 2), "smooth point", seed)


def count_cases(quick: bool) -> int:
    """How many triples :func:`exact_cases` reads."""
    return 2 if quick else 6


@dataclass(frozen=True)
class Ray:
    """Curvature along one direction and the three readings of its order.

    Attributes:
        name, kind: what the direction is ("chain", "live", "gauge line").
        expected: the order by construction.
        radii, fisher, kl, pointwise: (r,) the curve and ``sqrt(t²F/2K)``.
        jet: order from Taylor coefficients at t = 0.
        fit: rate fit of the curve.
        identity: order from t²F/2K at t → 0 over the fitted window.
        seconds: wall time.
    """

    name: str
    kind: str
    expected: float
    radii: list[float]
    fisher: list[float]
    kl: list[float]
    pointwise: list[float]
    jet: float
    fit: dd.RateFit
    identity: float
    seconds: float

    @property
    def agrees(self) -> bool:
        """No reading contradicts the order expected; an unresolved one contradicts nothing."""
        if not math.isnan(self.jet) and self.jet != self.expected:
            return False
        return not self.fit.resolved or (
            abs(self.fit.order - self.expected) < 0.05 and abs(self.identity - self.expected) < 0.05
        )


def read_ray(
    name: str,
    kind: str,
    expected: float,
    model: torch.nn.Module,
    x: torch.Tensor,
    direction: dict[str, Any],
    likelihood: str,
) -> Ray:
    """Order of one direction by jets, by the slope and by the pointwise identity."""
    start = time.perf_counter()
    jet = dd.ray_orders(model, x, direction, likelihood=likelihood)
    seen = dd.ray_curvature(model, x, direction, RADII, likelihood=likelihood)
    fit = dd.fit_rate(RADII, seen.fisher[0], kl=seen.kl[0])
    return Ray(
        name,
        kind,
        expected,
        RADII.tolist(),
        seen.fisher[0].tolist(),
        seen.kl[0].tolist(),
        seen.pointwise_order()[0].tolist(),
        float(jet.orders[0]),
        fit,
        fit.order_pointwise,
        time.perf_counter() - start,
    )


def chains(seed: int, quick: bool) -> Iterator[Ray]:
    """Linear chains of L layers with one dead unit: order L."""
    for depth in (2, 3) if quick else (2, 3, 4, 5):
        generator = torch.Generator().manual_seed(seed + depth)
        model, direction = demo_models.dead_unit_chain(depth, generator)
        x = demo_models.inputs_of_width(3, SAMPLES, generator)
        yield read_ray(f"chain of {depth} layers", "chain", depth, model, x, direction, "gaussian")


def count_chains(quick: bool) -> int:
    """How many chains :func:`chains` reads."""
    return 2 if quick else 4
