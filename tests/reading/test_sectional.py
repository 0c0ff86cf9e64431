"""Curvature of models against the same maps as functions, and against the metric alone."""

import math
from fractions import Fraction

import pytest
import torch
from theory.maps import christoffel_curvature, umbrella, umbrella_curvature
from torch import nn
from torch.func import functional_call

import deaddir_fast as dd
from deaddir_fast import theory
from reading.functions import ONE, Function

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RADII = torch.logspace(-4, 0, 21, dtype=torch.float64)
DRAW = torch.Generator().manual_seed(7)


def along(model, vector):
    """A vector over all parameters as a direction."""
    parts, at = {}, 0
    for name, p in model.named_parameters():
        parts[name] = vector[at : at + p.numel()].reshape(p.shape)
        at += p.numel()
    return parts


def network(out):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, out)).double()
    x = torch.randn(5, 2, generator=DRAW, dtype=torch.float64)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=DRAW, dtype=torch.float64)
    return model, x


def square_roots(kind, z):
    """An isometric embedding of the outputs, written out."""
    if kind == "categorical":
        return 2 * torch.softmax(z, -1).sqrt()
    if kind == "bernoulli":  # on the circle of the two square roots, not by the angle
        return 2 * torch.stack([torch.sigmoid(z).sqrt(), torch.sigmoid(-z).sqrt()])
    return 2 * (z / 2).exp() if kind == "poisson" else z


@pytest.mark.parametrize("kind", ["gaussian", "categorical", "bernoulli", "poisson"])
@pytest.mark.parametrize("within", ["parameters", "plane"])
def test_networks_against_the_written_out_embedding(kind, within):
    model, x = network(4)
    names = [name for name, _ in model.named_parameters()]
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    u, v = torch.randn(2, len(theta), generator=DRAW, dtype=torch.float64)

    def mu(vector):
        z = functional_call(model, dict(zip(names, along(model, vector).values(), strict=True)), x)
        return square_roots(kind, z) / math.sqrt(len(x))

    found = dd.sectional_curvature(
        model, x, along(model, u), along(model, v), likelihood=kind, within=within
    )
    expected = theory.sectional_curvature(mu, theta, u, v, within=within)
    assert found.resolved
    assert math.isclose(found.value, expected.value, rel_tol=1e-8)
    assert (found.rank, found.dimension) == (expected.rank, expected.dimension)
    if within == "plane":
        zero = torch.zeros(2, dtype=torch.float64)
        axes = torch.eye(2, dtype=torch.float64)
        own = christoffel_curvature(
            lambda s: mu(theta + s[0] * u + s[1] * v).reshape(-1), zero, *axes
        )
        assert math.isclose(found.value, own, rel_tol=1e-7)


def test_all_distributions_on_a_sphere():
    """One input, free logits: curvature 1/4 in every plane; two inputs with the same: 1/4 too."""
    model = nn.Linear(1, 4).double()
    theta = torch.randn(3, 8, generator=DRAW, dtype=torch.float64)
    for x in (torch.ones(1, 1), torch.ones(2, 1)):
        u, v = along(model, theta[0]), along(model, theta[1])
        found = dd.sectional_curvature(model, x.double(), u, v)
        # Weight and bias do the same, and softmax ignores a common shift: 3 of 8 directions live.
        assert found.rank == 3
        assert math.isclose(found.value, 0.25, rel_tol=1e-10)


def test_the_sphere_adds_its_constant():
    """Gauss within the sphere of radius 2: 1/4 + (⟨II,II⟩ - |II|²)/area, II along the sphere."""
    model = Function(
        lambda w: torch.stack([w[0], w[1], w[0] * w[1], w[0] ** 2 + w[1] ** 2]), [0.4, -0.3]
    )
    u, v = ({"w": torch.tensor(e, dtype=torch.float64)} for e in ([1.0, 0.2], [0.0, 1.0]))
    found = dd.sectional_curvature(model, ONE, u, v)

    def mu(w):
        return 2 * torch.softmax(model.function(w), 0).sqrt()

    theta = model.w.detach()
    j = torch.func.jacfwd(mu)(theta)
    h = torch.func.jacfwd(torch.func.jacfwd(mu))(theta)
    frame = torch.linalg.qr(torch.cat([j, mu(theta)[:, None]], 1)).Q  # tangent plane and radius
    h = h - torch.einsum("ab,cb,cij->aij", frame, frame, h)
    a, b = u["w"], v["w"]
    uu, uv, vv = (torch.einsum("aij,i,j->a", h, p, q) for p, q in ((a, a), (a, b), (b, b)))
    g = j.T @ j
    area = (a @ g @ a) * (b @ g @ b) - (a @ g @ b) ** 2
    assert math.isclose(found.value, 0.25 + float((uu @ vv - uv @ uv) / area), rel_tol=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_rate_of_a_model(k):
    model = Function(umbrella(k), [0.0, 0.0])
    u, v = {"w": torch.tensor([1.0, 0])}, {"w": torch.tensor([0.0, 1])}
    ray = dd.curvature_ray(model, ONE, u, v, RADII, likelihood="gaussian")
    exact = torch.tensor([umbrella_curvature(k, float(t)) for t in RADII], dtype=torch.float64)
    assert torch.allclose(ray.curvature, exact, rtol=1e-8)
    rate = ray.rate()
    assert rate.resolved
    assert rate.fit.integer_order == k
    assert abs(rate.fisher.order - k) < 1e-6


def test_rate_of_a_dead_unit():
    """w2 tanh(w1 x) switched off, beside a live layer; order 2 along both its weights at once."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
            self.outer = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return self.outer * torch.tanh(x @ self.inner.T)

    model, x = Unit(), torch.randn(9, 2, generator=DRAW, dtype=torch.float64)
    u = {"inner": torch.tensor([[1.0, 0]]), "outer": torch.ones(1)}
    v = {"inner": torch.tensor([[0.0, 1]])}
    found = dd.curvature_ray(model, x, u, v, RADII, likelihood="gaussian")
    # v is dead at 0 too: its own metric decays, and the curvature falls faster than t^-2.
    rate = found.rate()
    assert rate.fisher.integer_order == 2
    assert math.isnan(rate.order)
    assert "not seen to be live" in rate.verdict


def test_a_kink_has_no_curvature():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
    model[0].weight.data.zero_()
    u = {"0.weight": torch.ones(2, 1)}
    v = {"2.bias": torch.tensor([1.0, 0])}
    found = dd.sectional_curvature(model, ONE + 1, u, v, likelihood="gaussian", within="plane")
    assert "kink" in found.verdict
    assert math.isnan(found.value)


def test_leading_scores_of_models():
    def read(function, point=(0.0, 0.0)):
        model = Function(function, point)
        return dd.leading_scores(
            model, ONE, {"w": torch.eye(2, dtype=torch.float64)}, likelihood="gaussian"
        )

    twisted = read(
        lambda w: (w[0] ** 2 + w[1] ** 2) * torch.stack([(w[0] + w[1]).cos(), (w[0] + w[1]).sin()])
    )
    assert twisted.verdict.startswith("dependent: ")
    with pytest.raises(ValueError, match=r"^k: the product law"):
        theory.curvature_volume(twisted)
    # Joint curves to Taylor order 12, out of reach of nested differentiation.
    free = read(lambda w: torch.stack([w[0] ** 3, w[1] ** 4, torch.tanh(w[0] * w[1]) ** 2]))
    assert free.orders == (3.0, 4.0)
    assert free.independent
    assert theory.curvature_volume(free) == Fraction(3, 4) + Fraction(4, 6)
    held = read(lambda w: torch.stack([w[0] ** 3, w[1] ** 4, torch.tanh(w[0] * w[1])]))
    assert held.verdict.startswith("mixed: ")
    flat = read(lambda w: torch.stack([w[0] ** 2, w[0] * w[1]]))
    assert flat.verdict.startswith("unresolved: direction 1 is flat")


def test_leading_scores_in_the_metric_of_the_likelihood():
    """Two logits that differ by a common shift only have no score: softmax does not see it."""
    model = Function(lambda w: torch.stack([w[0] ** 2, w[0] ** 2 + w[1] ** 2, w[0] ** 2]), [0.0, 0])
    eye = {"w": torch.eye(2, dtype=torch.float64)}
    gaussian = dd.leading_scores(model, ONE, eye, likelihood="gaussian")
    assert gaussian.independent
    softmax = dd.leading_scores(model, ONE, eye, likelihood="categorical")
    assert softmax.verdict.startswith("unresolved: direction 0 is flat")


class _Own(dd.Likelihood):
    name = "own"

    def whiten(self, z, dz):
        return dz

    kl = noise = label = score = None


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"model": 3}, TypeError, "model: "),
        ({"u": {}}, TypeError, "u: "),
        ({"u": {"x": torch.ones(2)}}, ValueError, "u: no parameter"),
        ({"v": {"w": torch.ones(3)}}, ValueError, r"v\['w'\]"),
        ({"v": {"w": torch.zeros(2)}}, ValueError, "v: "),
        ({"within": "x"}, ValueError, "within: "),
        ({"likelihood": "x"}, ValueError, "likelihood: "),
        ({"likelihood": _Own()}, TypeError, "likelihood: "),
    ],
)
def test_errors_name_the_argument(change, error, name):
    given = {
        "model": Function(umbrella(2), [0.3, 0.0]),
        "inputs": ONE,
        "u": {"w": torch.tensor([1.0, 0])},
        "v": {"w": torch.tensor([0.0, 1])},
        "likelihood": "gaussian",
    }
    _Own.__abstractmethods__ = frozenset()
    with pytest.raises(error, match=f"^{name}"):
        dd.sectional_curvature(**(given | change))


@pytest.mark.parametrize(
    ("directions", "error", "name"),
    [
        (3, TypeError, "directions: "),
        ({"w": torch.ones(0, 2)}, ValueError, "directions: "),
        ({"w": torch.ones(2, 3)}, ValueError, r"directions\['w'\]"),
    ],
)
def test_errors_of_leading_scores(directions, error, name):
    with pytest.raises(error, match=f"^{name}"):
        dd.leading_scores(Function(umbrella(2), [0.0, 0.0]), ONE, directions)
