"""Coordinates from the real linear factors of leading forms.

Products of linear forms, and what is a monomial ideal in turned coordinates, show their coordinate
hyperplanes as linear factors of the leading forms. Any linear coordinates are legitimate: wrong
ones cost time and decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice

import numpy as np
from numpy.typing import NDArray

from deaddir_fast.theory.germ import Germ, monomials
from deaddir_fast.theory.planar import CLEAR, ZERO, real_roots
from deaddir_fast.theory.threshold import Undecided

Array = NDArray[np.float64]

FACTOR = 1e-8  # a form this small on a hyperplane (relative) has it as a factor
SAME = 1e-6  # normals closer than this are one
LINES = 4  # random lines a form is restricted to, until its roots are clear on one
SYSTEMS = 4  # coordinate systems tried where there are more hyperplanes than variables


def initial_forms(germ: Germ) -> list[tuple[int, Array]]:
    """Leading forms of combinations of the generators: (degree, (n, monomials)), lowest first."""
    out: list[tuple[int, Array]] = []
    level = ZERO * germ.noise * germ.scale
    left = np.eye(germ.part(germ.top).shape[0])
    for degree in range(1, germ.top + 1):
        values = left @ germ.part(degree)
        u, sizes, _ = np.linalg.svd(values, full_matrices=True)
        here = int((sizes > level * values.shape[1] ** 0.5).sum())
        if here:
            out.append((degree, u[:, :here].T @ values))
        left = u[:, here:].T @ left
        if not left.shape[0]:
            break
    return out


def linear_factors(degree: int, forms: Array, variables: int, noise: float) -> list[Array]:
    """(d,) unit normals of the hyperplanes on which all ``forms`` (n, monomials) vanish.

    On a random line p + t·b a factor n of multiplicity q gives a root of multiplicity q, and there
    the coefficients of t^q and of t^(q−1) times a step e to the side are as n·b to q n·e.

    Raises:
        Undecided: if roots lie too close to tell apart on all of ``LINES`` lines.
    """
    reason = Undecided("no line")
    for seed in range(LINES):
        try:
            return _on_line(degree, forms, variables, noise, np.random.default_rng(seed))
        except Undecided as why:
            reason = why
    raise reason


def _on_line(
    degree: int, forms: Array, variables: int, noise: float, rng: np.random.Generator
) -> list[Array]:
    """``linear_factors`` from one random line."""
    weights = rng.standard_normal(forms.shape[0])
    single = Germ(variables, degree, {degree: (weights @ forms)[None]}, noise)
    frame = np.linalg.qr(rng.standard_normal((variables, variables)))[0]
    line = single.substitute(frame[:, :2])
    pure = [monomials(2, degree).index((degree - j, j)) for j in range(degree + 1)]
    restricted = line.part(degree)[0, pure]
    found: list[Array] = []
    for root in real_roots(restricted, np.full(degree + 1, line.noise * line.scale)):
        basis = frame.copy()
        basis[:, 0] = frame[:, 0] + root.value * frame[:, 1]
        local = single.substitute(basis).part(degree)[0]
        q = root.multiplicity
        index = {e: column for column, e in enumerate(monomials(variables, degree))}
        normal = np.zeros(variables)
        normal[1] = 1.0
        head = local[index[_power(variables, degree - q, q, None)]]
        for e in range(2, variables):
            normal[e] = local[index[_power(variables, degree - q, q - 1, e)]] / (q * head)
        normal = np.linalg.solve(basis.T, normal)
        normal /= np.linalg.norm(normal)
        inside = np.linalg.svd(normal[None])[2][1:].T
        on = Germ(variables, degree, {degree: forms}).substitute(inside)
        if on.scale <= FACTOR * np.abs(forms).max():
            found.append(normal)
    return found


def _power(variables: int, first: int, second: int, side: int | None) -> tuple[int, ...]:
    exponent = [0] * variables
    exponent[0], exponent[1] = first, second
    if side is not None:
        exponent[side] += 1
    return tuple(exponent)


def _normals(germ: Germ) -> list[Array]:
    """Normals from all leading forms; where they leave a kernel, from the germ restricted to it."""
    found: list[Array] = []
    for degree, forms in initial_forms(germ):
        try:
            new = linear_factors(degree, forms, germ.variables, germ.noise)
        except Undecided:
            continue
        for n in new:
            if all(1 - abs(float(n @ other)) > SAME**2 for other in found):
                found.append(n)
    return found


def factor_coordinates(germ: Germ) -> Iterator[Array]:
    """(d, d) bases, at most ``SYSTEMS``, in which hyperplanes found as factors are coordinates."""
    inside = np.eye(germ.variables)
    fixed: list[Array] = []
    choices: list[list[Array]] = [[]]
    while inside.shape[1]:
        restricted = germ.substitute(inside) if fixed else germ
        if restricted.scale <= CLEAR * germ.noise * germ.scale:
            break
        new = [np.array([1.0])] if inside.shape[1] == 1 else _normals(restricted)
        if not new:
            break
        new = [inside @ n for n in new]
        if not fixed:
            size = np.linalg.matrix_rank(np.array(new), tol=SAME)
            subsets = (
                list(c)
                for c in combinations(new, size)
                if np.linalg.matrix_rank(np.array(c), tol=1e-3) == size
            )
            choices = list(islice(subsets, SYSTEMS))
            if not choices:
                return
            fixed = choices[0]
        else:
            more: list[Array] = []
            for n in new:
                if np.linalg.matrix_rank(np.array([*more, n]), tol=1e-3) > len(more):
                    more.append(n)
            choices = [[*c, *more] for c in choices]
            fixed = choices[0]
        _, values, axes = np.linalg.svd(np.array(fixed), full_matrices=True)
        inside = axes[len(values) :].T
    if not fixed:
        return
    for chosen in choices:
        rows = np.array([*chosen, *inside.T])
        yield np.linalg.inv(rows)
