"""What a layer is: a linear map of rows inside a module, with its parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: tap(layer, x, z) is called with what goes into a layer and what comes out, and returns what
#: takes the place of z.
Tap = Callable[["Layer", Tensor, Tensor], Tensor]

#: verify(adapter, ours, theirs) is shown what an adapter's forward returns and the module's own.
Verify = Callable[["Adapter", Any, Any], None]

#: Where the samples are in a layer's tensors: leading; leading and flattened with the tokens; in
#: the second dimension; one row for all samples; or in no order that is known.
LAYOUTS = ("samples", "flat", "second", "shared", "unknown")


@dataclass(frozen=True)
class Cut:
    """Where a part of a layer's rows sits among its (n, t) rows; ``total`` is t."""

    samples: slice
    positions: slice
    total: int


@dataclass(eq=False)
class Layer(ABC):
    """One linear map z = W a + b of a model, seen row by row.

    Attributes:
        name: of the module, with a suffix where a module holds several maps.
        module: where it is computed.
        weight, bias: names of its parameters as in ``named_parameters``; ``bias`` may be None.
        inputs, outputs: i (without the bias) and o.
        layout: where the samples are in its tensors, one of :data:`LAYOUTS`.
        groups: number of independent maps of this size in it (grouped convolutions).
    """

    name: str
    module: nn.Module
    weight: str
    bias: str | None
    inputs: int
    outputs: int
    layout: str = "samples"
    groups: int = 1
    busy: bool = field(default=False, init=False)  # the module is called by the layer itself
    # Of routed rows in the pass under way: the index (r,) of each one's token among the ``sources``
    # tokens of the model, and the tensor of those while they are routed.
    owners: Tensor | None = field(default=None, init=False, repr=False)
    sources: int = field(default=0, init=False)
    source: Tensor | None = field(default=None, init=False, repr=False)
    #: Why it is not computed as a layer after all, found out while its module ran.
    misused: str | None = field(default=None, init=False)

    kind = "linear"
    #: How E[a aᵀ] is held: "matrix", "diagonal" (one-hot inputs) or "one" (a is the number 1).
    form = "matrix"

    @property
    def width(self) -> int:
        """Dimension of a with its trailing 1."""
        return self.inputs + (self.bias is not None)

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.groups * self.outputs * self.width

    @abstractmethod
    def rows(self, x: Tensor, n: int) -> Tensor:
        """(n, t, i) inputs a, without the trailing 1, from what the module receives."""

    @abstractmethod
    def gradients(self, grad: Tensor, n: int, x: Tensor | None = None) -> Tensor:
        """(n, t, o) gradients g from the gradient of what the module returns."""

    def pieces(self, x: Tensor, n: int) -> Iterator[tuple[Tensor, Cut | None]]:
        """Inputs a few at a time, for layers whose rows take more memory than x does.

        Yields:
            (rows, where they sit); None for all of them or where that is not known.
        """
        yield self.rows(x, n), None

    @abstractmethod
    def recompute(self, x: Tensor) -> Tensor:
        """W a + b of what the module receives, to check that the module computes just that."""

    @abstractmethod
    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, width) from directions in the parameters; None where it does not move."""

    #: Whether its rows are chosen by the data (experts).
    routed = False

    def samples_of(self, n: int) -> Tensor | None:
        """(r,) the sample of each routed row; None where the samples do not lead in the tokens."""
        if self.owners is None or self.layout == "unknown" or self.sources % n:
            return None
        return self.owners // (self.sources // n)

    def tokens(self, shape: tuple[int, ...], n: int) -> int:
        """Rows per sample for inputs of this shape."""
        if self.layout == "shared":
            n = 1
        size = 1
        for extent in shape[:-1]:
            size *= extent
        return size // n

    def keep(self, mask: Tensor, rows: Tensor, cut: Cut | None = None) -> Tensor | None:
        """Which of the rows (n, t, ...) belong to tokens that count; None where not known.

        Args:
            mask: (n, t) over the tokens of the model.
            rows: inputs or gradients of this layer.
            cut: where these rows sit, if they are a part.

        Returns:
            A boolean index into the leading dimensions of ``rows``.
        """
        if self.layout == "unknown":
            return None  # as many rows as tokens need not be in their order
        if self.routed:
            if self.owners is None or mask.numel() != self.sources:
                return None
            return mask.reshape(1, -1)[:, self.owners]
        if cut is not None:
            if mask.shape[1] != cut.total:
                return None
            mask = mask[cut.samples, cut.positions]
        return mask if tuple(rows.shape[:2]) == tuple(mask.shape) else None

    def average(self, x: Tensor, n: int, mask: Tensor | None) -> tuple[Tensor, bool]:
        """Mean of each sample's inputs a: ((n, i) or (n, groups, i), whether the mask counted)."""
        rows = self.rows(x, n)
        keep = None if mask is None else self.keep(mask, rows)
        if keep is None:
            return rows.mean(1), mask is None or rows.shape[1] == 1
        weight = keep.to(rows.dtype)
        total = torch.einsum("nt...,nt->n...", rows, weight)
        count = weight.sum(1).clamp_min(1)
        return total / count.reshape(-1, *(1,) * (total.ndim - 1)), True

    def can_share(self, other: Layer) -> bool:
        """Whether both have the same inputs a where their modules receive the same tensor."""
        return (
            type(self).rows is type(other).rows
            and self.form == other.form == "matrix"
            and self.inputs == other.inputs
            and self.layout == other.layout
        )

    def samples_first(self, x: Tensor, n: int, features: int = 1) -> Tensor:
        """(n, t, features dims): undo the layout, keeping the last ``features`` dimensions.

        Rows of unknown layout (routed, packed, in another order) come as one sample, (1, t, ...).
        """
        tail = x.shape[x.ndim - features :]
        if self.layout == "shared":
            return x.reshape(1, -1, *tail).expand(n, -1, *tail)
        if self.layout == "second":
            x = x.transpose(0, 1)
        count = x.shape[: x.ndim - features].numel()
        if self.routed or self.layout == "unknown" or count % n:
            return x.reshape(1, count, *tail)
        return x.reshape(n, count // n, *tail)

    def per_sample(self, grad: Tensor, n: int, features: int = 1) -> Tensor:
        """(n, t, features dims) from a gradient, which leads with samples where z was shared."""
        if self.layout != "shared":
            return self.samples_first(grad, n, features)
        tail = grad.shape[grad.ndim - features :]
        return grad.reshape(n, grad.shape[: grad.ndim - features].numel() // n, *tail)

    def spread(self, z: Tensor, n: int) -> tuple[Tensor, int]:
        """One output for all samples, repeated for each: (repeated, dimension of the samples)."""
        if z.ndim > 2 and z.shape[0] != 1 and z.shape[1] == 1:
            return z.expand(z.shape[0], n, *z.shape[2:]), 1
        z = z if z.ndim > 2 and z.shape[0] == 1 else z.unsqueeze(0)
        return z.expand(n, *z.shape[1:]), 0


class Adapter(ABC):
    """A module whose forward pass can be tapped.

    Attributes:
        layers: the maps in it, in the order in which they are computed.
    """

    layers: tuple[Layer, ...]

    @abstractmethod
    def attach(self, tap: Tap, verify: Verify | None = None) -> Callable[[], None]:
        """Start calling ``tap`` in the module's forward pass; returns what stops it.

        ``verify`` is called where the forward pass is not the module's own.
        """


class HookAdapter(Adapter):
    """A module that is one layer: its first argument goes in, its result comes out."""

    def __init__(self, layer: Layer) -> None:
        self.layers = (layer,)

    def attach(self, tap: Tap, verify: Verify | None = None) -> Callable[[], None]:
        """A forward hook."""
        (layer,) = self.layers

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], z: Any) -> Any:
            if layer.busy:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            return tap(layer, x, z)

        return layer.module.register_forward_hook(hook, with_kwargs=True).remove


class ForwardAdapter(Adapter):
    """A module that computes several maps without calling a module for each.

    Its forward is replaced by :meth:`run` while it is tapped.
    """

    def __init__(self, module: nn.Module, layers: tuple[Layer, ...]) -> None:
        self.module, self.layers = module, layers

    @abstractmethod
    def run(self, tap: Tap, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with its maps tapped."""

    def attach(self, tap: Tap, verify: Verify | None = None) -> Callable[[], None]:
        """Replace the forward of this instance."""
        attributes = vars(self.module)
        theirs = self.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            ours = self.run(tap, *args, **kwargs)
            if verify is not None:
                verify(self, ours, theirs(*args, **kwargs))
            return ours

        had, before = "forward" in attributes, attributes.get("forward")
        attributes["forward"] = forward

        def undo() -> None:
            if had:
                attributes["forward"] = before
            else:
                del attributes["forward"]

        return undo


def slow_path() -> Callable[[], None]:
    """Turn off torch's fused Transformer layers, which call no submodule; returns the undo."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


def stack_bias(weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """(p, ..., o, i) and (p, ..., o) to (p, ..., o, i + 1); what does not move counts as 0."""
    if weight is None and bias is None:
        return None
    if weight is None:
        assert bias is not None
        weight = bias.new_zeros(len(bias), *shape)
    if bias is None:
        bias = weight.new_zeros(weight.shape[:-1])
    return torch.cat([weight, bias.unsqueeze(-1)], -1)
