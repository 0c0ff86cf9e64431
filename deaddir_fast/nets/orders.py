"""Order of vanishing of a network's outputs along rays, read from Taylor coefficients at t = 0.

Along theta_0 + t u the outputs are z_0 + c_1 t + c_2 t^2 + ...; the KL order is the first k whose
coefficient is not zero in the metric of the likelihood, K(t) = 1/2 E|c_k|^2 t^{2k} + ...
(Dead Directions, arXiv 2606.05957, KL order; that the first visible output coefficient gives it is
our derivation). Nothing is fitted and no radius is chosen.

What counts as zero (our choice). Each propagation is repeated with every parameter, every
coefficient of the ray and every intermediate coefficient changed by random relative amounts of the
size of rounding (stochastic arithmetic; Vignes 1993). The change of c_q this makes is its rounding
scale. It contains the cancellations that really occur, so it is tight where a bound on magnitudes
would explode with depth, and an exact zero (a dead unit, a blank pixel) has scale zero. A
coefficient is zero below ``ZERO`` times that scale, non-zero above ``CLEAR`` times it, and in
between nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deaddir_fast import _check
from deaddir_fast.nets import likelihood as likelihoods
from deaddir_fast.nets.jet import JetProgram, kink_notes

ZERO = 30.0
CLEAR = 1000.0
# Perturbed repetitions: pairs of opposite sign.
REPLICAS = 4
# Zeros are accepted only if what rounding could hide is this far below the coefficient found, or
# below the size coefficients have where the entries of parameters and ray are generic.
RESOLUTION = 1e-4


@dataclass(frozen=True, eq=False)
class RayOrders:
    """KL orders of p rays; behaves as the sequence of ``orders``.

    Attributes:
        orders: (p,) float64: order k; ``inf`` where all coefficients up to ``max_order`` vanish;
            ``nan`` where rounding or a singular operation leaves it open. For t > 0.
        orders_minus: (p,) the same for t < 0; differs only where the base point is on a kink.
        energies: (max_order + 1, p): mean over samples of |c_q|^2 in the metric of the
            likelihood, so that K = 1/2 energies[k] t^{2k} to leading order. Entry 0 is zero.
        rounding: (max_order + 1, p): rounding scale of the square root of ``energies``.
        leading: (p,) energies[k] of the order reported, nan where there is none.
        gap: (p,) largest coefficient taken for zero below order k over the coefficient of order
            k; for a flat ray over the size coefficients have at generic entries (one nat where
            they vanish there too). Small is good, 0 is exact.
        window: (p, 2) radii between which order k dominates the coefficients on either side of
            it (those taken for zero entering at the size they could have).
        kinks: (p,) elements of the network exactly on a kink whose branch the ray decides.
        verdicts: (p,) one sentence each.
        notes: what holds for all rays: fallbacks, kinks.
        max_order: highest coefficient computed.
    """

    orders: Tensor
    orders_minus: Tensor
    energies: Tensor
    rounding: Tensor
    leading: Tensor
    gap: Tensor
    window: Tensor
    kinks: Tensor
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]
    max_order: int

    @property
    def resolved(self) -> Tensor:
        """(p,) whether an order (finite or not) is reported, the same on both sides of t = 0."""
        same = self.orders == self.orders_minus
        return same & ~self.orders.isnan()

    def dominant(self, radius: float) -> Tensor:
        """(p,) the q whose term energies[q] radius^{2q} is largest; nan where all are rounding.

        Away from t = 0 this, and not the order, is what a slope sees: a point or a direction
        slightly off a singular one has a formal order that rules at tiny radii only.
        """
        radius = _check.positive("radius", radius)
        q = torch.arange(self.max_order + 1, dtype=torch.float64)
        size = self.energies.sqrt()
        size = torch.where(size > ZERO * self.rounding, size, 0.0)
        terms = size.log() + (q * math.log(radius))[:, None]
        best = terms[1:].argmax(0).double() + 1
        return torch.where((size[1:] > 0).any(0), best, torch.nan)

    def tolist(self) -> list[float]:
        """The orders as floats."""
        return self.orders.tolist()

    def __len__(self) -> int:
        return self.orders.shape[0]

    def __getitem__(self, index: Any) -> Any:
        picked = self.orders[index]
        return picked.item() if picked.ndim == 0 else picked

    def __iter__(self) -> Iterator[float]:
        return iter(self.orders.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.orders.numpy(), dtype=dtype)


def ray_orders(
    model: nn.Module | JetProgram,
    inputs: Any,
    directions: Mapping[str, Tensor],
    *,
    likelihood: str | likelihoods.Likelihood = "categorical",
    max_order: int = 8,
    base: Mapping[str, Tensor] | None = None,
    uncertainty: float = 0.0,
    memory: int = 2**30,
) -> RayOrders:
    """KL orders along theta_0 + t u at t = 0 from the Taylor coefficients of the outputs.

    Args:
        model: any deterministic module, or a :class:`JetProgram` captured from it earlier (its
            inputs are used then, and ``inputs`` may be None).
        inputs: a tensor, a tuple or a dict of tensors; samples lead.
        directions: {parameter name: (p, *shape)}, a missing parameter is zero; each direction is
            scaled to unit norm over all parameters.
        likelihood: of the outputs: "categorical", "gaussian", "bernoulli", "poisson", or one of
            your own.
        max_order: highest order looked for.
        base: parameters to use as theta_0 instead of the model's own.
        uncertainty: how far the unit direction may be off, in norm; coefficients that such an
            error could produce count as zero. 0: the direction is meant exactly (to rounding).
            Pass 1e-8, say, for a computed eigenvector.
        memory: bytes of intermediate results to stay below.

    Returns:
        :class:`RayOrders`; ``np.asarray``, indexing and ``len`` give the orders.

    Raises:
        ValueError: for directions of a wrong name or shape or of zero norm, or a wrong order.
        NotImplementedError: for an operation that cannot be differentiated forward.
    """
    metric = likelihoods.get(likelihood)
    if not isinstance(max_order, int) or max_order < 1:
        raise _check.fail("max_order", max_order, "an integer >= 1")
    uncertainty = _check.positive("uncertainty", uncertainty, allow_zero=True)
    if not isinstance(directions, Mapping) or not directions:
        raise _check.fail("directions", directions, "a non-empty dict of tensors", TypeError)
    if isinstance(model, JetProgram):
        program = model
    else:
        program = JetProgram(model, inputs, names=_names(model, directions))
    rays = unit_directions(program, directions)
    reader = _Reader(program, metric, max_order, base, memory)
    plus = reader.read(rays, 1)
    rounding = plus.rounding
    if uncertainty:
        rounding = torch.hypot(rounding, reader.spread(rays, plus, uncertainty))
    scale = torch.maximum(plus.size, reader.generic(rays))
    decided = [
        _decide(plus.size[:, j], rounding[:, j], scale[:, j]) for j in range(plus.size.shape[1])
    ]
    minus = list(decided)
    on_kink = torch.nonzero(plus.kinks).flatten().tolist()
    notes = plus.notes
    if on_kink:
        other = reader.read({k: v[on_kink] for k, v in rays.items()}, -1)
        notes = tuple(dict.fromkeys(notes + other.notes))
        for column, j in enumerate(on_kink):
            error = other.rounding[:, column]
            if uncertainty:
                error = torch.hypot(error, rounding[:, j])
            minus[j] = _decide(other.size[:, column], error, scale[:, j])
    return _assemble(plus, rounding, decided, minus, notes, max_order)


def _names(model: nn.Module, directions: Mapping[str, Tensor]) -> Sequence[str] | None:
    # Parameters no ray moves are still exposed: they are perturbed to find the rounding scale.
    known = {k for k, _ in model.named_parameters()}
    for name in directions:
        if name not in known:
            raise ValueError(f"directions: no parameter called {name!r} in the model")
    return None


def unit_directions(program: JetProgram, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Directions checked against the parameters and scaled to unit norm, in their dtype.

    Raises:
        TypeError, ValueError: naming ``directions``.
    """
    rays: dict[str, Tensor] = {}
    count = None
    for name, value in directions.items():
        if name not in program.parameters:
            raise ValueError(f"directions: no parameter called {name!r} in the model")
        like = program.parameters[name]
        _check.tensor(f"directions[{name!r}]", value)
        if value.ndim != like.ndim + 1 or value.shape[1:] != like.shape or not value.shape[0]:
            shape = ", ".join(["p", *map(str, like.shape)])
            raise _check.fail(f"directions[{name!r}]", value, f"shape ({shape}) with p >= 1")
        if value.shape[0] != (count or value.shape[0]):
            raise _check.fail(f"directions[{name!r}]", value, f"{count} directions")
        count = value.shape[0]
        rays[name] = value.detach().to(dtype=like.dtype, device=like.device)
    total = sum(v.double().reshape(v.shape[0], -1).square().sum(1).cpu() for v in rays.values())
    norm = torch.as_tensor(total).sqrt()
    if not bool((norm > 0).all() and norm.isfinite().all()):
        bad = int(torch.nonzero(~((norm > 0) & norm.isfinite()))[0])
        raise ValueError(f"directions: direction {bad} has norm {float(norm[bad])}, expected > 0")
    return {k: v / norm.to(v).reshape(-1, *([1] * (v.ndim - 1))) for k, v in rays.items()}


@dataclass
class _Reading:
    size: Tensor
    rounding: Tensor
    kinks: Tensor
    notes: tuple[str, ...]


class _Reader:
    """Whitened sizes of the Taylor coefficients along rays."""

    def __init__(
        self,
        program: JetProgram,
        metric: likelihoods.Likelihood,
        order: int,
        base: Mapping[str, Tensor] | None,
        memory: int,
    ):
        self.program, self.metric, self.order = program, metric, order
        self.base, self.memory = base, memory

    def read(self, rays: Mapping[str, Tensor], side: int, replicas: int = REPLICAS) -> _Reading:
        """Root mean square over samples of |c_q|, and of its change under perturbation."""
        count = next(iter(rays.values())).shape[0]
        curves = {k: v.unsqueeze(0) for k, v in rays.items()}
        self.program.check(curves, self.order, side, self.base)
        square = torch.zeros(self.order + 1, count, dtype=torch.float64)
        change = torch.zeros(max(replicas, 1), self.order + 1, count, dtype=torch.float64)
        kinks = torch.zeros(count, dtype=torch.int64)
        notes: dict[str, None] = {}
        met: dict[str, int] = {}
        for block in self.program.blocks(
            curves, self.order, side, base=self.base, memory=self.memory, replicas=replicas
        ):
            start = block.exact[0]
            assert start is not None, "the base value is never dropped"
            for q in range(1, self.order + 1):
                exact = self._white(start, block.exact[q])
                square[q, block.curves] += _energy(exact, start)
                for r, other in enumerate(block.perturbed):
                    moved = self._white(start, other[q])
                    if exact is None and moved is None:
                        continue
                    difference = (
                        moved if exact is None else exact if moved is None else moved - exact
                    )
                    change[r, q, block.curves] += _energy(difference, start)
            for label, per_curve in block.kinks.items():
                kinks[block.curves] += per_curve.cpu()
                met[label] = met.get(label, 0) + int(per_curve.sum())
            notes.update(dict.fromkeys(block.notes))
        n = self.program.samples
        return _Reading(
            (square / n).sqrt(),
            (change / n).sqrt().amax(0),
            kinks,
            tuple(notes) + kink_notes(met, side),
        )

    def _white(self, start: Tensor, c: Tensor | None) -> Tensor | None:
        if c is None:
            return None
        shared = start[:1] if start.stride(0) == 0 else start
        return self.metric.whiten(shared, c)

    def generic(self, rays: Mapping[str, Tensor]) -> Tensor:
        """Sizes without cancellations: all entries of theta_0 and of the rays rescaled at random.

        Exact zeros stay, so what no values of the other entries could revive has size zero.
        """
        generator = torch.Generator().manual_seed(1)

        def draw(like: Tensor) -> Tensor:
            noise = torch.rand(like.shape, generator=generator, dtype=torch.float64)
            return noise.to(dtype=like.dtype, device=like.device)

        start = {**self.program.parameters, **(self.base or {})}
        start = {k: v * (0.5 + draw(v)) for k, v in start.items()}
        moved = {k: v * (3 * draw(v) - 1.5) for k, v in rays.items()}
        other = _Reader(self.program, self.metric, self.order, start, self.memory)
        return other.read(moved, 1, replicas=0).size.nan_to_num(nan=0.0, posinf=0.0)

    def spread(self, rays: Mapping[str, Tensor], exact: _Reading, radius: float) -> Tensor:
        """Change of the coefficients under errors of norm ``radius`` of the unit direction."""
        generator = torch.Generator().manual_seed(0)
        worst = torch.zeros_like(exact.size)
        for _ in range(4):
            noise = {}
            for name, like in self.program.parameters.items():
                count = next(iter(rays.values())).shape[0]
                draw = torch.randn((count, *like.shape), generator=generator, dtype=torch.float64)
                noise[name] = draw.to(dtype=like.dtype, device=like.device)
            noise = unit_directions(self.program, noise)
            moved = {k: rays[k] + radius * v if k in rays else radius * v for k, v in noise.items()}
            other = self.read(moved, 1, replicas=0)
            worst = torch.maximum(worst, (other.size - exact.size).abs())
        return worst


def _energy(e: Tensor | None, like: Tensor) -> Tensor:
    """(p, n, *out) -> (p,): sum over everything but curves, in double precision."""
    if e is None:
        return torch.zeros(like.shape[0], dtype=torch.float64)
    return e.double().square().reshape(e.shape[0], -1).sum(1).cpu()


@dataclass
class _Decision:
    """The order along one side of one ray, the gap below it, and why there is none if so."""

    order: float
    gap: float
    reason: str = ""


def _decide(size: Tensor, rounding: Tensor, scale: Tensor) -> _Decision:
    for q in range(1, size.shape[0]):
        s, r = float(size[q]), float(rounding[q])
        if not (math.isfinite(s) and math.isfinite(r)):
            text = f"the coefficient of t^{q} is not finite (a singular operation, as sqrt at 0)"
            return _Decision(math.nan, math.nan, text)
        if s > CLEAR * r:
            return _accept(size, rounding, scale, q)
        if s > ZERO * r:
            text = f"the coefficient of t^{q}, {s:.1e}, is only {s / r:.0f} times its rounding"
            return _Decision(math.nan, math.nan, text)
    return _accept(size, rounding, scale, math.inf)


def _accept(size: Tensor, rounding: Tensor, scale: Tensor, order: float) -> _Decision:
    """Check that what lies below the order is zero on a scale that means something."""
    gap = 0.0
    last = size.shape[0] if math.isinf(order) else int(order)
    found = 0.0 if math.isinf(order) else float(size[last])
    for q in range(1, last):
        s, r, natural = float(size[q]), float(rounding[q]), float(scale[q])
        reference = max(natural, found)
        if not found and natural <= CLEAR * r:
            # Zero for all values of the entries, an identity of the model: compare with one nat.
            reference = 1.0
        if ZERO * r > RESOLUTION * reference:
            text = f"rounding hides a coefficient of t^{q} of up to {ZERO * r:.1e}"
            return _Decision(
                math.nan, math.nan, f"{text} (coefficients are of size {reference:.1e})"
            )
        gap = max(gap, s / (found or reference))
    return _Decision(order, gap)


def _window(size: Tensor, rounding: Tensor, order: float) -> tuple[float, float]:
    if not math.isfinite(order):
        return (math.nan, math.nan)
    k = int(order)
    low, high = 0.0, math.inf
    for q in range(1, size.shape[0]):
        s = float(size[q])
        if q < k:
            possible = max(s, ZERO * float(rounding[q]))
            low = max(low, (possible / float(size[k])) ** (1 / (k - q)))
        elif q > k and 0 < s < math.inf:
            high = min(high, (float(size[k]) / s) ** (1 / (q - k)))
    return low, high


# Below this radius a ruling order says more about the accuracy of the point than of the model.
_TINY = 1e-4


def _say(decision: _Decision, max_order: int) -> str:
    if decision.reason:
        return f"not resolved: {decision.reason}"
    if math.isinf(decision.order):
        return f"flat to order {max_order}"
    return f"order {int(decision.order)}"


def _verdict(
    plus: _Decision, minus: _Decision, window: tuple[float, float], kinks: int, max_order: int
) -> str:
    same = plus.order == minus.order or (plus.reason != "" and minus.reason != "")
    if not same:
        sides = f"{_say(plus, max_order)} for t > 0, {_say(minus, max_order)} for t < 0"
        return f"one-sided: {sides} ({kinks} elements on a kink)"
    text = _say(plus, max_order)
    if plus.reason:
        return text
    if plus.order > 1:
        which = "all" if math.isinf(plus.order) else "lower"
        of = "their generic size" if math.isinf(plus.order) else "it"
        text += f"; {which} coefficients "
        text += f"below {2 * plus.gap:.0e} of {of}" if plus.gap else "vanish"
    if window[1] < _TINY:
        text += f"; rules below t = {window[1]:.0e} only, higher terms beyond"
    if kinks:
        text += f"; {kinks} elements on a kink, both sides agree"
    return text


def _assemble(
    plus: _Reading,
    rounding: Tensor,
    decided: list[_Decision],
    minus: list[_Decision],
    notes: tuple[str, ...],
    max_order: int,
) -> RayOrders:
    orders = torch.tensor([d.order for d in decided], dtype=torch.float64)
    windows = [_window(plus.size[:, j], rounding[:, j], d.order) for j, d in enumerate(decided)]
    energies = plus.size.square()
    leading = torch.full_like(orders, math.nan)
    for j, d in enumerate(decided):
        if math.isfinite(d.order):
            leading[j] = energies[int(d.order), j]
    return RayOrders(
        orders=orders,
        orders_minus=torch.tensor([d.order for d in minus], dtype=torch.float64),
        energies=energies,
        rounding=rounding,
        leading=leading,
        gap=torch.tensor([d.gap for d in decided], dtype=torch.float64),
        window=torch.tensor(windows, dtype=torch.float64),
        kinks=plus.kinks,
        verdicts=tuple(
            _verdict(a, b, w, int(k), max_order)
            for a, b, w, k in zip(decided, minus, windows, plus.kinks, strict=True)
        ),
        notes=notes,
        max_order=max_order,
    )
