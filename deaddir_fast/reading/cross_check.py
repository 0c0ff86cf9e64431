"""Do curvatures at a finite distance say what the Taylor coefficients say?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.reading.dead_space import EXACT_LIMIT, DeadSpace, flag_basis
from deaddir_fast.reading.local import LocalModel
from deaddir_fast.reading.schur import schur_point
from deaddir_fast.reading.selection import selection_rule

DISTANCES = (0.1, 0.03, 0.01, 0.003)  # in units of the distance at which coefficients balance
CLEAR = 100.0  # times its rounding that a curvature has to be
AGREES = 0.25  # orders closer than this are the same


@dataclass(frozen=True)
class CrossCheck:
    """The selection rule and the relaxed Schur curvature on the singular directions.

    Attributes:
        margin: largest ratio over λ_g/2 of the selection rule; NaN without a line of finite order.
        notes: what was checked, in words.
        reason: how the two readings disagree, or None.
    """

    margin: float
    notes: tuple[str, ...]
    reason: str | None


def cross_check(local: LocalModel, space: DeadSpace, max_order: int) -> CrossCheck:
    """Check the directions of a germ by the selection rule and by curvatures at a distance."""
    nothing = CrossCheck(float("nan"), (), None)
    if space.germ is None and space.lead is None:
        return nothing
    adapted = flag_basis(space)
    vectors = (space.rest if adapted is None else adapted[0]).T
    rule = selection_rule(local, vectors, max_order)
    finite = [i for i, k in enumerate(rule.relaxed_orders.tolist()) if 1 < k < float("inf")]
    if not finite:
        return nothing
    held = sum(rule.verdicts[i] == "transversal" for i in finite)
    margins = rule.margins[finite]
    margin = (
        float(margins[~margins.isnan()].max()) if bool((~margins.isnan()).any()) else nothing.margin
    )
    notes = [
        f"selection rule: {held} of {len(finite)} singular lines are transversal as they are "
        f"(largest ratio over λ_g/2: {margin:.2g}); all were relaxed"
    ]
    if local.space.dimension > EXACT_LIMIT:
        notes.append(f"no Schur curvatures at a distance (more than {EXACT_LIMIT} parameters)")
        return CrossCheck(margin, tuple(notes), None)
    agreed = 0
    for i in finite:
        k = float(rule.relaxed_orders[i])
        read = _order_at_a_distance(local, vectors[i], k, min(float(rule.windows[i]), 1.0))
        if read is None:
            continue
        if abs(read - k) > AGREES:
            reason = (
                f"Schur curvature at a distance reads k={read:.2f} along a direction whose Taylor "
                f"coefficients say {k:g}"
            )
            return CrossCheck(margin, tuple(notes), reason)
        agreed += 1
    notes.append(f"relaxed Schur curvature agrees along {agreed} of {len(finite)} directions")
    return CrossCheck(margin, tuple(notes), None)


def _order_at_a_distance(
    local: LocalModel, vector: Tensor, order: float, radius: float
) -> float | None:
    """sqrt(t² S / 2K), both sides averaged, at the first distance that agrees with ``order``.

    Otherwise at the smallest distance where it is above rounding; None if there is none.
    """
    found = None
    for distance in DISTANCES:
        t = distance * radius
        logs = []
        for side in (t, -t):
            point = schur_point(local, vector, side, None)
            if not (point.schur > CLEAR * point.floor and point.kl > CLEAR * point.kl_floor):
                break
            logs.append(0.5 * torch.tensor(t * t * point.schur / (2 * point.kl)).log())
        if len(logs) < 2:
            continue
        found = float(torch.stack(logs).mean().exp())
        if abs(found - order) <= AGREES:
            break
    return found
