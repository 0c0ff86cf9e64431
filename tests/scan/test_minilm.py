"""A trained LayerNorm transformer on real text, from the command line to the report."""

import math
from pathlib import Path

import pytest
from trained import minilm
from typer.testing import CliRunner

from deaddir_fast.scan.cli import app
from deaddir_fast.scan.scan_report import ScanReport

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_every_layer_norm_shows_its_kernel(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "scan"
    arguments = ["scan", str(minilm()), "--data", str(README), "--out", str(out), "--length", "48"]
    arguments += ["--ray-samples", "2", "--directions", "2", "--offline"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = ScanReport.read(out)
    assert report.data["totals"]["scanned"] >= 0.99 * report.data["totals"]["parameters"]
    assert report.data["data"]["tokens"] > 3000
    behind = [layer for layer in report.data["layers"] if layer["fed_by"] is not None]
    assert len(behind) == 6 * 4  # query, key, value and the first map of the MLP
    for layer in behind:
        (kernel,) = (d for d in layer["directions"] if d["label"].startswith("kernel γ⁻¹"))
        assert float(kernel["why"].rpartition(" ")[2]) >= 0.9999
        assert kernel["class"] == "algebraic" and math.isinf(kernel["order"])
        assert layer["dead"]["singular"] == 0 and layer["dead"]["algebraic"] > 0
    for layer in report.data["layers"]:
        # What is read as null is never called live, and only samples leave anything open.
        null = [d for d in layer["directions"] if d["part"] == "outputs"]
        assert all(d["class"] in ("algebraic", "data") for d in null)
        assert layer["verdict"] == "resolved" or "limited by samples" in layer["verdict"]
    words = next(x for x in report.data["layers"] if x["name"].endswith("word_embeddings"))
    assert words["dead"]["data"] > 25_000 * 384  # most of the vocabulary does not occur
    assert report.data["totals"]["lambda"]["upper"] < report.data["totals"]["parameters"] / 2
