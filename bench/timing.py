"""Round-robin timing on a CPU: a noisy moment hits every implementation alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: A formulation this many times slower than the fastest one is out of the race: it is timed in a
#: few rounds only, and the time goes to those that matter.
HOPELESS, HOPELESS_ROUNDS = 4.0, 3


def hopeless(seconds: Mapping[str, float]) -> set[str]:
    """Names of the formulations that are out of the race."""
    limit = HOPELESS * min(seconds.values(), default=0.0)
    return {name for name, once in seconds.items() if once > limit}


class Race:
    """Implementations of one thing, timed in turns: `others` and `first` make one round.

    The order of the others rotates from round to round, so that none always follows the same one.
    """

    def __init__(
        self,
        first: tuple[str, Callable[[], Any]],
        others: Mapping[str, Callable[[], Any]],
    ) -> None:
        self._name, self._call = first
        self._others = dict(others)
        self._hopeless: set[str] = set()
        self._round = 0
        self.samples: dict[str, list[float]] = {name: [] for name in (self._name, *self._others)}

    def rounds(self, seconds: float, least: int = 5, most: int = 200) -> int:
        """Run one round to warm up and judge by it how many fit in ``seconds``."""
        self.others()
        self.first()
        once = {name: samples.pop() for name, samples in self.samples.items()}
        self._round = 0
        self._hopeless = hopeless({name: once[name] for name in self._others})
        left = seconds - HOPELESS_ROUNDS * sum(once[name] for name in self._hopeless)
        each = sum(s for n, s in once.items() if n not in self._hopeless)
        return int(np.clip(left / each, least, most))

    def others(self) -> None:
        """Time every implementation but the first, once."""
        names = list(self._others)
        at = self._round % max(1, len(names))
        for name in names[at:] + names[:at]:
            if name not in self._hopeless or self._round < HOPELESS_ROUNDS:
                self._time(name, self._others[name])
        self._round += 1

    def first(self) -> Any:
        """Time the first implementation, once."""
        return self._time(self._name, self._call)

    def _time(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.samples[name].append(time.perf_counter() - start)
        return result


def percentiles(samples: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    return {f"p{q}": float(np.percentile(samples, q)) for q in (20, 50, 80)}
