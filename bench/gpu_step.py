"""The whole step of DDCAdam on a transformer, against AdamW(fused=True), eager and captured.

What a user waits for: launches, tables and scales of the frame included, as `Device.once` times
them. All implementations get the same seeded gradients. After `STEPS` steps the displacement of the
parameters is compared with that of the same optimizer in fp64 in plain torch (for DDCAdam its
reference route) on the same device; the captured step is captured after the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from bench import accuracy
from bench.gpu_checks import message
from bench.gpu_device import Device
from bench.problems._problem import Draw, Sizes
from bench.table import OURS
from bench.timing import percentiles
from deaddir_fast._backend import backend
from deaddir_fast.gauge import find
from deaddir_fast.optim import DDCAdam

#: Layers, width, heads, vocabulary: 26 million parameters, or a few hundred.
FULL: Sizes = {"l": 8, "d": 512, "h": 8, "c": 1000}
TINY: Sizes = {"l": 1, "d": 4, "h": 2, "c": 5}

PLAIN, FUSED = "DDCAdam(foreach=True)", "AdamW(fused=True)"
STEPS = 3
#: Allowed relative error of the displacement: weights of 1 are kept to 6e-8, and go 0.03.
LIMIT = accuracy.OURS[torch.float32]
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SECONDS = 2.0

#: Of a model, and whether its step will be captured.
Make = Callable[[nn.Module, bool], Optimizer]


class Layer(nn.Module):
    """Attention and units, each behind a norm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to the same."""
        y = self.first(x)
        split = (f(y).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = (z.transpose(1, 2) for z in split)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Tokens to logits."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes["d"]
        self.embed = nn.Embedding(sizes["c"], width)
        self.layers = nn.Sequential(*(Layer(width, sizes["h"]) for _ in range(sizes["l"])))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sizes["c"])

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, t) to (n, t, c)."""
        return self.head(self.norm(self.layers(self.embed(tokens))))


@cache
def problem(full: bool, device: str) -> tuple[Transformer, list[Any], list[list[Tensor]]]:
    """The model, its gauges (found once: that takes longer than all steps), gradients of steps."""
    sizes = FULL if full else TINY
    torch.manual_seed(0)
    model = Transformer(sizes).to(device)
    tokens = torch.arange(4 * 6, device=device).reshape(4, 6) % sizes["c"]
    draw = Draw(torch.float32, device)
    gradients = [
        [draw.normal(*p.shape, scale=0.01) for p in model.parameters()] for _ in range(STEPS)
    ]
    return model, find(model, tokens), gradients


class Trial:
    """A copy of the model under one optimizer."""

    def __init__(self, model: nn.Module, make: Make, dtype: torch.dtype, capturable: bool) -> None:
        copy = deepcopy(model).to(dtype)
        self.parameters = list(copy.parameters())
        self.before = [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer = make(copy, capturable)

    def feed(self, gradients: list[Tensor]) -> None:
        """Set the gradients, in the memory that a captured step reads."""
        torch._foreach_copy_([p.grad for p in self.parameters], gradients)

    def displacement(self) -> Tensor:
        """How far all parameters went, in fp64."""
        pairs = zip(self.parameters, self.before, strict=True)
        return torch.cat([(p.detach().double() - b.double()).flatten() for p, b in pairs])

    def state_bytes(self) -> int:
        """Of the moments."""
        states = self.optimizer.state.values()
        return sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))


def ours(gauges: list[Any]) -> Make:
    """DDCAdam, by the route in force."""
    return lambda model, capturable: DDCAdam(model, gauges=gauges, capturable=capturable, **OPTIONS)


def by_operations(gauges: list[Any]) -> Make:
    """DDCAdam by its reference route."""
    return lambda model, capturable: DDCAdam(
        model, gauges=gauges, foreach=True, capturable=capturable, **OPTIONS
    )


def adamw(**options: Any) -> Make:
    """torch.optim.AdamW."""
    return lambda model, capturable: AdamW(
        model.parameters(), capturable=capturable, **OPTIONS, **options
    )


def truth(make: Make, model: nn.Module, gradients: list[list[Tensor]]) -> Tensor:
    """The displacement in fp64."""
    trial = Trial(model, make, torch.float64, capturable=False)
    for each in gradients:
        trial.feed(each)
        trial.optimizer.step()
    return trial.displacement()


def rows(
    device: Device, peaks: dict[str, Any], *, captured: bool, tiny: bool
) -> list[dict[str, Any]]:
    """Measure the step: a row for each implementation."""
    model, gauges, gradients = problem(not tiny, device.name)
    # The truth of DDCAdam is held for two implementations, that of AdamW for one.
    plain = adamw(foreach=False, fused=False)
    contest = (
        (
            by_operations(gauges),
            {OURS: ours(gauges), "DDCAdam(foreach=True)": by_operations(gauges)},
        ),
        (plain, {FUSED: adamw(fused=True)}),
    )
    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Callable[[], Any]] = {}
    for reference, makes in contest:
        expected = truth(reference, model, gradients)
        for name, make in makes.items():
            row = found[name] = _row(name, TINY if tiny else FULL, captured)
            try:
                step = _gated(row, make, model, gradients, expected, device)
            except Exception as error:  # whatever it raises is the finding
                row |= {"error": None, "gate": message(error)}
                continue
            if row["gate"] == "ok":
                running[name] = step
        device.free()
    for name, samples in _times(device, running, 0.0 if tiny else SECONDS).items():
        row = found[name]
        row |= percentiles(samples) | {"rounds": len(samples)}
        if peaks:
            row |= {"bound": "memory", "share": row["bytes"] / peaks["copy"] / row["p50"]}
    device.free()
    return list(found.values())


def _row(name: str, sizes: Sizes, captured: bool) -> dict[str, Any]:
    problem = "ddcadam_step_captured" if captured else "ddcadam_step"
    shape = " ".join(f"{k}={v}" for k, v in sizes.items())
    return {
        "case": f"{problem} {shape} fp32",
        "implementation": name,
        "problem": problem,
        "op": "ddcadam_step",
        "shape": dict(sizes),
        "dtype": "fp32",
        "route": "Triton" if name == OURS else "torch",
        "gate": "ok",
    }


def _gated(
    row: dict[str, Any],
    make: Make,
    model: nn.Module,
    gradients: list[list[Tensor]],
    expected: Tensor,
    device: Device,
) -> Callable[[], Any]:
    """Take the steps, enter error, memory and bytes, and return the step that is timed."""
    captured = row["problem"] == "ddcadam_step_captured"
    trial = Trial(model, make, torch.float32, captured)

    def step() -> None:
        with backend("triton"):
            trial.optimizer.step()

    first, *others = gradients
    trial.feed(first)
    step()  # what is built once is built here
    run = device.captured(step) if captured else step
    for each in others:
        trial.feed(each)
        run()
    row["error"] = accuracy.error(trial.displacement(), expected, by_element=False)
    if row["error"] > LIMIT:
        row["gate"] = f"error {row['error']:.1e} above {LIMIT:.0e}"
    # w and moments are read and written, g is read; DDCAdam reads w before, for its scales
    w = sum(p.nbytes for p in trial.parameters)
    row["bytes"] = 2 * (w + trial.state_bytes()) + w + (0 if row["implementation"] == FUSED else w)
    row["flops"] = 15.0 * w / 4
    if not captured:
        _, extra = device.peak_memory(run)
        row |= {} if extra is None else {"extra_bytes": extra}
    return run


def _times(
    device: Device, calls: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, list[float]]:
    """Times of the steps in turns, launches included."""
    each = sum(device.once(call) for call in calls.values())
    count = max(1, min(100, int(seconds / each))) if calls else 0
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            samples[name].append(device.once(call))
    return {name: taken for name, taken in samples.items() if taken}
