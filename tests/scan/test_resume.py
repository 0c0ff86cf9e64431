"""Scans that are killed, run out of disk or memory, or meet a folder of something else."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scan_jobs import differences, factors_of, mlp, report_of, transformer
from torch import Tensor, nn
from typer.testing import CliRunner

import deaddir_fast as dd
from deaddir_fast.fisher import factors as saving
from deaddir_fast.fisher.kron import Pass
from deaddir_fast.scan import store as stores
from deaddir_fast.scan.cli import app
from deaddir_fast.scan.command import _order
from deaddir_fast.scan.factors import FactorStage
from deaddir_fast.scan.ranks import RankError
from deaddir_fast.scan.store import Store

OPTIONS: dict[str, Any] = {
    "directions_per_layer": 2,
    "radii": [0.01, 0.03, 0.1],
    "ray_samples": 2,
    "shards": 5,
    "progress": False,
}
NO_RAYS: dict[str, Any] = {"directions_per_layer": 0, "gauges": False, "progress": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that these tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(one: Path, other: Path) -> None:
    """Reports without times, sums and spectra, to the bit."""
    assert differences(report_of(one), report_of(other)) == []
    a, b = factors_of(one), factors_of(other)
    for name in a.keys() | b.keys():
        assert torch.equal(a[name], b[name]), name
    a, b = load_file(one / "spectra.safetensors"), load_file(other / "spectra.safetensors")
    for name in a.keys() | b.keys():
        assert torch.equal(a[name], b[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    """Every file there."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# ------------------------------------------------------------------------------------------ killed


class Killed(BaseException):
    """As good as a kill: nothing in the package catches it."""


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        (NO_RAYS, (1, 2, 5)),
        (NO_RAYS, (8, 13, 4)),
        (NO_RAYS, (9, 7, 3)),
        pytest.param(OPTIONS, (30, 6, 2, 1, 2, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_cut_off_while_writing_any_file(
    options: Any, stops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some renames never happen, and half-written files stay, as after a power cut."""
    model, data = mlp()
    options = {**OPTIONS, **options}
    out, replace = tmp_path / "out", os.replace
    for stop in stops:
        count = [0]

        def dying(a: Any, b: Any, at: int = stop, count: list[int] = count) -> None:
            count[0] += 1
            if count[0] == at:
                raise Killed
            replace(a, b)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(Killed):
                dd.scan(model, data, out=out, **options)
    dd.scan(model, data, out=out, **options)
    dd.scan(model, data, out=tmp_path / "whole", **options)
    same(tmp_path / "whole", out)
    assert [n for n in contents(out) if ".partial" in n] == []


SCAN = """
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
import deaddir_fast as dd
from scan_jobs import transformer
model, data = transformer()
print("begun", flush=True)
dd.scan(model, data, out={out!r}, **{options!r})
"""


def begin(out: Path) -> subprocess.Popen[str]:
    """A scan in a process of its own, up to where it begins."""
    tests = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", SCAN.format(tests=tests, out=str(out), options=OPTIONS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    model, data = transformer()
    start = time.perf_counter()
    dd.scan(model, data, out=tmp_path / "whole", **OPTIONS)
    took = time.perf_counter() - start
    moments, kills = random.Random(20), 0
    for _ in range(10):
        process = begin(tmp_path / "out")
        try:
            process.wait(moments.uniform(0.02, 0.25) * took)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 3
    process = begin(tmp_path / "out")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    same(tmp_path / "whole", tmp_path / "out")


def test_at_most_one_shard_is_summed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp()
    save, shard = Store.save_factors, FactorStage._shard
    summed: list[int] = []

    def counted(self: Any, index: int, *rest: Any) -> Any:
        summed.append(index)
        return shard(self, index, *rest)

    def dying(self: Any, index: int, factors: Any) -> None:
        save(self, index, factors)
        # In the third shard, when the first layer's sums are written and the others' are not.
        if factors.meta["shards"] == [0, 1, 2]:
            raise Killed

    monkeypatch.setattr(FactorStage, "_shard", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_factors", dying)
        with pytest.raises(Killed):
            dd.scan(model, data, out=tmp_path / "out", **{**OPTIONS, **NO_RAYS})
    assert summed == [0, 1, 2]
    dd.scan(model, data, out=tmp_path / "out", **{**OPTIONS, **NO_RAYS})
    assert summed == [0, 1, 2, 2, 3, 4]
    dd.scan(model, data, out=tmp_path / "whole", **{**OPTIONS, **NO_RAYS})
    same(tmp_path / "whole", tmp_path / "out")


def test_sums_of_another_version_or_a_torn_file_are_computed_again(tmp_path: Path) -> None:
    model, data = mlp()
    dd.scan(model, data, out=tmp_path / "whole", **{**OPTIONS, **NO_RAYS})
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    files = sorted(out.glob("state/factors/*/factors.safetensors"))
    raw = files[0].read_bytes()
    files[0].write_bytes(raw[: len(raw) // 2])
    version = torch.__version__.encode()
    raw = files[1].read_bytes()
    assert version in raw
    files[1].write_bytes(raw.replace(version, b"9" * len(version)))
    dd.scan(model, data, out=out, **{**OPTIONS, **NO_RAYS})
    same(tmp_path / "whole", out)


# ------------------------------------------------------------------------------------------- Ctrl-C


MODEL = """
import sys; sys.path.insert(0, {tests!r})
from scan_jobs import transformer
def make():
    return transformer()[0]
"""


@pytest.mark.slow
def test_interrupted_on_the_command_line(tmp_path: Path) -> None:
    import numpy as np

    tests = str(Path(__file__).resolve().parents[1])
    (tmp_path / "made.py").write_text(MODEL.format(tests=tests))
    np.save(tmp_path / "ids.npy", torch.cat(transformer()[1]).numpy())
    command = [
        sys.executable, "-c", "from deaddir_fast.scan.cli import main; main()", "scan",
        f"{tmp_path / 'made.py'}:make", "--data", str(tmp_path / "ids.npy"), "--out",
        str(tmp_path / "out"), "--batch", "4", "--ray-samples", "2", "-k", "3",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("state/layers/*.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; run the same command to go on\n"
    assert not (tmp_path / "out" / "report.json").exists()
    kept = contents(tmp_path / "out" / "state" / "layers")
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "report.json").exists()
    after = contents(tmp_path / "out" / "state" / "layers")
    assert {n: after[n] for n in kept} == kept


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    import numpy as np

    tests = str(Path(__file__).resolve().parents[1])
    (tmp_path / "made.py").write_text(MODEL.format(tests=tests))
    np.save(tmp_path / "ids.npy", torch.cat(transformer()[1]).numpy())
    program = tmp_path / "deaddir.py"
    program.write_text("from deaddir_fast.scan.cli import main\nmain()\n")
    arguments = [
        str(program), "scan", f"{tmp_path / 'made.py'}:make", "--data", str(tmp_path / "ids.npy"),
        "--batch", "4", "--shards", "3", "-k", "1", "--ray-samples", "1", "--device", "cpu",
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    for name, launcher in (("one", []), ("two", torchrun)):
        done = subprocess.run(
            [sys.executable, *launcher, *arguments, "--out", str(tmp_path / name)],
            capture_output=True, text=True, env=environment, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # The findings are printed once.
        assert len(re.findall("what was read", done.stdout)) == 1
    same(tmp_path / "one", tmp_path / "two")


def test_other_processes_failing_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deaddir_fast.scan import command

    def fails(*_: Any) -> None:
        raise RankError("process 1 of 2 failed: ValueError: no")

    monkeypatch.setattr(command, "run", fails)
    result = CliRunner().invoke(app, ["scan", "m", "--data", "d", "--out", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert result.output == "error: process 1 of 2 failed: ValueError: no\n"


# ------------------------------------------------------------------------------------------ no disk


@pytest.mark.parametrize("at", ["safetensors", "rename", "readings"])
def test_a_full_disk_leaves_what_can_be_gone_on_with(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = mlp()
    options = {**OPTIONS, **NO_RAYS}
    count = [0]

    def full(real: Any, after: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if at == "safetensors":
            patch.setattr(saving, "save_file", full(saving.save_file, 7))
        elif at == "rename":
            patch.setattr(os, "replace", full(os.replace, 9))
        else:
            patch.setattr(stores, "to_json", full(stores.to_json, 2))
        with pytest.raises(OSError, match="No space left"):
            dd.scan(model, data, out=tmp_path / "out", **options)
    assert count[0] > 0
    assert not [n for n in contents(tmp_path / "out") if ".partial" in n]
    dd.scan(model, data, out=tmp_path / "out", **options)
    dd.scan(model, data, out=tmp_path / "whole", **options)
    same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        model, data = mlp()
        save, filler = Store.save_factors, disk / "filler"

        def filling(self: Any, index: int, factors: Any) -> None:
            if factors.meta["shards"] == [0, 1] and not filler.exists():
                with open(filler, "wb") as file, pytest.raises(OSError, match="No space"):
                    while True:
                        file.write(b"\0" * 4096)
                        file.flush()
            save(self, index, factors)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "save_factors", filling)
            with pytest.raises(OSError, match=r"No space|space"):
                dd.scan(model, data, out=disk / "out", **OPTIONS)
        with pytest.raises(OSError, match="the scan needs"):
            dd.scan(model, data, out=disk / "out", **OPTIONS)
        filler.unlink()
        dd.scan(model, data, out=disk / "out", **OPTIONS)
        dd.scan(model, data, out=tmp_path / "whole", **OPTIONS)
        same(tmp_path / "whole", disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------------------------------- no memory


@pytest.mark.parametrize(("limit", "halved"), [(2, 1), (1, 2)])
def test_when_memory_runs_out_passes_get_smaller(
    limit: int, halved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = transformer()
    whole = dd.kron_factors(model.double(), data, fisher="mc", draws=2)
    add, seen = Pass.add, []

    def short(self: Any, batch: Any, first: int) -> None:
        if batch.n > limit:
            # When part of the work is done already.
            add(self, batch, first)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        seen.append(batch.n)
        add(self, batch, first)

    monkeypatch.setattr(Pass, "add", short)
    dd.scan(model, data, out=tmp_path / "out", draws=2, shards=2, **NO_RAYS)
    assert max(seen) == limit
    found = factors_of(tmp_path / "out")
    names = list(whole)
    for name, f in whole.items():
        leader = names.index(f.shares_inputs_with or name)
        pairs = [(f"{leader}: G/{name}", f.G_sum)]
        if f.shares_inputs_with is None:
            pairs += [(f"{leader}: A/{name}", f.A_sum), (f"{leader}: A_ones/{name}", f.A_ones)]
        for key, value in pairs:
            size = float(value.abs().max()) if value.numel() else 0.0
            assert torch.allclose(found[key], value, rtol=0, atol=1e-12 * size), key
    notes = report_of(tmp_path / "out")["notes"]
    assert f"memory ran out {halved} times: passes of {limit} samples" in notes


def test_one_sample_that_does_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = mlp()

    def short(self: Any, batch: Any, first: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Pass, "add", short)
    with pytest.raises(torch.OutOfMemoryError):
        dd.scan(model, data, out=tmp_path / "out", **NO_RAYS)


# ----------------------------------------------------------------------------------- other contents


def _more_data(model: nn.Module, data: list[Tensor]) -> dict[str, Any]:
    return {"batches": [*data, data[0]]}


def _other_data(model: nn.Module, data: list[Tensor]) -> dict[str, Any]:
    changed = data[1].clone()
    changed[0, 0] += 1e-6
    return {"batches": [data[0], changed, *data[2:]]}


def _other_model(model: nn.Module, data: list[Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    return {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_more_data, "data was"),
        (_other_data, "data was"),
        (_other_model, "model was"),
        (lambda *_: {"seed": 1}, "seed was 0, is 1"),
        (lambda *_: {"draws": 2}, "draws was 1, is 2"),
        (lambda *_: {"fisher": "exact"}, 'fisher was "mc", is "exact"'),
        (lambda *_: {"likelihood": "gaussian"}, "likelihood was"),
        (lambda *_: {"layers": ["0"]}, "layers was"),
        (lambda *_: {"shards": 2}, "shards was 5, is 2"),
        (lambda *_: {"sums": torch.float32}, 'dtype was "float64", is "float32"'),
        (lambda *_: {"fp64_up_to": 0}, 'activations was "float64", is "float32"'),
        (lambda *_: {"ray_samples": 1}, "ray_samples was"),
        (lambda *_: {"directions_per_layer": 1}, "directions_per_layer was 0, is 1"),
        (lambda *_: {"radii": [0.1]}, "radii was"),
    ],
)
def test_another_scan_in_the_folder_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    model, data = mlp()
    dd.scan(model, data, out=tmp_path / "out", **NO_RAYS)
    before = contents(tmp_path / "out")
    options = {**NO_RAYS, "batches": data, **change(model, data)}
    with pytest.raises(ValueError, match=r"out: .* holds a scan of something else") as caught:
        dd.scan(model, options.pop("batches"), out=tmp_path / "out", **options)
    assert named in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_resume_false_starts_again(tmp_path: Path) -> None:
    model, data = mlp()
    dd.scan(model, data, out=tmp_path / "out", **NO_RAYS)
    dd.scan(model, data[:2], out=tmp_path / "out", resume=False, **NO_RAYS)
    dd.scan(model, data[:2], out=tmp_path / "new", **NO_RAYS)
    same(tmp_path / "new", tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    model, data = mlp()
    for k, files in enumerate((["thesis.tex"], ["state/mine.txt"], ["report.json"], [".hidden"])):
        out = tmp_path / str(k)
        for name in files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("precious")
        before = contents(out)
        for resume in (True, False):
            with pytest.raises(ValueError, match=r"out: .*is not empty and holds no scan"):
                dd.scan(model, data, out=out, resume=resume, **NO_RAYS)
            assert contents(out) == before
    place = tmp_path / "file"
    place.write_text("precious")
    for resume in (True, False):
        with pytest.raises(ValueError, match="out: "):
            dd.scan(model, data, out=place, resume=resume, **NO_RAYS)
    assert place.read_text() == "precious"


@pytest.mark.parametrize("text", ["", "{", '{"schema": 99}', "[]", '"scan"', "\ufffd"])
def test_a_head_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    model, data = mlp()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scan.json").write_text(text)
    with pytest.raises(ValueError, match="out: "):
        dd.scan(model, data, out=tmp_path / "out", **NO_RAYS)
    assert (tmp_path / "out" / "scan.json").read_text() == text


def test_resume_false_does_not_remove_what_is_not_a_scan(tmp_path: Path) -> None:
    """A scan.json of another program, and its files."""
    model, data = mlp()
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    (out / "scan.json").write_text(json.dumps({"dpi": 300}))
    (out / "state" / "page.png").write_text("precious")
    before = contents(out)
    with pytest.raises(ValueError, match="out: "):
        dd.scan(model, data, out=out, resume=False, **NO_RAYS)
    assert contents(out) == before


def test_a_finished_scan_is_read_again_to_the_same_report(tmp_path: Path) -> None:
    model, data = mlp()
    options = {**OPTIONS, "directions_per_layer": 1}
    dd.scan(model, data, out=tmp_path / "out", **options)
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    dd.scan(model, data, out=tmp_path / "out", **options)
    same(tmp_path / "before", tmp_path / "out")


@pytest.mark.parametrize(
    ("order", "text"),
    [(float("inf"), "inf"), (2.0, "2"), (1.996, "2"), (1.5, "1.50"), (0.0, "0")],
)
def test_orders_in_the_table(order: float, text: str) -> None:
    assert _order(order) == text
