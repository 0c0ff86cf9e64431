"""Cost of Kronecker factors in forwards with backwards: `pytest bench/test_factors.py`.

The yardstick is one ``loss.backward()`` of the same batch over all parameters, forward pass
included. It, the factors of this package and those of other packages (where they can be imported)
take turns in one process; the ratio stated is of the fastest turns, the other one the median of the
ratios of each turn. On a machine that does other things too, set OMP_WAIT_POLICY=passive: threads
that wait by spinning take the processor from those that they wait for.

Bound: multiplications and additions in products of matrices against those of the yardstick, as if
both ran at the same rate. Memory: growth of the resident set at its peak, one call in a process of
its own (``python -m bench.test_factors CASE NAME THREADS``).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deaddir_fast as dd
from bench import memory

VOCABULARY, TOKENS, WIDTH = 4096, 128, 384
ROUNDS = 5


def _mlp() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in pairwise((512, 512, 512, 512, 512)):
        layers += [nn.Linear(i, o), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(512, 64)).eval()
    return model, torch.randn(2048, 512), torch.randint(0, 64, (2048,))


class Block(nn.Module):
    """Causal attention and a feed-forward layer, norms first."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (
            m(h).view(n, t, self.heads, d // self.heads).transpose(1, 2)
            for m in (self.q, self.k, self.v)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens to logits for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 6) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def _transformer() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (16, TOKENS + 1))
    return Transformer().eval(), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


#: name: (what builds it, options of the factors)
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], dict[str, Any]]] = {
    "mlp": (_mlp, {}),
    "transformer": (_transformer, {}),
    # G of 4096 classes is most of the work there; a large vocabulary has a diagonal only.
    "transformer, head diagonal": (_transformer, {"largest_head": VOCABULARY - 1}),
}


def _yardstick(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()


class Flat(nn.Module):
    """Tokens as samples: the form of output that other packages know."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, -2)


def _linear(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> object:
    from curvlinops import KFACLinearOperator

    found = KFACLinearOperator(
        Flat(model),
        nn.CrossEntropyLoss(reduction="sum"),
        [p for m in _linear(model) for p in m.parameters()],
        [(x, y.flatten())],
        check_deterministic=False,
        fisher_type="mc",
        separate_weight_and_bias=False,
        num_data=len(x),
        num_per_example_loss_terms=y.numel() // len(x),
    )
    found.compute_kronecker_factors()
    return found


def _nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> object:
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatKFAC

    return FIM_MonteCarlo(model, (x, y), PMatKFAC, trials=1)


def _calls(case: str) -> dict[str, Callable[[], object]]:
    """The yardstick, this package and the others that are there."""
    build, options = CASES[case]
    model, x, y = build()
    calls: dict[str, Callable[[], object]] = {
        "yardstick": lambda: _yardstick(model, x, y),
        "deaddir_fast": lambda: dd.kron_factors(model, x, fisher="mc", progress=False, **options),
    }
    others = {"curvlinops": _curvlinops, "nngeometry": _nngeometry}
    if case != "mlp":
        del others["nngeometry"]  # it takes samples, not tokens
    for name, call in others.items() if not options else ():
        try:
            __import__(name)
        except ImportError:
            continue
        calls[name] = lambda call=call: call(model, x, y)
    return calls


def flops(case: str) -> dict[str, float]:
    """FLOP of the products of one batch: of the yardstick, and of the factors."""
    build, options = CASES[case]
    model, x, _ = build()
    rows = x.numel() if case != "mlp" else len(x)
    forward = backward = weights = triangles = 0.0
    seen: set[int] = set()
    inputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], z: Tensor) -> None:
        nonlocal forward, backward, weights, triangles
        i, o = args[0].shape[-1], z.shape[-1]
        forward += 2 * rows * i * o
        weights += 2 * rows * i * o
        backward += 0 if args[0] is x else 2 * rows * i * o
        if id(args[0]) not in seen:
            triangles += rows * i * i
            seen.add(id(args[0]))
            inputs.append(args[0])  # so that its id is not given away
        if o < VOCABULARY or not options:
            triangles += rows * o * o

    stops = [m.register_forward_hook(hook) for m in _linear(model)]
    with torch.no_grad():
        model(x)
    for stop in stops:
        stop.remove()
    return {"yardstick": forward + backward + weights, "factors": forward + backward + triangles}


def extra(case: str, name: str, threads: int) -> int:
    """Bytes of peak extra memory of one call, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.test_factors", case, name, str(threads)],
        cwd=memory.ROOT,
        env={**os.environ, **memory.MALLOC, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{case}, {name}: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["extra_bytes"])


def race(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize("case", CASES)
def test_factors(case: str, benchmark: Any) -> None:
    threads = min(2, os.cpu_count() or 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = _calls(case)
        times = race(calls, ROUNDS)
        benchmark.pedantic(calls["deaddir_fast"], rounds=1)
    finally:
        torch.set_num_threads(before)
    work, yardstick = flops(case), times["yardstick"]
    bound = work["factors"] / work["yardstick"]
    row: dict[str, Any] = {"threads": threads, "yardstick_ms": min(yardstick) * 1e3, "bound": bound}
    print(f"\n{case}: yardstick {min(yardstick) * 1e3:.0f} ms, bound {bound:.2f}")
    for name, some in times.items():
        ratio = min(some) / min(yardstick)
        median = statistics.median(a / b for a, b in zip(some, yardstick, strict=True))
        bytes_ = extra(case, name, threads)
        row[name] = {"ratio": ratio, "median_ratio": median, "extra_bytes": bytes_}
        print(f"  {name}: {ratio:.2f} (median {median:.2f}), {bytes_ / 2**20:.0f} MiB")
    benchmark.extra_info.update(row)
    if "curvlinops" in row:
        assert row["deaddir_fast"]["extra_bytes"] <= row["curvlinops"]["extra_bytes"]
        assert row["deaddir_fast"]["ratio"] < row["curvlinops"]["ratio"]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    one = _calls(sys.argv[1])[sys.argv[2]]
    # Libraries load and threads start before the measurement.
    dd.kron_factors(nn.Linear(3, 2).eval(), torch.randn(4, 3), fisher="mc", progress=False)
    print(json.dumps({"extra_bytes": memory.growth(one)}))
