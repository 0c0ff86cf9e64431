"""Curvature of many directions at the checkpoint itself, by forward mode.

For a unit direction u, u^T F(theta0) u = mean_n of dz_n^T H(z_n) dz_n with dz the derivative of the
outputs along u, summed over tokens. The value at theta0 is computed once for all directions, so
that a direction costs the products W da + U a of one tangent: at least 0.67 of a forward and a
backward pass for full matrices U, 0.33 for U of rank one. (Our choice of propagation:
:mod:`deaddir_fast.nets.dual`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from deaddir_fast.nets.likelihood import Likelihood
from deaddir_fast.nets.rays import read_rays
from deaddir_fast.nets.weights import RankOne


@dataclass(frozen=True)
class PointCurvature:
    """Directional Fisher curvature at theta0; all tensors are fp64 on the CPU.

    Attributes:
        curvature: (p,), u^T F(theta0) u for unit u.
        stderr: (p,), its standard error over samples (nan for a single sample).
        per_sample: (p, n), each sample's own curvature; ``curvature`` is its mean.
        norms: (p,), norms of the directions before scaling to 1.
        notes: what limits these numbers (precision, kinks).
    """

    curvature: Tensor
    stderr: Tensor
    per_sample: Tensor = field(repr=False)
    norms: Tensor = field(repr=False)
    notes: tuple[str, ...]


def point_curvature(
    model: nn.Module,
    inputs: object,
    directions: Mapping[str, Tensor | RankOne],
    *,
    likelihood: str | Likelihood = "categorical",
    memory_budget: int | None = None,
) -> PointCurvature:
    """Exact (type-2) Fisher curvature of a model along directions at its current parameters.

    The same as :func:`~deaddir_fast.nets.rays.ray_curvature` at radius 0, with what each sample
    contributes.

    Args:
        model: a module in eval mode with fp64 (exact) or fp32 (labelled) parameters. Half
            precision is refused. Its current parameters are theta0.
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments); samples n lead.
        directions: {parameter name: (p, *shape)}, missing parameters count as 0; a
            :class:`~deaddir_fast.nets.weights.RankOne` may stand for a matrix parameter. Each of
            the p directions is scaled to unit global norm. Slices that are zero or of rank one are
            detected and cost less.
        likelihood: "categorical" (softmax over the last dimension), "gaussian" (unit variance),
            "bernoulli", "poisson" or a :class:`~deaddir_fast.nets.likelihood.Likelihood`.
            Sequence outputs (n, t, c) are summed over tokens and averaged over samples.
        memory_budget: bytes for intermediate values; 1 GiB on a CPU and half the free memory on
            CUDA by default. Results do not depend on it beyond rounding.

    Returns:
        :class:`PointCurvature`.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
        NotImplementedError: naming an operation that torch cannot differentiate forward.
    """
    found, each = read_rays(
        model, inputs, directions, [0.0], likelihood, "exact", None, 1, 0, memory_budget, keep=True
    )
    assert each is not None
    return PointCurvature(
        found.fisher[:, 0], found.stderr[:, 0], each[:, 0], found.norms, found.notes
    )
