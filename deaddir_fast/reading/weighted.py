"""``weighted_bound``: an upper bound on λ from orders along weighted curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.nets.orders import unit_directions
from deaddir_fast.reading.local import LocalModel

DRAWS = 3  # generic coefficients for each weight vector
LARGEST = {1: 1, 2: 6, 3: 4, 4: 3, 5: 2, 6: 2, 7: 2, 8: 2}  # directions -> weights looked at


@dataclass(frozen=True)
class WeightedBound:
    """λ <= ``upper``, from the curves with these weights.

    Attributes:
        upper: Σ_i w_i (h_i + 1) / (2 · order) + complement / 2.
        weights: (p,) that attain it; of several the smallest.
        order: order in t of the outputs along θ0 + Σ_i c_i t^{w_i} u_i for generic c, or
            ``max_order`` + 1 where all coefficients that were computed vanish.
        complement: dimensions of parameter space outside the directions, worth 1/2 each.
        tried: weight vectors looked at.
        verdict: ``"certified"``, or why the bound may fail.
    """

    upper: Fraction
    weights: tuple[int, ...]
    order: int
    complement: int
    tried: int
    verdict: str


def small_weights(count: int) -> list[tuple[int, ...]]:
    """Coprime weight vectors with small positive entries, smaller sums first."""
    entries = range(1, LARGEST[count] + 1)
    found = [w for w in product(entries, repeat=count) if gcd(*w) == 1]
    return sorted(found, key=lambda w: (sum(w), w))


def _weights(weights: Any, count: int) -> list[tuple[int, ...]]:
    if weights is None:
        if count not in LARGEST:
            raise _check.fail(
                "weights",
                weights,
                f"one weight for each of the {count} directions (a search "
                f"takes at most {max(LARGEST)})",
            )
        return small_weights(count)
    if isinstance(weights, str) or not hasattr(weights, "__iter__"):
        raise _check.fail("weights", weights, "a sequence of integers >= 1, or None", TypeError)
    given = [_check.integer(f"weights[{i}]", w, 1) for i, w in enumerate(weights)]
    if len(given) != count:
        raise _check.fail("weights", weights, f"{count} entries, one for each direction")
    return [tuple(given)]


def _prior(prior_exponent: Any, count: int) -> list[int]:
    if hasattr(prior_exponent, "__iter__") and not isinstance(prior_exponent, str):
        given = [_check.integer(f"prior_exponent[{i}]", h, 0) for i, h in enumerate(prior_exponent)]
        if len(given) != count:
            expected = f"an integer or {count} of them, one for each direction"
            raise _check.fail("prior_exponent", prior_exponent, expected)
        return given
    return [_check.integer("prior_exponent", prior_exponent, 0)] * count


def weighted_bound(
    model: nn.Module,
    inputs: Any,
    directions: Mapping[str, Tensor],
    weights: Sequence[int] | None = None,
    *,
    likelihood: Any = "categorical",
    max_order: int = 12,
    prior_exponent: int | Sequence[int] = 0,
) -> WeightedBound:
    """Upper bound on λ at the model's parameters from curves θ0 + Σ_i c_i t^{w_i} u_i.

    If the outputs move by O(t^k) along them for generic c, they do so throughout the box
    |s_i| <= t^{w_i} in the directions and |s| <= t^k in all others, where K <= C t^{2k}; its
    volume gives λ <= Σ w_i (h_i + 1)/(2k) + (d − p)/2. The bound depends on the coordinates: in
    those adapted to a Newton non-degenerate singularity the best weights give the value of the
    linear programme (``dd.theory.newton_weights``), in others only a bound. Straight lines are
    the weights (1, …, 1). It is not improved by moving the live directions along (parabola: 3/4
    for a true 1/2); ``read_triple`` does that.

    Args:
        model: any module in evaluation mode; read in fp64 on a copy.
        inputs: tensor, tuple or dict; samples lead.
        directions: {parameter name: (p, *shape)}, linearly independent; missing ones are zero.
        weights: p integers >= 1; ``None`` tries all small ones (for p <= 8).
        likelihood: as in ``read_triple``.
        max_order: highest power of t computed; a larger order counts as one more.
        prior_exponent: h_i >= 0 of a prior ∏ |s_i|^{h_i} in the coordinates along the directions,
            one integer for all or one for each.

    Returns:
        the smallest bound. Coefficients below their measured rounding count as zero, all others
        as present.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; ``model`` where its outputs
            have no Taylor series along the curves.

    Source: the box argument (Newton polyhedra; Varchenko 1976); the search is our choice.
    """
    max_order = _check.integer("max_order", max_order, 1)
    local = LocalModel(model, inputs, likelihood)
    rays = unit_directions(local.program, directions)
    count = next(iter(rays.values())).shape[0]
    vectors = local.space.vectors(rays, count, local.theta)
    values = torch.linalg.svdvals(vectors)
    if count > local.space.dimension or float(values[-1]) < 1e-10 * float(values[0]):
        raise ValueError(
            f"directions: expected linearly independent ones, got {count} of rank "
            f"{int((values > 1e-10 * values[0]).sum())}"
        )
    candidates = _weights(weights, count)
    prior = _prior(prior_exponent, count)
    reach = [min(max(w), max_order) for w in candidates]
    curves = torch.zeros(
        max(reach) + 1, len(candidates) * DRAWS, local.space.dimension, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    for j, w in enumerate(candidates):
        for draw in range(DRAWS):
            c = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
            c = c * (torch.randint(0, 2, (count,), generator=generator) * 2 - 1)
            for i, power in enumerate(w):
                if power <= max_order:
                    curves[power, j * DRAWS + draw] += c[i] * vectors[i]
    orders, notes = local.curve_orders(curves, max_order)
    complement = local.space.dimension - count
    best: tuple[Fraction, int] | None = None
    for j, w in enumerate(candidates):
        k = min(orders[j * DRAWS : (j + 1) * DRAWS])
        volume = sum((wi * (h + 1) for wi, h in zip(w, prior, strict=True)), 0)
        found = Fraction(volume, 2 * k)
        if best is None or found < best[0]:
            best = found, j
    assert best is not None
    index = best[1]
    kinks = [note for note in notes if "kink" in note]
    return WeightedBound(
        upper=best[0] + Fraction(complement, 2),
        weights=candidates[index],
        order=min(orders[index * DRAWS : (index + 1) * DRAWS]),
        complement=complement,
        tried=len(candidates),
        verdict=f"not certified: {'; '.join(kinks)}" if kinks else "certified",
    )
