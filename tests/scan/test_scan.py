"""Scans of networks whose dead directions are known by construction."""

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import deaddir_fast as dd
from deaddir_fast.scan.candidates import Candidate
from deaddir_fast.scan.layer_report import dead_dimensions
from deaddir_fast.scan.measure import _flatness
from deaddir_fast.scan.nulls import Null
from deaddir_fast.scan.scan_report import ScanReport
from deaddir_fast.scan.spectra import Spectrum, spectrum

EPS = 2.0**-52


class Net(nn.Module):
    """Embedding, residual MLP behind a LayerNorm, a head behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.ln = nn.LayerNorm(16)
        self.fc1 = nn.Linear(16, 24)
        self.fc2 = nn.Linear(24, 16)
        self.ln2 = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.ln.weight.uniform_(0.5, 1.5)
            self.ln.bias.normal_()
            self.fc1.bias[3] = -100.0  # never on, whatever the input
            self.fc2.weight[:, 5] = 0.0  # its output is not used

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        h = h + self.fc2(torch.relu(self.fc1(self.ln(h))))
        return self.head(self.ln2(h.mean(1)))


class Power(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        return x**self.k


TOKENS = torch.randint(0, 40, (96, 12), generator=torch.Generator().manual_seed(5))


def exact_rank(model: nn.Module, x: Tensor) -> int:
    """Rank of the exact Fisher of a softmax, from the dense Jacobian of the centred logits."""
    twin = copy.deepcopy(model).double()
    state = {k: v.detach() for k, v in twin.named_parameters()}

    def logits(values: dict[str, Tensor]) -> Tensor:
        z = functional_call(twin, values, (x,))
        return z - z.mean(-1, keepdim=True)

    rows = torch.cat([v.flatten(2) for v in jacrev(logits)(state).values()], 2).flatten(0, 1)
    values = torch.linalg.svdvals(rows)
    return int((values > 1e-10 * values[0]).sum())


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, ScanReport]:
    torch.manual_seed(0)
    model = Net().eval()
    # Ten tokens are never used.
    return model, dd.scan(
        model, list(TOKENS.split(16)), out=tmp_path_factory.mktemp("scan") / "s", gauges=True
    )


def test_tokens_that_do_not_occur_are_null_on_the_data(net):
    layer = net[1].layers["emb"]
    assert layer["A"]["form"] == "diagonal" and layer["A"]["dead"] == 10
    assert layer["dead"]["data"] == 10 * 16


def test_the_kernel_of_a_layer_norm_is_algebraic(net):
    for name, norm in (("fc1", "ln"), ("head", "ln2")):
        layer = net[1].layers[name]
        assert layer["fed_by"] == norm
        (kernel,) = (d for d in layer["directions"] if d["label"] == f"kernel γ⁻¹ of {norm}")
        assert kernel["class"] == "algebraic" and math.isinf(kernel["order"])
        assert float(kernel["why"].rpartition(" ")[2]) >= 1 - 1e-8
        assert layer["A"]["dead"] == 1  # and nothing else
    assert net[1].layers["fc1"]["dead"]["algebraic"] == 24 + 3 * 16


def test_dead_and_unused_units(net):
    fc1, fc2 = net[1].layers["fc1"], net[1].layers["fc2"]
    # Unit 3 and one more are never on, unit 5 is not read: no gradient reaches them.
    with torch.no_grad():
        model, tokens = net[0], torch.arange(50)[:, None].expand(50, 12)
        on = (model.fc1(model.ln(model.emb(tokens))) > 0).flatten(0, 1).any(0)
    off = int((~on).sum())
    assert off >= 1 and fc1["G"]["dead"] == off + 1
    assert fc2["A"]["dead"] == off
    assert fc1["verdict"] == fc2["verdict"] == "resolved"


def test_the_head_has_the_class_shift(net):
    head = net[1].layers["head"]
    assert head["kind"] == "head" and head["G"]["dead"] == 1
    assert head["dead"]["gauge"] == head["A"]["rank"] == 16
    (shift,) = (d for d in head["directions"] if d["class"] == "gauge")
    assert shift["curvature"] == pytest.approx(0, abs=1e-25)


def test_live_directions_are_of_order_one(net):
    for layer in net[1].data["layers"]:
        live = layer["directions"][-1:]
        assert all(d["class"] == "live" and d["order"] == 1 for d in live)


def test_counts_add_up_and_bounds_hold(net):
    model, report = net
    for layer in report.data["layers"]:
        dead = layer["dead"]
        assert dead["block"] == sum(v for k, v in dead.items() if k != "block")
        assert dead["block"] <= layer["parameters"]
    totals, bound = report.data["totals"], report.data["totals"]["lambda"]
    assert totals["scanned"] == totals["parameters"]
    rank, d = exact_rank(model, TOKENS), totals["parameters"]
    assert rank / 2 <= bound["upper"] and bound["lower"] <= rank / 2
    assert bound["flat"] + bound["orbits"] <= d - rank


def test_dead_dimensions_are_null_in_the_exact_fisher(net):
    """Each class counted dead, checked against the null space by autograd."""
    report = net[1]
    rows = [d for layer in report.data["layers"] for d in layer["directions"]]
    for d in rows:
        if d["class"] in ("gauge", "algebraic", "data"):
            assert max(d["kl"]) <= 1e-6 and d["curvature"] <= 1e-20


@pytest.mark.parametrize("k", [2, 3])
def test_a_singular_direction_of_order_k(k, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 3, bias=False), Power(k), nn.Linear(3, 2, bias=False)
    ).double()
    model[0].weight.data[2] = 0  # (t w·x)^k: order k along the rows of unit 2
    report = dd.scan(
        model.eval(), [torch.randn(64, 4).double()], out=tmp_path / "s", likelihood="gaussian",
        fisher="exact",
    )  # fmt: skip
    first = report.layers["0"]
    assert first["dead"]["singular"] == 4 and first["dead"]["unresolved"] == 0
    (singular,) = (d for d in first["directions"] if d["class"] == "singular")
    assert singular["order"] == pytest.approx(k, abs=1e-6) and singular["jet"] == k
    assert singular["contribution"] == pytest.approx(1 / (2 * k), rel=1e-6)


@pytest.mark.parametrize(
    "ratio, spread, eps, said",
    [
        (1e-28, 1.0, EPS, "flat"),
        (1e-25, 1.0, EPS, "close to rounding"),
        (1e-25, 1e6, EPS, "flat"),  # turned towards the least eigenvector by rounding
        (1e-12, 1.0, EPS, None),  # moves: to be fitted
        (1e-5, 1.0, 2.0**-23, None),
        (5e-8, 1e6, 2.0**-23, "close to rounding"),  # order 8 would show it at 0.3: no proof
    ],
)
def test_what_counts_as_flat(ratio, spread, eps, said):
    u = torch.zeros(2, 2)
    candidate = Candidate("x", "outputs", True, u, None, "", spread=spread)
    live = torch.tensor(1e-3).double()
    found = _flatness(candidate, ratio * live.expand(2), live, eps, 1e-9)
    assert (found is None) if said is None else said in found[1]


def test_short_rays_prove_nothing_flat(tmp_path):
    """At t = 1e-3 order 3 shows 1e-12 of a live direction: that must not pass for flat."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), Power(3), nn.Linear(3, 2, bias=False))
    model = model.double().eval()
    model[0].weight.data[2] = 0
    report = dd.scan(
        model, torch.randn(64, 4).double(), out=tmp_path / "s", likelihood="gaussian",
        fisher="exact", radii=[1e-4, 1e-3],
    )  # fmt: skip
    entry = next(d for d in report.layers["0"]["directions"] if d["part"] == "outputs")
    assert entry["class"] in ("singular", "unresolved") and entry["jet"] == 3


def test_a_tied_weight_is_known_when_only_one_layer_is_read(tmp_path):
    torch.manual_seed(7)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.ln = nn.Embedding(9, 6), nn.LayerNorm(6)
            self.head = nn.Linear(6, 9)
            self.head.weight = self.emb.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.ln(self.emb(x)))

    model, x = Tied().double().eval(), torch.randint(0, 9, (40, 3))
    report = dd.scan(model, x, out=tmp_path / "s", layers=["head"])
    head, bound = report.layers["head"], report.data["totals"]["lambda"]
    assert head["A"]["dead"] == 1 and "also that of emb" in head["notes"][0]
    assert bound["flat"] == 0 and head["dead"]["unresolved"] == head["dead"]["block"]


def test_what_is_in_doubt_is_neither_classified_nor_counted():
    """Eigenvalues close to rounding, and a ray that contradicts the null space."""
    values = torch.tensor([0.0, 1e-9, 1.0]).double()
    g = spectrum(torch.eye(2).double(), relative=1e-14, limit=9)
    matrix, null = torch.diag(values), torch.eye(3).double()[:, :1]
    nulls = (Null(null, null[:, :0], 3, True), Null(null[:2, :0], null[:2, :0], 2, False))

    def count(a: Spectrum, *readings: dict) -> dict[str, int]:
        return dead_dimensions(a, g, nulls, readings, groups=1, outputs=2, shift=False)

    sure = spectrum(matrix, relative=1e-14, limit=9)
    assert count(sure)["algebraic"] == 2 and count(sure)["unresolved"] == 0
    close = spectrum(matrix, relative=1e-11, limit=9)
    assert close.ambiguous == 1 and count(close)["algebraic"] == 0
    assert count(close)["unresolved"] == count(close)["block"] == 2
    moved = {"part": "inputs", "class": "unresolved", "label": "x"}
    assert count(sure, moved)["unresolved"] == 2
    # Of three groups of two outputs each only what their inputs leave null is known.
    groups = dead_dimensions(sure, g, None, [], groups=3, outputs=2, shift=False)
    assert groups["block"] == groups["unresolved"] == 2


def test_factors_are_those_of_kron_factors(tmp_path):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    batches = [torch.randn(8, 5).double() for _ in range(5)]
    report = dd.scan(model, batches, out=tmp_path / "s", shards=3, directions_per_layer=0)
    factors = dd.kron_factors(model, batches, fisher="mc")
    for name, (a, g, _) in factors.items():
        for which, matrix in (("A", a), ("G", g)):
            values = torch.linalg.eigvalsh(matrix)
            torch.testing.assert_close(report.spectrum(name, which), values, rtol=1e-9, atol=1e-13)
        assert report.layers[name]["rows"] == 40


def test_rank_limited_by_samples_is_said(tmp_path):
    model = nn.Sequential(nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    report = dd.scan(model, torch.randn(10, 30), out=tmp_path / "s")
    first = report.layers["0"]
    assert first["A"]["rank"] == 10 and "limited by samples" in first["A"]["verdict"]
    assert first["dead"]["unresolved"] > 0 and "limited by samples" in first["verdict"]
    assert report.data["totals"]["lambda"]["flat"] == 0  # more data would fill it


def test_padding_does_not_count(tmp_path):
    torch.manual_seed(3)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 20)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            del attention_mask
            return self.head(torch.tanh(self.fc(self.emb(input_ids))))

    model = Masked().double().eval()
    ids, mask = torch.randint(1, 20, (6, 5)), torch.ones(6, 5).long()
    mask[3:, 3:] = 0

    def read(extra: int, where: str) -> ScanReport:
        padded = torch.nn.functional.pad(ids, (0, extra), value=0)
        keep = torch.nn.functional.pad(mask, (0, extra), value=0)
        batch = {"input_ids": padded, "attention_mask": keep}
        return dd.scan(model, [batch], out=tmp_path / where)

    short, long = read(0, "a"), read(4, "b")
    assert short.layers["fc"]["rows"] == long.layers["fc"]["rows"] == int(mask.sum())
    for name in short.layers:
        for which in "AG":
            torch.testing.assert_close(
                short.spectrum(name, which), long.spectrum(name, which), rtol=1e-9, atol=1e-13
            )
        for one, other in zip(
            short.layers[name]["directions"], long.layers[name]["directions"], strict=True
        ):
            assert one["label"] == other["label"] and one["class"] == other["class"]
            assert one["curvature"] == pytest.approx(other["curvature"], rel=1e-6, abs=1e-20)


def test_what_is_null_for_one_use_of_a_tied_weight_is_not_counted(tmp_path):
    torch.manual_seed(6)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.fc = nn.Embedding(12, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.fc(self.emb(x))))

    model = Tied().double().eval()
    x = torch.randint(0, 8, (40, 3))  # four tokens do not occur: their rows still move logits
    report = dd.scan(model, x, out=tmp_path / "s")
    emb = report.layers["emb"]
    assert emb["A"]["dead"] == 4 and emb["dead"]["data"] == 0
    assert emb["dead"]["unresolved"] == emb["dead"]["block"] > 0
    assert "also that of head" in emb["notes"][0]
    bound, d = report.data["totals"]["lambda"], report.data["totals"]["parameters"]
    rank = exact_rank(model, x)
    assert bound["flat"] == 0 and rank / 2 <= bound["upper"] <= d / 2


def test_units_have_predicted_and_measured_rates(tmp_path):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    report = dd.scan(
        model.eval(), torch.randn(32, 6), out=tmp_path / "s", directions_per_layer=0, units=[1]
    )
    (probe,) = report.data["probes"]
    slopes = {(r["layer"], r["quantity"]): r for r in probe["rows"]}
    assert all(r["verdict"] == "agrees" for r in probe["rows"])
    assert [slopes[name, "forward"]["predicted"] for name in "024"] == [0, 2, 2]
    assert [slopes[name, "backward"]["predicted"] for name in "024"] == [4, 2, 0]


def test_a_model_that_casts_to_fp32_is_read_as_such(tmp_path):
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.fc(x)).float().to(x.dtype))

    report = dd.scan(Casting().eval(), torch.randn(20, 6), out=tmp_path / "s")
    assert any("partly in float32" in note for note in report.data["notes"])
    assert report.layers["head"]["A"]["tolerance"] > 1e-12 * report.layers["head"]["A"]["trace"]


def test_what_is_written(net):
    folder = net[1].folder
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "fc1" in page and "http://" not in page.replace("http://www.w3.org", "")
    again = ScanReport.read(folder)
    assert again.data == net[1].data
    json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert "6 layers" in str(again) and "≤ λ ≤" in str(again)
    with pytest.raises(KeyError, match="no spectrum"):
        again.spectrum("nowhere")


def test_explain_names_route_and_kernel(net, capsys):
    net[1].explain()
    out = capsys.readouterr().out
    assert "gram_packed" in out and "exact block" in out and "counts" in out


def test_the_model_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dd.scan(model, torch.randn(12, 4), out=tmp_path / "s")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"directions_per_layer": -1}, "directions_per_layer"),
        ({"radii": [0.0, 0.1]}, "radii"),
        ({"ray_samples": 0}, "ray_samples"),
        ({"shards": 0}, "shards"),
        ({"fisher": "guess"}, "fisher"),
        ({"likelihood": "cauchy"}, "likelihood"),
        ({"layers": ["nothing*"]}, "layers"),
        ({"units": [-1]}, "units"),
    ],
)
def test_bad_arguments_are_named(change, message, tmp_path):
    model = nn.Linear(3, 2).eval()
    with pytest.raises((ValueError, TypeError), match=message):
        dd.scan(model, torch.randn(4, 3), out=tmp_path / "s", **change)
    assert not (tmp_path / "s").exists()


def test_no_layers_and_no_batches(tmp_path):
    with pytest.raises(ValueError, match="batches"):
        dd.scan(nn.Linear(3, 2).eval(), [], out=tmp_path / "s")
    with pytest.raises(TypeError, match="model"):
        dd.scan("a model", torch.randn(4, 3), out=tmp_path / "s")
    with pytest.raises(ValueError, match="model"):
        dd.scan(nn.PReLU().eval(), torch.randn(4, 3), out=tmp_path / "s")
