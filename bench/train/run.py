"""One training: deterministic by its seed, and going on after a kill where its checkpoint is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bench.train import checkpoint
from bench.train.optimizers import RECIPES
from bench.train.problems import Problem
from deaddir_fast._files import replace_file
from deaddir_fast.scan.report import to_json

#: Losses are taken this often in a training, and checkpoints written.
EVALUATIONS = 10
WARM_UP = 0.1
LAST = 0.1  # of the learning rate, at the end of its cosine


@dataclass(frozen=True)
class Spec:
    """Which training: everything its result depends on, versions apart.

    Attributes:
        problem, optimizer, lr, seed: names and numbers.
        moved: whether it starts from weights rescaled along the network's gauges.
        steps, batch, parameters: of the problem.
    """

    problem: str
    optimizer: str
    lr: float
    seed: int
    moved: bool
    steps: int
    batch: int
    parameters: int

    @property
    def name(self) -> str:
        """Of its files; a change of any field changes it."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
        start = f"{self.seed}{'-moved' if self.moved else ''}"
        return f"{self.problem}-{self.optimizer}-{self.lr:g}-{start}-{digest}".lower()


def spec(problem: Problem, optimizer: str, lr: float, seed: int, moved: bool = False) -> Spec:
    """The training of a problem by an optimizer."""
    size = sum(p.numel() for p in problem.model(seed).parameters())
    return Spec(problem.name, optimizer, lr, seed, moved, problem.steps, problem.batch, size)


def factor(step: int, steps: int) -> float:
    """Of the learning rate at a step from 0 on: linear warm-up, then a cosine down to a tenth."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - 1 - warm)
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * along)) / 2


def take_step(
    problem: Problem,
    model: nn.Module,
    optimizers: list[Optimizer],
    batch: tuple[Tensor, Tensor],
) -> float:
    """One step; returns the loss before it."""
    x, y = batch
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = problem.loss(model(x), y)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def set_rate(optimizers: list[Optimizer], lr: float) -> None:
    """Give every group of parameters a learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def train(
    problem: Problem,
    which: Spec,
    folder: Path,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Run a training to its end, or read what it gave.

    Writes NAME.json (the result) and NAME.safetensors (checkpoint, at the end the trained
    network) into ``folder``.

    Args:
        problem: whose network is trained.
        which: of :func:`spec` for the same problem.
        folder: of the runs.
        advance: told how many steps are done.

    Returns:
        {"spec", "steps" done, "curve": [{"step", "train", "held"}, ...], "diverged"}.
    """
    done = folder / f"{which.name}.json"
    if done.exists():
        return json.loads(done.read_text())
    model = problem.moved(which.seed) if which.moved else problem.model(which.seed)
    optimizers = RECIPES[which.optimizer].make(model, which.lr, problem.gauges())
    kept = folder / f"{which.name}.safetensors"
    step, curve = 0, []
    if kept.exists():
        found = checkpoint.load(kept)
        model.load_state_dict(found["model"])
        for optimizer, state in zip(optimizers, found["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, curve = found["step"], found["curve"]
        advance(step)
    stops = {round(which.steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
    if not curve:
        curve.append(_point(problem, model, 0))
    diverged = not math.isfinite(curve[-1]["train"])
    while step < which.steps and not diverged:
        set_rate(optimizers, which.lr * factor(step, which.steps))
        loss = take_step(problem, model, optimizers, problem.sample(which.seed, step))
        step += 1
        diverged = not math.isfinite(loss)
        advance(1)
        if step in stops or diverged:
            curve.append(_point(problem, model, step))
            diverged = diverged or not math.isfinite(curve[-1]["train"])
            states = [optimizer.state_dict() for optimizer in optimizers]
            content = {"model": dict(model.state_dict()), "optimizers": states}
            checkpoint.save(kept, {**content, "step": step, "curve": curve})
    result = {"spec": asdict(which), "steps": step, "curve": curve, "diverged": diverged}
    text = to_json(result)
    replace_file(done, lambda part: part.write_text(text))
    checkpoint.save(kept, {"model": dict(model.state_dict())})  # its optimizers are done
    return json.loads(text)


def _point(problem: Problem, model: nn.Module, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "train": problem.evaluate(model, held=False),
        "held": problem.evaluate(model, held=True),
    }


def trained(problem: Problem, which: Spec, folder: Path) -> nn.Module:
    """The network that a finished training left."""
    model = problem.model(which.seed)
    model.load_state_dict(checkpoint.load(folder / f"{which.name}.safetensors")["model"])
    return model.eval()
