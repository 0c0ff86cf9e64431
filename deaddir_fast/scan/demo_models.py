"""The networks of the demo: linear ones at chosen true points, and one trained on digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

DOUBLE = torch.float64


def linear_network(weights: Sequence[Tensor]) -> nn.Sequential:
    """x -> W_L ... W_1 x in fp64, without biases."""
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=DOUBLE) for w in weights]
    with torch.no_grad():
        for layer, w in zip(layers, weights, strict=True):
            layer.weight.copy_(w)
    return nn.Sequential(*layers).eval()


def inputs_of_width(width: int, samples: int, generator: torch.Generator) -> Tensor:
    """(samples, width) standard normal inputs: their second moment has full rank."""
    return torch.randn(samples, width, dtype=DOUBLE, generator=generator)


def _invertible(n: int, generator: torch.Generator) -> Tensor:
    """A random matrix with singular values between 0.7 and 1.5."""
    left, _ = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))
    return left @ torch.diag(torch.linspace(1.5, 0.7, n, dtype=DOUBLE)) @ right


def reduced_rank_point(
    inputs: int,
    outputs: int,
    hidden: int,
    rank: int,
    rank_a: int,
    rank_b: int,
    generator: torch.Generator,
) -> nn.Sequential:
    """x -> B A x at a point with rank BA = ``rank``, rank A = ``rank_a``, rank B = ``rank_b``.

    Every such point is diag-like blocks up to invertible changes of bases, which are random here.
    """
    a = torch.zeros(hidden, inputs, dtype=DOUBLE)
    b = torch.zeros(outputs, hidden, dtype=DOUBLE)
    for i in range(rank_a):
        a[i, i] = 1.0
    for i in range(rank):
        b[i, i] = 1.0
    for i in range(rank_b - rank):
        b[rank + i, rank_a + i] = 1.0
    middle = _invertible(hidden, generator)
    first = middle @ a @ _invertible(inputs, generator)
    second = _invertible(outputs, generator) @ b @ torch.linalg.inv(middle)
    return linear_network([first, second])


def deep_linear_point(
    widths: Sequence[int], ranks: Sequence[int], generator: torch.Generator
) -> nn.Sequential:
    """Generic matrices of the given ranks, one per layer."""
    weights = []
    for (wide, narrow), rank in zip(pairwise(widths), ranks, strict=True):
        u, s, v = torch.linalg.svd(
            torch.randn(narrow, wide, dtype=DOUBLE, generator=generator), full_matrices=False
        )
        s = torch.linspace(1.5, 0.7, len(s), dtype=DOUBLE)
        weights.append(u[:, :rank] * s[:rank] @ v[:rank])
    return linear_network(weights)


def dead_unit_chain(
    depth: int, generator: torch.Generator
) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """``depth`` linear layers with a live and a dead unit in each hidden one, and a direction.

    The direction moves every weight on the path through the dead units at once, so the outputs
    move by the product of ``depth`` small weights: KL order ``depth``.
    """
    widths = [3] + [2] * (depth - 1) + [2]
    weights, direction = [], {}
    for layer, (wide, narrow) in enumerate(pairwise(widths)):
        w = torch.randn(narrow, wide, dtype=DOUBLE, generator=generator)
        path = torch.zeros_like(w)
        rows = slice(1, 2) if layer < depth - 1 else slice(None)
        columns = slice(1, 2) if layer > 0 else slice(None)
        path[rows, columns] = 1.0 + w[rows, columns].abs()
        if layer < depth - 1:
            w[1] = 0.0
        if layer > 0:
            w[:, 1] = 0.0
        weights.append(w)
        direction[f"{layer}.weight"] = path[None]
    return linear_network(weights), direction


@dataclass(frozen=True)
class Digits:
    """A ReLU network trained on handwritten digits, with the images it is read on.

    Attributes:
        model: 64 - hidden - 10, fp64, in evaluation mode.
        images: (n, 64) training images that are read, grey levels 0 to 1.
        accuracy: on the images held out.
        held_out: how many those are.
        recipe: how it was trained.
    """

    model: nn.Sequential
    images: Tensor
    accuracy: float
    held_out: int
    recipe: dict[str, float]


def digits(hidden: int, samples: int, seed: int) -> Digits:
    """Train on scikit-learn's handwritten digits (1797 images of 8 x 8 pixels) for some seconds.

    The large step kills some hidden units for good. Label smoothing keeps the softmax away from
    saturation, where Fisher eigenvalues fade into rounding and no gap separates live from dead.

    Raises:
        ImportError: without scikit-learn.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=generator)
    x = torch.as_tensor(pixels, dtype=DOUBLE)[order] / 16.0
    y = torch.as_tensor(labels)[order]
    train = 1400
    recipe = {"lr": 0.3, "momentum": 0.9, "steps": 600, "batch": 64, "label_smoothing": 0.1}
    model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)).double()
    with torch.no_grad():
        for p in model.parameters():
            bound = 1 / (64 if p.shape[0] == hidden else hidden) ** 0.5
            p.copy_((2 * torch.rand(p.shape, dtype=DOUBLE, generator=generator) - 1) * bound)
    optimiser = torch.optim.SGD(model.parameters(), lr=recipe["lr"], momentum=recipe["momentum"])
    loss = nn.CrossEntropyLoss(label_smoothing=recipe["label_smoothing"])
    for _ in range(int(recipe["steps"])):
        batch = torch.randint(train, (int(recipe["batch"]),), generator=generator)
        optimiser.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimiser.step()
    model.eval().requires_grad_(False)
    right = model(x[train:]).argmax(1) == y[train:]
    return Digits(model, x[:train][:samples], float(right.double().mean()), len(right), {**recipe})
