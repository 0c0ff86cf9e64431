"""``read_triple``: Watanabe's (λ, m, ν) of a model at its own parameters, with what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch import nn

from deaddir_fast import _check, gauge
from deaddir_fast.reading.cross_check import cross_check
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
from deaddir_fast.reading.prior import LogPrior
from deaddir_fast.reading.prior_rule import prior_rule
from deaddir_fast.theory.blow_up import blow_up
from deaddir_fast.theory.fluctuation import fluctuation_limits, singular_fluctuation
from deaddir_fast.theory.local_rlct import local_threshold
from deaddir_fast.theory.quartet import Quartet, quartet
from deaddir_fast.theory.sampled_estimate import REFERENCES
from deaddir_fast.theory.threshold import LocalThreshold, Undecided, decided

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
        lower, upper: bounds on λ (equal to it where resolved; inf where nothing is known).
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
        selection_margin: largest ratio of the selection rule over λ_g/2 among the singular lines:
            below 1 the straight lines are transversal; above, the reading rests on relaxing them.
            NaN where there is no such line.
        beta: inverse temperature at which ν is given.
        singular: (k, h) of each singular direction, where they are independent and λ and ν are
            sums over them; None where ν is unresolved.
    """

    rlct: Fraction | float
    multiplicity: int
    fluctuation: float
    lower: Fraction
    upper: Fraction | float
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
    selection_margin: float = float("nan")
    beta: float = 1.0
    singular: tuple[tuple[int, Fraction], ...] | None = None

    @property
    def resolved(self) -> bool:
        """Whether λ and m are decided."""
        return self.verdict == "resolved"

    def fluctuation_at(self, beta: float | None = None) -> float:
        """ν at another inverse temperature β (that of the triple by default).

        Raises:
            ValueError: where ν is not resolved, with the reason; or naming ``beta``.
        """
        if self.singular is None:
            raise ValueError(f"triple: expected a resolved ν, got {self.fluctuation_verdict}")
        beta = self.beta if beta is None else beta
        return self.rank / 2 + sum(
            singular_fluctuation(k, beta=beta, h=h) for k, h in self.singular
        )

    def quartet(self, beta: float | None = None) -> Quartet:
        """Gibbs and Bayes, generalisation and training errors, WAIC and functional variance.

        Leading coefficients of 1/n at inverse temperature β (that of the triple by default); see
        ``theory.quartet``.

        Raises:
            ValueError: where λ or ν is not resolved, with the reason; or naming ``beta``.
        """
        beta = self.beta if beta is None else beta
        return quartet(float(self.rlct), self.fluctuation_at(beta), beta)

    def sampled_estimate(self, beta: float | None = None, *, reference: str = "minimum") -> float:
        """What a sampler's estimate n β (<L_n> - L_n(w*)) of λ tends to for large n at fixed β.

        To compare a local learning coefficient from SGLD or WBIC with λ; β multiplies n L_n.
        ``reference`` is the loss subtracted: ``"population"``, ``"truth"`` or ``"minimum"`` as in
        ``theory.sampled_estimate``, which also gives the corrections at finite n (of order
        1/log n where m > 1). A model at a minimum of its training loss has the last.

        Raises:
            ValueError: where λ or ν is not resolved, with the reason; or naming an argument.
        """
        _check.choice("reference", reference, REFERENCES)
        beta = _check.positive("beta", self.beta if beta is None else beta)
        if reference == "population":
            if not self.resolved:
                raise ValueError(f"triple: expected a resolved λ, got {self.verdict}")
            return float(self.rlct)
        value = float(self.rlct) - beta * self.fluctuation_at(beta)
        if reference == "truth":
            return value
        # n (L_n(w0) - min L_n) tends to the limit of ν for large β, direction by direction.
        assert self.singular is not None
        depth = self.rank / 2 + sum(fluctuation_limits(k, h=h)[1] for k, h in self.singular)
        return value + beta * depth

    def __str__(self) -> str:
        if self.resolved:
            values = f"λ = {self.rlct}, m = {self.multiplicity}, ν = {self.fluctuation:.6g}"
            return f"{values} ({self.rule})"
        return f"{self.lower} ≤ λ ≤ {self.upper} ({self.verdict})"


def singular_part(local: LocalModel, space: DeadSpace, prior_exponent: int) -> LocalThreshold:
    """(λ, m) of what is left on the dead space outside the gauge orbit."""
    mu = space.size
    whole = Fraction(mu + prior_exponent, 2)
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
    upper = Fraction(mu + prior_exponent, 2 * k)
    if space.germ is None:
        if space.lead is not None and prior_exponent == 0:
            with suppress(Undecided):
                return blow_up(space.lead, k, space.reason)
        return LocalThreshold(None, None, Fraction(1, 2 * k), upper, space.reason)
    found = local_threshold(space.germ, prior_exponent=prior_exponent)
    if found.decided and found.rests_on_zeros:
        why = doubt(local, space, multiple=found.multiple, fibres=found.fibres)
        if why:
            return LocalThreshold(None, None, Fraction(1, 2 * k), upper, why)
    elif found.rests_on_zeros and any(moving(local, space, f) for f in found.fibres):
        return replace(found, upper=upper)
    return found


def independent_directions(
    space: DeadSpace, found: LocalThreshold, h: Fraction, even: bool
) -> tuple[tuple[tuple[int, Fraction], ...] | None, str]:
    """(k, h) of the singular directions over which ν is a sum, or None and the reason.

    ν adds over independent blocks and is universal in (k, parity, sidedness, prior, β) for one
    direction ("Dead Directions", the singular fluctuation along 1D dead directions). ``even`` says
    that the prior is the same on both sides, which matters where η^k takes both signs.
    """
    if not found.decided:
        return None, "λ is not resolved"
    if space.size == 0 or space.order == float("inf"):
        return (), "resolved"
    adapted = flag_basis(space)
    if adapted is None:
        return None, "the singular directions do not split into independent ones"
    finite = [int(k) for k in adapted[1] if k != float("inf")]
    if len(finite) == 1 and found.rlct == (1 + h) / (2 * finite[0]):
        if not even and finite[0] % 2:
            return None, "the prior differs between the sides of the singular direction"
        return ((finite[0], h),), "resolved"
    return None, "several singular directions meet: ν depends on how their outputs are correlated"


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
    prior_exponent: int | LogPrior = 0,
    beta: float = 1.0,
    max_order: int = 8,
) -> Triple:
    """Watanabe's triple at the model's own parameters, taken as the truth, for these inputs.

    λ = r/2 + λ(R): r live directions count 1/2 each, and R, the divergence minimised over the live
    coordinates, lives on the null space of the Fisher (Morse splitting). Gauge orbits contribute
    nothing and are cut transversally. What remains is read from exact Taylor coefficients: flat
    (smooth fibre), one direction, a plane (resolved by blow-ups), graded blocks, a monomial ideal,
    a complete intersection, a Newton non-degenerate ideal or one blow-up; otherwise certified
    bounds are returned, the upper one improved by nearby points of the fibre; where one of these
    attains the lower bound of a blow-up, the two decide ("Dead Directions", arXiv 2606.05957:
    selection rule on smooth fibres; Watanabe 2009; the relaxed Taylor reading is our choice).

    Args:
        model: any module in evaluation mode; read in fp64 on a copy.
        inputs: tensor, tuple or dict; samples lead. λ belongs to their empirical distribution.
        likelihood: as in ``dead_directions``.
        prior_exponent: h >= 0 of a prior that vanishes like the h-th power of the distance to θ0
            along the singular directions; 0 for a positive prior. Or a function {parameter name:
            fp64 tensor} -> log prior, whose exponents are then measured: a positive prior changes
            nothing; one that vanishes or diverges is used where K is a sum of powers of
            coordinates, each worth (h_i+1)/(2k_i), and the triple is unresolved elsewhere.
        beta: inverse temperature at which ν is given (λ and m do not depend on it).
        max_order: highest KL order looked for.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
    """
    log_prior = prior_exponent if callable(prior_exponent) else None
    if log_prior is None and (
        isinstance(prior_exponent, bool)
        or not isinstance(prior_exponent, int)
        or prior_exponent < 0
    ):
        expected = "an integer >= 0 or a function of {parameter name: tensor}"
        raise _check.fail("prior_exponent", prior_exponent, expected)
    h = 0 if callable(prior_exponent) else prior_exponent
    beta = _check.positive("beta", beta)
    local = open_local(model, inputs, likelihood, max_order)
    split = local.spectrum
    gauges = gauge.find(local.model, local.inputs)
    space = explore(local, max_order, gauges=gauges)
    half = Fraction(split.rank, 2)
    found = singular_part(local, space, h)
    rests = [f"{local.samples} samples, {split.rows} output equations", f"Taylor order {max_order}"]
    if not found.decided and not space.kinked:
        near = neighbours(local, space, gauges)
        if near is not None and near - half <= found.upper:
            nearby = near - half
            if nearby == found.lower and found.attained and h == 0:
                rule = "one blow-up, its bound attained on the fibre"
                found = decided(nearby, found.attained, rule)
                rests.append("the fibre has the same λ at two distances from the parameters")
            else:
                # Of two bounds that contradict each other the one from below is given up.
                kept = found.lower if found.lower <= nearby else Fraction(0)
                found = replace(found, lower=kept, upper=nearby)
                rests.append("upper bound from nearby points of the fibre")
    if found.decided and found.rests_on_zeros:
        rests.append(
            "coefficients below their rounding are zero, and tangents closer than about its square "
            "root are one"
        )
    prior = None if log_prior is None else prior_rule(local, space, found, log_prior)
    flat = prior is None or prior.upper is None
    along, even = Fraction(h), True
    if prior is not None:
        rests += prior.notes
        found = found.plus(prior.shift or Fraction(0))
        along, even = prior.single or (along, even)
    singular, nu_why = independent_directions(space, found, along, even)
    if not flat and singular == ():
        singular, nu_why = None, "the prior is not positive at the parameters"
    total = found.plus(half)
    reasons = [spectrum_verdict(local), saturation(local)]
    lower: Fraction = total.lower
    upper: Fraction | float = total.upper
    largest = Fraction(local.space.dimension - space.orbit.shape[1] + h, 2)
    if local.kinked:
        # One-sided derivatives are no live directions; K <= C |θ − θ0|² still bounds λ above.
        lower, upper = Fraction(0), Fraction(local.space.dimension + h, 2)
    if reasons[0] or reasons[1]:
        # The rank may be off: live directions in doubt may be dead, and the other way round.
        lower = Fraction(split.rank - split.ambiguous, 2) if reasons[0] else lower
        upper = largest
    margin = float("nan")
    if found.decided:
        check = cross_check(local, space, max_order)
        margin = check.margin
        rests += check.notes
        if check.reason:
            reasons.append(check.reason)
            lower = min(lower, half)
            upper = largest
    else:
        reasons.append(found.rule)
    if prior is not None and prior.upper is not None:
        reasons.append(prior.reason)
        if any(reasons):
            # No bound of the flat prior holds for one that vanishes or diverges.
            lower, upper = Fraction(0), prior.upper
    words = verdict(reasons)
    resolved = words == "resolved"
    dead = replace(describe(local, space, max_order), verdict=words)
    if dead.rank_half is not None and dead.rank_half < dead.rank:
        rests.append(f"rank still grows with samples ({dead.rank_half} from half of them)")
    assert not resolved or total.rlct is not None
    triple = Triple(
        rlct=total.rlct if resolved and total.rlct is not None else float("nan"),
        multiplicity=(total.multiplicity or 0) if resolved else 0,
        fluctuation=float("nan"),
        lower=lower,
        upper=upper,
        directions=dead,
        verdict=words,
        fluctuation_verdict=(
            "unresolved: λ is not resolved"
            if not resolved
            else nu_why
            if singular is not None
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
        selection_margin=margin,
        beta=beta,
        singular=singular if resolved else None,
    )
    if triple.singular is None:
        return triple
    return replace(triple, fluctuation=triple.fluctuation_at())
