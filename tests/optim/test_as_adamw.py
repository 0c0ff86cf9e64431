"""Without gauges the step is that of torch.optim.AdamW, however one asks for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deaddir_fast.optim import DDCAdam

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
STEPS = 6
# Both round each operation once; a step of lr 0.05 on numbers of order one.
BOUND = {F64: 1e-14, F32: 3e-6}

Params = list[nn.Parameter]


def params(dtype: torch.dtype = F64) -> Params:
    """All shapes: scalar, empty, vector, matrices and filters in any memory layout, with gaps."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(), (0,), (3, 0), (5,), (4, 6), (3, 2, 3, 3), (2, 3, 4)]
    tensors = [torch.randn(s, generator=draw, dtype=F64) for s in shapes]
    tensors.append(torch.randn(6, 4, generator=draw, dtype=F64).T)
    filters = torch.randn(4, 3, 2, 2, generator=draw, dtype=F64)
    tensors.append(filters.to(memory_format=torch.channels_last))
    tensors.append(torch.randn(4, 6, generator=draw, dtype=F64)[:, ::2])
    tensors.append(torch.randn(2, 3, 4, generator=draw, dtype=F64).permute(2, 0, 1))
    return [nn.Parameter(t.to(dtype)) for t in tensors]


def copies(ps: Params) -> Params:
    """The same values in the same memory layout, gaps included."""
    empty = [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype) for p in ps]
    return [nn.Parameter(q.copy_(p.detach())) for p, q in zip(ps, empty, strict=True)]


def set_gradients(groups: list[Params], n: int, *, layout: str = "own") -> None:
    """The same random gradients everywhere."""
    draw = torch.Generator().manual_seed(100 + n)
    for same in zip(*groups, strict=True):
        g = torch.randn(same[0].shape, generator=draw, dtype=F64)
        for p in same:
            given = torch.empty_like(p, memory_format=torch.preserve_format)
            if layout == "other":
                given = torch.empty(tuple(reversed(p.shape)), dtype=p.dtype)
                given = given.permute(tuple(reversed(range(p.ndim))))
            p.grad = given.copy_(g)


def assert_close(ours: Params, theirs: Params, bound: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=bound, atol=bound), (a - b).abs().max()


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("layout", ["own", "other"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
        {"betas": (0.0, 0.5), "eps": 1e-3},
        {"lr": torch.tensor(0.03)},
        {"lr": torch.tensor([0.03])},
        {"foreach": True},
        {"fused": False},
        {"capturable": True, "weight_decay": 0.1},
        {"lr": 0.0, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_steps(options: dict[str, Any], layout: str, dtype: torch.dtype) -> None:
    start = params(dtype)
    ours, theirs = copies(start), copies(start)
    options = {"lr": 0.05, "weight_decay": 0.0, **options}
    known = {k: v for k, v in options.items() if k not in ("capturable", "foreach", "fused")}
    if isinstance(known["lr"], Tensor):
        known["lr"] = float(known["lr"])
    one = DDCAdam(ours, gauges=[], **options)
    other = AdamW(theirs, foreach=False, **known)
    for n in range(STEPS):
        set_gradients([ours, theirs], n, layout=layout)
        one.step()
        other.step()
        assert_close(ours, theirs, BOUND[dtype])
    for p, q in zip(ours, start, strict=True):
        assert p.stride() == q.stride()
        if p.numel() and known["lr"] != 0:
            assert float((p - q).detach().abs().max()) > 1e-2


def test_bf16_parameters_take_the_rounded_step_of_fp32_state() -> None:
    ours = params(BF16)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    one = DDCAdam(ours, lr=0.05, weight_decay=0.1, gauges=[])
    other = AdamW(theirs, lr=0.05, weight_decay=0.1, foreach=False)
    for n in range(STEPS):
        set_gradients([ours], n)
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                assert p.grad is not None
                q.copy_(p)
                q.grad = p.grad.float()
        one.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            # One rounding to bf16; fp32 sums may fall on its other side.
            assert torch.allclose(p.float(), q, rtol=2**-8, atol=1e-6)
            state = one.state[p]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == F32
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.allclose(state[key], other.state[q][key], rtol=1e-5, atol=1e-9)


def test_several_groups_one_added_later() -> None:
    start = params()
    pair = []
    for make in (lambda g, **o: DDCAdam(g, gauges=[], **o), AdamW):
        ps = copies(start)
        groups = [
            {"params": ps[:4], "lr": 0.1},
            {"params": ps[4:5], "betas": (0.5, 0.9), "weight_decay": 0.3},
            {"params": [], "lr": 0.2},
            {"params": ps[5:8], "eps": 0.1, "maximize": True},
        ]
        pair.append((ps, make(groups, lr=0.02, weight_decay=0.01)))
    for n in range(STEPS):
        if n == 3:
            for ps, opt in pair:
                opt.add_param_group({"params": ps[8:], "lr": 0.2})
        set_gradients([ps for ps, _ in pair], n)
        for _, opt in pair:
            opt.step()
        assert_close(pair[0][0], pair[1][0], BOUND[F64])
    steps = [float(pair[0][1].state[p]["step"]) for p in pair[0][0]]
    assert steps == [6.0] * 8 + [3.0] * 3


def test_a_first_group_without_parameters() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = DDCAdam([{"params": []}, {"params": [p]}], lr=0.1, gauges=[], fused=None)
    p.grad = torch.ones(2)
    opt.step()
    assert torch.allclose(p, torch.full((2,), 0.9))


@pytest.mark.parametrize("capturable", [False, True])
def test_parameters_without_a_gradient_wait(capturable: bool) -> None:
    start = params()
    ours, theirs = copies(start), copies(start)
    for ps in (ours, theirs):
        ps[5].requires_grad_(False)
    one = DDCAdam(ours, lr=0.05, weight_decay=0.1, gauges=[], capturable=capturable)
    other = AdamW(theirs, lr=0.05, weight_decay=0.1, foreach=False)
    for n in range(STEPS):
        set_gradients([ours, theirs], n)
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if (n + k) % 3 == 0 or k == 5:
                a.grad = b.grad = None
        one.step()
        other.step()
        assert_close(ours, theirs, BOUND[F64])
    assert torch.equal(ours[5], start[5])
    assert ours[5] not in one.state
    one.zero_grad()
    before = copies(ours)
    one.step()  # nothing has a gradient
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


# ------------------------------------------------------------------------------- on a small network


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double()


DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(5), dtype=F64)


def loss_of(model: nn.Module) -> Tensor:
    return (model(DATA) - DATA[:, :3].sin()).square().mean()


def same_models(a: nn.Module, b: nn.Module, bound: float = 1e-13) -> None:
    assert_close(list(a.parameters()), list(b.parameters()), bound)


def both(**options: Any) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    one, other = net(), net()
    options = {"lr": 0.02, "weight_decay": 0.1, **options}
    return [
        (one, DDCAdam(one, gauges=[], **options)),
        (other, AdamW(other.parameters(), **options)),
    ]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_closures_and_zero_grad(set_to_none: bool) -> None:
    pair = both()
    for _ in range(STEPS):
        losses = []
        for model, opt in pair:

            def closure(model: nn.Module = model, opt: Any = opt) -> Tensor:
                opt.zero_grad(set_to_none=set_to_none)
                loss = loss_of(model)
                loss.backward()
                return loss

            with torch.no_grad():
                losses.append(opt.step(closure))
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
        same_models(pair[0][0], pair[1][0])


@pytest.mark.parametrize("names", [True, False])
def test_all_ways_to_name_parameters(names: bool) -> None:
    theirs = net()
    other = AdamW(theirs.parameters(), lr=0.02, weight_decay=0.0)
    rivals = []
    for kind in ("model", "list", "iterator", "groups", "over the model"):
        model = net()
        given: Any = model.named_parameters() if names else model.parameters()
        if kind == "model":
            opt = DDCAdam(model, lr=0.02, gauges=[])
        elif kind == "list":
            opt = DDCAdam(list(given), lr=0.02, gauges=[])
        elif kind == "iterator":
            opt = DDCAdam(given, lr=0.02, gauges=[])
        elif kind == "groups":
            opt = DDCAdam([{"params": given}], lr=0.02, gauges=[])
        else:
            opt = DDCAdam(model, lr=0.5, gauges=[], params=[{"params": given, "lr": 0.02}])
        rivals.append((model, opt))
    for _ in range(STEPS):
        for model, opt in [*rivals, (theirs, other)]:
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
        for model, _ in rivals:
            same_models(model, theirs)


def test_some_parameters_of_a_model() -> None:
    model, theirs = net(), net()
    last, other_last = list(model.parameters())[2:], list(theirs.parameters())[2:]
    one, other = DDCAdam(model, 0.02, params=last, gauges=[]), AdamW(other_last, 0.02)
    other.param_groups[0]["weight_decay"] = 0.0
    for _ in range(STEPS):
        for m, opt in ((model, one), (theirs, other)):
            loss_of(m).backward()
            opt.step()
            opt.zero_grad()
    same_models(model, theirs)
    assert torch.equal(model[0].weight, net()[0].weight)


def test_names_given_twice_are_told_apart() -> None:
    """Parameters of another model under the names of this one."""
    model, other = net(), net()
    opt = DDCAdam(model, 0.02, params=list(other.named_parameters()), gauges=[])
    loss_of(model).backward()
    loss_of(other).backward()
    opt.step()
    same_models(model, net())
    assert not torch.equal(other[0].weight, net()[0].weight)


def test_parameters_and_no_model_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="no symmetry is known"):
        opt = DDCAdam(net().parameters())
    assert opt.claims == ()
    assert opt.gauges == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDCAdam(net().parameters(), gauges=[])
        DDCAdam(net())


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: LambdaLR(opt, lambda n: 0.8**n),
        lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=STEPS + 1),
    ],
    ids=["LambdaLR", "OneCycleLR"],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler], tensor: bool
) -> None:
    pair = both()
    if tensor:
        model = net()
        rate = torch.tensor(0.02, dtype=F64)
        pair[0] = (model, DDCAdam(model, rate, weight_decay=0.1, gauges=[]))
    schedules = [scheduler(opt) for _, opt in pair]
    seen = set()
    for _ in range(STEPS):
        for (model, opt), schedule in zip(pair, schedules, strict=True):
            opt.zero_grad()
            loss_of(model).backward()
            opt.step()
            schedule.step()
            seen.add(round(float(opt.param_groups[0]["lr"]), 9))
        same_models(pair[0][0], pair[1][0])
        one, other = (opt.param_groups[0] for _, opt in pair)
        assert one["betas"] == other["betas"]
    assert len(seen) >= STEPS


def test_clipping_averages_and_hooks() -> None:
    pair = both()
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for m, _ in pair]
    calls: list[str] = []
    opt = pair[0][1]
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    handle = opt.register_step_post_hook(lambda *_: calls.append("after"))
    for _ in range(STEPS):
        for (model, opt), average in zip(pair, averages, strict=True):
            opt.zero_grad()
            loss_of(model).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            opt.step()
            average.update_parameters(model)
    same_models(pair[0][0], pair[1][0])
    same_models(averages[0], averages[1])
    assert calls == ["before", "after"] * STEPS
    handle.remove()
    pair[0][1].step()
    assert calls[-1] == "before"


def test_repr_lists_the_options() -> None:
    text = repr(both(lr=0.125)[0][1])
    assert text.startswith("DDCAdam (")
    for part in ("Parameter Group 0", "lr: 0.125", "weight_decay: 0.1", "betas: (0.9, 0.999)"):
        assert part in text


@pytest.mark.parametrize("gauges", [[], "auto", "layerwise"])
def test_copies_go_on_alone(gauges: Any) -> None:
    model = net()
    opt = DDCAdam(model, lr=0.02, gauges=gauges)

    def train(model: nn.Module, opt: DDCAdam) -> None:
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()

    train(model, opt)
    twin, its = copy.deepcopy((model, opt))
    assert [str(c) for c in its.claims] == [str(c) for c in opt.claims]
    before = copy.deepcopy(twin)
    train(model, opt)
    same_models(twin, before, 0.0)
    train(twin, its)
    same_models(twin, model, 0.0)
    ours = {id(p) for p in twin.parameters()}
    assert {id(p) for g in its.param_groups for p in g["params"]} == ours
    assert {id(p) for p in its.state} == ours


def test_autograd_notices_the_write() -> None:
    model = net()
    opt = DDCAdam(model, lr=0.02, gauges=[])
    loss_of(model).backward()
    late = loss_of(model)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_model_may_move_before_the_first_step() -> None:
    """To another dtype, or another memory layout, as the optimizers of torch allow."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 6, 6, generator=draw)

    def made() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(12, 2),
        )  # fmt: skip

    results = []
    for early in (True, False):
        model: nn.Module = made()
        if early:
            model = model.double().to(memory_format=torch.channels_last)
        opt = DDCAdam(model, lr=0.02, inputs=x.to(next(model.parameters())))
        if not early:
            model = model.double().to(memory_format=torch.channels_last)
        for _ in range(3):
            opt.zero_grad()
            model(x.double()).square().sum().backward()
            opt.step()
        results.append(model)
    same_models(results[0], results[1], 1e-12)


def test_freezing_stops_a_parameter() -> None:
    """Also one of a pair, whose other half then goes on in the frame."""
    model = net()
    opt = DDCAdam(model, lr=0.02, weight_decay=0.1, likelihood="gaussian")
    assert any("pair" in c.treatment for c in opt.claims)
    for n in range(4):
        if n == 2:
            model[2].weight.requires_grad_(False)
            frozen = model[2].weight.detach().clone()
        opt.zero_grad()
        loss_of(model).backward()
        before = model[0].weight.detach().clone()
        opt.step()
        assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[2].weight, frozen)
    assert not any("pair" in c.treatment for c in opt.claims)
