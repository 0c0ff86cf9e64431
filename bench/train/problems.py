"""The problems: a network, its data, its loss, and how long it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deaddir_fast as dd
from bench.train import data, models
from deaddir_fast.gauge.base import Gauge

#: Of the digits: it keeps the softmax away from saturation, where curvature fades into rounding.
SMOOTHING = 0.1


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        name: of the problem.
        about: the network, in words.
        build: makes the network from torch's random state.
        data: makes the data.
        smoothing: label smoothing of the loss, whose least value is subtracted.
        steps, batch: of a training.
        evaluated: samples of each part that losses are taken on.
        scanned: training samples of one batch of the scan, and how many batches.
    """

    name: str
    about: str
    build: Callable[[], nn.Module]
    data: Callable[[], data.Images | data.Text]
    smoothing: float
    steps: int
    batch: int
    evaluated: int
    scanned: tuple[int, int]

    def model(self, seed: int) -> nn.Module:
        """The network as it starts."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def gauges(self) -> list[Gauge]:
        """Symmetries of the network, those that a softmax over classes does not see among them."""
        return _gauges(self)

    def moved(self, seed: int) -> nn.Module:
        """The same network at other weights: every rescaling of units by a random element."""
        model = self.model(seed)
        state = {k: v.detach().double() for k, v in model.named_parameters()}
        generator = torch.Generator().manual_seed(seed)
        for gauge in self.gauges():
            if gauge.name.startswith("rescaling"):
                state = gauge.act(state, gauge.random_element(generator))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(state[name])
        return model

    def sample(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: the same for every optimizer, and after a restart."""
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
        return self.data().batch(self.batch, generator)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy over samples and characters, in nats, above its least value."""
        found = F.cross_entropy(logits.flatten(0, -2), y.flatten(), label_smoothing=self.smoothing)
        return found - self.least(logits.shape[-1])

    def least(self, classes: int) -> float:
        """Entropy of a smoothed label."""
        if self.smoothing == 0:
            return 0.0
        rest = self.smoothing / classes
        top = 1 - self.smoothing + rest
        return -top * math.log(top) - (classes - 1) * rest * math.log(rest)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, held: bool) -> float:
        """The loss on fixed samples of a part."""
        x, y = self.data().fixed(held, self.evaluated)
        total = 0.0
        for part, labels in zip(x.split(128), y.split(128), strict=True):
            total += self.loss(model(part), labels).item() * len(part)
        return total / len(x)

    def scan_batches(self) -> list[Tensor]:
        """Training inputs that a trained network is read on."""
        size, count = self.scanned
        return list(self.data().fixed(False, size * count)[0].split(size))


@cache
def _gauges(problem: Problem) -> list[Gauge]:
    x, _ = problem.data().fixed(False, 2)
    return dd.gauge.find(problem.model(0).eval(), x)


CONTEXT = 64
_digits = cache(data.digits)
_poem = cache(lambda: data.poem(CONTEXT))


def _decoder(kind: str, width: int, layers: int, heads: int) -> Callable[[], nn.Module]:
    return lambda: models.Decoder(kind, len(_poem().alphabet), CONTEXT, width, layers, heads)


PROBLEMS = {
    p.name: p
    for p in (
        Problem(
            "mlp",
            "digits, MLP 64-128-128-10, ReLU, biases",
            models.mlp,
            _digits,
            SMOOTHING,
            steps=300,
            batch=64,
            evaluated=1400,
            scanned=(350, 4),
        ),
        Problem(
            "conv",
            "digits, two convolutions, ReLU, max pooling, a linear head",
            models.conv,
            _digits,
            SMOOTHING,
            steps=300,
            batch=64,
            evaluated=1400,
            scanned=(350, 4),
        ),
        Problem(
            "llama",
            "characters, 3 pre-norm blocks of width 160, RMSNorm, SwiGLU, no biases",
            _decoder("llama", 160, 3, 5),
            _poem,
            0.0,
            steps=350,
            batch=8,
            evaluated=64,
            scanned=(32, 12),
        ),
        Problem(
            "gpt2",
            "characters, 3 pre-norm blocks of width 160, LayerNorm, GELU, biases",
            _decoder("gpt2", 160, 3, 5),
            _poem,
            0.0,
            steps=350,
            batch=8,
            evaluated=64,
            scanned=(32, 12),
        ),
    )
}


@cache  # one object, whose gauges are found once
def quick(problem: Problem) -> Problem:
    """The same problem with a tiny network and few steps, to see that everything runs."""
    build: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: models.mlp(12),
        "conv": lambda: models.conv(2),
        "llama": _decoder("llama", 12, 1, 2),
        "gpt2": _decoder("gpt2", 12, 1, 2),
    }
    return replace(
        problem,
        about=f"{problem.about}; here a tiny one",
        build=build[problem.name],
        steps=12,
        batch=8,
        evaluated=16,
        scanned=(8, 2),
    )
