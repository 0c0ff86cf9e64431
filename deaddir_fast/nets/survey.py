"""A first look at a model: which layers it has, in which order, and how their tensors are laid out.

Two samples go through the model twice, the second time in the other order. What changes places with
them tells where the samples are in each layer's tensors, so that nothing is assumed about batch
dimensions. (Our choice.)
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deaddir_fast import _check
from deaddir_fast.nets import layers as families
from deaddir_fast.nets.graph import (
    batch_size,
    call_plainly,
    check_deterministic,
    slice_batch,
)
from deaddir_fast.nets.layers.base import Adapter, Layer
from deaddir_fast.nets.layers.registry import Skipped
from deaddir_fast.nets.sharded import whole


@dataclass(frozen=True)
class Survey:
    """What a model consists of.

    Attributes:
        adapters: the modules to tap.
        layers: {name: layer} in the order in which they are first computed.
        leaders: {layer: earlier layer} where both receive the very same tensor.
        fed_by: {layer: norm} where a layer receives the very tensor a norm returned.
        tied: {layer: earlier layer} where both use the same weight.
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


@dataclass
class _Seen:
    """Prints of one layer's inputs under each reading of their layout."""

    order: int
    shape: tuple[int, ...]
    prints: dict[str, Tensor | None]
    calls: int = 1


def _print(x: Tensor, n: int) -> Tensor | None:
    """(n, 2) numbers that tell samples apart if they lead in x."""
    if x.ndim == 0 or x.shape[0] % n or x.numel() == 0:
        return None
    rows = x.detach().reshape(n, -1).double()
    angle = torch.arange(rows.shape[1], device=x.device, dtype=torch.float64)
    # Irrational steps, so that no permutation of features has the same print.
    return torch.stack([rows @ torch.cos(angle * 1.6180339887), rows.norm(dim=1)], 1).cpu()


def _prints(x: Tensor, n: int) -> dict[str, Tensor | None]:
    second = x.transpose(0, 1) if x.ndim >= 2 and x.shape[1] == n else None
    return {
        "samples": _print(x, n) if x.ndim and x.shape[0] == n else None,
        "flat": _print(x, n) if x.ndim and x.shape[0] != n else None,
        "second": None if second is None else _print(second, n),
        "shared": _print(x, 1),
    }


def _swapped(first: Tensor | None, other: Tensor | None, eps: float) -> bool:
    if first is None or other is None or first.shape != other.shape:
        return False
    size = float(first.abs().max())
    apart = (first[:1] - first[1:]).abs().max() if len(first) > 1 else 0.0
    return bool((first.flip(0) - other).abs().max() <= 0.02 * float(apart) + 64 * eps * size)


def _layout(first: _Seen, other: _Seen | None, eps: float) -> str:
    if other is None:
        return "samples"
    for layout in ("samples", "flat", "second", "shared"):
        if _swapped(first.prints[layout], other.prints[layout], eps):
            return layout
    return "unknown"


@dataclass
class _Look:
    """The taps of one pass."""

    n: int
    check: bool
    seen: dict[str, _Seen] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    fed_by: dict[str, str] = field(default_factory=dict)
    normed: list[tuple[str, Tensor, int]] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    last: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def __call__(self, layer: Layer, x: Tensor, z: Tensor) -> Tensor:
        if layer.name in self.seen:
            self.seen[layer.name].calls += 1
            self.leaders.pop(layer.name, None)
            self.fed_by.pop(layer.name, None)
            return z
        for name, tensor, version in self.last:
            if tensor is x and x._version == version and layer.form == "matrix":
                self.leaders[layer.name] = name
        if layer.form == "matrix" and layer.name not in self.leaders:
            self.last = [*self.last[-3:], (layer.name, x, x._version)]
        for name, tensor, version in self.normed:
            if tensor is x and x._version == version:
                self.fed_by[layer.name] = name
        if layer.kind == "norm":
            self.normed.append((layer.name, z, z._version))
        self.seen[layer.name] = _Seen(len(self.seen), tuple(x.shape), _prints(x, self.n))
        self.outputs = {layer.name: z}
        if self.check:
            with whole(layer.module):
                again = layer.recompute(x)
            eps = torch.finfo(z.dtype).eps
            if again.shape != z.shape or not bool(
                torch.isclose(
                    again, z, rtol=0, atol=256 * eps * float(z.abs().max()) + 1e-30, equal_nan=True
                ).all()
            ):
                self.wrong[layer.name] = "its output is not the linear map of its input"
        return z


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
    first, head = _look(model, found, few, n, check=True)
    other = None
    if n == 2:
        turned = _flip(few)
        other, _ = _look(model, found, turned, n, check=False)
    everything = {layer.name: layer for a in found.values() for layer in a.layers}
    wrong = first.wrong
    ordered = sorted(
        (name for name in names if name in wanted and name not in wrong),
        key=lambda name: first.seen[name].order if name in first.seen else len(first.seen),
    )
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    tokens: dict[str, int] = {}
    for name in ordered:
        layer, seen = everything[name], first.seen.get(name)
        layer.layout = "samples"
        if seen is not None and not layer.routed:
            layer.layout = _layout(seen, None if other is None else other.seen.get(name), eps)
        tokens[name] = layer.tokens(seen.shape, n) if seen is not None else 0
        if layer.kind == "norm" and layer.layout == "unknown":
            wrong[name] = "which rows of it belong to which sample is not known"
    ordered = [name for name in ordered if name not in wrong]
    for name, why in wrong.items():
        layer = everything[name]
        if name in wanted:
            skipped.append(Skipped(name, type(layer.module).__name__, layer.parameters, why))
    _report(skipped, strict, layers)
    kept = set(ordered)
    by_weight: dict[str, str] = {}
    tied = {}
    for name in ordered:
        first_user = by_weight.setdefault(everything[name].weight, name)
        if first_user != name and everything[first_user].module is not everything[name].module:
            tied[name] = first_user
    return Survey(
        tuple(a for a in found.values() if any(layer.name in kept for layer in a.layers)),
        {name: everything[name] for name in ordered},
        _usable(first.leaders, everything, kept),
        {k: v for k, v in first.fed_by.items() if k in kept},
        tied,
        head if head in kept else None,
        {name: first.seen[name].calls if name in first.seen else 0 for name in ordered},
        tokens,
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


def _flip(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.flip(0) if isinstance(x, Tensor) else x, inputs)


def _look(
    model: nn.Module, found: dict[str, Adapter], inputs: Any, n: int, *, check: bool
) -> tuple[_Look, str | None]:
    look = _Look(n, check)
    undo = [adapter.attach(look) for adapter in found.values()]
    try:
        with torch.no_grad():
            z = call_plainly(model, inputs)
    finally:
        for stop in reversed(undo):
            stop()
    head = next((name for name, out in look.outputs.items() if out is z), None)
    return look, head
