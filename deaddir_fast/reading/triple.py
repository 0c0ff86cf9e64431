"""``read_triple``: Watanabe's (λ, m, ν) of a model at its own parameters, with what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch import nn

from deaddir_fast import _check, gauge
from deaddir_fast.reading.dead import (
    DeadDirections,
    describe,
    open_local,
    spectrum_verdict,
    verdict,
)
from deaddir_fast.reading.dead_space import DeadSpace, explore, flag_basis
from deaddir_fast.reading.fibre import doubt, moving, neighbour_directions, onto_fibre
from deaddir_fast.reading.local import LocalModel
from deaddir_fast.theory.fluctuation import singular_fluctuation
from deaddir_fast.theory.local_rlct import local_threshold
from deaddir_fast.theory.threshold import LocalThreshold, decided

NEIGHBOURS = 8  # nearby points of the fibre that may lower the upper bound
NEIGHBOUR_LIMIT = 200  # parameters up to which they are looked for
NEIGHBOUR_ORDER = 4  # Taylor order there, where coefficients grow like distance^-q
RADII = (0.1, 0.02)  # a neighbour counts if it is found, with the same value, at both


@dataclass(frozen=True)
class Triple:
    """(λ, m, ν) at a point, or bounds on λ and the reason why it is not resolved.

    Attributes:
        rlct: λ, an exact ``Fraction``; NaN where unresolved.
        multiplicity: m; 0 where unresolved.
        fluctuation: ν at the given β; NaN where unresolved.
        lower, upper: bounds on λ (equal to it where resolved).
        directions: the classified dead directions.
        verdict: ``"resolved"`` or why not; it speaks of λ and m.
        fluctuation_verdict: the same for ν.
        rule: the rule that decided λ and m.
        rank: live directions r, each worth 1/2.
        rank_limit: output equations the rank cannot exceed on these inputs.
        samples: inputs used.
        margin: smallest live over largest dead singular value.
        floor: singular values below it count as zero.
        rests_on: what the reading assumes, in words.
        forwards: network evaluations spent, in plain forwards over all inputs; a Taylor
            propagation of order q along one curve counts as (q+1)(q+2)/2.
    """

    rlct: Fraction | float
    multiplicity: int
    fluctuation: float
    lower: Fraction
    upper: Fraction
    directions: DeadDirections
    verdict: str
    fluctuation_verdict: str
    rule: str
    rank: int
    rank_limit: int
    samples: int
    margin: float
    floor: float
    rests_on: tuple[str, ...] = field(default=())
    forwards: float = 0.0

    @property
    def resolved(self) -> bool:
        """Whether λ and m are decided."""
        return self.verdict == "resolved"

    def __str__(self) -> str:
        if self.resolved:
            values = f"λ = {self.rlct}, m = {self.multiplicity}, ν = {self.fluctuation:.6g}"
            return f"{values} ({self.rule})"
        return f"{self.lower} ≤ λ ≤ {self.upper} ({self.verdict})"


def singular_part(local: LocalModel, space: DeadSpace, prior_exponent: int) -> LocalThreshold:
    """(λ, m) of what is left on the dead space outside the gauge orbit."""
    mu = space.size
    whole = Fraction(mu, 2)
    if space.order is None:
        return LocalThreshold(None, None, Fraction(0), whole, space.reason)
    if mu == 0:
        return decided(Fraction(0), 1, "no dead direction outside the gauge orbit")
    if space.order == float("inf"):
        why = doubt(local, space, multiple=False)
        if why:
            return LocalThreshold(None, None, Fraction(0), whole, why)
        return decided(Fraction(0), 1, "smooth fibre: flat dead space")
    k = int(space.order)
    upper = min(Fraction(mu + prior_exponent, 2 * k), whole + Fraction(prior_exponent, 2))
    if space.germ is None:
        return LocalThreshold(None, None, Fraction(1, 2 * k), upper, space.reason)
    found = local_threshold(space.germ, prior_exponent=prior_exponent)
    if found.decided and found.rests_on_zeros:
        why = doubt(local, space, multiple=found.multiple, fibres=found.fibres)
        if why:
            return LocalThreshold(None, None, Fraction(1, 2 * k), upper, why)
    elif found.rests_on_zeros and any(moving(local, space, f) for f in found.fibres):
        return replace(found, upper=upper)
    return found


def fluctuation_part(
    space: DeadSpace, found: LocalThreshold, beta: float, prior_exponent: int
) -> tuple[float, str]:
    """ν of the singular part, or NaN and the reason.

    ν adds over independent blocks and is universal in (k, parity, sidedness, prior, β) for one
    direction ("Dead Directions", the singular fluctuation along 1D dead directions).
    """
    nan = float("nan")
    if not found.decided:
        return nan, "λ is not resolved"
    if space.germ is None:
        return 0.0, "resolved"
    adapted = flag_basis(space)
    if adapted is None:
        return nan, "the singular directions do not split into independent ones"
    orders = adapted[1]
    finite = [int(k) for k in orders if k != float("inf")]
    if len(finite) == 1 and found.rlct == Fraction(1 + prior_exponent, 2 * finite[0]):
        return singular_fluctuation(finite[0], beta=beta, h=prior_exponent), "resolved"
    return nan, "several singular directions meet: ν depends on how their outputs are correlated"


def neighbours(
    local: LocalModel, space: DeadSpace, gauges: Sequence[gauge.Gauge]
) -> Fraction | None:
    """Smallest λ read at nearby points of the fibre; λ at θ0 is at most that (semicontinuity).

    Candidates lie along random directions of the dead space, and along random directions of some
    of the parameters only (where the fibre has straight pieces). A value counts if it is the same
    at two distances.
    """
    if local.space.dimension > NEIGHBOUR_LIMIT:
        return None
    best: Fraction | None = None
    read = 0
    for vector in neighbour_directions(local, space):
        if read >= NEIGHBOURS:
            break
        values = []
        for radius in RADII:
            theta = onto_fibre(local, space, radius, vector)
            if theta is None:
                break
            values.append(_value_at(local.at(theta), gauges))
        read += bool(values)
        if len(values) == len(RADII) and values[0] is not None and values[0] == values[1]:
            best = values[0] if best is None else min(best, values[0])
    return best


def _value_at(there: LocalModel, gauges: Sequence[gauge.Gauge]) -> Fraction | None:
    """λ at a nearby point if it is resolved there without looking further."""
    if spectrum_verdict(there):
        return None
    space = explore(there, NEIGHBOUR_ORDER, gauges=gauges)
    found = singular_part(there, space, 0)
    return None if found.rlct is None else found.rlct + Fraction(there.spectrum.rank, 2)


def saturation(local: LocalModel) -> str | None:
    """Why more samples could raise the rank, or None."""
    split = local.spectrum
    if local.samples < 2 or split.rank == local.space.dimension:
        return None
    limit = split.rows
    if local.likelihood.name == "categorical":
        limit -= split.rows // local.outputs.shape[-1]
    if split.rank >= limit:
        return (
            f"sample-limited: the rank equals the {limit} independent output equations of "
            f"{local.samples} samples"
        )
    return None


def read_triple(
    model: nn.Module,
    inputs: Any,
    *,
    likelihood: Any = "categorical",
    prior_exponent: int = 0,
    beta: float = 1.0,
    max_order: int = 8,
) -> Triple:
    """Watanabe's triple at the model's own parameters, taken as the truth, for these inputs.

    λ = r/2 + λ(R): r live directions count 1/2 each, and R, the divergence minimised over the live
    coordinates, lives on the null space of the Fisher (Morse splitting). Gauge orbits contribute
    nothing and are cut transversally. What remains is read from exact Taylor coefficients: flat
    (smooth fibre), one direction, a plane (resolved by blow-ups), graded blocks, a monomial ideal,
    a complete intersection or a Newton non-degenerate ideal; otherwise certified bounds are
    returned, the upper one improved by nearby points of the fibre ("Dead Directions", arXiv
    2606.05957: selection rule on smooth fibres; Watanabe 2009; the relaxed Taylor reading is our
    choice).

    Args:
        model: any module in evaluation mode; read in fp64 on a copy.
        inputs: tensor, tuple or dict; samples lead. λ belongs to their empirical distribution.
        likelihood: as in ``dead_directions``.
        prior_exponent: h >= 0 of a prior that vanishes like the h-th power of the distance to θ0
            along the singular directions; 0 for a positive prior.
        beta: inverse temperature at which ν is given (λ and m do not depend on it).
        max_order: highest KL order looked for.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    if (
        isinstance(prior_exponent, bool)
        or not isinstance(prior_exponent, int)
        or prior_exponent < 0
    ):
        raise _check.fail("prior_exponent", prior_exponent, "an integer >= 0")
    beta = _check.positive("beta", beta)
    local = open_local(model, inputs, likelihood, max_order)
    split = local.spectrum
    gauges = gauge.find(local.model, local.inputs)
    space = explore(local, max_order, gauges=gauges)
    half = Fraction(split.rank, 2)
    found = singular_part(local, space, prior_exponent)
    rests = [f"{local.samples} samples, {split.rows} output equations", f"Taylor order {max_order}"]
    if not found.decided and not space.kinked:
        near = neighbours(local, space, gauges)
        if near is not None and near - half < found.upper:
            found = replace(found, upper=max(near - half, found.lower))
            rests.append("upper bound from nearby points of the fibre")
    if found.decided and found.rests_on_zeros:
        rests.append(
            "coefficients below their rounding are zero, and tangents closer than about its square "
            "root are one"
        )
    nu, nu_why = fluctuation_part(space, found, beta, prior_exponent)
    total = found.plus(half)
    reasons = [spectrum_verdict(local), saturation(local)]
    lower, upper = total.lower, total.upper
    if local.kinked:
        # One-sided derivatives are no live directions; K <= C |θ − θ0|² still bounds λ above.
        lower, upper = Fraction(0), Fraction(local.space.dimension, 2)
    if reasons[0] or reasons[1]:
        # The rank may be off: live directions in doubt may be dead, and the other way round.
        lower = Fraction(split.rank - split.ambiguous, 2) if reasons[0] else lower
        upper = Fraction(local.space.dimension - space.orbit.shape[1], 2)
    if not found.decided:
        reasons.append(found.rule)
    words = verdict(reasons)
    resolved = words == "resolved"
    dead = replace(describe(local, space, max_order), verdict=words)
    if dead.rank_half is not None and dead.rank_half < dead.rank:
        rests.append(f"rank still grows with samples ({dead.rank_half} from half of them)")
    assert not resolved or total.rlct is not None
    return Triple(
        rlct=total.rlct if resolved and total.rlct is not None else float("nan"),
        multiplicity=(total.multiplicity or 0) if resolved else 0,
        fluctuation=split.rank / 2 + nu if resolved else float("nan"),
        lower=lower,
        upper=upper,
        directions=dead,
        verdict=words,
        fluctuation_verdict=(
            "unresolved: λ is not resolved"
            if not resolved
            else nu_why
            if nu == nu
            else f"unresolved: {nu_why}"
        ),
        rule=total.rule,
        rank=split.rank,
        rank_limit=split.rows,
        samples=local.samples,
        margin=split.gap,
        floor=split.tolerance,
        rests_on=tuple(rests),
        forwards=local.spent.forwards,
    )
