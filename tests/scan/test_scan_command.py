"""``deaddir scan`` from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from deaddir_fast.scan.cli import app

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.ln, self.head = nn.Embedding(30, 8), nn.LayerNorm(8), nn.Linear(8, 30)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.ln(self.emb(input_ids)))
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "floats.npy", rng.standard_normal((40, 6)).astype(np.float32))
    np.save(tmp_path / "ids.npy", rng.integers(0, 30, (24, 7)))
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["scan", *map(str, arguments)])
    return result.exit_code, result.output


def test_features_and_a_function(files):
    out = files / "s"
    code, said = run(
        f"{files}/nets.py:build", "--data", files / "floats.npy", "--out", out, "--explain"
    )
    assert code == 0, said
    assert "TFLOP" in said and "what was read" in said and "gram_packed" in said
    assert "report.html" in said
    report = json.loads((out / "report.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == ["0", "2"]
    assert report["data"]["samples"] == 40 and report["model"]["parameters"] == 53
    # The same command goes on: nothing is read again, the report is the same but for its times.
    code, _ = run(f"{files}/nets.py:build", "--data", files / "floats.npy", "--out", out)
    again = json.loads((out / "report.json").read_text())
    assert code == 0 and again["totals"] == report["totals"]


def test_tokens_layers_and_options(files):
    out = files / "s"
    code, said = run(
        f"{files}/nets.py:Words", "-d", files / "ids.npy", "-o", out, "-l", "head", "-k", 1,
        "--batch", 5, "--samples", 20, "--shards", 2, "--seed", 3,
    )  # fmt: skip
    assert code == 0, said
    report = json.loads((out / "report.json").read_text())
    (head,) = report["layers"]
    assert head["name"] == "head" and head["rows"] == 20 * 7 and len(head["directions"]) == 2
    assert report["data"]["shards"] == 2 and report["settings"]["seed"] == 3


def test_a_dry_run_loads_and_writes_nothing(files):
    code, said = run(
        f"{files}/nets.py:Words", "-d", files / "ids.npy", "-o", files / "s", "--dry-run"
    )
    assert code == 0 and "168 tokens" in said and not (files / "s").exists()
    assert "parameters" in said and "526" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("nowhere.py:build", "floats.npy"), "nowhere.py"),
        (("nets.py:nothing", "floats.npy"), "nothing"),
        (("nets.py:build", "none.npy"), "none.npy"),
        (("nets.py:build", "floats.npy", "--fisher", "guess"), "fisher"),
        (("nets.py:build", "floats.npy", "--layers", "no*"), "layers"),
        (("nets.py:build", "floats.npy", "--likelihood", "x"), "likelihood"),
    ],
)
def test_errors_name_what_is_wrong(files, arguments, said):
    model, data, *rest = arguments
    code, output = run(f"{files}/{model}", "-d", files / data, "-o", files / "s", *rest)
    assert code in (1, 2) and "error:" in output and said in output
    assert "Traceback" not in output


def test_fresh_removes_an_old_scan(files):
    out = files / "s"
    first = (f"{files}/nets.py:build", "-d", files / "floats.npy", "-o", out, "-k", 0)
    assert run(*first)[0] == 0
    code, said = run(*first, "--seed", 1)
    assert code == 2 and "seed was 0, is 1" in said
    assert run(*first, "--seed", 1, "--fresh")[0] == 0
