"""Translation groups: shifts that a later bias, or the softmax, takes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.gauge.base import Gauge, State, along
from deaddir_fast.gauge.batch_norm import NormReader


class _Additive(Gauge):
    """Vector groups: elements add, the exponential is the identity map."""

    def identity(self) -> Tensor:
        """Zero."""
        return torch.zeros(self.shape, dtype=torch.float64)

    def random_element(self, generator: torch.Generator | None = None) -> Tensor:
        """A standard normal vector."""
        return torch.randn(self.shape, dtype=torch.float64, generator=generator)

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Sum of the shifts."""
        return first + second

    def exp(self, algebra: Tensor) -> Tensor:
        """The algebra is the group."""
        return algebra

    def _act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        # The velocity reads no parameter that the action moves, so the flow is a straight line.
        return {k: state[k] + v for k, v in self._velocity(state, element).items()}


@dataclass(frozen=True)
class Reader:
    """A linear map that reads the shifted units, and the bias that takes the shift back.

    Attributes:
        weight, bias: parameter names.
        in_axis, out_axis: axes of the weight; further axes are kernel axes and are summed.
        positions: (h, m) long: entries of the weight's input axis that unit ``j`` feeds.
        rows: (o,) long: output index of the weight behind entry 0, 1, ... of the bias.
    """

    weight: str
    bias: str
    in_axis: int
    out_axis: int
    positions: Tensor
    rows: Tensor

    def response(self, w: Tensor, shift: Tensor) -> Tensor:
        """(o,): what ``shift`` (h,) of the units adds to the map's output."""
        matrix = w.movedim((self.out_axis, self.in_axis), (0, 1))
        matrix = matrix.flatten(2).sum(-1) if matrix.ndim > 2 else matrix
        columns = matrix[:, self.positions.to(w.device)].sum(-1)
        return (columns @ shift.to(w))[self.rows.to(w.device)]


@dataclass(frozen=True, eq=False)
class Translation(_Additive):
    """Bias b -> b + v, absorbed by every reader: its bias c -> c - W v.

    Elements have shape (h,), one entry per moved entry of the bias. With no readers the shift is
    taken back by what cannot see it: a softmax (an attention key bias moves all scores of a query
    alike) or a norm that subtracts the mean.
    """

    source: str
    entries: Tensor
    readers: tuple[Reader | NormReader, ...]

    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        b = state[self.source]
        h = self.entries.numel()
        place = torch.full((b.shape[0],), h)
        place[self.entries] = torch.arange(h)
        padded = torch.cat([algebra, algebra.new_zeros(1)])
        moved = {self.source: padded[place.to(algebra.device)].to(b)}
        for reader in self.readers:
            rate = -reader.response(state[reader.weight], algebra)
            moved[reader.bias] = moved[reader.bias] + rate if reader.bias in moved else rate
        return moved


@dataclass(frozen=True, eq=False)
class ClassShift(_Additive):
    """One vector added to all output rows of a map, one number to all its biases.

    The last linear map's rows are classes, which the softmax of a categorical likelihood cannot
    tell from before. Further inside the outputs of the map meet a norm that subtracts their mean,
    or a softmax, and nothing changes at all (``likelihood`` None). A vector of biases alone is a
    map without features.

    Elements have shape (features,) or (features + 1,): the row vector, then the bias number.
    """

    weight: str
    bias: str | None
    class_axis: int

    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        w = state[self.weight]
        rest = [s for a, s in enumerate(w.shape) if a != self.class_axis]
        features = algebra if self.bias is None else algebra[:-1]
        row = features.to(w).reshape(rest).unsqueeze(self.class_axis)
        moved = {self.weight: row.expand(w.shape)}
        if self.bias is not None:
            b = state[self.bias]
            moved[self.bias] = along(algebra[-1:], 0, 1).to(b).expand(b.shape)
        return moved
