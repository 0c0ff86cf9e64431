"""What one blow-up of the origin says: bounds of λ from the leading forms alone.

Let f be generators of order k with leading forms f_k, and suppose that wherever f_k vanishes on the
unit sphere its differential has rank >= c. In polar coordinates f = r^k (f_k(θ) + O(r)). Away from
the zeros K ≍ r^{2k}; near one, c combinations of the generators over r^k are coordinates b,
whatever the terms of higher degree are, so K >= C r^{2k} |b|² with Jacobian r^{d-1}: blowing up
b = 0 gives the values d/(2k) and c/2. With λ <= d/(2k) always,

* c/2 > d/(2k): λ = d/(2k), m = 1;
* otherwise λ >= c/2. Where a fibre of codimension c enters the origin the bound is attained
  (the fibre then is all of b = 0), with m = 1, or m = 2 if c/2 = d/(2k).

(Derived; the resolution of normal crossings is Hironaka's and Watanabe's, 2009.) The rank is found
by minimising over the sphere from many starts.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from deaddir_fast.theory.germ import Germ
from deaddir_fast.theory.sphere import smallest_on_sphere
from deaddir_fast.theory.threshold import LocalThreshold, Undecided, decided

Array = NDArray[np.float64]

SPAN = 1e-6  # generators of leading forms below this (relative) are left out: K only falls


def leading_rank(germ: Germ, k: int) -> int | None:
    """Smallest rank of the differential of the leading forms where they vanish; None if nowhere.

    Raises:
        Undecided: whether they vanish at all is not clear.
    """
    d, forms = germ.variables, germ.part(k)
    u, values, _ = np.linalg.svd(forms, full_matrices=False)
    kept = u[:, values > SPAN * values[0]].T @ forms
    lead = Germ(d, k, {k: kept})

    def value(points: Array) -> Array:
        return lead.evaluate(k, points)

    if not smallest_on_sphere(value, d, lead.scale):
        return None

    for c in range(min(kept.shape[0], d - 1), 0, -1):

        def critical(points: Array, c: int = c) -> Array:
            slopes = np.linalg.svd(lead.jacobian(k, points), compute_uv=False)[:, c - 1]
            return np.concatenate([lead.evaluate(k, points), slopes[:, None]], axis=1)

        try:
            if not smallest_on_sphere(critical, d, lead.scale):
                return c
        except Undecided:
            continue
    return 0


def blow_up(germ: Germ, k: int, why: str) -> LocalThreshold:
    """(λ, m) if one blow-up decides them, else bounds; ``why`` is the reason given then.

    Raises:
        Undecided: whether the leading forms vanish somewhere is not clear.
    """
    d = germ.variables
    c = leading_rank(germ, k)
    blown = Fraction(d, 2 * k)
    if c is None:
        return decided(blown, 1, f"isolated leading form (order {k} in {d})")
    generic = Fraction(c, 2)
    if generic > blown:
        rule = f"one blow-up: leading forms of order {k} have rank {c} wherever they vanish"
        return decided(blown, 1, rule)
    lower = max(generic, Fraction(1, 2 * k))
    attained = None
    if lower == generic:
        attained = 2 if generic == blown else 1
    return LocalThreshold(None, None, lower, blown, why, attained=attained)
