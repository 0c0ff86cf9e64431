"""Captured graphs compute the model, and refuse what is not a function of one sample."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from deaddir_fast.nets.graph import (
    Capture,
    batch_size,
    call_model,
    capture,
    check_deterministic,
    model_output,
    slice_batch,
)

torch.set_num_threads(1)


class Block(nn.Module):
    """A small transformer block with a causal mask, dict inputs and an in-place update."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor, shift: Tensor) -> Tensor:
        h = self.embed(tokens)
        h += shift
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        g = self.norm(h)
        h = h + self.attend(g, g, g, attn_mask=mask, need_weights=False)[0]
        return self.head(F.gelu(h)) * self.scale


class Wrapped(nn.Module):
    """Returns a mapping with ``logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x) + y}


def cases() -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    x = torch.randn(5, 3)
    image = torch.randn(2, 2, 6, 6)
    conv = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4)
    )
    return {
        "mlp": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x),
        "conv": (conv.eval(), image),
        "block": (Block(), {"tokens": torch.randint(7, (3, 4)), "shift": torch.randn(3, 4, 4)}),
        "tuple": (Wrapped(), (x, torch.randn(5, 2))),
        "rms": (nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Softplus(), nn.Mish()), x),
    }


def run(found: Capture, parameters: dict[str, Tensor], inputs: Any) -> Tensor:
    values = [parameters[k] for k in found.names] + found.bind(inputs)
    out = fx.Interpreter(found.module).run(*values)
    leaves = torch.utils._pytree.tree_leaves(out)
    assert len(leaves) == 1
    return leaves[0]


@pytest.mark.parametrize("case", ["mlp", "conv", "block", "tuple", "rms"])
def test_graph_computes_the_model(case: str) -> None:
    model, inputs = cases()[case]
    found = capture(model, inputs)
    assert set(found.names) == {k for k, _ in model.named_parameters()}
    # At other parameters than those it was captured at: nothing is baked in.
    moved = {k: v + 0.1 * torch.randn_like(v) for k, v in found.parameters.items()}
    with torch.no_grad():
        torch.testing.assert_close(run(found, moved, inputs), call_model(model, moved, inputs))


@pytest.mark.parametrize("case", ["mlp", "conv", "block", "tuple", "rms"])
def test_nodes(case: str) -> None:
    """Placeholders lead; calls are ATen operators, never in place; every value is released once."""
    model, inputs = cases()[case]
    found = capture(model, inputs)
    nodes = list(found.graph.nodes)
    holders = [n for n in nodes if n.op == "placeholder"]
    assert len(holders) == len(found.names) + len(found.bind(inputs))
    for node in nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if node.op == "call_function" and node.target is not operator.getitem:
            assert isinstance(node.target, OpOverload)
            assert not node.target._schema.is_mutable
    released = [n for freed in found.last_use.values() for n in freed]
    assert len(released) == len(set(released))
    position = {n: i for i, n in enumerate(nodes)}
    for node, freed in found.last_use.items():
        for value in freed:
            assert max(position[u] for u in value.users) == position[node]


def test_some_parameters_only() -> None:
    model, inputs = cases()["mlp"]
    found = capture(model, inputs, names=["2.weight"])
    assert found.names == ("2.weight",)
    new = {"2.weight": torch.randn(2, 4)}
    with torch.no_grad():
        torch.testing.assert_close(run(found, new, inputs), call_model(model, new, inputs))
    with pytest.raises(ValueError, match="names: no parameter called 'nope'"):
        capture(model, inputs, names=["nope"])


@pytest.mark.parametrize("case", ["mlp", "tuple"])
def test_a_graph_without_extents_computes_any_number_of_samples(case: str) -> None:
    model, inputs = cases()[case]
    first = next(name for name, _ in model.named_parameters())
    for names in (None, [first]):
        found = capture(model, slice_batch(inputs, 0, 2), names=names)
        assert found.names_no_extent()
        with torch.no_grad():
            torch.testing.assert_close(found.replay(inputs), call_model(model, {}, inputs))


class Extent(nn.Module):
    """Records the number of samples in one way or another."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.of = nn.Linear(3, 2), of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.inner(x))


EXTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda h: h.view(len(h), 1, 2).flatten(1),
    "new": lambda h: h + torch.zeros(len(h), 1),
    "arange": lambda h: h[torch.arange(len(h))],
    "constant": lambda h: h + torch.tensor([[0.0]] * len(h)),
    "slice": lambda h: h + h.detach().repeat(2, 1)[: len(h)],
    "unbind": lambda h: torch.stack(h.unbind()),
    "scalar": lambda h: h * len(h) / len(h),
}


@pytest.mark.parametrize("of", EXTENTS)
def test_a_graph_that_may_hold_the_number_of_samples_says_so(of: str) -> None:
    assert not capture(Extent(EXTENTS[of]), torch.randn(2, 3)).names_no_extent()


@pytest.mark.parametrize("case", ["conv", "block"])
def test_views_name_extents(case: str) -> None:
    model, inputs = cases()[case]
    assert not capture(model, inputs).names_no_extent()


def test_capture_leaves_the_model_alone() -> None:
    model, inputs = cases()["block"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, inputs)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.1), nn.BatchNorm1d(3), nn.AlphaDropout(0.2)],
    ids=lambda m: type(m).__name__,
)
def test_training_mode_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer)
    with pytest.raises(ValueError, match=f"1 \\({type(layer).__name__}\\) is in training mode"):
        check_deterministic(model)
    check_deterministic(model.eval())
    check_deterministic(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


def test_control_flow_on_values_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return h if bool(h.sum() > 0) else -h

    with pytest.raises(ValueError, match="model"):
        capture(Branch(), torch.randn(4, 3))


def test_batch() -> None:
    inputs = {"a": torch.zeros(4, 2), "b": (torch.zeros(4), "label")}
    assert batch_size(inputs) == 4
    part = slice_batch(inputs, 1, 3)
    assert part["a"].shape == (2, 2)
    assert part["b"][0].shape == (2,)
    assert part["b"][1] == "label"
    with pytest.raises(ValueError, match=r"inputs: .*\[3, 4\]"):
        batch_size((torch.zeros(3), torch.zeros(4)))
    with pytest.raises(ValueError, match=r"inputs: .*scalar"):
        batch_size(torch.tensor(1.0))
    with pytest.raises(TypeError, match="inputs"):
        batch_size({"a": 3})


def test_output() -> None:
    z = torch.zeros(2)
    assert model_output(z) is z
    assert model_output({"logits": z}) is z
    with pytest.raises(TypeError, match="model"):
        model_output((z, z))
