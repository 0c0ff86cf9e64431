"""Output gradients whose squares make up the Fisher of the outputs.

For an output z with Fisher H(z), seeds v_1, v_2, … satisfy Σ v vᵀ = H, exactly or on average; a
backward pass of each gives the gradients of which K-FAC's G consists.

- exact (type 2): the columns of a square root of H, one pass for each. A softmax over c classes
  has c − 1: the sequential binomials of a multinomial, v_j = √(p_j s_{j+1} / s_j) (e_j −
  Σ_{k>j} (p_k / s_{j+1}) e_k) with tail sums s_j = Σ_{k≥j} p_k of positive terms, the likeliest
  class last.
- mc: scores of labels drawn from the model. Each sample has random numbers of its own, so that
  the result depends on neither the batch size nor the padding.
- empirical: scores of the data's labels; not the Fisher matrix (its rates differ).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.nets import counter
from deaddir_fast.nets.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, Poisson

#: Numbers of a block of outputs: small enough for the tables of it to stay in cache.
_AT_ONCE = 1 << 18
_GOLDEN = 0x9E3779B97F4A7C15


def exact_count(z: Tensor, likelihood: Likelihood) -> int:
    """Number of backward passes for outputs (n, ..., c)."""
    positions = z.shape[1:-1].numel()
    return positions * (z.shape[-1] - (1 if isinstance(likelihood, Categorical) else 0))


def exact(z: Tensor, likelihood: Likelihood, mask: Tensor | None = None) -> Iterator[Tensor]:
    """Columns of a square root of H, one position at a time; each of the shape of z."""
    n, c = z.shape[0], z.shape[-1]
    flat = z.detach().reshape(n, z.shape[1:-1].numel(), c)
    live = None if mask is None else mask.to(z.device).reshape(n, flat.shape[1])
    for s in range(flat.shape[1]):
        if live is not None and not bool(live[:, s].any()):
            continue
        for column in _columns(flat[:, s], likelihood):
            seed = torch.zeros_like(flat)
            seed[:, s] = column if live is None else column.masked_fill(~live[:, s, None], 0)
            yield seed.view_as(z)


def _columns(z: Tensor, likelihood: Likelihood) -> Iterator[Tensor]:
    wide = z.double() if z.dtype == torch.float64 else z.float()
    c = z.shape[1]
    if isinstance(likelihood, Categorical):
        p = torch.softmax(wide, -1)
        # The likeliest class last, so that no tail is small: products of two rare classes would
        # otherwise be differences of much larger numbers.
        swap = torch.arange(c, device=z.device).expand_as(p).clone()
        top = p.argmax(-1, keepdim=True)
        swap[:, -1:] = top
        swap.scatter_(1, top, c - 1)
        p = p.gather(1, swap)
        tail = p.flip(-1).cumsum(-1).flip(-1)
        # Quotients of tails, not their products, which underflow long before the entries do.
        size = (p[:, :-1] * (tail[:, 1:] / tail[:, :-1])).sqrt()
        for j in range(c - 1):
            column = torch.zeros_like(p)
            column[:, j] = size[:, j]
            column[:, j + 1 :] = p[:, j + 1 :] / tail[:, j + 1, None] * -size[:, j, None]
            yield column.gather(1, swap).to(z.dtype)
        return
    zero = torch.zeros_like(wide)
    transpose: Any = torch.func.vjp(lambda d: likelihood.whiten(wide, d), zero)[1]
    for j in range(c):
        unit = torch.zeros_like(wide)
        unit[:, j] = 1
        yield transpose(unit)[0].to(z.dtype)


def noise(
    z: Tensor, likelihood: Likelihood, first: int, draw: int, seed: int, mask: Tensor | None
) -> Tensor:
    """Random numbers for one draw of labels; those of a sample depend on its index only.

    The likelihoods of this package take them from :mod:`deaddir_fast.nets.counter`. Another one
    draws its own, with a generator for each sample.

    Args:
        z: (n, ..., c) outputs.
        likelihood: whose labels they determine.
        first: index of the first sample in the whole data set.
        draw, seed: which draw, and the seed of the run.
        mask: (n, ...) which positions count; numbers are given to those in order.
    """
    n, c = z.shape[0], z.shape[-1]
    kind = _kind(likelihood)
    if kind is None:
        return _drawn(z, likelihood, first, draw, seed, mask)
    live = torch.ones(z.shape[:-1], dtype=torch.int64, device=z.device) if mask is None else mask
    ranks = live.to(z.device).reshape(n, z.shape[1:-1].numel()).cumsum(1) - 1
    samples = torch.arange(first, first + n, device=z.device)
    word = counter.words(seed, draw, samples, ranks, None if kind is Categorical else c)
    if kind is Gaussian:
        return counter.normal(word).to(z.dtype).view(z.shape)
    return counter.uniform(word).view(z.shape[:-1] if kind is Categorical else z.shape)


def _kind(likelihood: Likelihood) -> type[Likelihood] | None:
    """Which of the package's likelihoods has the noise of this one."""
    own = type(likelihood).noise
    kinds: tuple[type[Likelihood], ...] = (Categorical, Gaussian, Bernoulli, Poisson)
    return next((kind for kind in kinds if own is kind.noise), None)


def _drawn(
    z: Tensor, likelihood: Likelihood, first: int, draw: int, seed: int, mask: Tensor | None
) -> Tensor:
    """Noise of a likelihood that draws its own, one generator a sample."""
    c = z.shape[-1]
    positions = z.shape[1:-1].numel()
    rows = []
    for k in range(z.shape[0]):
        generator = torch.Generator().manual_seed(
            (seed * 0x100000001B3 + (first + k) * _GOLDEN + draw * 0xD1B54A32D192ED03) % (1 << 63)
        )
        keep = None if mask is None else mask[k].reshape(-1).cpu()
        count = positions if keep is None else int(keep.sum())
        # Normal numbers are made sixteen at a time: a multiple of that keeps the first ones.
        like = torch.empty(-(-count // 16) * 16, c, dtype=z.dtype)
        drawn = likelihood.noise(like, generator)[:count]
        if keep is not None:
            spread = drawn.new_zeros(positions, *drawn.shape[1:])
            spread[keep] = drawn
            drawn = spread
        rows.append(drawn)
    stacked = torch.stack(rows).to(z.device)
    return stacked.reshape(*z.shape[:-1], *stacked.shape[2:])


def sampled(z: Tensor, likelihood: Likelihood, noise: Tensor, mask: Tensor | None) -> Tensor:
    """Scores of labels drawn from the model, of the shape of z."""
    return _by_rows(z, likelihood, noise, mask, draw=True)


def empirical(z: Tensor, likelihood: Likelihood, targets: Tensor, mask: Tensor | None) -> Tensor:
    """Scores of the data's labels, of the shape of z."""
    categorical = isinstance(likelihood, Categorical)
    shape = z.shape[:-1] if categorical else z.shape
    if tuple(targets.shape) != tuple(shape):
        raise _check.fail("targets", targets, f"shape {tuple(shape)}")
    if categorical:
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise _check.fail("targets", targets, "integer class indices", TypeError)
        # The label that cross-entropy ignores by convention.
        ignored = targets == -100
        if bool(ignored.any()):
            kept = ~ignored.to(z.device)
            mask = kept if mask is None else mask.to(z.device) & kept
            targets = targets.masked_fill(ignored, 0)
        targets = targets.long()
        low, high = (int(targets.min()), int(targets.max())) if targets.numel() else (0, 0)
        if low < 0 or high >= z.shape[-1]:
            raise ValueError(
                f"targets: expected class indices in 0..{z.shape[-1] - 1} (or -100: ignored), got "
                f"{low}..{high}"
            )
    return _by_rows(z, likelihood, targets, mask, draw=False)


def _by_rows(
    z: Tensor, likelihood: Likelihood, given: Tensor, mask: Tensor | None, *, draw: bool
) -> Tensor:
    c = z.shape[-1]
    flat = z.detach().reshape(-1, c)
    rows = given.reshape(flat.shape[0], *given.shape[z.ndim - 1 :]).to(z.device)
    out = torch.empty_like(flat)
    block = max(1, _AT_ONCE // max(1, c))
    # One softmax serves for the label and its score.
    fused = type(likelihood) is Categorical
    for start in range(0, flat.shape[0], block):
        some = slice(start, start + block)
        wide = flat[some] if flat.dtype == torch.float64 else flat[some].float()
        if fused:
            p = torch.softmax(wide, -1)
            label = Categorical.label_of(p, rows[some]) if draw else rows[some]
            out[some] = Categorical.score_of_(p, label)
        else:
            label = likelihood.label(wide, rows[some]) if draw else rows[some]
            out[some] = likelihood.score(wide, label)
    if mask is not None:
        # Not a product: outputs of padding may be NaN.
        out.masked_fill_(~mask.to(z.device).reshape(-1, 1), 0)
    return out.view_as(z)
