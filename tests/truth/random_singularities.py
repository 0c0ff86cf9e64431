"""Random functions whose (λ, m) is known exactly: monomial ideals, crossings, and sums of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from deaddir_fast.theory import arrangement, monomial_ideal

KINDS = ("coordinates", "forms", "mixture")


@dataclass(frozen=True)
class Case:
    """f: R^d -> R^g with f(0) = 0 and K = ½|f|²."""

    name: str
    dim: int
    function: Callable[[Tensor], Tensor]
    rlct: Fraction
    multiplicity: int


def products(factors: Sequence[Sequence[tuple[Sequence[float], int]]], w: Tensor) -> Tensor:
    out = []
    for product in factors:
        value = torch.ones((), dtype=w.dtype)
        for normal, power in product:
            value = value * (torch.tensor(normal, dtype=w.dtype) @ w) ** power
        out.append(value)
    return torch.stack(out)


def monomials(exponents: Sequence[Sequence[int]], w: Tensor) -> Tensor:
    """(n,) values of monomials at one point."""
    out = []
    for exponent in exponents:
        value = torch.ones((), dtype=w.dtype)
        for i, power in enumerate(exponent):
            if power:
                value = value * w[i] ** power
        out.append(value)
    return torch.stack(out)


def monomial_case(seed: int) -> Case:
    """One to five monomials of one to four variables, total degree up to 9."""
    rng = np.random.default_rng([1, seed])
    d = int(rng.integers(1, 5))
    exponents: list[tuple[int, ...]] = []
    while len(exponents) < int(rng.integers(1, 6)):
        v = tuple(int(x) for x in rng.integers(0, 5, d) * (rng.random(d) < 0.6))
        if 0 < sum(v) <= 9:
            exponents.append(v)
    rlct, m = monomial_ideal(exponents)
    return Case(str(exponents), d, lambda w: monomials(exponents, w), Fraction(rlct), m)


def _forms(rng: np.random.Generator, d: int, plain: bool) -> tuple[list[list[int]], list[int]]:
    """Normals and powers of one crossing in d variables, total degree up to 6."""
    while True:
        size = int(rng.integers(1, d + 1 if plain else d + 2))
        if plain:
            chosen = rng.choice(d, size, replace=False)
            normals = [[int(i == j) for j in range(d)] for i in chosen]
        else:
            normals = [[int(x) for x in rng.integers(-2, 3, d)] for _ in range(size)]
        powers = [int(x) for x in rng.integers(1, 4, len(normals))]
        if all(any(n) for n in normals) and sum(powers) <= 6:
            return normals, powers


def crossing_case(seed: int) -> Case:
    """Powers of coordinates or of linear forms, or two such in separate variables; half turned."""
    rng = np.random.default_rng([2, seed])
    kind, turned = KINDS[seed % 3], bool(rng.integers(2))
    d = int(rng.integers(2, 5))
    blocks = [d] if kind != "mixture" else [int(rng.integers(1, d))]
    blocks += [d - blocks[0]] if kind == "mixture" else []
    rlct, m, start = Fraction(0), 1, 0
    frame = np.linalg.qr(rng.standard_normal((d, d)))[0] if turned else np.eye(d)
    factors = []
    words = []
    for size in blocks:
        plain = kind == "coordinates" or (kind == "mixture" and bool(rng.integers(2)))
        normals, powers = _forms(rng, size, plain)
        part = arrangement(normals, powers)
        rlct, m = rlct + part[0], m + part[1] - 1
        placed = [np.concatenate([np.zeros(start), n, np.zeros(d - start - size)]) for n in normals]
        factors.append([(list(n @ frame.T), k) for n, k in zip(placed, powers, strict=True)])
        words.append(f"{normals}^{powers}")
        start += size
    name = f"{kind}{' turned' * turned}, d={d}: {' + '.join(words)}"
    return Case(name, d, lambda w: products(factors, w), rlct, m)
