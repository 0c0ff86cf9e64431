"""Bad input is refused by name; doubtful input is flagged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deaddir_fast as dd
from reading.functions import ONE, Function

torch.set_num_threads(1)
X = torch.randn(6, 3)


def net(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), *extra)


READINGS = [dd.read_triple, dd.dead_directions]


@pytest.mark.parametrize("reading", READINGS)
def test_arguments(reading: Any) -> None:
    with pytest.raises(TypeError, match="model"):
        reading("net", X)
    with pytest.raises(TypeError, match="inputs"):
        reading(net(), 3.0)
    with pytest.raises(ValueError, match=r"inputs.*at least one sample"):
        reading(net(), X[:0])
    with pytest.raises(ValueError, match=r"inputs.*samples"):
        reading(net(), (X, X[:2]))
    with pytest.raises((TypeError, ValueError), match="likelihood"):
        reading(net(), X, likelihood="gausian")
    with pytest.raises((TypeError, ValueError), match="likelihood"):
        reading(net(), X, likelihood=3)
    for bad in (0, 1, 2.5, "8", None):
        with pytest.raises((TypeError, ValueError), match="max_order"):
            reading(net(), X, max_order=bad)


@pytest.mark.parametrize("bad", [-1, 0.5, True, "1", None])
def test_prior_exponent(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="prior_exponent"):
        dd.read_triple(net(), X, prior_exponent=bad)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_beta(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="beta"):
        dd.read_triple(net(), X, beta=bad)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(reading: Any, value: float) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"model: parameter 0\.weight"):
        reading(model, X)
    x = X.clone()
    x[0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        reading(net(), x)


@pytest.mark.parametrize("reading", READINGS)
def test_models(reading: Any) -> None:
    with pytest.raises(ValueError, match=r"model.*parameters"):
        reading(nn.ReLU(), X)
    with pytest.raises(ValueError, match=r"1 \(Dropout\) is in training mode"):
        reading(net(nn.Dropout(0.5)), X)
    with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) is in training mode"):
        reading(net(nn.BatchNorm1d(2)), X)
    assert reading(net(nn.Dropout(0.5)).eval(), X, likelihood="gaussian").verdict == "resolved"


def test_no_derivative_here() -> None:
    """A norm at 0 has none: refused or unresolved, in words."""
    for f in (lambda w: w.norm(), lambda w: (w[0] ** 4 + w[1] ** 4).sqrt()):
        try:
            found = dd.read_triple(Function(f, [0.0, 0.0]), ONE, likelihood="gaussian")
        except ValueError as error:
            assert str(error).startswith("model: ")
        else:
            assert not found.resolved


def test_saturated_rank_is_flagged() -> None:
    """As many live directions as equations: more samples could raise the rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    found = dd.read_triple(model, torch.randn(4, 5, dtype=torch.float64), likelihood="gaussian")
    assert "sample-limited" in found.verdict
    assert found.lower <= found.rank / 2 <= found.upper
    assert found.fluctuation != found.fluctuation
    assert found.fluctuation_verdict.startswith("unresolved: ")
    assert found.fluctuation_verdict != "unresolved: resolved"


def test_ambiguous_rank_is_flagged() -> None:
    """A singular value in the rounding of the largest one."""
    found = dd.read_triple(
        Function(lambda w: torch.stack([w[0], 1e-13 * w[1]]), [0.3, 0.2]),
        ONE,
        likelihood="gaussian",
    )
    assert not found.resolved
    assert float(found.lower) <= 0.5 <= 1.0 <= float(found.upper)


def test_model_and_inputs_are_left_alone() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = X.clone()
    dd.read_triple(model, x, likelihood="gaussian")
    assert torch.equal(x, X)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
        assert parameter.dtype == torch.float32


def test_integer_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(3, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens)

    found = dd.read_triple(Net(), torch.tensor([0, 1, 2, 1]), likelihood="gaussian")
    assert (found.verdict, found.rank) == ("resolved", 6)
