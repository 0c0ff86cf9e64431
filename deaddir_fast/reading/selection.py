"""The selection rule: may a straight line be read as transversal to the fibre?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast.reading.local import LocalModel


@dataclass(frozen=True)
class Selection:
    """The selection rule for p lines, from their Taylor coefficients.

    Attributes:
        line_orders: (p,) KL order of the straight line, NaN where unclear.
        relaxed_orders: (p,) KL order after relaxing the live coordinates, NaN where unclear.
        gram_floor: λ_g, smallest eigenvalue of the Fisher on the live space; inf without one.
        ratios: (p,) 2k² Σ_a E[a b_a]² / (k² E[a²]); NaN where the line has no finite order >= 2.
        windows: (p,) distance below which the leading relaxed coefficient outweighs the others;
            NaN without a finite relaxed order.
        verdicts: ``"transversal"`` or why not, one for each line.
    """

    line_orders: Tensor
    relaxed_orders: Tensor
    gram_floor: float
    ratios: Tensor
    windows: Tensor
    verdicts: tuple[str, ...]

    @property
    def margins(self) -> Tensor:
        """(p,) ratio over λ_g/2: the rule holds below 1."""
        return self.ratios / (0.5 * self.gram_floor)


def selection_rule(local: LocalModel, vectors: Tensor, max_order: int) -> Selection:
    """Apply the selection rule to (p, d) unit vectors.

    Along u of order k the score is k t^(k-1) a + ...; with b_a the scores of an orthonormal basis
    of the live space and λ_g the smallest eigenvalue of their Gram matrix, the rule
    2k² Σ_a E[a b_a]² / (k² E[a²]) < λ_g/2 makes λ_min of the Fisher on u and the live space at
    least F_uu/2, so that k is the order of u ("Dead Directions", arXiv 2606.05957, selection rule
    on smooth fibres). It is sufficient: a line that fails it may still be transversal.
    """
    split = local.spectrum
    nan, inf = float("nan"), float("inf")
    gram_floor = float(split.values[split.rank - 1]) ** 2 if split.rank else inf
    p = vectors.shape[0]
    jets = local.relaxed_jets(vectors, max_order)
    lines = local.line_orders(vectors, max_order)
    relaxed = jets.orders()
    ratios = torch.full((p,), nan, dtype=torch.float64)
    windows = torch.full((p,), nan, dtype=torch.float64)
    verdicts = []
    for i, k in enumerate(lines):
        windows[i] = _window(jets.residual[:, i].norm(dim=-1), relaxed[i])
        if k == 1:
            relaxed[i] = None
        if k is not None and 1 < k < inf:
            a = jets.straight[int(k), i]
            shared = split.values[: split.rank] * (split.left.T @ a)
            ratios[i] = 2 * float((shared.norm() / a.norm()).square())
        verdicts.append(_verdict(k, relaxed[i], float(ratios[i]), gram_floor, max_order))
    if local.kinked or any("kink" in note for note in jets.notes):
        verdicts = ["unclear: the point sits on a kink"] * p

    def tensor(orders: list[float | None]) -> Tensor:
        return torch.tensor([nan if k is None else k for k in orders], dtype=torch.float64)

    return Selection(tensor(lines), tensor(relaxed), gram_floor, ratios, windows, tuple(verdicts))


def _window(sizes: Tensor, order: float | None) -> float:
    """Distance at which the leading coefficient and a higher one balance."""
    if order is None or math.isinf(order):
        return float("nan")
    k = int(order)
    ratios = [
        float(sizes[k] / sizes[q]) ** (1 / (q - k))
        for q in range(k + 1, len(sizes))
        if float(sizes[q]) > 0
    ]
    return min(ratios, default=float("inf"))


def _verdict(
    line: float | None, relaxed: float | None, ratio: float, gram_floor: float, max_order: int
) -> str:
    if line is None:
        return "unclear: a Taylor coefficient is too close to rounding"
    if line == 1:
        return "live: the outputs change at first order"
    if math.isinf(line):
        return f"flat: nothing changes along the line to order {max_order}"
    if ratio < 0.5 * gram_floor:
        return "transversal"
    after = (
        "an order that is unclear"
        if relaxed is None
        else "no order: a tangent of a curved fibre"
        if math.isinf(relaxed)
        else f"order {relaxed:g}"
    )
    return (
        f"selection rule not met: {ratio:.3g} is not below λ_g/2 = {0.5 * gram_floor:.3g}; "
        f"relaxed, the line has {after}"
    )
