"""What gradient flow conserves, and the recorder of its drift."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast import gauge
from deaddir_fast.gauge.batch_norm import NormRescaling
from gauge.flows import MODELS, State, case, elements, euler, loss_gradient, rk4

F64 = torch.float64
SMOOTH = ["deep linear", "gated", "norms", "attention", "rotary"]


def change(found: tuple[gauge.Gauge, ...], before: State, after: State) -> dict[str, float]:
    out = {}
    for g in found:
        q = gauge.conserved(g, before)
        if q is not None:
            out[g.name] = float((gauge.conserved(g, after) - q).abs().max())
    return out


def test_values_by_hand() -> None:
    _, _, state, found = case("mlp")
    w, b, v = state["0.weight"], state["0.bias"], state["3.weight"]
    expected = w.square().sum(1) + b.square() - v.square().sum(0)
    assert torch.allclose(gauge.conserved(found[0], state), expected, rtol=1e-13)
    last, bias = state["5.weight"], state["5.bias"]
    expected = torch.cat([last.sum(0), bias.sum()[None]])
    assert torch.allclose(gauge.conserved(found[2], state), expected, rtol=1e-13)
    _, _, state, found = case("deep linear")
    a, b, w = state["0.weight"], state["0.bias"], state["1.weight"]
    expected = a @ a.T + torch.outer(b, b) - w.T @ w
    assert torch.allclose(gauge.conserved(found[0], state)[0], expected, rtol=1e-13, atol=1e-13)


def test_heads_by_hand() -> None:
    _, _, state, found = case("attention")
    w, b, o = (state[f"mha.{k}"] for k in ("in_proj_weight", "in_proj_bias", "out_proj.weight"))
    scores, values, key, value = found[:4]
    for head in range(2):
        q, k, v = (slice(6 * i + 3 * head, 6 * i + 3 * head + 3) for i in range(3))
        rows = torch.cat([w, b[:, None]], 1)
        here = gauge.conserved(scores, state)[head]
        expected = rows[q] @ rows[q].T - rows[k] @ rows[k].T
        sign = 1 if torch.allclose(here, expected, rtol=1e-12) else -1
        assert torch.allclose(sign * here, expected, rtol=1e-12)
        out = o[:, 3 * head : 3 * head + 3]
        expected = rows[v] @ rows[v].T - out.T @ out
        assert torch.allclose(gauge.conserved(values, state)[head], expected, rtol=1e-12)
    assert isinstance(key, gauge.Translation) and not key.readers
    assert torch.equal(gauge.conserved(key, state), b[6:12])
    assert isinstance(value, gauge.Translation) and gauge.conserved(value, state) is None


@pytest.mark.parametrize("name", MODELS)
def test_their_gradients_are_orbit_tangents(name: str) -> None:
    """∇Q_X lies along T_X: for each component of Q one tangent, up to a factor."""
    _, _, state, found = case(name)
    for g in found:
        if gauge.conserved(g, state) is None:
            shifted = isinstance(g, gauge.Translation) and g.readers
            assert shifted or isinstance(g, gauge.Permutation | NormRescaling)
            continue
        leaves = {k: v.clone().requires_grad_() for k, v in state.items()}
        gradients = jacobian(g, leaves)
        tangents = g.tangents(state)
        d = g.shape[-1]
        for i in range(gauge.conserved(g, state).numel()):
            factor, tangent = 1.0, {k: v[i] for k, v in tangents.items()}
            if isinstance(g, gauge.Rescaling):
                factor = 2.0
            elif isinstance(g, gauge.ComplexRescaling):  # the modulus of each pair
                factor, tangent = 2.0, {k: v[2 * i] for k, v in tangents.items()}
            elif isinstance(g, gauge.GeneralLinear):  # symmetric X = E_ij + E_ji
                b, row, column = i // d**2, i // d % d, i % d
                other = b * d**2 + column * d + row
                tangent = {k: v[i] + v[other] for k, v in tangents.items()}
            for k, t in tangent.items():
                assert torch.allclose(gradients[k][i], factor * t, rtol=1e-9, atol=1e-9)


def jacobian(g: gauge.Gauge, state: State) -> State:
    """{name: (dimension, *shape)} by differences: exact for linear and quadratic functions."""
    out = {}
    for k in g.parameters:
        rows = []
        for i in range(state[k].numel()):
            step = torch.zeros(state[k].numel(), dtype=F64)
            step[i] = 1.0
            step = step.reshape(state[k].shape)
            up = gauge.conserved(g, {**state, k: state[k].detach() + step})
            down = gauge.conserved(g, {**state, k: state[k].detach() - step})
            rows.append(((up - down) / 2).reshape(-1))
        out[k] = torch.stack(rows, 1).reshape(-1, *state[k].shape)
    return out


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_flow_conserves_and_gradient_descent_drifts_like_its_step(name: str) -> None:
    model, inputs, state, found = case(name)
    field = loss_gradient(model, inputs)
    flows = {n: change(found, state, rk4(field, state, 0.2 / n, n)) for n in (8, 16)}
    steps = {n: change(found, state, euler(field, state, 0.2 / n, n)) for n in (32, 64)}
    assert flows[16]
    for key, rest in flows[16].items():
        linear = "class shift" in key or "softmax" in key or "mean" in key
        if linear:  # of first degree: every step conserves it
            assert rest <= 1e-13 and steps[32][key] <= 1e-13
        else:
            assert rest <= flows[8][key] / 10 or rest <= 1e-13  # fourth order: a sixteenth
            assert rest <= 1e-3 * steps[64][key]
            assert steps[32][key] / steps[64][key] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("name", ["mlp", "shared", "tied", "residual"])
def test_relu_and_shared_layers_conserve_to_the_kinks(name: str) -> None:
    """Gauges that hold: a tied head's logits have no class shift among them."""
    model, inputs, state, found = case(name)
    after = rk4(loss_gradient(model, inputs), state, 0.002, 50)
    rest = change(found, state, after)
    assert rest and max(rest.values()) <= 1e-7
    assert max(float((after[k] - state[k]).abs().max()) for k in state) > 1e-3


def test_translations_keep_what_holds_at_each_moment() -> None:
    """b' = Wᵀ c' with c the readers' biases, though no function of the parameters is conserved."""
    model, inputs, state, found = case("norms")
    g = next(g for g in found if isinstance(g, gauge.Translation))
    assert gauge.conserved(g, state) is None
    rate = loss_gradient(model, inputs)(state)
    assert rate["1.bias"].abs().max() > 1e-3
    assert torch.allclose(rate["1.bias"], state["2.weight"].T @ rate["2.bias"], atol=1e-14)


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, **options) -> gauge.Drift:
    drift = gauge.Drift(model, gauge.find(model))
    optimizer = torch.optim.SGD(model.parameters(), lr, **options)
    for i in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if (i + 1) % (steps // 4) == 0:
            drift.update((i + 1) * lr)
    return drift


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.randn(40, 4), torch.randint(3, (40,))


def test_drift_of_a_training_in_single_precision() -> None:
    lasts = []
    for lr, steps in ((0.2, 40), (0.1, 80)):
        model, x, y = small()
        report = train(model, x, y, lr, steps).report()
        assert json.loads(json.dumps(report)) == report
        assert report["times"] == pytest.approx([0, 2, 4, 6, 8])
        assert [len(r["drift"]) for r in report["gauges"]] == [5, 5]
        rescaling, shift = report["gauges"]
        assert rescaling["drift"][0] == 0 and 0 < rescaling["last"] < 0.1
        assert shift["last"] <= 1e-6  # linear: rounding alone
        lasts.append(rescaling["last"])
    assert lasts[0] / lasts[1] == pytest.approx(2, rel=0.2)
    model, x, y = small()
    decayed = train(model, x, y, 0.1, 80, weight_decay=0.1).report()
    assert decayed["gauges"][1]["last"] > 0.1


def test_drift_by_hand_and_free_of_scale() -> None:
    for size in (1.0, 1e4):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
        g = [g for g in gauge.find(model, torch.ones(2, 1)) if isinstance(g, gauge.Rescaling)]
        model[0].weight.data.fill_(2 * size)
        model[2].weight.data.fill_(1 * size)
        drift = gauge.Drift(model, g)
        assert drift.update() == [0.0]
        model[2].weight.data.fill_(3 * size)  # Q: 4 − 1 -> 4 − 9; P: 5 -> 13
        assert drift.update() == pytest.approx([8 / 13])
        model[2].weight.data.fill_(1 * size)  # back, and the largest P stays
        assert drift.update(7.0) == [0.0]
        report = drift.report()
        assert report["times"] == [0.0, 1.0, 2.0, 7.0] and report["without"] == []


def test_drift_names_what_conserves_nothing_and_reports_what_is_not_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    drift = gauge.Drift(model, gauge.find(model))
    report = drift.report()
    assert any("translation" in name for name in report["without"])
    model[2].weight.data[0, 0] = torch.nan
    drift.update()
    report = drift.report()
    assert None in [r["last"] for r in report["gauges"]]
    json.dumps(report, allow_nan=False)


def test_a_bias_that_starts_at_zero() -> None:
    """The key bias of a fresh attention layer: no parts at first, drift of one once it moves."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True)
    state = {k: v.detach() for k, v in model.named_parameters()}
    _, _, _, found = case("attention")
    key = gauge.Translation(
        found[2].name, "R^6", ("in_proj_bias",), (6,), None, "in_proj_bias", torch.arange(6, 12), ()
    )
    assert not gauge.conserved(key, state).any()
    drift = gauge.Drift(model, [key])
    assert drift.update() == [0.0]
    model.in_proj_bias.data[6] = 1e-3
    assert drift.update() == [1.0]


def test_conserved_moves_with_the_group() -> None:
    """Not invariant: that is what tells states of an orbit apart."""
    _, _, state, found = case("mlp")
    (c,) = elements(found[:1])
    after = gauge.conserved(found[0], found[0].act(state, c))
    w, b, v = state["0.weight"], state["0.bias"], state["3.weight"]
    expected = c**2 * (w.square().sum(1) + b.square()) - v.square().sum(0) / c**2
    assert torch.allclose(after, expected, rtol=1e-12)


def test_picture() -> None:
    pytest.importorskip("matplotlib")
    model, x, y = small()
    drift = train(model, x, y, 0.1, 8)
    report = json.loads(json.dumps(drift.report()))
    axes = gauge.plot_drift(report).axes[0]
    assert axes.get_yscale() == "log" and len(axes.lines) == 2
    drawn = axes.lines[0].get_ydata()
    assert list(drawn[1:]) == report["gauges"][0]["drift"][1:]
    texts = [t.get_text() for t in axes.get_legend().get_texts()]
    assert texts[0] == "rescaling: 0 -> 2, (R_>0)^6"
    empty = gauge.Drift(model, []).plot().axes[0]
    assert empty.texts[0].get_text() == "no gauge that conserves anything"


def test_bad_arguments_are_named() -> None:
    _, _, state, found = case("mlp")
    with pytest.raises(TypeError, match="gauge: expected a Gauge"):
        gauge.conserved("rescaling", state)  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match=r"state: no parameter called '0\.weight'"):
        gauge.conserved(found[0], {})
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        gauge.Drift(state, found)  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match=r"state: no parameter called '0\.weight'"):
        gauge.Drift(nn.Linear(2, 2), found)
    with pytest.raises(ValueError, match="time: expected a finite number"):
        gauge.Drift(nn.Linear(2, 2), []).update(float("nan"))
