"""Models whose outputs are a given function of one parameter vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from deaddir_fast import Triple, read_triple

ONE = torch.zeros(1, 1, dtype=torch.float64)


class Function(nn.Module):
    """Outputs f(w), the same for every input."""

    def __init__(self, function: Callable[[Tensor], Tensor], point: Sequence[float]) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.tensor(point, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w).reshape(1, -1).expand(x.shape[0], -1)


def read(function: Callable[[Tensor], Tensor], point: Sequence[float]) -> Triple:
    return read_triple(Function(function, point), ONE, likelihood="gaussian")


def holds(found: Triple, rlct: Fraction | int, multiplicity: int) -> bool:
    """Right, or unresolved with bounds that contain the truth; returns whether it is resolved."""
    assert found.lower <= rlct <= found.upper, f"{found} but λ = {rlct}"
    if found.resolved:
        assert (found.rlct, found.multiplicity) == (rlct, multiplicity), f"{found}"
    else:
        assert found.verdict.startswith("unresolved: ")
        assert found.rlct != found.rlct
        assert found.multiplicity == 0
    return found.resolved


def turn(d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
