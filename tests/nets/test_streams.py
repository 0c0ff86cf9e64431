"""Streams of inputs and gradients against autograd, and the model afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compare import assert_rms
from fisher.dense_factors import MaskedTransformer, mlp, streams
from torch import Tensor, nn

from deaddir_fast.nets.streams import Streams
from deaddir_fast.nets.survey import survey

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:no layer stands for")


def collect(model: nn.Module, x: Tensor, seeds: int = 1, **options):
    """Inputs and gradients by layer name, in the order in which they come."""
    inputs: list[tuple[str, Tensor]] = []
    gradients: list[tuple[str, Tensor, Tensor | None]] = []
    found = survey(model, x)
    with Streams(
        model,
        found,
        on_input=lambda layer, a: inputs.append((layer.name, a.clone())),
        on_gradient=lambda layer, g, a: gradients.append((layer.name, g.clone(), a)),
        **options,
    ) as work:
        z = work.forward(x, len(x))
        v = torch.randn(seeds, *z.shape, dtype=z.dtype)
        for k in range(seeds):
            work.backward(z, v[k], last=k == seeds - 1)
    return z.detach(), v, inputs, gradients


def test_inputs_and_gradients_are_those_of_autograd():
    model, ids = MaskedTransformer().double().eval(), torch.randint(0, 7, (3, 4))
    z, v, inputs, gradients = collect(model, ids, seeds=2)
    assert_rms(z, model(ids).detach(), 1e-14)
    assert [name for name, *_ in gradients[:3]] == ["head", "down", "up"]
    for k in range(3):
        _, a, jacobians = streams(model, ids[k : k + 1])
        for name, rows in a.items():
            given = next(x for n, x in inputs if n == name)
            assert_rms(given[k].reshape(rows.shape), rows, 1e-13)
            for draw in range(2):
                truth = torch.einsum("p,pto->to", v[draw, k].flatten(), jacobians[name])
                some = [g for n, g, _ in gradients if n == name]
                assert_rms(some[draw][k], truth, 1e-11)


def test_no_weight_gradient_is_computed():
    model, x = mlp(4, 5, 3), torch.randn(6, 4).double()
    collect(model, x)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_which_inputs_are_kept():
    model, ids = MaskedTransformer().double().eval(), torch.randint(0, 7, (3, 4))
    _, _, _, gradients = collect(model, ids, keep=lambda layer: layer.name == "up")
    assert {n for n, _, x in gradients if x is not None} == {"embed", "norm", "up"}


def test_inputs_that_need_a_gradient_do_not_get_one():
    model, x = mlp(4, 5, 3), torch.randn(6, 4).double().requires_grad_()
    collect(model, x)
    assert x.grad is None


def test_in_place_changes_are_allowed_where_the_input_is_not_kept():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double().eval()
    x = torch.randn(6, 4).double()
    _, v, _, gradients = collect(model, x)
    by_name = {n: g for n, g, _ in gradients}
    h = model[0](x).detach()
    assert_rms(by_name["2"], v[0], 1e-15)
    assert_rms(by_name["0"], (v[0] @ model[2].weight.detach()) * (h > 0), 1e-13)


def test_an_input_that_is_kept_and_changed_in_place_is_told():
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.first(x)
            z = self.norm(h)
            h.add_(1)
            return z + h

    with pytest.raises(RuntimeError, match=r"norm: .*changed in place"):
        collect(Changed().double().eval(), torch.randn(3, 4).double())


def test_outputs_that_depend_on_no_layer():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return x[:, :3]

    _, _, inputs, gradients = collect(Aside().double().eval(), torch.randn(3, 4).double())
    assert [n for n, _ in inputs] == ["unused"] and gradients == []


def test_one_row_for_all_samples_has_gradients_of_each():
    """Positions go through a layer once for the whole batch."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(x + self.position(torch.arange(x.shape[1]))))

    model, x = Positions().double().eval(), torch.randn(3, 5, 4).double()
    _, v, _, gradients = collect(model, x)
    by_name = {n: g for n, g, _ in gradients}
    assert by_name["position"].shape == (3, 5, 4)
    h = torch.tanh(x + model.position.weight.detach())
    assert_rms(by_name["position"], (v[0] @ model.head.weight.detach()) * (1 - h.square()), 1e-12)


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["body", "forward", "input", "gradient", "attach"])
def test_model_is_put_back_whatever_happens(where, monkeypatch):
    model, x = MaskedTransformer().double().eval(), torch.randint(0, 7, (3, 4))
    model.head.bias.requires_grad_(False)
    model.config = SimpleNamespace(use_cache=True)
    flags = [p.requires_grad for p in model.parameters()]
    found = survey(model, x)

    def fail(*args):
        raise Broken

    work = Streams(
        model,
        found,
        on_input=fail if where == "input" else None,
        on_gradient=fail if where == "gradient" else lambda *args: None,
    )
    if where == "attach":
        monkeypatch.setattr(found.adapters[3], "attach", fail)
    if where == "forward":
        monkeypatch.setattr(model.down, "forward", fail)
    with pytest.raises(Broken), work:
        assert model.config.use_cache is False
        assert not any(p.requires_grad for p in model.parameters())
        z = work.forward(x, 3)
        work.backward(z, torch.ones_like(z))
        raise Broken
    monkeypatch.undo()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.config.use_cache is True


def test_inside_inference_mode_and_no_grad():
    model, x = mlp(4, 5, 3), torch.randn(6, 4).double()
    with torch.no_grad():
        _, _, _, gradients = collect(model, x)
    assert [n for n, *_ in gradients] == ["2", "0"]
