"""Sectional curvature against closed forms and against Christoffel symbols."""

import math

import pytest
import torch
from theory.maps import christoffel_curvature, umbrella, umbrella_curvature

from deaddir_fast import theory

RADII = torch.logspace(-4, 0, 25, dtype=torch.float64)
E1, E2 = [1.0, 0.0], [0.0, 1.0]


def sphere(radius):
    return lambda p: (
        radius * torch.stack([p[0].sin() * p[1].cos(), p[0].sin() * p[1].sin(), p[0].cos()])
    )


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("t", [1e-4, 1e-2, 0.7, 2.0])
def test_anchor_within_its_bound(k, t):
    found = theory.sectional_curvature(umbrella(k), [t, 0.0], E1, E2)
    expected = umbrella_curvature(k, t)
    assert found.resolved
    assert math.isclose(found.value, expected, rel_tol=1e-12)
    assert abs(found.value - expected) <= found.rounding
    assert math.isclose(found.metric[0], k * k * t ** (2 * k - 2), rel_tol=1e-12)


def test_sphere_paraboloid_and_cylinder():
    for radius in (0.5, 3.0):
        found = theory.sectional_curvature(sphere(radius), [0.9, -2.0], [1.0, 3.0], [0.2, -1.0])
        assert math.isclose(found.value, radius**-2, rel_tol=1e-12)
    bowl = theory.sectional_curvature(
        lambda p: torch.cat([p, 0.7 * p.square().sum(0, keepdim=True)]), [0.3, -1.1], E1, [1.0, 1]
    )
    expected = 1.4**2 / (1 + 1.4**2 * (0.3**2 + 1.1**2)) ** 2
    assert math.isclose(bowl.value, expected, rel_tol=1e-12)
    flat = theory.sectional_curvature(
        lambda p: torch.stack([p[0].cos(), p[0].sin(), p[1]]), [0.4, 5.0], E1, [1.0, 1]
    )
    assert flat.verdict == "zero to rounding"
    assert abs(flat.value) <= flat.rounding < 1e-12


def test_against_the_riemann_tensor_of_the_metric():
    draw = torch.Generator().manual_seed(3)
    a = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    b = torch.randn(5, 3, generator=draw, dtype=torch.float64)

    def mu(p):
        return torch.tanh(a @ p) + (b @ p).sin() * p[0]

    for _ in range(4):
        theta, u, v = torch.randn(3, 3, generator=draw, dtype=torch.float64)
        found = theory.sectional_curvature(mu, theta, u, v)
        expected = christoffel_curvature(mu, theta, u, v)
        assert math.isclose(found.value, expected, rel_tol=1e-9)
        # The surface in the plane is another manifold.
        slice_ = theory.sectional_curvature(mu, theta, u, v, within="plane")
        zero = torch.zeros(2, dtype=torch.float64)
        own = christoffel_curvature(
            lambda s, at=theta, x=u, y=v: mu(at + s[0] * x + s[1] * y),
            zero,
            torch.tensor(E1, dtype=torch.float64),
            torch.tensor(E2, dtype=torch.float64),
        )
        assert math.isclose(slice_.value, own, rel_tol=1e-9)
        assert abs(own - expected) > 1e-3 * abs(own)


def test_square_root_probabilities_have_curvature_one_quarter():
    """All distributions on c classes: the sphere of radius 2 (Amari 2016)."""
    draw = torch.Generator().manual_seed(0)
    theta, u, v = torch.randn(3, 4, generator=draw, dtype=torch.float64)

    def root(p):
        return 2 * torch.softmax(torch.cat([p, p.new_zeros(1)]), 0).sqrt()

    assert math.isclose(theory.sectional_curvature(root, theta, u, v).value, 0.25, rel_tol=1e-12)


def test_a_symmetry_leaves_the_curvature_of_the_image():
    found = theory.sectional_curvature(
        lambda p: sphere(2.0)(torch.stack([p[0] * p[2], p[1]])),
        [0.5, 0.3, 1.4],
        [1.0, 0, 0.3],
        [0, 1.0, 0.5],
    )
    assert (found.rank, found.dimension) == (2, 3)
    assert math.isclose(found.value, 0.25, rel_tol=1e-10)


@pytest.mark.parametrize(
    ("mu", "theta", "u", "v", "why"),
    [
        (umbrella(2), [0.0, 0.0], E1, E2, "vanishes along u"),
        (umbrella(2), [0.0, 0.0], E2, E1, "vanishes along v"),
        (umbrella(2), [0.3, 0.0], E1, [2.0, 0.0], "no plane"),
        (lambda p: torch.stack([p.sum(), p.sum().sin()]), [0.3, 0.1], E1, E2, "no plane"),
        (
            lambda p: torch.stack([p[0], p[1], p[2] ** 2, p[2] * p[0]]),
            [0.0, 0.3, 0.0],
            [1.0, 0, 0],
            [0, 1.0, 0],
            "not constant",
        ),
        (lambda p: torch.stack([p[0].abs().sqrt(), p[1]]), [0.0, 0.1], E1, E2, "not finite"),
    ],
)
def test_no_number_where_there_is_no_curvature(mu, theta, u, v, why):
    found = theory.sectional_curvature(mu, theta, u, v)
    assert found.verdict.startswith("unresolved: ")
    assert why in found.verdict
    assert math.isnan(found.value)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rate_along_the_dead_direction(k):
    ray = theory.curvature_ray(umbrella(k), [0.0, 0.0], [2.0, 0.0], E2, RADII)
    rate = ray.rate()
    assert rate.resolved
    assert rate.fit.integer_order == k
    assert abs(rate.exponent - 2 * (k - 1)) < 1e-6
    assert abs(rate.fisher.order - k) < 1e-6
    exact = [umbrella_curvature(k, float(t)) for t in RADII]
    assert torch.allclose(ray.curvature, torch.tensor(exact, dtype=torch.float64), rtol=1e-10)


def test_rate_with_another_exponent_is_refused():
    """Cuspidal edge (w, t² + w², t³ + w²): dead of order 2 at every w, curvature ~ 1/t."""
    ray = theory.curvature_ray(
        lambda p: torch.stack([p[1], p[0] ** 2 + p[1] ** 2, p[0] ** 3 + p[1] ** 2]),
        [0.0, 0.0],
        E1,
        E2,
        RADII,
    )
    rate = ray.rate()
    assert abs(rate.exponent - 1) < 0.02
    assert rate.fisher.integer_order == 2
    assert math.isnan(rate.order)
    assert "not 2(k-1)" in rate.verdict


def test_rate_in_a_plane_of_two_dead_directions_is_refused():
    """Rank-one matrices b aᵀ with a along e1, b along f1 away from 0; both directions are dead."""

    def product(p):
        return torch.outer(p[2:], p[:2])

    u, v = [1.0, 0, 1.0, 0], [0, 1.0, 0, 0.3]
    rate = theory.curvature_ray(product, [0.0] * 4, u, v, RADII).rate()
    assert math.isnan(rate.order)
    assert rate.verdict.startswith("unresolved: ")


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda f: theory.sectional_curvature(3, [0.1, 0], E1, E2), TypeError, "mu"),
        (lambda f: theory.sectional_curvature(lambda p: 3, [0.1, 0], E1, E2), TypeError, "mu"),
        (lambda f: theory.sectional_curvature(f, [[0.1, 0]], E1, E2), ValueError, "theta"),
        (lambda f: theory.sectional_curvature(f, ["a"], E1, E2), TypeError, "theta"),
        (lambda f: theory.sectional_curvature(f, [0.1, 0], [0.0, 0], E2), ValueError, "u"),
        (lambda f: theory.sectional_curvature(f, [0.1, 0], E1, [1.0]), ValueError, "v"),
        (
            lambda f: theory.sectional_curvature(f, [0.1, 0], E1, E2, within="x"),
            ValueError,
            "within",
        ),
        (lambda f: theory.curvature_ray(f, [0.1, 0], E1, E2, [math.nan]), ValueError, "radii"),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        call(umbrella(2))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rounding_bound_in_rotated_coordinates(k):
    """No coordinate is dead and no output is zero: everything small is a sum that cancels."""
    draw = torch.Generator().manual_seed(k)
    refused = []
    for t in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        q = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64)).Q
        p = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64)).Q

        def mu(x, q=q, p=p):
            y = q @ x
            return p[:, :4] @ torch.cat([umbrella(k)(y[:2]), y[2:]])

        found = theory.sectional_curvature(mu, t * q[0], q[0], q[1])
        if found.resolved:
            assert abs(found.value - umbrella_curvature(k, t)) <= found.rounding
        else:
            assert found.verdict.startswith("unresolved: ")
            refused.append(t)
    # J u is k t^(k-1): resolved down to about 1e-13, refused below.
    assert all(k * t ** (k - 1) < 1e-12 for t in refused)
