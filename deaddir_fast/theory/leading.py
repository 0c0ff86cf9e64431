"""Leading scores of dead directions, and whether their orders multiply.

Along u_i of order k_i the model moves as t^k_i a_i, a_i its leading Taylor coefficient in the
metric of the likelihood; the score is k_i t^(k_i - 1) a_i. Where the sum Σ ε_i^k_i a_i is all there
is at the lowest weighted degree (t_i = ε_i τ^(1/k_i)) and the a_i are linearly independent,

    √det F(t)  ~  |a_1 ∧ ... ∧ a_p| ∏ k_i |t_i|^(k_i - 1)

and rates of one direction multiply over several. If the a_i are dependent the product vanishes and
√det F falls faster: with means ρ (cos φ, sin φ), ρ² = 2 (u1⁴ + u2⁴), φ = u1 + u2, both directions
have order 2 and the leading score (1, 0), and √det F = 4 |u1³ - u2³|, of degree 3 and not 2 (Dead
Directions, arXiv 2606.05957, twisted control). Mixed terms such as u1 u2 a can do the same to
independent scores. Both are tested; the sufficient condition above and its test are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.polynomial.chebyshev import Chebyshev
from torch import Tensor
from torch.func import jvp

from deaddir_fast import _check
from deaddir_fast.theory.gauss import EPS
from deaddir_fast.theory.sectional import Map, flat_map, unit, vector

# Our choice, as for orders: a coefficient is zero below ZERO times its rounding, and not zero above
# CLEAR times it; nothing is claimed in between.
ZERO, CLEAR = 30.0, 1000.0
# Nested forward mode costs 2^order.
DEEPEST = 8

#: Coefficients (q, m, p) of m curves in p coordinates, from τ¹ to τ^q, and an order, to the Taylor
#: coefficients (order+1, m, N) along them and their rounding (order+1, m).
Taylor = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LeadingScores:
    """Leading scores of p dead directions at a point.

    Attributes:
        orders: (p,) KL orders; inf where flat, nan where not resolved.
        scores: (p, N) leading coefficients a_i in the metric of the likelihood.
        singular_values: (p,) of the matrix of unit leading scores, falling; the last one is 0
            where they are dependent and 1 where they are orthogonal.
        verdict: "independent", or why orders do not multiply: "dependent: ...", "mixed: ...",
            "unresolved: ...".
    """

    orders: tuple[float, ...]
    scores: Tensor = field(repr=False)
    singular_values: tuple[float, ...]
    verdict: str

    @property
    def independent(self) -> bool:
        """Whether the product law holds."""
        return self.verdict == "independent"

    @property
    def gram(self) -> Tensor:
        """(p, p): inner products of the unit leading scores."""
        unit_scores = self.scores / self.scores.norm(dim=1, keepdim=True)
        return unit_scores @ unit_scores.T


def judge(taylor: Taylor, count: int, max_order: int, deepest: int) -> LeadingScores:
    """Find the leading scores of ``count`` directions and test them.

    Args:
        taylor: Taylor coefficients along curves.
        count: p.
        max_order: highest order looked for on one direction.
        deepest: highest Taylor order for the joint curve.
    """
    axes = torch.eye(count, dtype=torch.float64)[None]
    orders, scores, errors, order = [math.nan] * count, [torch.zeros(0)] * count, [0.0] * count, 0
    why = ""
    open_ = set(range(count))
    while open_ and order < max_order:
        last, order = order, min(max(2, 2 * order), max_order)
        coefficients, rounding = taylor(axes, order)
        for i in sorted(open_):
            state = _first(coefficients[:, i], rounding[:, i], last + 1)
            if state is None:
                continue
            open_.remove(i)
            if isinstance(state, str):
                why = why or f"direction {i}: {state}"
                continue
            orders[i] = float(state)
            scores[i], errors[i] = coefficients[state, i], float(rounding[state, i])
    for i in open_:
        orders[i] = math.inf
        why = why or f"direction {i} is flat to order {max_order}, it has no leading score"
    width = max((len(a) for a in scores), default=0)
    matrix = torch.stack([a if len(a) else torch.full((width,), math.nan) for a in scores]).double()
    if why:
        return LeadingScores(tuple(orders), matrix, (math.nan,) * count, f"unresolved: {why}")
    lengths = matrix.norm(dim=1)
    values = torch.linalg.svdvals(matrix / lengths[:, None])
    smallest = float(values[-1]) if width >= count else 0.0
    values = torch.cat([values, values.new_zeros(count - len(values))])
    noise = max(max(e / float(n) for e, n in zip(errors, lengths, strict=True)), 4 * EPS)
    whole = [int(k) for k in orders]
    if smallest <= ZERO * noise:
        verdict = (
            "dependent: the leading scores are linearly dependent (smallest singular value "
            f"{smallest:.1e}), so the determinant of the metric falls faster than the product"
        )
    elif smallest <= CLEAR * noise:
        verdict = f"unresolved: smallest singular value {smallest:.1e}, rounding {noise:.1e}"
    else:
        verdict = _joint(taylor, whole, matrix, errors, deepest)
    return LeadingScores(tuple(orders), matrix, tuple(values.tolist()), verdict)


def _first(coefficients: Tensor, rounding: Tensor, start: int) -> int | str | None:
    """First degree that is not zero, why that is open, or None if all vanish."""
    for q in range(start, len(coefficients)):
        size, error = float(coefficients[q].norm()), float(rounding[q])
        if not (math.isfinite(size) and math.isfinite(error)):
            return f"the coefficient of t^{q} is not finite"
        if size > CLEAR * error:
            return q
        if size > ZERO * error:
            return (
                f"the coefficient of t^{q}, {size:.1e}, is only {size / error:.0f} times rounding"
            )
    return None


def _joint(
    taylor: Taylor, orders: list[int], scores: Tensor, errors: list[float], most: int
) -> str:
    """Compare generic curves Σ ε_i τ^(L/k_i) u_i with Σ ε_i^k_i a_i."""
    common = math.lcm(*orders)
    if len(orders) == 1:
        return "independent"
    if common > most:
        return (
            f"unresolved: mixed terms are tested on curves to Taylor order {common}, "
            f"here to {most} at most"
        )
    draw = torch.Generator().manual_seed(0)
    amplitude = 0.5 + torch.rand(2, len(orders), generator=draw, dtype=torch.float64)
    amplitude *= torch.randint(0, 2, amplitude.shape, generator=draw) * 2 - 1
    curves = torch.zeros(common, 2, len(orders), dtype=torch.float64)
    for i, k in enumerate(orders):
        curves[common // k - 1, :, i] = amplitude[:, i]
    found, rounding = taylor(curves, common)
    powers = amplitude ** torch.tensor(orders)
    rest = found[common] - powers @ scores
    spread = powers.abs() @ torch.tensor(errors, dtype=torch.float64)
    sizes = torch.cat([found[1:common].norm(dim=-1), rest.norm(dim=-1)[None]])
    noise = torch.cat([rounding[1:common], (rounding[common] + spread)[None]])
    for degree, (size, error) in enumerate(zip(sizes.amax(1), noise.amax(1), strict=True), 1):
        if not bool(torch.isfinite(size)) or bool((size > ZERO * error) & (size <= CLEAR * error)):
            return f"unresolved: a joint coefficient of size {float(size):.1e} near its rounding"
        if bool(size > CLEAR * error):
            return (
                "mixed: terms in several directions have weighted degree "
                f"{degree}/{common}, not above that of the single ones"
            )
    return "independent"


def _nested(mu: Map, theta: Tensor, basis: Tensor) -> Taylor:
    """Taylor coefficients by nested forward mode."""

    def one(curve: Tensor, order: int) -> Tensor:
        def path(t: Tensor) -> Tensor:
            powers = torch.stack([t ** (q + 1) for q in range(len(curve))])
            return mu(theta + (powers @ curve) @ basis)

        derivatives: list[Map] = [path]
        for _ in range(order):
            derivatives.append(_derivative(derivatives[-1]))
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack([f(zero) / math.factorial(q) for q, f in enumerate(derivatives)])

    def taylor(curves: Tensor, order: int) -> tuple[Tensor, Tensor]:
        found = torch.stack([one(curves[:, m], order) for m in range(curves.shape[1])], 1)
        # Forward mode adds few terms; each coefficient is exact to eps of the largest so far.
        return found, 4 * EPS * found.norm(dim=-1).cummax(0).values

    return taylor


def _derivative(function: Map) -> Map:
    return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]


def _one_sided(mu: Map, theta: Tensor, basis: Tensor, radius: float = 0.25) -> Taylor:
    """Taylor coefficients for τ > 0 where μ is analytic along rays but not at the point.

    Chebyshev interpolation on [0, r] and on [0, r/2]; their difference is the error.
    """

    def one(curve: Tensor, order: int, r: float) -> np.ndarray:
        def values(t: np.ndarray) -> np.ndarray:
            powers = torch.stack([torch.as_tensor(t) ** (q + 1) for q in range(len(curve))], 1)
            points = theta + (powers @ curve) @ basis
            return np.stack([mu(p).numpy() for p in points])

        nodes = (1 + np.cos(np.pi * (np.arange(17) + 0.5) / 17)) * r / 2
        samples = values(nodes)
        rows = []
        for column in samples.T:
            fit = Chebyshev.fit(nodes, column, 16, domain=[0, r])
            rows.append([float(fit.deriv(q)(0.0)) / math.factorial(q) for q in range(order + 1)])
        return np.array(rows).T

    def taylor(curves: Tensor, order: int) -> tuple[Tensor, Tensor]:
        wide = np.stack([one(curves[:, m], order, radius) for m in range(curves.shape[1])], 1)
        near = np.stack([one(curves[:, m], order, radius / 2) for m in range(curves.shape[1])], 1)
        found = torch.as_tensor(wide)
        error = torch.as_tensor(wide - near).norm(dim=-1)
        # One comparison can agree by chance: never better than the conditioning of the derivative.
        powers = torch.arange(order + 1, dtype=torch.float64)
        least = EPS * (32 / radius) ** powers * found.norm(dim=-1).amax(0, keepdim=True).T
        return found, torch.maximum(error, least.T)

    return taylor


def leading_scores(
    mu: Map, theta: Any, directions: Any, *, max_order: int = DEEPEST
) -> LeadingScores:
    """Leading scores of directions of N(μ(θ), I), and whether their orders multiply.

    Where μ has no derivatives at θ but is smooth along rays from it (a cone point), the
    coefficients are one-sided ones (t > 0) by interpolation.

    Args:
        mu: function of a (d,) fp64 tensor, made of differentiable torch operations; the output is
            flattened to (N,).
        theta: (d,) the point.
        directions: (p, d), each scaled to length one; dead ones, and live ones that the leading
            scores should be independent of.
        max_order: highest order looked for, 1 to 8 (nested forward mode costs 2^order).

    Returns:
        :class:`LeadingScores`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    point = vector("theta", theta)
    function = flat_map(mu, point)
    max_order = _check.integer("max_order", max_order, 1)
    if max_order > DEEPEST:
        raise _check.fail("max_order", max_order, f"at most {DEEPEST}")
    try:
        rows = list(directions)
    except TypeError:
        raise _check.fail("directions", directions, "a matrix (p, d)", TypeError) from None
    if not rows:
        raise _check.fail("directions", directions, "at least one direction")
    basis = torch.stack([unit(f"directions[{i}]", u, point.numel()) for i, u in enumerate(rows)])
    with torch.no_grad():
        taylor = _nested(function, point, basis)
        probe, _ = taylor(torch.eye(len(basis), dtype=torch.float64)[None], 2)
        if not bool(torch.isfinite(probe).all()):
            taylor = _one_sided(function, point, basis)
        return judge(taylor, len(basis), max_order, DEEPEST)
