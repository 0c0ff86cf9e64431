"""A first look at a model: its layers, their order, and how their tensors are laid out."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deaddir_fast import _check
from deaddir_fast.nets import layers as families
from deaddir_fast.nets.graph import batch_size, check_deterministic, slice_batch
from deaddir_fast.nets.layers.base import Adapter, Layer
from deaddir_fast.nets.layers.registry import Skipped
from deaddir_fast.nets.look import Seen, look_at


@dataclass(frozen=True)
class Survey:
    """What a model consists of.

    Attributes:
        adapters: the modules to tap.
        layers: {name: layer} in the order in which they are first computed.
        leaders: {layer: earlier layer} where both receive the very same tensor.
        fed_by: {layer: norm} where a layer receives the very tensor a norm returned.
        tied: {layer: earlier layer} where both use the same weight, of all layers there are.
        head: name of the layer whose output is the model's output, or None.
        calls: how often each layer was used for one pass.
        tokens: rows per sample in each layer, 0 where unknown.
        skipped: modules with parameters that no layer stands for.
        samples: number of samples it was made on; 1 leaves layouts unchecked.
    """

    adapters: tuple[Adapter, ...]
    layers: dict[str, Layer]
    leaders: dict[str, str]
    fed_by: dict[str, str]
    tied: dict[str, str]
    head: str | None
    calls: dict[str, int]
    tokens: dict[str, int]
    skipped: tuple[Skipped, ...]
    samples: int

    def sharers(self, name: str) -> list[str]:
        """The other layers that use a layer's weight."""
        first = self.tied.get(name, name)
        group = [first, *(k for k, by in self.tied.items() if by == first)]
        return [k for k in group if k != name]

    def without_sharing(self, modules: Container[nn.Module]) -> Survey:
        """The same, except that layers of these modules have inputs of their own."""
        leaders = {
            name: leader
            for name, leader in self.leaders.items()
            if self.layers[name].module not in modules and self.layers[leader].module not in modules
        }
        return replace(self, leaders=leaders)


def _chosen(names: Sequence[str], layers: Sequence[str] | None) -> set[str]:
    if layers is None:
        return set(names)
    if isinstance(layers, str):
        raise _check.fail("layers", layers, "a sequence of names or patterns", TypeError)
    found: set[str] = set()
    for pattern in layers:
        hits = [n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern)]
        # A module's name stands for all maps in it.
        hits += [n for n in names if n.startswith(f"{pattern}.")] if not hits else []
        if not hits:
            known = ", ".join(list(names)[:8])
            raise ValueError(f"layers: no layer matches {pattern!r} (there are {known}, …)")
        found.update(hits)
    return found


def survey(
    model: nn.Module, inputs: Any, *, layers: Sequence[str] | None = None, strict: bool = False
) -> Survey:
    """Look at a model on the first two samples of a batch.

    Args:
        model: in evaluation mode.
        inputs: a tensor, a tuple (positional) or a dict (keyword arguments), samples leading.
        layers: names or patterns (``"*.mlp.*"``) of the layers wanted; all by default.
        strict: raise for parameters no layer stands for, instead of warning.

    Raises:
        TypeError, ValueError: not a module, a random model, an unknown layer, or with ``strict`` a
            parameter that no rule covers.
    """
    if not isinstance(model, nn.Module):
        raise _check.fail("model", model, "a torch.nn.Module", TypeError)
    check_deterministic(model)
    found, skipped = families.adapters(model)
    names = [layer.name for adapter in found.values() for layer in adapter.layers]
    wanted = _chosen(names, layers)
    n = min(2, batch_size(inputs))
    if n == 0:
        raise _check.fail("inputs", inputs, "at least one sample")
    few = slice_batch(inputs, 0, n)
    precisions = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    eps = max(precisions, default=0.0)
    first, layouts = look_at(model, found, few, n, eps)
    seen = first.seen
    everything = {layer.name: layer for a in found.values() for layer in a.layers}
    wrong = first.wrong
    for name, layer in everything.items():
        for parameter in (layer.weight, layer.bias):
            if first.uses is not None and parameter in first.uses.found:
                use = first.uses.found[parameter]
                wrong.setdefault(name, f"its {parameter} is also used outside of it, by {use}")
    ordered = sorted(
        (name for name in names if name in wanted and name not in wrong),
        key=lambda name: seen[name].order if name in seen else len(seen),
    )
    for name in ordered:
        # Of a module that these samples do not use nothing is known.
        everything[name].layout = layouts.get(name, "unknown")
    _same_for_all_experts([everything[name] for name in ordered], seen)
    for name in ordered:
        why = _why_not(everything[name], name in seen)
        if why is not None:
            wrong[name] = why
    ordered = [name for name in ordered if name not in wrong]
    for name, why in wrong.items():
        layer = everything[name]
        if name in wanted:
            skipped.append(Skipped(name, type(layer.module).__name__, layer.parameters, why))
    _report(skipped, strict, layers)
    kept = set(ordered)
    alone = {f: by for f, by in first.leaders.items() if seen[f].calls == seen[by].calls == 1}
    by_weight: dict[str, str] = {}
    tied = {}
    # Also with layers that are not wanted: they move when the weight does.
    for name in sorted(names, key=lambda name: seen[name].order if name in seen else len(seen)):
        first_user = by_weight.setdefault(everything[name].weight, name)
        if first_user != name and everything[first_user].module is not everything[name].module:
            tied[name] = first_user
    return Survey(
        tuple(a for a in found.values() if any(layer.name in kept for layer in a.layers)),
        {name: everything[name] for name in ordered},
        _usable(alone, everything, kept),
        {k: v for k, v in first.fed_by.items() if k in kept},
        tied,
        first.head if first.head in kept else None,
        {name: seen[name].calls if name in seen else 0 for name in ordered},
        {
            name: everything[name].tokens(seen[name].shape, n) if name in seen else 0
            for name in ordered
        },
        tuple(skipped),
        n,
    )


def _usable(leaders: dict[str, str], layers: dict[str, Layer], kept: set[str]) -> dict[str, str]:
    """Sharing among the layers that are kept; the widest (with a bias) of each group leads."""
    groups: dict[str, list[str]] = {}
    for name, leader in leaders.items():
        groups.setdefault(leader, [leader]).append(name)
    usable: dict[str, str] = {}
    for members in groups.values():
        here = [m for m in members if m in kept]
        same = [m for m in here if layers[m].can_share(layers[here[0]])]
        for name in same[1:]:
            usable[name] = same[0]
    return usable


def _report(skipped: Sequence[Skipped], strict: bool, layers: Sequence[str] | None) -> None:
    if not skipped or layers is not None:
        return
    listed = "; ".join(f"{s.name} ({s.type}): {s.why}" for s in skipped[:6])
    more = f"; and {len(skipped) - 6} more" if len(skipped) > 6 else ""
    message = f"no layer stands for the parameters of {listed}{more}"
    if strict:
        raise ValueError(f"model: {message}")
    warnings.warn(message, UserWarning, stacklevel=4)


def _why_not(layer: Layer, used: bool) -> str | None:
    """Why a layer is left out, if it is."""
    if layer.misused is not None:
        return layer.misused
    if layer.layout == "mixed":
        return "some of its uses have one row for all samples and others do not"
    if layer.kind == "norm" and not used:
        return "it is not used by the first two samples"
    if layer.kind == "norm" and layer.layout == "unknown":
        return "which rows of it belong to which sample is not known"
    return None


def _same_for_all_experts(layers: Sequence[Layer], seen: Mapping[str, Seen]) -> None:
    """Experts of one module get rows of one tensor, whether or not any came on these samples."""
    known = {
        layer.module: layer.layout
        for layer in layers
        if layer.routed and layer.name in seen and layer.layout in ("samples", "flat")
    }
    for layer in layers:
        if layer.routed:
            layer.layout = known.get(layer.module, "unknown")
