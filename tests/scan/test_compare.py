"""Two scans side by side: changes worked out by hand, unfairness said first, pages and tables."""

import io
import json
import math
import sys

import numpy as np
import pytest
import scan_reports as made
from hypothesis import given
from hypothesis import strategies as st
from read_page import Page, assert_loads_nothing
from rich.console import Console
from typer.testing import CliRunner

from deaddir_fast.scan.cli import app
from deaddir_fast.scan.compare import (
    between,
    changed_orders,
    compare,
    log_spectral_distance,
    moved,
    show,
)
from deaddir_fast.scan.html import NO_PICTURES
from deaddir_fast.scan.read_report import ReportError, read

RUN = CliRunner()


def edit(folder, change):
    """Change report.json in place."""
    content = json.loads((folder / "report.json").read_text())
    change(content)
    (folder / "report.json").write_text(json.dumps(content))
    return folder


def shown(comparison, **options):
    console = Console(file=io.StringIO(), width=220)
    show(comparison, console, **options)
    return console.file.getvalue()


def _changes(value):
    """Every change and distance in a nested structure."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("change", "distance", "floored"):
                yield inner
            else:
                yield from _changes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _changes(inner)


# ---------------------------------------------------------------------------------------- itself


def test_a_scan_against_itself_is_all_zeros(tmp_path):
    folder = made.transformer(tmp_path / "a", 3)
    found = compare(folder, folder)
    numbers = [v for v in _changes(found.as_json()) if v is not None]
    assert len(numbers) > 20 * 17 and set(numbers) == {0}
    assert found.only_a == found.only_b == [] and changed_orders(found) == []
    assert all(moved(layer) == 0 for layer in found.layers)
    # None only where there is no number on either side
    for layer in found.layers:
        for direction in layer["directions"]:
            for key in ("order", "jet", "curvature"):
                assert (direction[key]["change"] is None) == (direction[key]["a"] is None)
    assert found.remarks == ["Both scans read the same weights (their fingerprints are equal)."]
    # the only thing to say is that one layer's rank is not settled in the scan itself
    assert len(found.cautions) == 1 and "encoder.layer.2.mlp.down" in found.cautions[0]
    assert "No direction changed its class, order or jet." in shown(found)


# --------------------------------------------------------------------------------------- changes


def test_changes_of_a_network_with_more_dead_inputs(tmp_path):
    a = made.small(tmp_path / "a", dead=1, order=2.0)
    b = made.small(tmp_path / "b", dead=3, order=3.5, scale=math.e)
    found = compare(a, b)
    assert found.cautions == []
    up, middle, down = found.layers
    # spectra of A scaled by e: one nat apart, rank, shape and G the same
    assert up["A"]["distance"] == pytest.approx(1.0, rel=1e-14)
    assert up["A"]["top"]["change"] == pytest.approx(1.0, rel=1e-14)
    assert up["A"]["bottom"]["change"] == pytest.approx(1.0, rel=1e-14)
    assert up["A"]["trace"]["change"] == pytest.approx(1.0, rel=1e-14)
    assert up["A"]["log_pseudo_det"]["change"] == pytest.approx(7.0, rel=1e-13)
    assert up["A"]["rank"]["change"] == 0 and up["A"]["floored"] == 0
    assert up["G"]["distance"] == 0 == up["G"]["top"]["change"]
    # two more dead inputs of four outputs each
    assert middle["A"]["rank"] == {"a": 6, "b": 4, "change": -2}
    assert middle["A"]["floored"] == 2
    assert middle["dead"]["algebraic"] == {"a": 4, "b": 12, "change": 8}
    assert middle["dead"]["block"]["change"] == 8 and middle["dead"]["gauge"]["change"] == 0
    assert found.totals["dead"] == {"a": 7, "b": 15, "change": 8}
    assert moved(middle) > moved(up) > moved(down) - 1e-12
    # orders
    ((name, direction),) = changed_orders(found)
    assert (name, direction["label"], direction["in"]) == ("middle", "unit 0 is off", "both")
    assert direction["order"] == {"a": 2.0, "b": 3.5, "change": 1.5}
    infinite = middle["directions"][0]["order"]
    assert infinite == {"a": math.inf, "b": math.inf, "change": 0}
    assert found.bounds["verdict"] == "the bounds overlap: no change of λ can be claimed"
    text = shown(found)
    assert text.index("middle") < text.index("down") and "2 → 3.5" in text


def test_the_other_way_round_changes_the_sign(tmp_path):
    a = made.small(tmp_path / "a", dead=1)
    b = made.small(tmp_path / "b", dead=3, order=4.0)
    there, back = compare(a, b), compare(b, a)
    for x, y in zip(there.layers, back.layers, strict=True):
        for factor in "AG":
            assert x[factor]["distance"] == y[factor]["distance"]
            for key in ("rank", "top", "bottom", "trace", "log_pseudo_det"):
                assert x[factor][key]["change"] == -y[factor][key]["change"]
    assert [v["change"] for v in there.totals.values()] == [
        -v["change"] for v in back.totals.values()
    ]


@pytest.mark.parametrize(
    "one, two, says",
    [
        ((1.0, 2.0), (2.5, "inf"), "λ has grown: the bounds do not overlap"),
        ((3.0, 4.0), (0.0, 2.5), "λ has fallen: the bounds do not overlap"),
        ((3.0, 4.0), (4.0, 5.0), "the bounds overlap: no change of λ can be claimed"),
        ((0.0, "inf"), (4.0, 5.0), "the bounds overlap: no change of λ can be claimed"),
        ((1.5, 1.5), (1.5, 1.5), "λ is the same"),
        ((1.5, "nan"), (9.0, 9.0), "a bound is not a number"),
    ],
)
def test_what_bounds_allow_to_say(tmp_path, one, two, says):
    folders = []
    for name, (lower, upper) in (("a", one), ("b", two)):
        bounds = {"lower": lower, "upper": upper, "verdict": "v"}
        folders.append(
            edit(made.small(tmp_path / name), lambda r, v=bounds: r["totals"].update({"lambda": v}))
        )
    assert compare(*folders).bounds["verdict"].startswith(says)


def test_fitted_orders_within_their_intervals_are_the_same(tmp_path):
    a = made.small(tmp_path / "a", order=2.0)
    b = made.small(tmp_path / "b", order=2.02)  # intervals are ± 0.0123
    c = made.small(tmp_path / "c", order=2.03)
    for folder in (b, c):
        edit(folder, lambda r: r["layers"][1]["directions"][1].update(jet=2.0))
    assert changed_orders(compare(a, b)) == []
    assert len(changed_orders(compare(a, c))) == 1
    found = compare(a, b).layers[1]["directions"][1]
    assert found["order"]["change"] == pytest.approx(0.02)


def test_directions_are_matched_by_label_and_the_rest_is_listed(tmp_path):
    def twice(report):
        rows = report["layers"][1]["directions"]
        rows.append(made.direction("unit 0 is off", "singular", 5.0))
        del rows[0]

    a = made.small(tmp_path / "a")
    b = edit(made.small(tmp_path / "b"), twice)
    rows = compare(a, b).layers[1]["directions"]
    assert [(r["label"], r["in"]) for r in rows] == [
        ("input 3 is dead", "a"),
        ("unit 0 is off", "both"),
        ("rescaling of unit 1", "both"),
        ("unit 0 is off", "b"),
    ]
    assert rows[1]["order"]["change"] == 0
    assert rows[3]["order"] == {"a": None, "b": 5.0, "change": None}


def test_distance_is_not_made_up(tmp_path):
    a, b = made.small(tmp_path / "a"), made.small(tmp_path / "b")
    spectra = dict(read(b).spectra)
    del spectra["G/up"]
    spectra["A/middle"] = made.falling(9, 4)
    made.write(b, json.loads((b / "report.json").read_text()), spectra)
    edit(b, lambda r: r["layers"][2]["A"].update(tolerance="nan", bottom=None))
    up, middle, down = compare(a, b).layers
    assert (up["G"]["distance"], up["G"]["why"]) == (None, "spectrum not stored")
    assert (middle["A"]["distance"], middle["A"]["why"]) == (None, "7 eigenvalues against 9")
    assert (down["A"]["distance"], down["A"]["why"]) == (None, "no tolerance")
    assert down["A"]["bottom"]["change"] is None and down["A"]["top"]["change"] == 0
    assert moved(up) == math.inf


# ------------------------------------------------------------------------------ distance itself

positive = st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4).map(lambda v: np.array(sorted(v)))


@given(positive, positive, positive, st.floats(1e-3, 1e3))
def test_distance_is_a_metric_and_sees_scale_as_its_logarithm(a, b, c, scale):
    d = lambda x, y: log_spectral_distance(x, y, 1e-12)[0]  # noqa: E731
    assert d(a, a) == 0
    assert d(a, b) == d(b, a)
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-12
    assert d(a, scale * a) == pytest.approx(abs(math.log(scale)), abs=1e-12)
    assert d(a, b) == pytest.approx(math.sqrt(np.mean(np.log(a / b) ** 2)), abs=1e-12)


def test_what_is_below_the_floor_is_rounding():
    a = np.array([-1e-18, 1e-17, 1.0])
    b = np.array([1e-20, 0.0, 1.0])
    assert log_spectral_distance(a, b, 1e-9) == (0.0, 0)
    one_alive = np.array([0.0, 1e-3, 1.0])
    distance, floored = log_spectral_distance(a, one_alive, 1e-9)
    assert floored == 1 and distance == pytest.approx(6 * math.log(10) / math.sqrt(3))
    assert log_spectral_distance(a[:0], b[:0], 1e-9) == (0.0, 0)
    with pytest.raises(ValueError, match="b: expected 3 eigenvalues as in a, got 2"):
        log_spectral_distance(a, b[:2], 1e-9)
    with pytest.raises(ValueError, match="floor: expected a finite number > 0"):
        log_spectral_distance(a, b, 0.0)


# -------------------------------------------------------------------------------------- fairness


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r["data"].update(fingerprint="other"), "The data differ: "),
        (lambda r: r["model"].update({"class": "X"}), "The models differ in class: ToyModel again"),
        (lambda r: r["model"].update(dtype="bfloat16"), "The models differ in dtype: float32"),
        (lambda r: r["settings"].update(seed=1), "The setting seed differs: 0 against 1."),
        (lambda r: r["settings"].pop("draws"), "The setting draws differs: 1 against not set."),
        (lambda r: r["layers"][0].update(inputs=9), "1 layers have the same name and another type"),
        (lambda r: r["layers"][0].update(rows=9), "1 layers were read on another number of rows"),
        (
            lambda r: r["layers"][1]["G"].update(verdict="limited by samples: 3"),
            "The rank of A or G is not settled in 1 layers, so its change is not either: middle.",
        ),
        (lambda r: r["versions"].update(torch="9"), "Another version of torch: 2.11.0 against 9."),
        (lambda r: r.update(device="gpu"), "Another device: cpu: a processor, 2 threads against"),
        (lambda r: r["layers"].pop(), "1 layers are in the first scan only: down; the totals"),
    ],
)
def test_each_unfairness_is_said_before_any_change(tmp_path, change, says):
    a, b = made.small(tmp_path / "a"), edit(made.small(tmp_path / "b"), change)
    found = compare(a, b)
    assert len(found.cautions) == 1 and found.cautions[0].startswith(says)
    text = " ".join(shown(found).split())
    assert text.index(says[:40]) < text.index("Totals")


def test_the_page_says_all_unfairness_first(tmp_path):
    a, b = made.small(tmp_path / "a"), made.small(tmp_path / "b")
    edit(b, lambda r: (r["settings"].update(seed=1), r["data"].update(fingerprint="other")))
    found = compare(a, b, out=tmp_path / "out")
    page = "".join(Page((tmp_path / "out" / "compare.html").read_text()).text)
    assert len(found.cautions) == 2
    for caution in found.cautions:
        assert page.index(caution) < page.index("≤ λ ≤") < page.index("Totals; every change")


def test_other_weights_are_what_is_compared_and_no_unfairness(tmp_path):
    a = made.small(tmp_path / "a")
    b = edit(made.small(tmp_path / "b"), lambda r: r["model"].update(fingerprint="other"))
    found = compare(a, b)
    assert found.cautions == found.remarks == []


def test_scans_without_a_common_layer(tmp_path):
    a = made.small(tmp_path / "a")
    b = made.transformer(tmp_path / "b", 1)
    found = compare(a, b, out=tmp_path / "out")
    assert found.layers == [] and found.only_a == ["up", "middle", "down"]
    assert len(found.only_b) == 8
    assert found.cautions[0] == "No layer of one scan has the name of a layer of the other."
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert {"only-a", "only-b"} <= {a.get("id") for _, a in page.elements}
    shown(found)


# ----------------------------------------------------------------------------------- files, CLI


def test_files_say_what_was_found(tmp_path):
    a = made.transformer(tmp_path / "a", 2)
    b = made.transformer(tmp_path / "b", 3)
    out = tmp_path / "out"
    found = compare(a, b, out=out)
    assert sorted(p.name for p in out.iterdir()) == ["compare.html", "compare.json"]
    stored = json.loads((out / "compare.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert (stored["schema"], stored["kind"]) == (1, "comparison")
    assert [x["name"] for x in stored["layers"]] == [x["name"] for x in found.layers]
    assert stored["only_b"] == [f"encoder.layer.2.{part}" for part, _, _ in made.PARTS]
    text = (out / "compare.html").read_text()
    page = Page(text)
    assert not page.wrong and not page.open and len(page.of("svg")) == 4
    assert_loads_nothing(text, page)
    rows = page.rows("layers-table")
    for row, layer in zip(rows, found.layers, strict=True):
        assert row["layer"][1] == layer["name"]
        assert int(row["dead"][0]) == layer["dead"]["block"]["change"]
        assert int(row["rank A"][0]) == layer["A"]["rank"]["change"]
        assert float(row["distance G"][0]) == layer["G"]["distance"]
        assert float(row["ln det A"][0]) == layer["A"]["log_pseudo_det"]["change"]
    for row in page.rows("totals"):
        side = found.totals[row["dimensions"][1]]
        assert [int(row[k][0]) for k in ("a", "b", "change")] == list(side.values())
    assert len(page.rows("directions-table")) == sum(len(x["directions"]) for x in found.layers)


def test_hostile_names_stay_text(tmp_path):
    bad = '<script>alert("a")</script>$\\frac{1}{0}$'

    def rename(report):
        report["layers"][1]["name"] = bad
        report["layers"][1]["directions"][0]["label"] = bad
        report["layers"][0]["name"] = bad + "2"
        report["model"]["source"] = bad
        report["settings"][bad] = str(len(report["settings"]))

    a = edit(made.small(tmp_path / "a"), rename)
    b = edit(made.small(tmp_path / "b"), lambda r: (r["settings"].clear(), rename(r)))
    edit(b, lambda r: r["layers"].pop(0))
    found = compare(a, b, out=tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text()
    page = Page(text)
    assert not page.wrong and not page.open and len(page.of("script")) == 1
    assert_loads_nothing(text, page)
    assert "".join(page.text).count(bad) >= 6
    assert bad in shown(found)


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch):
    a, b = made.small(tmp_path / "a"), made.small(tmp_path / "b", dead=3)
    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("plots", "plots_scan", "plots_compare"):
        monkeypatch.delitem(sys.modules, f"deaddir_fast.scan.{module}", raising=False)
        monkeypatch.delattr(f"deaddir_fast.scan.{module}", raising=False)
    compare(a, b, out=tmp_path / "out")
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert not page.of("svg") and NO_PICTURES in "".join(page.text)
    assert len(page.rows("layers-table")) == 3


def test_long_lists_are_cut_and_counted(tmp_path):
    a = read(made.transformer(tmp_path / "a", 2))
    b = read(made.transformer(tmp_path / "b", 2))
    for layer in b.report["layers"]:
        layer["directions"][1]["class"] = "unresolved"
    text = shown(between(a, b), most=3)
    assert "11 layers that changed less are not shown" in text
    assert "11 more directions are not shown" in text


def test_command_prints_and_writes(tmp_path):
    a, b = made.small(tmp_path / "a", dead=1), made.small(tmp_path / "b", dead=3)
    result = RUN.invoke(app, ["compare", str(a), str(b)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "middle" in result.output and not (tmp_path / "out").exists()
    out = tmp_path / "deep" / "out"
    result = RUN.invoke(app, ["compare", str(a), str(b), "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == json.loads((out / "compare.json").read_text())
    assert (out / "compare.html").is_file()


def test_command_refuses_what_is_no_finished_scan(tmp_path):
    a = made.small(tmp_path / "a")
    unfinished = made.small(tmp_path / "unfinished")
    (unfinished / "report.json").unlink()
    later = edit(made.small(tmp_path / "later"), lambda r: r.update(schema=2))
    (tmp_path / "empty").mkdir()
    for folder, says in (
        (tmp_path / "empty", "not a scan"),
        (tmp_path / "nowhere", "no such folder"),
        (unfinished, "has not finished"),
        (later, "schema 2, this version reads schema 1"),
    ):
        for arguments in ([a, folder], [folder, a]):
            out = tmp_path / "out"
            result = RUN.invoke(app, ["compare", *map(str, arguments), "--out", str(out)])
            assert result.exit_code == 2 and not out.exists()
            assert result.output.startswith("error: ") and folder.name in result.output
            assert says in result.output and "Traceback" not in result.output
        with pytest.raises(ReportError, match=says):
            compare(folder, a)


def test_command_whose_folder_cannot_be_written(tmp_path):
    a = made.small(tmp_path / "a")
    file = tmp_path / "file"
    file.write_text("mine")
    result = RUN.invoke(app, ["compare", str(a), str(a), "--out", str(file)])
    assert result.exit_code == 1 and result.output.startswith("error: ")
    assert str(file) in result.output and file.read_text() == "mine"
