"""What the dead space of a local model holds: gauge orbits, fibre, and singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deaddir_fast import gauge
from deaddir_fast.reading.local import MARGIN, LocalModel, RelaxedJets, first_orders
from deaddir_fast.theory.germ import Germ, count, fit_germ
from deaddir_fast.theory.local_rlct import flag
from deaddir_fast.theory.threshold import Undecided

SAMPLED = 16  # vectors that stand for a dead space too large to list
ORBIT_ENTRIES = 250_000_000  # gauges whose tangents need more numbers than this are left out
PROBES = 6  # random dead directions that decide flatness and the generic order
GERM_VARIABLES = 6  # the Taylor polynomial is taken in at most this many dead variables
LEAD_VARIABLES = 10  # and its leading part in at most this many
GERM_MONOMIALS = 250  # and with at most this many monomials of one degree
GERM_NOISE = 1e-7  # Taylor coefficients with more relative rounding than this are not used
KINK_MISFIT = 1e-6  # a germ that fits worse than this is not a polynomial: a kink
FAR = (1.0, 0.3)  # distances at which a flat direction must be flat: t^k is above rounding there
NEAR = (0.1, 0.03, 0.01)  # enough where outputs are polynomials of low degree between kinks
STEPS = 120  # of a solver that converges linearly where the outputs have a multiple zero
EXACT_LIMIT = 200  # parameters up to which the live equations are solved anew at a distance


@dataclass(frozen=True)
class DeadSpace:
    """The null space of the exact Fisher, split and measured.

    Attributes:
        orbit: (d, γ) orthonormal gauge orbit tangents; K is constant along them.
        rest: (d, μ) orthonormal complement of the orbit in the dead space, coordinate axes first;
            where that is too large, a random sample of it.
        size: μ, the dimension of the whole complement.
        gauges: names of the gauges found.
        order: generic KL order in ``rest`` after relaxing; inf where flat, None where unclear.
        germ: Taylor polynomial of the relaxed outputs on ``rest``, in units of ``radius``; None
            where flat, unclear or too large.
        lead: its leading part alone, where only that is taken.
        radius: parameter distance at which the coefficients of the germ are balanced.
        kinked: the point sits on a kink that these directions leave.
        reason: why the germ is missing, if it is.
        magnitude: (order+1,) largest straight-line coefficient of each degree among the probes.
        notes: remarks of the jets.
    """

    orbit: Tensor
    rest: Tensor
    size: int
    gauges: tuple[str, ...]
    order: float | None
    germ: Germ | None
    lead: Germ | None
    radius: float
    kinked: bool
    reason: str
    magnitude: Tensor
    notes: tuple[str, ...]


def orbit_tangents(local: LocalModel, found: Sequence[gauge.Gauge]) -> tuple[Tensor, list[str]]:
    """(d, γ) orthonormal tangents of the gauges that the likelihood has, inside the dead space."""
    kept = [g for g in found if g.likelihood in (None, local.likelihood.name)]
    empty = torch.zeros(local.space.dimension, 0, dtype=torch.float64)
    room = ORBIT_ENTRIES // local.space.dimension
    fitting = []
    for g in kept:
        if g.dimension <= room:
            fitting.append(g)
            room -= g.dimension
    kept = fitting
    if not kept:
        return empty, []
    blocks = []
    for g in kept:
        tangents = g.tangents(local.state)
        blocks.append(local.space.vectors(tangents, g.dimension, local.theta))
    rows = torch.cat(blocks)
    sizes = rows.norm(dim=1, keepdim=True)
    rows = rows[sizes[:, 0] > 0] / sizes[sizes[:, 0] > 0]
    if rows.shape[0] == 0:
        return empty, [g.name for g in kept]
    _, values, axes = torch.linalg.svd(rows, full_matrices=False)
    basis = axes[values > 1e-10 * values[0]].T
    # What is not dead on these inputs to rounding does not belong to an orbit.
    u, values, _ = torch.linalg.svd(local.spectrum.onto_dead(basis), full_matrices=False)
    return u[:, values > 1 - 1e-8], [g.name for g in kept]


def complement(local: LocalModel, orbit: Tensor) -> tuple[Tensor, int]:
    """(d, μ) orthonormal rest of the dead space and μ; a sample where it is too large to list."""
    dead = local.spectrum.dead
    size = local.space.dimension - local.spectrum.rank - orbit.shape[1]
    if size == 0:
        return orbit.new_zeros(orbit.shape[0], 0), 0
    if dead is None:
        generator = torch.Generator().manual_seed(11)
        draws = torch.randn(
            orbit.shape[0], min(size, SAMPLED), dtype=torch.float64, generator=generator
        )
        for _ in range(2):
            draws = local.spectrum.onto_dead(draws)
            draws = draws - orbit @ (orbit.T @ draws)
        return torch.linalg.qr(draws).Q, size
    inside = dead - orbit @ (orbit.T @ dead)
    u, values, _ = torch.linalg.svd(inside, full_matrices=False)
    rest = u[:, values > 0.5]
    axes = torch.nonzero(rest.norm(dim=1) > 1 - 1e-9).flatten()
    units = torch.zeros(rest.shape[0], len(axes), dtype=rest.dtype)
    units[axes, torch.arange(len(axes))] = 1.0
    if len(axes) in (0, rest.shape[1]):
        return (units if len(axes) else rest), size
    left = rest.clone()
    left[axes] = 0.0
    u, values, _ = torch.linalg.svd(left, full_matrices=False)
    return torch.cat([units, u[:, values > 0.5]], 1), size


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def explore(
    local: LocalModel, max_order: int, *, gauges: Sequence[gauge.Gauge] = (), seed: int = 0
) -> DeadSpace:
    """Split the dead space and measure what is in it; ``gauges`` are cut out of it."""
    orbit, names = orbit_tangents(local, gauges)
    magnitude = torch.zeros(max_order + 1, dtype=torch.float64)
    rest, size = complement(local, orbit)
    mu = rest.shape[1]

    def result(
        order: float | None,
        germ: Germ | None = None,
        radius: float = 1.0,
        kinked: bool = False,
        reason: str = "",
        notes: tuple[str, ...] = (),
        lead: Germ | None = None,
    ) -> DeadSpace:
        found = (order, germ, lead, radius, kinked, reason, magnitude, notes)
        return DeadSpace(orbit, rest, size, tuple(names), *found)

    if local.kinked:
        reason = "the point sits on a kink that the outputs feel at first order"
        return result(None, kinked=True, reason=reason)
    if mu == 0:
        return result(float("inf"))
    generator = torch.Generator().manual_seed(seed)
    draws = _unit(torch.randn(PROBES, mu, dtype=torch.float64, generator=generator))
    probe = local.relaxed_jets(draws @ rest.T, max_order)
    notes = probe.notes
    magnitude = probe.straight.norm(dim=-1).max(1).values
    if any("kink" in note for note in notes):
        other = local.relaxed_jets(draws @ rest.T, max_order, side=-1)
        gap = (other.residual - probe.residual).norm(dim=-1)
        if bool((gap > MARGIN * torch.maximum(probe.noise, other.noise)).any()):
            # The sides are cones that sampled directions cannot exhaust: no order for all of them.
            sides = sorted({str(k) for k in probe.orders() + other.orders()})
            reason = f"the point sits on a kink: one-sided orders {', '.join(sides)}"
            return result(None, kinked=True, reason=reason, notes=notes)
    orders = probe.orders()
    if None in orders:
        reason = "a Taylor coefficient is too close to rounding to call zero or not"
        return result(None, reason=reason, notes=notes)
    generic = min(k for k in orders if k is not None)
    if generic == float("inf"):
        return result(generic, notes=notes)
    if size > GERM_VARIABLES:
        reason = (
            f"{size} dead dimensions outside the gauge orbit, of generic order {generic:g}: too "
            f"many for the Taylor polynomial (limit {GERM_VARIABLES})"
        )
        lead = None
        if size <= LEAD_VARIABLES and count(mu, int(generic)) <= GERM_MONOMIALS:
            lead, _, misfit = _germ(local, rest, int(generic), int(generic), generator)
            lead = lead if misfit <= KINK_MISFIT else None
        return result(generic, reason=reason, notes=notes, lead=lead)
    top = max_order
    while top > generic and count(mu, top) > GERM_MONOMIALS:
        top -= 1
    germ, radius, misfit = _germ(local, rest, int(generic), top, generator)
    if misfit > KINK_MISFIT:
        reason = f"the outputs are not analytic here: a polynomial misses them by {misfit:.1e}"
        return result(None, kinked=True, reason=reason, notes=notes)
    return result(generic, germ, radius, notes=notes)


def flag_basis(space: DeadSpace) -> tuple[Tensor, list[float]] | None:
    """``rest`` in coordinates adapted to the flag of orders, with the order of each column."""
    if space.germ is None:
        return None
    try:
        blocks = flag(space.germ)
    except Undecided:
        return None
    if blocks is None:
        return None
    basis = torch.from_numpy(np.concatenate([b for b, _ in blocks], axis=1))
    orders = [float(k) if k else float("inf") for b, k in blocks for _ in range(b.shape[1])]
    return space.rest @ basis, orders


def _germ(
    local: LocalModel, rest: Tensor, generic: int, top: int, generator: torch.Generator
) -> tuple[Germ, float, float]:
    """Taylor polynomial of the relaxed outputs on ``rest``, its radius and misfit."""
    mu = rest.shape[1]
    curves = count(mu, top) + mu + 4
    draws = _unit(torch.randn(curves, mu, dtype=torch.float64, generator=generator))
    jets = local.relaxed_jets(draws @ rest.T, top)
    residual = jets.residual.clone()
    present = (residual.norm(dim=-1) > jets.noise).any(1)
    residual[~present] = 0.0
    sizes, noise = residual.norm(dim=-1).amax(1), jets.noise.amax(1)
    # Balance degrees: a far larger high coefficient must not make the leading one look like zero.
    ratios = [
        float(sizes[generic] / sizes[q]) ** (1 / (q - generic))
        for q in range(generic + 1, top + 1)
        if present[q]
    ]
    radius = min(ratios, default=1.0)
    growth = radius ** (torch.arange(top + 1) - generic).double()
    relative = noise * growth / sizes[generic]
    # Degrees whose rounding outgrows the rest at this radius are not known.
    known = generic
    while known < top and float(relative[known + 1]) < GERM_NOISE:
        known += 1
    values = compress(residual, generic, known, radius)
    level = float(relative[generic : known + 1].max()) / MARGIN
    germ, misfit = fit_germ(draws.numpy(), values, known, max(level, 1e-15))
    return germ, radius, misfit


def compress(residual: Tensor, low: int, top: int, radius: float) -> dict[int, np.ndarray]:
    """Degree -> (p, g) coefficients in units of ``radius``, the N outputs turned into few.

    An orthogonal change of outputs leaves |f|² alone, so generators that span the coefficients
    are enough.
    """
    scaled = {q: residual[q] * radius ** (q - low) for q in range(low, top + 1)}
    stacked = torch.cat(list(scaled.values()))
    if stacked.shape[1] > 1:
        _, values, axes = torch.linalg.svd(stacked, full_matrices=False)
        kept = axes[values > 1e-14 * values[0]].T
    else:
        kept = torch.eye(1, dtype=stacked.dtype)
    return {q: (v @ kept).numpy() for q, v in scaled.items()}


def rounding_at(local: LocalModel, space: DeadSpace, distance: float) -> float:
    """Rounding of the outputs' displacement at a distance from θ0."""
    powers = distance ** torch.arange(len(space.magnitude), dtype=torch.float64)
    reach = float((space.magnitude * powers).sum())
    values = local.spectrum.values
    reach += distance * float(values[0]) if values.numel() else 0.0
    margin = 64 * max(1.0, local.spectrum.rank**0.5)
    return local.residual_floor() + margin * torch.finfo(torch.float64).eps * reach


def rounding_there(local: LocalModel, theta: Tensor, jacobian: Tensor) -> float:
    """Rounding of the outputs' displacement at ``theta``, from their slopes there.

    Much smaller than :func:`rounding_at` along directions in which nothing large cancels.
    """
    reach = float(jacobian.norm()) * float((theta - local.theta).norm())
    return local.residual_floor() + 64 * torch.finfo(torch.float64).eps * reach


def proven_flat(local: LocalModel, jets: RelaxedJets, index: int) -> bool:
    """Whether Taylor coefficients prove that nothing moves along a line, up to the next kink.

    They do where the outputs are polynomials of at most their order along the straight line. Along
    a relaxed, curved path low-degree outputs may still move at a high order: (x − y², x⁵).
    """
    if local.degree >= jets.straight.shape[0]:
        return False
    line = first_orders(jets.straight[:, index : index + 1], jets.noise[:, index : index + 1])
    return line[0] == float("inf")


def follow_fibre(
    local: LocalModel, space: DeadSpace, vector: Tensor, jets: RelaxedJets, index: int
) -> Tensor | None:
    """A point at a finite distance along a dead vector where the outputs are those of θ0, or None.

    The other coordinates are solved for; the displacement along the vector stays. Small distances
    prove nothing (t^9 is below rounding at 0.01) unless the coefficients do (``proven_flat``).
    """
    for distance in FAR + (NEAR if proven_flat(local, jets, index) else ()):
        powers = distance ** torch.arange(jets.corrections.shape[0], dtype=torch.float64)
        start = (powers[:, None] * jets.corrections[:, index]).sum(0)
        floor = rounding_at(local, space, distance)
        for offset in (torch.zeros_like(start), start):
            theta = _relax(local, local.theta + distance * vector + offset, vector, floor)
            if theta is not None:
                return theta
    return None


def _relax(local: LocalModel, theta: Tensor, vector: Tensor, floor: float) -> Tensor | None:
    """Solve for the outputs of θ0 without moving along ``vector``; None where that fails."""
    split = local.spectrum
    best = float("inf")
    small = local.space.dimension <= EXACT_LIMIT
    for _ in range(STEPS):
        residual = local.residuals(theta)
        size = float(residual.norm())
        if size == 0 or (size <= floor and not small):
            return theta
        if not np.isfinite(size) or size > 0.98 * best:
            return None
        best = size
        if small:
            jacobian = local.jacobian_at(theta, metric=False)
            if size <= min(floor, rounding_there(local, theta, jacobian)):
                return theta
            jacobian = jacobian - torch.outer(jacobian @ vector, vector)
            u, values, vh = torch.linalg.svd(jacobian, full_matrices=False)
            top = float(values[0]) if values.numel() else 0.0
            if top == 0:
                return None
            step = vh.T @ (values / (values**2 + top * size) * (u.T @ residual))
        elif split.rank:
            step = split.live @ ((split.left.T @ residual) / split.values[: split.rank])
        else:
            return None
        theta = theta - step
    return None
