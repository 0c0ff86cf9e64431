"""torch.compile around the step: it runs outside of graphs, and takes the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast.optim import DDCAdam

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def loss_of(model: Callable[[Tensor], Tensor]) -> Tensor:
    return (model(X) - X[:, :3].sin()).square().mean()


def ways(opt: DDCAdam) -> dict[str, Callable[[], Any]]:
    return {
        "method": torch.compile(opt.step, backend="eager"),
        "function": torch.compile(lambda: opt.step(), backend="eager"),
    }


@pytest.mark.parametrize("way", ["method", "function"])
@pytest.mark.parametrize(
    "options",
    [{"gauges": []}, {}, {"likelihood": "gaussian"}, {"gauges": "layerwise"},
     {"capturable": True}, {"fused": False}, {"lr": torch.tensor(0.02)}],
    ids=str,
)  # fmt: skip
def test_a_compiled_step_is_a_step(options: dict[str, Any], way: str) -> None:
    plain, model = net(), net()
    other, opt = (DDCAdam(m, **{"lr": 0.02, **options}) for m in (plain, model))
    step = ways(opt)[way]
    for n in range(4):
        for m, o, take in ((plain, other, other.step), (model, opt, step)):
            o.zero_grad()
            loss_of(m).backward()
            rate = o.param_groups[0]["lr"]
            if n == 2:
                o.param_groups[0]["lr"] = rate / 2
            take()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert float(opt.state[q]["step"]) == 4


def test_the_compiler_leaves_the_step_in_one_piece() -> None:
    from torch._dynamo.utils import counters

    model = net()
    opt = DDCAdam(model, lr=0.02)
    loss_of(model).backward()
    counters.clear()
    step = torch.compile(opt.step, backend="eager")
    for _ in range(3):
        step()
    assert counters["stats"]["unique_graphs"] <= 1
    assert len(counters["graph_break"]) <= 1


def test_a_training_step_compiles_as_a_whole() -> None:
    plain, model = net(), net()
    other, opt = DDCAdam(plain, lr=0.02), DDCAdam(model, lr=0.02)

    def train() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        opt.step()
        return loss

    compiled = torch.compile(train, backend="eager")
    for _ in range(3):
        compiled()
        other.zero_grad()
        loss_of(plain).backward()
        other.step()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)


def test_closures_stay_compiled() -> None:
    """The step is kept out of graphs, but not the model that its closure runs."""
    from torch._dynamo.utils import counters

    model = net()
    opt = DDCAdam(model, lr=0.02)
    fast = torch.compile(model, backend="eager")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(fast)
        loss.backward()
        return loss

    counters.clear()
    start = copy.deepcopy(model)
    loss = opt.step(closure)
    assert loss.item() == pytest.approx(loss_of(start).item(), rel=1e-12)
    assert counters["stats"]["unique_graphs"] >= 1
