"""Rate fits against curves whose order is known in closed form, and curves that have none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from deaddir_fast.theory.rate import fit_rate

RADII = np.logspace(-3, -0.5, 12)
LONG = np.logspace(-5, -0.5, 30)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def density_curve(component: Any, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F(b) and KL(p_0 || p_b) of a family of densities on the line, by the trapezium rule."""
    x = torch.linspace(-14, 14, 6001, dtype=torch.float64)
    fisher, kl = [], []
    for value in b:
        point = torch.tensor(float(value), dtype=torch.float64)
        log_p, score = torch.func.jvp(
            lambda q: component(x, q), (point,), (torch.ones_like(point),)
        )
        f = component(x, torch.zeros_like(point)) - log_p
        p0 = component(x, torch.zeros_like(point)).exp()
        fisher.append(torch.trapezoid(log_p.exp() * score**2, x).item())
        # E[f] = E[f + e^-f - 1] under p_0, without the cancellation of the first form
        kl.append(torch.trapezoid(p0 * (f + torch.expm1(-f)), x).item())
    return np.array(fisher), np.array(kl)


def log_normal(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x - mean) ** 2 / var - 0.5 * torch.log(2 * math.pi * var)


def pair(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    one = torch.ones_like(b)
    both = torch.stack([log_normal(x, b, one), log_normal(x, -b, one)])
    return torch.logsumexp(both, 0) - math.log(2)


def skewed(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    var = 1 - 2 * b**2
    both = torch.stack(
        [log_normal(x, 2 * b, var) - math.log(3), log_normal(x, -b, var) + math.log(2 / 3)]
    )
    return torch.logsumexp(both, 0)


@pytest.mark.parametrize("k", range(1, 7))
def test_exact_powers(k: int) -> None:
    fit = fit_rate(RADII, k**2 * RADII ** (2 * k - 2), kl=RADII ** (2 * k) / 2)
    assert fit.verdict == "resolved" and fit.integer_order == k
    assert abs(fit.slope - (2 * k - 2)) < 1e-12
    assert fit.interval[0] < fit.interval[1]
    assert fit.order == pytest.approx(k) and fit.order_pointwise == pytest.approx(k)
    assert fit.order_trajectory == pytest.approx(k)
    assert fit.amplitude == pytest.approx(k**2)
    assert fit.decades == pytest.approx(2.5) and fit.points == 12
    assert fit.indices == tuple(range(12))


@pytest.mark.parametrize("slope", [12, 20, 34])
def test_steep_powers(slope: int) -> None:
    fit = fit_rate(RADII, 3.0 * RADII**slope * (1 + 0.5 * RADII))
    assert fit.resolved and fit.integer_order == 1 + slope // 2
    assert fit.interval[0] <= slope <= fit.interval[1]


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_sum_of_powers_along_a_rotated_axis(k: int) -> None:
    # K = (x^2k + y^2)/2 with (x, y) = R w: along R^T e1, J u = (k t^(k-1), 0); other rays are live.
    live = RADII ** (2 * k - 2) * k**2 * math.cos(1.0) ** (2 * k) + math.sin(1.0) ** 2
    dead, alive = fit_rate(RADII, np.stack([k**2 * RADII ** (2 * k - 2), live]))
    assert abs(dead.slope - (2 * k - 2)) < 1e-9
    assert alive.resolved and alive.integer_order == 1


def test_mixture_of_two_normals_has_order_two() -> None:
    b = np.logspace(-2, -0.4, 14)
    fisher, kl = density_curve(pair, b)
    fit = fit_rate(b, fisher, kl=kl)
    assert fit.resolved and fit.integer_order == 2
    assert fit.amplitude == pytest.approx(2, rel=1e-4)
    assert fit.order_pointwise == pytest.approx(2, abs=1e-3)
    assert fit.order_trajectory == pytest.approx(2, abs=1e-2)


def test_both_sides_remove_the_odd_bend() -> None:
    b = np.logspace(-2, -0.5, 12)
    plus, kl_plus = density_curve(skewed, b)
    minus, kl_minus = density_curve(skewed, -b)
    fit = fit_rate(b, plus, values_minus=minus, kl=kl_plus, kl_minus=kl_minus)
    one_side = fit_rate(b, plus)
    assert fit.resolved and fit.paired and fit.integer_order == 3
    assert fit.amplitude == pytest.approx(6, rel=1e-3)
    assert fit.order_pointwise == pytest.approx(3, abs=1e-2)
    assert one_side.integer_order == 3 and not one_side.paired
    joined = fit_rate(np.concatenate([b, -b]), np.concatenate([plus, minus]))
    assert joined.slope == fit_rate(b, plus, values_minus=minus).slope


def test_bend_is_read() -> None:
    fit = fit_rate(RADII, 4 * RADII**2 * (1 + 0.8 * RADII + 0.3 * RADII**2))
    assert fit.integer_order == 2 and fit.model == "power+bend"
    assert fit.bend == pytest.approx(0.8, rel=1e-3)
    even = fit_rate(
        np.concatenate([-RADII, RADII]),
        np.concatenate([RADII**2 * (1 - 0.5 * RADII), RADII**2 * (1 + 0.5 * RADII)]),
    )
    # log(1 - t^2/4)/2 is the mean of the logarithms
    assert even.bend == pytest.approx(-0.125, rel=1e-3)


def test_offset() -> None:
    t0 = 1e-3
    g = 9 * (LONG + t0) ** 4 * (1 + LONG)
    fit = fit_rate(LONG, g)
    assert fit.resolved and fit.integer_order == 3 and fit.model == "offset+bend"
    assert fit.offset == pytest.approx(t0, rel=1e-6)
    assert fit.window[0] >= t0
    np.testing.assert_allclose(fit.curve(LONG), g, rtol=1e-6)
    from_start = ((LONG + t0) ** 3 - t0**3) ** 2 / 2
    from_set = (LONG + t0) ** 6 / 2
    clean = 9 * (LONG + t0) ** 4
    for kl in (from_start, from_set):
        assert fit_rate(LONG, clean, kl=kl).order_pointwise == pytest.approx(3, abs=0.05)


def test_offset_behind_the_start() -> None:
    fit = fit_rate(LONG, (LONG - 5e-6) ** 4)
    assert fit.resolved and fit.integer_order == 3
    assert fit.offset == pytest.approx(-5e-6, rel=1e-3)


@pytest.mark.parametrize("floor", [1e-30, 1e-14])
def test_rounding_floor_below_a_power(floor: float) -> None:
    hit = 0
    for seed in range(8):
        g = LONG**4 * np.exp(1e-6 * rng(seed).normal(size=LONG.size))
        fit = fit_rate(LONG, g + floor * rng(seed + 50).normal(size=LONG.size) ** 2)
        assert fit.resolved and abs(fit.slope - 4) < 1e-3
        assert fit.window[0] ** 4 > 0.1 * floor
        hit += fit.interval[0] <= 4 <= fit.interval[1]
    assert hit >= 6


def test_constant_floor_is_fitted() -> None:
    g = (1e-12 + LONG**4) * np.exp(0.02 * rng().normal(size=LONG.size))
    fit = fit_rate(LONG, g)
    assert fit.resolved and fit.integer_order == 3 and fit.model.startswith("floor+power")
    assert fit.floor == pytest.approx(1e-12, rel=0.05)
    assert fit.window[0] >= 0.8e-3


def test_float32_values() -> None:
    t = np.logspace(-3, -0.5, 24)
    exact = torch.tensor(t, dtype=torch.float32) ** 6 * 16
    fit = fit_rate(torch.tensor(t, dtype=torch.float32), exact)
    assert fit.resolved and abs(fit.slope - 6) < 1e-5
    assert fit.interval[0] <= 6 <= fit.interval[1]
    # scores of size one are rounded at 6e-8: G floors near 4e-15
    noisy = exact.double().numpy() + 4e-15 * rng().normal(size=24) ** 2
    fit = fit_rate(t, noisy.astype(np.float32), scale=1.0)
    assert fit.resolved and fit.integer_order == 4
    assert fit.left_out["at or below the rounding floor"] > 0


@pytest.mark.parametrize("noise", [1e-12, 1e-3, 0.05])
@pytest.mark.parametrize("c2, c4", [(1e2, 1e3), (1e4, 1e8), (1e3, 1e7), (1.0, 1.0), (30, 1e4)])
def test_trichotomy_is_never_a_rate_in_between(c2: float, c4: float, noise: float) -> None:
    # The normalisation-layer curve: slopes 0, 2 and 4 in turn, the middle one on a short window.
    t = np.logspace(-4, 0, 25)
    for seed in range(2):
        fit = fit_rate(t, (1 + c2 * t**2 + c4 * t**4) * np.exp(noise * rng(seed).normal(size=25)))
        if fit.resolved:
            assert any(fit.interval[0] - 0.2 <= s <= fit.interval[1] + 0.2 for s in (0, 2, 4))
            assert fit.decades >= 1


@pytest.mark.parametrize("kind", ["lognormal", "uniform", "square", "walk"])
def test_noise_is_not_a_rate(kind: str) -> None:
    wrong = 0
    for seed in range(12):
        r = rng(seed)
        n = int(r.integers(8, 40))
        t = np.logspace(-r.uniform(1.5, 4), 0, n)
        g = {
            "lognormal": lambda r, n: np.exp(r.normal(size=n)),
            "uniform": lambda r, n: r.uniform(size=n),
            "square": lambda r, n: 1e-3 * r.normal(size=n) ** 2,
            "walk": lambda r, n: np.exp(np.cumsum(r.normal(size=n))),
        }[kind](r, n)
        fit = fit_rate(t, g)
        assert not fit.resolved or abs(fit.slope) < 0.5
        wrong += fit.resolved
    assert wrong <= 1


def test_noise_without_trend_says_so() -> None:
    fit = fit_rate(LONG, np.exp(rng().normal(size=LONG.size)))
    assert fit.verdict.startswith("unresolved: no trend above noise")
    assert fit.integer_order is None


def test_a_live_direction_and_a_rounding_floor_are_told_apart() -> None:
    jitter = np.exp(0.1 * rng().normal(size=LONG.size))
    live = fit_rate(LONG, 0.7 * jitter)
    assert live.resolved and live.integer_order == 1 and abs(live.slope) < 0.1
    assert "rounding floor" in fit_rate(LONG, 1e-31 * jitter).verdict
    assert "rounding floor" in fit_rate(LONG, 1e-20 * jitter, scale=1e10).verdict
    assert "rounding floor" in fit_rate(LONG, 1e-3 * jitter, floor=1e-2).verdict
    assert fit_rate(LONG, 1e-31 * jitter, scale=1e-20).integer_order == 1


def test_live_direction_with_a_bend() -> None:
    fit = fit_rate(RADII, 2 * (1 + RADII + RADII**2))
    assert fit.integer_order == 1 and fit.bend == pytest.approx(1, rel=1e-3)


def test_a_plateau_that_rises_is_not_resolved_as_live() -> None:
    t = np.logspace(-4, 0, 25)
    fit = fit_rate(t, 1 + t**2 + t**4)
    assert not fit.resolved


def test_flat_direction() -> None:
    fit = fit_rate(RADII, np.zeros(12))
    assert fit.verdict == "flat" and fit.resolved
    assert fit.order == math.inf and fit.integer_order is None
    np.testing.assert_array_equal(fit.curve(RADII), np.zeros(12))


def test_zeros_below_are_underflow_and_cut_what_is_beside_them() -> None:
    g = RADII**4
    g[:3] = 0.0
    fit = fit_rate(RADII, g)
    assert fit.integer_order == 3 and fit.left_out == {"exactly zero": 3}
    g = RADII**4
    g[[0, 2]] = 0.0
    g[1] = 5e-324
    fit = fit_rate(RADII, g)
    assert fit.integer_order == 3
    assert fit.left_out == {"exactly zero": 2, "below a radius of exact zeros": 1}
    assert fit.indices == tuple(range(3, 12))
    none = np.where(np.arange(12) == 4, 1e-33, 0.0)
    assert fit_rate(RADII, none).verdict.startswith("unresolved: 0 usable points")


def test_bad_values_are_counted() -> None:
    t = np.concatenate([[0.0], RADII])
    g = t**2 * 4
    g[3], g[5], g[7] = np.nan, np.inf, -1e-20
    fit = fit_rate(t, g)
    assert fit.integer_order == 2
    assert fit.left_out == {"radius zero": 1, "not finite": 2, "negative": 1}
    assert not fit_rate(RADII, np.full(12, np.nan)).resolved
    assert "4 usable points" in fit_rate(RADII[:4], RADII[:4]).verdict


@pytest.mark.parametrize("decades", [0.3, 0.9])
def test_less_than_a_decade_is_not_enough(decades: float) -> None:
    t = np.logspace(-1 - decades, -1, 20)
    fit = fit_rate(t, t**2)
    assert not fit.resolved and "decades" in fit.verdict
    assert fit.slope == pytest.approx(2)


def test_wide_interval_is_not_resolved() -> None:
    t = np.logspace(-1, 0, 6)
    fit = fit_rate(t, t**2 * np.exp([0.9, -0.8, 0.7, -0.9, 0.6, -0.8]))
    assert not fit.resolved


def test_negative_slope_has_no_order() -> None:
    fit = fit_rate(RADII, RADII**-2.0)
    assert "negative" in fit.verdict and fit.slope == pytest.approx(-2)


def test_pointwise_identity_vetoes() -> None:
    # slope 4k-2 = 6 of the empirical Fisher at interpolated labels, k = 2
    fit = fit_rate(RADII, 4 * RADII**6, kl=RADII**4 / 2)
    assert not fit.resolved and "pointwise identity reads" in fit.verdict
    assert fit.integer_order is None
    fit = fit_rate(RADII, 4 * RADII**2 * (1 + RADII), kl=RADII**4 / 2 * (1 + 0.8 * RADII))
    assert fit.integer_order == 2


def test_identity_with_a_floor_in_the_curvature() -> None:
    # the floor is in F only: the identity holds for what stands above it
    fit = fit_rate(LONG, 1e-10 + 9 * LONG**4, kl=LONG**6 / 2)
    assert fit.resolved and fit.model.startswith("floor") and fit.integer_order == 3
    assert fit.order_pointwise == pytest.approx(3, abs=1e-3)


def test_standard_errors_weight_the_points() -> None:
    relative = np.where(np.arange(30) % 2, 1e-3, 0.3)
    hits, widths, without = 0, [], []
    for seed in range(12):
        g = LONG**2 * np.exp(relative * rng(seed).normal(size=30))
        fit = fit_rate(LONG, g, stderr=relative * g)
        hits += fit.interval[0] <= 2 <= fit.interval[1]
        widths.append(fit.stderr)
        without.append(fit_rate(LONG, g).stderr)
    assert hits >= 10
    assert np.median(widths) < 0.2 * np.median(without)


def test_points_within_their_error_are_left_out() -> None:
    g = LONG**2
    fit = fit_rate(LONG, g, stderr=np.where(LONG < 1e-3, g, 1e-3 * g))
    assert fit.left_out == {"standard error above half the value": int((LONG < 1e-3).sum())}


def test_scaling_laws() -> None:
    r = rng()
    g = RADII**4 * (1 + RADII) * np.exp(0.02 * r.normal(size=12))
    fit = fit_rate(RADII, g)
    scaled = fit_rate(RADII, 1e5 * g)
    stretched = fit_rate(10 * RADII, g)
    assert scaled.slope == pytest.approx(fit.slope, abs=1e-9)
    assert scaled.amplitude == pytest.approx(1e5 * fit.amplitude, rel=1e-6)
    assert stretched.slope == pytest.approx(fit.slope, abs=1e-9)
    assert stretched.window[1] == pytest.approx(10 * fit.window[1])
    assert stretched.bend == pytest.approx(fit.bend / 10, abs=1e-6)


def test_order_of_radii_does_not_matter_and_fits_repeat() -> None:
    g = RADII**2 * np.exp(0.1 * rng().normal(size=12))
    shuffled = rng(1).permutation(12)
    a, b, c = fit_rate(RADII, g), fit_rate(RADII[shuffled], g[shuffled]), fit_rate(RADII, g)
    assert a.slope == b.slope == c.slope and a.interval == b.interval == c.interval
    assert sorted(shuffled[list(b.indices)]) == list(a.indices)


def test_curve_goes_through_the_values() -> None:
    g = 3 * RADII**4 * (1 + RADII)
    fit = fit_rate(torch.tensor(RADII), torch.tensor(g))
    np.testing.assert_allclose(fit.curve(RADII), g, rtol=1e-8)
    np.testing.assert_allclose(fit.curve(-RADII), g, rtol=1e-8)
    np.testing.assert_allclose(fit.curve(RADII, leading=True), 3 * RADII**4, rtol=1e-6)
    assert np.isnan(fit.curve(np.array([5.0]))).all()
    assert fit.curve(torch.tensor([[0.1, 0.2]])).shape == (1, 2)


def test_many_curves() -> None:
    g = torch.stack([torch.tensor(RADII) ** (2 * k - 2) for k in (1, 2, 3)])
    fits = fit_rate(RADII, g, kl=torch.stack([g[i] * torch.tensor(RADII) ** 2 for i in range(3)]))
    assert isinstance(fits, list) and [round(f.order) for f in fits] == [1, 2, 3]


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"radii": [0.1, 0.1, 0.2], "values": [1.0, 1.0, 1.0]}, "radii"),
        ({"radii": [0.1, math.nan], "values": [1.0, 1.0]}, "radii"),
        ({"radii": [], "values": []}, "radii"),
        ({"radii": [0.1, 0.2], "values": [1.0]}, "values"),
        ({"radii": [0.1, 0.2], "values": np.ones((1, 1, 2))}, "values"),
        ({"radii": [0.1, 0.2], "values": [1.0, 1.0], "kl": [1.0]}, "kl"),
        ({"radii": [0.1, 0.2], "values": [1.0, 1.0], "stderr": [1.0]}, "stderr"),
        ({"radii": [0.1, 0.2], "values": [1.0, 1.0], "values_minus": [1.0]}, "values_minus"),
        ({"radii": [-0.1, 0.2], "values": [1.0, 1.0], "values_minus": [1.0, 1.0]}, "radii"),
        ({"radii": [0.1, 0.2], "values": [1.0, 1.0], "kl_minus": [1.0, 1.0]}, "kl_minus"),
        ({"radii": [0.1, 0.2], "values": [1.0, 1.0], "floor": -1.0}, "floor"),
        ({"radii": [0.1, 0.2], "values": [1.0, 1.0], "floor": 1.0, "scale": 1.0}, "scale"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        fit_rate(**kwargs)


@pytest.mark.parametrize("values", ["ab", [1.0, "x"], torch.ones(2, dtype=torch.complex64)])
def test_bad_types(values: Any) -> None:
    with pytest.raises(TypeError, match="values"):
        fit_rate([0.1, 0.2], values)


def test_a_constant_under_a_power_is_a_limit_where_no_floor_can_be():
    """c0 + t²: with pure=True the slope at t -> 0 is 0, otherwise the constant is a floor."""
    t = np.logspace(-3, 0.5, 20)
    curve = 1.0 + t**2
    pure = fit_rate(t, curve, pure=True)
    assert pure.verdict == "resolved"
    assert pure.slope == pytest.approx(0, abs=0.05)
    assert pure.floor == 0
    below = fit_rate(t, curve)
    assert below.verdict != "resolved" or below.floor > 0
    tiny = fit_rate(t, 1e-90 * t**8, pure=True)
    assert tiny.slope == pytest.approx(8, abs=1e-6)
    with pytest.raises(ValueError, match="pure"):
        fit_rate(t, curve, pure=True, scale=1.0)
    with pytest.raises(TypeError, match="pure"):
        fit_rate(t, curve, pure=1)
