"""Rate fits: the vanishing order of a direction from its curvature along the ray, or why not.

``uᵀF(θ0 + t u)u = b t^(2(k-1)) (1 + O(t))`` along a direction of KL order k (Dead Directions, arXiv
2606.05957, rate theorem), so the log-log slope alpha gives ``k = 1 + alpha/2``. Windows, floors,
offsets and intervals are our choice; see :func:`fit_rate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deaddir_fast import _check
from deaddir_fast.theory.rate_average import Average, Law, average, best_law
from deaddir_fast.theory.rate_data import (
    ROUNDING_UNITS,
    Curve,
    array,
    check_radii,
    epsilon,
    prepare,
    same_shape,
)
from deaddir_fast.theory.rate_evidence import Array, Mask
from deaddir_fast.theory.rate_floor import floor_candidates
from deaddir_fast.theory.rate_identity import pointwise, trajectory
from deaddir_fast.theory.rate_models import MIN_POINTS, Points, power_candidates
from deaddir_fast.theory.rate_offset import offset_candidates

# The leading term holds where the bend changes it by less than this factor.
BEND_FACTOR = 2.0
MIN_DECADES = 1.0
MIN_WINDOW_POINTS = 4
# Neighbouring orders are told apart: the interval of the order reaches at most this far to a side.
MAX_ORDER_ERROR = 0.5
# Curves that rise by less than this factor show no second regime: no floor and no offset is fitted.
MIN_RISE = 2.5
# Scatter (of log values) above which a slope consistent with 0 is no evidence of anything.
MAX_FLAT_SCATTER = 0.3
# A constant claims more: its slope is known to this.
MAX_FLAT_ERROR = 0.5
MAX_SCATTER = 0.7
# Slopes above minus this are taken for zero.
NEGATIVE = 0.05
# Lag-one correlation of the residuals, in standard deviations of white noise's; fitting a few
# coefficients shifts it down by that many over the number of points.
MAX_RUN, FITTED = 2.7, 3.0
# An exact power has an interval as narrow as its rounding, which may miss the integer by that much.
EXACT = 1e-9
# Least disagreement in the order that the pointwise identity may veto.
IDENTITY_SLACK = 0.2


@dataclass(frozen=True)
class RateFit:
    """A rate read off a curvature curve.

    ``slope``, ``stderr``, ``interval``: alpha, its standard error, 95 % interval. ``order``,
    ``order_interval``: k = 1 + alpha/2 (inf if the curvature is exactly zero). ``integer_order``:
    the one integer in the order's interval, if the reading is resolved and there is just one.
    ``offset`` t0, ``floor`` c0, ``amplitude`` b, ``bend``: the best single model,
    ``c0 + b (t + t0)^alpha (1 + bend t + ...)``, the bend in t² when ±t were averaged (``paired``).
    ``window``: radii (t_lo, t_hi) between which the power term dominates; ``indices``: the given
    radii in it; ``points``: points in it; ``decades``: log10(t_hi/t_lo). ``residual``: scatter of
    log values. ``model``: "power", "power+bend", "floor+power", "floor+power+bend", "offset",
    "offset+bend", "flat" or "none"; ``weights``: probability of each kind. ``order_pointwise``,
    ``order_trajectory``: orders from ``t²F/(2K)`` and from ``dlogF/dlogK`` (NaN without kl).
    ``left_out``: radii not used, by reason. ``verdict``: "resolved", "flat", or "unresolved: ...".
    Numbers that could not be read are NaN.
    """

    slope: float
    stderr: float
    interval: tuple[float, float]
    order: float
    order_interval: tuple[float, float]
    integer_order: int | None
    offset: float
    floor: float
    amplitude: float
    bend: float
    window: tuple[float, float]
    indices: tuple[int, ...]
    points: int
    decades: float
    residual: float
    model: str
    weights: dict[str, float]
    paired: bool
    order_pointwise: float
    order_trajectory: float
    left_out: dict[str, int]
    verdict: str
    law: Law | None = None

    @property
    def resolved(self) -> bool:
        """Whether the order may be used: a rate that is resolved, or an exactly flat direction."""
        return self.verdict in ("resolved", "flat")

    def curve(self, radii: Any, *, leading: bool = False) -> Array:
        """Fitted curvature at ``abs(radii)``; ``leading``: the power term alone.

        NaN above the fitted radii (unless ``leading``), where the bend is not known, and everywhere
        if nothing was fitted; 0 for a flat direction.
        """
        t = np.abs(array("radii", radii))
        if self.law is None:
            return np.full(t.shape, 0.0 if self.verdict == "flat" else np.nan)
        power = self.law.log_leading(t.ravel())
        if leading:
            return np.exp(power).reshape(t.shape)
        full = self.law.floor + np.exp(power + self.law.subleading(t.ravel()))
        return np.asarray(full).reshape(t.shape)


def fit_rate(
    radii: Any,
    values: Any,
    *,
    values_minus: Any = None,
    stderr: Any = None,
    stderr_minus: Any = None,
    kl: Any = None,
    kl_minus: Any = None,
    floor: float | None = None,
    scale: float | None = None,
    pure: bool = False,
) -> Any:
    """Read the rate of directional Fisher curvature along a ray.

    radii (r,), values (r,) or (p, r): curvature uᵀF(θ0 + t u)u; returns a :class:`RateFit`, or a
    list of p. Negative radii are the other side of the ray, and ``values_minus`` gives values at
    ``-radii``; where both sides of at least five radii are there, their logarithms are averaged,
    which removes the odd subleading terms, and otherwise the longer side is read. Radius 0, zeros,
    negative and non-finite values are left out and counted.

    stderr, kl: the shape of values (``*_minus`` with values_minus). Standard errors weight the
    points against each other. The scatter about the fit sets the scale of the errors, so a common
    factor in the curve (the same samples at every radius) does not count against the slope.
    kl: KL(θ0 || θ0 + t u); the order is then also read from ``t²F/(2K) → k²``, and a disagreement
    makes the verdict unresolved.

    floor: curvature at or below it is rounding. scale: curvature of a live direction, from which
    the floor is taken as scale·(32 eps)², eps the values' dtype's: a sum of n rounded scores leaves
    about (eps·|score|)². With neither, scale = 1 is used, but only to judge a curve that is
    constant: a live direction (k = 1) and a plateau of rounding look alike.

    pure: the values have small relative errors and t = 0 is exactly the singular point, so that
    neither a floor nor an offset can be: a constant that the curve rises from is its true limit.

    **Model** (our choice). ``G = c0 + b (t+t0)^α e^{h(t)}``, h analytic with h(0) = 0, with a floor
    c0, an offset t0 or neither, on a window. h is a Taylor series with independent normal
    coefficients of a size and domain of analyticity that are averaged over, so the interval holds
    the truncation error of the bend and noise-free data do not give an empty interval; the noise
    level is unknown too. Models, windows and sizes are averaged by their exact evidence (points
    outside a window cost a fixed amount: Jay & Neil, Phys. Rev. D 103, 114502, 2021), and the
    interval is the 2.5-97.5 % range of the resulting mixture of Student distributions.

    **Verdict.** Resolved needs: five usable points; at least four and one decade in the window in
    which the power term dominates floor, offset and bend; an order known to ±0.5 (a
    constant's to ±0.25); scatter small enough for the claim, and residuals that do not run
    together along t; a slope that is not negative; no rounding floor posing as a constant; no
    rise away from a constant (which a live direction with a bend, a floor and an offset all
    explain); agreement with the pointwise identity where kl is given. Curvature that is exactly
    zero at every radius is "flat", order inf.

    Raises: TypeError for what is not an array of real numbers; ValueError for shapes that do not
    agree, repeated or non-finite radii, non-positive floor or scale.
    """
    t = check_radii(radii)
    eps = epsilon(values)
    v = array("values", values)
    if v.ndim not in (1, 2) or v.shape[-1] != t.size:
        expected = f"shape ({t.size},) or (p, {t.size}), one value for each radius"
        raise _check.fail("values", values, expected)
    if not isinstance(pure, bool):
        raise _check.fail("pure", pure, "True or False", TypeError)
    if pure and (floor is not None or scale is not None):
        raise _check.fail("pure", pure, "False when floor or scale is given")
    if floor is not None and scale is not None:
        raise _check.fail("scale", scale, "None when floor is given")
    extra = {
        name: None if given is None else same_shape(name, given, v)
        for name, given in (("stderr", stderr), ("kl", kl))
    }
    if values_minus is None:
        for name, given in (("stderr_minus", stderr_minus), ("kl_minus", kl_minus)):
            if given is not None:
                raise _check.fail(name, given, "None without values_minus")
    else:
        if (t <= 0).any():
            raise _check.fail("radii", radii, "positive radii when values_minus is given")
        v2 = same_shape("values_minus", values_minus, v)
        for name, given in (("stderr", stderr_minus), ("kl", kl_minus)):
            one = extra[name]
            if (one is None) != (given is None):
                raise _check.fail(f"{name}_minus", given, f"a value exactly when {name} has one")
            if one is not None:
                two = same_shape(f"{name}_minus", given, v)
                extra[name] = np.concatenate([one, two], axis=-1)
        v, t = np.concatenate([v, v2], axis=-1), np.concatenate([t, -t])
    known = 0.0
    if floor is not None:
        known = _check.positive("floor", floor)
    elif scale is not None:
        known = _check.positive("scale", scale) * (ROUNDING_UNITS * eps) ** 2
    given_radii = t.size if values_minus is None else t.size // 2

    def one_curve(row: tuple[int, ...]) -> RateFit:
        parts = {name: None if a is None else a[row] for name, a in extra.items()}
        curve = prepare(t, v[row], parts["stderr"], parts["kl"], eps, known)
        constant_floor = max(known, (ROUNDING_UNITS * eps) ** 2 if not known else 0)
        return _fit(curve, given_radii, 0.0 if pure else constant_floor, pure)

    if v.ndim == 1:
        return one_curve(())
    return [one_curve((i,)) for i in range(v.shape[0])]


def _nothing(curve: Curve, verdict: str, order: float = math.nan) -> RateFit:
    """A fit without numbers."""
    nan = math.nan
    flat = verdict == "flat"
    return RateFit(
        slope=math.inf if flat else nan,
        stderr=nan,
        interval=(nan, nan),
        order=order,
        order_interval=(order, order),
        integer_order=None,
        offset=0.0,
        floor=0.0,
        amplitude=0.0 if flat else nan,
        bend=nan,
        window=(nan, nan),
        indices=(),
        points=0,
        decades=0.0,
        residual=nan,
        model="flat" if flat else "none",
        weights={},
        paired=False,
        order_pointwise=nan,
        order_trajectory=nan,
        left_out=curve.left_out,
        verdict=verdict,
    )


def _fit(curve: Curve, given: int, constant_floor: float, pure: bool) -> RateFit:
    points = curve.points
    n = points.t.size
    if n == 0 and curve.zeros >= MIN_WINDOW_POINTS:
        others = {
            k: v for k, v in curve.left_out.items() if k not in ("exactly zero", "radius zero")
        }
        if not others:
            return _nothing(curve, "flat", math.inf)
    if n < MIN_POINTS:
        below = sum(c for r, c in curve.left_out.items() if "rounding floor" in r or "zero" in r)
        if below > n and curve.floor > 0:
            return _nothing(curve, f"unresolved: at the rounding floor {curve.floor:.1e}")
        reasons = ", ".join(f"{c} {r}" for r, c in curve.left_out.items())
        why = f"unresolved: {n} usable points, {MIN_POINTS} are needed"
        return _nothing(curve, why + (f" (left out: {reasons})" if reasons else ""))

    candidates = power_candidates(points)
    straight = best_law(points, candidates)
    log_straight = straight.log_leading(points.t) + np.nan_to_num(straight.subleading(points.t))
    rise = log_straight[-1] - log_straight.min()
    risen = max(rise, np.median(points.y[-3:]) - np.median(points.y[:3])) > math.log(MIN_RISE)
    if risen and not pure:
        candidates += [
            c for c in (offset_candidates(points), floor_candidates(points, candidates)) if c
        ]
    reading = average(candidates)
    law = best_law(points, candidates)
    window = _window(points, law)
    inside = np.zeros(n, bool)
    inside[window] = True
    lo, hi = (points.t[window][0], points.t[window][-1]) if inside.any() else (math.nan, math.nan)
    decades = float(np.log10(hi / lo)) if inside.any() else 0.0
    indices = {i % given for j in np.flatnonzero(inside) for i in curve.sources[j]}

    looks = pointwise(points, curve.log_kl, law, inside)
    verdict = _verdict(points, reading, law, inside, decades, constant_floor, pure) or "resolved"
    order = 1 + reading.value / 2
    order_interval = (1 + reading.interval[0] / 2, 1 + reading.interval[1] / 2)
    look = min(looks, key=lambda a: abs(math.exp(a.value) - order)) if looks else None
    if verdict == "resolved" and look is not None:
        verdict = _against(order, order_interval, look) or verdict
    low, high = order_interval[0] - EXACT, order_interval[1] + EXACT
    whole = [k for k in range(1, 1000) if low <= k <= high]
    kind = {"power": "power", "cut": "power"}.get(law.model, law.model)
    kind = "floor+power" if kind == "floor" else kind
    bent = bool(np.abs(law.bend).max() > 0)
    probability = dict(reading.weights)
    probability["power"] = probability.pop("power", 0.0) + probability.pop("cut", 0.0)
    return RateFit(
        slope=reading.value,
        stderr=reading.stderr,
        interval=reading.interval,
        order=order,
        order_interval=order_interval,
        integer_order=whole[0] if len(whole) == 1 and verdict == "resolved" else None,
        offset=law.offset,
        floor=law.floor,
        amplitude=float(np.exp(min(law.log_amplitude, 709.0))),
        bend=law.first_bend(),
        window=(float(lo), float(hi)),
        indices=tuple(sorted(indices)),
        points=int(inside.sum()),
        decades=decades,
        residual=law.residual,
        model=kind + ("+bend" if bent else ""),
        weights=probability,
        paired=points.even,
        order_pointwise=math.exp(look.value) if look else math.nan,
        order_trajectory=trajectory(points, curve.log_kl, law, inside),
        left_out=curve.left_out,
        verdict=verdict,
        law=law,
    )


def _window(points: Points, law: Law) -> slice:
    """The first run of fitted points at which the power term dominates."""
    t = points.t
    index = np.arange(t.size)
    h = law.subleading(t)
    ok = (index >= law.lo) & (index <= law.hi) & (np.abs(h) <= math.log(BEND_FACTOR))
    ok &= t >= abs(law.offset)
    if law.floor > 0:
        ok &= law.log_leading(t) + np.nan_to_num(h) >= math.log(law.floor)
    starts = np.flatnonzero(ok)
    if not starts.size:
        return slice(0, 0)
    stops = np.flatnonzero(~ok & (index > starts[0]))
    return slice(int(starts[0]), int(stops[0]) if stops.size else t.size)


def _rms(error: Array) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(error**2)))


def _verdict(
    points: Points,
    reading: Average,
    law: Law,
    inside: Mask,
    decades: float,
    floor: float,
    pure: bool,
) -> str | None:
    """Why the reading is not resolved, or None."""
    low, high = reading.interval
    half = max(reading.value - low, high - reading.value)
    flat = low <= 0.25 and high >= -0.25
    error = law.residuals(points)
    scatter = _rms(error[law.lo : law.hi + 1])
    # A constant has nothing but its scatter to show: low radii left out of the fit count too.
    below = _rms(error[: law.hi + 1])
    if scatter > MAX_SCATTER or (flat and max(scatter, below) > MAX_FLAT_SCATTER):
        worst = max(scatter, below) if flat else scatter
        return f"unresolved: no trend above noise (scatter {worst:.2g} in the logarithm)"
    r = (error * law.w)[law.lo : law.hi + 1]
    run = float((r[1:] * r[:-1]).sum() / max(float((r**2).sum()), 1e-300)) * math.sqrt(r.size)
    if (
        r.size >= 8
        and law.residual > 1e3 * points.rounding
        and run > MAX_RUN - FITTED / math.sqrt(r.size)
    ):
        return "unresolved: residuals run together along t: the fitted form does not hold"
    if half > (MAX_FLAT_ERROR if flat else 2 * MAX_ORDER_ERROR):
        return f"unresolved: order {1 + reading.value / 2:.2f} known only to ±{half / 2:.2g}"
    if inside.sum() < MIN_WINDOW_POINTS:
        return (
            f"unresolved: the power term dominates at {int(inside.sum())} radii only, "
            f"{MIN_WINDOW_POINTS} are needed"
        )
    if decades < MIN_DECADES - 1e-6:
        return f"unresolved: {decades:.2f} decades in the window, {MIN_DECADES:g} is needed"
    if high < -NEGATIVE:
        return f"unresolved: slope {reading.value:.2f} is negative, curvature of no KL order"
    if flat:
        level = float(np.exp(np.median(points.y[inside])))
        if level <= floor:
            return f"unresolved: constant at {level:.1e}, within the rounding floor {floor:.1e}"
        above = float(points.y[-max(1, points.t.size // 8) :].max() - np.median(points.y[inside]))
        if above > math.log(MIN_RISE) and not pure:
            return (
                "unresolved: a plateau that rises: a live direction with a bend, a floor and an "
                "offset explain it alike"
            )
    return None


def _against(order: float, interval: tuple[float, float], look: Average) -> str | None:
    """Compare with the pointwise identity."""
    other = math.exp(look.value)
    reach = max(other - math.exp(look.interval[0]), math.exp(look.interval[1]) - other)
    slack = max(IDENTITY_SLACK, reach + 0.5 * (interval[1] - interval[0]))
    if abs(other - order) <= slack:
        return None
    return f"unresolved: slope reads k={order:.2f}, pointwise identity reads k={other:.2f}"
