"""Routes, precision, loss scaling, rounding, device step counts: options that change no numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast import _backend
from deaddir_fast.optim import DDCAdam

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
needs_extension = pytest.mark.skipif(
    _backend.unavailable("cpu") is not None, reason="the C++ extension is not built"
)


class Attention(nn.Module):
    """Frame, shared second moments, still biases."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return self.down(torch.relu(self.up(x)))


def pair() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "adamw": (deep, {"gauges": []}),
    "frame": (deep, {}),
    "shared": (Attention, {}),
    "pair": (pair, {"likelihood": "gaussian"}),
    "chain": (deep, {"gauges": "layerwise", "likelihood": "gaussian"}),
}
X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(5), dtype=F64)


def made(kind: str, dtype: torch.dtype = F64, **options: Any) -> tuple[nn.Module, DDCAdam]:
    build, known = KINDS[kind]
    torch.manual_seed(11)
    model = build().double()
    inputs = X if known.get("gauges") != [] else None
    opt = DDCAdam(model, **{"lr": 0.02, "weight_decay": 0.1, **known, **options}, inputs=inputs)
    # The same gauges at all precisions.
    return model.to(dtype), opt


def loss_of(model: nn.Module) -> Tensor:
    x = X.to(next(model.parameters()).dtype)
    return (model(x) - x[..., :3].sin()).square().mean()


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> nn.Module:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
    return model


def assert_close(a: nn.Module, b: nn.Module, bound: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.allclose(p, q[1], rtol=bound, atol=bound), name


# ------------------------------------------------------------------------------------- routes


@needs_extension
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-11), (F32, 2e-4)])
def test_routes_agree(kind: str, dtype: torch.dtype, bound: float) -> None:
    routes: list[dict[str, Any]] = [{}, {"fused": True}, {"fused": False}, {"foreach": True}]
    results = [train(*made(kind, dtype, **route), steps=8) for route in routes]
    for result in results[1:]:
        assert_close(result, results[0], bound)
    for one, other in ((0, 1), (2, 3)):  # the same code: the same bits
        assert_close(results[one], results[other], 0.0)


@needs_extension
def test_the_route_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from deaddir_fast.ops import _dispatch

    taken: list[str] = []
    run = _dispatch.launch

    def launch(name: str, *args: Any) -> Any:
        taken.append(_dispatch.chosen_route(name, *args))
        return run(name, *args)

    monkeypatch.setattr(_dispatch, "launch", launch)
    for options, route in (
        ({"fused": True}, "cpu"), ({"fused": False}, "reference"), ({"foreach": True}, "reference"),
    ):  # fmt: skip
        taken.clear()
        train(*made("frame", **options), steps=1)
        assert set(taken) == {route}
    with _backend.backend("reference"):
        taken.clear()
        train(*made("frame"), steps=1)
        assert set(taken) == {"reference"}
    assert _backend.backend() == "auto"


# ------------------------------------------------------------------------- device step counts


@pytest.mark.parametrize("kind", KINDS)
def test_device_step_counts_change_nothing(kind: str) -> None:
    """No graph on the CPU, but the numbers come from tensors all the same."""
    plain = train(*made(kind), steps=6)
    model, opt = made(kind, capturable=True, lr=torch.tensor(0.02, dtype=F64))
    train(model, opt, 6)
    assert_close(model, plain, 1e-13)
    for p, state in opt.state.items():
        assert state["step"].device == p.device and float(state["step"]) == 6


def test_counts_may_differ_between_parameters() -> None:
    results = []
    for capturable in (False, True):
        model, opt = made("frame", capturable=capturable)
        for n in range(5):
            opt.zero_grad()
            loss_of(model).backward()
            if n < 2:
                model[0].weight.grad = None  # type: ignore[index, union-attr]
            opt.step()
        results.append(model)
    assert_close(results[0], results[1], 1e-13)


# ------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("kind", KINDS)
def test_loss_scaling(kind: str) -> None:
    """Powers of two change no bits; a step with an infinite gradient is not taken."""
    plain, other = made(kind, F32)
    model, opt = made(kind, F32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for n in range(6):
        opt.zero_grad()
        scaler.scale(loss_of(model)).backward()
        spoiled = n == 3
        if spoiled:
            next(model.parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
            before = copy.deepcopy((model.state_dict(), opt.state_dict()))
        if n % 2:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(opt)
        scaler.update()
        if spoiled:
            assert scaler.get_scale() == 2.0**9
            for key, value in before[0].items():
                assert torch.equal(model.state_dict()[key], value)
            for number, state in before[1]["state"].items():
                for key, value in state.items():
                    assert torch.equal(opt.state_dict()["state"][number][key], value)
            continue
        train(plain, other, 1)
        assert_close(model, plain, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    """fp32 parameters, a bf16 pass: close to the exact run, and it learns."""
    exact = train(*made(kind, F32), steps=15)
    model, opt = made(kind, F32)
    losses = []
    for _ in range(15):
        opt.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = loss_of(model)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == F32 and p.isfinite().all() for p in model.parameters())
    assert float(loss_of(model)) == pytest.approx(float(loss_of(exact)), rel=0.1)


# ---------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", [{}, {"fused": False}])
def test_stochastic_rounding_goes_by_its_seed(kind: str, route: dict[str, Any]) -> None:
    def run(**options: Any) -> nn.Module:
        return train(*made(kind, BF16, **route, **options), steps=3)

    def same(a: nn.Module, b: nn.Module) -> bool:
        return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    one = run(stochastic_rounding=True, seed=1)
    assert same(one, run(stochastic_rounding=True, seed=1))
    assert not same(one, run(stochastic_rounding=True, seed=2))
    nearest = run()
    assert not same(one, nearest)
    assert same(nearest, run(seed=2))
    # A last place or two from one another.
    for p, q in zip(one.parameters(), nearest.parameters(), strict=True):
        assert torch.allclose(p.float(), q.float(), rtol=0.1, atol=0.03)


@pytest.mark.parametrize("kind", ["adamw", "blocks"])
@pytest.mark.parametrize("route", [{}, {"fused": False}])
def test_small_steps_are_lost_by_nearest_and_kept_on_average(
    kind: str, route: dict[str, Any]
) -> None:
    """Steps of 1/40 of a last place: nearest stays; the mean over entries moves as it should.

    Constant gradients make every step of Adam -lr. One entry is rounded by a Bernoulli variable
    of the last place u = 2^-7 and p = lr / u, so the mean over n entries after k steps has
    standard deviation about u sqrt(k p / n).
    """
    steps, u = 20, 2.0**-7
    rate = u / 40
    if kind == "adamw":
        given: Any = [nn.Parameter(torch.ones(4096, dtype=BF16)) for _ in range(2)]
        ps, each, options = given, rate, {"gauges": []}
    else:
        # Pairs of scalars: the radial step is spread over both log norms, lr / sqrt(2) each.
        given = nn.Sequential(
            nn.Linear(1, 256, bias=False), nn.ReLU(), nn.Linear(256, 1, bias=False)
        ).to(BF16)
        ps, each = list(given.parameters()), 1.5 * rate / 2**0.5
        options = {"likelihood": "gaussian", "inputs": torch.ones(2, 1, dtype=BF16)}
    n = sum(p.numel() for p in ps)
    moves = {}
    for rounding in (False, True):
        for p in ps:
            p.data.fill_(1.5)
        opt = DDCAdam(given, lr=rate, stochastic_rounding=rounding, **options, **route)
        if kind == "blocks":
            assert "pair" in opt.claims[0].treatment
        for _ in range(steps):
            for p in ps:
                p.grad = torch.ones_like(p)
            opt.step()
        moves[rounding] = torch.cat([p.detach().flatten() for p in ps]).double() - 1.5
    assert torch.equal(moves[False], torch.zeros(n, dtype=F64))
    spread = u * (steps * (each / u) / n) ** 0.5
    assert abs(float(moves[True].mean()) + steps * each) < 5 * spread + 0.05 * steps * each
    assert float(moves[True].std()) > 0.1 * u


# ------------------------------------------------------------------------------------ CUDA graphs


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=gpu) for k in KINDS])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_replays_of_a_graph_are_steps(kind: str, dtype: torch.dtype) -> None:
    """Captured after one step, on gradients that stay where they are."""
    rate = torch.tensor(0.02, dtype=F64, device="cuda")
    runs = []
    for graphed in (False, True):
        model, opt = made(kind, dtype, capturable=True, lr=rate.clone())
        model.to("cuda")
        x = X.to("cuda", dtype)

        def gradients(model: nn.Module = model, x: Tensor = x) -> None:
            (model(x) - x[..., :3].sin()).square().mean().backward()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradients()
            opt.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                opt.step()
        for n in range(5):
            opt.zero_grad(set_to_none=False)
            gradients()
            opt.param_groups[0]["lr"].fill_(0.02 / (n + 1))
            if graphed:
                graph.replay()
            else:
                opt.step()
        assert {float(s["step"]) for s in opt.state.values()} == {6.0}
        runs.append(model)
    assert_close(runs[0], runs[1], 1e-12 if dtype == F64 else 1e-5)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=gpu) for k in KINDS])
def test_gpu_steps_are_those_of_the_cpu(kind: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model, opt = made(kind)
        model.to(device)
        x = X.to(device)
        for _ in range(6):
            opt.zero_grad()
            (model(x) - x[..., :3].sin()).square().mean().backward()
            opt.step()
        results.append(model.cpu())
    assert_close(results[0], results[1], 1e-9)


@pytest.mark.parametrize("kind", [pytest.param("frame", marks=gpu)])
def test_capture_is_refused_without_device_step_counts(kind: str) -> None:
    model, opt = made(kind)
    model.to("cuda")
    x = X.to("cuda")
    model(x).square().sum().backward()
    opt.step()
    with (
        pytest.raises(ValueError, match="capturable: expected True where a step is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        opt.step()
