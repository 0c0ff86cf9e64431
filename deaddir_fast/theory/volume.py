"""The exact volume law of a normal crossing on the unit cube."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

from deaddir_fast import _check
from deaddir_fast.theory.log_threshold import LogThreshold, orders, prior_exponents


@dataclass(frozen=True)
class VolumeLaw:
    """V(ε) = Σ_i ε^λ_i Σ_j c_ij (log 1/ε)^j for 0 < ε <= 1, and V = 1 above.

    Attributes:
        terms: pairs (λ_i, (c_i0, c_i1, ...)), exact, smallest λ_i first.
    """

    terms: tuple[tuple[Fraction, tuple[Fraction, ...]], ...]

    @property
    def threshold(self) -> LogThreshold:
        """λ and m of the leading term."""
        rate, coefficients = self.terms[0]
        return LogThreshold(rate, len(coefficients))

    def __call__(self, epsilon: float) -> float:
        """Return the probability of K < ``epsilon``, ε > 0."""
        epsilon = _check.positive("epsilon", epsilon)
        return 1.0 if epsilon >= 1 else self._sum(-math.log(epsilon), 0)

    def density(self, epsilon: float) -> float:
        """Return dV/dε, the probability density of K at ``epsilon``, ε > 0."""
        epsilon = _check.positive("epsilon", epsilon)
        return 0.0 if epsilon > 1 else -self._sum(-math.log(epsilon), 1) / epsilon

    def log_slope(self, epsilon: float) -> float:
        """Return d log V / d log ε, close to λ - (m-1)/log(1/ε) for small ε; 0 < ε < 1."""
        epsilon = _check.positive("epsilon", epsilon)
        if epsilon >= 1:
            raise _check.fail("epsilon", epsilon, "a number below 1, where V still varies")
        t = -math.log(epsilon)
        return -self._sum(t, 1) / self._sum(t, 0)

    def _sum(self, t: float, derivative: int) -> float:
        """V as a function of t = log 1/ε, or its first derivative in t.

        Close rates have large coefficients of both signs, so the sum is taken in decimal
        arithmetic with digits to spare.
        """
        with localcontext() as context:
            context.prec = 100
            time, total = Decimal(t), Decimal(0)
            for rate, coefficients in self.terms:
                slope = _decimal(rate)
                decay = (-slope * time).exp()
                for j, c in enumerate(coefficients):
                    factor = time**j if j else Decimal(1)
                    if derivative:
                        factor = (j * time ** (j - 1) if j > 1 else Decimal(j)) - slope * factor
                    total += _decimal(c) * factor * decay
            return float(total)


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _series(rate: Fraction, others: Counter[Fraction], length: int) -> list[Fraction]:
    """Taylor coefficients in x of ∏_j (λ_j / (λ_j - rate + x))^r_j over the other rates."""
    series = [Fraction(1)] + [Fraction(0)] * (length - 1)
    for other, power in others.items():
        gap = other - rate
        for _ in range(power):
            # Multiply by (other/gap) / (1 + x/gap): a running geometric recurrence.
            previous = Fraction(0)
            for i in range(length):
                previous = series[i] * other / gap - previous / gap
                series[i] = previous
    return series


def volume_law(
    k: int | Sequence[int], h: int | Sequence[int | Fraction] | None = None
) -> VolumeLaw:
    """V(ε) = P(∏ s_i^(2 k_i) < ε) for s on the unit cube with density ∏ (h_i+1) s_i^h_i.

    -log s_i^(2 k_i) is exponential with rate λ_i = (h_i+1)/(2 k_i), so V is the survival function
    of a sum of independent exponentials at log 1/ε, expanded in partial fractions. With a flat
    prior: r tied components of order k give δ Σ_{j<r} (-log δ)^j / j!, δ = ε^(1/(2k)); two
    distinct a = 2k_1 > b = 2k_2 give (a ε^(1/a) - b ε^(1/b)) / (a - b).

    Args:
        k: (d,) non-negative orders; coordinates of order 0 do not enter.
        h: (d,) exponents > -1, integers or Fractions; flat prior if ``None``.

    Raises:
        TypeError, ValueError: naming ``k`` or ``h``.
    """
    k = orders("k", k, 0)
    h = prior_exponents("h", h, len(k))
    if not any(k):
        raise _check.fail("k", k, "at least one order >= 1 (K is constant otherwise)")
    rates = Counter((hi + 1) / (2 * ki) for ki, hi in zip(k, h, strict=True) if ki)
    terms = []
    for rate, count in sorted(rates.items()):
        others = Counter({r: c for r, c in rates.items() if r != rate})
        series = _series(rate, others, count)
        # The density has Laplace transform Σ_l series[l] rate^count / (s + rate)^(count - l) near
        # this pole; each such power is a gamma density, with a finite sum as survival function.
        coefficients = [Fraction(0)] * count
        for lost, value in enumerate(series):
            for j in range(count - lost):
                coefficients[j] += value * rate ** (lost + j) / math.factorial(j)
        terms.append((rate, tuple(coefficients)))
    return VolumeLaw(tuple(terms))
