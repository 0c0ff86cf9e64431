"""Optimizer steps in numpy, one rounding at a time: what the kernels have to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from interpreter_fidelity import f32_to_bf16
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
LR, BETAS, EPS, DECAY, STEP = 1e-2, (0.9, 0.98), 1e-8, 0.1, 7


def state(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def hyper(device: str = "cpu") -> Tensor:
    one, two = (1 - b**STEP for b in BETAS)
    return torch.tensor([LR, *BETAS, EPS, DECAY, one, two, STEP], dtype=F64, device=device)


def mix(x: Any) -> Any:
    """Wellons' lowbias32, of an integer or of uint64."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def noise(offsets: np.ndarray, seed: int, step: int, k: int) -> np.ndarray:
    """The 16 random bits of elements of tensor k."""
    key = mix(mix(mix(seed & 0xFFFFFFFF) ^ step) ^ k)
    pair = offsets.astype(np.uint64) // 2
    bits = mix(key ^ pair & 0xFFFFFFFF ^ mix(pair >> 32))
    return np.where(offsets % 2 == 1, bits >> 16, bits & 0xFFFF)


def stochastic(value: np.ndarray, seed: int, k: int) -> np.ndarray:
    """fp32 to fp32 with 8 significant bits, by adding random bits below them and cutting."""
    flat = np.ascontiguousarray(value, dtype=np.float32).reshape(-1)
    bits = flat.view(np.uint32).astype(np.uint64)
    added = noise(np.arange(flat.size), seed, STEP, k)
    cut = ((bits + added) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(flat), cut, flat).reshape(value.shape)


@dataclass
class Problem:
    """Arguments of a step on a list of matrices; groups are None for the unshared step."""

    ws: list[Tensor]
    gs: list[Tensor]
    ms: list[Tensor]
    vs: list[Tensor]
    rows: list[Tensor | None]
    cols: list[Tensor | None]
    row_groups: list[Tensor | None] | None = None
    col_groups: list[Tensor | None] | None = None

    def args(self) -> list[list[Tensor | None]]:
        every = [self.ws, self.gs, self.ms, self.vs, self.rows, self.cols]
        return every if self.row_groups is None else [*every, self.row_groups, self.col_groups]

    def copy(self, device: str = "cpu") -> Problem:
        def one(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, copy=True)

        return Problem(*([one(t) for t in some] for some in self.args()))

    def written(self) -> list[Tensor]:
        return [*self.ws, *self.ms, *self.vs]


def draw(shapes, dtype, *, rows=True, cols=True, groups=None) -> Problem:
    """Random arguments; ``groups`` are pairs of maps, one for each shape."""
    wide = state(dtype)

    def vector(n):
        return torch.rand(n, dtype=wide) + 0.5

    ws, gs = ([torch.randn(s).to(dtype) for s in shapes] for _ in range(2))
    ms = [torch.randn(s, dtype=wide) for s in shapes]
    sizes = shapes
    if groups is not None:
        sizes = [
            tuple(n if g is None else int(g.max()) + 1 for n, g in zip(s, pair, strict=True))
            for s, pair in zip(shapes, groups, strict=True)
        ]
    vs = [torch.rand(s, dtype=wide) for s in sizes]
    scales = (
        [vector(s[0]) if rows else None for s in shapes],
        [vector(s[1]) if cols else None for s in shapes],
    )
    maps = () if groups is None else ([p[0] for p in groups], [p[1] for p in groups])
    return Problem(ws, gs, ms, vs, *scales, *maps)


def take(problem: Problem, maximize: bool, seed: int) -> Problem:
    """The step in IEEE arithmetic of the state's dtype; sums over groups are in fp64."""
    done = problem.copy()
    for k, (w, g, m, v) in enumerate(zip(done.ws, done.gs, done.ms, done.vs, strict=True)):
        real = np.float64 if m.dtype == F64 else np.float32
        one, two = (1 - b**STEP for b in BETAS)
        lr, eps, keep = real(LR), real(EPS), real(1 - LR * DECAY)
        rise1, rise2, fall2 = real(1 - BETAS[0]), real(1 - BETAS[1]), real(BETAS[1])
        scale1, root2 = real(1 / one), real(np.sqrt(two))
        scale = np.ones(w.shape, real)
        if done.rows[k] is not None:
            scale = scale * done.rows[k].numpy()[:, None]
        if done.cols[k] is not None:
            scale = scale * done.cols[k].numpy()
        x = g.to(m.dtype).numpy() * scale
        x = -x if maximize else x
        moment = m.numpy() + rise1 * (x - m.numpy())
        if done.row_groups is None:
            second = fall2 * v.numpy() + rise2 * x * x
            spread = second
        else:
            index = np.ix_(
                *(
                    np.arange(n) if group is None else group.numpy()
                    for n, group in zip(w.shape, (done.row_groups[k], done.col_groups[k]),
                                        strict=True)
                )
            )  # fmt: skip
            total, count = np.zeros(v.shape), np.zeros(v.shape)
            np.add.at(total, index, x.astype(np.float64) ** 2)
            np.add.at(count, index, 1.0)
            with np.errstate(invalid="ignore"):
                second = fall2 * v.numpy() + rise2 * (total / count).astype(real)
            spread = second[index]
        u = moment * scale1 / (np.sqrt(spread) / root2 + eps)
        new = keep * w.to(m.dtype).numpy() - lr * scale * u
        if w.dtype == BF16:
            bits = f32_to_bf16(stochastic(new, seed, k) if seed >= 0 else new)
            w.copy_(torch.from_numpy(bits.view(np.int16)).view(BF16))
        else:
            w.copy_(torch.from_numpy(new))
        m.copy_(torch.from_numpy(moment))
        v.copy_(torch.from_numpy(second))
    return done
