"""Convolutions: a is a window of the input, one for each output position.

Windows overlap, so that unfolding them all takes up to prod(kernel) times the memory of the input;
``pieces`` unfolds a bounded number of bytes at a time, also where one sample is too large. With
groups each group has windows of its own, (n, t, groups, i).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deaddir_fast.nets.layers.base import Adapter, Cut, HookAdapter, Layer, stack_bias
from deaddir_fast.nets.layers.linear import names_of
from deaddir_fast.nets.layers.registry import Unsupported, register

#: Bytes of windows unfolded at once.
WINDOW_BYTES = 1 << 26

_PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Conv(Layer):
    """z = W a + b on windows a; ``inputs`` and ``outputs`` are those of one group."""

    kind = "conv"

    @property
    def spatial(self) -> int:
        """1, 2 or 3."""
        module: Any = self.module
        return len(module.kernel_size)

    def padded(self, x: Tensor) -> Tensor:
        """(N, c, *extents) as the kernel slides over it."""
        module: Any = self.module
        if x.ndim == self.spatial + 1:
            x = x.unsqueeze(0)
        sides = module._reversed_padding_repeated_twice
        if not any(sides):
            return x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, sides, mode=mode)

    def windows(self, x: Tensor) -> Tensor:
        """(N, *positions, c, *kernel): a view of the padded input."""
        module: Any = self.module
        x = self.padded(x)
        for k in range(self.spatial):
            step, gap = module.stride[k], module.dilation[k]
            x = x.unfold(2 + k, gap * (module.kernel_size[k] - 1) + 1, step)[..., ::gap]
        return x.movedim(1, 1 + self.spatial)

    def _unfold(self, view: Tensor) -> Tensor:
        """(N, *positions, c, *kernel) to (N, t, i), or (N, t, groups, i)."""
        count = view.shape[: 1 + self.spatial].numel() // max(1, len(view))
        lead = (self.groups,) if self.groups > 1 else ()
        return view.reshape(len(view), count, *lead, self.inputs)

    def rows(self, x: Tensor, n: int) -> Tensor:
        """(n, t, i); (n, t, groups, i) with groups. All at once: see ``pieces``."""
        return self.samples_first(self._unfold(self.windows(x)), n, self._tail)

    @property
    def _tail(self) -> int:
        return 2 if self.groups > 1 else 1

    def gradients(self, grad: Tensor, n: int, x: Tensor | None = None) -> Tensor:
        """(n, t, o); (n, t, groups, o) with groups."""
        g = grad.movedim(-1 - self.spatial, -1)
        if self.groups > 1:
            g = g.unflatten(-1, (self.groups, self.outputs))
        if grad.ndim == self.spatial + 1:
            g = g.unsqueeze(0)
        return self.per_sample(g, n, self._tail)

    def pieces(self, x: Tensor, n: int) -> Iterator[tuple[Tensor, Cut | None]]:
        """Windows of some samples, or of some positions of one sample, in order."""
        if self.layout == "shared":
            yield self.rows(x, n), None
            return
        view = self.windows(x)
        total = view.shape[1 : 1 + self.spatial].numel()
        # Positions stand for tokens only where there is one dimension of them.
        aligned = self.layout == "samples" and self.spatial == 1 and len(view) == n
        each = self.groups * self.inputs * view.element_size()
        for part, samples, positions in _cut(view, self.spatial, max(1, WINDOW_BYTES // each)):
            yield self._unfold(part), Cut(samples, positions, total) if aligned else None

    def average(self, x: Tensor, n: int, mask: Tensor | None) -> tuple[Tensor, bool]:
        """Mean of each sample's windows, a few at a time."""
        if mask is not None and self.spatial == 1:
            return super().average(x, n, mask)
        view = self.windows(x)
        each = self.groups * self.inputs * view.element_size()
        positions = view.shape[1 : 1 + self.spatial].numel()
        tail = (self.groups, self.inputs) if self.groups > 1 else (self.inputs,)
        total = view.new_zeros(len(view), *tail)
        for part, samples, _ in _cut(view, self.spatial, max(1, WINDOW_BYTES // each)):
            total[samples] += self._unfold(part).sum(1)
        mean = self.samples_first(total / positions, n, self._tail).mean(1)
        return mean, mask is None

    def keep(self, mask: Tensor, rows: Tensor, cut: Cut | None = None) -> Tensor | None:
        """Only convolutions over the tokens themselves have positions that are tokens."""
        return super().keep(mask, rows, cut) if self.spatial == 1 else None

    def tokens(self, shape: tuple[int, ...], n: int) -> int:
        """Number of windows."""
        module: Any = self.module
        count = 1 if len(shape) == self.spatial + 1 else shape[0]
        sides = module._reversed_padding_repeated_twice
        for k in range(self.spatial):
            left, right = sides[2 * (self.spatial - 1 - k) :][:2]
            reach = module.dilation[k] * (module.kernel_size[k] - 1)
            extent = shape[k - self.spatial] + left + right
            count *= (extent - reach - 1) // module.stride[k] + 1
        return count // (1 if self.layout == "shared" else n)

    def recompute(self, x: Tensor) -> Tensor:
        """The convolution of the padded input."""
        module: Any = self.module
        z = _PLAIN[self.spatial](
            self.padded(x), module.weight, module.bias, module.stride, 0, module.dilation,
            self.groups,
        )  # fmt: skip
        return z.squeeze(0) if x.ndim == self.spatial + 1 else z

    def directions(self, u: Mapping[str, Tensor]) -> Tensor | None:
        """(p, o, width); (p, groups, o, width) with groups."""
        weight = u.get(self.weight)
        lead = (self.groups,) if self.groups > 1 else ()
        if weight is not None:
            weight = weight.reshape(len(weight), *lead, self.outputs, self.inputs)
        if self.bias is None:
            return weight
        bias = u.get(self.bias)
        if bias is not None:
            bias = bias.reshape(len(bias), *lead, self.outputs)
        return stack_bias(weight, bias, (*lead, self.outputs, self.inputs))

    def can_share(self, other: Layer) -> bool:
        """Only with a convolution that has the same windows."""
        names = ("kernel_size", "stride", "dilation", "padding", "padding_mode")
        same = all(getattr(self.module, k) == getattr(other.module, k, None) for k in names)
        return same and self.groups == other.groups and super().can_share(other)


class Pointwise(Conv):
    """A kernel of extent 1 and stride 1: the windows are the input itself."""

    def windows(self, x: Tensor) -> Tensor:
        """A view of the input."""
        x = self.padded(x).movedim(1, -1)
        return x.reshape(*x.shape, *(1,) * self.spatial)


def _cut(view: Tensor, spatial: int, most: int) -> Iterator[tuple[Tensor, slice, slice]]:
    """Parts of (N, *positions, ...) of at most ``most`` windows (but at least one), in order.

    Yields:
        (part, its samples, its positions in row-major order).
    """
    total = view.shape[1 : 1 + spatial].numel()
    if total <= most:
        step = most // max(1, total)
        for start in range(0, len(view), step):
            stop = min(start + step, len(view))
            yield view[start:stop], slice(start, stop), slice(0, total)
        return
    for sample in range(len(view)):
        for part, first, count in _stretches(view[sample : sample + 1], spatial, 1, most, 0):
            yield part, slice(sample, sample + 1), slice(first, first + count)


def _stretches(
    view: Tensor, spatial: int, dim: int, most: int, first: int
) -> Iterator[tuple[Tensor, int, int]]:
    """Consecutive positions of one sample: (part, first position, how many)."""
    inner = view.shape[dim + 1 : 1 + spatial].numel()
    step = max(1, most // inner)
    for start in range(0, view.shape[dim], step):
        part = view.narrow(dim, start, min(step, view.shape[dim] - start))
        at = first + start * inner
        if inner > most:
            yield from _stretches(part, spatial, dim + 1, most, at)
        else:
            yield part, at, part.shape[dim] * inner


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Adapter of an nn.Conv1d, nn.Conv2d or nn.Conv3d."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    weight, bias = names_of(own)
    groups = module.groups
    plain = not any(module._reversed_padding_repeated_twice)
    points = all(k == 1 for k in (*module.kernel_size, *module.stride))
    kind = Pointwise if points and plain else Conv
    inputs = module.in_channels // groups * torch.Size(module.kernel_size).numel()
    return HookAdapter(
        kind(name, module, weight, bias, inputs, module.out_channels // groups, groups=groups)
    )


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed(name: str, module: nn.Module, own: Mapping[str, str]) -> Adapter:
    """Transposed convolutions are left out.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        "the outputs of a transposed convolution are sums over windows, not a map of rows"
    )
