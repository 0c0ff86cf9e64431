"""Cost of rays in plain forwards per (direction, radius) point: `pytest bench/test_rays.py`.

Bounds: a dual forward takes at least 2 plain forwards per point for rank-one rays (difference and
derivative) and 3 for full-rank ones. Targets: 2.5 and 3.6. Every measurement is a ratio to a plain
forward timed next to it, with the fastest of several rounds and in processor time, so that a busy
machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deaddir_fast.nets.rays import ray_curvature
from deaddir_fast.nets.weights import RankOne

RADII = [1e-3, 1e-2, 3e-2, 1e-1, 3e-1]
SAMPLES = 2048


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    widths = (512, 512, 512, 512)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 64)).eval()


def _directions(model: nn.Module, kind: str, count: int) -> dict[str, Tensor | RankOne]:
    """Every parameter moves, all weights by rank-one or by full matrices."""
    found: dict[str, Tensor | RankOne] = {}
    for name, value in model.named_parameters():
        if kind == "rank-one" and value.ndim == 2:
            o, i = value.shape
            found[name] = RankOne(torch.randn(count, o), torch.randn(count, i))
        else:
            found[name] = torch.randn(count, *value.shape)
    return found


def _fastest(call: Callable[[], Any], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize(("kind", "count", "bound", "target"), [
    ("rank-one", 8, 2.0, 2.5),
    ("full-rank", 4, 3.0, 3.6),
])  # fmt: skip
def test_forwards_per_point(
    benchmark: Any, kind: str, count: int, bound: float, target: float
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, x = _mlp(), torch.randn(SAMPLES, 512)
        directions = _directions(model, kind, count)
        with torch.no_grad():
            plain = _fastest(lambda: model(x), 8)
        rounds = 4
        result = benchmark.pedantic(
            ray_curvature, (model, x, directions, RADII), rounds=rounds, warmup_rounds=1
        )
        ours = _fastest(lambda: ray_curvature(model, x, directions, RADII), rounds)
        with torch.no_grad():
            plain = min(plain, _fastest(lambda: model(x), 8))
    finally:
        torch.set_num_threads(threads)
    points = count * len(RADII)
    benchmark.extra_info.update(
        points=points,
        plain_forward_ms=round(plain * 1e3, 2),
        forwards_per_point=round(ours / plain / points, 3),
        bound=bound,
        target=target,
        samples_per_chunk=result.chunking.samples,
    )
    assert result.fisher.shape == (count, len(RADII))
    print(
        f"\n{kind}: {ours / plain / points:.2f} plain forwards per point "
        f"(bound {bound}, target {target}; plain forward {plain * 1e3:.1f} ms)"
    )
