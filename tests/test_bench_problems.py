"""What the benchmarks measure is what the operations mean: every formulation against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bench", reason="the source archive leaves bench out")

from bench import accuracy
from bench.cases import CPU, GPU, NAMES, Case
from bench.measure import OURS, Measured, against_bound, implementations
from bench.problems import PROBLEMS
from bench.timing import Race, hopeless
from deaddir_fast.ops._registry import TABLE


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_implementation_agrees_with_fp64(name, dtype):
    measured = Measured(Case(name, PROBLEMS[name].small[0], dtype), threads=1)
    found = {name: gate.problem for name, gate in measured.gates.items()}
    assert found == dict.fromkeys(found, "")
    assert found.keys() <= implementations(PROBLEMS[name]).keys()
    assert len(found) > 1


def test_every_operation_is_measured():
    measured = {case.of.op for case in CPU}
    assert {name for name, _ in TABLE} - measured == {"gram_packed_"}
    for cases in (CPU, GPU):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert case.sizes.keys() - {"t"} <= case.of.small[0].keys() | {"t"}
            assert case.of.flops(case.sizes) > 0


def test_error_is_infinite_for_what_is_not_a_number_or_not_the_shape():
    truth = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    for by_element in (True, False):
        assert accuracy.error(truth.float(), truth, by_element=by_element) == 0
        assert accuracy.error(truth[:1], truth, by_element=by_element) == float("inf")
        wrong = torch.tensor([float("nan"), float("nan")])
        assert accuracy.error(wrong, truth, by_element=by_element) == float("inf")
    truth = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    result = torch.tensor([1.0, 2e-6], dtype=torch.float64)
    assert accuracy.error(result, truth, by_element=True) == pytest.approx(1.0)
    assert accuracy.error(result, truth, by_element=False) == pytest.approx(1e-6)


def test_a_wrong_result_is_not_timed(monkeypatch):
    problem = PROBLEMS["gram"]
    wrong = lambda x: x.mT @ x * 1.001  # noqa: E731
    monkeypatch.setitem(PROBLEMS, "gram", type(problem)(**{**vars(problem), "ours": wrong}))
    measured = Measured(Case("gram", problem.small[0]), threads=1)
    assert not measured.green
    measured.race.rounds(0.0)
    measured.race.others()
    rows = {row["implementation"]: row for row in measured.rows()}
    assert "p50" not in rows[OURS] and "above" in rows[OURS]["gate"]
    assert "p50" in rows["x.T @ x"]


def test_the_race_takes_turns_and_drops_the_hopeless(monkeypatch):
    assert hopeless({"a": 1.0, "b": 3.9, "c": 4.1}) == {"c"}
    assert hopeless({}) == set()
    order = []
    race = Race(
        ("ours", lambda: order.append("ours")),
        {name: (lambda name=name: order.append(name)) for name in "ab"},
    )
    monkeypatch.setattr("bench.timing.HOPELESS", 1e9)
    assert race.rounds(0.0, least=2) == 2
    assert race.samples == {"ours": [], "a": [], "b": []}
    order.clear()
    for _ in range(2):
        race.others()
        race.first()
    assert order == ["a", "b", "ours", "b", "a", "ours"]
    assert {name: len(s) for name, s in race.samples.items()} == {"ours": 2, "a": 2, "b": 2}


def test_the_share_is_that_of_the_higher_bound():
    ceilings = ({"fp32": 100.0, "fp64": 10.0}, 5.0)
    row = {"flops": 200.0, "bytes": 5.0, "dtype": "fp32", "p50": 4.0}
    against_bound(row, ceilings)
    assert (row["bound"], row["share"]) == ("arithmetic", 0.5)
    row = {"flops": 200.0, "bytes": 500.0, "dtype": "fp32", "p50": 400.0}
    against_bound(row, ceilings)
    assert (row["bound"], row["share"]) == ("memory", 0.25)
