"""The networks that are trained: two for digits, two for text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(inner: int = 128) -> nn.Sequential:
    """64 - inner - inner - 10 with ReLU and biases."""
    return nn.Sequential(
        nn.Linear(64, inner),
        nn.ReLU(),
        nn.Linear(inner, inner),
        nn.ReLU(),
        nn.Linear(inner, 10),
    )


def conv(channels: int = 16) -> nn.Sequential:
    """Two convolutions with ReLU and pooling on 8 x 8 images, then a linear map."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * channels, 10),
    )


class Attention(nn.Module):
    """Causal attention with q, k, v apart, and no rotary embedding."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.o = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) -> (n, t, width)."""
        n, t, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(n, t, self.heads, width // self.heads).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            split(self.q(x)), split(self.k(x)), split(self.v(x)), is_causal=True
        )
        return self.o(y.transpose(1, 2).reshape(n, t, width))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) -> (n, t, width)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm x), then x + feed(norm x)."""

    def __init__(self, attention: nn.Module, feed: nn.Module, norms: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attention, self.feed = attention, feed

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) -> (n, t, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Decoder(nn.Module):
    """A pre-norm character model with learned positions and a head of its own.

    Args:
        kind: "llama" (RMSNorm, SwiGLU, no biases) or "gpt2" (LayerNorm, GELU, biases).
        alphabet: number of characters.
        context: most characters in a sample.
        width, layers, heads: its shape.
    """

    def __init__(
        self, kind: str, alphabet: int, context: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        llama = kind == "llama"
        self.tokens = nn.Embedding(alphabet, width)
        self.positions = nn.Embedding(context, width)

        def norm() -> nn.Module:
            return nn.RMSNorm(width, eps=1e-6) if llama else nn.LayerNorm(width)

        def feed() -> nn.Module:
            if llama:
                return SwiGLU(width, 8 * width // 3)
            return nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )

        self.blocks = nn.ModuleList(
            Block(Attention(width, heads, bias=not llama), feed(), (norm(), norm()))
            for _ in range(layers)
        )
        self.norm = norm()
        self.head = nn.Linear(width, alphabet, bias=False)
        self._start(layers)

    def _start(self, layers: int) -> None:
        """Normal weights that keep the size of what they read, less where a branch ends.

        GPT-2's 0.02 suits its width: a narrow network starts too small with it, and learns little
        in a few hundred steps.
        """
        for name, p in self.named_parameters():
            if p.ndim < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(p)
            elif name.startswith(("tokens", "positions")):
                nn.init.normal_(p, std=0.3)
            else:
                ends = name.endswith(("attention.o.weight", "feed.down.weight", "feed.2.weight"))
                nn.init.normal_(p, std=(p.shape[1] * (2 * layers if ends else 1)) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """(n, t) character numbers -> (n, t, alphabet) logits."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
