"""The unknowns of symmetry discovery and the linear equations between them.

Every axis entry of every parameter gets an unknown log scale ("variable"); where a parameter
stacks matrices of equal standing (experts), every axis entry of every one of them. Walking the
forward pass, each operation states which sums of variables must vanish; what is left free is the
group of diagonal symmetries. Variable 0 is the constant zero.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

# Broadcasting an equation beyond this many rows is replaced by the stronger "each term is zero".
_MAX_ROWS = 4_000_000
# Bases longer than this are left as elimination gives them.
_MAX_SHORTENED = 64


@dataclass(frozen=True, eq=False)
class Term:
    """``coefficient * variable[ids]``, ids broadcastable to the tensor it belongs to."""

    coefficient: Fraction
    ids: np.ndarray

    def times(self, factor: Fraction | int) -> Term:
        """The term with its coefficient multiplied."""
        return Term(self.coefficient * factor, self.ids)

    def support(self, ndim: int) -> frozenset[int]:
        """Axes, aligned to ``ndim`` dimensions, along which the ids vary."""
        pad = ndim - self.ids.ndim
        return frozenset(a + pad for a, s in enumerate(self.ids.shape) if s > 1)


Scale = list[Term]  # log scale of a tensor: the sum of its terms


def compress(ids: np.ndarray) -> np.ndarray:
    """Shrink every axis along which the ids do not vary to extent 1."""
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            first = ids.take([0], axis)
            if (ids == first).all():
                ids = first
    return ids


def negated(scale: Scale) -> Scale:
    """The scale with opposite sign."""
    return [t.times(-1) for t in scale]


def combined(scale: Scale) -> Scale:
    """Add up the coefficients of terms with the same ids."""
    out: Scale = []
    for term in scale:
        for i, other in enumerate(out):
            if other.ids.shape == term.ids.shape and (other.ids == term.ids).all():
                out[i] = Term(other.coefficient + term.coefficient, term.ids)
                break
        else:
            out.append(term)
    return [t for t in out if t.coefficient]


@dataclass
class Units:
    """Variables, equations, and what operations were seen to do to each variable.

    Attributes:
        parameter, outer, axis, index: for each variable the parameter name and the entry it
            scales of ``axis``, or of ``(*outer, axis)`` flattened.
        positive: the variable passed an operation with a kink: only positive scales commute.
        kinks: the scales of everything that met an operation with a kink.
        label: variables with different labels were told apart by some operation and do not mix.
    """

    parameter: list[str] = field(default_factory=lambda: [""])
    outer: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    axis: list[int] = field(default_factory=lambda: [0])
    index: list[int] = field(default_factory=lambda: [0])
    rows: list[tuple[list[Fraction], np.ndarray]] = field(default_factory=list)
    positive: np.ndarray = field(default_factory=lambda: np.zeros(1, bool))
    label: np.ndarray = field(default_factory=lambda: np.zeros(1, np.uint64))
    kinks: list[Scale] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(0)

    def declare(self, name: str, value: Tensor, stacked: bool = False) -> Scale:
        """Fresh variables for a parameter: one per entry of each axis longer than 1.

        With ``stacked`` one per pair of an entry of the first axis and an entry of another: the
        parameter is a stack of matrices that an operation tells apart.
        """
        axes = [a for a, s in enumerate(value.shape) if s > 1]
        if stacked and axes[:1] == [0] and len(axes) > 1:
            return [self._fresh(name, (0, a), value) for a in axes[1:]]
        return [self._fresh(name, (a,), value) for a in axes or [0]]

    def _fresh(self, name: str, axes: tuple[int, ...], value: Tensor) -> Term:
        shape = [s if a in axes else 1 for a, s in enumerate(value.shape)]
        start, size = len(self.parameter), math.prod(shape)
        self.parameter += [name] * size
        self.outer += [axes[:-1]] * size
        self.axis += [axes[-1]] * size
        self.index += range(size)
        self.positive = np.concatenate([self.positive, np.zeros(size, bool)])
        self.label = np.concatenate([self.label, np.zeros(size, np.uint64)])
        return Term(Fraction(1), np.arange(start, start + size).reshape(shape))

    def require_zero(self, scale: Scale) -> None:
        """State that the scale vanishes everywhere.

        Terms on disjoint axes are required to vanish separately. That only forgoes moving a
        constant from one to the other, which is no change of the tensor at all.
        """
        scale = combined(scale)
        if not scale:
            return
        ndim = max(t.ids.ndim for t in scale)
        groups: list[tuple[frozenset[int], list[Term]]] = []
        scalars: list[Term] = []
        for term in scale:
            axes = term.support(ndim)
            if not axes:
                scalars.append(term)
                continue
            joined = [g for g in groups if g[0] & axes]
            groups = [g for g in groups if not g[0] & axes]
            merged = frozenset(axes).union(*(g[0] for g in joined))
            groups.append((merged, [*(t for g in joined for t in g[1]), term]))
        if not groups:
            groups.append((frozenset(), []))
        groups[0][1].extend(scalars)
        for _, terms in groups:
            self._equation(terms)

    def _equation(self, terms: list[Term]) -> None:
        shape = np.broadcast_shapes(*(t.ids.shape for t in terms))
        if int(np.prod(shape, dtype=np.int64)) > _MAX_ROWS and len(terms) > 1:
            for term in terms:
                self._equation([term])
            return
        ids = np.stack([np.broadcast_to(t.ids, shape).reshape(-1) for t in terms], 1)
        if sum(s > 1 for s in shape) > 1 or len(terms) == 1:
            ids = np.unique(ids, axis=0)
        self.rows.append(([t.coefficient for t in terms], ids))

    def require_constant(self, scale: Scale, axes: Iterable[int], ndim: int) -> Scale:
        """State that the scale does not vary along ``axes``; returns it with these of extent 1."""
        wanted = {a % ndim for a in axes} if ndim else set()
        varying: Scale = []
        out: Scale = []
        for term in scale:
            along = term.support(ndim) & wanted
            if not along:
                out.append(term)
                continue
            pad = ndim - term.ids.ndim
            first = term.ids
            for a in along:
                first = first.take([0], a - pad)
            out.append(Term(term.coefficient, first))
            varying += [term, Term(-term.coefficient, first)]
        self.require_zero(varying)
        return out

    def distinguish(self, scale: Scale, axes: Iterable[int], ndim: int) -> None:
        """Record that an operation treats different positions along ``axes`` differently."""
        wanted = {a % ndim for a in axes} if ndim else set()
        for term in scale:
            for a in term.support(ndim) & wanted:
                ids = np.moveaxis(term.ids, a - (ndim - term.ids.ndim), 0)
                where = np.broadcast_to(
                    np.arange(ids.shape[0]).reshape(-1, *[1] * (ids.ndim - 1)), ids.shape
                )
                pairs = np.unique(np.stack([ids.reshape(-1), where.reshape(-1)], 1), axis=0)
                marks = self._random.integers(0, 2**64, (ids.shape[0],), dtype=np.uint64)
                np.add.at(self.label, pairs[:, 0], marks[pairs[:, 1]])

    def mark_members(self, scale: Scale) -> None:
        """Record that an operation selected these variables from among others."""
        for term in scale:
            mark = self._random.integers(0, 2**64, dtype=np.uint64)
            self.label[np.unique(term.ids)] += mark

    def mark_positive(self, scale: Scale) -> None:
        """Record a kink: only positive scales pass."""
        self.kinks.append(scale)
        for term in scale:
            self.positive[term.ids.reshape(-1)] = True

    def solve(self) -> list[list[dict[int, int]]]:
        """Null space of the equations, component by component.

        Returns:
            bases {variable: integer} of all solutions, grouped such that vectors of different
            groups share no variable; vectors are kept short. Variables in no equation are left
            out: no operation reads their parameter entry.
        """
        zero = np.zeros(len(self.parameter), bool)
        zero[0] = True
        self._propagate_zeros(zero)
        equations, variables, factors = [], [], []
        count = 0
        for coefficients, ids in self.rows:
            live = ~zero[ids]
            row, term = live.nonzero()
            # Whole numbers: an equation may be multiplied by any.
            common = math.lcm(*(c.denominator for c in coefficients))
            whole = np.array([int(c * common) for c in coefficients], np.int64)
            equations.append(count + row)
            variables.append(ids[row, term])
            factors.append(whole[term])
            count += len(ids)
        if not equations:
            return []
        return _components(
            np.concatenate(equations), np.concatenate(variables), np.concatenate(factors)
        )

    def _propagate_zeros(self, zero: np.ndarray) -> None:
        """Set variables that stand alone in an equation to zero, until nothing changes."""
        while True:
            before = int(zero.sum())
            for _, ids in self.rows:
                live = ~zero[ids]
                lone = live.sum(1) == 1
                zero[ids[lone][live[lone]]] = True
            if int(zero.sum()) == before:
                return


def _components(
    equation: np.ndarray, variable: np.ndarray, factor: np.ndarray
) -> list[list[dict[int, int]]]:
    """Solve connected systems one by one, and those that read alike once.

    Entry i of the three arrays: ``factor[i]`` times a variable takes part in an equation.
    """
    if not equation.size:
        return []
    names, v = np.unique(variable, return_inverse=True)
    _, e = np.unique(equation, return_inverse=True)
    size = names.size + int(e.max()) + 1  # nodes: variables, then equations
    graph = coo_matrix((np.ones(v.size, np.int8), (v, names.size + e)), (size, size))
    component = connected_components(graph, directed=False)[1][: names.size]
    # Components in order of their first variable, which connected_components need not keep to.
    _, first, component = np.unique(component, return_index=True, return_inverse=True)
    component = np.argsort(np.argsort(first))[component]
    members = np.argsort(component, kind="stable")
    starts = np.searchsorted(component[members], np.arange(first.size + 1))
    local = np.empty(names.size, np.int64)
    local[members] = np.arange(names.size) - starts[component[members]]
    order = np.lexsort((v, e, component[v]))
    v, e, factor = v[order], e[order], factor[order]
    bounds = np.searchsorted(component[v], np.arange(first.size + 1))
    rank = np.cumsum(np.concatenate([[0], e[1:] != e[:-1]]))
    table = np.stack([rank - rank[bounds[component[v]]], local[v], factor], 1)
    named = names[members]
    known: dict[tuple[int, bytes], list[list[tuple[list[int], list[int]]]]] = {}
    result = []
    for c in range(first.size):
        variables = named[starts[c] : starts[c + 1]]
        rows = table[bounds[c] : bounds[c + 1]]
        key = (variables.size, rows.tobytes())
        if key not in known:
            parts = _apart(_shortened(_null_space(variables.size, _system(rows))))
            known[key] = [[(list(x), list(x.values())) for x in part] for part in parts]
        for part in known[key]:
            result.append(
                [dict(zip(variables[at].tolist(), values, strict=True)) for at, values in part]
            )
    return result


def _system(rows: np.ndarray) -> list[Mapping[int, Fraction]]:
    """The different equations in a table of (equation, variable, factor)."""
    found: dict[int, dict[int, Fraction]] = defaultdict(dict)
    for equation, variable, factor in rows.tolist():
        terms = found[equation]
        terms[variable] = terms.get(variable, Fraction(0)) + factor
    different = {tuple((v, a) for v, a in sorted(e.items()) if a) for e in found.values()}
    return [dict(terms) for terms in sorted(different) if terms]


def _null_space(count: int, equations: list[Mapping[int, Fraction]]) -> list[dict[int, int]]:
    """Integer basis of the null space by exact elimination; early variables are kept free."""
    pivots: dict[int, dict[int, Fraction]] = {}
    holders: dict[int, set[int]] = defaultdict(set)  # variable -> leads of rows it may occur in
    for equation in equations:
        row = dict(equation)
        for v in sorted(row, reverse=True):
            if v in pivots and row.get(v):
                _subtract(row, pivots[v], row[v])
        row = {v: a for v, a in row.items() if a}
        if not row:
            continue
        lead = max(row)
        row = {v: a / row[lead] for v, a in row.items()}
        for other in holders.pop(lead, set()):
            if pivots[other].get(lead):
                _subtract(pivots[other], row, pivots[other][lead])
                for v in row:
                    holders[v].add(other)
        pivots[lead] = row
        for v in row:
            holders[v].add(lead)
    basis = []
    for free in range(count):
        if free in pivots:
            continue
        vector = {free: Fraction(1)}
        for lead in holders[free]:
            if pivots[lead].get(free):
                vector[lead] = -pivots[lead][free]
        denominator = int(np.lcm.reduce([a.denominator for a in vector.values()]))
        scaled = {v: int(a * denominator) for v, a in vector.items()}
        divisor = int(np.gcd.reduce([abs(a) for a in scaled.values()]))
        basis.append({v: a // divisor for v, a in sorted(scaled.items())})
    return basis


def _shortened(basis: list[dict[int, int]]) -> list[dict[int, int]]:
    """Add vectors to one another while that reduces the number of variables they involve.

    A unit between two layers then reads as the two parameters next to it rather than as a
    combination with the units further on.
    """
    if len(basis) > _MAX_SHORTENED:
        return basis
    changed = True
    while changed:
        changed = False
        for i, j in itertools.permutations(range(len(basis)), 2):
            for sign in (1, -1):
                mixed = dict(basis[i])
                for v, a in basis[j].items():
                    mixed[v] = mixed.get(v, 0) + sign * a
                mixed = {v: a for v, a in sorted(mixed.items()) if a}
                if len(mixed) < len(basis[i]):
                    basis[i], changed = mixed, True
    for i, vector in enumerate(basis):
        if next(iter(vector.values())) < 0:
            basis[i] = {v: -a for v, a in vector.items()}
    return basis


def _apart(basis: list[dict[int, int]]) -> list[list[dict[int, int]]]:
    """Group vectors that share variables."""
    groups: list[tuple[set[int], list[dict[int, int]]]] = []
    for vector in basis:
        variables = set(vector)
        joined = [g for g in groups if g[0] & variables]
        groups = [g for g in groups if not g[0] & variables]
        members = [*(v for g in joined for v in g[1]), vector]
        groups.append((variables.union(*(g[0] for g in joined)), members))
    return [members for _, members in groups]


def _subtract(row: dict[int, Fraction], other: Mapping[int, Fraction], factor: Fraction) -> None:
    for v, a in other.items():
        row[v] = row.get(v, Fraction(0)) - factor * a
        if not row[v]:
            del row[v]
