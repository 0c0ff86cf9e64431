"""Leading scores and the volume law, against closed forms and numerical integration."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from theory.maps import umbrella

from deaddir_fast import theory

AXES = [[1.0, 0.0], [0.0, 1.0]]


def polar(rho, phi):
    return torch.stack([rho * phi.cos(), rho * phi.sin()])


def twisted(u):
    """The paper's control: not differentiable twice at 0."""
    return polar((2 * (u[0] ** 4 + u[1] ** 4)).sqrt(), u[0] + u[1])


def analytic_twin(u):
    """The same leading scores and degrees, analytic: √det F = 2 (u1² + u2²) |u1 - u2|."""
    return polar(u[0] ** 2 + u[1] ** 2, u[0] + u[1])


def straight(u):
    return math.sqrt(2) * u.square()


def coupled(planar):
    """One live coordinate w that both dead directions are coupled to."""
    return lambda p: torch.cat([planar(p[:2]), p[2:], p[2] * p[:2]])


@pytest.mark.parametrize("mu", [twisted, analytic_twin])
def test_twisted_scores_are_dependent(mu):
    scores = theory.leading_scores(mu, [0.0, 0.0], AXES)
    assert scores.orders == (2.0, 2.0)
    assert scores.verdict.startswith("dependent: ")
    assert torch.allclose(scores.gram, torch.ones(2, 2, dtype=torch.float64), atol=1e-9)
    with pytest.raises(ValueError, match=r"^k: the product law does not hold here, dependent"):
        theory.curvature_volume(scores)


def test_leading_coefficients_are_those_of_the_map():
    scores = theory.leading_scores(
        lambda u: torch.stack([3 * u[0] ** 2, u[0] ** 3 - u[1] ** 4, u[1] ** 4]), [0.0, 0.0], AXES
    )
    assert scores.orders == (2.0, 4.0)
    expected = torch.tensor([[3.0, 0, 0], [0, -1.0, 1]], dtype=torch.float64)
    assert torch.allclose(scores.scores, expected, atol=1e-13)
    assert scores.independent
    assert theory.curvature_volume(scores) == Fraction(2, 2) + Fraction(4, 6)


@pytest.mark.parametrize(
    ("mu", "verdict"),
    [
        (straight, "independent"),
        (lambda u: torch.stack([u[0] ** 2 + u[1] ** 3, u[1] ** 2 + u[0] ** 2]), "independent"),
        (lambda u: torch.stack([u[0] ** 2, u[1] ** 2, u[0] * u[1]]), "mixed: "),
        (lambda u: torch.stack([u[0] ** 3, u[1] ** 3, u[0] * u[1]]), "mixed: "),
        (lambda u: torch.stack([u[0] ** 2, u[1] ** 3, u[0] * u[1] ** 2]), "independent"),
        (lambda u: torch.stack([u[0] ** 2, u[0] ** 2 - u[1] ** 2, 0 * u[0]]), "independent"),
        (lambda u: torch.stack([u.square().sum(), u[0] ** 3]), "dependent: "),
        (lambda u: u.square().sum().reshape(1), "dependent: "),
        (lambda u: torch.stack([u[0] ** 3, u[1] ** 4]), "unresolved: mixed terms"),
        (lambda u: torch.stack([u[0] ** 2, u[0] * u[1]]), "unresolved: direction 1 is flat"),
    ],
)
def test_verdicts(mu, verdict):
    scores = theory.leading_scores(mu, [0.0, 0.0], AXES, max_order=6)
    assert scores.verdict.startswith(verdict)
    assert scores.independent == (verdict == "independent")


def test_independence_means_the_determinant_is_the_product():
    """√det F over ∏ k_i t_i^(k_i-1), on shrinking weighted curves: a limit, or none."""

    def ratio(mu, orders, t):
        theta = torch.tensor([0.9 * t ** (1 / orders[0]), 1.1 * t ** (1 / orders[1])]).double()
        values = torch.linalg.svdvals(torch.func.jacfwd(mu)(theta))
        product = math.prod(k * float(x) ** (k - 1) for k, x in zip(orders, theta, strict=True))
        return float(values.prod()) / product

    def good(u):
        return torch.stack([u[0] ** 2, u[1] ** 3 + 2 * u[0] ** 2, u[0] * u[1] ** 2])

    scores = theory.leading_scores(good, [0.0, 0.0], AXES)
    assert scores.orders == (2.0, 3.0)
    assert scores.independent
    wedge = float(torch.linalg.svdvals(scores.scores).prod())
    assert abs(ratio(good, (2, 3), 1e-8) / wedge - 1) < 0.05
    assert ratio(twisted, (2, 2), 1e-8) < 1e-3


def test_a_curved_fibre_leans_on_the_live_score():
    scores = theory.leading_scores(
        lambda p: torch.stack([p[1] - p[0] ** 2, p[0] * (p[1] - p[0] ** 2)]), [0.0, 0.0], AXES
    )
    assert scores.orders == (2.0, 1.0)
    assert scores.verdict.startswith("dependent: ")
    live = theory.leading_scores(umbrella(3), [0.0, 0.0], AXES)
    assert live.orders == (3.0, 1.0)
    assert theory.curvature_volume(live) == Fraction(3, 4)


def _disc(planar, bound):
    """Volume of {every dead plane has |curvature| > bound} on w = 0, in polar coordinates.

    On each ray the curvatures of both planes fall about as 1/r²; where the smaller one crosses the
    bound is found by iterating that, and √det F is integrated up to there.
    """
    mu = coupled(planar)
    eye = np.eye(3)

    def weakest(r, angle):
        theta = [r * math.cos(angle), r * math.sin(angle), 0.0]
        readings = [
            theory.sectional_curvature(mu, theta, e, eye[2], within="plane") for e in eye[:2]
        ]
        assert all(c.resolved for c in readings)
        return min(abs(c.value) for c in readings)

    def density(r, angle):
        theta = torch.tensor([r * math.cos(angle), r * math.sin(angle), 0.0], dtype=torch.float64)
        return r * float(torch.linalg.svdvals(torch.func.jacfwd(mu)(theta)).prod())

    angles = (np.arange(8) + 0.37) * 2 * math.pi / 8
    total = 0.0
    for angle in angles:
        high, found = bound**-0.5, 0.0
        for _ in range(5):
            found = weakest(high, angle)
            high *= math.sqrt(found / bound)
        assert abs(found / bound - 1) < 1e-3
        x, w = np.polynomial.legendre.leggauss(6)
        total += (
            high
            / 2
            * sum(wi * density(high * (xi + 1) / 2, angle) for xi, wi in zip(x, w, strict=True))
        )
    return total * 2 * math.pi / len(angles)


@pytest.mark.parametrize(("planar", "exponent"), [(straight, 2.0), (twisted, 2.5)])
def test_volume_of_large_curvature(planar, exponent):
    """M^-2 by the product law; M^-5/2, not M^-2, for the twisted control."""
    bounds = 1e4, 1e6
    small, large = (_disc(planar, m) for m in bounds)
    measured = math.log(small / large) / math.log(bounds[1] / bounds[0])
    assert abs(measured - exponent) < 0.02
    if planar is straight:
        scores = theory.leading_scores(planar, [0.0, 0.0], AXES)
        assert theory.curvature_volume(scores) == 2


def test_determinant_of_the_twisted_control():
    for u in ([0.3, -0.2], [1e-3, 2e-3], [0.5, 0.1]):
        j = torch.func.jacfwd(twisted)(torch.tensor(u, dtype=torch.float64))
        expected = 4 * abs(u[0] ** 3 - u[1] ** 3)
        assert math.isclose(abs(float(torch.linalg.det(j))), expected, rel_tol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_one_direction_and_a_coupled_coordinate(k):
    """The surface (t^k + w², w, t w): on its slice w = 0, and in (t, w)."""

    def area(t, w):  # |∂_t × ∂_w|
        s = k * t ** (k - 1)
        return math.sqrt(w * w + (2 * w * w - k * t**k) ** 2 + s * s)

    def curvature(t, w):  # (LN - M²)/det² with normal ∂_t × ∂_w = (-w, 2w² - k t^k, s)
        s = k * t ** (k - 1)
        return (2 * k * (k - 1) * t ** (k - 2) * w * w - s * s) / area(t, w) ** 4

    f = umbrella(k)
    for t, w in ((0.3, 0.2), (0.05, -0.01)):
        found = theory.sectional_curvature(f, [t, w], *AXES).value
        assert math.isclose(found, curvature(t, w), rel_tol=1e-9)

    def edge(bound):
        return (k * k * bound) ** (-1 / (2 * (k - 1)))

    def on_slice(bound):
        return quad(lambda t: area(t, 0), 0, edge(bound))[0]  # up to (1 + t²)², 1 here

    def in_both(bound):
        t0, w0 = edge(bound), bound**-0.5  # scales of the region
        t = t0 * np.logspace(-6, 3, 2000)
        w = w0 * np.logspace(-6, 3, 1200)
        tt, ww = np.meshgrid(t, w, indexing="ij")
        s = k * tt ** (k - 1)
        det = np.sqrt(ww**2 + (2 * ww**2 - k * tt**k) ** 2 + s**2)
        value = np.abs(2 * k * (k - 1) * tt ** (k - 2) * ww**2 - s**2) / det**4
        inside = np.where((value > bound) & (tt < 0.5), det, 0) * tt * ww
        return 2 * inside.sum()  # uniform steps in log t and log w

    for volume, coupled_count in ((on_slice, 0), (in_both, 1)):
        m = 1e12
        measured = math.log(volume(m) / volume(100 * m)) / math.log(100)
        expected = theory.curvature_volume(k, coupled=coupled_count)
        assert abs(measured - float(expected)) < 0.02
    assert theory.curvature_volume(k) == Fraction(k, 2 * (k - 1))


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: theory.curvature_volume(1), ValueError, "k: "),
        (lambda: theory.curvature_volume([2, 2]), TypeError, "k: "),
        (lambda: theory.curvature_volume(2, coupled=-1), ValueError, "coupled: "),
        (lambda: theory.leading_scores(straight, [0.0, 0], []), ValueError, "directions: "),
        (lambda: theory.leading_scores(straight, [0.0, 0], 3), TypeError, "directions: "),
        (lambda: theory.leading_scores(straight, [0.0, 0], [[0.0, 0]]), ValueError, "directions"),
        (lambda: theory.leading_scores(straight, [0.0, 0], AXES, max_order=9), ValueError, "max_o"),
        (
            lambda: theory.curvature_volume(theory.leading_scores(lambda u: u, [0.0, 0], AXES)),
            ValueError,
            "k: ",
        ),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=f"^{name}"):
        call()
