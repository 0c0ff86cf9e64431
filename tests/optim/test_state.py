"""States: through files and back, bit for bit; to another point of the orbit; of other runs."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deaddir_fast.gauge import find
from deaddir_fast.optim import DDCAdam

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def save(state: dict[str, Any], folder: Path) -> None:
    """Tensors to safetensors, all else to JSON: no pickle."""
    tensors: dict[str, Tensor] = {}

    def taken(x: Any, where: str) -> Any:
        if isinstance(x, Tensor):
            tensors[where] = x.detach().clone(memory_format=torch.contiguous_format)
            return {"tensor": where}
        if isinstance(x, dict):
            return {"dict": [[k, taken(v, f"{where}.{k}")] for k, v in x.items()]}
        if isinstance(x, (list, tuple)):
            return [taken(v, f"{where}.{n}") for n, v in enumerate(x)]
        return x

    text = json.dumps(taken(state, "state"))
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(text)


def load(folder: Path) -> dict[str, Any]:
    tensors = load_file(folder / "optimizer.safetensors")

    def put(x: Any) -> Any:
        if isinstance(x, list):
            return [put(v) for v in x]
        if isinstance(x, dict):
            return tensors[x["tensor"]] if "tensor" in x else {k: put(v) for k, v in x["dict"]}
        return x

    found = put(json.loads((folder / "optimizer.json").read_text()))
    assert isinstance(found, dict)
    return found


class Attention(nn.Module):
    """Norm, two heads, MLP: rescalings, shared second moments, still biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.mha(h, h, h, need_weights=False)[0]
        return self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Three linear maps, ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Filters(nn.Module):
    """Convolutions in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(3, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head(x.flatten(2).mean(2))


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    Attention: (8, 5, 6),
    Stack: (8, 6),
    Filters: (8, 2, 5, 5),
}


def data(kind: type[nn.Module], dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(2)).to(dtype)


def made(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return kind().to(dtype)


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        out = model(x)
        target = torch.arange(3, dtype=out.dtype) + 0.3 * x.flatten(1).sum(1, keepdim=True)
        (out.flatten(1)[:, :3] - target).square().mean().backward()
        opt.step()


def same_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


CASES: list[tuple[type[nn.Module], dict[str, Any], set[str]]] = [
    (Attention, {}, {"frame_constants"}),
    (Attention, {"capturable": True}, {"frame_constants"}),
    (Stack, {"likelihood": "categorical"}, {"frame_constants"}),
    (Stack, {"gauges": "layerwise", "vertical": True, "likelihood": "gaussian"},
     {"radial_exp_avg", "radial_exp_avg_sq", "vertical_exp_avg", "vertical_exp_avg_sq"}),
    (Filters, {}, {"frame_constants"}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize(("kind", "options", "keys"), CASES)
def test_files_and_back(
    kind: type[nn.Module],
    options: dict[str, Any],
    keys: set[str],
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    x = data(kind, dtype)
    exact = made(kind, F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find(exact, x.double())
    options = {"lr": 0.01, "weight_decay": 0.1, "gauges": found, **options}
    if dtype == BF16:
        options["stochastic_rounding"] = True
    if isinstance(options["gauges"], str) and dtype == BF16:
        options["inputs"] = x
    model = made(kind, dtype)
    opt = DDCAdam(model, **options)
    train(model, opt, x, 4)
    saved = opt.state_dict()
    assert keys <= {k for s in saved["state"].values() for k in s}
    for p, state in opt.state.items():
        assert float(state["step"]) == 4
        for key, value in state.items():
            if key == "step":
                assert value.dtype == F32
            elif key != "frame_constants":
                assert value.dtype == (F64 if dtype == F64 else F32), key
            else:
                assert value.dtype == F64
        assert state["exp_avg"].stride() == p.stride()
    save(saved, tmp_path)
    other = made(kind, dtype)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    its = DDCAdam(other, **{**options, "lr": 0.5})
    train(other, its, x, 1)  # what was there before does not matter
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    its.load_state_dict(load(tmp_path))
    assert its.param_groups[0]["lr"] == 0.01
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == its.state[q].keys()
        for key, value in opt.state[p].items():
            twin = its.state[q][key]
            assert torch.equal(value, twin), key
            assert value.dtype == twin.dtype and value.stride() == twin.stride(), key
    train(model, opt, x, 3)
    train(other, its, x, 3)
    same_bits(model, other)


def test_heads_share_second_moments_in_the_state() -> None:
    model = made(Attention, F64)
    opt = DDCAdam(model, gauges=find(model, data(Attention, F64)))
    train(model, opt, data(Attention, F64), 1)
    # Two heads, of three units each, read by six columns; out_proj the other way round.
    assert opt.state[model.mha.out_proj.weight]["exp_avg_sq"].shape == (6, 2)
    rows = opt.state[model.mha.in_proj_weight]["exp_avg_sq"].shape
    assert rows == (6, 6)


def moved(model: nn.Module, gauges: Any, generator: torch.Generator) -> dict[str, Tensor]:
    state = {n: p.detach() for n, p in model.named_parameters()}
    for gauge in gauges:
        # Positive: a change of sign turns moments along with the weights.
        state = {**state, **gauge.act(state, gauge.random_element(generator).abs())}
    return state


@pytest.mark.parametrize("kind", [Attention, Stack, Filters])
def test_a_state_goes_along_with_a_rescaled_model(kind: type[nn.Module]) -> None:
    """Trained, moved along the rescalings, with the same state: the functions stay equal."""
    x = data(kind, F64)
    model = made(kind, F64)
    gauges = find(model, x)
    rescalings = [g for g in gauges if g.name.startswith("rescaling")]
    assert rescalings
    opt = DDCAdam(model, lr=0.02, weight_decay=0.1, gauges=gauges)
    train(model, opt, x, 5)
    twin = made(kind, F64)
    twin.load_state_dict(model.state_dict())
    values = moved(twin, rescalings, torch.Generator().manual_seed(4))
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(values[name])
    its = DDCAdam(twin, lr=0.02, weight_decay=0.1, gauges=gauges)
    its.load_state_dict(opt.state_dict())
    assert float((twin(x) - model(x)).detach().abs().max()) < 1e-12
    before = model(x).detach()
    train(model, opt, x, 20)
    train(twin, its, x, 20)
    assert float((model(x) - before).detach().abs().max()) > 1e-2
    assert torch.allclose(twin(x), model(x), rtol=1e-10, atol=1e-11)
    distance = max(
        float((p - q).detach().abs().max())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert distance > 0.1


def test_constants_that_are_not_in_the_state_are_made_anew() -> None:
    x = data(Stack, F64)
    model = made(Stack, F64)
    gauges = find(model, x)
    opt = DDCAdam(model, lr=0.02, gauges=gauges)
    train(model, opt, x, 3)
    saved = opt.state_dict()
    gone = [s.pop("frame_constants") for s in saved["state"].values() if "frame_constants" in s]
    assert len(gone) == 1 and gone[0].shape == (2,)
    its = DDCAdam(model, lr=0.02, gauges=gauges)
    its.load_state_dict(saved)
    assert all("frame_constants" not in s for s in its.state.values())
    # Those of the present point, as a fresh optimizer has them.
    fresh = DDCAdam(model, lr=0.0, gauges=gauges)
    train(model, fresh, x, 1)
    train(model, its, x, 1)
    made_anew = [s["frame_constants"] for s in its.state.values() if "frame_constants" in s]
    expected = [s["frame_constants"] for s in fresh.state.values() if "frame_constants" in s]
    assert torch.equal(made_anew[0], expected[0])
    assert not torch.equal(made_anew[0], gone[0])


def test_the_frame_may_be_kept_by_a_parameter_without_a_gradient() -> None:
    """Its first parameter gets none in the first steps, and then does."""
    x = data(Stack, F64)
    model = made(Stack, F64)
    opt = DDCAdam(model, lr=0.02, gauges=find(model, x))
    for n in range(4):
        opt.zero_grad()
        model(x).square().sum().backward()
        if n < 2:
            model.layers[0].weight.grad = None
        saved = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(saved)
        opt.step()
    steps = [float(opt.state[p]["step"]) for p in model.parameters()]
    assert steps == [2.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_a_state_of_adamw_is_gone_on_with() -> None:
    x = data(Stack, F64)
    one, other = made(Stack, F64), made(Stack, F64)
    theirs = torch.optim.AdamW(one.parameters(), lr=0.02, weight_decay=0.1)
    train(one, theirs, x, 3)
    other.load_state_dict(one.state_dict())
    ours = DDCAdam(other, gauges=[])
    ours.load_state_dict(theirs.state_dict())
    train(one, theirs, x, 3)
    train(other, ours, x, 3)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-13, atol=1e-13)
    # And with options that its state lacks.
    assert ours.param_groups[0]["stochastic_rounding"] is False


def test_another_state_is_refused_and_changes_nothing() -> None:
    x = data(Attention, F64)
    model = made(Attention, F64)
    gauges = find(model, x)
    opt = DDCAdam(model, lr=0.02, gauges=gauges)
    plain = DDCAdam(model, lr=0.5, gauges=[])
    train(model, plain, x, 1)
    train(model, opt, x, 1)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"state_dict: expected exp_avg_sq of shape .*other gaug"):
        opt.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(DDCAdam(model.up, gauges=[]).state_dict())
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(after["state"][number][key], value)
    train(model, opt, x, 1)


def test_hooks_may_change_what_is_loaded() -> None:
    x = data(Stack, F64)
    model = made(Stack, F64)
    opt = DDCAdam(model, gauges=find(model, x))
    train(model, opt, x, 2)
    its = DDCAdam(model, gauges=opt.gauges)
    seen: list[Tensor] = []

    def doubled(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        state = {
            n: {k: 2 * v if k == "exp_avg" else v for k, v in s.items()}
            for n, s in given["state"].items()
        }
        return {**given, "state": state}

    def look(optimizer: Any) -> None:
        seen.append(optimizer.state[model.layers[0].weight]["exp_avg"])

    its.register_load_state_dict_pre_hook(doubled)
    its.register_load_state_dict_post_hook(look)
    its.load_state_dict(opt.state_dict())
    assert torch.equal(seen[0], 2 * opt.state[model.layers[0].weight]["exp_avg"])
    its.load_state_dict(opt.state_dict())  # our own hooks are gone
    assert len(seen) == 2


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"gauges": "layerwise"}])
def test_step_counts_and_untouched_parameters(options: dict[str, Any]) -> None:
    model = made(Stack, F32)
    spare = nn.Parameter(torch.ones(3))
    opt = DDCAdam(model, **options)
    opt.add_param_group({"params": [spare]})
    assert opt.state_dict()["state"] == {}
    train(model, opt, data(Stack, F32), 3)
    saved = opt.state_dict()
    assert set(saved["state"]) == set(range(6))
    assert {float(s["step"]) for s in saved["state"].values()} == {3.0}
    its = DDCAdam(model, **options)
    its.add_param_group({"params": [spare]})
    its.load_state_dict(saved)
    assert spare not in its.state
