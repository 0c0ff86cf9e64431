"""Small scans that tests run in this process and in several others.

As a program, ``python scan_jobs.py JOBS`` runs jobs from JSON, as one of the processes that RANK
and its like say there are.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deaddir_fast as dd
from deaddir_fast.fisher.kron import Pass
from deaddir_fast.nets.sharded import spread_again
from deaddir_fast.scan import ranks
from deaddir_fast.scan.store import Store


class Block(nn.Module):
    """Pre-norm attention and MLP, without a mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        x = x + self.out(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
        return x + self.down(torch.nn.functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Tokens to logits: an embedding, two blocks, a norm, a head."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def transformer(batches: int = 5) -> tuple[nn.Module, list[Tensor]]:
    """A transformer, and batches of different sizes."""
    torch.manual_seed(0)
    model = Transformer().eval()
    for block in model.blocks:
        nn.init.normal_(block.first.weight, 1.0, 0.2)
        nn.init.normal_(block.first.bias, 0.0, 0.2)
    generator = torch.Generator().manual_seed(1)
    # The last token never occurs.
    data = [torch.randint(0, 10, (2 + k % 3, 7), generator=generator) for k in range(batches)]
    return model, data


def mlp(batches: int = 5) -> tuple[nn.Module, list[Tensor]]:
    """An MLP with a dead unit, and an input that is always zero."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = -1.0
    generator = torch.Generator().manual_seed(3)
    data = [torch.randn(3 + k % 2, 5, generator=generator) for k in range(batches)]
    for x in data:
        x[:, 4] = 0.0
    return model.eval(), data


MODELS: dict[str, Callable[[int], tuple[nn.Module, list[Tensor]]]] = {
    "transformer": transformer,
    "mlp": mlp,
}


def sharded(model: nn.Module, units: tuple[type[nn.Module], ...]) -> nn.Module:
    """The model under ``fully_shard``, its modules of these types one by one first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in reversed(list(model.modules())):  # the innermost first
        if isinstance(module, units):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_hand(model: nn.Module) -> nn.Module:
    """The model with DTensor weights that nothing gathers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = distribute_tensor(module.weight.detach(), mesh, [Shard(0)])
            module.weight = nn.Parameter(weight)
    return model


UNITS = {"blocks": (Block,), "everything": (Block, nn.LayerNorm, nn.Linear, nn.Embedding)}


# ---------------------------------------------------------------------- what goes wrong on purpose


def other_weights(model: nn.Module) -> None:
    """The second process has another model."""
    if os.environ["RANK"] == "1":
        with torch.no_grad():
            next(model.parameters())[0] += 1


def failing(model: nn.Module) -> None:
    """The second process fails in its first shard."""

    def add(self: Any, batch: Any, first: int) -> None:
        raise ValueError("made to fail")

    if os.environ["RANK"] == "1":
        Pass.add = add  # type: ignore[method-assign]


def failing_while_busy(model: nn.Module) -> None:
    """The second process fails at once, while the first is busy for longer than it waits."""
    ranks.FAREWELL = timedelta(seconds=0.5)
    add = Pass.add

    def slow(self: Any, batch: Any, first: int) -> None:
        time.sleep(3)
        add(self, batch, first)

    failing(model)
    if os.environ["RANK"] == "0":
        Pass.add = slow  # type: ignore[method-assign]


def failing_rays(model: nn.Module) -> None:
    """The second process fails when it keeps its first rays."""

    def save(self: Any, index: int, reading: Any) -> None:
        raise OSError(28, "No space left on device")

    if os.environ["RANK"] == "1":
        Store.save_layer = save  # type: ignore[method-assign]


def killed(model: nn.Module) -> None:
    """One of two processes is killed in the second round, when some of its sums are written."""
    save, count = Store.save_factors, [0]

    def dying(self: Any, index: int, factors: Any) -> None:
        save(self, index, factors)
        count[0] += factors.meta["shards"] == [0, 1, 2, 3]
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == os.environ["KILLED_RANK"]:
        Store.save_factors = dying  # type: ignore[method-assign]


def run_job(job: dict[str, Any]) -> None:
    """One scan.

    Args:
        job: "model" (of :data:`MODELS`), "batches", "out", "options" of ``dd.scan``; "dtype" of the
            model; "sharded": a key of :data:`UNITS` or "by hand"; "setup": name of a function here
            that is given the model before.
    """
    model, data = MODELS[job["model"]](job.get("batches", 5))
    model = model.to(getattr(torch, job.get("dtype", "float32")))
    if "setup" in job:
        globals()[job["setup"]](model)
    if "sharded" in job:
        how = job["sharded"]
        model = by_hand(model) if how == "by hand" else sharded(model, UNITS[how])
    options = {"draws": 2, "progress": False, **job.get("options", {})}
    next(model.parameters()).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    dd.scan(model, data, out=job["out"], **options)
    spread_again(model)
    assert [p.requires_grad for p in model.parameters()] == before


def launch(
    jobs: list[dict[str, Any]],
    processes: int,
    *,
    timeout: float = 240,
    program: str | Path = __file__,
) -> list[tuple[int, str]]:
    """Run jobs in several processes of a program; (exit code, output) of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        running.append(
            subprocess.Popen(
                [sys.executable, str(program), json.dumps(jobs)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    found = []
    try:
        for process in running:
            text, _ = process.communicate(timeout=timeout)
            found.append((process.returncode, text))
    finally:
        for process in running:
            process.kill()
    return found


def factors_of(out: Path) -> dict[str, Tensor]:
    """All sums on disk, by file and name."""
    found = {}
    for path in sorted((out / "state" / "factors").glob("*/factors.safetensors")):
        for name, value in load_file(path).items():
            found[f"{path.parent.name}: {name}"] = value
    return found


def report_of(out: Path) -> Any:
    """The report without what differs from run to run: dates, times, memory."""
    report = json.loads((out / "report.json").read_text())
    del report["created"], report["cost"]
    for layer in report["layers"]:
        del layer["cost"]["seconds"], layer["cost"]["share_of_bound"]
    return report


def differences(one: Any, other: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for k in one for d in differences(one[k], other[k], f"{where}.{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for k, (a, b) in pairs for d in differences(a, b, f"{where}[{k}]")]
    return [] if one == other else [(where, one, other)]


def main() -> None:
    """Run the jobs of the command line."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        torch.distributed.init_process_group("gloo")
    for job in json.loads(sys.argv[1]):
        run_job(job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
