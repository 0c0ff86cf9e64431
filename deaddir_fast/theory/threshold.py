"""What a local computation of the real log canonical threshold returns."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


class Undecided(Exception):
    """The coefficients do not decide the next step: too close to a tie, or truncated too early."""


@dataclass(frozen=True)
class LocalThreshold:
    """(λ, m) of an ideal germ, or certified bounds and the reason it is not decided.

    λ is the exponent of the volume V(ε) = vol{K < ε} ~ C ε^λ (log 1/ε)^{m−1} with K = ½‖f‖², so
    one regular equation contributes 1/2.

    Attributes:
        rlct: λ where it is decided, else ``None``.
        multiplicity: m where it is decided, else ``None``.
        lower, upper: bounds that hold in any case (equal to λ where it is decided).
        rule: the rule that decided, or why none could.
        rests_on_zeros: the decision takes coefficients that vanish to the known order to vanish
            altogether (a fibre through the point); whoever can should look at a finite distance.
        multiple: that fibre is claimed to be one along which the functions vanish to order >= 2.
    """

    rlct: Fraction | None
    multiplicity: int | None
    lower: Fraction
    upper: Fraction
    rule: str
    rests_on_zeros: bool = False
    multiple: bool = False

    @property
    def decided(self) -> bool:
        """Whether both λ and m are known."""
        return self.rlct is not None and self.multiplicity is not None

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
        )


def decided(
    rlct: Fraction,
    multiplicity: int,
    rule: str,
    *,
    rests_on_zeros: bool = False,
    multiple: bool = False,
) -> LocalThreshold:
    """A decided threshold: both bounds meet."""
    return LocalThreshold(rlct, multiplicity, rlct, rlct, rule, rests_on_zeros, multiple)
