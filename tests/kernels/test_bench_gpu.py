"""The GPU benchmark, run whole in the interpreter: it is not first executed on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("bench", reason="the source archive leaves bench out")

from bench import gpu, gpu_step
from bench.cases import TINY
from bench.gpu_checks import has_kernel
from bench.gpu_device import Interpreter
from bench.problems import PROBLEMS
from deaddir_fast.optim import DDCAdam

pytestmark = pytest.mark.interp

STEPS = {"ddcadam_step", "ddcadam_step_captured"}
KERNELS = {name for name, problem in PROBLEMS.items() if has_kernel(problem)}


def run(path: Path, *options: str) -> tuple[int, dict]:
    status = gpu.main(["--check", "--worker", "--no-tests", f"--out={path}", *options])
    return status, json.loads(path.read_text())


def test_the_command(tmp_path):
    path = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--check", "--only=gram_packed", f"--out={path}"],
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["complete"]
    assert found["tests"]["verdict"] == "ok"
    assert "times mean nothing" in done.stdout


def test_every_kernel_is_checked_and_timed(tmp_path):
    status, found = run(tmp_path / "found.json")
    assert status == 0
    assert found["complete"] and not found["failures"]
    assert {check["problem"] for check in found["checks"]} == KERNELS
    assert {check["what"] for check in found["checks"]} == {"values", "strided inputs", "opcheck"}
    ours = {row["problem"]: row for row in found["rows"] if row["implementation"] == "ours"}
    assert ours.keys() == {case.problem for case in TINY} & KERNELS | STEPS
    assert all(row["gate"] == "ok" and row["p50"] > 0 for row in found["rows"])
    assert any(row["implementation"].startswith("torch.compile") for row in found["rows"])


def test_a_wrong_step_is_red_and_not_timed(monkeypatch):
    def longer(gauges):
        options = {**gpu_step.OPTIONS, "lr": 1.001 * gpu_step.OPTIONS["lr"]}
        return lambda model, capturable: DDCAdam(model, gauges=gauges, foreach=True, **options)

    def refusing(**options):
        def make(model, capturable):
            if options.get("fused"):
                raise RuntimeError("planted")
            return plain(**options)(model, capturable)

        return make

    plain = gpu_step.adamw
    monkeypatch.setattr(gpu_step, "ours", longer)
    monkeypatch.setattr(gpu_step, "adamw", refusing)
    found = gpu_step.rows(Interpreter(), {}, captured=True, tiny=True)
    gates = {row["implementation"]: row["gate"] for row in found}
    assert "above" in gates.pop("ours")
    assert gates == {
        "DDCAdam(foreach=True)": "ok",
        "AdamW(fused=True)": "RuntimeError: planted",
    }
    assert [row["implementation"] for row in found if "p50" in row] == ["DDCAdam(foreach=True)"]


def test_the_model_that_is_stepped():
    model, gauges, _ = gpu_step.problem(False, "cpu")
    how = {claim.treatment for claim in DDCAdam(model, gauges=gauges).claims}
    assert any("frame" in x for x in how) and any("second moment shared" in x for x in how)
    with torch.device("meta"):
        full = gpu_step.Transformer(gpu_step.FULL)
    assert 25e6 < sum(p.numel() for p in full.parameters()) < 27e6


def test_a_wrong_kernel_is_red_and_stops_nothing(tmp_path, monkeypatch, capsys):
    gram = PROBLEMS["gram"]
    monkeypatch.setitem(PROBLEMS, "gram", replace(gram, ours=lambda x: gram.ours(x) * 1.001))
    status, found = run(tmp_path / "found.json", "--only=gram")
    assert status == 1
    gates = {r["problem"]: r["gate"] for r in found["rows"] if r["implementation"] == "ours"}
    assert "above" in gates.pop("gram")
    assert gates == {"gram_packed": "ok", "gram_update": "ok"}
    assert "RED  gram " in capsys.readouterr().out


def test_a_red_check_marks_the_rows_of_its_operation(tmp_path, monkeypatch):
    gram = PROBLEMS["gram"]
    by_samples = lambda x: gram.ours(x) * (1 if x.shape[0] == 33 else 2)  # noqa: E731
    monkeypatch.setitem(PROBLEMS, "gram", replace(gram, ours=by_samples))
    status, found = run(tmp_path / "found.json", "--only=gram")
    assert status == 1
    row = next(r for r in found["rows"] if r["problem"] == "gram" and r["route"] == "Triton")
    assert row["gate"].endswith("is red")


def test_a_failing_step_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(self, problem):
        raise RuntimeError("planted")

    monkeypatch.setattr(gpu.Run, "check", broken)
    status, found = run(tmp_path / "found.json", "--only=gram")
    assert status == 1
    assert {failure["message"] for failure in found["failures"]} == {"RuntimeError: planted"}
    assert {row["problem"] for row in found["rows"]} == {"gram", "gram_packed", "gram_update"}


def test_a_device_that_dies_is_left_and_the_rest_resumed(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    monkeypatch.setattr(Interpreter, "alive", lambda self: False)
    with pytest.raises(SystemExit) as end:
        run(path, "--only=gram_packed")
    assert end.value.code == gpu.RESTART
    assert json.loads(path.read_text())["rows"] == []
    monkeypatch.undo()
    status, found = run(path, "--only=gram_packed", "--resume")
    assert status == 1
    assert [failure["step"] for failure in found["failures"]] == ["ceilings"]
    assert {row["problem"] for row in found["rows"]} == {"gram_packed"}


def test_a_process_that_dies_is_resumed_after_the_step(tmp_path, monkeypatch):
    path = tmp_path / "found.json"
    monkeypatch.setattr(
        gpu.Run, "check", lambda self, problem: (_ for _ in ()).throw(SystemExit(9))
    )
    with pytest.raises(SystemExit):
        run(path, "--only=gram_packed")
    monkeypatch.undo()
    status, found = run(path, "--only=gram_packed", "--resume")
    assert status == 1
    assert [failure["step"] for failure in found["failures"]] == ["checks of gram_packed"]
    assert {row["problem"] for row in found["rows"]} == {"gram_packed"}


def test_what_does_not_fit_in_the_budget_is_listed(tmp_path):
    status, found = run(tmp_path / "found.json", "--budget=0")
    assert status == 0
    assert not found["complete"] and not found["rows"]
    assert len(found["not_run"]) > len(KERNELS)


def test_checks_that_take_too_long_are_cut_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CHECKS", -1.0)
    status, found = run(tmp_path / "found.json", "--only=gram_packed")
    assert status == 0
    assert found["checks"] == []
    assert any(note.endswith("checks of gram_packed") for note in found["not_run"])


def test_an_alarm_interrupts_a_step():
    with pytest.raises(gpu.OutOfTime), gpu.alarm(0.05):
        while True:
            pass
