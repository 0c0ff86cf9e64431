"""Newton polyhedra: facets, compact faces and the linear programme of λ, in exact integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd

from deaddir_fast.theory.linear_program import rank
from deaddir_fast.theory.monomial import minimal_generators
from deaddir_fast.theory.threshold import Undecided

Vector = tuple[int, ...]

FACES = 3000  # a polyhedron with more faces is not looked at
RAYS = 400  # nor one with more facets


def _primitive(vector: Sequence[int | Fraction]) -> Vector:
    """The shortest integer vector in the same direction."""
    scale = 1
    for v in vector:
        scale = scale * Fraction(v).denominator // gcd(scale, Fraction(v).denominator)
    whole = [int(v * scale) for v in vector]
    shared = gcd(*whole) or 1
    return tuple(v // shared for v in whole)


def _dot(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


def independent(rows: Sequence[Sequence[int]], size: int) -> list[int]:
    """Indices of the first ``size`` linearly independent rows (fewer if there are not so many)."""
    chosen: list[int] = []
    reduced: list[tuple[int, list[Fraction]]] = []  # (pivot, row with 1 there)
    for index, row in enumerate(rows):
        if len(chosen) == size:
            break
        left = [Fraction(v) for v in row]
        for pivot, base in reduced:
            if left[pivot]:
                left = [u - left[pivot] * v for u, v in zip(left, base, strict=True)]
        if any(left):
            first = next(i for i, v in enumerate(left) if v)
            reduced.append((first, [v / left[first] for v in left]))
            chosen.append(index)
    return chosen


def _inverse(rows: Sequence[Sequence[int]]) -> list[list[Fraction]]:
    """Inverse of a regular square matrix."""
    n = len(rows)
    work = [
        [Fraction(v) for v in row] + [Fraction(int(i == j)) for j in range(n)]
        for i, row in enumerate(rows)
    ]
    for c in range(n):
        p = next(i for i in range(c, n) if work[i][c])
        work[c], work[p] = work[p], work[c]
        work[c] = [v / work[c][c] for v in work[c]]
        for i in range(n):
            if i != c and work[i][c]:
                factor = work[i][c]
                work[i] = [u - factor * v for u, v in zip(work[i], work[c], strict=True)]
    return [row[n:] for row in work]


def cone_rays(constraints: Sequence[Vector]) -> list[Vector]:
    """Extreme rays of the pointed cone {x : <c, x> >= 0 for all constraints c}.

    Double description method (Motzkin et al. 1953; Fukuda & Prodon 1996) in exact integers.

    Raises:
        Undecided: with more than ``RAYS`` rays on the way.
    """
    size = len(constraints[0])
    first = independent(constraints, size)
    columns = list(zip(*_inverse([constraints[i] for i in first]), strict=True))
    done = list(first)
    # (ray, constraints that are tight on it)
    rays = [(_primitive(columns[i]), frozenset(done) - {index}) for i, index in enumerate(first)]
    for index, c in enumerate(constraints):
        if index in first:
            continue
        values = [_dot(c, r) for r, _ in rays]
        kept = [
            (r, tight | {index} if not v else tight)
            for (r, tight), v in zip(rays, values, strict=True)
            if v >= 0
        ]
        for i, (r, tight) in enumerate(rays):
            if values[i] <= 0:
                continue
            for j, (q, other) in enumerate(rays):
                if values[j] >= 0:
                    continue
                shared = tight & other
                if len(shared) < size - 2 or any(
                    shared <= t for n, (_, t) in enumerate(rays) if n not in (i, j)
                ):
                    continue
                joined = [values[i] * b - values[j] * a for a, b in zip(r, q, strict=True)]
                kept.append((_primitive(joined), shared | {index}))
        rays = kept
        if len(rays) > RAYS:
            raise Undecided(f"a Newton polyhedron with more than {RAYS} facets")
    return [r for r, _ in rays]


@dataclass(frozen=True)
class Face:
    """A compact face of a Newton polyhedron.

    Attributes:
        corners: indices of the generators on it.
        dimension: of the face.
        weight: a vector inside its normal cone, all entries positive; <v, weight> is smallest on
            the face.
        rays: indices of the rays of its normal cone.
    """

    corners: frozenset[int]
    dimension: int
    weight: Vector
    rays: frozenset[int]


@dataclass(frozen=True)
class Polyhedron:
    """The Newton polyhedron conv(exponents) + R^d_+ of monomials, none of which is 1.

    Attributes:
        generators: its exponents, those that others divide left out.
        normals: (w, N) for every facet <v, w> >= N, w a primitive vector in Z^d_+. They are the
            rays of the normal fan; the coordinate vectors are among them.
    """

    generators: tuple[Vector, ...]
    normals: tuple[tuple[Vector, int], ...]

    @classmethod
    def of(cls, exponents: Sequence[Vector]) -> Polyhedron:
        """From all exponents of a support."""
        corners = minimal_generators(exponents)
        d = len(corners[0])
        unit = [tuple(int(i == j) for j in range(d + 1)) for i in range(d)]
        # {(w, N) : w >= 0, N <= <v, w> for all v}; its rays but (0, −1) are the facets.
        rays = cone_rays(unit + [(*v, -1) for v in corners])
        return cls(tuple(corners), tuple((r[:-1], r[-1]) for r in rays if any(r[:-1])))

    @property
    def variables(self) -> int:
        """d."""
        return len(self.generators[0])

    @cached_property
    def rlct(self) -> Fraction:
        """min Σ w_i / (2 N) over the facets: λ of the monomial ideal."""
        return min(Fraction(sum(w), 2 * n) for w, n in self.normals if n)

    @cached_property
    def optimal(self) -> frozenset[int]:
        """The rays that attain λ. They span a cone of the normal fan."""
        return frozenset(
            i for i, (w, n) in enumerate(self.normals) if n and Fraction(sum(w), 2 * n) == self.rlct
        )

    @cached_property
    def multiplicity(self) -> int:
        """m of the monomial ideal: dimension of the cone of the rays that attain λ."""
        return rank([[Fraction(v) for v in self.normals[i][0]] for i in sorted(self.optimal)])

    @cached_property
    def compact_faces(self) -> tuple[Face, ...]:
        """All compact faces, the largest first.

        Raises:
            Undecided: with more than ``FACES`` faces of any kind.
        """
        d = self.variables
        facets = [
            (
                frozenset(j for j, v in enumerate(self.generators) if _dot(v, w) == n),
                frozenset(i for i in range(d) if w[i] == 0),
            )
            for w, n in self.normals
        ]
        found = set(facets)
        layer = list(found)
        while layer:
            deeper = []
            for corners, free in layer:
                for other, open_ in facets:
                    face = (corners & other, free & open_)
                    if face[0] and face not in found:
                        found.add(face)
                        deeper.append(face)
            if len(found) > FACES:
                raise Undecided(f"a Newton polyhedron with more than {FACES} faces")
            layer = deeper
        out = []
        for corners, free in found:
            if free:
                continue
            rays = frozenset(i for i, (on, _) in enumerate(facets) if corners <= on)
            normals = [self.normals[i][0] for i in sorted(rays)]
            weight = tuple(sum(column) for column in zip(*normals, strict=True))
            dimension = d - rank([[Fraction(v) for v in w] for w in normals])
            out.append(Face(corners, dimension, weight, rays))
        return tuple(sorted(out, key=lambda f: (-f.dimension, sorted(f.corners))))

    def on_compact_faces(self, exponents: Sequence[Vector]) -> list[bool]:
        """Which exponents, of those that span the polyhedron, lie on one of its compact faces.

        Raises:
            Undecided: as :attr:`compact_faces`.
        """
        on = [False] * len(exponents)
        for face in self.maximal_faces:
            levels = [_dot(v, face.weight) for v in exponents]
            least = min(levels)
            on = [o or level == least for o, level in zip(on, levels, strict=True)]
        return on

    @property
    def maximal_faces(self) -> tuple[Face, ...]:
        """Compact faces that lie in no larger compact face."""
        faces = self.compact_faces
        return tuple(f for f in faces if not any(f.corners < other.corners for other in faces))


def simplicial_cones(constraints: Sequence[Vector]) -> list[list[Vector]]:
    """The pointed full-dimensional cone {x : <c, x> >= 0} cut into simplicial ones, by their rays.

    Pulling triangulation: join the first ray to a triangulation of every facet it is not on.
    """
    size = len(constraints[0])
    rays = cone_rays(constraints)
    tight = [frozenset(n for n, r in enumerate(rays) if _dot(c, r) == 0) for c in constraints]

    def cut(members: frozenset[int], dimension: int) -> list[list[int]]:
        if len(members) == dimension:
            return [sorted(members)]
        apex = min(members)
        facets = {members & t for t in tight if apex not in t}
        full = [
            f
            for f in facets
            if rank([[Fraction(v) for v in rays[n]] for n in sorted(f)]) == dimension - 1
        ]
        return [[apex, *rest] for f in full for rest in cut(f, dimension - 1)]

    return [[rays[n] for n in chosen] for chosen in cut(frozenset(range(len(rays))), size)]
