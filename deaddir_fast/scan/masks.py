"""Attention masks of transformers that can be traced.

transformers leaves out a mask of ones, and reads the mask to see whether it is one. A trace, which
curvature along rays needs, cannot read tensors; while one is made the mask is always kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

NAME = "sdpa_traceable"


def traceable_sdpa() -> str:
    """Register fused attention with such masks in transformers; the name to load models with.

    Versions of transformers without a registry of masks get plain "sdpa".
    """
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface
    except ImportError:
        return "sdpa"

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        if get_proxy_mode() is not None:
            kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return sdpa_mask(*args, **kwargs)

    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, mask)
    return NAME
