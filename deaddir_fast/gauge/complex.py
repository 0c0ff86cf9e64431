"""Complex rescaling: pairs of units under rotary position embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.gauge.base import Gauge, State, spread
from deaddir_fast.gauge.rescaling import Slot


@dataclass(frozen=True, eq=False)
class ComplexRescaling(Gauge):
    """Pairs of units as complex numbers: queries q -> z q, keys k -> conj(z)^-1 k.

    Re(q conj k) stays, and a rotary embedding, which multiplies both by phases, commutes with z.
    So C^* is what is left of GL(2) on each pair of query and key units (RoFormer, arXiv
    2104.09864, section 3.2.2).

    Elements have shape (h, 2), real and imaginary part, not zero. The positions of a slot,
    (h, 2 m), hold m copies of the pair one after the other, real part first: several query
    heads may share a key. Exponent +1 multiplies by z, -1 by conj(z)^-1.
    """

    slots: tuple[Slot, ...]

    def _check_element(self, element: Tensor) -> Tensor:
        self._check_shape("element", element)
        if not bool(((element != 0).any(-1) & element.isfinite().all(-1)).all()):
            raise _check.fail(
                "element", element, f"finite non-zero complex numbers for {self.name!r}"
            )
        return element

    def identity(self) -> Tensor:
        """Ones."""
        return torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(self.shape[0], 1)

    def random_element(self, generator: torch.Generator | None = None) -> Tensor:
        """Log-uniform moduli in [0.3, 3], uniform phases."""
        u = torch.rand(self.shape, dtype=torch.float64, generator=generator)
        low = torch.tensor([math.log(0.3), 0.0], dtype=torch.float64)
        return self.exp(low + u * torch.tensor([math.log(10.0), math.tau], dtype=torch.float64))

    def compose(self, first: Tensor, second: Tensor) -> Tensor:
        """Complex product."""
        return _product(first, second)

    def exp(self, algebra: Tensor) -> Tensor:
        """Complex exponential: log modulus and phase are the coordinates of the algebra."""
        modulus, phase = algebra[..., 0].exp(), algebra[..., 1]
        return torch.stack([modulus * phase.cos(), modulus * phase.sin()], -1)

    def _multiplied(self, w: Tensor, slot: Slot, factor: Tensor, rest: float) -> Tensor:
        """``w`` times ``factor`` (h, 2) on the pairs of the slot, times ``rest`` elsewhere."""
        h, two_m = slot.positions.shape
        pairs = slot.positions.reshape(-1, 2)
        place = torch.arange(h * two_m // 2)
        unit = torch.full((slot.size,), h)
        unit[pairs] = (place // (two_m // 2))[:, None]
        partner = torch.arange(slot.size)
        partner[pairs] = pairs.flip(1)
        sign = torch.zeros(slot.size, dtype=torch.float64)
        sign[pairs] = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        last = tuple(range(-len(slot.axes), 0))
        turned = w.movedim(slot.axes, last).flatten(last[0])[..., partner.to(w.device)]
        turned = turned.unflatten(-1, [w.shape[a] for a in slot.axes]).movedim(last, slot.axes)
        real = spread(factor[..., 0], unit, rest)
        imaginary = spread(factor[..., 1], unit, 0.0) * sign.to(factor.device)
        return w * slot.broadcast(real.to(w), w) + turned * slot.broadcast(imaginary.to(w), w)

    def _act(self, state: State, element: Tensor) -> dict[str, Tensor]:
        inverse = element / element.square().sum(-1, keepdim=True)  # conj(z)^-1 = z / |z|^2
        moved: dict[str, Tensor] = {}
        for slot in self.slots:
            w = moved.get(slot.parameter, state[slot.parameter])
            factor = element if slot.exponent > 0 else inverse
            moved[slot.parameter] = self._multiplied(w, slot, factor, 1.0)
        return moved

    def _velocity(self, state: State, algebra: Tensor) -> dict[str, Tensor]:
        # Derivative of conj(exp(t x))^-1: -conj(x).
        against = torch.stack([-algebra[..., 0], algebra[..., 1]], -1)
        rates: dict[str, Tensor] = {}
        for slot in self.slots:
            factor = algebra if slot.exponent > 0 else against
            rate = self._multiplied(state[slot.parameter], slot, factor, 0.0)
            name = slot.parameter
            rates[name] = rates[name] + rate if name in rates else rate
        return rates


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack(
        [
            a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1],
            a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0],
        ],
        -1,
    )
