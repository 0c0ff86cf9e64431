"""Ray orders on cases whose order is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.nets.jet import JetProgram
from deaddir_fast.nets.orders import RayOrders, ray_orders

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Point(nn.Module):
    """theta -> function(theta), the same for every sample: outputs without data."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: list[float]):
        super().__init__()
        self.function = function
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.theta).expand(x.shape[0], -1)


def read(
    function: Callable[[Tensor], Tensor],
    start: list[float],
    directions: list[list[float]],
    likelihood: str = "gaussian",
    max_order: int = 8,
    **options: float,
) -> RayOrders:
    u = {"theta": torch.tensor(directions, dtype=torch.float64)}
    x = torch.zeros(1, 1, dtype=torch.float64)
    model = Point(function, start)
    return ray_orders(model, x, u, likelihood=likelihood, max_order=max_order, **options)


# --- exact orders -------------------------------------------------------------------------------


def test_sum_of_powers_in_a_random_rotation() -> None:
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(5, 5).double())[0]

    def powers(theta: Tensor) -> Tensor:
        y = rotation @ theta
        return torch.stack([y[i] ** (i + 1) for i in range(5)])

    r = read(powers, [0.0] * 5, rotation.tolist())
    assert r.tolist() == [1, 2, 3, 4, 5]
    assert bool(r.resolved.all())
    # The coefficient is exactly 1: K = 1/2 t^{2k}.
    assert torch.allclose(r.leading, torch.ones(5).double(), rtol=1e-13)
    assert all(v.startswith(f"order {k}") for k, v in enumerate(r.verdicts, 1))
    assert float(r.gap.max()) < 1e-14
    # A direction mixing all of them is regular.
    assert read(powers, [0.0] * 5, [[1.0, 2.0, 3.0, 4.0, 5.0]]).tolist() == [1]


@pytest.mark.parametrize(
    ("function", "start", "direction", "order", "leading"),
    [
        (lambda w: torch.stack([w[1] - w[0] ** 2]), [0, 0], [1, 0], 2, 1.0),
        (lambda w: torch.stack([w[1] - w[0] ** 2]), [0, 0], [0, 1], 1, 1.0),
        (lambda w: torch.stack([(w[1] - w[0] ** 2) ** 2]), [0, 0], [1, 0], 4, 1.0),
        (lambda w: torch.stack([w[0] * w[1] - 1]), [1, 1], [1, -1], 2, 0.25),
        (lambda w: torch.stack([w[0] * w[1]]), [0, 0], [1, 0], math.inf, None),
        (lambda w: torch.stack([w[0] * w[1]]), [0, 0], [1, 1], 2, 0.25),
        (lambda w: torch.stack([w[0] * w[1] ** 2]), [0, 0], [1, 1], 3, 0.125),
        (lambda w: torch.stack([w[1] ** 2 - w[0] ** 3]), [0, 0], [1, 0], 3, 1.0),
        (lambda w: torch.stack([w[0], w[1] * w[2]]), [0, 0, 0], [0, 1, 1], 2, 0.25),
        (lambda w: torch.stack([w[0].sin() - w[0]]), [0], [1], 3, 1 / 36),
    ],
)
def test_polynomial_examples(
    function: Callable[[Tensor], Tensor],
    start: list[float],
    direction: list[float],
    order: float,
    leading: float | None,
) -> None:
    r = read(function, start, [direction])
    assert r.tolist() == [order]
    assert bool(r.resolved[0])
    if leading is None:
        assert r.verdicts[0].startswith("flat to order 8")
        assert math.isnan(float(r.leading[0]))
    else:
        assert float(r.leading[0]) == pytest.approx(leading, rel=1e-12)


def test_two_tanh_units() -> None:
    x = torch.linspace(-2, 2, 9).double()

    def units(w: Tensor) -> Tensor:
        a, b, c, d = w.unbind()
        return a * torch.tanh(b * x) + c * torch.tanh(d * x)

    r = read(units, [0.0] * 4, [[1, 1, 0, 0], [2, 1, 1, -2], [1, 1, -1, 1], [1, 0, 0, 0]])
    assert r.tolist() == [2, 4, math.inf, math.inf]


# Mixtures of normal densities as a categorical distribution over a fine grid of cells.
GRID = torch.linspace(-11, 11, 1501, dtype=torch.float64)


def normal(mean: Tensor, variance: Tensor | float = 1.0) -> Tensor:
    spread = torch.as_tensor(variance, dtype=torch.float64)
    return -((GRID - mean) ** 2) / (2 * spread) - spread.log() / 2


def mixture(*parts: tuple[Tensor | float, Tensor]) -> Tensor:
    return sum(w * density.exp() for w, density in parts).log()  # type: ignore[union-attr]  # not empty


def test_mixture_anchors() -> None:
    def two(b: Tensor) -> Tensor:
        return mixture((0.5, normal(-b)), (0.5, normal(b)))

    def third_cumulant(b: Tensor) -> Tensor:
        left = 1 - 2 * b * b
        return mixture((1 / 3, normal(2 * b, left)), (2 / 3, normal(-b, left)))

    def fourth_cumulant(b: Tensor) -> Tensor:
        return mixture((0.5, normal(b, 1 - b * b)), (0.5, normal(-b, 1 - b * b)))

    cases = [(two, 2, 1 / 4), (third_cumulant, 3, 1 / 3), (fourth_cumulant, 4, 1 / 12)]
    for density, order, constant in cases:
        r = read(lambda w, f=density: f(w[0]), [0.0], [[1.0]], "categorical", max_order=5)
        assert r.tolist() == [order]
        assert float(r.leading[0]) / 2 == pytest.approx(constant, rel=1e-8)  # K = constant t^{2k}


def test_mixture_with_vanishing_weight() -> None:
    def density(w: Tensor) -> Tensor:
        return mixture((1 - w[0], normal(torch.zeros(()).double())), (w[0], normal(w[1])))

    r = read(density, [0.0, 0.0], [[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], "categorical", 5)
    assert r.tolist() == [2, math.inf, math.inf]
    # K = t^4 / 2 on (w, m) = (t, t), that is t = radius / sqrt(2).
    assert float(r.leading[0]) / 2 == pytest.approx(1 / 8, rel=1e-8)


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("rotated", [False, True])
def test_linear_chain_with_a_dead_unit_has_order_depth(depth: int, rotated: bool) -> None:
    torch.manual_seed(depth)
    width = 4
    net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)]).double()
    direction = {}
    turns = [torch.eye(width).double()] + [
        torch.linalg.qr(torch.randn(width, width).double())[0] if rotated else torch.eye(width)
        for _ in range(depth - 1)
    ]
    turns = [t.double() for t in turns] + [torch.eye(width).double()]
    with torch.no_grad():
        for i, layer in enumerate(net):
            u = torch.zeros(width, width).double()
            if i > 0:
                layer.weight[:, 0] = 0
            if i < depth - 1:
                layer.weight[0] = 0
            rows = range(width) if i == depth - 1 else [0]
            columns = range(width) if i == 0 else [0]
            for a in rows:
                for b in columns:
                    u[a, b] = torch.randn(())
            layer.weight.copy_(turns[i + 1] @ layer.weight @ turns[i].T)
            direction[f"{i}.weight"] = (turns[i + 1] @ u @ turns[i].T)[None]
    r = ray_orders(net, torch.randn(8, width).double(), direction, likelihood="gaussian")
    assert r.tolist() == [depth]
    assert bool(r.resolved[0])


def block(function: Callable[[Tensor], Tensor], gated: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
            self.down = nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = function(self.gate(x))
            return self.down(h * self.up(x) if gated else h)

    model = Block().double()
    names = ["gate.weight", "down.weight"] + (["up.weight"] if gated else [])
    direction = {k: torch.zeros(1, *model.get_parameter(k).shape).double() for k in names}
    with torch.no_grad():  # unit 0 is dead
        model.gate.weight[0], model.up.weight[0], model.down.weight[:, 0] = 0, 0, 0
    for name in names:
        if name == "down.weight":
            direction[name][0, :, 0] = 1
        else:
            direction[name][0, 0] = 1
    return model, direction


@pytest.mark.parametrize(
    ("function", "gated", "order"),
    [(torch.tanh, False, 2), (F.gelu, False, 2), (F.silu, True, 3), (torch.relu, False, 2)],
)
def test_blocks_with_a_dead_unit(
    function: Callable[[Tensor], Tensor], gated: bool, order: int
) -> None:
    torch.manual_seed(0)
    model, direction = block(function, gated)
    r = ray_orders(model, torch.randn(16, 3).double(), direction, likelihood="gaussian")
    assert r.tolist() == [order]
    if function is torch.relu:  # dead unit: exactly on the kink, both sides of order 2
        assert int(r.kinks[0]) == 16
        assert r.orders_minus.tolist() == [order]
        assert "both sides agree" in r.verdicts[0]


def test_softmax_does_not_see_a_common_shift() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    u = torch.randn(1, 6).double()
    shift = {"2.weight": u[:, None, :].expand(1, 4, 6).contiguous()}
    x = torch.randn(9, 5).double()
    flat = ray_orders(net, x, shift)
    assert flat.tolist() == [math.inf]
    assert flat.verdicts[0].startswith("flat to order 8")
    assert ray_orders(net, x, shift, likelihood="gaussian").tolist() == [1]


def test_rescaling_gauge() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    s = torch.randn(3, 8).double()
    tangent = {
        "0.weight": s[:, :, None] * net[0].weight.detach(),
        "0.bias": s * net[0].bias.detach(),
        "2.weight": -s[:, None, :] * net[2].weight.detach(),
    }
    r = ray_orders(net, torch.randn(9, 5).double(), tangent)
    assert r.tolist() == [2, 2, 2]  # the straight line leaves the orbit at second order
    assert float(r.gap.max()) < 1e-13
    # Half of each entry more in one layer: no longer a gauge direction.
    tangent["2.weight"] = tangent["2.weight"] / 2
    assert ray_orders(net, torch.randn(9, 5).double(), tangent).tolist() == [1, 1, 1]


def test_leading_energy_is_the_curvature_of_a_regular_direction() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x = torch.randn(9, 5).double()
    u = {k: torch.randn(2, *v.shape).double() for k, v in net.named_parameters()}
    norm = sum(v.flatten(1).square().sum(1) for v in u.values()).sqrt()
    r = ray_orders(net, x, u)
    for j in range(2):
        step = {k: v[j] / norm[j] for k, v in u.items()}
        start = {k: v.detach() for k, v in net.named_parameters()}
        z, dz = torch.func.jvp(
            lambda p: torch.func.functional_call(net, p, (x,)), (start,), (step,)
        )
        p = z.softmax(-1)
        fisher = (p * dz**2).sum(-1) - (p * dz).sum(-1) ** 2
        assert float(r.leading[j]) == pytest.approx(float(fisher.mean()), rel=1e-12)


# --- kinks --------------------------------------------------------------------------------------


def test_one_sided_orders() -> None:
    r = read(lambda w: torch.stack([w[0].relu(), w[1] ** 2]), [0.0, 0.0], [[1, 1], [-1, 1], [0, 1]])
    assert r.tolist() == [1, 2, 2]
    assert r.orders_minus.tolist() == [2, 1, 2]
    assert r.kinks.tolist() == [1, 1, 0]
    assert r.verdicts[0].startswith("one-sided: order 1 for t > 0, order 2 for t < 0")
    assert r.resolved.tolist() == [False, False, True]
    assert any("relu" in note for note in r.notes)
    half = read(lambda w: w.relu(), [0.0], [[1.0]])
    assert half.tolist() == [1]
    assert half.orders_minus.tolist() == [math.inf]


# --- what is not resolved -----------------------------------------------------------------------


def test_a_coefficient_of_rounding_size_is_not_an_order() -> None:
    # a b c + d^2 with a b c cancelling to a few units of rounding, or to clearly more.
    def cancelling(w: Tensor) -> Tensor:
        return torch.stack([w[0] * (w[1] - w[2]) + w[0] ** 2])

    exact = read(cancelling, [0.0, 0.1, 0.1], [[1.0, 0.0, 0.0]])
    assert exact.tolist() == [2]
    rounding = read(cancelling, [0.0, 0.1, 0.1 + 2e-17], [[1.0, 0.0, 0.0]])
    assert rounding.tolist() == [2]
    open_ = read(cancelling, [0.0, 0.1, 0.1 + 4e-15], [[1.0, 0.0, 0.0]])
    assert math.isnan(open_[0])
    assert open_.verdicts[0].startswith("not resolved: the coefficient of t^1")
    assert not bool(open_.resolved[0])
    clear = read(cancelling, [0.0, 0.1, 0.1 + 1e-9], [[1.0, 0.0, 0.0]])
    assert clear.tolist() == [1]
    assert "rules below t = 1e-09 only" in clear.verdicts[0]
    assert clear.dominant(1e-3).tolist() == [2]
    assert clear.dominant(1e-12).tolist() == [1]


def test_uncertain_directions() -> None:
    # x + y^2 along a y axis that is off by 1e-9.
    tilted = [[1e-9, 1.0]]
    assert read(lambda w: w[:1] + w[1:] ** 2, [0.0, 0.0], tilted).tolist() == [1]
    known = read(lambda w: w[:1] + w[1:] ** 2, [0.0, 0.0], tilted, uncertainty=1e-8)
    assert known.tolist() == [2]
    live = read(lambda w: w[:1] + w[1:] ** 2, [0.0, 0.0], [[1.0, 1.0]], uncertainty=1e-8)
    assert live.tolist() == [1]


def test_rounding_that_hides_everything_is_said() -> None:
    # Single precision and a cancellation of 1e8 against 1e8: nothing smaller can be called zero.
    model = Point(lambda w: torch.stack([(w[0] + 1e8) - 1e8]), [0.0]).float()
    with torch.no_grad():
        model.theta.fill_(0.3)
    r = ray_orders(
        model, torch.zeros(1, 1), {"theta": torch.ones(1, 1)}, likelihood="gaussian", max_order=2
    )
    assert r.tolist() == [1]  # its derivative is exact all the same

    def washed(w: Tensor) -> Tensor:
        big = 1e6 * w[:1]
        return (big + 1e-3 * w[:1] ** 2) - big

    lost = Point(washed, [1.0]).float()
    r = ray_orders(
        lost, torch.zeros(1, 1), {"theta": torch.ones(1, 1)}, likelihood="gaussian", max_order=2
    )
    assert math.isnan(r[0])
    assert r.verdicts[0].startswith("not resolved")


def test_singular_operations_are_not_resolved() -> None:
    r = read(lambda w: (w * w).sum().sqrt().reshape(1), [0.0, 0.0], [[1.0, 1.0]])
    assert math.isnan(r[0])
    assert "not finite" in r.verdicts[0]


def test_single_precision_reads_the_same_orders() -> None:
    torch.manual_seed(0)
    model, direction = block(F.silu, True)
    r = ray_orders(
        model.float(),
        torch.randn(16, 3),
        {k: v.float() for k, v in direction.items()},
        likelihood="gaussian",
    )
    assert r.tolist() == [3]


# --- the result and the arguments ---------------------------------------------------------------


def test_behaves_as_a_sequence_of_orders() -> None:
    r = read(lambda w: torch.stack([w[0], w[1] ** 2]), [0.0, 0.0], [[1, 0], [0, 1]], max_order=3)
    assert len(r) == 2
    assert r[1] == 2.0 and isinstance(r[1], float)
    assert list(r) == [1.0, 2.0]
    assert np.asarray(r).tolist() == [1.0, 2.0]
    assert torch.equal(torch.as_tensor(np.asarray(r)), r.orders)
    assert r.energies.shape == r.rounding.shape == (4, 2)
    assert r.window.shape == (2, 2)


def test_program_and_base_are_reused() -> None:
    model = Point(lambda w: torch.stack([w[0] * w[1]]), [1.0, 1.0])
    x = torch.zeros(1, 1).double()
    program = JetProgram(model, x)
    u = {"theta": torch.tensor([[1.0, -1.0]]).double()}
    assert ray_orders(program, None, u, likelihood="gaussian").tolist() == [2]
    base = {"theta": torch.tensor([1.0, 2.0]).double()}
    assert ray_orders(program, None, u, likelihood="gaussian", base=base).tolist() == [1]


def test_memory_budget_does_not_change_the_reading() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x = torch.randn(9, 5).double()
    u = {k: torch.randn(3, *v.shape).double() for k, v in net.named_parameters()}
    whole = ray_orders(net, x, u, max_order=3)
    parts = ray_orders(net, x, u, max_order=3, memory=5000)
    assert torch.allclose(whole.energies, parts.energies, rtol=1e-12)
    assert whole.tolist() == parts.tolist()


def test_bad_arguments_are_named() -> None:
    net = nn.Linear(3, 2).double()
    x = torch.randn(4, 3).double()
    with pytest.raises(ValueError, match="no parameter called 'w'"):
        ray_orders(net, x, {"w": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"directions\['weight'\].*shape \(p, 2, 3\)"):
        ray_orders(net, x, {"weight": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="direction 1 has norm 0"):
        ray_orders(net, x, {"bias": torch.tensor([[1.0, 0.0], [0.0, 0.0]])})
    with pytest.raises(ValueError, match="max_order"):
        ray_orders(net, x, {"bias": torch.ones(1, 2)}, max_order=0)
    with pytest.raises(ValueError, match="likelihood"):
        ray_orders(net, x, {"bias": torch.ones(1, 2)}, likelihood="cauchy")
    with pytest.raises(TypeError, match="directions"):
        ray_orders(net, x, {})
