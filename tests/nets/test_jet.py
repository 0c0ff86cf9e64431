"""Taylor coefficients of networks against nested forward derivatives and exact cases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deaddir_fast.nets.graph import call_model, readable_attention
from deaddir_fast.nets.jet import JetProgram

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Function(nn.Module):
    """x -> f(x w): one weight matrix, any function behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x @ self.w)


class Attention(nn.Module):
    def __init__(self, causal: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        mask = torch.full((t, t), -math.inf, dtype=x.dtype).triu(1) if self.causal else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, 2, 3).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(6)
        self.gate, self.up, self.down = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


def convolutional() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net.eval()


def plain_layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0
) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred / ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def plain_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    split = plain_layer_norm(x.reshape(x.shape[0], groups, -1), None, eps=eps).reshape(x.shape)
    spread = (1, -1) + (1,) * (x.ndim - 2)
    return split * weight.reshape(spread) + bias.reshape(spread)


def use_plain_norms(patch: pytest.MonkeyPatch) -> None:
    """Norms in elementary operations: torch 2.13's own are wrong in nested forward mode.

    The second nested jvp of ``native_layer_norm`` disagrees with finite differences.
    """
    patch.setattr(F, "layer_norm", plain_layer_norm)
    patch.setattr(F, "group_norm", plain_group_norm)


def nested(model: nn.Module, inputs: Any, curves: dict[str, Tensor], order: int) -> Tensor:
    """The same coefficients by nested forward derivatives, curve by curve."""
    start = {k: v.detach() for k, v in model.named_parameters()}
    count = next(iter(curves.values())).shape[1]
    curves_out = []
    for j in range(count):

        def along(t: Tensor, j: int = j) -> Tensor:
            moved = dict(start)
            for name, c in curves.items():
                for q in range(c.shape[0]):
                    moved[name] = moved[name] + c[q, j] * t ** (q + 1)
            return call_model(model, moved, inputs)

        out, derivative = [], along
        zero = torch.zeros((), dtype=torch.float64)
        with readable_attention():
            for q in range(order + 1):
                out.append(derivative(zero).detach() / math.factorial(q))

                def derivative(t: Tensor, inner: Any = derivative) -> Tensor:
                    return torch.func.jvp(inner, (t,), (torch.ones_like(t),))[1]

        curves_out.append(torch.stack(out))
    return torch.stack(curves_out, 1)


def random_curves(model: nn.Module, powers: int, count: int) -> dict[str, Tensor]:
    return {
        k: 0.3 * torch.randn(powers, count, *v.shape, dtype=v.dtype)
        for k, v in model.named_parameters()
    }


def agree(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    for q, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), f"coefficient {q}"


def vector() -> Tensor:
    return torch.randn(3, 6)


def sequence() -> Tensor:
    return torch.randn(2, 4, 6)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), vector),
    "gelu": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)), sequence),
    "silu layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.LayerNorm(4), nn.Linear(4, 3)),
        vector,
    ),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4)), sequence),
    "attention": (lambda: Attention(False), sequence),
    "causal attention": (lambda: Attention(True), sequence),
    "fused causal attention": (FusedAttention, sequence),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(
            6, 2, 8, dropout=0.0, batch_first=True, activation="gelu"
        ),
        sequence,
    ),
    "swiglu": (SwiGLU, sequence),
    "conv": (convolutional, lambda: torch.randn(2, 2, 8, 8)),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 3, 3), lambda: torch.randn(2, 2, 4, 4)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7), nn.LogSoftmax(-1)),
        lambda: torch.randint(0, 7, (3, 4)),
    ),
    "bilinear": (lambda: nn.Bilinear(6, 6, 2), lambda: (torch.randn(3, 6), torch.randn(3, 6))),
    "gru": (Recurrent, sequence),
    "softplus over softmax": (
        lambda: Function(lambda x: F.softplus(x) / (1 + F.softmax(x, -1))),
        vector,
    ),
    "mish": (lambda: Function(F.mish), vector),
    "elu": (lambda: Function(F.elu), vector),
    "logsumexp": (lambda: Function(lambda x: x.logsumexp(-1, keepdim=True)), vector),
    "log sigmoid": (lambda: Function(F.logsigmoid), vector),
    "normalise": (lambda: Function(lambda x: F.normalize(x, dim=-1)), vector),
    "norms": (
        lambda: Function(lambda x: x.norm(3, dim=-1) + x.norm(1, dim=-1) * x.norm(dim=-1)),
        vector,
    ),
    "max times min": (
        lambda: Function(lambda x: x.max(-1)[0] * x.amin(-1) + torch.maximum(x, -x).exp().sum(-1)),
        vector,
    ),
    "powers": (lambda: Function(lambda x: (x * x + 1) ** 0.3 + x**3 + 2**x), vector),
    "inverse functions": (
        lambda: Function(lambda x: x.atan() + (x / 9).asin() * (x / 9).acos() + x.asinh()),
        vector,
    ),
    "products": (lambda: Function(lambda x: x.prod(-1) + x.std(-1) + x.cumsum(-1)[:, 2]), vector),
    "masked": (
        lambda: Function(lambda x: torch.where(x > 0, x.sin(), x.exp()).masked_fill(x > 2, 1.0)),
        vector,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_against_nested_derivatives(name: str) -> None:
    torch.manual_seed(0)
    make, data = MODELS[name]
    torch.set_default_dtype(torch.float64)
    try:
        model, inputs = make(), data()
        curves = random_curves(model, powers=2, count=2)
        jet = JetProgram(model, inputs).run(curves, 4)
        with pytest.MonkeyPatch.context() as patch:
            use_plain_norms(patch)
            expected = nested(model, inputs, curves, 4)
        agree(jet.coefficients, expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert jet.notes == ()
    assert jet.kinks.tolist() == [0, 0]


def mlp(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


def test_high_order_and_composition_of_curves() -> None:
    # Along s -> t + a t^2 the coefficients compose: substitute the polynomial into the line's.
    model, x = mlp(), torch.randn(5, 6).double()
    program = JetProgram(model, x)
    line = {k: v[:1] for k, v in random_curves(model, 1, 1).items()}
    order, a = 8, 0.7
    straight = program.run(line, order).coefficients
    bent = program.run({k: torch.cat([v, a * v]) for k, v in line.items()}, order).coefficients
    expected = torch.zeros_like(bent)
    for j in range(order + 1):
        for i in range(j + 1):  # (t + a t^2)^j = sum_i C(j, i) a^i t^(j + i)
            if j + i <= order:
                expected[j + i] += math.comb(j, i) * a**i * straight[j]
    agree(bent, expected, 1e-12)
    # And the polynomial is the function: at a small step the remainder is of order nine.
    t = 0.01
    moved = {k: dict(model.named_parameters())[k].detach() + t * v[0, 0] for k, v in line.items()}
    value = sum(straight[q, 0] * t**q for q in range(order + 1))
    assert torch.allclose(value, call_model(model, moved, x), rtol=0, atol=1e-14)


def test_missing_parameters_and_coefficients_are_zero() -> None:
    model, x = mlp(), torch.randn(5, 6).double()
    c = torch.randn(1, 2, 3, 4).double()
    few = JetProgram(model, x, names=["2.weight"]).run({"2.weight": c}, 3).coefficients
    zeros = {k: torch.zeros(3, 2, *v.shape).double() for k, v in model.named_parameters()}
    zeros["2.weight"][0] = c[0]
    assert torch.equal(few, JetProgram(model, x).run(zeros, 3).coefficients)
    assert torch.equal(few[2:], torch.zeros_like(few[2:]))  # linear in the last layer
    still = {k: torch.zeros_like(v) for k, v in zeros.items()}
    constant = JetProgram(model, x).run(still, 3).coefficients
    assert torch.equal(constant[0], model(x).detach().expand(2, -1, -1))
    assert not constant[1:].any()


def test_base_overrides_the_captured_parameters() -> None:
    first, second, x = mlp(0), mlp(1), torch.randn(5, 6).double()
    curves = random_curves(first, 1, 2)
    other = {k: v.detach() for k, v in second.named_parameters()}
    moved = JetProgram(first, x).run(curves, 3, base=other).coefficients
    agree(moved, JetProgram(second, x).run(curves, 3).coefficients, 1e-14)


@pytest.mark.parametrize("memory", [1, 20_000, 100_000])
def test_chunks_do_not_change_the_result(memory: int) -> None:
    torch.manual_seed(0)
    model = SwiGLU().double()
    x = torch.randn(7, 3, 6).double()
    curves = random_curves(model, 1, 5)
    program = JetProgram(model, x)
    whole = program.run(curves, 3)
    parts = program.run(curves, 3, memory=memory)
    agree(parts.coefficients, whole.coefficients, 1e-13)
    blocks = list(program.blocks(curves, 3, 1, memory=memory))
    assert len(blocks) > 1
    assert memory > 1 or len(blocks) == 35  # one curve on one sample at a time


def test_dtype_is_the_parameters() -> None:
    model = mlp().float()
    jet = JetProgram(model, torch.randn(5, 6)).run(random_curves(model, 1, 2), 3)
    assert jet.coefficients.dtype == torch.float32


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_cost_is_quadratic_and_matrix_products_are_few() -> None:
    model, x = mlp(), torch.randn(5, 6).double()
    program = JetProgram(model, x)
    curves = random_curves(model, 1, 2)
    work = []
    for order in (4, 8, 12, 16):
        with _Count() as count:
            program.run(curves, order)
        products = sum(count.calls[k] for k in ("mm", "bmm", "addmm"))
        assert products <= 8  # per layer: base and the rest, for each of two weight coefficients
        work.append(count.calls["mul"])
    second = [c - 2 * b + a for a, b, c in zip(work, work[1:], work[2:], strict=False)]
    # Cost a + b K + c K^2: second differences on an even grid are constant, third ones vanish.
    assert max(second) - min(second) <= 2
    assert work[-1] < 20 * work[0]


# --- kinks -------------------------------------------------------------------------------------


class Scalar(nn.Module):
    """One parameter per name, started at given values; the function gets them by keyword."""

    def __init__(self, function: Callable[..., Tensor], **start: float):
        super().__init__()
        self.function = function
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value).double()))

    def forward(self, x: Tensor) -> Tensor:
        values = dict(self.named_parameters())
        return torch.stack([self.function(**values)] * x.shape[0])


def scalar_jet(
    function: Callable[..., Tensor], curve: dict[str, list[float]], side: int, **start: float
) -> tuple[list[float], int]:
    program = JetProgram(Scalar(function, **start), torch.zeros(1, 1).double())
    curves = {k: torch.tensor(v).double()[:, None] for k, v in curve.items()}
    jet = program.run(curves, 3, side)
    return jet.coefficients[:, 0, 0].tolist(), int(jet.kinks[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("side", [1, -1])
def test_relu_on_the_kink(side: int, sign: float) -> None:
    got, kinks = scalar_jet(lambda w: w.relu(), {"w": [sign, 2.0]}, side, w=0.0)
    assert got == ([0, sign, 2, 0] if sign * side > 0 else [0, 0, 0, 0])
    assert kinks == 1


@pytest.mark.parametrize("side", [1, -1])
def test_first_non_vanishing_coefficient_decides(side: int) -> None:
    # w = -t^2: negative on both sides; w = t^3: positive for t > 0 only.
    assert scalar_jet(lambda w: w.relu(), {"w": [0, -1.0]}, side, w=0.0)[0] == [0, 0, 0, 0]
    assert scalar_jet(lambda w: w.abs(), {"w": [0, -1.0]}, side, w=0.0)[0] == [0, 0, 1, 0]
    assert scalar_jet(lambda w: w.abs(), {"w": [0, 0, 1.0]}, side, w=0.0)[0] == [0, 0, 0, side]


@pytest.mark.parametrize("side", [1, -1])
def test_ties_between_values(side: int) -> None:
    curve = {"a": [1.0, 0.0], "b": [1.0, 1.0]}
    start = {"a": 1.0, "b": 1.0}
    larger = scalar_jet(lambda a, b: torch.maximum(a, b), curve, side, **start)
    assert larger == ([1, 1, 1, 0], 1)
    smaller = scalar_jet(lambda a, b: torch.minimum(a, b), curve, side, **start)
    assert smaller == ([1, 1, 0, 0], 1)
    stacked = scalar_jet(lambda a, b: torch.stack([a, b]).amax(0), curve, side, **start)
    assert stacked == ([1, 1, 1, 0], 1)
    flipped = {"a": [1.0], "b": [2.0]}
    largest = scalar_jet(lambda a, b: torch.stack([a, b]).max(0)[0], flipped, side, **start)
    assert largest == ([1, 2 if side > 0 else 1, 0, 0], 1)


@pytest.mark.parametrize("side", [1, -1])
def test_clamp_leaky_and_jumps(side: int) -> None:
    got, _ = scalar_jet(lambda w: w.clamp(0, 1), {"w": [1.0]}, side, w=1.0)
    assert got == ([1, 0, 0, 0] if side > 0 else [1, 1, 0, 0])
    got, _ = scalar_jet(lambda w: F.leaky_relu(w, 0.5), {"w": [1.0]}, side, w=0.0)
    assert got == [0, 1 if side > 0 else 0.5, 0, 0]
    step = lambda w: torch.where(w > 0, 1 + w, w * w - 1)  # noqa: E731  # a one-line jump
    got, _ = scalar_jet(step, {"w": [1.0]}, side, w=0.0)
    assert got == ([1, 1, 0, 0] if side > 0 else [-1, 0, 1, 0])


def test_curves_decide_separately_and_off_kink_elements_do_not_count() -> None:
    program = JetProgram(Scalar(lambda w: w.relu(), w=0.0), torch.zeros(2, 1).double())
    jet = program.run({"w": torch.tensor([[1.0, -1.0, 0.0]]).double()}, 2)
    assert jet.coefficients[1, :, 0].tolist() == [1, 0, 0]
    assert jet.kinks.tolist() == [1, 1, 0]
    assert len(jet.notes) == 1
    assert "relu" in jet.notes[0] and "2 elements on a kink" in jet.notes[0]


@pytest.mark.parametrize("side", [1, -1])
def test_max_pool_ties_follow_the_curve(side: int) -> None:
    # Constant images times a weight: every window is tied at 0, and the tie breaks linearly.
    pool = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.MaxPool2d(2)).double()
    with torch.no_grad():
        pool[0].weight.zero_()
    x = torch.arange(16.0).double().reshape(1, 1, 4, 4) - 7
    jet = JetProgram(pool, x).run({"0.weight": torch.ones(1, 1, 1, 1, 1, 1).double()}, 2, side)
    expected = side * F.max_pool2d(side * x, 2)
    assert torch.equal(jet.coefficients[1, 0], expected)
    assert int(jet.kinks[0]) == 4


def test_rescaling_orbit_is_flat_but_its_tangent_is_not() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x = torch.randn(9, 5).double()
    s = torch.randn(4).double()
    order = 7
    powers = torch.stack([s**q / math.factorial(q) for q in range(1, order + 1)])
    minus = torch.stack([(-s) ** q / math.factorial(q) for q in range(1, order + 1)])
    orbit = {
        "0.weight": (powers[:, :, None] * net[0].weight.detach())[:, None],
        "0.bias": (powers * net[0].bias.detach())[:, None],
        "2.weight": (minus[:, None, :] * net[2].weight.detach())[:, None],
    }
    program = JetProgram(net, x)
    flat = program.run(orbit, order).coefficients
    assert float(flat[1:].abs().max()) < 1e-14
    tangent = program.run({k: v[:1] for k, v in orbit.items()}, order).coefficients
    assert float(tangent[1].abs().max()) < 1e-15
    assert float(tangent[2].abs().max()) > 0.01


# --- operations without a rule -----------------------------------------------------------------


def test_fallback_is_right_and_noted() -> None:
    torch.manual_seed(0)
    model = Function(lambda x: torch.special.i0(x) + torch.atan2(x, x.exp())).double()
    x = torch.randn(3, 6).double()
    curves = random_curves(model, 2, 2)
    jet = JetProgram(model, x).run(curves, 4)
    agree(jet.coefficients, nested(model, x, curves, 4))
    assert any("i0: no Taylor rule, differentiated by nested jvp" in n for n in jet.notes)
    assert any("atan2: no Taylor rule" in n for n in jet.notes)


def test_operations_without_any_derivative_are_refused() -> None:
    # torch returns a zero derivative for bessel_j0 without a word.
    model = Function(torch.special.bessel_j0).double()
    with pytest.raises(NotImplementedError, match="bessel_j0"):
        JetProgram(model, torch.randn(3, 6).double())


# --- arguments ---------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    model, x = mlp(), torch.randn(5, 6).double()
    program = JetProgram(model, x)
    good = {"2.weight": torch.randn(1, 2, 3, 4).double()}
    with pytest.raises(ValueError, match="order"):
        program.run(good, 0)
    with pytest.raises(ValueError, match="side"):
        program.run(good, 2, 0)
    with pytest.raises(ValueError, match="no parameter called 'w'"):
        program.run({"w": torch.zeros(1, 1)}, 2)
    with pytest.raises(ValueError, match=r"curves\['2.weight'\].*shape"):
        program.run({"2.weight": torch.zeros(1, 2, 4, 3)}, 2)
    with pytest.raises(ValueError, match="1 to 2 coefficients"):
        program.run({"2.weight": torch.zeros(3, 2, 3, 4)}, 2)
    with pytest.raises(ValueError, match="2 curves"):
        program.run({**good, "2.bias": torch.zeros(1, 3, 3)}, 2)
    with pytest.raises(TypeError, match="curves"):
        program.run({}, 2)
    with pytest.raises(ValueError, match="base"):
        program.run(good, 2, base={"2.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="lead with the 5 samples"):
        JetProgram(Function(lambda y: y.mean()).double(), x)
