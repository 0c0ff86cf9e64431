"""What is refused and how it says so; what no step may turn into NaN; what NaN has to spoil."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast.gauge import find
from deaddir_fast.optim import DDCAdam
from deaddir_fast.optim.claims import NONE

F64 = torch.float64


def net(hidden: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def chain() -> nn.Sequential:
    return net()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=F64)


# --------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"lr": -1.0}, ValueError, r"lr: expected a finite number >= 0, got float -1.0"),
        ({"lr": float("nan")}, ValueError, "lr: expected"),
        ({"lr": float("inf")}, ValueError, "lr: expected"),
        ({"lr": "1e-3"}, TypeError, "lr: expected a real number, got str"),
        ({"lr": None}, TypeError, "lr: expected"),
        ({"lr": True}, TypeError, "lr: expected"),
        ({"lr": torch.ones(2)}, ValueError, "lr: expected .* one element, got a float32 tensor"),
        ({"lr": torch.tensor(1j)}, ValueError, "lr: expected a number or a real tensor"),
        ({"betas": 0.9}, ValueError, "betas: expected two numbers"),
        ({"betas": (0.9,)}, ValueError, "betas: expected two numbers"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]: expected a number in \[0, 1\), got"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]: expected a number in \[0, 1\)"),
        ({"betas": (0.9, "x")}, TypeError, r"betas\[1\]: expected a real number"),
        ({"eps": -1e-8}, ValueError, "eps: expected a finite number >= 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a finite number >= 0"),
        ({"weight_decay": "no"}, TypeError, "weight_decay: expected"),
        ({"gauges": "all"}, ValueError, "gauges: expected one of 'auto', 'layerwise', got str"),
        ({"gauges": [1]}, TypeError, "gauges: expected 'auto', 'layerwise' or Gauges, got int 1"),
        ({"gauges": 3}, TypeError, "gauges: expected 'auto', 'layerwise' or Gauges, got int 3"),
        ({"gauges": None}, TypeError, "gauges: expected .* got NoneType None"),
        ({"likelihood": "poisson"}, ValueError, "likelihood: expected one of 'categorical'"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer >= 0"),
        ({"foreach": True, "fused": True}, ValueError, "fused: expected False or None where fore"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        DDCAdam(pair(), **options)
    if "gauges" in options or "likelihood" in options:
        return
    # The same in a group, which leaves the optimizer as it was.
    opt = DDCAdam(pair(), gauges=[])
    extra = nn.Parameter(torch.ones(2))
    with pytest.raises(kind, match=said):
        opt.add_param_group({"params": [extra], **options})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [extra]})


def test_groups_cannot_ask_for_different_routes() -> None:
    opt = DDCAdam(pair(), gauges=[], fused=False)
    with pytest.raises(ValueError, match="fused: expected False, as in the first param group"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "fused": True})


@pytest.mark.parametrize("given", [None, 3, [3], ["x"], [(1, 2, 3)], {1}])
def test_things_that_are_no_parameters(given: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        DDCAdam(given, gauges=[])


def test_parameters_of_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="params: expected real dense parameters, got a complex"):
        DDCAdam([nn.Parameter(torch.ones(2, dtype=torch.complex64))], gauges=[])
    sparse = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"params: expected real dense .* torch.sparse_coo"):
        DDCAdam([sparse], gauges=[])
    with pytest.raises(ValueError, match="empty parameter list"):
        DDCAdam(nn.ReLU(), gauges=[])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module where params is given"):
        DDCAdam(list(pair().parameters()), params=[], gauges=[])
    with pytest.raises(ValueError, match="non-leaf"):
        DDCAdam([torch.ones(2, requires_grad=True) * 2], gauges=[])


def test_a_sparse_gradient_names_the_parameter() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    opt = DDCAdam(model, gauges=[])
    model(torch.tensor([1, 2])).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"sparse_coo one for '0.weight'; use sparse=False"):
        opt.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * mask)


@pytest.mark.parametrize("gauges", ["auto", "layerwise"])
def test_a_model_whose_inputs_cannot_be_made_up_says_what_to_pass(gauges: str) -> None:
    model = TwoInputs()
    with pytest.raises(ValueError, match=r"inputs: .*pass a batch.*inputs=.*gauges=.*\[\]"):
        DDCAdam(model, gauges=gauges)
    DDCAdam(model, gauges=[])
    opt = DDCAdam(model, gauges=gauges, inputs=(torch.randn(3, 4), torch.ones(3, 3)))
    assert any(c.treatment != NONE for c in opt.claims)
    DDCAdam(model, gauges=list(opt.gauges))


def test_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    from deaddir_fast import _native

    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "why_not", "it was not built")
    model = pair()
    opt = DDCAdam(model, fused=True)
    model(X).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="fused: compiled kernels are demanded, but it was not"):
        opt.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other = DDCAdam(model)
    other.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


# ------------------------------------------------------------------------------------ claims


def test_gauges_of_unknown_parameters_are_not_claimed() -> None:
    whole = pair()
    gauges = find(whole)
    named = list(whole.named_parameters())
    opt = DDCAdam([(n, p) for n, p in named if n != "2.weight"], gauges=gauges)
    for claim in opt.claims:
        if "2.weight" in claim.gauge.parameters:
            assert claim.treatment == NONE
            assert claim.note == "its parameter '2.weight' is not known to the optimizer"
    assert {c.treatment for c in opt.claims} == {NONE}
    # Known, but not stepped: the frame reads it.
    frozen = DDCAdam(whole, params=[p for n, p in named if n != "2.weight"], gauges=gauges)
    assert any(c.treatment == "path-norm frame" for c in frozen.claims)


def test_gauges_of_the_other_likelihood_are_left_out() -> None:
    shifts = {
        kind: [c for c in DDCAdam(pair(), likelihood=kind).claims if "shift" in c.gauge.name]
        for kind in ("categorical", "gaussian")
    }
    assert len(shifts["categorical"]) == 1 and shifts["gaussian"] == []


def test_describe_is_a_table() -> None:
    text = DDCAdam(net()).describe().splitlines()
    assert text[0].split() == ["gauge", "group", "treatment", "note"]
    assert set(text[1]) == {"-", " "}
    column = text[0].index("treatment")
    assert text[2].startswith("rescaling: 0 -> 2") and "(R_>0)^5" in text[2]
    assert text[2][column:].startswith("path-norm frame")
    assert text[-1] == "0 of 6 parameters are in no claimed gauge: AdamW's step"
    alone = DDCAdam(net(), gauges=[]).describe().splitlines()
    assert len(alone) == 3
    assert alone[-1] == "6 of 6 parameters are in no claimed gauge: AdamW's step"
    opt = DDCAdam(net())
    extra = nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [extra]})
    assert opt.describe().endswith("1 of 7 parameters are in no claimed gauge: AdamW's step")


def test_claims_say_what_they_are() -> None:
    claim, free = DDCAdam(pair(), likelihood="gaussian").claims
    assert free.gauge.group == "S_5" and "units alike" in free.treatment
    assert str(claim) == "rescaling: 0 -> 2 (R_>0)^5: pair step per unit"
    assert str(replace(claim, note="so")) == str(claim) + " (so)"


# ------------------------------------------------------------------------- NaN, zeros, no units


def step(model: nn.Module, opt: DDCAdam, spoil: Callable[[nn.Module], None] | None = None) -> None:
    opt.zero_grad()
    (model(X) - X[:, :3]).square().mean().backward()
    if spoil is not None:
        spoil(model)
    opt.step()


ROUTES: list[dict[str, Any]] = [{}, {"fused": False}]


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_gradients_spoil_as_with_adamw(bad: float, route: dict[str, Any]) -> None:
    one, other = net(), net()
    ours = DDCAdam(one, gauges=[], **route)
    theirs = torch.optim.AdamW(other.parameters(), weight_decay=0.0)

    def spoil(model: nn.Module) -> None:
        assert isinstance(model, nn.Sequential)
        model[0].weight.grad[1, 2] = bad  # type: ignore[index, union-attr]

    for n in range(3):
        for model, opt in ((one, ours), (other, theirs)):
            step(model, opt, spoil if n == 1 else None)  # type: ignore[arg-type]
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.isnan(), q.isnan())
            assert torch.equal(p.isinf(), q.isinf())


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("make", "options"),
    [(net, {}), (pair, {"likelihood": "gaussian"}), (net, {"gauges": "layerwise"})],
)
def test_bad_gradients_are_not_hidden(
    make: Callable[[], nn.Sequential], options: dict[str, Any], bad: float, route: dict[str, Any]
) -> None:
    model = make()
    opt = DDCAdam(model, **options, **route)

    def spoil(_: nn.Module) -> None:
        model[0].weight.grad[1, 2] = bad

    step(model, opt)
    step(model, opt, spoil)
    assert model[0].weight[1, 2].isnan()
    # Like AdamW's, the step of what no symmetry ties to it stays finite.
    if "gauges" not in options:
        others = [n for n in range(5) if n != 1]
        assert model[0].weight[others].isfinite().all()
    step(model, opt)
    assert model[0].weight[1, 2].isnan()


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (net, {}),
        (pair, {"likelihood": "gaussian"}),
        (net, {"gauges": "layerwise", "likelihood": "gaussian"}),
    ],
)
@pytest.mark.parametrize("dead", ["row", "column", "matrix", "output", "all"])
def test_zeros_step_without_nan(
    dead: str,
    make: Callable[[], nn.Sequential],
    options: dict[str, Any],
    vertical: bool,
    route: dict[str, Any],
) -> None:
    """Units without incoming or outgoing weights; matrices that start at zero."""
    model = make()
    with torch.no_grad():
        if dead in ("row", "matrix", "all"):
            rows = slice(2, 3) if dead == "row" else slice(None)
            model[0].weight[rows] = 0
            model[0].bias[rows] = 0
        if dead == "column":
            model[2].weight[:, 2] = 0
        if dead in ("output", "all"):
            for p in model[-1].parameters():
                p.zero_()
        if dead == "all":
            for p in model.parameters():
                p.zero_()
    opt = DDCAdam(model, lr=0.01, weight_decay=0.1, vertical=vertical, **options, **route)
    start = copy.deepcopy(model.state_dict())
    for _ in range(4):
        step(model, opt)
        for name, p in model.named_parameters():
            assert p.isfinite().all(), name
            # No step of Adam is much longer than its rate, in balance; the frame stays near 1.
            assert float((p - start[name]).abs().max()) < 1.0, name
        for state in opt.state.values():
            assert all(v.isfinite().all() for v in state.values())
    assert not torch.equal(model[-1].bias, start[f"{len(model) - 1}.bias"])


def test_a_zero_output_layer_learns() -> None:
    model = net()
    nn.init.zeros_(model[-1].weight)
    opt = DDCAdam(model, lr=0.01)
    losses = []
    for _ in range(60):
        step(model, opt)
        losses.append(float((model(X) - X[:, :3]).detach().square().mean()))
    assert losses[-1] < 0.5 * losses[0]
