"""The whitened Jacobian and its spectrum against dense autograd and exact ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.fisher.jacobian import (
    decompose,
    rank_on,
    whitened_coefficients,
    whitened_jacobian,
)
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.graph import call_model, readable_attention
from deaddir_fast.nets.jet import JetProgram
from deaddir_fast.nets.space import ParameterSpace

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Attention(nn.Module):
    """Tokens -> embedding -> attention -> logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.head(h + self.attend(h, h, h, need_weights=False)[0])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4, bias=False)
        self.up = nn.Linear(3, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.down = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


def cases() -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    tokens = torch.tensor([[0, 1, 2], [3, 1, 0], [2, 2, 1]])
    image = torch.randn(4, 1, 6, 6)
    conv = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3)
    )
    return {
        "tanh mlp": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), x),
        "relu mlp": (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), x),
        "gated": (Gated(), x),
        "conv": (conv, image),
        "attention": (Attention(), tokens),
    }


def dense_fisher(model: nn.Module, inputs: Any, name: str) -> Tensor:
    """mean_n Σ_t JᵀH J with H the Hessian of KL in the outputs, all by torch.func."""
    state = {k: v.detach() for k, v in model.named_parameters()}
    with readable_attention():
        rows = torch.func.jacrev(lambda s: call_model(model, s, inputs))(state)
        z = call_model(model, state, inputs).detach()
    jacobian = torch.cat([rows[k].flatten(z.ndim) for k in state], -1)
    jacobian = jacobian.reshape(-1, z.shape[-1], jacobian.shape[-1])
    flat = z.reshape(-1, z.shape[-1])

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        if name == "gaussian":
            return 0.5 * (a - b).square().sum()
        if name == "categorical":
            return (a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum()
        if name == "poisson":
            return (a.exp() * (a - b) - a.exp() + b.exp()).sum()
        q, p = torch.sigmoid(b), torch.sigmoid(a)
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()

    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1])
    for a, j in zip(flat, jacobian, strict=True):
        metric = torch.func.hessian(lambda b, a=a: divergence(a, b))(a)
        total += j.T @ metric @ j
    return total / z.shape[0]


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["gaussian", "categorical", "bernoulli", "poisson"])
@pytest.mark.parametrize("case", ["tanh mlp", "relu mlp", "gated", "conv", "attention"])
def test_square_is_the_exact_fisher(case: str, name: str) -> None:
    model, inputs = cases()[case]
    model.requires_grad_(False)
    space = ParameterSpace.of(model)
    base = {k: v.detach() for k, v in model.named_parameters()}
    program = JetProgram(model, inputs)
    found = whitened_jacobian(program, space, likelihoods.get(name), base=base)
    exact = dense_fisher(model, inputs, name)
    torch.testing.assert_close(
        found.T @ found, exact, rtol=1e-10, atol=1e-10 * float(exact.abs().max())
    )


def test_whitened_rows() -> None:
    """Gaussian: rows divided by √n, flattened sample by sample."""
    outputs = torch.randn(4, 3)
    change = torch.randn(5, 4, 3)
    rows = whitened_coefficients(change, outputs, likelihoods.get("gaussian"))
    torch.testing.assert_close(rows, change.reshape(5, 12) / 2)


@pytest.mark.parametrize(("rows", "d", "rank"), [(30, 6, 4), (6, 30, 4), (8, 8, 8), (40, 5, 0)])
def test_split_of_exact_rank(rows: int, d: int, rank: int) -> None:
    left = torch.linalg.qr(torch.randn(rows, rows))[0][:, :rank]
    right = torch.linalg.qr(torch.randn(d, d))[0][:, :rank]
    values = 10.0 ** -torch.arange(rank)
    split = decompose(left * values @ right.T)
    assert (split.rank, split.rows, split.ambiguous) == (rank, rows, 0)
    assert split.dead is not None
    assert split.dead.shape == (d, d - rank)
    torch.testing.assert_close(split.values[:rank], values, rtol=1e-10, atol=0)
    basis = torch.cat([split.live, split.dead], 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(d))
    torch.testing.assert_close(right.T @ split.dead, torch.zeros(rank, d - rank))
    torch.testing.assert_close(split.left @ (split.left.T @ left), left)


def test_values_between_zero_and_live_are_counted() -> None:
    tolerance = decompose(torch.eye(4)).tolerance
    split = decompose(torch.diag(torch.tensor([1.0, 1.0, 30 * tolerance, tolerance / 30])))
    assert (split.rank, split.ambiguous) == (3, 1)
    assert decompose(torch.eye(4)).ambiguous == 0


def test_gap() -> None:
    split = decompose(torch.diag(torch.tensor([1.0, 1e-3, 1e-18])))
    assert split.rank == 2
    assert split.gap > 1e9


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_on_part_of_the_samples(rank: int) -> None:
    """Samples 0, 2, 4 span all of the rank only if their own rows do."""
    samples, per, d = 6, 2, 5
    rows = torch.zeros(samples, per, d)
    for k in range(rank):
        rows[2 * k, 0, k] = 1.0 + k  # on even samples
    split = decompose(rows.reshape(-1, d))
    assert rank_on(split, samples, 1) == rank_on(split, samples, 2) == rank
    odd = torch.roll(rows, 1, 0)
    assert rank_on(decompose(odd.reshape(-1, d)), samples, 2) == 0
