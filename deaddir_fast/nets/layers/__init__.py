"""Layers as linear maps z = W a of rows: one file per family, one registry.

Index letters: n samples, t tokens (positions, patches, calls), i inputs, o outputs, p directions.
Every layer turns what its module receives into inputs a (n, t, i) and what it sends back into
gradients g (n, t, o), so that its score is Σ_t g aᵀ (with a trailing 1 in a where there is a bias).
"""

from deaddir_fast.nets.layers import (  # noqa: F401 # each registers its family
    attention,
    conv,
    embedding,
    experts,
    functional,
    linear,
    norm,
    recurrent,
)
from deaddir_fast.nets.layers.base import Adapter, Layer
from deaddir_fast.nets.layers.registry import Unsupported, adapters

__all__ = ["Adapter", "Layer", "Unsupported", "adapters"]
