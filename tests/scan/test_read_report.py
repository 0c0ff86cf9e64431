"""report.json read back: numbers as they were, and every error names the file and the key."""

import copy
import json
import math

import numpy as np
import pytest
import scan_reports as made
from safetensors.numpy import save_file

from deaddir_fast.scan.read_report import ReportError, check, read


@pytest.fixture
def folder(tmp_path):
    return made.small(tmp_path / "scan")


def _content(folder):
    return json.loads((folder / "report.json").read_text())


def test_strings_become_numbers_and_names_stay_strings(folder):
    content = _content(folder)
    content["layers"][0]["name"] = "inf"
    content["layers"][0]["A"]["top"] = "nan"
    content["layers"][0]["A"]["bottom"] = None
    content["totals"]["lambda"] = {
        "lower": {"exact": "9/2", "value": 4.5},
        "upper": "inf",
        "verdict": "x",
    }
    found = check(content, "report.json")
    assert found["layers"][0]["name"] == "inf"
    assert math.isnan(found["layers"][0]["A"]["top"])
    assert math.isnan(found["layers"][0]["A"]["bottom"])
    assert found["totals"]["lambda"]["lower"] == 4.5
    assert found["totals"]["lambda"]["upper"] == math.inf
    orders = [d["order"] for d in found["layers"][1]["directions"]]
    assert orders == [math.inf, 2.0, math.inf]
    assert found["layers"][2]["directions"][0]["order"] is None


def test_layers_come_in_order_and_spectra_as_written(folder):
    content = _content(folder)
    content["layers"].reverse()
    (folder / "report.json").write_text(json.dumps(content))
    scan = read(folder)
    assert [layer["name"] for layer in scan.layers] == ["up", "middle", "down"]
    spectrum = scan.spectrum(scan.layers[1], "A")
    assert np.array_equal(spectrum, made.falling(7, 4, 2))


def test_shared_inputs_are_looked_up_where_they_are(folder):
    content = _content(folder)
    content["layers"][1]["shares_inputs_with"] = "up"
    (folder / "report.json").write_text(json.dumps(content))
    kept = {"A/up": made.falling(7, 4), "G/up": made.falling(4, 2)}
    save_file(kept, folder / "spectra.safetensors")
    scan = read(folder)
    assert np.array_equal(scan.spectrum(scan.layers[1], "A"), kept["A/up"])
    assert scan.spectrum(scan.layers[1], "G") is None
    assert scan.spectrum(scan.layers[2], "A") is None


def _paths(value, path=()):
    """Every key of the schema, lists by their first entry."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from _paths(value[0], (*path, 0))


def test_every_required_key_is_named_when_it_is_missing(folder):
    content = _content(folder)
    content["layers"] = content["layers"][1:2]
    content["skipped"] = [{"name": "s", "type": "S", "parameters": 1, "why": "w"}]
    content["gauges"] = [{"name": "g", "group": "G", "dimension": 1, "parameters": ["p"]}]
    free = {("settings",), ("versions",), ("cost", "seconds")}  # their keys are anybody's
    optional = {("data", "shards")}
    tried = 0
    for path in _paths(content):
        if path in optional or path in {("schema",), ("kind",)} or path[:-1] in free:
            continue
        broken = copy.deepcopy(content)
        parent = broken
        for step in path[:-1]:
            parent = parent[step]
        del parent[path[-1]]
        with pytest.raises(ReportError, match=rf"report\.json.*'{path[-1]}' is missing"):
            check(broken, "report.json")
        tried += 1
    assert tried > 90


@pytest.mark.parametrize(
    "path, value, says",
    [
        (("layers", 1, "depth"), -1, r"layers\[1\]\.depth: expected a whole number >= 0, got int"),
        (("layers", 0, "A", "rank"), 2.5, r"layers\[0\]\.A\.rank: expected a whole number"),
        (("layers", 0, "A", "top"), "big", r"layers\[0\]\.A\.top: expected a number"),
        (("layers", 0, "A", "form"), "round", r"A\.form: expected one of 'matrix'"),
        (("layers", 0, "bias"), 1, r"layers\[0\]\.bias: expected true or false"),
        (("layers", 1, "directions", 1, "class"), "odd", r"directions\[1\]\.class: expected one"),
        (("layers", 1, "directions", 1, "interval"), [1.0], r"interval: expected a list of 2"),
        (("layers", 1, "directions", 1, "kl"), [1.0], r"directions\[1\]\.kl: 1 values for 9 radii"),
        (("layers", 1, "name"), "up", r"layers\[1\]\.name: the layer 'up' is listed twice"),
        (("totals", "lambda", "upper"), None, r"totals\.lambda\.upper: expected a number"),
        (("skipped",), {}, r"skipped: expected a list"),
        (("model",), "m", r"model: expected an object, got str 'm'"),
    ],
)
def test_wrong_values_are_named(folder, path, value, says):
    content = _content(folder)
    parent = content
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    with pytest.raises(ReportError, match=says):
        check(content, "report.json")


def test_other_reports_and_other_schemas(folder):
    content = _content(folder)
    with pytest.raises(ReportError, match=r"report\.json: schema 2, this version reads schema 1"):
        check(content | {"schema": 2}, "report.json")
    with pytest.raises(ReportError, match="not the report of a scan"):
        check({"schema": 1, "exact": []}, "report.json")
    with pytest.raises(ReportError, match=r"report\.json: expected an object, got list"):
        check([], "report.json")


def test_folders_that_are_not_finished_scans(tmp_path, folder):
    with pytest.raises(ReportError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"empty: not a scan \(no report.json\)"):
        read(tmp_path / "empty")
    text = (folder / "report.json").read_text()
    (folder / "report.json").unlink()
    with pytest.raises(ReportError, match="has not finished"):
        read(folder)
    (folder / "report.json").write_text(text[:500])
    with pytest.raises(ReportError, match=r"report\.json: not valid JSON"):
        read(folder)
    (folder / "report.json").write_text(text)
    (folder / "spectra.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ReportError, match=r"spectra\.safetensors: not a readable"):
        read(folder)
    (folder / "spectra.safetensors").unlink()
    with pytest.raises(ReportError, match=r"has not finished \(spectra.safetensors is missing\)"):
        read(folder)


@pytest.mark.parametrize(
    "values, says",
    [
        (np.array([2.0, 1.0]), "'A/up' is not finite numbers in ascending order"),
        (np.array([1.0, np.nan]), "not finite"),
        (np.ones(3, np.float32), "expected a vector of float64"),
        (np.ones((2, 2)), r"shape \(2, 2\)"),
    ],
)
def test_spectra_that_cannot_be(folder, values, says):
    save_file({"A/up": values}, folder / "spectra.safetensors")
    with pytest.raises(ReportError, match=says):
        read(folder)
