"""Steps of DDCAdam on parameters that are spread over processes, against one process.

As a program, ``python optim_jobs.py JOBS`` runs jobs from JSON, as one of the processes that RANK
and its like say there are.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.gauge import find
from deaddir_fast.gauge.base import Gauge
from deaddir_fast.gauge.rescaling import Rescaling, Slot
from deaddir_fast.optim import DDCAdam, claims

F64 = torch.float64


class Heads(nn.Module):
    """Six units in heads, normalised, and an MLP: every kind of gauge with a scale."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 6, bias=False)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        h = ((q @ k.mT / 3**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    """Stacked matrices, all experts on all tokens, mixed by a router."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(6, count)
        self.up = nn.Parameter(torch.randn(count, 6, 5) / 2)
        self.down = nn.Parameter(torch.randn(count, 5, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = 3 * self.router(x).softmax(-1)
        experts = zip(self.up, self.down, weight.unbind(-1), strict=True)
        return sum(w[:, None] * (torch.relu(x @ up) @ down) for up, down, w in experts)


def units_of(model: Experts) -> list[Gauge]:
    """The rescaling of every hidden unit of every expert."""
    count, _, hidden = model.up.shape
    number = count * hidden
    place = torch.arange(number)[:, None]
    slots = (Slot("up", 2, place, number, 1, (0,)), Slot("down", 1, place, number, -1, (0,)))
    gauge = Rescaling(
        name="rescaling: up -> down",
        group=f"(R_>0)^{number}",
        parameters=("up", "down"),
        shape=(number,),
        likelihood=None,
        slots=slots,
        positive=True,
    )
    return [gauge]


def mlp(*sizes: int) -> nn.Sequential:
    """ReLU between linear maps."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def filters() -> nn.Sequential:
    """Convolutions and a flattened read."""
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    # Odd sizes; a last layer of one row, of which one process holds nothing.
    "mlp": (lambda: mlp(6, 7, 5, 1), (8, 6)),
    "pair": (lambda: mlp(6, 7, 3), (8, 6)),
    "two heads": (lambda: Heads(2), (4, 5, 6)),  # two processes have one each
    "three heads": (lambda: Heads(3), (4, 5, 6)),  # one is split
    "experts": (Experts, (8, 6)),
    "one expert": (lambda: Experts(1), (8, 6)),
    "filters": (filters, (4, 2, 5, 5)),
}


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, list[Gauge]]:
    """A model, its inputs and its gauges."""
    build, shape = MODELS[name]
    torch.manual_seed(3)
    model = build().double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gauges = units_of(model) if isinstance(model, Experts) else find(model, x)
    return model.to(dtype), x.to(dtype), gauges


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Some target, far from reached."""
    out = model(x).flatten(1)
    return (out - x.flatten(1)[:, : out.shape[1]].sin()).square().mean()


def no_pairs() -> None:
    """Let isolated rescalings take the frame, as those of sharded parameters do."""
    claims._is_pair = lambda *_: False  # type: ignore[assignment]


def placements(how: str, p: Tensor, number: int) -> tuple[tuple[int, ...], list[Any]]:
    """Mesh and placements of a parameter."""
    from torch.distributed.tensor import Replicate, Shard

    size = torch.distributed.get_world_size()
    ways: list[Any] = [Replicate()]
    if p.ndim > 0:
        ways.append(Shard(0))
    if p.ndim > 1:
        ways += [Shard(1), Shard(p.ndim - 1)]
    if how == "mesh":  # every pair of ways in turn, on two dimensions
        pairs = [(a, b) for a in ways for b in ways if a.is_replicate() or a != b]
        return (size // 2, 2), list(pairs[number % len(pairs)])
    if how == "mixed":
        return (size,), [ways[number % len(ways)]]
    if how == "experts":  # stacks are dealt out, all else is copied
        return (size,), [Shard(0) if p.ndim > 2 else Replicate()]
    if how == "replicate" or p.ndim == 0:
        return (size,), [Replicate()]
    return (size,), [Shard(min(int(how[-1]), p.ndim - 1))]


def spread(model: nn.Module, how: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters as DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    meshes: dict[Any, Any] = {}
    out = []
    for n, (name, p) in enumerate(model.named_parameters()):
        shape, placed = placements(how, p, n)
        if shape not in meshes:
            meshes[shape] = init_device_mesh("cpu", shape)
        out.append((name, nn.Parameter(distribute_tensor(p.detach(), meshes[shape], placed))))
    return out


def give_gradients(
    model: nn.Module, x: Tensor, parameters: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Gradients of the whole model at the gathered parameters, spread again."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters:
            whole[name].copy_(p.full_tensor())  # type: ignore[attr-defined]
    model.zero_grad()
    loss_of(model, x).backward()
    for n, (name, p) in enumerate(parameters):
        given: Any = p
        mesh, placed = given.device_mesh, given.placements
        if n % 3 == 0:  # gradients may come in other placements
            placed = [Replicate()] * mesh.ndim
        p.grad = distribute_tensor(whole[name].grad, mesh, placed)  # type: ignore[arg-type]


def train(model: nn.Module, opt: DDCAdam, x: Tensor, steps: int) -> None:
    """Plain steps."""
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()


def distance(values: dict[str, Tensor], model: nn.Module) -> float:
    """Largest difference of any parameter, relative to the largest of its entries."""
    return max(
        float((values[n] - p.detach()).abs().max() / p.detach().abs().max().clamp(min=1e-3))
        for n, p in model.named_parameters()
    )


def fully(model: nn.Module, how: str) -> nn.Module:
    """The model under ``fully_shard``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    if how == "fully_shard per layer":
        for module in model.children():
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def run_job(job: dict[str, Any]) -> None:
    """Train spread and whole, and compare.

    Args:
        job: "model" (of :data:`MODELS`), "how" ("fully_shard", "fully_shard per layer", "shard 0",
            "shard 1", "replicate", "experts", "mixed", "mesh"), "dtype", "steps", "options",
            "bound";
            "checkpoint": go on from a state that went through torch.distributed.checkpoint;
            "rounding": compare nothing but the copies of bf16 parameters on the processes.
    """
    if job.get("rounding"):
        same_copies(job)
        return
    dtype = getattr(torch, job.get("dtype", "float64"))
    steps = job.get("steps", 12)
    options = {"lr": 0.02, "weight_decay": 0.1, **job.get("options", {})}
    model, x, gauges = made(job["model"], dtype)
    whole = copy.deepcopy(model)
    no_pairs()
    reference = DDCAdam(whole, gauges=gauges, **options)
    train(whole, reference, x, steps)
    moved = distance({n: p.detach() for n, p in model.named_parameters()}, whole)
    assert moved > 0.05, moved
    if job["how"].startswith("fully_shard"):
        sharded = fully(copy.deepcopy(model), job["how"])
        opt = DDCAdam(sharded, gauges=gauges, **options)
        if job.get("checkpoint"):
            train(sharded, opt, x, steps // 2)
            sharded, opt = through_checkpoint(sharded, opt, model, gauges, job)
            steps -= steps // 2
        train(sharded, opt, x, steps)
        parameters = list(sharded.named_parameters())
    else:
        parameters = spread(model, job["how"])
        opt = DDCAdam(parameters, gauges=gauges, **options)
        for _ in range(steps):
            give_gradients(model, x, parameters)
            opt.step()
    assert [str(c) for c in opt.claims] == [str(c) for c in reference.claims]
    values: dict[str, Any] = {n: p.full_tensor() for n, p in parameters}  # type: ignore[attr-defined]
    found = distance({n: v.detach() for n, v in values.items()}, whole)
    same_state(parameters, opt, whole, reference, job["bound"])
    print(f"{job['model']}, {job['how']}: {found:.1e}", flush=True)
    assert found <= job["bound"], (job, found)


def same_copies(job: dict[str, Any]) -> None:
    """Replicated parameters stay the same to the bit where rounding is random."""
    model, x, gauges = made(job["model"], torch.bfloat16)
    start = copy.deepcopy(model)
    parameters = spread(model, job["how"])
    opt = DDCAdam(parameters, lr=5e-4, gauges=gauges, stochastic_rounding=True)
    for _ in range(4):
        give_gradients(model, x, parameters)
        opt.step()
    found = 0
    for (name, p), before in zip(parameters, start.parameters(), strict=True):
        given: Any = p
        if all(placement.is_replicate() for placement in given.placements):
            mine = given.to_local().detach().float()
            copies = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(copies, mine)
            assert all(torch.equal(c, mine) for c in copies), name
            found += int((mine != before.detach().float()).sum())
    assert found > 5, found


def same_state(
    parameters: Sequence[tuple[str, nn.Parameter]],
    opt: DDCAdam,
    whole: nn.Module,
    reference: DDCAdam,
    bound: float,
) -> None:
    """Moments gathered are those of the whole model."""
    theirs = dict(whole.named_parameters())
    for name, p in parameters:
        state, expected = opt.state[p], reference.state[theirs[name]]
        assert state.keys() == expected.keys(), name
        for key, value in state.items():
            given: Any = value
            gathered = given.full_tensor() if hasattr(given, "full_tensor") else given
            truth = expected[key]
            if gathered.shape != truth.shape:
                assert key == "exp_avg_sq" and p.ndim > 2, (name, key, gathered.shape, truth.shape)
                continue
            scale = truth.abs().max().clamp(min=1e-9)
            error = float(((gathered - truth).abs().max() if truth.numel() else scale * 0) / scale)
            assert error <= 100 * bound, (name, key, error)


def through_checkpoint(
    sharded: nn.Module, opt: DDCAdam, model: nn.Module, gauges: list[Gauge], job: dict[str, Any]
) -> tuple[nn.Module, DDCAdam]:
    """Another sharded model and optimizer with their state, as torch.distributed saves it."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_state_dict,
    )

    how = StateDictOptions(full_state_dict=job["checkpoint"] == "full", cpu_offload=False)
    weights, states = get_state_dict(sharded, opt, options=how)
    weights, states = copy.deepcopy(weights), copy.deepcopy(states)
    other = fully(copy.deepcopy(model), job["how"])
    its = DDCAdam(other, gauges=gauges, **{"lr": 0.02, "weight_decay": 0.1})
    set_state_dict(other, its, model_state_dict=weights, optim_state_dict=states, options=how)
    for (name, p), q in zip(sharded.named_parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == its.state[q].keys(), name
        for key, value in opt.state[p].items():
            one: Any = value
            twin: Any = its.state[q][key]
            assert type(one) is type(twin), (name, key)
            if hasattr(one, "to_local"):
                one, twin = one.to_local(), twin.to_local()
            assert torch.equal(one, twin), (name, key)
    return other, its


def main() -> None:
    """Run the jobs of the command line."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for job in json.loads(sys.argv[1]):
        run_job(job)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    assert "RANK" in os.environ
    main()
