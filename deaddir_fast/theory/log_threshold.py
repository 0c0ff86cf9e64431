"""The pair (λ, m) and the checked integer and exponent arguments the closed forms share."""

from __future__ import annotations

from fractions import Fraction
from numbers import Rational
from typing import Any, NamedTuple

from deaddir_fast import _check


class LogThreshold(NamedTuple):
    """Real log canonical threshold λ and its multiplicity m, both exact.

    V(ε) = vol{K < ε} ~ C ε^λ (log 1/ε)^(m-1), and the free energy of n samples grows as
    λ log n - (m-1) log log n (Watanabe 2009).
    """

    rlct: Fraction
    multiplicity: int


def orders(argument: str, value: Any, minimum: int) -> tuple[int, ...]:
    """Check a non-empty tuple of integers >= ``minimum``; a lone integer counts as one entry."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return (_check.integer(argument, value, minimum),)
    checked = tuple(_check.integer(f"{argument}[{i}]", v, minimum) for i, v in enumerate(value))
    if not checked:
        raise _check.fail(argument, value, "at least one entry")
    return checked


def prior_exponent(argument: str, value: Any) -> Fraction:
    """Check an exponent h > -1 of |s|^h; an integer or a Fraction, so that it stays exact."""
    if isinstance(value, bool) or not (isinstance(value, Rational) or hasattr(value, "__index__")):
        raise _check.fail(argument, value, "an integer or a Fraction > -1", TypeError)
    exponent = Fraction(value) if isinstance(value, Rational) else Fraction(value.__index__())
    if exponent <= -1:
        raise _check.fail(argument, value, "an exponent > -1 (else the prior is not integrable)")
    return exponent


def prior_exponents(argument: str, value: Any, count: int) -> tuple[Fraction, ...]:
    """Check one prior exponent for each of ``count`` coordinates; ``None`` is a flat prior."""
    if value is None:
        return (Fraction(0),) * count
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        value = (value,)
    checked = tuple(prior_exponent(f"{argument}[{i}]", v) for i, v in enumerate(value))
    if len(checked) != count:
        raise _check.fail(argument, value, f"{count} entries, one for each coordinate")
    return checked
