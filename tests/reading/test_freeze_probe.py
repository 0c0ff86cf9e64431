"""Known-t sweeps of torch modules against the rate calculus, layer by layer."""

import copy
import math

import pytest
import torch
from torch import nn

import deaddir_fast as dd
from deaddir_fast.rates.primitives import chain

CHAINS = [
    "linear*4",
    "linear+bias*3",
    "linear,relu,linear,relu,linear",
    "linear,tanh,linear,silu,linear",
    "mlp:gelu*3",
    "mlp:relu2*2",
    "swiglu*2",
    "geglu*2",
    "glu*2",
    "attention*2",
    "residual(mlp:gelu)*2",
    "residual(attention),residual(mlp:gelu)",
    "residual(layer_norm,attention),residual(layer_norm,mlp:gelu)",
    "linear,layer_norm,linear",
    "residual(mlp:gelu),layer_norm,residual(mlp:gelu),layer_norm",
    "linear*2,rms_norm,linear*3",
    "moe:gelu*2",
    "conv,gelu,conv",
]


def _probe(model, x, **kwargs):
    kwargs.setdefault("likelihood", "gaussian")
    return dd.freeze_probe(model, x, **kwargs)


def _check(probe, tolerance=0.05):
    """Every slope within tolerance of its prediction, in the sweep or far below it."""
    assert probe.layers
    read = 0
    for layer in probe.layers:
        for quantity, verdict in layer.verdicts.items():
            assert verdict.startswith("agrees"), (layer.name, quantity, verdict)
            if verdict == "agrees":
                fit = layer.fits[quantity]
                assert fit.slope == pytest.approx(layer.predicted(quantity), abs=tolerance)
            read += 1
    return read


@pytest.mark.parametrize("spec", CHAINS)
def test_measured_rates_are_the_predicted_ones(spec):
    torch.manual_seed(3)
    model = chain(spec)
    with torch.no_grad():  # a unit that ReLUs let through
        for p in model.parameters():
            if p.ndim > 1:
                p[0, 0] = p[0, 0].abs() + 0.2
    x = torch.randn(24, 3, 4, dtype=torch.float64)
    probe = _probe(model, x.transpose(1, 2) if "conv" in spec else x)
    assert _check(probe) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("depth", [3, 4])
def test_attention_saturates(depth):
    """min(4k, 4p + 8), with weights that keep tokens apart."""
    torch.manual_seed(0)
    model = chain(f"attention*{depth}")
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 2
    probe = _probe(model, 2 * torch.randn(24, 3, 4, dtype=torch.float64))
    _check(probe)
    for p in range(depth):
        slope = probe[f"{p}.o"].fits["backward"].slope
        assert slope == pytest.approx(min(4 * (depth - 1 - p), 4 * p + 8), abs=0.05)


@pytest.mark.slow
def test_a_rounding_floor_is_no_rate():
    """Tokens that collapse with depth leave rounding in the scores' gradient: said, not read."""
    torch.manual_seed(0)
    probe = _probe(chain("attention*4"), torch.randn(24, 3, 4, dtype=torch.float64))
    assert probe.agrees
    verdicts = [v for layer in probe.layers for v in layer.verdicts.values()]
    assert any("rounding floor" in v for v in verdicts)


def test_what_cancels_is_rounding_and_no_slope():
    """x + w - w leaves a constant of size eps where the unit's signal would be t^6: not read."""

    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(5))

        def forward(self, x):
            for layer in self.maps[:3]:
                x = layer(x)
            offset = self.maps[3](torch.ones_like(x)) * 1e3
            return self.maps[4]((x + offset) - offset)

    torch.manual_seed(0)
    model = Cancelling().double()
    probe = _probe(model, torch.randn(16, 4, dtype=torch.float64), isolate=False)
    layer = probe["maps.4"]
    assert layer.fits
    assert all(not v.startswith("differs") for v in layer.verdicts.values()), layer.verdicts


@pytest.mark.parametrize("blocks", [3, 6])
def test_composition_adds(blocks):
    """MLP chains of width 16 stay on the diagonal to high slopes."""
    torch.manual_seed(1)
    model = nn.Sequential(
        *(m for _ in range(blocks) for m in (nn.Linear(16, 16, bias=False), nn.GELU()))
    ).double()
    probe = _probe(model, torch.randn(64, 16, dtype=torch.float64))
    _check(probe)
    assert probe.layers[-1].fits["forward"].slope == pytest.approx(2 * (blocks - 1), abs=0.05)


def test_moments_are_those_of_the_network():
    """A and G entries and the exact Fisher at one t, by a dense Jacobian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    probe = _probe(model, x, unit=1, t=[0.1, 0.2, 0.3, 0.4, 0.5], likelihood="categorical")
    t = 0.2
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (frozen[0], frozen[2]):
            keep = layer.weight[1, 1].clone()
            layer.weight[1, :] = 0
            layer.weight[:, 1] = 0
            layer.weight[1, 1] = t * keep
            layer.bias[1] *= t
    hidden = torch.tanh(frozen[0](x)).detach()
    assert probe["2"].forward[1] == pytest.approx(float(hidden[:, 1].square().mean()), rel=1e-12)
    total, own = 0.0, 0.0
    for n in range(5):
        z = frozen[0](x[n]).detach()
        jacobian = torch.autograd.functional.jacobian(lambda v: frozen[2](torch.tanh(v)), z)
        p = frozen(x[n]).softmax(-1).detach()
        metric = torch.diag(p) - torch.outer(p, p)
        total += float(jacobian[:, 1] @ metric @ jacobian[:, 1])
        own += float(x[n, 1] ** 2 * (jacobian[:, 1] @ metric @ jacobian[:, 1]))
    assert probe["0"].backward[1] == pytest.approx(total / 5, rel=1e-10)
    assert probe["0"].fisher[1] == pytest.approx(own / 5, rel=1e-10)


def test_cross_entropy_head():
    """Gradient entries of the dead class are at least c0 (1 - 1/C) t^{2(L-l)} of the live scale."""
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4))).double()
    x = torch.randn(32, 5, dtype=torch.float64)
    probe = _probe(model, x, likelihood="categorical", unit=2)
    _check(probe)
    for k, layer in enumerate(probe.layers):
        assert layer.fits["backward"].slope == pytest.approx(2 * (3 - k), abs=0.05)


def test_random_covectors_read_the_same_rates():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(70, 6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 70, bias=False)
    ).double()
    ids = torch.randint(0, 70, (9, 4))
    probe = _probe(model, ids, unit=1, likelihood="categorical", bias="zero")
    assert not probe.exact
    assert "random covectors" in " ".join(probe.notes)
    _check(probe)


def test_samples_may_come_in_uneven_chunks():
    torch.manual_seed(0)
    model = chain("linear,tanh,linear")
    x = torch.randn(130, 3, 4, dtype=torch.float64)
    t = [0.05, 0.1, 0.2, 0.3, 0.4]
    whole = _probe(model, x, t=t)
    parts = [_probe(model, part, t=t) for part in (x[:70], x[70:])]
    for layer in whole.layers:
        for quantity in ("forward", "backward", "fisher"):
            mean = sum(
                n / 130 * getattr(p[layer.name], quantity)
                for n, p in zip((70, 60), parts, strict=True)
            )
            torch.testing.assert_close(getattr(layer, quantity), mean, rtol=1e-12, atol=0)


def test_layer_norm_at_finite_t_passes_through_its_slopes():
    """G before a LayerNorm is c0 + c2 t² + c4 t⁴ with a small c0: slopes 4, 2, 0 as t falls."""
    torch.manual_seed(0)
    d = 64
    model = nn.Sequential(
        nn.Linear(d, d, bias=False), nn.LayerNorm(d), nn.Linear(d, d, bias=False)
    ).double()
    x = torch.randn(64, d, dtype=torch.float64)
    t = torch.logspace(-4, 1.5, 45, dtype=torch.float64)
    probe = _probe(model, x, t=t)
    y = probe["0"].backward.log()
    local = torch.diff(y) / torch.diff(t.log())
    assert abs(float(local[0])) < 0.05  # c0: the mean's leak
    assert float(local.max()) > 1.5  # the unit's own t²
    assert probe["0"].rate.backward_slope == 0
    assert probe["0"].rate.apparent[2] == 1


def test_a_rotated_axis_collapses_behind_relu():
    """A dead axis tilted by s: slope 2K of a linear chain, 0 behind ReLUs below t ~ s^{1/K}."""
    torch.manual_seed(0)
    d, depth, s = 6, 3, 1e-4
    x = torch.randn(4000, d, dtype=torch.float64)
    axis = torch.zeros(d, dtype=torch.float64)
    axis[0], axis[1] = math.cos(s), math.sin(s)

    def moment(t, relu):
        weight = torch.eye(d, dtype=torch.float64) - (1 - t) * torch.outer(axis, axis)
        a = x
        for _ in range(depth):
            a = a @ weight.T
            a = a.relu() if relu else a
        return float((a @ axis).square().mean())

    def slope(t, relu):
        return math.log(moment(1.1 * t, relu) / moment(t, relu)) / math.log(1.1)

    assert slope(1e-2, False) == pytest.approx(2 * depth, abs=1e-6)
    crossover = s ** (1 / depth)
    assert slope(crossover * 6, True) == pytest.approx(2 * depth, abs=0.1)
    assert slope(crossover / 30, True) == pytest.approx(0, abs=0.05)


def test_the_model_is_left_alone():
    torch.manual_seed(0)
    model = chain("linear*2").float()
    before = copy.deepcopy(model.state_dict())
    probe = _probe(model, torch.randn(8, 3, 4))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32
    assert "predicted" in str(probe)
    assert probe.agrees
    with pytest.raises(KeyError, match="no layer"):
        probe["9"]


def test_a_unit_that_is_off_is_not_read():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight[1, 1] = -1.0
    x = torch.rand(8, 3) + 0.1
    probe = _probe(model, x, unit=1)
    assert "exactly zero" in probe["0"].verdicts["backward"]
    assert "exactly zero" in probe["2"].verdicts["forward"]


@pytest.mark.parametrize(
    ("kwargs", "error", "word"),
    [
        ({"t": [0.1, -1.0]}, ValueError, "t"),
        ({"t": []}, ValueError, "t"),
        ({"t": "all"}, TypeError, "t"),
        ({"t": [float("nan")]}, ValueError, "t"),
        ({"unit": 99}, ValueError, "unit"),
        ({"unit": "first"}, TypeError, "unit"),
        ({"bias": "none"}, ValueError, "bias"),
        ({"likelihood": "cauchy"}, ValueError, "likelihood"),
    ],
)
def test_errors_name_the_argument(kwargs, error, word):
    with pytest.raises(error, match=word):
        _probe(chain("linear*2"), torch.randn(4, 3, 4, dtype=torch.float64), **kwargs)


def test_numbers_that_are_not_finite():
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="inputs"):
        _probe(chain("linear"), x.fill_(math.nan))
    model = chain("linear")
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"0\.weight"):
        _probe(model, torch.randn(4, 3, 4, dtype=torch.float64))


class _Shared(nn.Module):
    """One weight used three times: t to the third."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.l(x))
        return x


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.GRU(4, 4, batch_first=True)
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        return self.o(self.l(x)[0][:, -1])


class _Tied(nn.Module):
    """An embedding that is also the head."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(20, 6)
        self.l = nn.Linear(6, 6)
        self.h = nn.Linear(6, 20, bias=False)
        self.h.weight = self.e.weight

    def forward(self, ids):
        return self.h(torch.tanh(self.l(self.e(ids))))


@pytest.mark.parametrize(
    ("build", "shape"), [(_Shared, (16, 4)), (_Recurrent, (16, 3, 4)), (_Tied, (8, 3))]
)
def test_weights_used_more_than_once(build, shape):
    torch.manual_seed(0)
    x = torch.randint(0, 20, shape) if build is _Tied else torch.randn(shape)
    _check(_probe(build(), x, unit=1))


def test_empty_inputs_and_no_module():
    with pytest.raises(ValueError, match="inputs"):
        _probe(chain("linear"), torch.zeros(0, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="model"):
        _probe(lambda x: x, torch.zeros(2, 4))
