"""The training comparison: its data, a run that is killed, and a report that says what was run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("bench", reason="the source archive leaves bench out")
pytest.importorskip("sklearn")

from bench import results
from bench.train import checkpoint, compare, data, report, run
from bench.train.__main__ import main
from bench.train.optimizers import RECIPES, state_bytes
from bench.train.outcome import drift, is_readable
from bench.train.problems import PROBLEMS, quick

ROOT = results.ROOT


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- the data


def test_the_poem_is_whole_and_plain():
    raw = data.POEM.read_bytes()
    text = raw.decode("ascii")
    assert len(text) == 289_640
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert set(text) == set(letters) | set("\n !&'(),-.:;?")
    assert text.startswith(
        "PARADISE LOST\nBOOK I.\n\n  Of Mans First Disobedience, and the Fruit\n"
    )
    assert text.endswith("     THE END OF THE SEVENTH BOOK.\n")
    assert not any(line.endswith(" ") for line in text.split("\n"))
    assert "gutenberg" not in text.lower()
    assert "289,640" in (data.POEM.parent / "README.md").read_text()


def test_windows_are_of_the_text_and_held_out_ones_of_its_end():
    text = data.poem(64)
    whole = data.POEM.read_text()
    assert "".join(text.alphabet[i] for i in [*text.train[:50], *text.held[-50:]]) == (
        whole[:50] + whole[-50:]
    )
    assert len(text.train) + len(text.held) == len(whole)
    x, y = text.batch(5, torch.Generator().manual_seed(3))
    assert x.shape == y.shape == (5, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for held, part in ((False, text.train), (True, text.held)):
        x, y = text.fixed(held, 7)
        assert torch.equal(x[0], part[:64])
        assert torch.equal(y[-1], part[-64:])


def test_no_image_is_in_both_parts():
    images = data.digits()
    assert len(images.x) == 1400
    assert len(images.held_x) == 397
    assert 0 <= float(images.x.min()) <= float(images.x.max()) == 1
    held = {tuple(x.tolist()) for x in images.held_x}
    # scikit-learn's set has no two equal images
    assert not held & {tuple(x.tolist()) for x in images.x}


def test_the_source_archive_leaves_the_data_out():
    import tomllib

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert "bench" in build["sdist"]["exclude"]
    assert not any("bench" in path for path in build["wheel"]["packages"].values())


# ---------------------------------------------------------------------------- networks and loss


def test_attention_is_causal_and_like_a_written_out_one():
    torch.manual_seed(0)
    from bench.train.models import Attention

    layer = Attention(8, 2, bias=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = torch.zeros_like(x)
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        q, k, v = (f(x)[..., part] for f in (layer.q, layer.k, layer.v))
        scores = q @ k.mT / 2
        scores[:, *torch.triu_indices(5, 5, 1)] = -math.inf
        y[..., part] = scores.softmax(-1) @ v
    torch.testing.assert_close(layer(x), layer.o(y))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoders_see_no_later_character_and_have_about_a_million_parameters(name):
    problem = PROBLEMS[name]
    model = problem.model(0)
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    x, _ = problem.sample(0, 0)
    other = x[:2].clone()
    other[:, 40:] = (other[:, 40:] + 1) % 65
    with torch.no_grad():
        a, b = model(x[:2]), model(other)
    assert a.shape == (2, 64, 65)
    torch.testing.assert_close(a[:, :40], b[:, :40])
    assert not torch.allclose(a[:, 40:], b[:, 40:])


def test_the_loss_is_zero_at_its_least():
    problem = PROBLEMS["mlp"]
    y = torch.arange(10)
    best = (0.9 * F.one_hot(y, 10) + 0.01).log().double()
    assert abs(float(problem.loss(best, y))) < 1e-12
    assert float(problem.loss(best + 0.1 * torch.randn(10, 10), y)) > 0
    # without smoothing it is the cross entropy
    text, logits = PROBLEMS["llama"], torch.randn(2, 3, 65)
    targets = torch.randint(65, (2, 3))
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(text.loss(logits, targets), expected)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_a_moved_start_is_another_point_of_the_same_function(name):
    problem = quick(PROBLEMS[name])
    here, there = problem.model(1), problem.moved(1)
    x, _ = problem.sample(0, 0)
    with torch.no_grad():
        torch.testing.assert_close(
            here.double()(_double(x)), there.double()(_double(x)), rtol=1e-4, atol=1e-5
        )
    far = max(
        (p / q - 1).abs().max().item()
        for p, q in zip(there.parameters(), here.parameters(), strict=True)
        if bool((q != 0).all())
    )
    assert far > 0.3


def test_in_fp64_ddcadam_follows_a_moved_start_and_adamw_does_not():
    problem = PROBLEMS["conv"]
    x, _ = problem.data().fixed(False, 100)

    def gap(optimizer):
        here, there = problem.model(0).double(), problem.model(0).double()
        state = {k: v.detach() for k, v in here.named_parameters()}
        generator = torch.Generator().manual_seed(1)
        for gauge in problem.gauges():
            if gauge.name.startswith("rescaling"):
                state = gauge.act(state, gauge.random_element(generator))
        there.load_state_dict(state)
        for model in (here, there):
            optimizers = RECIPES[optimizer].make(model, 0.01, problem.gauges())
            for step in range(100):
                images, labels = problem.sample(0, step)
                run.take_step(problem, model, optimizers, (images.double(), labels))
        with torch.no_grad():
            a, b = here(x.double()), there(x.double())
        return float((a - b).abs().max() / a.abs().max())

    assert gap("DDCAdam") < 1e-12
    assert gap("AdamW") > 1e-3


def _double(x):
    return x.double() if x.is_floating_point() else x


# --------------------------------------------------------------------------------- one training


@pytest.mark.parametrize("optimizer", list(RECIPES))
def test_a_training_goes_on_bit_for_bit(optimizer, tmp_path):
    problem = quick(PROBLEMS["llama"])
    which = run.spec(problem, optimizer, 1e-3, 0)
    straight = run.train(problem, which, tmp_path / "straight")

    class Stop(Exception):
        pass

    steps = 0

    def stop(done):
        nonlocal steps
        steps += done
        if steps == 8:
            raise Stop

    with pytest.raises(Stop):
        run.train(problem, which, tmp_path / "stopped", stop)
    (kept,) = (tmp_path / "stopped").iterdir()
    assert kept.suffix == ".safetensors"
    resumed_at = []
    assert run.train(problem, which, tmp_path / "stopped", resumed_at.append) == straight
    assert resumed_at[0] > 1  # not from the start
    a, b = (run.trained(problem, which, tmp_path / f) for f in ("straight", "stopped"))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    # a finished training is read, not run
    assert run.train(problem, which, tmp_path / "stopped", pytest.fail) == straight


CHILD = """
import sys, time, torch
from pathlib import Path
from bench.train import run
from bench.train.problems import PROBLEMS, quick
torch.set_num_threads(1)
problem = quick(PROBLEMS["mlp"])
which = run.spec(problem, "AdamW", 1e-3, 0)
run.train(problem, which, Path(sys.argv[1]), lambda steps: time.sleep(0.2))
"""


def test_a_training_killed_half_way_goes_on(tmp_path):
    problem = quick(PROBLEMS["mlp"])
    which = run.spec(problem, "AdamW", 1e-3, 0)
    killed = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(killed)], cwd=ROOT)
    try:
        kept = killed / f"{which.name}.safetensors"
        end = time.monotonic() + 120
        while not kept.exists() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        assert child.poll() is None, "it ended before it could be killed"
        assert kept.exists()
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert not (killed / f"{which.name}.json").exists()
    assert 0 < checkpoint.load(kept)["step"] < which.steps
    assert run.train(problem, which, killed) == run.train(problem, which, tmp_path / "straight")


def test_checkpoints_keep_containers_and_keys(tmp_path):
    content = {
        0: {"step": torch.tensor(3.0), "rows": [torch.arange(3), None], "betas": (0.9, 0.999)},
        "name": "x",
        (1, 2): True,
    }
    checkpoint.save(tmp_path / "c.safetensors", content)
    found = checkpoint.load(tmp_path / "c.safetensors")
    assert list(found) == [0, "name", (1, 2)]
    assert found[0]["betas"] == (0.9, 0.999)
    assert torch.equal(found[0]["rows"][0], torch.arange(3))
    assert found[0]["rows"][1] is None
    with pytest.raises(TypeError, match="set cannot be saved"):
        checkpoint.save(tmp_path / "d.safetensors", {"a": {1}})
    assert not (tmp_path / "d.safetensors").exists()


def test_a_training_that_diverges_says_so(tmp_path):
    problem = quick(PROBLEMS["mlp"])
    found = run.train(problem, run.spec(problem, "SGD", 1e30, 0), tmp_path)
    assert found["diverged"]
    assert found["steps"] < problem.steps
    assert compare.final(found) == math.inf


def test_the_rate_warms_up_and_falls():
    rates = [run.factor(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == max(rates) == 1
    assert rates[-1] == pytest.approx(run.LAST)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_batches_are_the_same_for_every_optimizer_and_differ_by_seed():
    problem = PROBLEMS["llama"]
    again, other, later = problem.sample(0, 5), problem.sample(1, 5), problem.sample(0, 6)
    assert torch.equal(problem.sample(0, 5)[0], again[0])
    assert not torch.equal(other[0], again[0])
    assert not torch.equal(later[0], again[0])


# ----------------------------------------------------------------------- optimizers and outcome


@pytest.mark.parametrize(("optimizer", "times"), [("AdamW", 2), ("SGD", 1)])
def test_state_is_counted(optimizer, times):
    problem = quick(PROBLEMS["mlp"])
    model = problem.model(0)
    optimizers = RECIPES[optimizer].make(model, 1e-3, [])
    assert state_bytes(optimizers, model) == 0
    run.take_step(problem, model, optimizers, problem.sample(0, 0))
    size = sum(p.numel() for p in model.parameters())
    counters = 4 * len(list(model.parameters())) if optimizer == "AdamW" else 0
    assert state_bytes(optimizers, model) == 4 * times * size + counters


def test_muon_gets_the_hidden_matrices():
    model = quick(PROBLEMS["gpt2"]).model(0)
    muon, rest = RECIPES["Muon"].make(model, 1e-3, [])
    names = {id(p): name for name, p in model.named_parameters()}
    got = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert got == {
        f"blocks.0.{name}.weight"
        for name in ("attention.q", "attention.k", "attention.v", "attention.o", "feed.0", "feed.2")
    }
    assert got.isdisjoint(names[id(p)] for p in rest.param_groups[0]["params"])
    assert len(got) + len(rest.param_groups[0]["params"]) == len(names)


def test_drift_of_a_network_that_moved_along_its_gauge():
    """w1 -> 2 w1, w2 -> w2 / 2 moves |w1|² - |w2|², and staying where it was does not."""
    problem = dataclasses.replace(
        quick(PROBLEMS["mlp"]),
        build=lambda: nn.Sequential(
            nn.Linear(64, 5, bias=False), nn.ReLU(), nn.Linear(5, 10, bias=False)
        ),
    )
    model = problem.model(0)
    assert drift(problem, model, 0)["largest"] == 0
    first, second = (w.detach().double().clone() for w in model.parameters())
    with torch.no_grad():
        model[0].weight *= 2
        model[2].weight /= 2
    rows, columns = (first**2).sum(1), (second**2).sum(0)
    moved = (4 * rows - columns / 4) - (rows - columns)
    expected = moved.norm() / (4 * rows + columns / 4).norm()
    found = drift(problem, model, 0)
    assert found["largest"] == pytest.approx(float(expected), rel=1e-6)


def test_which_layers_are_readable():
    layer = {"verdict": "resolved", "directions": [{"part": "outputs"}, {"part": "live"}]}
    assert is_readable(layer)
    assert not is_readable(layer | {"verdict": "rays unresolved: output direction"})
    assert not is_readable(layer | {"directions": [{"part": "live"}]})
    assert not is_readable(layer | {"directions": []})


# ------------------------------------------------------------------------------------ the report


def test_verdicts():
    def row(*train):
        return {"train": list(train)}

    adamw = row(1.0, 1.5, 1.25)
    assert report.verdict(adamw, row(0.75, 1.25, 1.75)).startswith(
        "reaches AdamW's training loss: 1.25 against 1.25, +0.0 %, no higher in 2 of 3"
    )
    assert report.verdict(adamw, row(2.0, 2.75, 2.75)) == (
        "does not reach AdamW's training loss: 2.5 against 1.25, +100.0 %, "
        "no higher in 0 of 3 seeds"
    )
    close = report.verdict(adamw, row(1.125, 1.625, 1.375))
    assert "does not reach AdamW's training loss, by less than AdamW's own seeds differ" in close
    assert "it diverged" in report.verdict(adamw, row(0.9, None, 1.3))
    assert "where AdamW diverged" in report.verdict(row(1.0, None, 1.0), row(0.9, 1.0, 1.3))


def test_a_quick_comparison_reports_its_runs(tmp_path, capsys):
    arguments = ["--quick", "--problems", "mlp", "--optimizers", "AdamW", "DDCAdam"]
    arguments += ["--out", str(tmp_path), "--results", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    content = results.read(tmp_path / "r.json")
    assert report.markdown(content) in said
    assert "`mlp`: DDCAdam" in said
    assert (tmp_path / "quick" / "figure.png").read_bytes().startswith(b"\x89PNG")
    files = [json.loads(p.read_text()) for p in (tmp_path / "quick" / "runs").glob("*.json")]
    assert len(files) == 2 * (2 + 1 + 1)  # rates, another seed, a moved start

    def end(optimizer, **which):
        (found,) = (
            f["curve"][-1]
            for f in files
            if f["spec"] | which | {"optimizer": optimizer} == f["spec"]
        )
        return found

    for row in content["rows"]:
        name, lr = row["optimizer"], row["lr"]
        tried = {g["lr"]: g["train"] for g in row["grid"]}
        assert list(tried) == list(RECIPES[name].grid[1:3])
        assert tried[lr] == min(tried.values())
        for rate, loss in tried.items():
            assert loss == pytest.approx(end(name, lr=rate, seed=0, moved=False)["train"], rel=1e-5)
        for part in ("train", "held"):
            ends = [end(name, lr=lr, seed=s, moved=False)[part] for s in (0, 1)]
            assert row[part] == pytest.approx(ends, rel=1e-5)
            assert f"{statistics.fmean(ends):.4f} ({min(ends):.4f}–" in said
        assert row["moved"] == pytest.approx(end(name, lr=lr, moved=True)["train"], rel=1e-5)
        assert row["scan"]["layers"] == 3
        assert row["scan"]["readable"] + len(row["scan"]["reasons"]) == 3
    # a second call runs nothing: the files stay as they are
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "quick" / "runs").iterdir()}
    assert main(arguments) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "quick" / "runs").iterdir()}


@pytest.mark.slow
def test_workers_give_what_one_process_gives(tmp_path):
    def found(jobs):
        plan = compare.Plan(("mlp",), ("AdamW", "SGD"), 2, 2, 2, True, tmp_path / str(jobs), jobs)
        return [
            {k: row[k] for k in ("lr", "grid", "train", "held", "curves", "moved", "drift", "scan")}
            for row in compare.compare(plan, progress=False)["rows"]
        ]

    assert found(2) == found(1)


PARENT = """
import sys
from pathlib import Path
from bench.train.compare import Plan, compare
if __name__ == "__main__":
    compare(Plan(("gpt2",), ("AdamW",), 5, 1, 1, False, Path(sys.argv[1]), 2), progress=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")], env=env)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    end = time.monotonic() + 300
    try:
        while not list(tmp_path.glob("out/runs/*.safetensors")) and time.monotonic() < end:
            assert parent.poll() is None
            time.sleep(0.1)
        workers = [Path(f"/proc/{pid}") for pid in children.read_text().split()]
        assert len(workers) >= 2
    finally:
        parent.kill()
        parent.wait()
    while any(worker.exists() for worker in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(worker.exists() for worker in workers)


def test_readme_is_what_the_committed_results_generate():
    text = report.README.read_text()
    marked = report.MARKED.findall(text)
    assert marked
    for name in marked:
        assert (ROOT / name).is_file()
    assert report.rewritten(text) == text
