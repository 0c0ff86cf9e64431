"""What the optimizer steps share: hyper-parameters, Adam moments, rounding.

A step works on lists of matrices, one entry per tensor (several tensors, one launch). Index
letters: k tensors, o rows, i columns, b groups or blocks of units.

Hyper-parameters travel as one fp64 tensor on the device of the parameters, so that a captured
graph can change them; see :func:`hyper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.ops._blocks import accumulation

#: Entries of the hyper-parameter tensor, in order.
HYPER = (
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "bias_correction1",
    "bias_correction2",
    "step",
)


def hyper(
    step: float | Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    device: torch.device | None = None,
) -> Tensor:
    """(8,) fp64: the hyper-parameters of one step, in the order of `HYPER`.

    Args:
        step: number of this step, from 1 on; a 0-d tensor stays on its device.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; lr may be a 0-d tensor.
        device: of the parameters; that of ``step`` where None.
    """
    if not isinstance(step, Tensor) and not isinstance(lr, Tensor):
        one, two = 1 - betas[0] ** step, 1 - betas[1] ** step
        return torch.tensor(
            [lr, *betas, eps, weight_decay, one, two, step], dtype=torch.float64, device=device
        )
    if device is None:
        device = step.device if isinstance(step, Tensor) else torch.device("cpu")
    t = torch.as_tensor(step, device=device).to(torch.float64)
    rate = torch.as_tensor(lr, device=device).to(torch.float64)
    rest = [torch.full_like(t, x) for x in (*betas, eps, weight_decay)]
    return torch.stack([rate, *rest, 1 - rest[0] ** t, 1 - rest[1] ** t, t])


@dataclass(frozen=True)
class Scalars:
    """What the steps use of the hyper-parameters: computed in fp64, then rounded once.

    Attributes:
        lr, eps: as given.
        keep: 1 - lr weight_decay.
        rise1, rise2: 1 - beta, the weight of the new gradient; fall2: beta2.
        scale1: 1 / bias_correction1. root2: sqrt(bias_correction2).
    """

    lr: Tensor
    eps: Tensor
    keep: Tensor
    rise1: Tensor
    rise2: Tensor
    fall2: Tensor
    scale1: Tensor
    root2: Tensor


def scalars(values: Tensor, dtype: torch.dtype) -> Scalars:
    """The hyper-parameters as 0-d tensors in the dtype of the arithmetic."""
    h = dict(zip(HYPER, values, strict=True))
    exact = (
        h["lr"],
        h["eps"],
        1 - h["lr"] * h["weight_decay"],
        1 - h["beta1"],
        1 - h["beta2"],
        h["beta2"],
        1 / h["bias_correction1"],
        h["bias_correction2"].sqrt(),
    )
    return Scalars(*torch.stack(exact).to(dtype))


def update_moments(g: Tensor, m: Tensor, v: Tensor, h: Scalars) -> Tensor:
    """Update m and v in place by the gradient g; return Adam's direction m' / (sqrt(v') + eps)."""
    m.copy_(m + h.rise1 * (g - m))
    v.copy_(h.fall2 * v + h.rise2 * g * g)
    return direction(m, v, h)


def direction(m: Tensor, v: Tensor, h: Scalars) -> Tensor:
    """Adam's direction from the moments, bias-corrected."""
    return m * h.scale1 / (v.sqrt() / h.root2 + h.eps)


def _hash(x: Tensor) -> Tensor:
    """A 32-bit mixing function, on int64 tensors that hold 32 bits (Wellons 2018, lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_bits(count: int, seed: int, step: Tensor, k: int) -> Tensor:
    """(count,) int64 in [0, 2^16): bits for the elements of tensor ``k``, by their offsets.

    Counter-based, so that no backend, tiling or thread count changes them: elements 2j and 2j + 1
    take the low and the high half of hash(key xor low32(j) xor hash(high32(j))), and the key is
    hash(hash(hash(seed) xor step) xor k).
    """
    device = step.device
    key = _hash(torch.tensor(seed & 0xFFFFFFFF, device=device))
    key = _hash(key ^ (step.to(torch.int64) & 0xFFFFFFFF))
    key = _hash(key ^ k)
    offset = torch.arange(count, device=device)
    pair = offset >> 1
    high = pair >> 32
    low = pair & 0xFFFFFFFF
    mixed = _hash(key ^ low ^ _hash(high))
    return torch.where(offset % 2 == 0, mixed & 0xFFFF, mixed >> 16)


def store(w: Tensor, value: Tensor, seed: int, step: Tensor, k: int) -> None:
    """Write ``value`` to ``w``; bf16 is rounded stochastically where ``seed`` >= 0.

    Stochastic rounding adds 16 random bits below the mantissa and truncates: its mean is the
    value, so that steps below half a unit in the last place are not lost (Zamirai et al. 2020,
    "Revisiting BFloat16 Training"). NaN and infinity stay. Other dtypes round to nearest.
    """
    if seed < 0 or w.dtype != torch.bfloat16:
        w.copy_(value)
        return
    bits = value.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    noise = random_bits(w.numel(), seed, step, k).reshape(w.shape)
    rounded = (bits + noise) & 0xFFFF0000
    signed = torch.where(rounded >= 2**31, rounded - 2**32, rounded).to(torch.int32)
    w.copy_(torch.where(value.isfinite(), signed.view(torch.float32), value))


def check_matrices(
    argument: str,
    values: Sequence[Tensor],
    like: Sequence[Tensor] | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Check a list of contiguous matrices, of the shapes and the device of another list.

    All have one ``dtype``, that of the first one where it is None.
    """
    if not isinstance(values, (list, tuple)):
        raise _check.fail(argument, values, "a list of tensors", TypeError)
    if like is not None and len(values) != len(like):
        raise ValueError(f"{argument}: expected {len(like)} tensors, got {len(values)}")
    if not values:
        return
    _check.tensor(f"{argument}[0]", values[0], ndim=2)
    device = values[0].device if like is None else like[0].device
    expected = values[0].dtype if dtype is None else dtype
    for k, value in enumerate(values):
        if (  # in one expression: there may be hundreds
            isinstance(value, Tensor)
            and value.dtype == expected
            and value.device == device
            and value.layout == torch.strided
            and value.ndim == 2
            and value.is_contiguous()
            and (like is None or value.shape == like[k].shape)
        ):
            continue
        name = f"{argument}[{k}]"
        _check.tensor(name, value, ndim=2)
        if value.dtype != expected or value.device != device:
            first = "" if like is not None or dtype is not None else ", as the first one"
            raise _check.fail(name, value, f"{expected} on {device}{first}")
        if not value.is_contiguous():
            raise _check.fail(name, value, "a contiguous matrix")
        assert like is not None  # the shape is wrong
        raise _check.fail(name, value, f"shape {tuple(like[k].shape)}")


def check_vectors(
    argument: str,
    values: Sequence[Tensor | None],
    lengths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check a list of contiguous vectors or None, one per matrix."""
    if not isinstance(values, (list, tuple)):
        raise _check.fail(argument, values, "a list of tensors or None", TypeError)
    if len(values) != len(lengths):
        raise ValueError(f"{argument}: expected {len(lengths)} entries, got {len(values)}")
    for k, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if value is None:
            continue
        name = f"{argument}[{k}]"
        _check.tensor(name, value, ndim=1, dtypes=(dtype,))
        _check.size(name, value, 0, length, "one entry per unit of the matrix")
        if not value.is_contiguous() or value.device != device:
            raise _check.fail(name, value, f"a contiguous vector on {device}")


def check_step(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    ms: Sequence[Tensor],
    values: Tensor,
    seed: int,
) -> torch.dtype:
    """Check what every step takes; return the dtype of its arithmetic and its state."""
    check_matrices("ws", ws, None)
    dtype = accumulation(*ws[:1])
    check_matrices("gs", gs, ws, ws[0].dtype if ws else None)
    check_matrices("ms", ms, ws, dtype)
    _check.tensor("hyper", values, ndim=1, dtypes=(torch.float64,))
    _check.size("hyper", values, 0, len(HYPER), "lr, beta1, ... as in HYPER")
    if not values.is_contiguous() or (ws and values.device != ws[0].device):
        device = ws[0].device if ws else values.device
        raise _check.fail("hyper", values, f"a contiguous tensor on {device}")
    _check.integer("seed", seed, -1)
    if torch.is_grad_enabled():
        for k, w in enumerate(ws):
            if w.requires_grad:
                raise RuntimeError(
                    f"ws[{k}]: requires grad, and is written in place; call the step under "
                    "torch.no_grad()"
                )
    return dtype
