"""Scans by several processes: the same bits as by one, and no process waits for one that failed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scan_jobs import (
    differences,
    factors_of,
    launch,
    mlp,
    report_of,
    run_job,
    transformer,
)
from torch import nn

import deaddir_fast as dd
from deaddir_fast.nets.survey import survey
from deaddir_fast.ops.gram_packed import entries
from deaddir_fast.scan.dealing import held_by, shares
from deaddir_fast.scan.factors import FactorStage
from deaddir_fast.scan.ranks import Ranks

FEW = {"directions_per_layer": 2, "radii": [0.01, 0.03, 0.1], "ray_samples": 2}
NONE = {"directions_per_layer": 0, "gauges": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads; the processes have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(model: str, out: Path, **more: Any) -> dict[str, Any]:
    return {"model": model, "out": str(out), **more}


def same_bits(one: Path, other: Path) -> None:
    """Factors, spectra and everything in the report but times."""
    a, b = factors_of(one), factors_of(other)
    assert a.keys() == b.keys()
    assert len(a) > 0
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert differences(report_of(one), report_of(other)) == []
    a, b = load_file(one / "spectra.safetensors"), load_file(other / "spectra.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def all_well(results: list[tuple[int, str]]) -> None:
    for code, text in results:
        assert code == 0, text


# -------------------------------------------------------------------------------- one process alone


def test_alone_nothing_is_exchanged() -> None:
    with Ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert ranks.exchange({"a": float("inf")}) == [{"a": float("inf")}]
        assert ranks.most(3) == 3
        ranks.barrier()


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_layers_are_dealt_by_size_and_followers_stay_with_their_leader(processes: int) -> None:
    model, data = transformer()
    found = survey(model, data[0])
    dealt = shares(found, None, processes)
    names = [n for share in dealt for n in share.names]
    assert sorted(names) == sorted(found.layers)
    owner = {n: share.owner for share in dealt for n in share.names}
    for name, leader in found.leaders.items():
        assert owner[name] == owner[leader]
    assert "blocks.0.k" in found.leaders
    total = sum(
        entries(x.outputs) + (entries(x.inputs) if n not in found.leaders else 0)
        if x.form == "matrix"
        else entries(x.outputs) + (x.inputs if x.form == "diagonal" else 0)
        for n, x in found.layers.items()
    )
    assert sum(share.size for share in dealt) == total
    loads = [sum(s.size for s in held_by(dealt, r)) for r in range(processes)]
    # Graham's bound, with the best no better than the mean and the largest.
    best = max(total / processes, max(share.size for share in dealt))
    assert max(loads) <= (4 / 3) * best + 1e-9


# -------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    "options", [NONE, pytest.param({**FEW, "units": [1]}, marks=pytest.mark.slow)]
)
def test_two_processes_give_the_bits_of_one(options: dict[str, Any], tmp_path: Path) -> None:
    # Five batches in three shards (2, 2, 1): one process has nothing to do in the second round.
    alone = job("mlp", tmp_path / "one", options={**options, "shards": 3})
    run_job(alone)
    all_well(launch([{**alone, "out": str(tmp_path / "two")}], 2))
    same_bits(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_transformers_give_the_same_bits(processes: int, tmp_path: Path) -> None:
    options = {**FEW, "shards": 5}
    cases = {
        "all": job("transformer", tmp_path, options=options),
        # Fewer shards than processes; and as many, with no rays.
        "one shard": job("transformer", tmp_path, batches=1, options={**NONE}),
        "exact": job("mlp", tmp_path, options={**NONE, "fisher": "exact", "shards": 2}),
        "fp32": job("transformer", tmp_path, options={**NONE, "fp64_up_to": 0, "shards": 4}),
    }
    for name, case in cases.items():
        run_job({**case, "out": str(tmp_path / name)})
    many = [{**case, "out": str(tmp_path / f"{name}, many")} for name, case in cases.items()]
    all_well(launch(many, processes))
    for name in cases:
        same_bits(tmp_path / name, tmp_path / f"{name}, many")


def counting(shard: Any, into: list[int]) -> Any:
    """``FactorStage._shard``, and which shards it was called for."""

    def counted(self: Any, index: int, *rest: Any) -> Any:
        into.append(index)
        return shard(self, index, *rest)

    return counted


@pytest.mark.slow
@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_killed_scan_goes_on_with_another_number_of_processes(
    killed_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FEW, "directions_per_layer": 1, "shards": 5}
    monkeypatch.setenv("KILLED_RANK", str(killed_rank))
    whole = job("transformer", tmp_path / "whole", options=options)
    run_job(whole)
    for processes in (1, 3):
        out = tmp_path / f"then {processes}"
        begun = launch([{**whole, "out": str(out), "setup": "killed"}], 2)
        assert begun[killed_rank][0] == -9
        assert begun[1 - killed_rank][0] == 1
        assert "process" in begun[1 - killed_rank][1]
        assert not (out / "report.json").exists()
        if processes > 1:
            all_well(launch([{**whole, "out": str(out)}], processes))
        else:
            summed: list[int] = []
            with monkeypatch.context() as patch:
                patch.setattr(FactorStage, "_shard", counting(FactorStage._shard, summed))
                run_job({**whole, "out": str(out)})
            # The first round is kept, and of the second those layers that were written.
            assert summed == [2, 3, 4]
        same_bits(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ("failing", "process 1 of 2 failed: ValueError: made to fail"),
        ("failing_rays", "process 1 of 2 failed: OSError: [Errno 28] No space left on device"),
        ("other_weights", "process 1 of 2 failed: ValueError: out: "),
    ],
)
def test_who_fails_is_named_and_nobody_hangs(setup: str, said: str, tmp_path: Path) -> None:
    options = {**FEW, "shards": 3}
    broken = job("mlp", tmp_path / "out", options=options, setup=setup)
    (first, text), (second, other) = launch([broken], 2, timeout=100)
    assert first == second == 1
    assert f"RankError: {said}" in text, text
    assert "RankError" not in other, other
    if setup == "other_weights":
        assert "model was" in other
        return
    # What is there can be gone on with.
    run_job(job("mlp", tmp_path / "out", options=options))
    run_job(job("mlp", tmp_path / "whole", options=options))
    same_bits(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_a_busy_one(tmp_path: Path) -> None:
    broken = job("mlp", tmp_path / "out", options={**NONE, "shards": 2}, setup="failing_while_busy")
    (first, text), (second, other) = launch([broken], 2, timeout=100)
    assert first == second == 1
    # Whether the reason still arrives depends on how soon the other process is gone.
    lost = "RankError: process 0 of 2 lost another one, whose own output says why"
    assert lost in text or "RankError: process 1 of 2 failed: ValueError: made" in text, text
    assert "ValueError: made to fail" in other, other


# ----------------------------------------------------------------------------------- sharded models


def near(one: Path, other: Path) -> None:
    """Reports equal to 1e-6 of their numbers, and spectra to 1e-6 of the largest eigenvalue."""
    for where, a, b in differences(report_of(one), report_of(other)):
        # Modules that gather their own weights do not share inputs.
        if "shares_inputs_with" in where or ".cost." in where:
            continue
        assert isinstance(a, float) and isinstance(b, float), (where, a, b)
        assert a == pytest.approx(b, rel=1e-6, abs=1e-12), where
    a, b = load_file(one / "spectra.safetensors"), load_file(other / "spectra.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= 1e-6 * float(a[name].abs().max()), name


@pytest.mark.slow
@pytest.mark.parametrize("units", ["blocks", "everything"])
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_fully_sharded_models_give_the_factors_of_whole_ones(
    units: str, fisher: str, tmp_path: Path
) -> None:
    """Three shards (2, 2, 1): a process without a shard has to run along."""
    options = {**NONE, "shards": 3, "fp64_up_to": 0, "fisher": fisher}
    whole = job("transformer", tmp_path / "whole", dtype="float64", options=options)
    run_job(whole)
    all_well(launch([{**whole, "out": str(tmp_path / "spread"), "sharded": units}], 2))
    near(tmp_path / "whole", tmp_path / "spread")
    if units == "blocks":
        same_bits(tmp_path / "whole", tmp_path / "spread")


@pytest.mark.slow
@pytest.mark.parametrize("units", ["blocks", "everything", "by hand"])
def test_small_sharded_models_are_gathered(units: str, tmp_path: Path) -> None:
    """Nothing tells their scan, rays included, from that of a whole model."""
    whole = job("transformer", tmp_path / "whole", options={**FEW, "shards": 2})
    run_job(whole)
    all_well(launch([{**whole, "out": str(tmp_path / "spread"), "sharded": units}], 2))
    same_bits(tmp_path / "whole", tmp_path / "spread")


@pytest.mark.slow
def test_large_sharded_models_have_no_rays_and_say_so(tmp_path: Path) -> None:
    large = job(
        "transformer", tmp_path / "out", sharded="blocks",
        options={**FEW, "fp64_up_to": 0, "shards": 2},
    )  # fmt: skip
    all_well(launch([large], 2))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(layer["directions"] == [] for layer in report["layers"])
    assert any("no rays: the model is sharded" in note for note in report["notes"])


@pytest.mark.slow
def test_a_process_that_fails_in_a_sharded_pass_ends_the_others(tmp_path: Path) -> None:
    """They wait for its part of the weights, so they hear nothing before it is gone."""
    broken = job(
        "transformer", tmp_path / "out", sharded="blocks", setup="failing",
        options={**NONE, "fp64_up_to": 0, "shards": 2},
    )  # fmt: skip
    (first, text), (second, other) = launch([broken], 2, timeout=100)
    assert first == second == 1
    assert "RankError: process 0 of 2 lost another one in the middle of a pass" in text, text
    assert "ValueError: made to fail" in other, other


@pytest.mark.slow
def test_tensor_parallel_models_are_refused(tmp_path: Path) -> None:
    large = job(
        "transformer", tmp_path / "out", sharded="by hand", options={**NONE, "fp64_up_to": 0}
    )
    for code, text in launch([large], 2):
        assert code == 1
        assert "ValueError: model: " in text
        assert "expected fully_shard" in text
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------- layers that some shards skip


class Switch(nn.Module):
    """One of two maps, by the sign of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x) if float(x.sum()) > 0 else self.second(x)
        return self.head(torch.tanh(h))


def test_layers_that_a_shard_does_not_use_count_as_zero(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Switch().double().eval()
    data = [torch.randn(4, 3).double().abs() * sign for sign in (1, 1, -1, 1, -1)]
    options = {"likelihood": "categorical", "fisher": "exact"}
    dd.scan(model, data, out=tmp_path / "out", shards=5, **NONE, **options)
    found = factors_of(tmp_path / "out")
    whole = dd.kron_factors(model, data, **options)
    for k, name in enumerate(("first", "head", "second")):
        for kind, value in (("A", whole[name].A_sum), ("G", whole[name].G_sum)):
            assert torch.allclose(found[f"{k}: {kind}/{name}"], value, rtol=1e-12, atol=1e-14)
    layers = {x["name"]: x for x in report_of(tmp_path / "out")["layers"]}
    assert layers["first"]["samples"] == layers["second"]["samples"] == 20
    assert layers["first"]["rows"] == 12
    assert layers["second"]["rows"] == 8
    assert not any("not used" in n for n in report_of(tmp_path / "out")["notes"])


def test_uneven_batches_are_dealt_once(tmp_path: Path) -> None:
    """Whatever the shards, every sample is summed once: A is the mean of a aᵀ."""
    model, data = mlp()
    rows = torch.cat(data).double()
    dd.scan(model, data, out=tmp_path / "out", shards=2, **NONE)
    packed = factors_of(tmp_path / "out")["0: A/0"]
    row, column = torch.tril_indices(5, 5)
    assert torch.allclose(packed, (rows.mT @ rows)[row, column], rtol=1e-12, atol=1e-14)
