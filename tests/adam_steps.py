"""Optimizer steps written out in fp64, and random problems for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from compare import to_numpy
from torch import Tensor

from deaddir_fast.ops._adam import hyper

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS: dict[str, Any] = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(3, 5), (0, 4), (7, 0), (1, 1), (33, 1), (1, 47), (17, 70), (5, 600), (0, 0), (64, 33)]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Lists:
    """The arguments of a step: one entry per matrix in each list."""

    ws: list[Tensor]
    gs: list[Tensor]
    ms: list[Tensor]
    vs: list[Tensor]
    rows: list[Tensor | None]
    cols: list[Tensor | None]

    def copy(self) -> Lists:
        return replace(self, **{name: _copied(value) for name, value in vars(self).items()})

    def args(self) -> tuple[Any, ...]:
        return self.ws, self.gs, self.ms, self.vs, self.rows, self.cols


def _copied(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.clone() for x in values]


def draw(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    rows: bool = True,
    cols: bool = True,
    seed: int = 0,
) -> Lists:
    """Random matrices and moments, with scales about 1."""
    generator = torch.Generator().manual_seed(seed)
    state = state_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def scale(n: int) -> Tensor:
        return (0.5 * normal(n)).exp().to(state)

    return Lists(
        [normal(*s).to(dtype) for s in shapes],
        [normal(*s).to(dtype) for s in shapes],
        [0.3 * normal(*s).to(state) for s in shapes],
        [normal(*s).square().to(state) for s in shapes],
        [scale(o) if rows else None for o, _ in shapes],
        [scale(i) if cols else None for _, i in shapes],
    )


def moved(
    x: Lists,
    k: int,
    step: int = 3,
    *,
    maximize: bool = False,
    mean: Callable[[Any], Any] = lambda squares: squares,
    spread: Callable[[Any], Any] = lambda v: v,
    arithmetic: Callable[[Tensor], Any] = to_numpy,
    settings: dict[str, Any] = SETTINGS,
) -> tuple[Any, Any, Any]:
    """New (w, m, v) of matrix ``k``, in fp64 of numpy, or in the ``arithmetic`` of torch."""
    lr, (one, two) = settings["lr"], settings["betas"]
    w, g, m, v = (arithmetic(values[k]) for values in (x.ws, x.gs, x.ms, x.vs))
    s = arithmetic(torch.ones(x.ws[k].shape))
    if x.rows[k] is not None:
        s = s * arithmetic(x.rows[k])[:, None]
    if x.cols[k] is not None:
        s = s * arithmetic(x.cols[k])
    scaled = (-1 if maximize else 1) * g * s
    m = one * m + (1 - one) * scaled
    v = two * v + (1 - two) * mean(scaled * scaled)
    direction = (m / (1 - one**step)) / ((spread(v) / (1 - two**step)) ** 0.5 + settings["eps"])
    return (1 - lr * settings["weight_decay"]) * w - lr * s * direction, m, v


def assert_close(result: Tensor, truth: np.ndarray, same_dtype: Tensor) -> None:
    """The error is at most twice that of torch in the same dtype, plus roundings of the arithmetic.

    Four of the largest value, or of 1: elements are sums of terms about 1.
    """
    assert result.shape == truth.shape
    assert result.dtype == same_dtype.dtype
    error = np.abs(to_numpy(result) - truth).max(initial=0.0)
    allowed = 2 * np.abs(to_numpy(same_dtype) - truth).max(initial=0.0)
    eps = torch.finfo(state_dtype(result.dtype)).eps
    assert error <= allowed + 4 * eps * np.abs(truth).max(initial=1.0)


def values(step: int = 3, **changes: Any) -> Tensor:
    return hyper(step, **(SETTINGS | changes))


def random_bits(seed: int, step: int, tensor: int, offset: int) -> int:
    """The 16 bits of one element, in plain integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = mix(mix(mix(seed % 2**32) ^ step % 2**32) ^ tensor)
    pair = offset // 2
    mixed = mix(key ^ pair % 2**32 ^ mix(pair >> 32))
    return mixed >> 16 if offset % 2 else mixed & 0xFFFF
