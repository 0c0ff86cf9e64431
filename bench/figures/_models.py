"""Models whose outputs are a function of one parameter vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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
