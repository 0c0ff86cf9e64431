"""What the networks are trained on: handwritten digits and a poem, split once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

POEM = Path(__file__).resolve().parents[1] / "data" / "paradise-lost.txt"
#: Of the digits; the others are held out. Of the poem the last tenth is.
TRAIN_IMAGES = 1400
HELD_OUT = 0.1


@dataclass(frozen=True, eq=False)
class Images:
    """Handwritten digits.

    Attributes:
        x, y: (n, 64) grey levels 0 to 1, and (n,) labels, to train on.
        held_x, held_y: the same, held out.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training images, (size, 64) and (size,)."""
        pick = torch.randint(len(self.x), (size,), generator=generator)
        return self.x[pick], self.y[pick]

    def fixed(self, held: bool, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` images of a part."""
        x, y = (self.held_x, self.held_y) if held else (self.x, self.y)
        return x[:count], y[:count]


@dataclass(frozen=True, eq=False)
class Text:
    """A text as character numbers.

    Attributes:
        alphabet: the characters, in order of their numbers.
        train, held: (n,) numbers.
        context: characters that a sample has.
    """

    alphabet: str
    train: Tensor
    held: Tensor
    context: int

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows and the characters that follow, (size, context) each."""
        last = len(self.train) - self.context
        return self._windows(self.train, torch.randint(last, (size,), generator=generator))

    def fixed(self, held: bool, count: int) -> tuple[Tensor, Tensor]:
        """``count`` windows spread evenly over a part."""
        part = self.held if held else self.train
        return self._windows(part, torch.linspace(0, len(part) - self.context - 1, count).long())

    def _windows(self, part: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        at = starts[:, None] + torch.arange(self.context)
        return part[at], part[at + 1]


def digits() -> Images:
    """scikit-learn's handwritten digits, shuffled once.

    Raises:
        ImportError: without scikit-learn.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(pixels, dtype=torch.float32)[order] / 16.0
    y = torch.as_tensor(labels)[order]
    n = TRAIN_IMAGES
    return Images(x[:n], y[:n], x[n:], y[n:])


def poem(context: int) -> Text:
    """The poem; the held-out tenth is its end."""
    text = POEM.read_text(encoding="ascii")
    alphabet = "".join(sorted(set(text)))
    numbers = torch.tensor([alphabet.index(c) for c in text])
    cut = round(len(text) * (1 - HELD_OUT))
    return Text(alphabet, numbers[:cut], numbers[cut:], context)
