"""Parameters as one vector and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deaddir_fast.nets.space import ParameterSpace


def space() -> tuple[nn.Module, ParameterSpace]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    return model, ParameterSpace.of(model)


def test_layout() -> None:
    model, flat = space()
    assert flat.names == ("0.weight", "0.bias", "2.weight")
    assert flat.sizes == (6, 2, 2)
    assert flat.dimension == sum(p.numel() for p in model.parameters())


def test_round_trip() -> None:
    _, flat = space()
    vectors = torch.randn(4, flat.dimension, dtype=torch.float64)
    blocks = flat.directions(vectors)
    assert {k: tuple(v.shape) for k, v in blocks.items()} == {
        "0.weight": (4, 2, 3),
        "0.bias": (4, 2),
        "2.weight": (4, 1, 2),
    }
    torch.testing.assert_close(flat.vectors(blocks, 4, vectors), vectors)
    single = flat.directions(vectors[0])
    assert single["0.weight"].shape == (2, 3)


def test_order_agrees_with_parameters() -> None:
    model, flat = space()
    state = {k: v.detach()[None] for k, v in model.named_parameters()}
    vector = flat.vectors(state, 1, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(
        vector[0], nn.utils.parameters_to_vector(model.parameters()).detach()
    )


def test_missing_names_are_zero() -> None:
    _, flat = space()
    vector = flat.vectors({"0.bias": torch.ones(1, 2)}, 1, torch.zeros((), dtype=torch.float64))
    assert vector.sum() == 2
    assert vector[0, 6:8].tolist() == [1.0, 1.0]


def test_shared_parameters_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 2)
            self.head = nn.Linear(2, 5, bias=False)
            self.head.weight = self.embed.weight

    assert ParameterSpace.of(Tied()).dimension == 10


def test_labels() -> None:
    _, flat = space()
    assert flat.label(0) == "0.weight[0, 0]"
    assert flat.label(5) == "0.weight[1, 2]"
    assert flat.label(7) == "0.bias[1]"
    assert flat.label(9) == "2.weight[0, 1]"
    with pytest.raises(IndexError):
        flat.label(10)


def test_no_parameters() -> None:
    assert ParameterSpace.of(nn.ReLU()).dimension == 0
