"""Real log canonical threshold of an ideal germ in the plane, by point blow-ups.

Every ideal in two variables becomes a monomial times a unit after finitely many blow-ups of
points, over the reals at every real point of the exceptional curves. Each exceptional curve E
carries two integers: N, the order of the ideal along E, and ν, one more than the order of the
Jacobian; it offers the value ν/(2N) for K = ½‖f‖² (the 2 because K is quadratic in f). λ is the
smallest value over all curves through real points, m the largest number of curves that attain it
and meet in one point (Atiyah 1970, Bernstein–Gelfand 1969; Watanabe 2009, theorem 2.4).

Coefficients are floating point, so every "is it zero" has three answers: yes below ``ZERO``, no
above ``CLEAR``, and between them ``Undecided`` is raised rather than guessed. Power series are known
only up to some order; what lies beyond is tracked as a monomial factor (s^A v^B) of the unknown
remainder, and a step that would need it raises ``Undecided`` too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import comb

import numpy as np
from numpy.typing import NDArray

from deaddir_fast.theory.threshold import LocalThreshold, Undecided, decided

Array = NDArray[np.float64]

ZERO = 1e-9  # relative to the largest coefficient: smaller is zero
CLEAR = 1e-6  # larger is not zero; between the two nothing is decided
SNAP = 1e-9  # directions closer than this are the same
MAX_BLOW_UPS = 60


@dataclass(frozen=True)
class Curve:
    """An exceptional curve or a branch: order of the ideal and 1 + order of the Jacobian."""

    order: int
    discrepancy: Fraction

    @property
    def value(self) -> Fraction | None:
        """The pole it offers, ν/(2N); none where the ideal does not vanish on it."""
        return self.discrepancy / (2 * self.order) if self.order else None


@dataclass(frozen=True)
class _Point:
    """A point of the blown-up plane in coordinates (s, v) centred on it.

    ``f[g, i, j]`` is the coefficient of s^i v^j in generator g of the ideal after the monomial
    factor of the curves is taken out. ``first`` and ``second`` are the curves s = 0 and v = 0 if
    they are exceptional. Coefficients with i >= ``a`` and j >= ``b`` are not known.
    """

    f: Array
    first: Curve | None
    second: Curve | None
    a: int
    b: int

    def swapped(self) -> _Point:
        return _Point(self.f.transpose(0, 2, 1), self.second, self.first, self.b, self.a)


def is_zero(value: float, scale: float, zero: float = ZERO, clear: float = CLEAR) -> bool:
    """Whether ``value`` vanishes relative to ``scale``; ``Undecided`` where it is too close."""
    size = abs(float(value))
    if size <= zero * scale:
        return True
    if size >= clear * scale:
        return False
    raise Undecided(
        f"a coefficient of relative size {size / scale:.1e} is neither zero (below {zero:g}) "
        f"nor clearly present (above {clear:g})"
    )


def real_roots(form: Array) -> list[tuple[float, int]]:
    """Real roots v, with multiplicity, of Σ form[j] v^j; the leading coefficients may vanish.

    A root of multiplicity q is found as a simple root of the (q−1)-th derivative, which is well
    conditioned, from the mean of the cluster that rounding splits it into.

    Raises:
        Undecided: where a cluster is neither clearly one root nor clearly several.
    """
    scale = float(np.abs(form).max())
    degree = len(form) - 1
    while degree > 0 and is_zero(form[degree], scale):
        degree -= 1
    if degree == 0:
        return []
    poly = np.polynomial.Polynomial(form[: degree + 1] / scale)
    left = list(np.asarray(poly.roots(), dtype=complex))
    found: list[tuple[float, int]] = []
    while left:
        seed = left[0]
        near = sorted(range(len(left)), key=lambda n: abs(left[n] - seed))
        # The largest cluster whose centre is a root of all derivatives below its size wins.
        for size in range(len(left), 0, -1):
            members = near[:size]
            centre = np.mean([left[n] for n in members])
            spread = max(abs(left[n] - centre) for n in members)
            if size > 1 and spread > 0.2 * (1 + abs(centre)):
                continue
            root = _refined(poly, centre, size)
            if root is None:
                continue
            left = [x for n, x in enumerate(left) if n not in members]
            if abs(root.imag) <= ZERO**0.75 * (1 + abs(root)):
                found.append((float(root.real), size))
            elif abs(root.imag) < CLEAR * (1 + abs(root)):
                raise Undecided("a pair of complex roots lies too close to the real axis to tell")
            break
        else:  # pragma: no cover - size 1 always refines
            left.pop(0)
    return sorted(found)


def _refined(poly: np.polynomial.Polynomial, start: complex, size: int) -> complex | None:
    """The root of multiplicity ``size`` near ``start``, or None if there is no such root."""
    target = poly.deriv(size - 1) if size > 1 else poly
    slope = target.deriv()
    x = complex(start)
    for _ in range(60):
        grad = slope(x)
        if grad == 0:
            break
        step = target(x) / grad
        x -= step
        if abs(step) <= 1e-15 * (1 + abs(x)):
            break
    if size == 1:
        return x
    reach = max(1.0, abs(x))
    bound = float(np.abs(poly.coef) @ reach ** np.arange(len(poly.coef)))
    worst = 0.0
    derivative = poly
    for order in range(size - 1):
        scale = bound * comb(len(poly.coef) - 1, order)
        factor = np.prod(np.arange(1, order + 1)) if order else 1.0
        worst = max(worst, abs(derivative(x)) / (scale * factor))
        derivative = derivative.deriv()
    if worst <= ZERO:
        return x
    # Two roots a distance d apart leave a residue d²: below CLEAR they cannot be told from one.
    if worst < CLEAR and abs(x - start) < 0.05 * (1 + abs(x)):
        raise Undecided("two tangent directions lie too close to tell apart")
    return None


def _trim(f: Array) -> Array:
    """Drop trailing rows and columns that are all exactly zero."""
    used = np.abs(f).max(axis=0) > 0
    if not used.any():
        return f[:, :1, :1]
    i = int(np.flatnonzero(used.any(axis=1))[-1]) + 1
    j = int(np.flatnonzero(used.any(axis=0))[-1]) + 1
    return f[:, :i, :j]


def _shift(f: Array, by: float) -> Array:
    """Coefficients after v -> v + by."""
    if by == 0:
        return f
    out = np.zeros_like(f)
    size = f.shape[2]
    for j in range(size):
        for m in range(j + 1):
            out[:, :, m] += f[:, :, j] * comb(j, m) * by ** (j - m)
    return out


def _order(point: _Point) -> int:
    """Order of the ideal at the point.

    Raises:
        Undecided: if all known coefficients vanish.
    """
    f = point.f
    scale = float(np.abs(f).max())
    unknown = point.a + point.b
    if scale > 0:
        for degree in range(min(f.shape[1] + f.shape[2] - 1, unknown)):
            terms = [
                f[:, i, degree - i]
                for i in range(max(0, degree - f.shape[2] + 1), min(degree + 1, f.shape[1]))
            ]
            if terms and not is_zero(max(float(np.abs(t).max()) for t in terms), scale):
                return degree
    raise Undecided(f"all known Taylor coefficients vanish here (known to order {unknown - 1})")


def _leading(f: Array, order: int) -> Array:
    """Leading forms: column j is the coefficient of s^(order−j) v^j."""
    out = np.zeros((f.shape[0], order + 1))
    for j in range(order + 1):
        if order - j < f.shape[1] and j < f.shape[2]:
            out[:, j] = f[:, order - j, j]
    return out


def common_roots(forms: Array) -> list[tuple[float, float, int]]:
    """Real common zeros (a : b) on the projective line of binary forms Σ_j c_j a^(k−j) b^j.

    Returns unit vectors with the multiplicity of the zero in a generic combination.
    """
    order = forms.shape[1] - 1
    if order == 0:
        return []
    scale = float(np.abs(forms).max())
    # A fixed, generic combination; a zero of it that is not common is seen by the other forms.
    _, _, axes = np.linalg.svd(forms, full_matrices=False)
    weights = np.cos(1.0 + 2.0 * np.arange(forms.shape[0]))
    combined = weights @ forms
    if float(np.abs(combined).max()) < 1e-3 * scale:
        combined = axes[0] * scale
    zeros: list[tuple[float, float, int]] = []
    # Roots |b/a| <= 1 in one chart, the rest in the other, so that no root is large.
    for chart, coefficients in ((0, combined), (1, combined[::-1])):
        for root, multiplicity in real_roots(coefficients):
            if abs(root) > 1 + 1e-9 or (chart == 1 and abs(abs(root) - 1) <= 1e-9):
                continue
            a, b = (1.0, root) if chart == 0 else (root, 1.0)
            norm = float(np.hypot(a, b))
            a, b = a / norm, b / norm
            powers = np.array([a ** (order - j) * b**j for j in range(order + 1)])
            if is_zero(float(np.abs(forms @ powers).max()), scale):
                zeros.append((a, b, multiplicity))
    return zeros


def _straighten(point: _Point, k: int, *, total: bool = False) -> tuple[_Point, bool] | None:
    """Bring the ideal to v^k times a unit, if its leading forms are all a k-th power of one line.

    Uses v -> v + φ(s) with ∂_v^{k−1} of one generator vanishing on v = φ(s) (Tschirnhaus). Returns
    the point in the new coordinates and whether the ideal is v^k times a unit to known order;
    None where the leading forms are not such a power or not transversal to s = 0. With ``total``
    the coefficients are known by total degree, as they are before the first blow-up.
    """
    if point.second is not None or point.a == 0:
        return None
    forms = _leading(point.f, k)
    scale = float(np.abs(forms).max())
    top = float(np.abs(forms[:, k]).max())
    if is_zero(top, scale):
        return None
    weights = forms[:, k] / np.linalg.norm(forms[:, k])
    first = weights @ forms
    line = first[k - 1] / (k * first[k]) if k > 0 else 0.0
    power = np.array([comb(k, j) * line ** (k - j) for j in range(k + 1)])
    residue = forms - np.outer(forms[:, k], power)
    if not is_zero(float(np.abs(residue).max()), scale):
        return None
    known = min(point.a, 64)
    f = point.f
    size = f.shape[1]
    generator = np.tensordot(weights, f, 1)
    phi = np.zeros(known)
    for q in range(1, known):
        # The coefficient of s^q v^(k−1) after v -> v + φ is linear in φ_q.
        moved = _substitute(generator[None], phi, min(known, q + 1), k)[0]
        phi[q] = -moved[q, k - 1] / (k * generator[0, k]) if q < moved.shape[0] else 0.0
    width = max(size, known if known < 64 else size)
    moved = _substitute(f, phi, width, f.shape[2])
    straight = _Point(_trim(moved), point.first, None, point.a, 0)
    below = moved[:, : min(point.a, moved.shape[1]), :k].copy()
    if total:
        i, j = np.indices(below.shape[1:])
        below[:, i + j >= point.a] = 0.0
    # Substitution errors grow with φ; compare with the size of what was cancelled.
    size_scale = float(np.abs(moved).max())
    flat = below.size == 0 or is_zero(float(np.abs(below).max()), size_scale)
    if flat:
        cleaned = moved.copy()
        cleaned[:, :, :k] = 0.0
        straight = _Point(_trim(cleaned), point.first, None, point.a, 0)
    return straight, flat


def _substitute(f: Array, phi: Array, width: int, height: int) -> Array:
    """f(s, v + φ(s)) modulo s^width, keeping v-degrees up to ``height``."""
    generators, size, degree = f.shape
    height = min(height + 1, degree)
    out = np.zeros((generators, width, height))
    powers = [np.zeros(width)]
    powers[0][0] = 1.0
    cut = np.zeros(width)
    cut[: min(width, len(phi))] = phi[:width]
    for _ in range(degree - 1):
        powers.append(np.convolve(powers[-1], cut)[:width])
    for j in range(degree):
        for m in range(min(j + 1, height)):
            term = comb(j, m) * powers[j - m]
            for i in range(min(size, width)):
                column = f[:, i, j]
                if column.any():
                    out[:, i:, m] += column[:, None] * term[: width - i]
    return out


def _blow_up(point: _Point, k: int, a: float, b: float) -> _Point:
    """The point in direction (a : b), |a| >= |b|, of the new curve: s = s', v = s'(v' + b/a)."""
    f = point.f
    generators, rows, cols = f.shape
    out = np.zeros((generators, rows + cols - 1 - k if rows + cols - 1 > k else 1, cols))
    for i in range(rows):
        for j in range(cols):
            power = i + j - k
            if power >= 0:
                out[:, power, j] += f[:, i, j]
    ratio = b / a
    first = Curve(
        k + sum(c.order for c in (point.first, point.second) if c),
        sum((c.discrepancy for c in (point.first, point.second) if c), Fraction(0))
        + sum(1 for c in (point.first, point.second) if c is None),
    )
    passes = abs(ratio) <= SNAP
    known_a = point.a + point.b - k
    known_b = point.b if passes else 0
    moved = _shift(out, 0.0 if passes else ratio)
    if known_b == 0:
        moved = moved[:, : max(known_a, 1)]
    return _Point(_trim(moved), first, point.second if passes else None, known_a, known_b)


@dataclass
class _Log:
    """What a resolution spent and assumed."""

    blow_ups: int = 0
    rests_on_zeros: bool = False

    def spend(self) -> None:
        self.blow_ups += 1
        if self.blow_ups > MAX_BLOW_UPS:
            raise Undecided(f"not resolved after {MAX_BLOW_UPS} blow-ups")

    def branch(self, point: _Point, k: int) -> None:
        """A branch of real zeros; a single reduced equation has one whatever its higher terms."""
        values = np.linalg.svd(point.f.reshape(point.f.shape[0], -1), compute_uv=False)
        principal = len(values) == 1 or values[1] <= ZERO * values[0]
        self.rests_on_zeros |= k > 1 or not principal


def _resolve(point: _Point, log: _Log) -> Iterator[tuple[Curve, ...]]:
    """All sets of curves that meet in a real point after resolution over this point."""
    k = _order(point)
    here = tuple(c for c in (point.first, point.second) if c is not None)
    if k == 0:
        yield here
        return
    for oriented in (point, point.swapped()):
        straight = _straighten(oriented, k)
        if straight is not None:
            point, done = straight
            if done:
                branch = Curve(k, Fraction(1))
                log.branch(point, k)
                yield tuple(c for c in (point.first, branch) if c is not None)
                return
            break
    log.spend()
    if k >= point.a + point.b:
        raise Undecided("the leading form lies beyond the known Taylor order")
    directions = [(a, b) for a, b, _ in common_roots(_leading(point.f, k))]
    special = list(directions)
    for curve, axis in ((point.second, (1.0, 0.0)), (point.first, (0.0, 1.0))):
        cross = [abs(a * axis[1] - b * axis[0]) for a, b in special]
        if curve is not None and (not cross or min(cross) > SNAP):
            special.append(axis)
    generic = _blow_up(point, k, 1.0, 0.0).first
    assert generic is not None
    yield (generic,)
    for a, b in special:
        if abs(a) >= abs(b):
            yield from _resolve(_blow_up(point, k, a, b), log)
        else:
            yield from _resolve(_blow_up(point.swapped(), k, b, a), log)


def planar_threshold(coefficients: Array, *, prior_exponent: int = 0) -> LocalThreshold:
    """(λ, m) at the origin of the ideal of real-analytic functions of two variables.

    Args:
        coefficients: (g, q+1, q+1): ``coefficients[g, i, j]`` is the Taylor coefficient of
            x^i y^j in generator g, known for i + j <= q; the generators vanish at the origin.
        prior_exponent: h of a prior that vanishes like the h-th power of the distance to the
            origin.

    Returns:
        a decided threshold, or bounds [1/(2k), (2 + h)/(2k)] (k the order of the ideal) with the
        reason why it is not decided.

    Source: resolution of plane curve singularities by point blow-ups (theory as above); the
    numerical tolerances are our choice.
    """
    f = np.asarray(coefficients, dtype=np.float64)
    top = f.shape[1] - 1
    i, j = np.indices(f.shape[1:])
    f = np.where(i + j <= top, f, 0.0)
    scale = float(np.abs(f).max(initial=0.0))
    lower, upper = Fraction(0), Fraction(2 + prior_exponent, 2 * (top + 1))
    if scale == 0:
        return LocalThreshold(None, None, lower, upper, f"flat to order {top}")
    start = _Point(f / scale, None, None, top + 1, 0)
    try:
        k = _order(start)
        lower, upper = Fraction(1, 2 * k), Fraction(2 + prior_exponent, 2 * k)
        best: Fraction | None = None
        count = 0
        log = _Log()
        for curves in _start(start, k, prior_exponent, log):
            values = [c.value for c in curves if c.value is not None]
            for value in set(values):
                if best is None or value < best:
                    best, count = value, 0
                if value == best:
                    count = max(count, values.count(value))
    except Undecided as why:
        return LocalThreshold(None, None, lower, upper, f"blow-ups stopped: {why}")
    assert best is not None
    rule = f"plane resolution by {log.blow_ups} blow-up{'s' * (log.blow_ups != 1)}"
    return decided(best, count, rule, rests_on_zeros=log.rests_on_zeros)


def _start(point: _Point, k: int, prior_exponent: int, log: _Log) -> Iterator[tuple[Curve, ...]]:
    """Resolution of the first point, where the remainder is known by total degree."""
    if prior_exponent == 0:
        rotated = _facing(point, k)
        straight = _straighten(rotated, k, total=True)
        if straight is not None and straight[1]:
            log.branch(point, k)
            yield (Curve(k, Fraction(1)),)
            return
    # Unknown terms have degree >= a, so they carry s^a in every chart of the first blow-up.
    extra = Fraction(prior_exponent)
    directions = [(a, b) for a, b, _ in common_roots(_leading(point.f, k))]
    log.spend()
    yield (Curve(k, 2 + extra),)
    for a, b in directions:
        source, (c, d) = (point, (a, b)) if abs(a) >= abs(b) else (point.swapped(), (b, a))
        # In the swapped point the known total degree is the same number.
        source = _Point(source.f, None, None, point.a, 0)
        blown = _blow_up(source, k, c, d)
        assert blown.first is not None
        exceptional = Curve(blown.first.order, blown.first.discrepancy + extra)
        yield from _resolve(_Point(blown.f, exceptional, None, blown.a, 0), log)


def _facing(point: _Point, k: int) -> _Point:
    """Rotate by 90 degrees if the pure power of v is missing from the leading forms."""
    forms = _leading(point.f, k)
    if np.abs(forms[:, k]).max() < np.abs(forms[:, 0]).max():
        swapped = point.swapped()
        return _Point(swapped.f, None, None, point.a, 0)
    return point
