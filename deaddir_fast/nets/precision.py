"""The precision numbers are computed in: as asked for, whatever the process or the model allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deaddir_fast.nets.graph import call_plainly


@contextmanager
def ieee(device: torch.device) -> Iterator[None]:
    """No TF32 on CUDA inside the block: it carries 1e-3 relative error into fp32 readings."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


class _Narrowed(TorchDispatchMode):
    """Notes when an operation turns wide numbers into narrower ones."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        widest = max(map(_bits, pytree.tree_leaves((args, kwargs))), default=0)
        for x in pytree.tree_leaves(out):
            if 0 < _bits(x) < widest:
                self.found.add(x.dtype)
        return out


def _bits(x: Any) -> int:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return 0
    return torch.finfo(x.dtype).bits


def narrowest(model: nn.Module, inputs: Any, dtype: torch.dtype) -> torch.dtype:
    """The precision a model really computes in: norms that cast to fp32 do so in an fp64 model too.

    Args:
        model: whose parameters are of ``dtype``.
        inputs: a few samples.
        dtype: of its parameters and inputs.
    """
    with torch.no_grad(), _Narrowed() as mode:
        call_plainly(model, inputs)
    return min((dtype, *mode.found), key=lambda d: torch.finfo(d).bits)
