"""From what the caller passes to the points that a rate fit may use, with what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from deaddir_fast import _check
from deaddir_fast.theory.rate_evidence import Array, Integers, Mask
from deaddir_fast.theory.rate_models import MIN_POINTS, Points

# Radii on the two sides that agree to this relative size are one pair.
SAME_RADIUS = 1e-6
# Rounding amplitude of a summed score in units of the machine's epsilon of a live one.
ROUNDING_UNITS = 32.0


@dataclass
class Curve:
    """One curve ready to fit: ``points``, log KL beside them, and where they came from.

    ``sources``: for each point the indices of the given radii that made it. ``left_out``: how many
    radii were not used, by reason. ``zeros``: radii with exactly zero curvature.
    """

    points: Points
    log_kl: Array
    sources: list[tuple[int, ...]]
    left_out: dict[str, int] = field(default_factory=dict)
    zeros: int = 0
    floor: float = 0.0


def array(argument: str, value: Any) -> Array:
    """Real numbers as float64, from torch, NumPy or nested sequences."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise _check.fail(argument, value, "real numbers", TypeError)
        return value.detach().to("cpu", torch.float64).numpy()
    try:
        out = np.asarray(value)
        if out.dtype.kind not in "fiu":
            raise TypeError
        return out.astype(np.float64)
    except (TypeError, ValueError):
        raise _check.fail(argument, value, "an array of real numbers", TypeError) from None


def epsilon(value: Any) -> float:
    """Machine epsilon of the values' dtype (float64 for integers and sequences)."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return float(torch.finfo(value.dtype).eps)
    dtype = getattr(value, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind == "f":
        return max(float(np.finfo(dtype).eps), 2.0**-52)
    return 2.0**-52


def check_radii(radii: Any) -> Array:
    """Finite, without repetition, one-dimensional; 0 and negative radii (the side -t) allowed."""
    t = array("radii", radii)
    if t.ndim != 1 or t.size == 0:
        raise _check.fail("radii", radii, "a non-empty one-dimensional array")
    if not np.isfinite(t).all():
        raise _check.fail("radii", radii, "finite radii")
    order = np.sort(t)
    if (order[1:] == order[:-1]).any():
        twice = order[1:][order[1:] == order[:-1]][0]
        raise _check.fail("radii", radii, f"radii without repetition ({twice} occurs twice)")
    return t


def same_shape(argument: str, value: Any, like: Array) -> Array:
    """An array of the shape of the values."""
    out = array(argument, value)
    if out.shape != like.shape:
        raise _check.fail(argument, value, f"the shape of values, {like.shape}")
    return out


def prepare(
    t: Array, values: Array, stderr: Array | None, kl: Array | None, eps: float, floor: float
) -> Curve:
    """Drop what cannot be used, cut below exact zeros, and fold +t with -t."""
    left: dict[str, int] = {}

    usable: Mask = np.ones(t.size, bool)

    def drop(mask: Mask, reason: str) -> None:
        new = usable & mask
        if new.any():
            left[reason] = int(new.sum())
            usable[new] = False

    drop(t == 0, "radius zero")
    drop(~np.isfinite(values), "not finite")
    zeros = usable & (values == 0)
    drop(values < 0, "negative")
    drop(values == 0, "exactly zero")
    if floor > 0:
        drop(values <= floor, "at or below the rounding floor")
    if zeros.any():
        # Zero at one radius and not below it: rounding, not a curve, up to that radius.
        drop(np.abs(t) < np.abs(t[zeros]).max(), "below a radius of exact zeros")
    if stderr is not None:
        # Comparisons with NaN are false, so a NaN error drops its point.
        drop(~(stderr < 0.5 * np.abs(values)), "standard error above half the value")
    index = np.flatnonzero(usable)
    plus, minus = index[t[index] > 0], index[t[index] < 0]
    pairs = [
        (int(i), int(j)) for i in plus for j in minus if abs(t[i] + t[j]) <= SAME_RADIUS * abs(t[i])
    ]
    even = len(pairs) >= MIN_POINTS
    sources: list[tuple[int, ...]]
    if even:
        sources = list(pairs)
        if len(index) > 2 * len(pairs):
            left["no partner at the opposite radius"] = len(index) - 2 * len(pairs)
    else:
        side, other = (plus, minus) if len(plus) >= len(minus) else (minus, plus)
        sources = [(int(i),) for i in side]
        if len(other):
            left["on the side with fewer radii"] = len(other)
    sources.sort(key=lambda s: abs(t[s[0]]))
    where: Integers = np.array(sources, dtype=np.intp).reshape(len(sources), 2 if even else 1)
    radius = np.abs(t[where]).mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log(values[where]).mean(axis=1)
        w = np.ones(radius.size)
        if stderr is not None and radius.size:
            relative = np.sqrt(((stderr[where] / values[where]) ** 2).mean(axis=1))
            middle = float(np.median(relative))
            if middle > 0:
                w = 1.0 / np.clip(relative / middle, 0.1, 10.0)
        log_kl = np.full(radius.size, np.nan)
        if kl is not None:
            log_kl = np.log(np.where(kl[where] > 0, kl[where], np.nan)).mean(axis=1)
    rounding = max(0.3 * eps, 2.0**-51 * max(4.0, float(np.abs(y).max()) if y.size else 0.0))
    points = Points(radius, y, w, even, rounding)
    return Curve(points, log_kl, sources, left, int(zeros.sum()), floor)
