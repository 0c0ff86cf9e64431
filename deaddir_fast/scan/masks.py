"""Attention masks of transformers that can be traced.

transformers leaves out a mask of ones, and reads the mask to see whether it is one. A trace, which
curvature along rays needs, cannot read tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def keep_masks_in_traces() -> None:
    """Have transformers keep every mask of fused attention while a trace is made.

    Outside traces nothing changes. Done once in a process, through the registry of masks that
    transformers has for this; versions before 5 build some masks without it, and padded batches
    cannot be traced there.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        return
    original = AttentionMaskInterface()["sdpa"]
    if getattr(original, "__module__", None) == __name__:
        return

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        if get_proxy_mode() is not None:
            kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return original(*args, **kwargs)

    AttentionMaskInterface.register("sdpa", mask)
