"""What a local computation of the real log canonical threshold returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations

import numpy as np
from numpy.typing import NDArray


class Undecided(Exception):
    """The coefficients do not decide the next step: too close to a tie, or truncated too early."""


@dataclass(frozen=True, eq=False)
class Fibre:
    """A linear space that a decision takes for a fibre through the point.

    Attributes:
        basis: (d, e) of the space, in the coordinates of the germ.
        order: order to which the functions vanish at its generic points.
    """

    basis: NDArray[np.float64]
    order: int


def coordinate_fibres(exponents: Sequence[tuple[int, ...]]) -> tuple[Fibre, ...]:
    """The largest coordinate spaces on which all monomials vanish, with their orders."""
    d = len(exponents[0])
    out: list[tuple[set[int], Fibre]] = []
    for size in range(d - 1, 0, -1):
        for chosen in combinations(range(d), size):
            across = [i for i in range(d) if i not in chosen]
            order = min(sum(v[i] for i in across) for v in exponents)
            if order and not any(set(chosen) <= larger for larger, _ in out):
                out.append((set(chosen), Fibre(np.eye(d)[:, chosen], order)))
    return tuple(fibre for _, fibre in out)


@dataclass(frozen=True)
class LocalThreshold:
    """(λ, m) of an ideal germ, or certified bounds and the reason it is not decided.

    λ is the exponent of the volume V(ε) = vol{K < ε} ~ C ε^λ (log 1/ε)^{m−1} with K = ½‖f‖², so
    one regular equation contributes 1/2.

    Attributes:
        rlct: λ where it is decided, else ``None``.
        multiplicity: m where it is decided, else ``None``.
        lower, upper: bounds that hold in any case (equal to λ where it is decided); ``upper`` of an
            undecided one may rest on zeros too.
        rule: the rule that decided, or why none could.
        rests_on_zeros: the decision takes coefficients that vanish to the known order to vanish
            altogether (a fibre through the point); whoever can should look at a finite distance.
        multiple: that fibre is claimed to be one along which the functions vanish to order >= 2.
        fibres: the claimed fibres, where the rule knows them.
        attained: m if a fibre through the point attains ``lower``, where that is known.
    """

    rlct: Fraction | None
    multiplicity: int | None
    lower: Fraction
    upper: Fraction
    rule: str
    rests_on_zeros: bool = False
    multiple: bool = False
    fibres: tuple[Fibre, ...] = field(default=(), compare=False)
    attained: int | None = None

    @property
    def decided(self) -> bool:
        """Whether both λ and m are known."""
        return self.rlct is not None and self.multiplicity is not None

    @property
    def plain(self) -> tuple[Fraction | None, int | None]:
        """(λ, m)."""
        return self.rlct, self.multiplicity

    def plus(self, shift: Fraction) -> LocalThreshold:
        """The threshold after adding independent regular directions worth ``shift``."""
        rlct = None if self.rlct is None else self.rlct + shift
        return LocalThreshold(
            rlct,
            self.multiplicity,
            self.lower + shift,
            self.upper + shift,
            self.rule,
            self.rests_on_zeros,
            self.multiple,
            self.fibres,
            self.attained,
        )

    def moved(self, basis: NDArray[np.float64]) -> LocalThreshold:
        """The same for the germ in coordinates x of which this has y, x = basis @ y."""
        fibres = tuple(Fibre(basis @ f.basis, f.order) for f in self.fibres)
        return replace(self, fibres=fibres)


def decided(
    rlct: Fraction,
    multiplicity: int,
    rule: str,
    *,
    rests_on_zeros: bool = False,
    multiple: bool = False,
    fibres: tuple[Fibre, ...] = (),
) -> LocalThreshold:
    """A decided threshold: both bounds meet."""
    return LocalThreshold(rlct, multiplicity, rlct, rlct, rule, rests_on_zeros, multiple, fibres)
