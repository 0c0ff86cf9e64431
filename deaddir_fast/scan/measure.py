"""Rays along a layer's candidates: curvature, order, and what they come to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.nets.graph import arguments, model_output
from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.nets.likelihood import Likelihood
from deaddir_fast.nets.orders import ray_orders
from deaddir_fast.nets.rays import RayCurvature, Recording, read_rays
from deaddir_fast.ops.kron_quadratic import kron_quadratic
from deaddir_fast.scan.candidates import Candidate, to_parameters
from deaddir_fast.scan.load_model import experts_in_fp64
from deaddir_fast.theory.rate import RateFit, fit_rate

#: Divergence along a ray, relative to that along a live direction, below which it is rounding of
#: the null space: a flat direction read off activations of precision ε is off by an angle of c ε,
#: and its curvature by (c ε)² times the spread of the eigenvalues it is told apart from.
FLAT = 256.0
#: However large the rounding, what is called flat stays below this part of what a direction of
#: order 8 would show at the largest radius r, r^14.
LEAST = 0.02


class Readout(nn.Module):
    """A model whose outputs at padded tokens do not move.

    Its parameters are those of ``model`` with the prefix "model.".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs (n, ..., c), zero where the attention mask is."""
        z = model_output(self.model(*args, **kwargs))
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or z.ndim != 3:
            return z
        if tuple(mask.shape) != tuple(z.shape[:2]):
            return z
        return z * mask.unsqueeze(-1).to(z.dtype)


def reading_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model in the precision of the readings; its own weights are exact in it."""
    twin = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    config = getattr(twin, "config", None)
    if getattr(config, "use_cache", None):
        config.use_cache = False  # type: ignore[union-attr]
    if dtype == torch.float64:
        experts_in_fp64(twin)
    return twin


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating-point inputs in the precision of the readings."""
    args, kwargs = arguments(inputs)

    def one(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    if kwargs:
        return {k: one(v) for k, v in kwargs.items()}
    return tuple(one(x) for x in args)


def measure(
    readout: Readout,
    inputs: Any,
    layer: Layer,
    chosen: Sequence[Candidate],
    radii: Tensor,
    likelihood: Likelihood,
    *,
    eps: float,
    factors: tuple[Tensor, Tensor],
    jets: bool,
    recording: Recording,
) -> list[dict[str, Any]]:
    """Readings of one layer's candidates, the last of which is live.

    Args:
        readout: the model, in the precision of the readings.
        inputs: the samples rays are read on.
        layer: of the original model; its parameter names are used.
        chosen: candidates.
        radii: positive, ascending.
        likelihood: of the outputs.
        eps: precision the null spaces were read in.
        factors: A and G.
        jets: whether to read Taylor orders where rays leave something open.
        recording: of the readout, shared by all layers.

    Returns:
        One entry of the report for each, in order.
    """
    state = {k.removeprefix("model."): v for k, v in readout.named_parameters()}
    dtype = next(iter(state.values())).dtype
    matrices = torch.stack([c.u for c in chosen])
    directions = {
        f"model.{k}": v for k, v in to_parameters(layer, matrices.to(dtype), state).items()
    }

    def rays(which: list[int], grid: Tensor) -> RayCurvature:
        some = {name: u[which] for name, u in directions.items()}
        return read_rays(
            readout, inputs, some, grid, likelihood, "exact", None, 1, 0, None, recording=recording
        )[0]

    everything = list(range(len(chosen)))
    base = rays(everything, radii.new_zeros(1))
    # Two radii tell a flat direction; only what moves gets them all.
    middle = len(radii) // 2
    first = sorted({middle, len(radii) - 1})
    screen = radii[first]
    seen = rays(everything, screen)
    live = seen.kl[-1]
    least = LEAST * float(radii[-1]) ** 14
    verdicts = {k: _flatness(chosen[k], seen.kl[k], live, eps, least) for k in everything[:-1]}
    moving = [k for k, verdict in verdicts.items() if verdict is None]
    full = _completed(seen, moving, first, radii, rays) if moving else None
    quadratic = _kfac(factors, matrices)
    found = []
    for k, c in enumerate(chosen):
        row, grid, read, why = k, screen, seen, c.why
        if k in moving and full is not None:
            row, grid, read = moving.index(k), radii, full
            fit = fit_rate(radii, read.fisher[row], kl=read.kl[row])
            order, interval, verdict = _fitted(fit)
            if c.part == "outputs" and order is not None and order < 1.5:
                left = float(base.fisher[k, 0] / base.fisher[-1, 0].clamp_min(1e-300))
                order, interval = None, None
                verdict = (
                    f"unresolved: read as null, but {left:.1g} of a live direction's curvature "
                    "is left"
                )
            if c.part == "nearly dead":
                # Its curvature at the point itself is what makes its order; the ray tells of more.
                if float(base.fisher[k, 0]) > (FLAT * eps) ** 2 * float(base.fisher[-1, 0]):
                    order, interval, verdict = 1.0, None, "resolved"
                why += _further_out(fit)
        elif c.part == "live":
            order, interval, verdict = _live(seen, k)
        else:
            order, verdict = verdicts[k] or (None, "")
            interval = None
        kind = _kind(c, order)
        found.append(
            {
                "label": c.label,
                "class": kind,
                "gauge": c.label if kind == "gauge" else None,
                "part": c.part,
                "kfac": float(quadratic[k]),
                "curvature": float(base.fisher[k, 0]),
                "stderr": float(base.stderr[k, 0]),
                "radii": grid.tolist(),
                "fisher": read.fisher[row].tolist(),
                "fisher_stderr": read.stderr[row].tolist(),
                "kl": read.kl[row].tolist(),
                "order": order,
                "interval": interval,
                "jet": None,
                "predicted": c.predicted,
                "contribution": None if order is None else 1 / (2 * order),
                "verdict": verdict,
                "why": why,
            }
        )
    if jets:
        _add_jets(found, readout, inputs, directions, likelihood, chosen, eps)
    return found


def _completed(
    seen: RayCurvature,
    moving: list[int],
    first: list[int],
    radii: Tensor,
    rays: Callable[[list[int], Tensor], RayCurvature],
) -> RayCurvature:
    """The directions that move at all radii, those seen already not read again."""
    others = [k for k in range(len(radii)) if k not in first]
    if not others:
        return replace(
            seen, fisher=seen.fisher[moving], kl=seen.kl[moving], stderr=seen.stderr[moving]
        )
    rest = rays(moving, radii[others])

    def together(name: str) -> Tensor:
        out = torch.empty(len(moving), len(radii), dtype=torch.float64)
        out[:, first] = getattr(seen, name)[moving]
        out[:, others] = getattr(rest, name)
        return out

    return replace(
        rest, radii=radii, fisher=together("fisher"), kl=together("kl"), stderr=together("stderr")
    )


def _add_jets(
    found: list[dict[str, Any]],
    readout: Readout,
    inputs: Any,
    directions: dict[str, Tensor],
    likelihood: Likelihood,
    chosen: Sequence[Candidate],
    eps: float,
) -> None:
    """Taylor orders at t = 0 where the rays left something open, or found an order above one.

    A null space is read to rounding only, so coefficients are compared with that of the live
    direction: what is as small beside it as a flat direction's divergence counts as zero.
    """
    wanted = [
        k for k, entry in enumerate(found)
        if chosen[k].part == "outputs" and entry["class"] in ("singular", "unresolved")
    ]  # fmt: skip
    if not wanted:
        return
    some = {name: u[wanted] for name, u in directions.items()}
    read = ray_orders(readout, inputs, some, likelihood=likelihood)
    rounding = (FLAT * eps) ** 2 * found[-1]["curvature"]
    for j, (k, order) in enumerate(zip(wanted, read.orders.tolist(), strict=True)):
        entry = found[k]
        if math.isnan(order):
            continue
        seen = (read.energies[:, j] > rounding * chosen[k].spread).nonzero()
        order = float(seen[0]) if len(seen) else math.inf
        entry["jet"] = order
        if entry["order"] is None and math.isinf(order):
            # Flat near the point; further out a kink, or a term beyond the orders looked at.
            entry.update(
                order=math.inf,
                contribution=0.0,
                verdict="flat as t → 0 by its Taylor coefficients; not further out",
            )
            entry["class"] = _kind(chosen[k], math.inf)
        elif entry["order"] is not None and abs(order - entry["order"]) > 0.05:
            entry.update(
                order=None,
                interval=None,
                contribution=None,
                verdict=f"unresolved: the ray reads {entry['order']:.3g}, its Taylor coefficients "
                f"{order:g}",
            )
            entry["class"] = "unresolved"


def _kfac(factors: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
    a, g = (f.to("cpu", torch.float64) for f in factors)
    if a.ndim == 2 and g.ndim == 2:
        return kron_quadratic(a, g, u)
    right = u @ a if a.ndim == 2 else u * a
    left = g @ u if g.ndim == 2 else g[:, None] * u
    return (left * right).sum((1, 2))


def _flatness(
    c: Candidate, kl: Tensor, live: Tensor, eps: float, least: float
) -> tuple[float | None, str] | None:
    """(order, verdict) of a direction that does not move or cannot be judged; None if it moves."""
    if not bool(torch.isfinite(kl).all()):
        return None, "unresolved: the divergence is not finite along the ray"
    if c.part == "nearly dead":
        if float(kl.max()) > 0.0:
            return None
        return None, "unresolved: flat on the samples the rays are read on, not on all"
    ratio = float((kl / live.clamp_min(1e-300)).max())
    floor = (FLAT * eps) ** 2 * c.spread
    if ratio <= min(floor, least):
        return math.inf, "flat"
    reaches = f"the divergence reaches {ratio:.1g} of that along a live direction"
    if c.part == "inputs":
        return None, f"unresolved: it was to be flat, but {reaches}"
    if ratio <= 1e3 * floor:  # also what is below the floor, but could be of a high order
        return None, f"unresolved: {reaches}, close to rounding of the null space"
    return None


def _fitted(fit: RateFit) -> tuple[float | None, list[float] | None, str]:
    if not fit.resolved:
        return None, None, fit.verdict
    low, high = fit.order_interval
    return float(fit.order), [float(low), float(high)], "resolved"


def _further_out(fit: RateFit) -> str:
    """What a ray through a point near a singular one says of that, if anything."""
    if not fit.resolved or not fit.model.startswith("offset") or fit.order < 1.5:
        return ""
    return (
        f"; further out its curvature grows as that of order {fit.order:.3g} does from a point "
        f"{fit.offset:.2g} away"
    )


def _live(rays: RayCurvature, k: int) -> tuple[float | None, list[float] | None, str]:
    """Order of a live direction from t²F/2K at the smallest radius: k², with no fit."""
    order = float(rays.pointwise_order()[k, 0])
    if not math.isfinite(order) or abs(order - 1) > 0.1:
        return None, None, f"unresolved: t²F/2K reads an order of {order:.3g} on a live direction"
    return 1.0, None, "resolved"


def _kind(c: Candidate, order: float | None) -> str:
    if c.part == "live":
        return "live"
    if order is None:
        return "unresolved"
    if math.isinf(order):
        if c.label == "shift of all classes":
            return "gauge"
        return "algebraic" if c.always else "data"
    return "singular" if order > 1.5 else "live"
