"""(λ, m) of ideals that are non-degenerate for their Newton polyhedron.

Let f_1..f_g generate the ideal, Γ be the convex hull of all their exponents plus the orthant, and
f_γ the terms on a compact face γ. Suppose that at every common real zero of f_γ with no coordinate
zero, the g differentials are independent, for every compact face (Varchenko 1976; Kouchnirenko
1976; for several functions Khovanskii 1977). Then, with P = min Σ w_i/(2 N(w)) over w >= 0,
N(w) = min_{v in Γ} <v, w>, and m_P its multiplicity (the linear programme of ``monomial_ideal``),

    λ = P,   m = m_P      if no compact face has such a zero,
    λ = P,   m = m_P      if P < g/2,
    λ = g/2, m = 1        if g/2 < P and some face has a zero,
    λ = P,   m = m_P + 1  if P = g/2 and a compact face γ inside γ* has a zero, else m_P;

γ* is the smallest face of Γ that contains the point (1, …, 1)/(2P).

Proof. Take a regular simplicial subdivision of the normal fan of Γ and the map π of its toric
variety: x_i = Π_j y_j^{w_ji} in the chart of a cone with rays w_j. There f_a∘π = F_a·Π y_j^{N_j},
N_j = N(w_j); the Jacobian is Π y_j^{|w_j|−1}, |w| = Σ w_i. A point p with y_j = 0 exactly for j
in J lies over x = 0 if and only if Σ_J w_j has positive entries, that is if and only if the face γ
on which all these w_j are smallest is compact (so compact faces suffice, π being proper). On that
stratum F_a is f_{a,γ} up to a monomial without zeros, and so are its zeros and differentials there.

If F(p) ≠ 0, |f∘π|² is a monomial times a unit at p. If F(p) = 0, the F_a are, with the y_j of J,
part of a coordinate system, and the ideal is Π_J y_j^{N_j}·(F_1, …, F_g). Blowing up F = 0 gives
one more divisor, of order 1 and Jacobian exponent g − 1, crossing the others normally; it offers
g/2. The divisors y_j = 0 offer |w_j|/(2N_j) >= P, all of them meet x = 0, and the corner of a
chart lies over 0 and is no zero, so λ = min(P, g/2). The rays with |w| = 2P·N(w) fill a cone C of
the normal fan, that of γ*, because |w| − 2P·N(w) is convex and non-negative; some cone of the
subdivision has dim C = m_P of them, all at its corner. On a tie the divisor of F = 0 also meets
those of J that lie in C; over the cones that fill the normal cone of γ their largest number is the
dimension of its intersection with C. That is m_P if and only if C lies in the normal cone of γ,
that is γ in γ*, and otherwise at most m_P − 1. ∎

Everything depends on the coordinates. Signs, edges and faces of any dimension are treated alike by
``torus_zeros``, with certainty or not at all.

Terms of a degree above ``top`` are not known. If Γ has a pure power of every variable they lie
strictly inside and do not matter. Otherwise the result takes them to lie in Γ and says so
(``rests_on_zeros``), with the coordinate spaces that are then fibres (``fibres``).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from deaddir_fast.theory.germ import Germ, monomials
from deaddir_fast.theory.planar import CLEAR, ZERO
from deaddir_fast.theory.polyhedron import Face, Polyhedron
from deaddir_fast.theory.threshold import (
    Fibre,
    LocalThreshold,
    Undecided,
    coordinate_fibres,
    decided,
)
from deaddir_fast.theory.torus_zeros import FaceSystem, Search

Array = NDArray[np.float64]
Vector = tuple[int, ...]

SUPPORT = 400  # support points of a germ that is looked at


@dataclass(frozen=True)
class Support:
    """Exponents (v, d) and coefficients (g, v) of the terms of a germ that are present."""

    exponents: tuple[Vector, ...]
    coefficients: Array
    error: float


def support(germ: Germ) -> Support:
    """The terms of a germ.

    Raises:
        Undecided: where a coefficient is neither clearly zero nor clearly present.
    """
    exponents, columns = germ.terms()
    error = ZERO * germ.noise * germ.scale
    matrix = np.array(columns).T
    # Generators that are combinations of others are left out: K only depends on the span.
    u, values, _ = np.linalg.svd(matrix, full_matrices=False)
    error *= len(values) ** 0.5
    count = int((values > error * matrix.shape[1] ** 0.5).sum())
    if (values[:count] < CLEAR / ZERO * error).any():
        raise Undecided("the number of generators is not clear")
    return Support(tuple(exponents), u[:, :count].T @ matrix, error)


def _systems(given: Support, face: Face) -> list[FaceSystem]:
    level = [sum(a * b for a, b in zip(v, face.weight, strict=True)) for v in given.exponents]
    on = [j for j, value in enumerate(level) if value == min(level)]
    exponents = np.array([given.exponents[j] for j in on], dtype=np.int64)
    coefficients = given.coefficients[:, on]
    return list(FaceSystem.patterns(exponents, coefficients, np.full(len(on), given.error)))


def nondegenerate(germ: Germ) -> LocalThreshold:
    """(λ, m) in the given coordinates.

    Raises:
        Undecided: if the germ is degenerate in these coordinates, or not certainly otherwise.
    """
    given = support(germ)
    if len(given.exponents) > SUPPORT:
        raise Undecided(f"more than {SUPPORT} terms")
    used = np.array(given.exponents).any(0)
    if not used.all():
        raise Undecided("a variable does not occur")
    hull = Polyhedron.of(given.exponents)
    g = given.coefficients.shape[0]
    search = Search()
    clear = True
    for face in hull.maximal_faces:
        for system in _systems(given, face):
            clear &= search.bounds(system, free=False).free
    generic = Fraction(g, 2)
    rlct, multiplicity = hull.rlct, hull.multiplicity
    kind = "without real zeros" if clear else "with regular zeros"
    if not clear and generic < rlct:
        if not any(_zero(given, face) for face in hull.compact_faces):
            raise Undecided("zeros of the face polynomials are neither found nor excluded")
        rlct, multiplicity = generic, 1
    elif not clear and generic == rlct:
        inside = [f for f in hull.compact_faces if hull.optimal <= f.rays]
        if any(_zero(given, face) for face in inside):
            multiplicity += 1
        elif not all(search.bounds(s, free=True).free for f in inside for s in _systems(given, f)):
            raise Undecided("zeros on the face that decides m are neither found nor excluded")
    rule = f"Newton non-degenerate, {len(hull.generators)} corners, faces {kind}"
    fibres = coordinate_fibres(hull.generators)
    return decided(rlct, multiplicity, rule, rests_on_zeros=bool(fibres), fibres=fibres)


def _zero(given: Support, face: Face) -> bool:
    return face.dimension > 0 and any(system.find() for system in _systems(given, face))


def newton_bound(germ: Germ) -> tuple[Fraction, tuple[Fibre, ...]]:
    """A bound on λ from above: the linear programme over Γ and the pure powers beyond ``top``.

    K <= C Σ_v x^{2v} over the known terms and the pure powers of degree top + 1, which bound all
    terms that are not known; a larger K has a larger λ. Valid in any coordinates, if coefficients
    below their rounding are zero; the coordinate spaces without any other are returned too.
    """
    d = germ.variables
    level = ZERO * germ.noise * germ.scale
    terms = [
        exponent
        for degree, coefficients in germ.parts.items()
        for column, exponent in enumerate(monomials(d, degree))
        if float(np.abs(coefficients[:, column]).max(initial=0.0)) > level
    ]
    beyond = [tuple((germ.top + 1) * int(i == j) for j in range(d)) for i in range(d)]
    return Polyhedron.of(terms + beyond).rlct, coordinate_fibres(terms)
