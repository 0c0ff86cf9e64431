"""Random numbers by counting: each one is a function of its position, on any device.

A number is found from (seed, draw, sample, token, element) by a chain of the finaliser of
splitmix64 (Steele, Lea & Flood 2014, *Fast splittable pseudorandom number generators*; constants of
Stafford's variant 13): each stage mixes the word of the stage before plus a multiple of the golden
ratio, so that the numbers of one token are a splitmix64 sequence that starts at a place of its own.
Nothing is drawn in order: numbers do not depend on how samples are cut into batches.

Bound: about 12 integer operations a number. (Our choice.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
#: Numbers hashed at once, so that the words in between stay in cache.
_AT_ONCE = 1 << 18


def _signed(word: int) -> int:
    """The same 64 bits as a signed integer, torch's only kind of 64-bit word."""
    word %= _WORD
    return word - _WORD if word >> 63 else word


def _mixed(word: int) -> int:
    word %= _WORD
    word = (word ^ word >> 30) * _FIRST % _WORD
    word = (word ^ word >> 27) * _SECOND % _WORD
    return word ^ word >> 31


def _shift_(x: Tensor, spare: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits, of words without a sign."""
    torch.bitwise_right_shift(x, bits, out=spare)
    spare.bitwise_and_((1 << 64 - bits) - 1)
    return x.bitwise_xor_(spare)


def _mix_(x: Tensor) -> Tensor:
    spare = torch.empty_like(x)
    _shift_(x, spare, 30).mul_(_signed(_FIRST))
    _shift_(x, spare, 27).mul_(_signed(_SECOND))
    return _shift_(x, spare, 31)


def _step(word: Tensor, index: Tensor) -> Tensor:
    """The next stage: words of positions ``index`` below ``word``."""
    return _mix_(word + (index + 1) * _signed(_GOLDEN))


def words(seed: int, draw: int, samples: Tensor, tokens: Tensor, elements: int | None) -> Tensor:
    """64 random bits for every position.

    Args:
        seed, draw: non-negative; of the run, and of the set of labels.
        samples: (n,) index of each sample in the whole data, int64.
        tokens: (n, t) rank of each token in its sample, int64.
        elements: how many numbers a token has; None for one without a dimension of its own.

    Returns:
        (n, t, elements) or (n, t), int64.
    """
    run = _mixed(_mixed(_mixed(_GOLDEN) + (seed + 1) * _GOLDEN) + (draw + 1) * _GOLDEN)
    start = torch.full_like(samples, _signed(run))
    token = _step(_step(start, samples).unsqueeze(1), tokens)
    if elements is None:
        return _step(token, torch.zeros_like(token))
    out = token.new_empty(token.numel(), elements)
    index = torch.arange(elements, device=token.device)
    some = max(1, _AT_ONCE // max(1, elements))
    for rows, heads in zip(out.split(some), token.reshape(-1, 1).split(some), strict=True):
        rows.copy_(_step(heads, index))
    return out.view(*token.shape, elements)


def uniform(word: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), fp64: odd multiples of 2^-53, all of them."""
    # Shifted as a signed word and masked: the highest 52 bits.
    high = (word >> 12).bitwise_and_((1 << 52) - 1)
    return high.to(torch.float64).add_(0.5).mul_(2.0**-52)


def normal(word: Tensor) -> Tensor:
    """Standard normal numbers by inversion, fp64 (devices differ by rounding)."""
    return torch.special.ndtri(uniform(word))
