"""Triton kernels for categorical outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._dispatch import Kernel
from deaddir_fast.ops._triton._launch import problem


def _softmax_fisher(logits: Tensor, tangent: Tensor) -> Tensor:
    from deaddir_fast.kernels import softmax_fisher as kernel

    out = tangent.new_empty(tangent.shape[:2], dtype=accumulation(logits, tangent))
    kernel.softmax_fisher(logits, tangent, out)
    return out


def _softmax_kl(logits: Tensor, logits_t: Tensor) -> Tensor:
    from deaddir_fast.kernels import softmax_kl as kernel

    out = logits_t.new_empty(logits_t.shape[:2], dtype=accumulation(logits, logits_t))
    kernel.softmax_kl(logits, logits_t, out)
    return out


def _linear_softmax_fisher(
    h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None
) -> Tensor:
    from deaddir_fast.kernels import linear_softmax_fisher as kernel

    out = dh.new_empty(dh.shape[:2], dtype=accumulation(h, dh, W, bias, dW))
    kernel.linear_softmax_fisher(h, dh, W, bias, dW, out)
    return out


def _rows_worthwhile(logits: Tensor, stacked: Tensor) -> bool:
    if not logits.is_cuda:  # the interpreter is for tests
        return False
    from deaddir_fast.kernels import softmax_fisher as kernel

    return kernel.worthwhile(logits, stacked)


def _linear_worthwhile(h: Tensor, *rest: Any) -> bool:
    if not h.is_cuda:
        return False
    from deaddir_fast.kernels import linear_softmax_fisher as kernel

    return kernel.worthwhile(h, *rest)


def _linear_problem(h: Tensor, *rest: Any) -> str | None:
    if h.shape[1] >= 2**24:
        return "rows of 2^24 features or more need offsets that the Triton kernel does not form"
    return problem(h, *rest)


softmax_fisher = Kernel("triton", _softmax_fisher, problem, _rows_worthwhile)
softmax_kl = Kernel("triton", _softmax_kl, problem, _rows_worthwhile)
linear_softmax_fisher = Kernel(
    "triton", _linear_softmax_fisher, _linear_problem, _linear_worthwhile
)
