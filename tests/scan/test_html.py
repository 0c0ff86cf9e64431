"""The page of a scan: whole, safe against names, its numbers the report's, pictures where due."""

import json
import math
import re
import sys
from html import escape

import numpy as np
import pytest
import scan_reports as made
from read_page import Page, assert_loads_nothing

from deaddir_fast.scan import html, page
from deaddir_fast.scan.html import NO_PICTURES, write_html
from deaddir_fast.scan.positions import grid, kinds, labels, short, spread
from deaddir_fast.scan.read_report import ReportError, read

HOSTILE = (
    '<script>alert("a")</script>',
    "layer.0.\"><img src=x onerror='alert(1)'>",
    "a$\\frac{1}{0}$b",
    "</table></svg></details>&amp;",
    "名前.слой\n\tline",
    'u id="v" #222222 url(#w)',
)


def written(folder):
    path = write_html(folder)
    assert path == folder / "report.html"
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert not found.wrong and not found.open
    return text, found


def assert_says_the_report(found, folder):
    scan = read(folder)
    rows = found.rows("layers-table")
    assert [row["layer"][1] for row in rows] == [layer["name"] for layer in scan.layers]
    for row, layer in zip(rows, scan.layers, strict=True):
        for column, value in {
            "depth": layer["depth"],
            "parameters": layer["parameters"],
            "dead": layer["dead"]["block"],
            **{k: layer["dead"][k] for k in made.CLASSES},
        }.items():
            assert int(row[column][0]) == value
            assert row[column][1] == f"{value:,}"
        for factor in "AG":
            assert row[f"rank {factor}"][1] == (
                f"{layer[factor]['rank']:,} / {layer[factor]['dimension']:,}"
            )
        assert row["verdict"][1] == layer["verdict"]
    cost = found.rows("cost-table")
    for row, layer in zip(cost, scan.layers, strict=True):
        assert row["layer"][1] == layer["name"] and row["route"][1] == layer["cost"]["route"]
        for key in ("flops", "bytes", "seconds"):
            assert float(row[key][0]) == layer["cost"][key]
    totals = {row[""][1]: row["dimensions"][0] for row in found.rows("totals")}
    for key, value in totals.items():
        assert int(value) == scan.report["totals"][key]
    assert set(totals) == {"parameters", "scanned", "dead", *made.CLASSES}


def test_small_scan(tmp_path):
    folder = made.small(tmp_path)
    text, found = written(folder)
    assert_loads_nothing(text, found)
    assert_says_the_report(found, folder)
    said = "".join(found.text)
    assert "0 ≤ λ ≤ 12.5" in said and "unresolved: lines bound it above" in said
    assert "ToyModel, 96 parameters in float32" in said
    assert "64 samples, 512 tokens of sentences.txt" in said
    assert "None: every parameter was read." in said
    # one picture each: where, classes, depth, spectra, rays, orders
    assert len(found.of("svg")) == 6
    for svg in found.of("svg"):
        assert svg["role"] == "img" and svg["aria-labelledby"]
    assert len(found.of("details")) == 1 + 3


def test_directions_say_orders_intervals_and_why(tmp_path):
    folder = made.small(tmp_path, order=2.03)
    found = written(folder)[1]
    tables = [
        found.rows(key)
        for key, rows in found.tables.items()
        if rows and rows[0][0][1] == "direction"
    ]
    by_label = {row["direction"][1]: row for rows in tables for row in rows}
    off = by_label["unit 0 is off"]
    assert float(off["order k"][0]) == 2.03 and off["order k"][1] == "2.03"
    assert off["interval"][1] == "[2.018, 2.042]"
    assert off["class"][1] == "singular" and off["why"][1] == "an example of a singular direction"
    assert float(off["1/(2k)"][0]) == 1 / 4.06
    dead = by_label["input 3 is dead"]
    assert dead["order k"][1] == "∞" and dead["interval"][1] == "–"
    open_ = by_label["smallest of A ⊗ G"]
    assert open_["order k"] == (None, "–") and open_["verdict"][1].startswith("unresolved: no")
    assert by_label["rescaling of unit 1"]["class"][1] == "gauge (rescaling)"


@pytest.mark.slow
def test_five_hundred_layers(tmp_path):
    folder = made.transformer(tmp_path, 83)
    text, found = written(folder)
    assert len(text.encode()) < 5e6
    assert_loads_nothing(text, found)
    assert_says_the_report(found, folder)
    names = [layer["name"] for layer in read(folder).layers]
    assert len(names) == 500
    assert {a["id"] for a in found.of("details") if "id" in a} == {f"layer-{i}" for i in range(500)}
    said = "".join(found.text)
    assert "no adapter for Odd" in said and "GL(8)" in said and "A made-up network." in said
    assert "A of 1 layers" in said  # layer 2's mlp.down saw 40 rows for 64 inputs and a bias


def test_names_are_only_text(tmp_path):
    spectra, layers = {}, []
    for depth, name in enumerate(HOSTILE):
        spectra[f"A/{name}"], spectra[f"G/{name}"] = made.falling(7, 3, 1), made.falling(4, 2)
        layers.append(
            made.layer(name, depth, 0 if depth == 1 else None)
            | {
                "type": name,
                "A": made.factor(spectra[f"A/{name}"]),
                "G": made.factor(spectra[f"G/{name}"]),
                "verdict": name,
                "notes": [name],
                "directions": [made.direction(name, "singular", 2.0, why=name, gauge=name)],
            }
        )
        layers[-1]["dead"] |= {"block": 4, "algebraic": 4}
        layers[-1]["cost"] |= {"route": name}
    bad = HOSTILE[0]
    content = made.report(
        layers,
        notes=[bad],
        skipped=[{"name": bad, "type": bad, "parameters": 1, "why": bad}],
        gauges=[{"name": bad, "group": bad, "dimension": 1, "parameters": [bad]}],
        device=bad,
        created=bad,
        versions={bad: bad},
        settings={bad: bad},
    )
    content["model"] |= {"source": bad, "class": bad, "dtype": bad, "fingerprint": bad}
    content["data"] |= {"source": bad, "fingerprint": bad}
    content["totals"]["lambda"]["verdict"] = bad
    folder = made.write(tmp_path, content, spectra)
    text, found = written(folder)
    assert_loads_nothing(text, found)
    assert_says_the_report(found, folder)
    assert len(found.of("script")) == 1 and not found.of("img")
    assert "".join(found.text).count(bad) > 20  # seen as text
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert escape(HOSTILE[5], quote=False) in drawn


def test_without_rays_and_orders(tmp_path):
    folder = made.transformer(tmp_path, 1)
    content = json.loads((folder / "report.json").read_text())
    for layer in content["layers"]:
        for direction in layer["directions"]:
            direction |= dict.fromkeys(("order", "jet", "predicted", "interval", "contribution"))
            direction |= {"radii": [], "fisher": [], "fisher_stderr": [], "kl": []}
            direction |= {"verdict": "unresolved: not followed"}
    (folder / "report.json").write_text(json.dumps(content))
    text, found = written(folder)
    assert_loads_nothing(text, found)
    said = "".join(found.text)
    assert "No direction of this scan has a ray" in said
    assert "No direction has both a predicted and a measured order." in said
    assert len(found.of("svg")) == 4
    for layer in content["layers"]:
        layer["directions"] = []
    content["layers"][0]["dead"] = dict.fromkeys(content["layers"][0]["dead"], 0)
    (folder / "report.json").write_text(json.dumps(content))
    assert "No direction of this layer was followed." in "".join(written(folder)[1].text)


def test_nothing_scanned_at_all(tmp_path):
    folder = made.write(tmp_path, made.report([]), {})
    text, found = written(folder)
    assert_loads_nothing(text, found)
    assert found.rows("layers-table") == [] and not found.of("svg")


def test_numbers_that_are_not_finite_and_zero_factors(tmp_path):
    folder = made.small(tmp_path)
    content = json.loads((folder / "report.json").read_text())
    content["totals"]["lambda"]["upper"] = "inf"
    content["cost"] |= {"peak_bytes": None, "flops": None}
    content["data"]["tokens"] = None
    first = content["layers"][0]
    first["A"] |= {"rank": 0, "dead": 7, "top": 0.0, "bottom": "nan", "trace": 0.0}
    first["A"] |= {"log_pseudo_det": "-inf", "tolerance": 0.0}
    first["cost"] |= {"share_of_bound": None, "flops": "inf"}
    direction = content["layers"][1]["directions"][1]
    direction |= {"interval": ["-inf", "inf"], "curvature": "nan", "kfac": None, "stderr": None}
    direction["fisher"][0] = 0.0
    direction["fisher_stderr"][3] = "inf"
    direction["kl"] = []
    spectra = dict(read(folder).spectra)
    spectra["A/up"] = np.zeros(7)
    made.write(folder, content, spectra)
    text, found = written(folder)
    assert_loads_nothing(text, found)
    said = "".join(found.text)
    assert "0 ≤ λ ≤ ∞" in said and "−∞" in said and "[−∞, ∞]" in said


def test_a_spectrum_that_contradicts_the_report_is_said(tmp_path):
    folder = made.small(tmp_path)
    content = json.loads((folder / "report.json").read_text())
    content["layers"][0]["A"]["rank"] = 3
    content["layers"][2]["G"]["dimension"] = 5
    (folder / "report.json").write_text(json.dumps(content))
    said = "".join(written(folder)[1].text)
    assert "7 stored eigenvalues of A are above the tolerance, the report says rank 3." in said
    assert "The stored spectrum of G has 4 values, the report says dimension 5." in said
    assert said.count("the report says") == 2


def test_without_matplotlib(tmp_path, monkeypatch):
    folder = made.small(tmp_path)
    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("plots", "plots_scan"):
        monkeypatch.delitem(sys.modules, f"deaddir_fast.scan.{module}", raising=False)
        monkeypatch.delattr(f"deaddir_fast.scan.{module}", raising=False)
    text, found = written(folder)
    assert_loads_nothing(text, found)
    assert_says_the_report(found, folder)
    assert not found.of("svg") and NO_PICTURES in "".join(found.text)


def test_the_page_is_the_same_for_the_same_scan(tmp_path):
    folder = made.small(tmp_path)
    assert written(folder)[0] == written(folder)[0]


def test_a_folder_that_is_no_scan_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ReportError, match="not a scan"):
        write_html(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directions_beyond_the_most_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "MOST_DIRECTIONS", 2)
    said = "".join(written(made.small(tmp_path))[1].text)
    assert "1 more are in report.json." in said


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (1234567, "1,234,567"),
        (-3, "−3"),
        (0.0, "0"),
        (-1234.5678, "−1235"),
        (1.5e-12, "1.5e−12"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "nan"),
    ],
)
def test_numbers(value, text):
    assert page.number(value) == text


def test_intervals_tell_their_ends_apart():
    assert page.interval([1.99991, 2.00012]) == "[1.99991, 2.00012]"
    assert page.interval([-0.5, 0.5]) == "[−0.5, 0.5]"
    assert page.interval([2.0, 2.0]) == "[2, 2]"
    assert page.interval([1.0, math.inf]) == "[1, ∞]"


# ------------------------------------------------------------------------------------- positions


def _bare(name, depth, block, dead=0):
    return {
        "name": name,
        "depth": depth,
        "block": block,
        "kind": "linear",
        "dead": {"block": dead},
    }


def test_kinds_take_the_number_that_most_layers_agree_on():
    layers = [
        _bare(f"stages.2.blocks.{i}.{part}", 2 * i + j, i)
        for i in range(4)
        for j, part in enumerate(("conv", "mlp.0"))
    ]
    assert set(kinds(layers).values()) == {"stages.2.blocks.*.conv", "stages.2.blocks.*.mlp.0"}
    assert kinds([_bare("odd", 0, 3)]) == {"odd": "odd"}


def test_grid_of_blocks_keeps_every_layer_and_what_is_outside():
    layers = [_bare("embed", 0, None)]
    layers += [
        _bare(f"h.{i}.{part}", 1 + 2 * i + j, i) for i in range(3) for j, part in enumerate("ab")
    ]
    layers += [_bare("head", 7, None)]
    laid = grid(layers)
    assert laid.columns == ["before", "0", "1", "2", "after"] and laid.axis == "block"
    assert laid.rows == ["embed", "a", "b", "head"]
    assert {k: [x["name"] for x in v] for k, v in laid.cells.items()}[2, 3] == ["h.2.b"]
    assert sum(len(v) for v in laid.cells.values()) == len(layers) and laid.left_out == 0


def test_grid_merges_experts_and_caps_rows_and_columns():
    experts = [_bare(f"h.{i}.experts.{j}.w", 64 * i + j, i) for i in range(2) for j in range(64)]
    laid = grid(experts)
    assert laid.rows == ["h.*.experts.*.w"] and len(laid.cells[0, 1]) == 64
    flat = [_bare(f"layer{i}", i, None) for i in range(250)]
    laid = grid(flat, columns=100)
    assert laid.merged == 3 and laid.columns[0] == "0–2" and laid.columns[-1] == "249"
    assert sum(len(v) for v in laid.cells.values()) == 250
    many = [_bare(f"h.0.part{chr(97 + i)}.w", i, 0, dead=i) for i in range(10)]
    laid = grid(many, rows=4)
    assert laid.left_out == 6 and len(laid.rows) == 4
    kept = {layer["name"] for cell in laid.cells.values() for layer in cell}
    assert kept == {layer["name"] for layer in many[6:]}  # those with the most dead directions


def test_labels_and_short_names():
    assert labels(["h.*.attn.q", "h.*.mlp.up", "head"]) == ["attn.q", "mlp.up", "head"]
    assert labels(["h.*.q"]) == ["h.*.q"]
    assert short("a\n b") == "a b"
    assert len(short("x" * 100)) == 34 and short("x" * 100, 10).count("…") == 1
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
