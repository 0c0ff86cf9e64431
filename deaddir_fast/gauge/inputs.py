"""Inputs made up from a model's first layer, for checking symmetries without data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 4
_TOKENS = 5
_SIZES = (8, 12, 16, 24, 28, 32, 48, 64, *range(1, 65), 96, 128, 224, 256)
_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}

_SHAPING = (
    *_CONVOLUTIONS,
    nn.Linear,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.LayerNorm,
    nn.RMSNorm,
)


def _candidates(layer: Any, weight: Tensor, draw: torch.Generator) -> Iterator[Tensor]:
    def normal(*shape: int) -> Tensor:
        x = torch.randn(_SAMPLES, *shape, generator=draw, dtype=torch.float64)
        return x.to(weight.device, weight.dtype)

    if isinstance(layer, nn.Linear):
        yield normal(layer.in_features)
        yield normal(_TOKENS, layer.in_features)
    elif isinstance(layer, nn.Embedding):
        for shape in ((_SAMPLES, _TOKENS), (_SAMPLES,)):
            yield torch.randint(layer.num_embeddings, shape, generator=draw).to(weight.device)
    elif isinstance(layer, nn.MultiheadAttention):
        yield normal(_TOKENS, layer.embed_dim)
    elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        yield normal(*layer.normalized_shape)
        yield normal(_TOKENS, *layer.normalized_shape)
    else:
        for kind, dims in _CONVOLUTIONS.items():
            if issubclass(type(layer), kind):
                for size in _SIZES:
                    yield normal(layer.in_channels, *[size] * dims)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    for name, layer in model.named_modules():
        weight = next(iter(layer.parameters(recurse=False)), None)
        if weight is not None and isinstance(layer, _SHAPING):
            yield name, layer, weight


def made_up(model: nn.Module) -> Tensor:
    """A small random batch that the model accepts, shaped by its first layer.

    The first module (in registration order) that is a linear, convolution, embedding, attention
    or normalisation layer decides; its parameters give dtype and device. Spatial sizes and a
    token dimension are found by trying.

    Raises:
        ValueError: there is no such layer, or the model accepts none of the shapes tried.
    """
    draw = torch.Generator().manual_seed(0)
    failure = "no linear, convolution, embedding, attention or normalisation layer in it"
    for name, layer, weight in _layers(model):
        for x in _candidates(layer, weight, draw):
            try:
                with torch.no_grad():
                    model(x)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                failure = f"inputs shaped by {name or 'it'} fail, the last with: {error}"
                continue
            return x
        break
    raise ValueError(f"inputs: cannot make inputs up for this model ({failure}); pass a batch")
