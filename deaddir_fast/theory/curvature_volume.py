"""How much Fisher volume lies at large curvature: the third face of the rate chain."""

from __future__ import annotations

from fractions import Fraction

from deaddir_fast import _check
from deaddir_fast.theory.leading import LeadingScores


def curvature_volume(k: int | LeadingScores, *, coupled: int = 0) -> Fraction:
    """Exponent e of vol{|curvature| > M} ~ M^(-e), M → ∞, in the Fisher volume √det F dθ.

    One dead direction of order k (Dead Directions, arXiv 2606.05957, rate chain): along it
    √det F ~ t^(k-1) and |curvature| ~ t^(-2(k-1)) in the plane with a live direction that the dead
    one is coupled to, so |curvature| > M means t < c M^(-1/(2(k-1))), and

        vol = ∫ t^(k-1) dt ~ M^(-k/(2(k-1))).

    Several (the product law): the volume in which the curvature of the plane of *every* one of the
    directions exceeds M is a box with √det F ~ ∏ t_i^(k_i - 1), and exponents add. That takes
    leading scores that are linearly independent and not mixed, hence :class:`LeadingScores` and not
    a list of orders: the twisted control has k = (2, 2) and e = 5/2, not 2. (Where the curvature of
    *some* plane exceeds M is a union of slabs with the smallest of the single exponents.)

    The law is that of the slice of dead directions. It is not that of the whole space: coupling
    means that moving along the live direction w makes u live, F_uu ~ t^(2(k-1)) + w², so large
    curvature is confined to |w| < c M^(-1/2) too, and each ``coupled`` live coordinate that is
    integrated over adds 1/2 (derived). The surface (t^k + w², w, t w), a Whitney umbrella for
    k = 2, has the volume M^(-3/2) in (t, w), and M^(-1) on the slice w = 0.

    Args:
        k: order >= 2 of one direction, or the leading scores of several. Live directions (order 1)
            among them add nothing, but their scores are tested too: a dead direction whose leading
            score is a combination of live ones is tangent to a curved fibre, and no law holds.
        coupled: how many coupled live coordinates the volume extends over, >= 0.

    Returns:
        e, exact.

    Raises:
        TypeError, ValueError: naming the argument; for leading scores that do not multiply, with
            the reason.
    """
    coupled = _check.integer("coupled", coupled, 0)
    if isinstance(k, LeadingScores):
        if not k.independent:
            raise ValueError(f"k: the product law does not hold here, {k.verdict}")
        orders = [int(order) for order in k.orders if order > 1]
        if not orders:
            raise _check.fail("k", k, "an order >= 2 (curvature is bounded at live directions)")
    else:
        orders = [_check.integer("k", k, 2)]
    single = sum((Fraction(order, 2 * (order - 1)) for order in orders), Fraction(0))
    return single + Fraction(coupled, 2)
