"""The whole step of DDCAdam on this CPU: ``python -m pytest -s bench/test_ddcadam.py``.

A transformer of 26 million parameters; what a user waits for, Python included. The optimizers take
turns in one process and are compared by their medians.

Bound: fused AdamW moves 28 bytes an element. DDCAdam moves as many, and reads the matrices that
write units (queries, values, up) once more for their norms; heads read their gradient twice and
keep a second moment 64 times smaller: 29 bytes an element here.

Measured on two cores of an EPYC (Zen 4, AVX-512), two threads, otherwise idle: 1.43 times the step
of fused AdamW here (21.8 against 15.2 ms; foreach AdamW 5.4 times), 1.34 on a Llama-like model of
the same size without biases. The kernels take 17 ms, Python the rest. Finding the symmetries takes
7 s, once.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.optim import AdamW

from bench import gpu_step
from bench.measure import threads_set
from bench.timing import Race, percentiles
from deaddir_fast.optim import DDCAdam

NAMES = ("DDCAdam", "AdamW(fused=True)", "AdamW(foreach=True)")


def test_step(benchmark: Any, request: pytest.FixtureRequest) -> None:
    with threads_set(request.config.getoption("--threads")):
        model, gauges, gradients = gpu_step.problem(True, "cpu")
        for p, g in zip(model.parameters(), gradients[0], strict=True):
            p.grad = g
        options = gpu_step.OPTIONS
        ours = DDCAdam(model, gauges=gauges, **options)
        fused = AdamW(model.parameters(), fused=True, **options)
        foreach = AdamW(model.parameters(), foreach=True, **options)
        others = {NAMES[1]: fused.step, NAMES[2]: foreach.step}
        race = Race((NAMES[0], ours.step), others)
        rounds = race.rounds(request.config.getoption("--seconds"))
        benchmark.pedantic(race.first, setup=race.others, rounds=rounds)
    medians = {name: percentiles(samples)["p50"] for name, samples in race.samples.items()}
    benchmark.extra_info.update(ratio={n: s / medians[NAMES[1]] for n, s in medians.items()})
    for name, seconds in medians.items():
        print(f"{name:20s} {seconds * 1e3:8.2f} ms  {seconds / medians[NAMES[1]]:5.2f} of fused")
