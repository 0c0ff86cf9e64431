"""Which outputs or inputs of a layer belong to which attention head.

Known for torch's own attention and for the layouts of Hugging Face models: separate projections
(also fewer heads of keys and values than of queries), q | k | v packed one after the other (GPT-2,
Phi-3), and packed head by head (GPT-NeoX, BLOOM, Falcon). Numbers of heads come from attributes of
the module or of its config, and must fit the sizes of the layers: what does not fit is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from deaddir_fast.nets.layers.base import Layer
from deaddir_fast.nets.survey import Survey


@dataclass(frozen=True)
class Heads:
    """The heads in one layer.

    Attributes:
        axis: "outputs" or "inputs": which side of the layer is divided.
        labels: "q0", "k0", "v0" ... for projections, "o0" ... for what follows attention.
        ranges: (start, stop) of each, in the order of the labels.
    """

    axis: str
    labels: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]


#: Names of the projections of queries, keys and values, and of what mixes the heads.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj", "dense")),
    ("query", "key", "value", ("dense",)),
    ("q_lin", "k_lin", "v_lin", ("out_lin",)),
    ("q", "k", "v", ("o",)),
)
#: (name, start of the class's name, whether head by head, names of what mixes the heads).
_PACKED = (
    ("c_attn", "", False, ("c_proj",)),
    ("qkv_proj", "Phi3", False, ("o_proj",)),
    ("query_key_value", "GPTNeoX", True, ("dense",)),
    ("query_key_value", "Bloom", True, ("dense",)),
    ("query_key_value", "Falcon", True, ("dense",)),
)
_COUNT = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KV = ("num_key_value_heads", "num_kv_heads")
_WIDTH = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes of a module, or of its config, that is a positive number."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            found: Any = getattr(holder, name, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found
    return None


def _even(
    letters: str, counts: tuple[int, ...], width: int, axis: str, layer: Layer
) -> Heads | None:
    """Heads of one width, one letter after the other; None if they do not fill the layer."""
    labels = tuple(
        f"{a}{k}" for a, count in zip(letters, counts, strict=True) for k in range(count)
    )
    size = layer.outputs if axis == "outputs" else layer.inputs
    if size != len(labels) * width:
        return None
    return Heads(axis, labels, tuple((k * width, (k + 1) * width) for k in range(len(labels))))


def _by_head(count: int, width: int, layer: Layer) -> Heads | None:
    """q, k and v of the first head, of the second ..."""
    if layer.outputs != 3 * count * width:
        return None
    labels = tuple(f"{a}{k}" for k in range(count) for a in "qkv")
    return Heads("outputs", labels, tuple((k * width, (k + 1) * width) for k in range(3 * count)))


def _after(name: str, names: tuple[str, ...], layers: dict[str, Layer]) -> str | None:
    """The layer that mixes the heads: in the module, or in BERT's output module beside it."""
    parent = name.rpartition(".")[0]
    beside = f"{parent}.output.dense" if parent else "output.dense"
    places = [f"{name}.{last}" if name else last for last in names] + [beside]
    return next((place for place in places if place in layers), None)


def _of_module(
    name: str, module: nn.Module, layers: dict[str, Layer]
) -> Iterator[tuple[str, Heads | None]]:
    """(layer, heads) of one attention module."""

    def inside(child: str) -> str:
        return f"{name}.{child}" if name else child

    count = _number(module, _COUNT)
    if count is None:
        return
    fewer = _number(module, _KV) or count
    if isinstance(module, nn.MultiheadAttention):
        for letter in "qkv":
            if inside(letter) in layers:
                found = _even(letter, (count,), module.head_dim, "outputs", layers[inside(letter)])
                yield inside(letter), found
        if inside("out_proj") in layers:
            last = layers[inside("out_proj")]
            yield last.name, _even("o", (count,), module.head_dim, "inputs", last)
        return
    for *three, after in _SEPARATE:
        projections = [inside(str(child)) for child in three]
        if not all(child in layers for child in projections):
            continue
        width = _number(module, _WIDTH) or layers[projections[0]].outputs // count
        parts = [
            _even(letter, (number,), width, "outputs", layers[child])
            for letter, number, child in zip("qkv", (count, fewer, fewer), projections, strict=True)
        ]
        # One that does not fit (a gate packed with the queries) means another layout for all.
        if None in parts:
            return
        yield from zip(projections, parts, strict=True)
        place = _after(name, tuple(after), layers)
        if place is not None:
            yield place, _even("o", (count,), width, "inputs", layers[place])
        return
    for child, start, by_head, after in _PACKED:
        packed = inside(child)
        if packed not in layers or not type(module).__name__.startswith(start):
            continue
        size = _number(module, _WIDTH)
        if size is None:
            return
        layer = layers[packed]
        heads = (
            _by_head(count, size, layer)
            if by_head
            else _even("qkv", (count, fewer, fewer), size, "outputs", layer)
        )
        if heads is None:
            return
        yield packed, heads
        place = _after(name, after, layers)
        if place is not None:
            yield place, _even("o", (count,), size, "inputs", layers[place])
        return


def heads_of(model: nn.Module, survey: Survey) -> dict[str, Heads]:
    """The attention heads in a model's layers.

    Args:
        model: whose attributes name the numbers of heads.
        survey: its layers.

    Returns:
        {layer: heads}; layers without heads, or with ones in no known order, are absent.
    """
    found: dict[str, Heads] = {}
    for name, module in model.named_modules():
        for layer, heads in _of_module(name, module, survey.layers):
            if heads is not None:
                found[layer] = heads
    return found
