"""Parameters spread over processes take the steps of whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scan_jobs import launch

PROGRAM = Path(__file__).parents[1] / "optim_jobs.py"
# Sums over shards are added in another order, and Adam divides by small second moments.
BOUND = {"float64": 1e-10, "float32": 2e-3}


def job(model: str, how: str, **more: Any) -> dict[str, Any]:
    bound = BOUND[more.get("dtype", "float64")]
    return {"model": model, "how": how, "bound": bound, **more}


def run(jobs: list[dict[str, Any]], processes: int = 2) -> None:
    for code, text in launch(jobs, processes, timeout=300, program=PROGRAM):
        assert code == 0, text


@pytest.mark.slow
def test_fully_sharded() -> None:
    run([job("mlp", "fully_shard")])


@pytest.mark.slow
def test_fully_sharded_models() -> None:
    models = ("mlp", "pair", "two heads", "three heads", "experts", "filters")
    run([job(m, how) for m in models for how in ("fully_shard", "fully_shard per layer")])


@pytest.mark.slow
def test_distributed_tensors() -> None:
    """Any placement, all of a kind and mixed; the reader of some gauges whole, of others split."""
    models = ("mlp", "pair", "two heads", "three heads", "experts", "one expert", "filters")
    hows = ("shard 0", "shard 1", "replicate", "experts", "mixed")
    run([job(m, how) for m in models for how in hows])


@pytest.mark.slow
def test_meshes_of_two_dimensions() -> None:
    models = ("mlp", "two heads", "three heads", "experts", "filters")
    run([job(m, "mesh") for m in models], processes=4)


@pytest.mark.slow
def test_more_processes_than_rows() -> None:
    models = ("mlp", "two heads", "experts")
    run([job(m, "shard 0", steps=6) for m in models], processes=3)


@pytest.mark.slow
def test_options() -> None:
    """Fp32; the plain route; device step counts; up the gradient; without decay."""
    rounded = {"dtype": "float32", "steps": 6}
    run(
        [
            job("mlp", "mixed", **rounded),
            job("three heads", "mixed", **rounded, options={"fused": False}),
            job("three heads", "shard 0", options={"capturable": True, "maximize": True}, steps=6),
            job("mlp", "mixed", options={"weight_decay": 0.0}),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_states_go_through_distributed_checkpoints(kind: str) -> None:
    run([job(m, "fully_shard", checkpoint=kind) for m in ("mlp", "three heads", "experts")])


@pytest.mark.slow
def test_copies_round_alike() -> None:
    """Also where the processes hold different numbers of experts."""
    run([job(m, "experts", rounding=True) for m in ("experts", "three heads")])
