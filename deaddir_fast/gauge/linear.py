"""General linear change of basis between linear maps with nothing in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State, spread
from deaddir_fast.gauge.rescaling import Slot


@dataclass(frozen=True, eq=False)
class GeneralLinear(Gauge):
    """Units h -> C h in blocks: writers W -> C W, readers W -> W C^-1.

    Elements have shape (blocks, d, d), invertible. The units of a slot are numbered block by
    block; slots with exponent +1 transform by C along their axis, with -1 by C^-T.
    """

    slots: tuple[Slot, ...]

    def _check_element(self, element: Tensor) -> Tensor:
        self._check_shape("element", element)
        singular = torch.linalg.inv_ex(element.to(torch.float64)).info.any()
        if bool(singular) or not bool(element.isfinite().all()):
            raise _check.fail("element", element, f"invertible blocks for {self.name!r}")
        return element

    def identity(self) -> Tensor:
        """Identity matrices."""
        blocks, d, _ = self.shape
        return torch.eye(d, dtype=torch.float64).repeat(blocks, 1, 1)

    def random_element(self, generator: torch.Generator | None = None) -> Tensor:
        """Exponentials of small Gaussian matrices, with random sign of the determinant."""
        x = torch.randn(self.shape, dtype=torch.float64, generator=generator)
        element = torch.matrix_exp(x * (0.3 / self.shape[-1] ** 0.5))
        signs = torch.randint(0, 2, self.shape[:1], generator=generator).to(torch.float64) * 2 - 1
        element[:, 0] *= signs[:, None]
        return element

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Matrix product ``second @ first``."""
        return second @ first

    def exp(self, algebra: Tensor) -> Tensor:
        """Matrix exponential of each block."""
        return torch.matrix_exp(algebra)

    def _mix(self, w: Tensor, slot: Slot, matrix: Tensor) -> Tensor:
        """Blocks of ``matrix`` applied along the slot's axes; zero outside the units."""
        blocks, d, _ = self.shape
        order = slot.positions.reshape(-1).to(w.device)
        m = slot.positions.shape[1]
        last = tuple(range(-len(slot.axes), 0))
        flat = w.movedim(slot.axes, last).flatten(last[0])
        units = flat[..., order].unflatten(-1, (blocks, d, m))
        mixed = torch.einsum("bij,...bjm->...bim", matrix.to(w), units).flatten(-3)
        place = torch.full((slot.size,), order.numel())
        place[slot.positions.reshape(-1)] = torch.arange(order.numel())
        extents = [w.shape[a] for a in slot.axes]
        return spread(mixed, place, 0.0).unflatten(-1, extents).movedim(last, slot.axes)

    def _act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        inverse = torch.linalg.inv(element).mT
        moved: dict[str, Tensor] = {}
        for slot in self.slots:
            w = moved.get(slot.parameter, state[slot.parameter])
            inside = slot.broadcast((slot.unit_of() < slot.positions.shape[0]).to(w.device), w)
            mixed = self._mix(w, slot, element if slot.exponent > 0 else inverse)
            moved[slot.parameter] = torch.where(inside, mixed, w)
        return moved

    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        rates: dict[str, Tensor] = {}
        for slot in self.slots:
            matrix = algebra if slot.exponent > 0 else -algebra.mT
            rate = self._mix(state[slot.parameter], slot, matrix)
            name = slot.parameter
            rates[name] = rates[name] + rate if name in rates else rate
        return rates
