"""The figures: what is found, what is written, and what a failure does."""

from __future__ import annotations

import json
import math
import sys
import types

import numpy as np
import pytest

pytest.importorskip("bench", reason="the source archive leaves bench out")
pytest.importorskip("matplotlib")

from bench import figures
from bench.figures import __main__ as command
from bench.figures import _make
from bench.figures.fluctuation import functional_variances
from deaddir_fast.scan.report import to_json


def strict(text):
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_every_module_is_a_figure():
    assert {"breakdown", "dead_direction", "fluctuation", "rate_chain"} <= set(figures.names())
    for name in figures.names():
        entry = figures.load(name)
        assert entry.name == name
        assert entry.caption
        assert callable(entry.measure)
        assert callable(entry.draw)
        assert len(entry.size) == 2


@pytest.fixture
def added(monkeypatch):
    """Figures that exist for one test only."""

    def add(name, measure, draw=lambda figure, measured: None):
        module = types.ModuleType(f"bench.figures.{name}", f"Caption of {name}.\n\nMore.")
        module.SIZE, module.measure, module.draw = (3, 2), measure, draw
        monkeypatch.setitem(sys.modules, module.__name__, module)
        known = figures.names()
        monkeypatch.setattr(figures, "names", lambda: (*known, name))

    return add


def test_numbers_survive_and_the_picture_comes_from_them(added, tmp_path):
    seen = {}
    content = {"a": [math.inf, math.nan, 0.1], "b": np.float64(1.5), "c": np.arange(3)}

    def draw(figure, measured):
        seen.update(measured)
        figure.subplots().plot(measured["c"])

    added("one", lambda quick: content | {"quick": quick}, draw)
    assert command.main(["one", "--out", str(tmp_path), "--quick"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "one.png", "one.svg"]
    written = strict((tmp_path / "one.json").read_text())
    assert written["caption"] == "Caption of one."
    assert written["quick"] is True
    assert written["machine"]["torch"]
    expected = {"a": ["inf", "nan", 0.1], "b": 1.5, "c": [0, 1, 2], "quick": True}
    assert written["measured"] == seen == expected
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_a_failure_leaves_the_others_and_says_so(added, tmp_path, capsys):
    def fails(quick):
        raise RuntimeError("no such measurement")

    def no_picture(figure, measured):
        raise RuntimeError("no picture")

    added("bad", fails)
    added("undrawn", lambda quick: {}, no_picture)
    added("good", lambda quick: {})
    assert command.main(["bad", "undrawn", "good", "--out", str(tmp_path)]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.json", "good.png", "good.svg"]
    said = capsys.readouterr().out
    assert "no such measurement" in said
    assert "2 failed: bad, undrawn" in said


def test_an_unknown_name_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["no_such_figure", "--out", str(tmp_path)])
    assert error.value.code == 2
    assert "no figure called 'no_such_figure'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_not_under_version_control():
    ignored = (command.ROOT / ".gitignore").read_text().splitlines()
    top = command.DEFAULT.relative_to(command.ROOT).parts[0]
    assert f"/{top}/" in ignored


def test_one_figure_from_end_to_end(tmp_path):
    assert command.main(["breakdown", "--quick", "--out", str(tmp_path)]) == 0
    measured = strict((tmp_path / "breakdown.json").read_text())["measured"]
    rows = {row["name"]: row for row in measured["rows"]}
    chain = rows["linear chain"]
    assert np.allclose(chain["slope"], 2 * (chain["order"] - 1), atol=1e-9)
    assert abs(rows["tanh chain"]["slope"][0] - 6) < 1e-3
    assert rows["tanh chain"]["slope"][-1] < 4  # bent
    assert rows["linear chain, 0.01 off"]["slope"][0] < 1  # a plateau
    assert abs(rows["linear chain, 0.01 off"]["fit"]["offset"] - 0.01) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.names())
def test_every_figure_quickly(name, tmp_path):
    path = _make.make(figures.load(name), tmp_path, quick=True)
    assert path.stat().st_size > 10_000


@pytest.mark.slow
def test_the_rate_chain_measures_its_predictions():
    for row in strict(to_json(figures.load("rate_chain").measure(True)))["rows"]:
        k = row["k"]
        assert row["verdicts"] == ["resolved"] * 3
        expected = [2 * (k - 1), -2 * (k - 1), -k / (2 * (k - 1))]
        assert np.allclose(row["slopes"], expected, atol=5e-3)


def test_functional_variance_of_the_regular_model():
    """k = 1: posterior N(x̄, 1/n), so Σ Var = Σ x_i²/n - 2 x̄² + x̄² + 1/(2n)."""
    x = np.random.default_rng(1).standard_normal((3, 400))
    mean = x.mean(1)
    expected = (x**2).mean(1) - mean**2 + 1 / (2 * 400)
    assert np.allclose(2 * functional_variances(1, x, 4001, True), expected, rtol=1e-9)
