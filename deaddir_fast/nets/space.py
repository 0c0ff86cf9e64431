"""Parameters as one vector and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSpace:
    """The flat coordinates of named parameters.

    Attributes:
        names: parameter names, in order.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, model: nn.Module) -> ParameterSpace:
        """All parameters of ``model`` (shared ones once)."""
        named = list(model.named_parameters())
        return cls(tuple(k for k, _ in named), tuple(v.shape for _, v in named))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(prod(s) for s in self.shapes)

    @property
    def dimension(self) -> int:
        """d, the number of parameters."""
        return sum(self.sizes)

    def vectors(self, directions: Mapping[str, Tensor], count: int, like: Tensor) -> Tensor:
        """{name: (p, *shape)} -> (p, d); missing names are zero."""
        out = like.new_zeros(count, self.dimension)
        for name, block in zip(self.names, out.split(self.sizes, 1), strict=True):
            if name in directions:
                block.copy_(directions[name].reshape(count, block.shape[1]))
        return out

    def directions(self, vectors: Tensor) -> dict[str, Tensor]:
        """(..., d) -> {name: (..., *shape)}."""
        lead = vectors.shape[:-1]
        return {
            name: block.reshape(*lead, *shape)
            for name, shape, block in zip(
                self.names, self.shapes, vectors.split(self.sizes, -1), strict=True
            )
        }

    def label(self, index: int) -> str:
        """Name of one coordinate, as in ``weight[3, 0]``."""
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if index < size:
                where = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)]
                return f"{name}{where}" if where else name
            index -= size
        raise IndexError(index)
