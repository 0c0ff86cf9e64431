"""Leading scores of a model's directions, and whether their orders multiply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.nets.likelihood import Likelihood
from deaddir_fast.reading.local import REPLICAS, LocalModel
from deaddir_fast.reading.sectional import unit_direction
from deaddir_fast.theory.gauss import EPS
from deaddir_fast.theory.leading import LeadingScores, judge

# Taylor order of the joint curve: the cost is quadratic in it.
DEEPEST = 24


def leading_scores(
    model: nn.Module,
    inputs: Any,
    directions: Mapping[str, Tensor],
    *,
    likelihood: str | Likelihood = "categorical",
    max_order: int = 8,
) -> LeadingScores:
    """Leading scores at the model's parameters, from Taylor coefficients of its outputs.

    The condition of the product law (see :class:`~deaddir_fast.theory.LeadingScores`), tested for
    the given directions; :func:`~deaddir_fast.theory.curvature_volume` takes the result.

    Args:
        model: any module in evaluation mode; read in fp64 on a copy.
        inputs: a tensor, a tuple or a dict; samples lead.
        directions: {parameter name: (p, *shape)}, each scaled to unit norm; dead ones, and live
            ones that the leading scores should be independent of.
        likelihood: of the outputs.
        max_order: highest order looked for.

    Returns:
        :class:`~deaddir_fast.theory.LeadingScores`; scores (p, N) over samples, tokens and outputs.

    Raises:
        TypeError, ValueError: naming the argument.
        NotImplementedError: for an operation that cannot be differentiated forward.
    """
    if not isinstance(model, nn.Module):
        expected = "a torch.nn.Module (for a function of a vector: theory.leading_scores)"
        raise _check.fail("model", model, expected, TypeError)
    max_order = _check.integer("max_order", max_order, 1)
    local = LocalModel(model, inputs, likelihood)
    if not isinstance(directions, Mapping) or not directions:
        raise _check.fail("directions", directions, "a non-empty dict of tensors", TypeError)
    counts = {k: len(v) if isinstance(v, Tensor) and v.ndim else 0 for k, v in directions.items()}
    count = next(iter(counts.values()))
    if not count or len(set(counts.values())) > 1:
        expected = "tensors (p, *shape) with one common p >= 1"
        raise _check.fail("directions", counts, expected)
    basis = torch.stack(
        [
            unit_direction("directions", {k: v[i] for k, v in directions.items()}, local)
            for i in range(count)
        ]
    )

    def taylor(curves: Tensor, order: int) -> tuple[Tensor, Tensor]:
        rows, *copies = local.curve_coefficients(curves @ basis, order, REPLICAS)
        change = torch.stack([(c - rows).norm(dim=-1) for c in copies]).amax(0)
        return rows, torch.maximum(change, EPS * rows.norm(dim=-1))

    return judge(taylor, count, max_order, DEEPEST)
