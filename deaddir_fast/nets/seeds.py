"""Output gradients whose squares make up the Fisher of the outputs.

For an output z with Fisher H(z), seeds v_1, v_2, … satisfy Σ v vᵀ = H, exactly or on average; a
backward pass of each gives the gradients of which K-FAC's G consists.

- exact (type 2): the columns of a square root of H, one pass for each. A softmax over c classes
  has c − 1: the sequential binomials of a multinomial, v_j = √(p_j / (s_j s_{j+1})) (s_{j+1} e_j −
  Σ_{k>j} p_k e_k) with tail sums s_j = Σ_{k≥j} p_k, all terms positive, so nothing cancels.
- mc: scores of labels drawn from the model. Each sample has random numbers of its own, so that
  the result depends on neither the batch size nor the padding.
- empirical: scores of the data's labels; not the Fisher matrix (its rates differ).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deaddir_fast import _check
from deaddir_fast.nets.likelihood import Categorical, Likelihood

_ROWS_AT_ONCE = 1 << 25  # numbers of a block of outputs
_GOLDEN = 0x9E3779B97F4A7C15


def exact_count(z: Tensor, likelihood: Likelihood) -> int:
    """Number of backward passes for outputs (n, ..., c)."""
    positions = z[0, ..., 0].numel()
    return positions * (z.shape[-1] - (1 if isinstance(likelihood, Categorical) else 0))


def exact(z: Tensor, likelihood: Likelihood, mask: Tensor | None = None) -> Iterator[Tensor]:
    """Columns of a square root of H, one position at a time; each of the shape of z."""
    n, c = z.shape[0], z.shape[-1]
    flat = z.detach().reshape(n, -1, c)
    live = None if mask is None else mask.reshape(n, -1)
    for s in range(flat.shape[1]):
        if live is not None and not bool(live[:, s].any()):
            continue
        for column in _columns(flat[:, s], likelihood):
            seed = torch.zeros_like(flat)
            seed[:, s] = column if live is None else column * live[:, s, None]
            yield seed.view_as(z)


def _columns(z: Tensor, likelihood: Likelihood) -> Iterator[Tensor]:
    wide = z.double() if z.dtype == torch.float64 else z.float()
    c = z.shape[1]
    if isinstance(likelihood, Categorical):
        p = torch.softmax(wide, -1)
        tail = p.flip(-1).cumsum(-1).flip(-1)
        for j in range(c - 1):
            both = tail[:, j] * tail[:, j + 1]
            size = torch.where(both > 0, p[:, j] / both, 0.0).sqrt()
            column = torch.zeros_like(p)
            column[:, j] = tail[:, j + 1]
            column[:, j + 1 :] = -p[:, j + 1 :]
            yield (column * size.unsqueeze(1)).to(z.dtype)
        return
    transpose = torch.func.vjp(lambda d: likelihood.whiten(wide, d), torch.zeros_like(wide))[1]
    for j in range(c):
        unit = torch.zeros_like(wide)
        unit[:, j] = 1
        yield transpose(unit)[0].to(z.dtype)


def noise(
    z: Tensor, likelihood: Likelihood, first: int, draw: int, seed: int, mask: Tensor | None
) -> Tensor:
    """Random numbers for one draw of labels; those of a sample depend on its index only.

    Args:
        z: (n, ..., c) outputs.
        likelihood: whose labels they determine.
        first: index of the first sample in the whole data set.
        draw, seed: which draw, and the seed of the run.
        mask: (n, ...) which positions count; numbers are given to those in order.
    """
    c = z.shape[-1]
    positions = z[0, ..., 0].numel()
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
            mask = ~ignored if mask is None else mask & ~ignored
            targets = targets.masked_fill(ignored, 0)
        low, high = int(targets.min()), int(targets.max())
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
    block = max(1, _ROWS_AT_ONCE // c)
    for start in range(0, flat.shape[0], block):
        some = slice(start, start + block)
        wide = flat[some] if flat.dtype == torch.float64 else flat[some].float()
        label = likelihood.label(wide, rows[some]) if draw else rows[some]
        out[some] = likelihood.score(wide, label).to(out.dtype)
    if mask is not None:
        out.mul_(mask.reshape(-1, 1).to(out.dtype))
    return out.view_as(z)
