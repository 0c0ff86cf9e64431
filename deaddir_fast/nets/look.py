"""Passes over two samples that tell where the samples are in each layer's tensors.

The two go through the model, then in the other order, then the second one twice. What changes with
them is where samples are, so that nothing is assumed about batch dimensions. Layers that compute
one row for all samples (position embeddings) are then asked for one row for each. (Our choice.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deaddir_fast.nets.graph import call_plainly
from deaddir_fast.nets.layers.base import Adapter, Layer, slow_path
from deaddir_fast.nets.layers.linear import Linear
from deaddir_fast.nets.sharded import whole
from deaddir_fast.nets.uses import Uses, uses_outside

Prints = dict[str, Tensor | None]

#: Length of the pieces that samples are projected in.
_FOLDED = 2048
#: Rows on which a linear map is computed again.
_CHECKED = 64


@dataclass
class Seen:
    """One layer in one pass: its place, its first input's shape, and prints of all inputs."""

    order: int
    shape: tuple[int, ...]
    prints: list[Prints]

    @property
    def calls(self) -> int:
        """How often it was used."""
        return len(self.prints)


@lru_cache(maxsize=32)
def _angles(count: int, step: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Irrational steps, so that no permutation of features has the same print.
    angle = torch.arange(count, device=device, dtype=torch.float64) * step
    return torch.cos(angle).to(dtype)


def _print(x: Tensor, n: int) -> Tensor | None:
    """(n, 2) numbers that tell samples apart if they lead in x."""
    if x.ndim == 0 or x.shape[0] % n or x.numel() == 0:
        return None
    rows = x.detach().reshape(n, -1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows = torch.nan_to_num(rows, 0.0, 0.0, 0.0)  # padding may hold anything
    # Weights cos(α i) cos(β j) over folded rows: two short tables instead of one as long as x.
    size = rows.shape[1]
    width = min(size, _FOLDED)
    whole = size // width * width
    inner = _angles(width, 1.6180339887, rows.dtype, rows.device)
    outer = _angles(whole // width, 1.4142135624, rows.dtype, rows.device)
    projected = (rows[:, :whole].reshape(n, -1, width) @ inner) @ outer
    projected = projected + rows[:, whole:] @ inner[: size - whole]
    return torch.stack([projected, rows.norm(dim=1)], 1).double().cpu()


def _prints(x: Tensor, n: int) -> Prints:
    second = x.transpose(0, 1) if x.ndim >= 2 and x.shape[1] == n else None
    return {
        "samples": _print(x, n) if x.ndim and x.shape[0] == n else None,
        "flat": _print(x, n) if x.ndim and x.shape[0] != n else None,
        "second": None if second is None else _print(second, n),
        "shared": _print(x, 1),
    }


def _near(one: Tensor, other: Tensor, first: Tensor, eps: float) -> bool:
    apart = float((first[:1] - first[1:]).abs().max()) if len(first) > 1 else 0.0
    limit = 0.02 * apart + 64 * eps * float(first.abs().max())
    return bool((one - other).abs().max() <= limit)


def _layout(first: Prints, turned: Prints, twice: Prints, eps: float) -> str:
    """Which reading of the layout fits samples (0, 1), then (1, 0), then (1, 1)."""
    for layout in ("samples", "flat", "second", "shared"):
        p, q, r = (prints[layout] for prints in (first, turned, twice))
        if p is None or q is None or r is None or not p.shape == q.shape == r.shape:
            continue
        # A row routed here from one sample is the same however the two are ordered; it is not what
        # all samples share, which stays the same when one of them goes.
        if _near(p.flip(0), q, p, eps) and _near(p[-1:].expand_as(p), r, p, eps):
            return layout
    return "unknown"


def _layouts(passes: list[Look], eps: float) -> dict[str, str]:
    """Layout of every layer used; "mixed" where one use is shared by all samples and one is not."""
    first, *others = passes
    found = {}
    for name, seen in first.seen.items():
        same = [look.seen[name].prints for look in others if name in look.seen]
        if len(same) != 2 or any(len(prints) != seen.calls for prints in same):
            found[name] = "unknown"
            continue
        uses = {_layout(p, q, r, eps) for p, q, r in zip(seen.prints, *same, strict=True)}
        found[name] = uses.pop() if len(uses) == 1 else "mixed" if "shared" in uses else "unknown"
    return found


@dataclass
class Look:
    """The taps of one pass.

    Attributes:
        n: number of samples.
        check: whether outputs are compared with what each layer should compute.
        spread: {layer that has one row for all samples: shape of its input}.
        seen: the layers used.
        leaders: {layer: earlier layer that received the same tensor}.
        fed_by: {layer: norm whose output it received}.
        wrong: {layer: why it is none}.
        uses: of parameters outside their layers.
        output: of the model.
        head: the layer whose output that is.
    """

    n: int
    check: bool
    spread: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    fed_by: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    uses: Uses | None = None
    output: Tensor | None = None
    head: str | None = None
    _latest: tuple[str, Tensor] | None = None
    _recent: list[tuple[str, Tensor, int]] = field(default_factory=list)
    _normed: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def __call__(self, layer: Layer, x: Tensor, z: Tensor) -> Tensor:
        if self.check:
            self._compare(layer, x, z)
        # Which rows go to an expert is no layout; that of the tokens they come from is one.
        prints = _prints(x if layer.source is None else layer.source, self.n)
        if layer.name in self.seen:
            self.seen[layer.name].prints.append(prints)
            self.fed_by.pop(layer.name, None)
        else:
            self.seen[layer.name] = Seen(len(self.seen), tuple(x.shape), [prints])
            self._find_leader(layer, x)
            for name, tensor, version in self._normed:
                if tensor is x and x._version == version:
                    self.fed_by[layer.name] = name
        # An input that has become larger has been given to each sample before.
        if self.spread.get(layer.name) == tuple(x.shape):
            z, _ = layer.spread(z, self.n)
        self._latest = layer.name, z
        if layer.kind == "norm":
            self._normed.append((layer.name, z, z._version))
        return z

    def _find_leader(self, layer: Layer, x: Tensor) -> None:
        if layer.form != "matrix":
            return
        for name, tensor, version in self._recent:
            if tensor is x and x._version == version:
                self.leaders[layer.name] = name
                return
        self._recent = [*self._recent[-3:], (layer.name, x, x._version)]

    def _compare(self, layer: Layer, x: Tensor, z: Tensor) -> None:
        if _plain(layer.module):
            return
        x, z = _some_rows(layer, x, z)
        if self.uses is not None:
            self.uses.quiet = True  # not the model's own doing
        try:
            with whole(layer.module):
                again = layer.recompute(x)
        except (RuntimeError, ValueError, TypeError) as error:
            self.wrong[layer.name] = f"it is not the map of its input that it should be ({error})"
            return
        finally:
            if self.uses is not None:
                self.uses.quiet = False
        if not alike(again, z):
            self.wrong[layer.name] = "its output is not the linear map of its input"

    def verify(self, adapter: Adapter, ours: Any, theirs: Any) -> None:
        """Refuse the maps of a module whose forward is not what it is taken for."""
        pairs = zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True)
        if all(alike(a, b) for a, b in pairs if isinstance(b, Tensor)):
            return
        for layer in adapter.layers:
            self.wrong[layer.name] = "its forward does not compute what such a module should"

    def run(self, model: nn.Module, adapters: Mapping[str, Adapter], inputs: Any) -> Look:
        """Tap the adapters in one forward pass."""
        undo: list[Callable[[], None]] = [slow_path()]
        try:
            for adapter in adapters.values():
                undo.append(adapter.attach(self, self.verify if self.check else None))
            with torch.no_grad():
                if self.check:
                    with uses_outside(model, adapters.values()) as self.uses:
                        self.output = call_plainly(model, inputs)
                else:
                    self.output = call_plainly(model, inputs)
        finally:
            for stop in reversed(undo):
                stop()
        if self._latest is not None and self._latest[1] is self.output:
            self.head = self._latest[0]
        self._latest, self._recent, self._normed = None, [], []
        return self


def _plain(module: nn.Module) -> bool:
    """Whether a module is torch's own linear map, with no hook but this one: nothing to check."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and len(module._forward_hooks) == 1
        and not module._forward_pre_hooks
    )


def _some_rows(layer: Layer, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A few rows of what a layer gets and returns, where it takes them one by one."""
    by_rows = type(layer).recompute is Linear.recompute
    if not by_rows or x.ndim < 2 or z.shape != (*x.shape[:-1], layer.outputs):
        return x, z
    x, z = x.flatten(0, -2), z.flatten(0, -2)
    step = -(-len(x) // _CHECKED) | 1
    return (x[::step], z[::step]) if len(x) > _CHECKED else (x, z)


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal to rounding, but never so much of it in 16-bit formats that anything would pass."""
    if one.shape != other.shape:
        return False
    if not other.is_floating_point():
        return torch.equal(one, other)
    finite = other[other.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    relative = min(256 * torch.finfo(other.dtype).eps, 0.05)
    close = torch.isclose(one, other, rtol=0, atol=relative * size + 1e-30, equal_nan=True)
    return bool(close.all())


def _pick(inputs: Any, order: list[int]) -> Any:
    return pytree.tree_map(lambda x: x[order] if isinstance(x, Tensor) else x, inputs)


def look_at(
    model: nn.Module, adapters: Mapping[str, Adapter], inputs: Any, n: int, eps: float
) -> tuple[Look, dict[str, str]]:
    """The first look, and the layout of each layer used in it.

    Args:
        model: in evaluation mode.
        adapters: of its modules.
        inputs: of one sample or two.
        n: how many.
        eps: rounding unit of the model.

    Returns:
        (what was seen, {layer: layout}); with one sample every layout is "samples". ``wrong``
        holds the layers with one row for all samples where the model does not take one for each.
    """
    first = Look(n, check=True).run(model, adapters, inputs)
    if n == 1:
        return first, dict.fromkeys(first.seen, "samples")
    orders = [_pick(inputs, order) for order in ([1, 0], [1, 1])]
    others = [Look(n, check=False).run(model, adapters, some) for some in orders]
    layouts = _layouts([first, *others], eps)
    shared = {name: first.seen[name].shape for name, how in layouts.items() if how == "shared"}
    if not shared:
        return first, layouts

    def works(some: Mapping[str, tuple[int, ...]]) -> Look | None:
        try:
            look = Look(n, check=False, spread=some).run(model, adapters, inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return None
        assert first.output is not None and look.output is not None
        return look if alike(look.output, first.output) else None

    again = works(shared)
    if again is None:
        for name, shape in list(shared.items()):
            if works({name: shape}) is None:
                del shared[name]
                first.wrong[name] = (
                    "it has one row for all samples, and the model does not take one for each"
                )
        again = works(shared)
        if again is None:
            for name in shared:
                first.wrong[name] = "it has one row for all samples, which cannot be told apart"
            return first, layouts
    # What comes after those layers now has rows of its own for each sample.
    others = [Look(n, check=False, spread=shared).run(model, adapters, some) for some in orders]
    after = _layouts([again, *others], eps)
    for name in layouts:
        roots = name in shared and again.seen[name].shape == shared[name]
        layouts[name] = "shared" if roots else after.get(name, "unknown")
    first.seen, first.leaders, first.fed_by = again.seen, again.leaders, again.fed_by
    return first, layouts
