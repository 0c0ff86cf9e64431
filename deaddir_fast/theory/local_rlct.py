"""(λ, m) of an ideal germ in any number of variables, where a rule with a proof applies.

The rules, tried in turn:

* one variable: order k gives (1/(2k), 1);
* variables on which no generator depends to the known order are dropped;
* two variables: resolution by blow-ups (``planar``), complete but for the known order;
* graded: coordinates split into blocks of order k_b, and possibly a block on which everything
  vanishes (a straight fibre), such that no term has weight below 1 for the weights 1/k_b (0 on the
  fibre) and the weight-1 part at the origin of the fibre vanishes at the origin only. Then K is
  comparable to Σ|block_b|^{2k_b}, so λ = Σ dim_b/(2k_b), m = 1. With one block and no fibre this is
  the isolated leading form;
* monomial: the coefficients of the monomials on compact faces of the Newton polyhedron have full
  column rank. Then K is comparable to the sum of the squares of its vertices and the linear
  programme over the polyhedron is exact;
* complete intersection: the leading forms number c, and where they vanish (away from the origin)
  their differentials are independent. One blow-up then gives normal crossings:
  λ = min(d/(2k), c/2), m = 2 on a tie;
* Newton non-degenerate (``newton``), in the given coordinates, in those of the
  flag of orders, and in those of linear factors of leading forms (``linear_factors``);
* one blow-up (``blow_up``): leading forms of large rank wherever they vanish.

Otherwise bounds that hold are returned with the reason: from below those of one blow-up, from above
d/(2k) or the linear programme over the Newton polyhedron of all terms that may be there
(``newton_bound``), in the same coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from deaddir_fast.theory.blow_up import blow_up
from deaddir_fast.theory.germ import Germ, monomials
from deaddir_fast.theory.linear_factors import factor_coordinates
from deaddir_fast.theory.monomial import monomial_ideal
from deaddir_fast.theory.newton import newton_bound, nondegenerate
from deaddir_fast.theory.planar import planar_threshold
from deaddir_fast.theory.polyhedron import Polyhedron
from deaddir_fast.theory.sphere import smallest_on_sphere
from deaddir_fast.theory.threshold import (
    LocalThreshold,
    Undecided,
    coordinate_fibres,
    decided,
)

Array = NDArray[np.float64]

FLAT = 1e-5  # relative derivative below which a leading form does not depend on a direction
BLUR = 30.0  # rounding in coordinates found from factors, over that of the coefficients
MONOMIAL_LIMIT = 60  # support points given to the exact linear programme


def order(germ: Germ) -> int | None:
    """Order of the ideal: lowest degree with a non-zero part; None if all known parts vanish.

    Raises:
        Undecided: if a lower part is neither clearly zero nor clearly present.
    """
    if germ.scale == 0:
        return None
    for degree in sorted(germ.parts):
        if degree <= germ.top and not germ.absent(germ.parts[degree]):
            return degree
    return None


def flag(germ: Germ) -> list[tuple[Array, int]] | None:
    """Blocks of dead space by order: [(d, e_b) basis, k_b], k_b = 0 where all known terms vanish.

    The first block spans the directions the leading forms depend on; the next ones are found in
    the same way inside the kernel of the former (theory of flags of orders).

    Raises:
        Undecided: where a coefficient is neither clearly zero nor clearly present.
    """
    inside = np.eye(germ.variables)
    blocks: list[tuple[Array, int]] = []
    while inside.shape[1]:
        restricted = germ.substitute(inside)
        k = None if germ.absent(np.array(restricted.scale)) else order(restricted)
        if k is None:
            blocks.append((inside, 0))
            break
        flat = restricted.invariant_directions((k,), FLAT)
        if flat.shape[1] == inside.shape[1]:
            return None
        full = np.linalg.svd(flat, full_matrices=True)[0] if flat.size else np.eye(inside.shape[1])
        across = full[:, flat.shape[1] :]
        blocks.append((inside @ across, k))
        inside = inside @ flat
    return blocks


def graded(germ: Germ) -> LocalThreshold | None:
    """The graded rule, with blocks from ``flag``; None where K is no sum of powers of blocks.

    Raises:
        Undecided: where a coefficient is neither clearly zero nor clearly present.
    """
    d = germ.variables
    blocks = flag(germ)
    if blocks is None:
        return None
    basis = np.concatenate([b for b, _ in blocks], axis=1)
    orders = [k for b, k in blocks for _ in range(b.shape[1])]
    adapted = germ.substitute(basis)
    weights = [Fraction(1, k) if k else Fraction(0) for k in orders]
    moving = [bool(k) for k in orders]
    lead: list[tuple[tuple[int, ...], Array]] = []
    for degree, coefficients in adapted.parts.items():
        for column, exponent in enumerate(monomials(d, degree)):
            weight = sum((w * e for w, e in zip(weights, exponent, strict=True)), Fraction(0))
            if weight > 1 or germ.absent(coefficients[:, column]):
                continue
            if weight < 1:
                return None
            if not any(e for e, m in zip(exponent, moving, strict=True) if not m):
                kept = tuple(e for e, m in zip(exponent, moving, strict=True) if m)
                lead.append((kept, coefficients[:, column]))
    if not lead:
        return None
    exponents = np.array([e for e, _ in lead])
    columns = np.array([c for _, c in lead])

    def leading(points: Array) -> Array:
        return np.prod(points[:, None, :] ** exponents[None], axis=2) @ columns

    if smallest_on_sphere(leading, sum(moving), germ.scale):
        return None
    value = sum((Fraction(1, 2 * k) for k in orders if k), Fraction(0))
    shape = ", ".join(f"order {k or 'inf'} in {b.shape[1]}" for b, k in blocks)
    name = "isolated leading form" if len(blocks) == 1 else "graded blocks"
    return decided(value, 1, f"{name} ({shape})", rests_on_zeros=not all(moving))


def _monomial(germ: Germ) -> LocalThreshold | None:
    """The monomial rule in the given coordinates."""
    support, columns = germ.terms()
    if not support or len(support) > MONOMIAL_LIMIT:
        return None
    if any(not any(e[i] for e in support) for i in range(germ.variables)):
        return None
    # Terms that lie on no compact face are negligible near 0.
    keep = Polyhedron.of(support).on_compact_faces(support)
    matrix = np.array(columns)[keep].T
    singular = np.linalg.svd(matrix, compute_uv=False)
    if matrix.shape[1] > matrix.shape[0] or singular[-1] < 1e-3 * singular[0]:
        return None
    chosen = [e for e, k in zip(support, keep, strict=True) if k]
    rlct, multiplicity = monomial_ideal(chosen)
    rule = f"monomial ideal with {len(chosen)} generators"
    # Unknown terms can only add constraints, at worst the pure powers of degree top + 1.
    beyond = [
        tuple(int(i == j) * (germ.top + 1) for j in range(germ.variables))
        for i in range(germ.variables)
    ]
    if tuple(monomial_ideal(chosen + beyond)) != (rlct, multiplicity):
        rule += f", terms beyond degree {germ.top} taken as absent"
    fibres = coordinate_fibres(chosen)
    return decided(Fraction(rlct), multiplicity, rule, rests_on_zeros=bool(fibres), fibres=fibres)


def _complete_intersection(germ: Germ) -> LocalThreshold | None:
    """The complete-intersection rule."""
    d, k = germ.variables, order(germ)
    assert k is not None
    forms = germ.part(k)
    singular = np.linalg.svd(forms, compute_uv=False)
    c = int((singular > 1e-6 * singular[0]).sum())
    if c < len(singular) and not germ.absent(np.asarray(singular[c:], dtype=np.float64)):
        return None
    if c >= d:
        return None
    # More generators than leading forms would add terms along the base locus.
    u, _, _ = np.linalg.svd(forms, full_matrices=True)
    for degree, coefficients in germ.parts.items():
        rest = u[:, c:].T @ coefficients
        if degree != k and rest.size and not germ.absent(rest):
            return None
    lead = Germ(d, k, {k: u[:, :c].T @ forms})

    def value(points: Array) -> Array:
        return lead.evaluate(k, points)

    if not smallest_on_sphere(value, d, lead.scale):
        return None  # isolated: the graded rule covers it

    def critical(points: Array) -> Array:
        slopes = np.linalg.svd(lead.jacobian(k, points), compute_uv=False)[:, c - 1]
        return np.concatenate([lead.evaluate(k, points), slopes[:, None]], axis=1)

    if smallest_on_sphere(critical, d, lead.scale):
        return None
    blown, generic = Fraction(d, 2 * k), Fraction(c, 2)
    rule = f"complete intersection of {c} leading form{'s' * (c > 1)} of order {k}"
    return decided(min(blown, generic), 2 if blown == generic else 1, rule)


def local_threshold(germ: Germ, *, prior_exponent: int = 0) -> LocalThreshold:
    """(λ, m) at the origin of the ideal generated by a germ, or bounds and the reason.

    Args:
        germ: Taylor polynomials of functions that vanish at the origin.
        prior_exponent: h of a prior that vanishes like the h-th power of the distance to the
            origin (decided for one variable, two variables, and isolated leading forms).

    Returns:
        a ``LocalThreshold``. A germ that is zero to its known order is not decided: the caller
        knows whether the function is flat there.
    """
    d, h = germ.variables, prior_exponent
    try:
        k = order(germ)
    except Undecided as why:
        return LocalThreshold(None, None, Fraction(0), Fraction(d + h, 2), str(why))
    if k is None:
        # Coefficients lost in rounding say nothing; exact zeros say that the order is higher.
        upper = Fraction(d + h, 2 if germ.scale > 0 else 2 * (germ.top + 1))
        return LocalThreshold(None, None, Fraction(0), upper, f"flat to order {germ.top}")
    if d == 1:
        return decided(Fraction(1 + h, 2 * k), 1, f"one direction of order {k}")
    if h == 0:
        kept = germ.invariant_directions(tuple(germ.parts), 300 * germ.noise)
        if 0 < kept.shape[1] < d:
            across = np.linalg.svd(kept, full_matrices=True)[0][:, kept.shape[1] :]
            # Dropping a direction to rounding claims a fibre along it.
            inner = local_threshold(germ.substitute(across))
            return replace(inner.moved(across), rests_on_zeros=True)
    lower, upper = Fraction(1, 2 * k), Fraction(d + h, 2 * k)
    reasons: list[str] = []
    if d == 2:
        resolved = planar_threshold(germ.planar(), noise=germ.noise, prior_exponent=h)
        if resolved.decided and resolved.rests_on_zeros and h == 0:
            with suppress(Undecided):  # the monomial rule says where the fibres are
                same = _monomial(germ)
                if same and (same.rlct, same.multiplicity) == (
                    resolved.rlct,
                    resolved.multiplicity,
                ):
                    return same
        if resolved.decided or h:
            return resolved
        reasons.append(resolved.rule)
    try:
        sums = graded(germ)
        if sums is not None and (h == 0 or sums.rlct == Fraction(d, 2 * k)):
            return sums.plus(Fraction(h, 2 * k))
    except Undecided as why:
        reasons.append(str(why))
    seen: list[tuple[Array, Germ]] = []
    for basis, adapted in _coordinates(germ) if h == 0 else ():
        seen.append((basis, adapted))
        for rule in (_monomial, _complete_intersection, nondegenerate):
            try:
                found = rule(adapted)
            except Undecided as why:
                reasons.append(str(why))
                continue
            if found is not None:
                return found.moved(basis)
    reason = f"no rule decides this singularity of order {k} in {d} dimensions"
    if reasons:
        reason += f" ({'; '.join(dict.fromkeys(reasons))})"
    best = LocalThreshold(None, None, lower, upper, reason)
    if h == 0:
        with suppress(Undecided):
            best = blow_up(germ, k, reason)
            if best.decided:
                return best
    for basis, adapted in seen:
        with suppress(Undecided):
            bound, fibres = newton_bound(adapted)
            if bound < best.upper:
                best = replace(best, upper=bound, rests_on_zeros=True, fibres=fibres).moved(basis)
    return best


def _coordinates(germ: Germ) -> Iterator[tuple[Array, Germ]]:
    """The germ in a few linear coordinate systems, x = basis @ y, the given one first."""
    yield np.eye(germ.variables), germ
    with suppress(Undecided):
        blocks = flag(germ)
        if blocks is not None:
            basis = np.concatenate([b for b, _ in blocks], axis=1)
            if not np.allclose(np.abs(basis).max(0), 1.0):
                yield basis, germ.substitute(basis)
    for basis in factor_coordinates(germ):
        turned = germ.substitute(basis)
        # The factors are known to a few digits less than the coefficients.
        yield basis, replace(turned, noise=BLUR * turned.noise)
