"""The factors of a scan: shard after shard, kept on disk, cut smaller when memory runs out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.fisher.factors import KronFactors
from deaddir_fast.fisher.kron import Batch, Pass, Settings, describe
from deaddir_fast.nets.graph import slice_batch
from deaddir_fast.nets.survey import Survey
from deaddir_fast.scan.batches import Batches
from deaddir_fast.scan.store import Store


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def cut(batch: Batch, most: int) -> list[tuple[int, Batch]]:
    """A batch in pieces of at most ``most`` samples, each with the index of its first."""
    if batch.n <= most:
        return [(0, batch)]
    pieces = []
    for start in range(0, batch.n, most):
        stop = min(start + most, batch.n)
        pieces.append(
            (
                start,
                Batch(
                    slice_batch(batch.inputs, start, stop),
                    None if batch.targets is None else batch.targets[start:stop],
                    None if batch.mask is None else batch.mask[start:stop],
                    stop - start,
                ),
            )
        )
    return pieces


class FactorStage:
    """Factors over all shards, resumable.

    Attributes:
        chunk: samples per pass; halved when memory runs out.
        seconds: {layer: time its sums took}, on a CPU.
        halved: how often memory ran out.
    """

    def __init__(
        self, model: nn.Module, survey: Survey, settings: Settings, batches: Batches, store: Store
    ) -> None:
        self.model, self.survey, self.settings = model, survey, settings
        self.batches, self.store = batches, store
        self.chunk = max(batches.sizes)
        self.seconds: dict[str, float] = defaultdict(float)
        self.halved = 0

    def run(self, shards: Sequence[range], advance: Callable[[int], None]) -> KronFactors:
        """Sum all shards that are not on disk yet; ``advance`` is told of each batch done."""
        total = self.store.load_factors()
        done = set() if total is None else set(total.meta["shards"])
        for k, shard in enumerate(shards):
            if k in done:
                advance(len(shard))
                continue
            part = self._shard(k, shard, advance)
            total = part if total is None else KronFactors.merge([total, part])
            self.store.save_factors(total)
        assert total is not None
        return total

    def _shard(self, index: int, shard: range, advance: Callable[[int], None]) -> KronFactors:
        while True:
            done = 0
            try:
                with self._pass() as work:
                    for i in shard:
                        batch = self.batches[i]
                        for start, piece in cut(batch, self.chunk):
                            work.add(piece, self.batches.first[i] + start)
                        done += 1
                        advance(1)
                    layers = work.collector.result()
                    notes = tuple(work.collector.notes)
                meta = {**describe(self.settings), "shards": [index]}
                return KronFactors(layers, meta, notes)
            except Exception as error:
                if not out_of_memory(error) or self.chunk == 1:
                    raise
            # Outside the handler, so that the failed pass's tensors are gone.
            advance(-done)
            self.chunk = max(1, self.chunk // 2)
            self.halved += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _pass(self) -> Pass:
        work = Pass(self.model, self.survey, self.settings)
        collector, seconds = work.collector, self.seconds

        def timed(call: Any) -> Any:
            def run(layer: Any, *tensors: Tensor | None) -> None:
                start = time.perf_counter()
                call(layer, *tensors)
                seconds[layer.name] += time.perf_counter() - start

            return run

        work.streams.on_input = timed(collector.on_input)
        work.streams.on_gradient = timed(collector.on_gradient)
        return work
