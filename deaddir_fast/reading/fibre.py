"""Is a fibre that the Taylor coefficients claim really there?

Coefficients that vanish to the known order are not proof that a function vanishes. A claimed
fibre is accepted only if its directions are flat on their own and the outputs stay put at a finite
distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from deaddir_fast.reading.dead_space import (
    EXACT_LIMIT,
    STEPS,
    DeadSpace,
    explore,
    flag_basis,
    follow_fibre,
    proven_flat,
    rounding_at,
    rounding_there,
)
from deaddir_fast.reading.local import LocalModel
from deaddir_fast.theory.threshold import Fibre

FLAT_UNCERTAINTY = 1e-9  # directions of flat blocks are computed from Taylor coefficients
SNAP = 1e-13  # entries of a flat direction below this are zero
FLAT_AXES = 8  # basis vectors of a flat space that are looked at one by one
DRAWS = 4  # random directions in which nearby points of the fibre are looked for
RADIUS = 0.1  # how far out
MULTIPLE = 1e4  # |J|² below this many times |f|: a multiple zero, up to the solver's last step


def doubt(
    local: LocalModel, space: DeadSpace, *, multiple: bool, fibres: Sequence[Fibre] = ()
) -> str | None:
    """Why the fibre claimed by a reading is not certain, or None.

    Args:
        local, space: the model at its point and its dead space.
        multiple: the claim is a fibre along which the outputs vanish to order two or more.
        fibres: linear spaces claimed to be fibres of known orders, where the reading has them.
    """
    top = len(space.magnitude) - 1 if space.germ is None else space.germ.top
    vectors = flat_directions(space)
    if vectors.shape[0] == 0 and not fibres:
        return _doubt_curved(local, space, multiple)
    why = _doubt_flat(local, space, vectors, top) if vectors.shape[0] else None
    for fibre in fibres:
        why = why or _doubt_linear(local, space, fibre, top)
    return why


def _doubt_flat(local: LocalModel, space: DeadSpace, vectors: Tensor, top: int) -> str | None:
    """The same for directions that are flat on their own."""
    jets = local.relaxed_jets(vectors, top, uncertainty=FLAT_UNCERTAINTY)
    for index, order in enumerate(jets.orders()):
        if order != float("inf"):
            said = "too close to rounding" if order is None else f"order {order:g}"
            return f"a direction that looks flat among others is {said} on its own"
        there = follow_fibre(local, space, vectors[index], jets, index)
        if there is None:
            return (
                f"flat to order {top}, but no fibre is found at a distance: the order may be "
                f"above {top}"
            )
        # Where the coefficients are proof, a step may well cross a kink that has nothing to do
        # with this point.
        if not proven_flat(local, jets, index) and local.space.dimension <= EXACT_LIMIT:
            rank = local.at(there).spectrum.rank
            if rank != local.spectrum.rank:
                return f"the rank along the fibre changes from {local.spectrum.rank} to {rank}"
    return None


def _generic(space: DeadSpace, fibre: Fibre) -> Tensor:
    """(d,) unit vector in general position in a linear space of the germ."""
    rng = np.random.default_rng(13)
    inside = torch.from_numpy(fibre.basis @ rng.standard_normal(fibre.basis.shape[1]))
    vector = space.rest @ inside
    vector[vector.abs() < SNAP * vector.norm()] = 0.0
    return vector / vector.norm()


def moving(local: LocalModel, space: DeadSpace, fibre: Fibre) -> str | None:
    """Why a linear space that looks flat beside larger coefficients is not on its own, or None."""
    top = len(space.magnitude) - 1 if space.germ is None else space.germ.top
    vector = _generic(space, fibre)
    (order,) = local.relaxed_jets(vector[None], top, uncertainty=FLAT_UNCERTAINTY).orders()
    if order == float("inf"):
        return None
    said = "too close to rounding" if order is None else f"order {order:g}"
    return f"a direction that looks flat among others is {said} on its own"


def _doubt_linear(local: LocalModel, space: DeadSpace, fibre: Fibre, top: int) -> str | None:
    """The same for a linear space of the dead space, at a generic point of it."""
    vector = _generic(space, fibre)
    why = moving(local, space, fibre)
    if why is not None:
        return why
    if local.degree <= top and local.spectrum.rank == 0:
        return None  # polynomials of known degree are their Taylor polynomials
    jets = local.relaxed_jets(vector[None], top, uncertainty=FLAT_UNCERTAINTY)
    theta = follow_fibre(local, space, vector, jets, 0)
    if theta is None:
        return f"no fibre is found at a distance: the order there may be above {top}"
    if fibre.order < 2:
        return None
    if local.space.dimension > EXACT_LIMIT:
        return "the claimed multiple fibre is not looked at in a model of this size"
    there = local.at(theta)
    rank, order = there.spectrum.rank, explore(there, max(fibre.order, 2)).order
    if rank != local.spectrum.rank or order != fibre.order:
        return (
            f"along a fibre on which the outputs should vanish to order {fibre.order} the rank is "
            f"{rank} instead of {local.spectrum.rank}, the order {order}"
        )
    return None


def _doubt_curved(local: LocalModel, space: DeadSpace, multiple: bool) -> str | None:
    """The same where no direction is flat to all orders: the fibre is curved."""
    if local.space.dimension > EXACT_LIMIT:
        return "the Taylor polynomial has a fibre; the model is too large to look for it"
    found = False
    for vector in neighbour_directions(local, space):
        theta = onto_fibre(local, space, RADIUS, vector)
        if theta is None:
            continue
        if not multiple:
            return None
        found = True
        slope = float(local.jacobian_at(theta, metric=False).norm())
        if slope**2 <= MULTIPLE * float(local.residuals(theta).norm()) * max(
            1.0, float(space.magnitude.max())
        ):
            return None
    if found:
        return "the fibre found at a distance is a simple one, not multiple as the coefficients say"
    return "the Taylor polynomial has a fibre, but none is found at a distance"


def flat_directions(space: DeadSpace, seed: int = 1) -> Tensor:
    """(p, d) unit vectors a reading takes for flat: flat blocks, or samples of a flat space."""
    if space.order == float("inf"):
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(2, space.rest.shape[1], dtype=torch.float64, generator=generator)
        draws = draws / draws.norm(dim=1, keepdim=True)
        return torch.cat([draws @ space.rest.T, space.rest.T[:FLAT_AXES]])
    adapted = flag_basis(space)
    if adapted is None:
        return space.rest.T[:0]
    basis, orders = adapted
    flat = [i for i, k in enumerate(orders) if k == float("inf")]
    return basis.T[flat]


def neighbour_directions(local: LocalModel, space: DeadSpace) -> Iterator[Tensor]:
    """Unit vectors of the dead space: masked ones that stay on the fibre, then random ones."""
    generator = torch.Generator().manual_seed(7)
    mu = space.rest.shape[1]
    owners = torch.cat(
        [torch.full((size,), i) for i, size in enumerate(local.space.sizes)]
        if len(local.space.sizes) > 1
        else [torch.arange(local.space.dimension)]
    )
    groups = int(owners.max()) + 1
    masks = range(1, 2**groups - 1) if groups <= 6 else ()
    for mask in masks:
        keep = torch.tensor([(mask >> int(i)) & 1 for i in range(groups)], dtype=torch.bool)[owners]
        draw = torch.randn(local.space.dimension, dtype=torch.float64, generator=generator)
        vector = space.rest @ (space.rest.T @ (draw * keep))
        if float((vector * ~keep).abs().max()) > 1e-12 * float(vector.abs().max()):
            continue
        vector = vector / vector.norm()
        floor = rounding_at(local, space, RADIUS)
        if float(local.residuals(local.theta + RADIUS * vector).norm()) <= floor:
            yield vector
    for _ in range(DRAWS):
        u = torch.randn(mu, dtype=torch.float64, generator=generator)
        yield space.rest @ (u / u.norm())


def onto_fibre(local: LocalModel, space: DeadSpace, radius: float, vector: Tensor) -> Tensor | None:
    """Levenberg–Marquardt to a point with the outputs of θ0; None if it strays.

    Damping by the residual keeps quadratic convergence where the equations are redundant.
    """
    theta = local.theta + radius * vector
    floor = rounding_at(local, space, radius)
    for _ in range(STEPS):
        residual = local.residuals(theta)
        size = float(residual.norm())
        moved = float((theta - local.theta).norm()) / radius
        if not np.isfinite(size) or not 0.2 < moved < 3:
            return None
        jacobian = local.jacobian_at(theta, metric=False)
        if size <= min(floor, rounding_there(local, theta, jacobian)):
            return theta
        u, values, vh = torch.linalg.svd(jacobian, full_matrices=False)
        if float(values[0]) == 0:
            return None
        damping = float(values[0]) * size
        theta = theta - vh.T @ (values / (values**2 + damping) * (u.T @ residual))
    return None
