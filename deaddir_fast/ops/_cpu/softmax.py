"""C++ kernels for categorical outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from deaddir_fast.ops._blocks import accumulation
from deaddir_fast.ops._cpu._launch import extension, kernel


def _softmax_fisher(logits: Tensor, tangent: Tensor) -> Tensor:
    out = torch.empty(tangent.shape[:2], dtype=accumulation(logits, tangent))
    extension().softmax_fisher(
        logits.contiguous(), tangent.contiguous(), out, torch.get_num_threads()
    )
    return out


def _softmax_kl(logits: Tensor, logits_t: Tensor) -> Tensor:
    out = torch.empty(logits_t.shape[:2], dtype=accumulation(logits, logits_t))
    extension().softmax_kl(logits.contiguous(), logits_t.contiguous(), out, torch.get_num_threads())
    return out


def _linear_softmax_fisher(
    h: Tensor, dh: Tensor, W: Tensor, bias: Tensor | None, dW: Tensor | None
) -> Tensor:
    out = torch.empty(dh.shape[:2], dtype=accumulation(h, dh, W, bias, dW))
    extension().linear_softmax_fisher(
        h.contiguous(),
        dh.contiguous(),
        W.contiguous(),
        None if bias is None else bias.contiguous(),
        None if dW is None else dW.contiguous(),
        out,
        torch.get_num_threads(),
    )
    return out


softmax_fisher = kernel(_softmax_fisher)
softmax_kl = kernel(_softmax_kl)
linear_softmax_fisher = kernel(_linear_softmax_fisher)
