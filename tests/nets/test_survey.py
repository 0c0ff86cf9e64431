"""What a first look finds: order, layouts, sharing, tying, what is left out."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from fisher.dense_factors import MaskedTransformer, mlp
from torch import Tensor, nn

from deaddir_fast.nets.survey import survey

torch.set_num_threads(1)


class Wrapped(nn.Module):
    """Inner layers under a forward pass given as a function."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def look(forward, *shape: int, **layers: nn.Module):
    return survey(Wrapped(forward, **layers).eval(), torch.randn(5, *shape))


def test_a_transformer():
    found = survey(MaskedTransformer().eval(), torch.randint(0, 7, (5, 4)))
    names = ["embed", "norm", "q", "k", "v", "o", "up", "down", "head"]
    assert list(found.layers) == names
    assert found.leaders == {"k": "q", "v": "q"}
    assert found.head == "head" and found.tied == {} and found.skipped == ()
    assert found.calls == dict.fromkeys(names, 1)
    assert {layer.layout for layer in found.layers.values()} == {"samples"}
    assert found.tokens["up"] == 4 and found.samples == 2


@pytest.mark.parametrize(("layout", "forward"), [
    ("samples", lambda m, x: m.a(x)),
    ("flat", lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1, 3)),
    ("second", lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1)),
    ("shared", lambda m, x: x[..., :3] + m.a(torch.ones(1, 6, 4))),
    ("unknown", lambda m, x: m.a(x.transpose(0, 1).flatten(0, 1)).view(-1, len(x), 3).mT.mT),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [2, 3, 7])
def test_layouts(layout, forward, tokens):
    """Also where tokens are as many as samples, so that shapes tell nothing."""
    if layout == "shared":
        tokens = 6
    found = look(forward, tokens, 4, a=nn.Linear(4, 3))
    assert found.layers["a"].layout == layout


@pytest.mark.parametrize("where", [0, 77_777, 99_999])
def test_wide_samples_are_told_apart_by_a_single_number(where):
    """Samples that are zero but for one of 100 000 numbers, after tokens in the layer."""
    x = torch.zeros(2, 2, 100_000)
    x[0, :, where] = 1
    model = Wrapped(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(100_000, 2))
    assert survey(model.eval(), x).layers["a"].layout == "second"


def test_order_is_that_of_computation():
    found = look(lambda m, x: m.a(m.b(x)), 4, a=nn.Linear(3, 2), b=nn.Linear(4, 3))
    assert list(found.layers) == ["b", "a"]
    assert found.head == "a"


def test_sharing_needs_the_very_same_tensor():
    layers = {"a": nn.Linear(4, 3), "b": nn.Linear(4, 2), "c": nn.Linear(4, 3)}
    same = look(lambda m, x: m.a(x) + m.c(x) + m.b(x).sum(-1, keepdim=True), 4, **layers)
    assert same.leaders == {"c": "a", "b": "a"}
    copy = look(lambda m, x: m.a(x) + m.c(x.clone()), 4, a=layers["a"], c=layers["c"])
    assert copy.leaders == {}

    def changed(m, x):
        h = x.clone()
        first = m.a(h)
        h.add_(1)
        return first + m.c(h)

    assert look(changed, 4, a=layers["a"], c=layers["c"]).leaders == {}


def test_a_leader_that_is_not_wanted_hands_over():
    model, x = MaskedTransformer().eval(), torch.randint(0, 7, (5, 4))
    assert survey(model, x, layers=["k", "v"]).leaders == {"v": "k"}
    assert survey(model, x, layers=["v"]).leaders == {}


def test_several_uses_are_counted_and_share_nothing():
    found = look(lambda m, x: m.a(x) + m.a(2 * x) + m.b(x), 4, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert found.calls == {"a": 2, "b": 1}
    assert found.leaders.get("a") is None


def test_a_tied_weight():
    model = Wrapped(
        lambda m, x: m.head(torch.tanh(m.embed(x))), embed=nn.Embedding(7, 4),
        head=nn.Linear(4, 7, bias=False),
    )  # fmt: skip
    model.head.weight = model.embed.weight
    assert survey(model.eval(), torch.randint(0, 7, (5, 3))).tied == {"head": "embed"}


def test_the_head_is_what_returns_the_output():
    for after, head in [(lambda z: z, "a"), (lambda z: 2 * z, None), (lambda z: z.clone(), None)]:
        found = look(lambda m, x, after=after: after(m.a(x)), 4, a=nn.Linear(4, 3))
        assert found.head == head


def test_patterns():
    model, x = MaskedTransformer().eval(), torch.randint(0, 7, (5, 4))
    assert list(survey(model, x, layers=["?"]).layers) == ["q", "k", "v", "o"]
    nested = nn.Sequential(mlp(4, 5, 5), mlp(5, 3)).double().eval()
    some = survey(nested, torch.randn(3, 4).double(), layers=["0"])
    assert list(some.layers) == ["0.0", "0.2"]
    with pytest.raises(ValueError, match="layers: no layer matches 'x'"):
        survey(model, x, layers=["q", "x"])
    with pytest.raises(TypeError, match="layers: expected a sequence of names"):
        survey(model, x, layers="q")


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


class LastToken(nn.Linear):
    """Wrong in one token out of many."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return torch.cat([z[:, :-40], z[:, -40:] + 1], 1)


@pytest.mark.parametrize("kind", [Scaled, LastToken])
def test_layers_that_compute_something_else_are_left_out(kind):
    model, x = nn.Sequential(kind(4, 3), nn.Linear(3, 2)).eval(), torch.randn(5, 100, 4)
    with pytest.warns(UserWarning, match=rf"0 \({kind.__name__}\): its output is not the linear"):
        found = survey(model, x)
    assert list(found.layers) == ["1"]
    with pytest.raises(ValueError, match="model: no layer stands for the parameters of 0"):
        survey(model, x, strict=True)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_linear_layers_that_are_meddled_with_are_left_out(how):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), torch.randn(5, 4)
    if how == "hook":
        model[0].register_forward_hook(lambda m, args, z: z + 1)
    elif how == "pre-hook":
        model[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        # What the hook sees is what the layer gets: it is the linear map of that.
        assert list(survey(model, x).layers) == ["0", "1"]
        return
    else:
        model[0].forward = lambda x: F.linear(x, model[0].weight) + 1
    with pytest.warns(UserWarning, match="not the linear map"):
        assert list(survey(model, x).layers) == ["1"]


def test_nan_does_not_make_a_layer_wrong():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), torch.randn(5, 4)
    x[1, 2] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(survey(model, x).layers) == ["0", "1"]


def test_parameters_without_a_layer():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.a = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x + self.shift)

    model, x = Own().eval(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match=r"\(model\) \(Own\): no rule for this type"):
        found = survey(model, x)
    assert found.skipped[0].parameters == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        survey(model, x, layers=["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_low_precision_models_have_their_layouts(dtype):
    model = MaskedTransformer(d=32).to(dtype).eval()
    found = survey(model, torch.randint(0, 7, (5, 4)))
    assert {layer.layout for layer in found.layers.values()} == {"samples"}
    assert len(found.layers) == 9


def test_one_sample():
    found = survey(mlp(4, 5, 3), torch.randn(1, 4).double())
    assert found.samples == 1 and found.layers["0"].layout == "samples"


def test_no_sample_and_no_module():
    with pytest.raises(ValueError, match="inputs: expected at least one sample"):
        survey(mlp(4, 3), torch.randn(0, 4).double())
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        survey(F.relu, torch.randn(2, 4))


def test_hooks_are_removed_after_an_error():
    def broken(m, x):
        m.a(x)
        raise OSError("lost")

    model = Wrapped(broken, a=nn.Linear(4, 3)).eval()
    with pytest.raises(OSError, match="lost"):
        survey(model, torch.randn(3, 4))
    assert not any(m._forward_hooks for m in model.modules())
