"""The factors of a scan: shard after shard, kept on disk, cut smaller when memory runs out.

With W processes shards are summed W at a time, one by each. The sums of each layer go to the
process that owns it, which adds them in the order of the shards: the same additions as those of
one process, so the same bits, whatever W is. An owner holds its layers' totals, one shard's sums of
all layers, and one layer's that arrives; what travels in a round is one shard's sums a process.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from deaddir_fast.fisher.factors import KronFactors, LayerFactors
from deaddir_fast.fisher.kron import Batch, Pass, Settings, describe
from deaddir_fast.nets.graph import slice_batch
from deaddir_fast.nets.sharded import is_sharded, whole
from deaddir_fast.nets.survey import Survey
from deaddir_fast.scan.batches import Batches
from deaddir_fast.scan.dealing import Share, held_by
from deaddir_fast.scan.ranks import Ranks, Sent
from deaddir_fast.scan.store import Store

#: Tensors a process may have on their way at once.
IN_FLIGHT = 16
_TENSORS = ("A_sum", "A_ones", "G_sum")
_PLAIN = tuple(f.name for f in fields(LayerFactors) if f.name not in _TENSORS)


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


class _Total:
    """The sums of one share over the first shards, on its owner."""

    def __init__(
        self,
        share: Share,
        store: Store,
        sizes: Sequence[int],
        meta: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.share, self.store, self.sizes, self.meta = share, store, sizes, meta
        kept = store.load_factors(share.index)
        if kept is not None:
            shards = kept.meta.get("shards", [])
            same = {k: v for k, v in kept.meta.items() if k != "shards"} == meta
            if not same or shards != list(range(len(shards))):
                kept = None
        self.sum = None if kept is None else _moved(kept, device)

    @property
    def done(self) -> int:
        """How many shards are in it."""
        return 0 if self.sum is None else len(self.sum.meta["shards"])

    def add(self, shard: int, part: KronFactors) -> None:
        """Add one shard's sums, the next in order."""
        assert shard == self.done
        if self.sum is None:
            self.sum = part
            return
        before = sum(self.sizes[:shard])
        names = [n for n in self.share.names if n in self.sum or n in part]
        old = _level(self.sum, part, names, before)
        new = _level(part, self.sum, names, self.sizes[shard])
        self.sum = KronFactors.merge([old, new])

    def save(self) -> None:
        """Keep it on disk."""
        assert self.sum is not None
        self.store.save_factors(self.share.index, self.sum)


def _moved(sums: KronFactors, device: torch.device) -> KronFactors:
    layers: dict[str, LayerFactors] = {}
    for name, f in sums.items():
        leader = layers.get(f.shares_inputs_with or "")
        a, ones = (
            (f.A_sum.to(device), f.A_ones.to(device))
            if leader is None
            else (leader.A_sum, leader.A_ones)
        )
        layers[name] = replace(f, A_sum=a, A_ones=ones, G_sum=f.G_sum.to(device))
    return KronFactors(layers, sums.meta, sums.notes)


def _level(
    some: KronFactors, other: KronFactors, names: Sequence[str], samples: int
) -> KronFactors:
    """``some`` with sums of nothing for layers that only ``other`` has (experts nobody chose)."""
    layers: dict[str, LayerFactors] = {}
    for name in names:
        if name in some:
            layers[name] = some[name]
            continue
        f = other[name]
        leader = f.shares_inputs_with
        a, ones = (
            (layers[leader].A_sum, layers[leader].A_ones)
            if leader is not None
            else (torch.zeros_like(f.A_sum), torch.zeros_like(f.A_ones))
        )
        layers[name] = replace(
            f,
            A_sum=a,
            A_ones=ones,
            G_sum=torch.zeros_like(f.G_sum),
            rows=samples if f.form == "one" else 0,
            samples=samples,
        )
    return KronFactors(layers, some.meta, some.notes)


class FactorStage:
    """Factors over all shards, resumable.

    Args:
        model, survey, settings, batches, store: of the scan.
        ranks: the processes that take part.
        dealt: which layers belong to which of them.

    Attributes:
        chunk: samples per pass; halved when memory runs out.
        seconds: {layer: time its sums took here}, on a CPU.
        halved: how often memory ran out here.
        notes: what limits the sums, the same on every process.
    """

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        settings: Settings,
        batches: Batches,
        store: Store,
        ranks: Ranks,
        dealt: Sequence[Share],
    ) -> None:
        self.model, self.survey, self.settings = model, survey, settings
        self.batches, self.store = batches, store
        self.ranks, self.dealt = ranks, dealt
        self.sharded = is_sharded(model)
        self.chunk = max(batches.sizes)
        self.seconds: dict[str, float] = defaultdict(float)
        self.halved = 0
        self.notes: list[str] = []

    def run(self, shards: Sequence[range], advance: Callable[[int], None]) -> KronFactors:
        """Sum all shards that are not on disk yet.

        Args:
            shards: batches of each shard.
            advance: told how many batches are done.

        Returns:
            Totals of the layers that this process owns.

        Raises:
            RankError: another process failed.
        """
        ranks = self.ranks
        sizes = [sum(self.batches.sizes[i] for i in shard) for shard in shards]
        meta = describe(self.settings)
        mine = {
            s.index: _Total(s, self.store, sizes, meta, self._device())
            for s in held_by(self.dealt, ranks.rank)
        }
        done = -ranks.most(-min((t.done for t in mine.values()), default=len(shards)))
        advance(sum(len(s) for s in shards[:done]))
        for first in range(done, len(shards), ranks.size):
            now = range(first, min(first + ranks.size, len(shards)))
            part: KronFactors | None = None
            if first + ranks.rank in now:
                part = self._shard(first + ranks.rank, shards[first + ranks.rank], advance)
            if self.sharded:
                longest = max(len(shards[k]) for k in now)
                here = len(shards[first + ranks.rank]) if part is not None else 0
                self._keep_up(longest - here)
            self._share_out(now, part, mine)
            del part
            for total in mine.values():
                if total.done > first:
                    total.save()
            advance(sum(len(shards[k]) for k in now if k != first + ranks.rank))
        layers: dict[str, LayerFactors] = {}
        notes: dict[str, None] = {}
        for total in mine.values():
            assert total.sum is not None
            layers.update(total.sum)
            notes.update(dict.fromkeys(total.sum.notes))
        everywhere = ranks.exchange([list(layers), list(notes)])
        used = {name for names, _ in everywhere for name in names}
        order = {name: k for k, name in enumerate(self.survey.layers)}
        said = {note for _, some in everywhere for note in some}
        # Of a layer that some shards did not use, but others did.
        said -= {f"{name}: not used by any of the inputs" for name in used}
        self.notes = sorted(said, key=lambda n: (order.get(n.split(": ")[0], len(order)), n))
        whole_meta = {**meta, "shards": list(range(len(shards)))}
        return KronFactors({n: layers[n] for n in order if n in layers}, whole_meta)

    def _share_out(self, now: range, part: KronFactors | None, mine: dict[int, _Total]) -> None:
        """Take every layer's sums of one round to its owner, and add them there in order."""
        ranks = self.ranks
        told: dict[str, Any] | None = None
        if part is not None:
            told = {
                "layers": {
                    name: {
                        "plain": {k: getattr(f, k) for k in _PLAIN},
                        "tensors": {k: _described(getattr(f, k)) for k in _own(f)},
                    }
                    for name, f in part.items()
                },
                "notes": list(part.notes),
            }
        heard: list[Any] = ranks.exchange(told) if ranks.size > 1 else [told]
        on_way: deque[Sent] = deque()
        # All processes go through layers and shards in one order, so none waits in a circle.
        for share in self.dealt:
            for k in now:
                source = k - now.start
                if ranks.rank == share.owner:
                    total = mine[share.index]
                    if source == ranks.rank:
                        assert part is not None
                        some = {n: part[n] for n in share.names if n in part}
                    else:
                        some = self._receive(share, heard[source]["layers"], source)
                    if total.done == k:
                        meta = {**describe(self.settings), "shards": [k]}
                        total.add(k, KronFactors(some, meta, heard[source]["notes"]))
                elif source == ranks.rank:
                    assert part is not None
                    for name in share.names:
                        if name not in part:
                            continue
                        for key in _own(part[name]):
                            on_way.append(ranks.send(getattr(part[name], key), share.owner))
                            if len(on_way) > IN_FLIGHT:
                                on_way.popleft().wait()
        for sent in on_way:
            sent.wait()

    def _receive(
        self, share: Share, layers: dict[str, Any], source: int
    ) -> dict[str, LayerFactors]:
        found: dict[str, LayerFactors] = {}
        for name in share.names:
            if name not in layers:
                continue
            plain: dict[str, Any] = layers[name]["plain"]
            tensors: dict[str, Any] = {}
            for key, (shape, dtype) in layers[name]["tensors"].items():
                tensors[key] = self.ranks.receive(
                    tuple(shape), getattr(torch, dtype), self._device(), source
                )
            leader = plain["shares_inputs_with"]
            if leader is not None:
                tensors["A_sum"], tensors["A_ones"] = found[leader].A_sum, found[leader].A_ones
            else:
                for key in _TENSORS[:2]:
                    tensors.setdefault(key, torch.zeros(0, dtype=torch.float64))
            found[name] = LayerFactors(**plain, **tensors)
        return found

    def _device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

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
                # In the middle of a sharded model's pass the others wait for this process.
                if not out_of_memory(error) or self.chunk == 1 or self.sharded:
                    raise
            # Outside the handler, so that the failed pass's tensors are gone.
            advance(-done)
            self.chunk = max(1, self.chunk // 2)
            self.halved += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _keep_up(self, passes: int) -> None:
        """Run the last batch again for processes that have more batches, and drop the sums."""
        if not passes:
            return
        last = len(self.batches) - 1
        with self._pass() as work:
            for _ in range(passes):
                work.add(self.batches[last], self.batches.first[last])

    def _pass(self) -> Pass:
        work = Pass(self.model, self.survey, self.settings)
        collector, seconds = work.collector, self.seconds
        if self.sharded:
            work.agree = self.ranks.most

        def timed(call: Any) -> Any:
            def run(layer: Any, *tensors: Tensor | None) -> None:
                start = time.perf_counter()
                # The scores of a norm may need its weights; its module may be sharded alone.
                with whole(layer.module) if layer.kind == "norm" else nullcontext():
                    call(layer, *tensors)
                seconds[layer.name] += time.perf_counter() - start

            return run

        work.streams.on_input = timed(collector.on_input)
        work.streams.on_gradient = timed(collector.on_gradient)
        return work


def _own(f: LayerFactors) -> tuple[str, ...]:
    """The tensors a layer does not have from its leader, without empty ones."""
    keys = _TENSORS if f.shares_inputs_with is None else _TENSORS[2:]
    return tuple(k for k in keys if getattr(f, k).numel())


def _described(x: Tensor) -> tuple[list[int], str]:
    return list(x.shape), str(x.dtype).removeprefix("torch.")
