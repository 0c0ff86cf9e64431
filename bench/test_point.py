"""Cost of curvature at the checkpoint in forward and backward passes per direction.

`pytest bench/test_point.py`. The yardstick is one training step without the update:
``cross_entropy(model(x), y).backward()`` over all parameters. Counting products alone, a full
direction costs (W da + U a) 0.67 of it and one of rank one 0.33, plus 0.33 shared by all. Targets:
0.9 and 0.4. The rival is ``vmap`` of ``torch.func.jvp`` over dense directions, followed by the same
quadratic form; it takes the fewer directions at once that memory allows. Ours, rival and yardstick
alternate, and ratios are taken between neighbours, so that a busy machine does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from bench.test_rays import SAMPLES, _directions, _mlp
from deaddir_fast.fisher.point import point_curvature
from deaddir_fast.nets.weights import RankOne
from deaddir_fast.ops import softmax_fisher

DIRECTIONS = 16
ROUNDS = 9


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_jvp(model: Any, x: Tensor, directions: dict[str, Tensor], chunk: int) -> Tensor:
    """(p,) curvatures of unit directions."""
    state = {k: v.detach() for k, v in model.named_parameters()}
    norms = sum(u.flatten(1).square().sum(1) for u in directions.values())

    def derivative(u: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(lambda s: functional_call(model, s, (x,)), (state,), (u,))[1]

    with torch.no_grad():
        dz = torch.vmap(derivative, chunk_size=chunk)(directions)
        return softmax_fisher(model(x), dz).mean(1) / norms


@pytest.mark.parametrize(("kind", "bound", "target"), [
    ("rank-one", 0.33, 0.4),
    ("full-rank", 0.67, 0.9),
])  # fmt: skip
def test_steps_per_direction(benchmark: Any, kind: str, bound: float, target: float) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, x = _mlp(), torch.randn(SAMPLES, 512)
        y = torch.randint(0, 64, (SAMPLES,))
        directions = _directions(model, kind, DIRECTIONS)
        dense = {
            k: u.dense(model.get_parameter(k).shape) if isinstance(u, RankOne) else u
            for k, u in directions.items()
        }

        def step() -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()

        def ours() -> Any:
            return point_curvature(model, x, directions)

        def rival() -> Tensor:
            return _by_jvp(model, x, dense, 4)

        torch.testing.assert_close(rival().double(), ours().curvature, rtol=1e-4, atol=0)
        step()
        times = []
        for _ in range(ROUNDS):
            before, own, between, other, after = map(_seconds, (step, ours, step, rival, step))
            times.append((before + between, own, between + after, other, between))
        benchmark.pedantic(ours, rounds=1)
    finally:
        torch.set_num_threads(threads)
    median = statistics.median
    own = median(2 * t[1] / t[0] for t in times) / DIRECTIONS
    other = median(2 * t[3] / t[2] for t in times) / DIRECTIONS
    step_ms = median(t[4] for t in times) * 1e3
    benchmark.extra_info.update(
        directions=DIRECTIONS,
        step_ms=round(step_ms, 1),
        steps_per_direction=round(own, 3),
        jvp_steps_per_direction=round(other, 3),
        bound=bound,
        target=target,
    )
    print(
        f"\n{kind}: {own:.3f} steps per direction, vmap(jvp) {other:.2f} "
        f"(bound {bound} + 0.33/{DIRECTIONS}, target {target}; step {step_ms:.0f} ms)"
    )
