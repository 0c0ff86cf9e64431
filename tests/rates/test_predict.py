"""The rate calculus against the laws of architectures, each written out as a formula."""

import math

import pytest
import torch
from torch import nn

import deaddir_fast as dd
from deaddir_fast.rates.primitives import Dag

predict = dd.theory.predict


@pytest.mark.parametrize("depth", [1, 2, 5, 9])
@pytest.mark.parametrize("between", [None, "relu", "tanh", "gelu", "silu"])
def test_chain(depth, between):
    """A ~ t^{2(l-1)}, G ~ t^{2(L-l)}; the two index conventions sum to 2(L-1) and 2L."""
    blocks = []
    for _ in range(depth):
        blocks += ["linear"] + ([between] if between else [])
    rates = predict(blocks)
    assert [x.forward_slope for x in rates.layers] == [2 * k for k in range(depth)]
    assert [x.backward_slope for x in rates.layers] == [2 * (depth - 1 - k) for k in range(depth)]
    assert {x.duality for x in rates.layers} == {(2 * (depth - 1), 2 * depth)}
    assert rates.additive
    assert not rates.reasons


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    ("block", "q", "e"),
    [
        ("mlp:gelu", 1, 2),
        ("mlp:relu", 1, 2),
        ("mlp:relu2", 2, 3),
        ("swiglu", 2, 3),
        ("geglu", 2, 3),
        ("bilinear", 2, 3),
        ("glu", 1, 2),
        ("attention", 1, 2),
        ("conv", 1, 1),
    ],
)
def test_blocks_take_order_k_to_qk_plus_e(block, q, e, count):
    rates = predict(f"{block}*{count}")
    order = 0
    for piece in rates.blocks:
        assert (piece.degree, piece.weight) == (q, e)
        order = q * order + e
    assert rates.forward == order
    assert rates.forward == (e * (2**count - 1) if q == 2 else e * count)
    if q == 2 and count > 1:
        assert not rates.additive
        assert "degree 2" in " ".join(rates.reasons)


def test_swiglu_gradients_follow_the_forward_signal():
    """d/dx of t³x² at x ~ t^p is of order 3 + p."""
    rates = predict("swiglu*3")
    orders = [0, 3, 9]
    expected = sum(3 + p for p in orders)
    assert rates.backward == expected
    assert rates["0.gate"].backward == expected - 1  # the gradient before gate carries one t more


@pytest.mark.parametrize("depth", range(1, 8))
def test_attention_chain(depth):
    """k blocks above and p below: α = min(4k, 4p + 8); the value map lies 2 above the output."""
    rates = predict(f"attention*{depth}")
    for p in range(depth):
        k = depth - 1 - p
        above = rates[f"{p}.o"].backward_slope
        assert above == min(4 * k, 4 * p + 8)
        assert rates[f"{p}.v"].backward_slope - above == 2
        assert rates[f"{p}.o"].forward_slope == 4 * p + 2


def test_attention_plateau_and_crossing():
    """The first block's gradient stops at 8; values and scores meet at k = 2."""
    slopes = [predict(f"attention*{n}")["0.o"].backward_slope for n in range(1, 7)]
    assert slopes == [0, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_all_residual_is_depth_invariant(blocks):
    for inner in ("mlp:gelu", "swiglu", "attention", "linear*3"):
        rates = predict(f"residual({inner})*{blocks}")
        assert (rates.forward, rates.backward) == (0, 0)


def _random_dag(seed):
    """A random graph of linear maps and plain joins, and its shortest path by exhaustion."""
    draw = torch.Generator().manual_seed(seed)
    nodes, weights, names = {}, {"input": 0}, ["input"]
    for k in range(6):
        count = int(torch.randint(1, min(3, len(names)) + 1, (1,), generator=draw))
        chosen = torch.randperm(len(names), generator=draw)[:count]
        reads = [names[i] for i in chosen]
        linear = k == 5 or bool(torch.rand(1, generator=draw) < 0.7)
        nodes[f"n{k}"] = (nn.Linear(4, 4, bias=False).double() if linear else None, reads)
        weights[f"n{k}"] = linear + min(weights[r] for r in reads)
        names.append(f"n{k}")
    return Dag(nodes), weights["n5"]


@pytest.mark.parametrize("seed", range(12))
def test_residual_graph_keeps_its_shortest_path(seed):
    """α = 2K, K the shortest path with weight edges 1 and skips 0."""
    dag, shortest = _random_dag(seed)
    assert predict(dag, torch.randn(2, 4, dtype=torch.float64)).forward == shortest


def test_bias_caps_the_forward_slope_at_two():
    rates = predict("linear+bias*4")
    assert [x.forward_slope for x in rates.layers] == [0, 2, 2, 2]
    assert [x.backward_slope for x in rates.layers] == [6, 4, 2, 0]
    assert not rates.additive
    free = predict("linear+bias*4", bias="zero")
    assert [x.forward_slope for x in free.layers] == [0, 2, 4, 6]
    kept = predict("linear+bias*4", bias="keep")
    assert [x.forward_slope for x in kept.layers] == [0, 0, 0, 0]


@pytest.mark.parametrize(("pre", "post"), [(1, 1), (2, 1), (1, 3)])
def test_layer_norm_restarts_the_forward_rate(pre, post):
    """Between 2 k_post, as t → 0, and 2 (k_pre + k_post), while the mean does not show."""
    rates = predict(f"linear*{pre}, layer_norm, linear*{post}")
    after = [x for x in rates.layers if int(x.name) > pre]
    assert [x.forward_out for x in after] == list(range(1, post + 1))
    assert [x.apparent[1] for x in after] == [pre + k for k in range(1, post + 1)]
    before = [x for x in rates.layers if int(x.name) < pre]
    assert [x.backward for x in before] == list(reversed(range(pre)))
    assert [x.apparent[2] for x in before] == [post + k for k in reversed(range(pre))]


def test_rms_norm_has_no_mean_but_reads_the_signal():
    """d rms/dx_d ~ x_d: the gradient's order before the norm is at most the signal's there."""
    rates = predict("linear, rms_norm, linear*3")
    assert rates["0"].backward == 1
    assert rates["0"].apparent[2] == 3
    assert [x.forward for x in rates.layers] == [0, 1, 2, 3]
    deep = predict("linear*4, rms_norm, linear*3")
    assert deep["3"].backward == 3


def test_routers_leak_and_experts_do_not_add():
    rates = predict("moe:gelu")
    assert rates.forward == 2
    assert rates.backward == 1  # through the router's logits, not 2 through the experts
    assert not rates["0.router"].output_side


def test_functions_that_do_not_vanish_at_zero():
    rates = predict("linear, sigmoid, linear")
    assert [x.forward for x in rates.layers] == [0, 0]
    assert rates.forward == 1
    assert rates.backward == 2


def test_units_may_be_single_layers():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    rates = predict(model, torch.randn(2, 5, dtype=torch.float64), unit={"0": 3, "2": None})
    assert rates["0"].forward_out == 1
    assert rates["0"].backward == 1
    assert rates["2"].forward == 1
    assert not rates["2"].output_side


def test_without_isolation_live_signals_leak_in():
    rates = predict("linear*3", isolate=False)
    assert [x.forward for x in rates.layers] == [0, 1, 1]
    assert [x.backward for x in rates.layers] == [1, 1, 0]


def test_fused_maps_are_read_part_by_part():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    rates = predict(layer, torch.randn(2, 3, 8, dtype=torch.float64), unit=3)
    assert rates["self_attn.out_proj"].forward == 1
    assert rates["self_attn.out_proj"].input_side


def test_convolutions_groups_and_pooling():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    ).double()
    rates = predict(model, torch.randn(2, 2, 8, 8, dtype=torch.float64), unit=1)
    assert [x.forward for x in rates.layers] == [0, 1, 2]
    assert [x.backward for x in rates.layers] == [2, 1, 0]


def test_an_operation_without_a_rule_is_named_not_guessed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.b(torch.special.bessel_j0(self.a(x)))

    rates = predict(Odd().double(), torch.randn(2, 4, dtype=torch.float64))
    assert math.isnan(rates["b"].forward)
    assert math.isnan(rates["a"].backward)
    assert "bessel_j0" in " ".join(rates.notes)


def test_exact_null_vectors_are_named():
    plain = predict("linear*2")
    assert plain.kernels == ()
    (norm,) = predict("linear, layer_norm, linear").kernels
    assert "γ⁻¹" in norm
    assert predict("linear, rms_norm, linear").kernels == ()
    (head,) = predict("linear*2", likelihood="categorical").kernels
    assert "softmax" in head
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).double()
    with torch.no_grad():
        model[1].weight[2] = 0.0
    (zero,) = predict(model, torch.randn(2, 4, dtype=torch.float64)).kernels
    assert "[2]" in zero
    with pytest.raises(ValueError, match="likelihood"):
        predict("linear", likelihood="nothing")


def test_table():
    text = str(predict("linear*2"))
    assert "additive" in text
    assert text.splitlines()[1].split() == ["0", "0", "2", "2", "4"]


@pytest.mark.parametrize(
    ("blocks", "kwargs", "error", "word"),
    [
        ("nothing", {}, ValueError, "blocks"),
        ("linear*0", {}, ValueError, r"\*0"),
        ("linear,,linear", {}, ValueError, "blocks"),
        ("residual", {}, ValueError, "parentheses"),
        ("residual(linear", {}, ValueError, "closing"),
        ("mlp:cube", {}, ValueError, "activation"),
        ("linear & linear", {}, ValueError, "blocks"),
        ([], {}, ValueError, "blocks"),
        ([3], {}, TypeError, r"blocks\[0\]"),
        (3, {}, TypeError, "blocks"),
        ("linear", {"unit": -1}, ValueError, "unit"),
        ("linear", {"unit": 4}, ValueError, "unit"),
        ("linear", {"unit": {}}, ValueError, "unit"),
        ("linear", {"unit": {"9": 0}}, ValueError, "unit"),
        ("linear", {"unit": {"0": 7}}, ValueError, r"unit\['0'\]"),
        ("linear", {"bias": "drop"}, ValueError, "bias"),
        ("relu", {}, ValueError, "unit"),
        ("linear", {"inputs": torch.zeros(0, 4)}, ValueError, "inputs"),
    ],
)
def test_errors_name_the_argument(blocks, kwargs, error, word):
    with pytest.raises(error, match=word):
        predict(blocks, **kwargs)


def test_modules_in_a_list_are_left_alone():
    layer = nn.Linear(7, 7, bias=False).train()
    rates = predict([layer, "tanh", layer], torch.randn(2, 7, dtype=torch.float64), unit=5)
    assert [x.forward for x in rates.layers] == [0, 1]
    assert layer.weight.dtype == torch.float32
    assert layer.training


def test_a_unit_that_ends_is_no_reason():
    """Behind a readout there is no unit any more: nothing is said about what follows."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False), nn.Tanh())
    rates = predict(model.double(), torch.randn(2, 4, dtype=torch.float64), unit=3)
    assert rates.reasons == ()
    assert rates.forward == math.inf


def test_blocks_see_the_unit_where_it_is():
    """A flattened channel is many features, a block of its own too."""
    model = nn.Sequential(
        nn.Conv1d(3, 3, 1, bias=False), nn.Flatten(), nn.Linear(12, 3, bias=False)
    ).double()
    rates = predict(model, torch.randn(2, 3, 4, dtype=torch.float64), unit=1)
    assert rates.additive
    assert rates["0"].backward == 1
    assert [b.backward for b in rates.blocks] == [1, 0, 1]


def test_cycles_and_unknown_nodes_are_refused():
    with pytest.raises(ValueError, match="nodes"):
        Dag({"a": (None, ["b"]), "b": (None, ["input"])})
