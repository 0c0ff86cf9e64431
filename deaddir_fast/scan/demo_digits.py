"""Second stage of the demo: what is dead in a network trained on handwritten digits, and why."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

import deaddir_fast as dd
from deaddir_fast.scan import demo_models
from deaddir_fast.scan.demo_exact import Ray, read_ray

SIDE = 8  # pixels along an image's edge


@dataclass(frozen=True)
class Cause:
    """One reason for dead directions, counted from the data and the activations alone.

    Attributes:
        name: what it is.
        detail: which pixels, units or layers.
        dimensions: independent dead directions it makes (no direction is counted twice).
    """

    name: str
    detail: str
    dimensions: int


@dataclass(frozen=True)
class DigitsReading:
    """The reading of the digits network.

    Attributes:
        recipe, accuracy, held_out, samples, hidden, parameters: the network and its data.
        blank_pixels: (row, column) of pixels that are zero on every image read.
        dead_units: hidden units that fire on none of them.
        causes: the dead space by cause; their sum is compared with the dimension read.
        groups: (kind, relaxed order, line order, count) of the directions read.
        gauges: (name, group dimension) of the symmetries found.
        rank, dead, rank_half, rank_limit, gap, tolerance, singular_values: the spectrum.
        rlct ... rests_on: the triple, see ``dd.Triple``.
        gauge_curvature, random_curvature: uᵀF(θ0)u of the worst rescaling tangent, and of a
            random direction.
        rays: curves for the picture.
    """

    recipe: dict[str, float]
    accuracy: float
    held_out: int
    samples: int
    hidden: int
    parameters: int
    blank_pixels: list[tuple[int, int]]
    dead_units: list[int]
    causes: list[Cause]
    groups: list[tuple[str, float, float, int]]
    gauges: list[tuple[str, int]]
    rank: int
    dead: int
    rank_half: int | None
    rank_limit: int
    gap: float
    tolerance: float
    singular_values: list[float]
    rlct: Fraction | float
    multiplicity: int
    fluctuation: float
    lower: Fraction
    upper: Fraction | float
    verdict: str
    fluctuation_verdict: str
    rule: str
    rests_on: tuple[str, ...]
    forwards: float
    gauge_curvature: float
    random_curvature: float
    rays: list[Ray]
    seconds_training: float
    seconds_reading: float

    @property
    def explained(self) -> bool:
        """Whether the causes account for the dead space exactly."""
        return sum(c.dimensions for c in self.causes) == self.dead


def _names(items: list[Any], most: int = 6) -> str:
    shown = ", ".join(str(i) for i in items[:most])
    return shown + (f", … ({len(items)} in all)" if len(items) > most else "")


def causes(images: Tensor, active: Tensor) -> list[Cause]:
    """Dead directions that the data and the activation pattern explain.

    A unit sees only the images on which it fires: its incoming weights and bias can move without
    effect in every direction orthogonal to those images (with a trailing 1). Always-blank pixels
    are the directions that all units share.

    Args:
        images: (n, 64).
        active: (n, hidden) whether a unit fires on an image.
    """
    n, pixels = images.shape
    blank = [i for i in range(pixels) if not bool(images[:, i].any())]
    with_one = torch.cat([images, images.new_ones(n, 1)], 1)
    live = [u for u in range(active.shape[1]) if bool(active[:, u].any())]
    dead = [u for u in range(active.shape[1]) if u not in live]
    unseen = [pixels + 1 - int(torch.linalg.matrix_rank(with_one[active[:, u]])) for u in live]
    outputs = 10
    return [
        Cause(
            "always-blank pixels",
            f"(row, column) {_names([divmod(i, SIDE) for i in blank])}, at {len(live)} live units",
            len(blank) * len(live),
        ),
        Cause(
            "pixels unseen while a unit fires",
            "blank, or tied to others, on the images that a live unit fires on",
            sum(unseen) - len(blank) * len(live),
        ),
        Cause(
            "dead units",
            f"units {_names(dead)}: all weights in and out, and the bias" if dead else "none",
            len(dead) * (pixels + 1 + outputs),
        ),
        Cause("ReLU rescaling (gauge)", "one per live unit", len(live)),
        Cause("class shift (gauge)", "one per live unit, one for the bias", len(live) + 1),
    ]


def read_digits(
    seed: int, quick: bool, tell: Callable[[str], None] = lambda text: None
) -> DigitsReading:
    """Train, read, and account for the dead space.

    Raises:
        ImportError: without scikit-learn.
    """
    hidden, samples = (8, 150) if quick else (16, 700)
    start = time.perf_counter()
    tell("training on digits")
    net = demo_models.digits(hidden, samples, seed)
    trained = time.perf_counter()
    tell("reading the trained network")
    triple = dd.read_triple(net.model, net.images, likelihood="categorical")
    read = time.perf_counter()
    dead = triple.directions
    tell("curvature along rays")
    active = net.model[0](net.images) > 0
    state = dict(net.model.named_parameters())
    gauges = dd.gauge.find(net.model, net.images)
    rescaling = next(g for g in gauges if g.likelihood is None).tangents(state)
    firing = torch.nonzero(active.any(0)).flatten()
    tangents: dict[str, Any] = {k: v[firing] for k, v in rescaling.items()}
    generator = torch.Generator().manual_seed(seed)
    anywhere: dict[str, Any] = {
        k: torch.randn(1, *p.shape, dtype=p.dtype, generator=generator) for k, p in state.items()
    }
    at_zero = [
        dd.ray_curvature(net.model, net.images, d, [0.0]).fisher for d in (tangents, anywhere)
    ]
    rays = [
        read_ray("random direction", "live", 1, net.model, net.images, anywhere, "categorical"),
        read_ray(
            "rescaling, straight line",
            "gauge line",
            2,
            net.model,
            net.images,
            {k: v[:1] for k, v in tangents.items()},
            "categorical",
        ),
    ]
    groups = Counter(
        zip(
            dead.kinds,
            map(str, dead.orders.tolist()),
            map(str, dead.line_orders.tolist()),
            strict=True,
        )
    )
    found = causes(net.images, active)
    return DigitsReading(
        recipe=net.recipe,
        accuracy=net.accuracy,
        held_out=net.held_out,
        samples=triple.samples,
        hidden=hidden,
        parameters=dead.dimension,
        blank_pixels=[divmod(i, SIDE) for i in range(SIDE**2) if not bool(net.images[:, i].any())],
        dead_units=[u for u in range(hidden) if not bool(active[:, u].any())],
        causes=found,
        groups=[(k, float(o), float(line), c) for (k, o, line), c in groups.items()],
        gauges=[(g.name, g.dimension) for g in gauges],
        rank=triple.rank,
        dead=len(dead),
        rank_half=dead.rank_half,
        rank_limit=triple.rank_limit,
        gap=triple.margin,
        tolerance=triple.floor,
        singular_values=dead.singular_values.tolist(),
        rlct=triple.rlct,
        multiplicity=triple.multiplicity,
        fluctuation=triple.fluctuation,
        lower=triple.lower,
        upper=triple.upper,
        verdict=triple.verdict,
        fluctuation_verdict=triple.fluctuation_verdict,
        rule=triple.rule,
        rests_on=triple.rests_on,
        forwards=triple.forwards,
        gauge_curvature=float(at_zero[0].max()),
        random_curvature=float(at_zero[1][0, 0]),
        rays=rays,
        seconds_training=trained - start,
        seconds_reading=read - trained,
    )
