"""The optimizers, their grids of learning rates, and what their state weighs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import deaddir_fast as dd
from deaddir_fast.gauge.base import Gauge

SHARED_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
#: What Muon leaves to AdamW, besides everything that is not a matrix.
OUTER = ("tokens.", "positions.", "head.")


def _muon(model: nn.Module, lr: float, gauges: Sequence[Gauge]) -> list[Optimizer]:
    """Muon on the hidden matrices, AdamW on the rest; one learning rate suits both."""
    last = [name for name, p in model.named_parameters() if p.ndim > 1][-1]
    inner, rest = [], []
    for name, p in model.named_parameters():
        hidden = p.ndim == 2 and name != last and not name.startswith(OUTER)
        (inner if hidden else rest).append(p)
    found: list[Optimizer] = []
    if inner:
        muon = torch.optim.Muon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        found.append(muon)
    return [*found, torch.optim.AdamW(rest, lr=lr, weight_decay=0.0)]


@dataclass(frozen=True)
class Recipe:
    """An optimizer.

    Attributes:
        grid: learning rates tried.
        make: from a network, a learning rate and the network's gauges, the optimizers that
            together step it.
    """

    grid: tuple[float, ...]
    make: Callable[[nn.Module, float, Sequence[Gauge]], list[Optimizer]]


# Weight decay is zero everywhere: what is compared is the step.
RECIPES = {
    "AdamW": Recipe(
        SHARED_GRID,
        lambda model, lr, _: [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)],
    ),
    "DDCAdam": Recipe(
        SHARED_GRID,
        lambda model, lr, gauges: [dd.optim.DDCAdam(model, lr=lr, weight_decay=0.0, gauges=gauges)],
    ),
    "SGD": Recipe(
        (5e-3, 2e-2, 8e-2, 3e-1, 1.0),
        lambda model, lr, _: [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)],
    ),
    "Muon": Recipe((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), _muon),
}


def _tensors(value: Any, seen: set[int]) -> Iterable[Tensor]:
    """Tensors that an object holds, through containers and attributes."""
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    inside: list[Any] = []
    if isinstance(value, dict):
        inside += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inside += value
    elif type(value).__module__.partition(".")[0] in ("torch", "deaddir_fast", "builtins"):
        inside += getattr(value, "__dict__", {}).values()
    for part in inside:
        yield from _tensors(part, seen)


def state_bytes(optimizers: Iterable[Optimizer], model: nn.Module) -> int:
    """Bytes of all that the optimizers keep between steps, the network and its gradients apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    seen: set[int] = set()
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for optimizer in optimizers
        for t in _tensors(dict(vars(optimizer), state=dict(optimizer.state)), seen)
    }
    return sum(size for at, size in found.items() if at not in own)
