"""Models whose outputs are a function of one parameter vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deaddir_fast.rates.primitives import Attention

DOUBLE = torch.float64
ONE = torch.zeros(1, 1, dtype=DOUBLE)  # one input, which such models do not read


class MeanMap(nn.Module):
    """Outputs μ(theta), the same for every input."""

    def __init__(self, function: Callable[[Tensor], Tensor], point: Sequence[float]) -> None:
        super().__init__()
        self.function = function
        self.theta = nn.Parameter(torch.tensor(point, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.theta).expand(x.shape[0], -1)


def umbrella(k: int) -> MeanMap:
    """(t^k + w², w, t w) at 0: t is dead of order k, w is live, and moving w makes t live."""
    return MeanMap(lambda p: torch.stack([p[0] ** k + p[1] ** 2, p[1], p[0] * p[1]]), (0.0, 0.0))


def axis(index: int, size: int) -> Tensor:
    """A unit vector."""
    return torch.eye(size, dtype=DOUBLE)[index]


def attention_chain(depth: int, width: int) -> nn.Sequential:
    """Attention blocks whose tokens stay apart.

    With weights of the usual size tokens collapse onto one another doubly exponentially with depth
    (Dong, Cordonnier & Loukas 2021), and the scores' route to the gradient with them.
    """
    model = nn.Sequential(*(Attention(width) for _ in range(depth))).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 2
    return model
