"""The matrix-free live space against the dense one, and readings that use it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deaddir_fast as dd
from deaddir_fast.fisher.jacobian import decompose
from deaddir_fast.fisher.range_finder import RankTooLarge, find_range
from deaddir_fast.reading import local


def matrix(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, columns, dtype=torch.float64, generator=generator)
    return (left * torch.logspace(0, -5, rank, dtype=torch.float64)) @ right


@pytest.mark.parametrize(("rows", "columns", "rank"), [(50, 300, 20), (300, 200, 130), (9, 40, 9)])
def test_range_finder_finds_the_live_space(rows: int, columns: int, rank: int) -> None:
    b = matrix(rows, columns, rank)
    found = find_range(lambda v: v @ b.T, lambda w: w @ b, rows, columns, limit=256)
    dense = decompose(b)
    assert found.rank == dense.rank == rank
    torch.testing.assert_close(found.values[:rank], dense.values[:rank], rtol=1e-8, atol=1e-12)
    # The same space: projecting one basis onto the other loses nothing.
    assert float((dense.live - found.live @ (found.live.T @ dense.live)).norm()) < 1e-8
    assert found.dead is None
    probe = found.onto_dead(torch.randn(columns, 3, dtype=torch.float64))
    assert float((b @ probe).norm()) < 1e-9 * float(b.norm()) * float(probe.norm())


def test_zero_operator_has_rank_zero() -> None:
    b = torch.zeros(7, 30, dtype=torch.float64)
    found = find_range(lambda v: v @ b.T, lambda w: w @ b, 7, 30, limit=16)
    assert found.rank == 0 and found.live.shape == (30, 0)


def test_a_rank_above_the_limit_is_refused() -> None:
    b = matrix(400, 400, 200)
    with pytest.raises(RankTooLarge, match="rank above 50"):
        find_range(lambda v: v @ b.T, lambda w: w @ b, 400, 400, limit=50)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_readings_agree_with_the_dense_ones(
    likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    dense = dd.dead_directions(model, x, likelihood=likelihood)
    monkeypatch.setattr(local, "DENSE_PARAMETERS", 50)
    free = dd.dead_directions(model, x, likelihood=likelihood)
    assert free.sampled and not dense.sampled
    assert free.rank == dense.rank and free.rank_half == dense.rank_half
    assert free.dead_dimension == dense.dead_dimension
    assert free.count("gauge") == dense.count("gauge")
    assert free.verdict == dense.verdict
    torch.testing.assert_close(
        free.singular_values[: free.rank], dense.singular_values[: dense.rank], rtol=1e-8, atol=0
    )
    curvature = dd.ray_curvature(model, x, free.directions, [0.0], likelihood=likelihood)
    assert float(curvature.fisher.max()) < 1e-20
