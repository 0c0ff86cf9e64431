"""Which branch a piecewise operation takes for t just beside 0.

A comparison of two series is decided by their base values; where these are equal (the base point
is on a kink) by the first coefficient of the difference that does not vanish, per element and per
curve, for t > 0 (``side`` = +1) or t < 0 (``side`` = -1).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deaddir_fast.nets.series import Coefficient, Series


def any_true(mask: Tensor) -> bool:
    """Whether a mask has a true entry; yes when it cannot be known (it differs per direction)."""
    try:
        return bool(mask.any())
    except RuntimeError:  # a batched tensor under vmap has no single truth value
        return True


@dataclass
class Branches:
    """Decisions of one propagation; ties found at the base point are kept in ``ties``.

    A propagation perturbed at rounding size is handed the ties of the exact one, since the
    perturbation itself would break them, and decides everything else anew: where rounding decides
    a branch that matters, its result differs visibly.

    Attributes:
        side: +1 for t > 0, -1 for t < 0.
        ties: per operation, the mask of elements on a kink, or None.
        perturbed: whether ``ties`` is given rather than found.
        kinks: per operation, the number of elements whose branch the curve had to decide.
    """

    side: int
    ties: dict[Hashable, Tensor | None] = field(default_factory=dict)
    perturbed: bool = False
    kinks: dict[str, Tensor] = field(default_factory=dict)

    def _count(self, label: str, mask: Tensor) -> None:
        count = mask.sum()
        self.kinks[label] = self.kinks[label] + count if label in self.kinks else count

    def sign(self, key: Hashable, label: str, a: Series, b: Series | Tensor | float) -> Tensor:
        """Sign (-1, 0, 1) of a - b for t beside 0; 0 where they agree to the order kept."""
        other = b.base if isinstance(b, Series) else b
        base = (a.base > other).to(torch.int8) - (a.base < other).to(torch.int8)
        if self.perturbed:
            tie = self.ties[key]
        else:
            # Two infinities are equal and stay so, whatever their coefficients say.
            tie = (base == 0) & torch.isfinite(a.base)
            tie = tie if any_true(tie) else None
            self.ties[key] = tie
        if tie is None:
            return base
        beside = torch.zeros_like(base)
        for q in range(1, a.order + 1):
            x = a.c[q]
            y = b.c[q] if isinstance(b, Series) else None
            difference = x if y is None else -y if x is None else x - y
            if difference is not None:
                step = difference.sign().to(torch.int8) * self.side**q
                beside = torch.where(beside == 0, step, beside)
        self._count(label, tie & (beside != 0))
        return torch.where(tie, beside, base)

    def largest(self, key: Hashable, label: str, x: Series, dim: int) -> Tensor:
        """Index (dimension kept) of the largest entry along ``dim`` for t beside 0."""
        if self.perturbed:
            tied = self.ties[key]
        else:
            tied = x.base == x.base.amax(dim, keepdim=True)
            tied = tied if any_true(tied.sum(dim) > 1) else None
            self.ties[key] = tied
        if tied is None:
            return x.base.argmax(dim, keepdim=True)
        left = tied
        for q in range(1, x.order + 1):
            c = x.c[q]
            if c is not None:
                value = torch.where(left, c * self.side**q, -torch.inf)
                left = left & (value == value.amax(dim, keepdim=True))
        self._count(label, left.sum(dim) < tied.sum(dim))
        return left.to(torch.int8).argmax(dim, keepdim=True)


def select(mask: Tensor, a: Series, b: Series) -> Series:
    """``a`` where the mask holds, ``b`` elsewhere."""
    shape = torch.broadcast_shapes(mask.shape, a.base.shape, b.base.shape)
    zero = torch.zeros((), dtype=a.base.dtype, device=a.base.device)
    out: list[Coefficient] = []
    for x, y in zip(a.c, b.c, strict=True):
        if x is None and y is None:
            out.append(None)
        else:
            value = torch.where(mask, zero if x is None else x, zero if y is None else y)
            out.append(value.expand(shape))
    return Series(out)
