"""Networks whose (λ, m) or symmetries are known."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast import read_triple
from deaddir_fast.theory import reduced_rank_local
from reading.functions import holds

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
D = torch.float64
Q = Fraction


def data(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=D)


def linear_chain(*widths: int) -> nn.Sequential:
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    ("depth", "dead"),
    [(2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (5, 1), (6, 1), (6, 2)],
)
def test_scalar_chain(depth: int, dead: int) -> None:
    """w_1 … w_L with q zero factors: K ~ (product of those)², λ = 1/2, m = q."""
    model = linear_chain(*[1] * (depth + 1))
    for i, layer in enumerate(model):
        layer.weight.data.fill_(0.0 if i < dead else 1.1)
    assert holds(read_triple(model, data(5, 1), likelihood="gaussian"), Q(1, 2), dead)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_chain_with_a_dead_unit(depth: int) -> None:
    """diag(1, 0) in every layer: 3 regular directions and one product of L free scalars."""
    model = linear_chain(*[2] * (depth + 1))
    for i, layer in enumerate(model):
        layer.weight.data = torch.diag(torch.tensor([1 + 0.1 * i, 0.0], dtype=D))
    assert holds(read_triple(model, data(20, 2), likelihood="gaussian"), Q(2), depth)


def stratum(m: int, n: int, h: int, r: int, p: int, q: int) -> nn.Sequential:
    """Two layers with rank(BA) = r, rank A = p, rank B = q, in random bases of all three spaces."""
    a, b = torch.zeros(h, m, dtype=D), torch.zeros(n, h, dtype=D)
    a[:p, :p] = torch.eye(p, dtype=D)
    for row, unit in enumerate([*range(r), *range(p, p + q - r)]):
        b[row, unit] = 1.0
    frames = [torch.eye(k, dtype=D) + 0.3 * data(k, k, seed=k) for k in (m, n, h)]
    model = linear_chain(m, h, n)
    model[0].weight.data = frames[2] @ a @ frames[0]
    model[1].weight.data = frames[1] @ b @ torch.linalg.inv(frames[2])
    return model


def strata(limit: int) -> list[tuple[int, ...]]:
    found = []
    for m, n, h in product(range(1, limit + 1), repeat=3):
        for r in range(min(m, n, h) + 1):
            for p in range(r, min(m, h) + 1):
                found += [(m, n, h, r, p, q) for q in range(r, min(n, h, h + r - p) + 1)]
    return found


DEEPEST = [(2, 2, 1, 0, 0, 0), (2, 1, 1, 0, 1, 0), (2, 2, 2, 1, 1, 1), (2, 2, 2, 1, 2, 1)]


@pytest.mark.parametrize("case", DEEPEST, ids=str)
def test_reduced_rank_strata(case: tuple[int, ...]) -> None:
    exact = reduced_rank_local(*case)
    found = read_triple(stratum(*case), data(20, case[0]), likelihood="gaussian")
    holds(found, exact.rlct, exact.multiplicity)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in strata(4) if c not in DEEPEST], ids=str)
def test_all_reduced_rank_strata(case: tuple[int, ...]) -> None:
    """All 705 strata of widths up to 4; where the fibre is smooth nothing is left open."""
    m, n, h, r, p, q = case
    exact = reduced_rank_local(*case)
    found = read_triple(stratum(*case), data(20, m), likelihood="gaussian")
    resolved = holds(found, exact.rlct, exact.multiplicity)
    smooth = 0 in (m - p, n - q, h + r - p - q)
    assert resolved or not smooth


def relu_net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    model[0].bias.data.fill_(0.5)
    return model


def test_relu_network_is_smooth_up_to_rescaling() -> None:
    found = read_triple(relu_net(), data(60, 2), likelihood="gaussian")
    assert found.directions.count("gauge") == 3
    assert set(found.directions.kinds) == {"gauge"}
    assert holds(found, Q(17 - 3, 2), 1)


def test_dead_relu_unit() -> None:
    """A unit that never fires costs its 2 + 1 + 2 parameters; nothing in it is singular."""
    model = relu_net()
    model[0].bias.data[0] = -50.0
    found = read_triple(model, data(60, 2), likelihood="gaussian")
    assert holds(found, Q(17 - 5 - 2, 2), 1)
    assert found.directions.count("singular") == 0
    assert found.directions.count("fibre") + found.directions.count("gauge") == 7


def test_blank_input() -> None:
    """An input that is always 0: its 3 weights are dead and flat."""
    x = data(60, 2)
    x[:, 1] = 0.0
    found = read_triple(relu_net(), x, likelihood="gaussian")
    assert found.directions.count("singular") == 0
    # Units 0 and 2 are on for all samples: one affine map, 4; unit 1 is on for some: 2 + 2 - 1.
    holds(found, Q(4 + 3, 2), 1)
    weights = found.directions.directions["0.weight"]
    assert torch.linalg.matrix_rank(weights[:, :, 1]) == 3


def test_unit_on_its_kink() -> None:
    """Zero incoming weights and bias, outgoing ones not: unresolved, never a confident number."""
    model = relu_net()
    model[0].weight.data[0] = 0.0
    model[0].bias.data[0] = 0.0
    found = read_triple(model, data(60, 2), likelihood="gaussian")
    assert not found.resolved
    # Along its bias the unit is a constant, which the output bias cancels: next to the kink the
    # network is smooth with two more live directions than with the unit off.
    assert found.lower <= Q(10 + 2, 2) <= found.upper


class Tanh(nn.Module):
    """x -> b · tanh(a x) without biases."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.a = nn.Linear(inputs, hidden, bias=False).double()
        self.b = nn.Linear(hidden, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize(
    ("inputs", "multiplicity"), [(1, 2), (2, 1), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_tanh_unit_at_zero(inputs: int, multiplicity: int) -> None:
    """Ideal b·(a_1, …, a_d): λ = 1/2, tied with the blow-up of a only for one input."""
    model = Tanh(inputs, 1)
    model.a.weight.data.zero_()
    model.b.weight.data.zero_()
    found = read_triple(model, data(20, inputs), likelihood="gaussian")
    assert holds(found, Q(1, 2), multiplicity) or inputs > 2


def test_zero_tanh_unit_beside_a_live_one() -> None:
    model = Tanh(1, 2)
    model.a.weight.data = torch.tensor([[0.8], [0.0]], dtype=D)
    model.b.weight.data = torch.tensor([[1.2, 0.0]], dtype=D)
    assert holds(read_triple(model, data(20, 1), likelihood="gaussian"), Q(3, 2), 2)


def test_duplicated_tanh_units() -> None:
    """Two equal units: b_1 + b_2 and a live shift, then b_1 δ² of order 2: 1 + 1/4."""
    model = Tanh(1, 2)
    model.a.weight.data.fill_(0.8)
    model.b.weight.data = torch.tensor([[1.2, 0.7]], dtype=D)
    assert holds(read_triple(model, data(20, 1), likelihood="gaussian"), Q(5, 4), 1)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 2, bias=False)
        self.up = nn.Linear(3, 2, bias=False)
        self.down = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_gated_unit() -> None:
    """up and down rescale per unit; all else is live."""
    torch.manual_seed(0)
    found = read_triple(Gated().double(), data(40, 3), likelihood="gaussian")
    assert found.directions.count("gauge") == 2
    assert holds(found, Q(16 - 2, 2), 1)


def test_gain_of_a_norm() -> None:
    """The gain of a norm times the layer behind it: rescaling, not a singularity."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(3, bias=False)
            self.out = nn.Linear(3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(x))

    torch.manual_seed(0)
    found = read_triple(Net().double(), data(30, 3), likelihood="gaussian")
    # The norm's outputs sum to zero, so one combination of the three products is not seen.
    assert found.rank == 2
    assert found.directions.count("gauge") >= 3
    assert holds(found, Q(1), 1)


def test_softmax_shift() -> None:
    """Linear softmax regression: c − 1 classes are live; the Gaussian sees all c."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    assert holds(read_triple(model, data(30, 3), likelihood="categorical"), Q(8, 2), 1)
    assert holds(read_triple(model, data(30, 3), likelihood="gaussian"), Q(12, 2), 1)


class Tokens(nn.Module):
    """Embedding and a shared or separate output layer."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def test_unused_tokens() -> None:
    """Embeddings of tokens that do not occur are flat."""
    torch.manual_seed(0)
    found = read_triple(Tokens().double(), torch.tensor([0, 1, 2, 0, 1]), likelihood="gaussian")
    # E_used (3, 2) and W (4, 2): a product of rank 2, up to GL(2).
    assert holds(found, Q(6 + 8 - 4, 2), 1)
    assert found.directions.count("singular") == 0


def test_tied_weights() -> None:
    """E Eᵀ of rank 2: 8 parameters up to O(2)."""
    torch.manual_seed(0)
    found = read_triple(Tokens(tied=True).double(), torch.arange(4), likelihood="gaussian")
    assert found.directions.dimension == 8
    assert holds(found, Q(8 - 1, 2), 1)


def test_sequence_outputs() -> None:
    """Tokens within a sample count as separate equations."""
    torch.manual_seed(0)
    model = Tokens().double()
    found = read_triple(model, torch.tensor([[0, 1], [2, 3]]), likelihood="categorical")
    assert found.directions.rows == 2 * 2 * 4
    # Logits E Wᵀ up to GL(2) and a shift of all classes by W -> W + 1 vᵀ.
    assert found.rank == 8 + 8 - 4 - 2


def test_pooling_ties_are_not_resolved() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 2)
            self.conv.weight.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool1d(self.conv(x), 3).flatten(1)

    found = read_triple(Net().double(), data(10, 4)[:, None], likelihood="gaussian")
    assert not found.resolved


def test_precision_and_structure_of_inputs() -> None:
    """fp32 models are read in fp64; dict and tuple inputs; buffers are no parameters."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.register_buffer("gain", torch.ones(2))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.inner(a) * self.gain + b

    torch.manual_seed(0)
    model = Net()
    a, b = data(9, 2).float(), data(9, 2, 1).float()
    for inputs in ({"a": a, "b": b}, (a, b)):
        assert holds(read_triple(model, inputs, likelihood="gaussian"), Q(3), 1)
    assert model.inner.weight.dtype == torch.float32


def test_frozen_parameters_count() -> None:
    """λ is a property of the parametrisation: requires_grad does not enter."""
    model = linear_chain(2, 2, 1)
    free = read_triple(model, data(9, 2), likelihood="gaussian")
    model[0].requires_grad_(False)
    frozen = read_triple(model, data(9, 2), likelihood="gaussian")
    assert (free.rlct, free.rank) == (frozen.rlct, frozen.rank) == (Q(1), 2)
    assert not model[0].weight.requires_grad
    assert model[1].weight.requires_grad
