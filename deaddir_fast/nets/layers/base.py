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

#: Where the samples are in a layer's tensors: leading; leading and flattened with the tokens; in
#: the second dimension; one row for all samples; or in no order that is known.
LAYOUTS = ("samples", "flat", "second", "shared", "unknown")


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

    def pieces(self, x: Tensor, n: int) -> Iterator[Tensor]:
        """Inputs a few samples at a time, for layers whose rows take more memory than x does."""
        yield self.rows(x, n)

    @abstractmethod
    def recompute(self, x: Tensor) -> Tensor:
        """W a + b of what the module receives, to check that the module computes just that."""

    @abstractmethod
    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, width) from directions in the parameters; None where it does not move."""

    #: Whether its rows are chosen by the data (experts): their samples are then told by `owners`.
    routed = False

    def tokens(self, shape: tuple[int, ...], n: int) -> int:
        """Rows per sample for inputs of this shape."""
        if self.layout == "shared":
            n = 1
        size = 1
        for extent in shape[:-1]:
            size *= extent
        return size // n

    def keep(self, mask: Tensor, rows: Tensor) -> Tensor | None:
        """Which of the rows (n, t, d) belong to tokens that count; None where that is not known.

        Args:
            mask: (n, t) over the tokens of the model.
            rows: inputs or gradients of this layer.

        Returns:
            A boolean index into the leading dimensions of ``rows``.
        """
        return mask if tuple(rows.shape[:2]) == tuple(mask.shape) else None

    def can_share(self, other: Layer) -> bool:
        """Whether both have the same inputs a where their modules receive the same tensor."""
        return (
            type(self).rows is type(other).rows
            and self.form == other.form == "matrix"
            and self.inputs == other.inputs
            and self.layout == other.layout
        )

    def samples_first(self, x: Tensor, n: int, features: int = 1) -> Tensor:
        """(n, ..., features dims): undo the layout, keeping the last ``features`` dimensions."""
        if self.layout == "second":
            x = x.transpose(0, 1)
        elif self.layout == "shared" and x.shape[0] == 1:
            x = x.expand(n, *x.shape[1:])
        lead, tail = x.shape[: x.ndim - features], x.shape[x.ndim - features :]
        # Extents are counted, as -1 is not defined for widths of zero.
        rows = lead.numel()
        if x.shape[0] != n and rows % n:
            # Rows that were routed or packed: they belong to samples, but which is not known here.
            return x.reshape(1, rows, *tail)
        return x.reshape(n, rows // n, *tail)


class Adapter(ABC):
    """A module whose forward pass can be tapped.

    Attributes:
        layers: the maps in it, in the order in which they are computed.
    """

    layers: tuple[Layer, ...]

    @abstractmethod
    def attach(self, tap: Tap) -> Callable[[], None]:
        """Start calling ``tap`` in the module's forward pass; returns what stops it."""


class HookAdapter(Adapter):
    """A module that is one layer: its first argument goes in, its result comes out."""

    def __init__(self, layer: Layer) -> None:
        self.layers = (layer,)

    def attach(self, tap: Tap) -> Callable[[], None]:
        """A forward hook."""
        (layer,) = self.layers

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], z: Any) -> Any:
            if layer.busy:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            return tap(layer, x, z)

        return layer.module.register_forward_hook(hook, with_kwargs=True).remove


def stack_bias(weight: Tensor | None, bias: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """(p, o, i) and (p, o) to (p, o, i + 1); a part that does not move counts as 0."""
    if weight is None and bias is None:
        return None
    if weight is None:
        assert bias is not None
        weight = bias.new_zeros(len(bias), *shape)
    if bias is None:
        bias = weight.new_zeros(weight.shape[:2])
    return torch.cat([weight, bias.unsqueeze(-1)], -1)
