"""Small models whose symmetries can be listed by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gated(nn.Module):
    """down(act(gate x) * (up x))."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 6)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    """One block around a stream that starts at the input or at a linear embedding."""

    def __init__(self, embed: bool, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4) if embed else nn.Identity()
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.fc2(F.relu(self.fc1(self.norm(x))))
        return self.head(x)


class Shared(nn.Module):
    """The same square layer twice: its units cannot scale apart from their own input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.middle = nn.Linear(5, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.middle(F.relu(self.middle(x))))
        return self.last(x)


class TiedHead(nn.Module):
    """Token embedding and output matrix are one parameter."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.act = act

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.act(self.mix(self.embedding(ids))))


class TwoReaders(nn.Module):
    """A hidden layer read by a linear map and, for one flag, by a sigmoid as well."""

    def __init__(self, spoil: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.left = nn.Linear(5, 2)
        self.right = nn.Linear(5, 2)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(x))
        out = self.left(h) + self.right(h)
        return out + torch.sigmoid(h).sum(-1, keepdim=True) if self.spoil else out


class Attention(nn.Module):
    """Self-attention of one layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class Rotary(nn.Module):
    """Self-attention with rotary positions: two query heads of width 4, one key head.

    The first ``rotary`` units of a head turn, in halves (Llama) or neighbouring pairs (GPT-J).
    """

    def __init__(self, rotary: int = 4, neighbours: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.q = nn.Linear(6, 8, bias=bias)
        self.k = nn.Linear(6, 4, bias=bias)
        self.v = nn.Linear(6, 4, bias=bias)
        self.o = nn.Linear(8, 3, bias=bias)
        self.rotary, self.neighbours = rotary, neighbours

    def turn(self, x: Tensor) -> Tensor:
        head, rest = x[..., : self.rotary], x[..., self.rotary :]
        half = self.rotary // 2
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.4 ** torch.arange(half)
        if self.neighbours:
            cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
            other = torch.stack([-head[..., 1::2], head[..., ::2]], -1).flatten(-2)
        else:
            cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
            other = torch.cat([-head[..., half:], head[..., :half]], -1)
        return torch.cat([head * cos + other * sin, rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.turn(q) @ self.turn(k).expand_as(q).mT / 2.0
        return self.o((scores.softmax(-1) @ v.expand_as(q)).transpose(1, 2).flatten(2))


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    """4 -> 5 -> 3 -> 3 with biases and dropout."""
    act = act or nn.ReLU()
    return nn.Sequential(
        nn.Linear(4, 5), act, nn.Dropout(0.5), nn.Linear(5, 3), nn.LeakyReLU(), nn.Linear(3, 3)
    )


def with_statistics(*layers: nn.Module) -> nn.Sequential:
    """The layers in a row, batch norms with running statistics as training leaves them."""
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 3.0)
    return nn.Sequential(*layers)


def conv_net() -> nn.Sequential:
    """Padding, batch norm, max and average pooling, depthwise, flatten."""
    return with_statistics(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def deep_linear() -> nn.Sequential:
    """4 -> 3 -> 2 -> 3, one bias in the middle."""
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))


def normed() -> nn.Sequential:
    """LayerNorm and RMSNorm, each read by one linear map."""
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 3),
        nn.GELU(),
        nn.RMSNorm(3),
        nn.Linear(3, 2),
    )


class KeysFirst(nn.Module):
    """Attention whose keys are computed before the queries: their bias writes the shared units."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = (f(x).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.k, self.q, self.v))
        weights = torch.softmax(q @ k.mT / 3**0.5, -1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))
