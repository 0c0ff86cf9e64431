"""The batches of a scan: random access, counts, a fingerprint, and shards that never change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deaddir_fast import _check
from deaddir_fast.fisher.kron import Batch, as_batch


class Batches:
    """Batches by index.

    Args:
        given: a sequence or iterable of batches as for ``kron_factors``, a single tensor or dict,
            or an object with ``__len__``, ``batch(i)`` and ``fingerprint`` (which is then not read
            ahead of time).
        fisher: as for ``kron_factors``.
        dtype: of floating-point inputs; None leaves them.

    Raises:
        TypeError, ValueError: not batches, or none.
    """

    def __init__(self, given: Any, fisher: str, dtype: torch.dtype | None = None) -> None:
        self.fisher, self.dtype = fisher, dtype
        self.source = str(getattr(given, "source", "batches in memory"))
        if isinstance(given, (Tensor, Mapping)):
            given = [given]
        self._lazy = given if hasattr(given, "batch") and hasattr(given, "__len__") else None
        if self._lazy is None:
            if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
                raise _check.fail("batches", given, "an iterable of inputs", TypeError)
            self._list: Sequence[Any] = given if isinstance(given, Sequence) else list(given)
        self.count = len(self._lazy) if self._lazy is not None else len(self._list)
        if self.count == 0:
            raise ValueError("batches: expected at least one, got none")
        self.sizes = [self[i].n for i in range(self.count)]
        if not sum(self.sizes):
            raise ValueError("batches: expected at least one sample, got none")
        first = 0
        self.first = []
        for n in self.sizes:
            self.first.append(first)
            first += n
        self.samples = first
        self.tokens = sum(_tokens(self[i]) for i in range(self.count))
        self.fingerprint = str(getattr(given, "fingerprint", "") or self._digest())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if self._lazy is None:
            return self._cast(as_batch(self._list[index], self.fisher))
        given = self._lazy.batch(index)
        if self.fisher == "empirical" and not isinstance(given, tuple):
            labels = self._lazy.labels(index) if hasattr(self._lazy, "labels") else None
            if labels is not None:
                given = (given, labels)
        return self._cast(as_batch(given, self.fisher))

    def _cast(self, batch: Batch) -> Batch:
        if self.dtype is None:
            return batch

        def one(x: Any) -> Any:
            floats = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(self.dtype) if floats else x

        return replace(batch, inputs=pytree.tree_map(one, batch.inputs))

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for i in range(self.count):
            batch = self[i]
            for x in pytree.tree_leaves((batch.inputs, batch.targets)):
                if isinstance(x, Tensor):
                    digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
                    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    digest.update(raw.numpy().data)
        return digest.hexdigest()

    def shards(self, count: int) -> list[range]:
        """A fixed partition into at most ``count`` ranges of nearly equal length."""
        count = max(1, min(count, self.count))
        small, extra = divmod(self.count, count)
        stops = [0]
        for k in range(count):
            stops.append(stops[-1] + small + (1 if k < extra else 0))
        return [range(a, b) for a, b in pairwise(stops)]


def _tokens(batch: Batch) -> int:
    if batch.mask is not None:
        return int(batch.mask.sum())
    leaves = [x for x in pytree.tree_leaves(batch.inputs) if isinstance(x, Tensor)]
    if leaves and not leaves[0].is_floating_point() and leaves[0].ndim == 2:
        return leaves[0].numel()
    return batch.n
