"""Real log canonical threshold of an ideal germ in the plane, by point blow-ups.

Every ideal in two variables becomes a monomial times a unit after finitely many blow-ups of
points, over the reals at every real point of the exceptional curves. Each exceptional curve E
carries two integers: N, the order of the ideal along E, and ν, one more than the order of the
Jacobian; it offers the value ν/(2N) for K = ½‖f‖² (the 2 because K is quadratic in f). λ is the
smallest value over all curves through real points, m the largest number of curves that attain it
and meet in one point (Atiyah 1970, Bernstein–Gelfand 1969; Watanabe 2009, theorem 2.4).

Coefficients are floating point. Each carries a bound on its error that follows it through every
step (running error analysis), so "is it zero" has three answers that do not depend on the units of
the variables: yes below ``ZERO`` times that bound, no above ``CLEAR`` times it, and in between
``Undecided`` is raised rather than guessed. Power series are known only up to some order; what lies
beyond is tracked as a monomial factor (s^A v^B) of the unknown remainder, and a step that would
need it raises ``Undecided`` too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from deaddir_fast.theory.threshold import LocalThreshold, Undecided, decided

Array = NDArray[np.float64]

ZERO = 30.0  # times its error bound: a coefficient below is zero
CLEAR = 3000.0  # above it is present; in between nothing is decided
EPS = float(np.finfo(np.float64).eps)
APART = 100.0  # roots this many times their errors apart are different
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
    factor of the curves is taken out, ``noise[i, j]`` a bound on its error. ``first`` and
    ``second`` are the curves s = 0 and v = 0 if they are exceptional. Coefficients with
    i >= ``a`` and j >= ``b`` are not known.
    """

    f: Array
    noise: Array
    first: Curve | None
    second: Curve | None
    a: int
    b: int

    def swapped(self) -> _Point:
        return _Point(
            self.f.transpose(0, 2, 1), self.noise.T, self.second, self.first, self.b, self.a
        )


def absent(values: Array, noise: Array) -> bool:
    """Whether all ``values`` vanish to within their error bounds.

    Raises:
        Undecided: if none is clearly present but not all are clearly zero.
    """
    size, bound = np.abs(values), np.broadcast_to(noise, np.shape(values))
    if np.size(size) == 0 or bool((size <= ZERO * bound).all()):
        return True
    if bool((size >= CLEAR * bound).any()):
        return False
    at = int(np.argmax(size - ZERO * bound))
    raise Undecided(
        f"a coefficient of {size.flat[at]:.1e} with rounding {bound.flat[at]:.1e} is neither zero "
        "nor clearly present"
    )


@dataclass(frozen=True)
class Root:
    """A real root with its multiplicity and a bound on its error."""

    value: float
    multiplicity: int
    error: float


def real_roots(form: Array, noise: Array) -> list[Root]:
    """Real roots v of Σ form[j] v^j; the leading coefficients may vanish.

    A root of multiplicity q is found as a simple root of the (q−1)-th derivative, which is well
    conditioned, starting from the mean of the cluster that rounding splits it into.

    Raises:
        Undecided: where a cluster is neither clearly one root nor clearly several.
    """
    degree = len(form) - 1
    while degree > 0 and absent(form[degree : degree + 1], noise[degree : degree + 1]):
        degree -= 1
    if degree == 0:
        return []
    poly = np.polynomial.Polynomial(form[: degree + 1])
    bound = np.polynomial.Polynomial(noise[: degree + 1] + 4 * EPS * np.abs(form[: degree + 1]))
    left = list(np.asarray(poly.roots(), dtype=complex))
    found: list[Root] = []
    while left:
        near = sorted(range(len(left)), key=lambda n: abs(left[n] - left[0]))
        # The largest cluster whose centre is a root of all derivatives below its size wins.
        for size in range(len(left), 0, -1):
            members = near[:size]
            centre = complex(np.mean([left[n] for n in members]))
            spread = max(abs(left[n] - centre) for n in members)
            if size > 1 and spread > 0.2 * (1 + abs(centre)):
                continue
            if size > 1 and _apart(poly, bound, [left[n] for n in members]):
                continue
            refined = _refined(poly, bound, centre, size)
            if refined is None:
                continue
            root, error = refined
            left = [x for n, x in enumerate(left) if n not in members]
            if abs(root.imag) <= ZERO * error:
                found.append(Root(float(root.real), size, error))
            elif abs(root.imag) < CLEAR * error:
                raise Undecided("a pair of complex roots lies too close to the real axis to tell")
            break
    found.sort(key=lambda r: r.value)
    for one, two in pairwise(found):
        if two.value - one.value < APART * max(one.error, two.error):
            raise Undecided("two tangent directions lie too close to tell apart")
    return found


def _apart(
    poly: np.polynomial.Polynomial, bound: np.polynomial.Polynomial, roots: list[complex]
) -> bool:
    """Whether roots are separate beyond the errors they have as simple roots.

    Below about the square root of the coefficients' rounding two roots and a double one are the
    same polynomial; what is closer counts as one root.
    """
    slopes = np.abs(poly.deriv()(np.array(roots)))
    errors = bound(np.abs(roots)) / np.maximum(slopes, 1e-300)
    gaps = np.abs(np.subtract.outer(roots, roots))[np.triu_indices(len(roots), 1)]
    ratio = float(gaps.min()) / max(float(errors.max()), 1e-300)
    if 3 < ratio < APART:
        raise Undecided("two tangent directions lie too close to tell apart")
    return ratio >= APART


def _refined(
    poly: np.polynomial.Polynomial, bound: np.polynomial.Polynomial, start: complex, size: int
) -> tuple[complex, float] | None:
    """The root of multiplicity ``size`` near ``start`` and its error, or None if there is none."""
    target, margin = poly, bound
    for _ in range(size - 1):
        target, margin = target.deriv(), margin.deriv()
    slope = target.deriv()
    x = start
    for _ in range(60):
        grad = slope(x)
        if grad == 0:
            return None
        step = target(x) / grad
        x -= step
        if abs(step) <= 4 * EPS * abs(x):
            break
    error = float(margin(abs(x)) / abs(slope(x))) if slope(x) != 0 else float("inf")
    if size == 1:
        return x, error
    derivative, level = poly, bound
    for _ in range(size - 1):
        residue = abs(derivative(x))
        allowed = float(level(abs(x))) + abs(derivative.deriv()(x)) * error
        if residue > CLEAR * allowed:
            return None
        if residue > ZERO * allowed:
            raise Undecided("two tangent directions lie too close to tell apart")
        derivative, level = derivative.deriv(), level.deriv()
    return x, error


def _made(
    f: Array, noise: Array, first: Curve | None, second: Curve | None, a: int, b: int
) -> _Point:
    """A point without trailing rows and columns that are exactly zero and exactly known."""
    used = (np.abs(f).max(axis=0) > 0) | (noise > 0)
    used[0, 0] = True
    i = int(np.flatnonzero(used.any(axis=1))[-1]) + 1
    j = int(np.flatnonzero(used.any(axis=0))[-1]) + 1
    return _Point(f[:, :i, :j], noise[:i, :j], first, second, a, b)


def _shift(f: Array, by: float) -> Array:
    """Coefficients after v -> v + by; f is (..., i, j)."""
    if by == 0:
        return f
    size = f.shape[-1]
    matrix = np.zeros((size, size))
    for j in range(size):
        for m in range(j + 1):
            matrix[j, m] = comb(j, m) * by ** (j - m)
    return f @ matrix


def _slope(f: Array) -> Array:
    """∂f/∂v with the same shape."""
    out = np.zeros_like(f)
    out[..., :-1] = f[..., 1:] * np.arange(1, f.shape[-1])
    return out


def _order(point: _Point) -> int:
    """Order of the ideal at the point.

    Raises:
        Undecided: if all known coefficients vanish.
    """
    rows, cols = point.f.shape[1:]
    unknown = point.a + point.b
    for degree in range(min(rows + cols - 1, unknown)):
        i = np.arange(max(0, degree - cols + 1), min(degree + 1, rows))
        if len(i) and not absent(point.f[:, i, degree - i], point.noise[i, degree - i]):
            return degree
    raise Undecided(f"all known Taylor coefficients vanish here (known to order {unknown - 1})")


def _leading(f: Array, order: int) -> Array:
    """(..., order+1) leading forms: column j is the coefficient of s^(order−j) v^j."""
    out = np.zeros((*f.shape[:-2], order + 1))
    for j in range(order + 1):
        if order - j < f.shape[-2] and j < f.shape[-1]:
            out[..., j] = f[..., order - j, j]
    return out


@dataclass(frozen=True)
class Direction:
    """A tangent direction (a : b), a unit vector, and the error of its smaller slope."""

    a: float
    b: float
    error: float


def common_roots(forms: Array, noise: Array) -> list[Direction]:
    """Real common zeros (a : b) on the projective line of binary forms Σ_j c_j a^(k−j) b^j."""
    order = forms.shape[1] - 1
    if order == 0:
        return []
    # A fixed, generic combination; a zero of it that is not common is seen by the other forms.
    weights = np.cos(1.0 + 2.0 * np.arange(forms.shape[0]))
    combined, level = weights @ forms, np.abs(weights).sum() * noise
    zeros: list[Direction] = []
    # Roots |b/a| <= 1 in one chart, the rest in the other, so that no root is large.
    for chart in (0, 1):
        step = 1 if chart == 0 else -1
        for root in real_roots(combined[::step], level[::step]):
            x = root.value
            if abs(x) > 1 + 1e-9 or (chart == 1 and abs(abs(x) - 1) <= 1e-9):
                continue
            powers = x ** np.arange(order + 1)
            slopes = np.arange(order + 1) * np.append(0.0, powers[:-1])
            values = forms[:, ::step] @ powers
            bound = noise[::step] @ np.abs(powers)
            bound = bound + root.error * np.abs(forms[:, ::step]) @ np.abs(slopes)
            bound = bound + 4 * EPS * np.abs(forms[:, ::step]) @ np.abs(powers)
            if absent(values, bound):
                norm = float(np.hypot(1.0, x))
                a, b = (1 / norm, x / norm) if chart == 0 else (x / norm, 1 / norm)
                zeros.append(Direction(a, b, root.error))
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
    forms, level = _leading(point.f, k), _leading(point.noise, k)
    if absent(forms[:, k], level[k]):
        return None
    weights = forms[:, k] / np.linalg.norm(forms[:, k])
    first = weights @ forms
    line = first[k - 1] / (k * first[k])
    power = np.array([comb(k, j) * line ** (k - j) for j in range(k + 1)])
    spread = float(np.abs(weights).sum())
    error = spread * (level[k - 1] + abs(line) * k * level[k]) / (k * abs(first[k]))
    rates = np.array([comb(k, j) * (k - j) * abs(line) ** max(k - j - 1, 0) for j in range(k + 1)])
    bound = level + level[k] * np.abs(power) + np.abs(forms[:, k]).max() * rates * error
    if not absent(forms - np.outer(forms[:, k], power), bound + 8 * EPS * np.abs(forms).max(0)):
        return None
    f = point.f
    known = min(point.a, 64)
    width = max(f.shape[1], known if known < 64 else f.shape[1])
    generator = np.tensordot(weights, f, 1)
    phi, doubt = np.zeros(known), np.zeros(known)
    for q in range(1, known):
        # The coefficient of s^q v^(k−1) after v -> v + φ is linear in φ_q.
        moved = _substitute(generator[None], phi, q + 1, k)[0]
        size = _substitute(point.noise[None], np.abs(phi), q + 1, k)[0]
        if moved.shape[1] > k - 1:
            phi[q] = -moved[q, k - 1] / (k * generator[0, k])
            doubt[q] = spread * size[q, k - 1] / (k * abs(generator[0, k])) + 4 * EPS * abs(phi[q])
    moved = _substitute(f, phi, width, f.shape[2])
    size = _substitute(np.abs(f).max(0)[None], np.abs(phi), width, f.shape[2])[0]
    bound = _substitute(point.noise[None], np.abs(phi), width, f.shape[2])[0] + 8 * EPS * size
    rate = _slope(size)
    for q in range(1, min(known, width)):
        if doubt[q] > 0:
            bound[q:] += doubt[q] * rate[: width - q]
    below, level = moved[:, : min(point.a, width), :k].copy(), bound[: min(point.a, width), :k]
    if total:
        i, j = np.indices(below.shape[1:])
        below[:, i + j >= point.a] = 0.0
    flat = absent(below, level)
    if flat:
        moved[:, :, :k] = 0.0
        bound[:, :k] = 0.0
    return _made(moved, bound, point.first, None, point.a, 0), flat


def _substitute(f: Array, phi: Array, width: int, height: int) -> Array:
    """f(s, v + φ(s)) modulo s^width, keeping v-degrees up to ``height``; f is (g, i, j)."""
    generators, size, degree = f.shape
    height = min(height + 1, degree)
    out = np.zeros((generators, width, height))
    power = np.zeros(width)
    power[0] = 1.0
    powers = [power]
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


def _blow_up(point: _Point, k: int, a: float, b: float, error: float = 0.0) -> _Point:
    """The point in direction (a : b), |a| >= |b|, of the new curve: s = s', v = s'(v' + b/a)."""
    rows, cols = point.f.shape[1:]
    stacked = np.concatenate([point.f, point.noise[None]])
    out = np.zeros((stacked.shape[0], max(rows + cols - 1 - k, 1), cols))
    for i in range(rows):
        for j in range(cols):
            power = i + j - k
            if power >= 0:
                out[:, power, j] += stacked[:, i, j]
    ratio = b / a
    first = Curve(
        k + sum(c.order for c in (point.first, point.second) if c),
        sum((c.discrepancy for c in (point.first, point.second) if c), Fraction(0))
        + sum(1 for c in (point.first, point.second) if c is None),
    )
    passes = abs(ratio) <= SNAP
    known_a = point.a + point.b - k
    known_b = point.b if passes else 0
    moved, bound = out[:-1], out[-1]
    if not passes or ratio != 0:
        size = _shift(np.abs(moved).max(0), abs(ratio))
        bound = _shift(bound, abs(ratio)) + 8 * EPS * size + error * _slope(size)
        moved = _shift(moved, 0.0 if passes else ratio)
        if passes:
            bound = bound + abs(ratio) * _slope(size)
    if known_b == 0:
        moved, bound = moved[:, : max(known_a, 1)], bound[: max(known_a, 1)]
    return _made(moved, bound, first, point.second if passes else None, known_a, known_b)


@dataclass
class _Log:
    """What a resolution spent and assumed."""

    blow_ups: int = 0
    rests_on_zeros: bool = False
    multiple: bool = False

    def spend(self) -> None:
        self.blow_ups += 1
        if self.blow_ups > MAX_BLOW_UPS:
            raise Undecided(f"not resolved after {MAX_BLOW_UPS} blow-ups")

    def branch(self, point: _Point, k: int) -> None:
        """A branch of real zeros; a single reduced equation has one whatever its higher terms."""
        values = np.linalg.svd(point.f.reshape(point.f.shape[0], -1), compute_uv=False)
        principal = len(values) == 1 or values[1] <= CLEAR * np.linalg.norm(point.noise)
        self.rests_on_zeros |= k > 1 or not principal
        self.multiple |= k > 1


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
    special = common_roots(_leading(point.f, k), _leading(point.noise, k))
    for curve, axis in ((point.second, Direction(1, 0, 0)), (point.first, Direction(0, 1, 0))):
        cross = [abs(d.a * axis.b - d.b * axis.a) for d in special]
        if curve is not None and (not cross or min(cross) > SNAP):
            special.append(axis)
    generic = _blow_up(point, k, 1.0, 0.0).first
    assert generic is not None
    yield (generic,)
    for d in special:
        if abs(d.a) >= abs(d.b):
            yield from _resolve(_blow_up(point, k, d.a, d.b, d.error), log)
        else:
            yield from _resolve(_blow_up(point.swapped(), k, d.b, d.a, d.error), log)


def planar_threshold(
    coefficients: Array, *, noise: float = 1e-15, prior_exponent: int = 0
) -> LocalThreshold:
    """(λ, m) at the origin of the ideal of real-analytic functions of two variables.

    Args:
        coefficients: (g, q+1, q+1): ``coefficients[g, i, j]`` is the Taylor coefficient of
            x^i y^j in generator g, known for i + j <= q; the generators vanish at the origin.
        noise: error of the coefficients relative to the largest one. What lies below counts as
            zero, and tangent directions closer than about its square root as one; a decision that
            uses this says so in ``rests_on_zeros``, and holds in the given units of x and y.
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
    lower, upper = Fraction(0), Fraction(2 + prior_exponent, 2)
    if scale == 0:
        upper = Fraction(2 + prior_exponent, 2 * (top + 1))
        return LocalThreshold(None, None, lower, upper, f"flat to order {top}")
    f = f / scale
    level = np.where(i + j <= top, np.maximum(noise, 4 * EPS * np.abs(f).max(0)), 0.0)
    start = _Point(f, level, None, None, top + 1, 0)
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
    return decided(best, count, rule, rests_on_zeros=log.rests_on_zeros, multiple=log.multiple)


def _start(point: _Point, k: int, prior_exponent: int, log: _Log) -> Iterator[tuple[Curve, ...]]:
    """Resolution of the first point, where the remainder is known by total degree."""
    if prior_exponent == 0:
        straight = _straighten(_facing(point, k), k, total=True)
        if straight is not None and straight[1]:
            log.branch(point, k)
            yield (Curve(k, Fraction(1)),)
            return
    # Unknown terms have degree >= a, so they carry s^a in every chart of the first blow-up.
    directions = common_roots(_leading(point.f, k), _leading(point.noise, k))
    log.spend()
    yield (Curve(k, Fraction(2 + prior_exponent)),)
    for d in directions:
        if abs(d.a) >= abs(d.b):
            blown = _blow_up(point, k, d.a, d.b, d.error)
        else:
            blown = _blow_up(_turned(point), k, d.b, d.a, d.error)
        assert blown.first is not None
        curve = Curve(blown.first.order, blown.first.discrepancy + prior_exponent)
        yield from _resolve(replace(blown, first=curve), log)


def _turned(point: _Point) -> _Point:
    """Swapped variables where the known total degree is the same number either way."""
    swapped = point.swapped()
    return replace(swapped, a=point.a, b=0)


def _facing(point: _Point, k: int) -> _Point:
    """Swap the variables if the pure power of v is missing from the leading forms."""
    forms = _leading(point.f, k)
    return _turned(point) if np.abs(forms[:, k]).max() < np.abs(forms[:, 0]).max() else point
