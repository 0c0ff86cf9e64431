"""The tables in README.md are those of the committed results, and a table says what is known."""

from __future__ import annotations

import pytest

pytest.importorskip("bench", reason="the source archive leaves bench out")

from bench import results, table


def row(name, implementation, seconds, *, error=1e-7, gate="ok", **rest):
    found = {
        "case": name,
        "implementation": implementation,
        "problem": "gram",
        "shape": {"n": 8, "i": 3},
        "dtype": "fp32",
        "threads": 2,
        "route": "C++" if implementation == "ours" else "torch",
        "error": error,
        "gate": gate,
        "flops": 1e9,
        "bytes": 1e6,
        "bound": "arithmetic",
        "rounds": 9,
        **rest,
    }
    if seconds is not None:
        found |= {"p20": seconds * 0.9, "p50": seconds, "p80": seconds * 1.1, "share": 0.5}
    return found


def content(*rows):
    peaks = {"flops": {"fp32": 1e11, "fp64": 5e10}, "bytes": {"copy": 1e10, "sum": 2e10}}
    machine = {"device": "a CPU", "isa": "avx2", "torch": "2.13", "revision": "r", "date": "d"}
    return {
        "machine": machine,
        "peaks": {"source": "test", "2 threads": peaks},
        "rows": list(rows),
    }


def test_readme_is_what_the_committed_results_generate():
    text = table.README.read_text()
    marked = table.MARKED.findall(text)
    assert marked
    for name in marked:
        assert (results.ROOT / name).is_file()
    assert table.rewritten(text) == text


def test_speed_up_is_over_the_fastest_formulation():
    text = table.markdown(
        content(row("c", "ours", 0.010), row("c", "slow", 0.050), row("c", "fast", 0.025))
    )
    line = text.splitlines()[-1]
    assert "| 2.50 " in line
    assert "`fast`" in line and "`slow`" not in line
    assert "10.0 (9.00–11.0)" in line
    assert "50 % of arithmetic" in line
    assert "100 in fp32 and 50 in fp64 GFLOP/s" in text


def test_no_speed_up_on_a_red_gate():
    rows = [row("c", "ours", None, gate="error 1 above 2", error=None), row("c", "fast", 0.025)]
    line = table.markdown(content(*rows)).splitlines()[-1]
    assert "wrong: error 1 above 2" in line
    assert "| — " in line
    assert list(table.notes(content(*rows))) == ["RED  c: ours: error 1 above 2"]


def test_a_wrong_formulation_does_not_compete():
    rows = [
        row("c", "ours", 0.010),
        row("c", "fast", None, gate="error 1 above 2"),
        row("c", "right", 0.03),
    ]
    assert "| 3.00 " in table.markdown(content(*rows)).splitlines()[-1]


def test_missed_targets_are_named():
    ours = row("c", "ours", 0.010, target=3, share_target=0.8, memory=0.1, extra_bytes=200)
    rows = [ours, row("c", "fast", 0.02, extra_bytes=1000)]
    found = list(table.notes({**content(*rows), "not_run": ["later"]}))
    assert [note.split("  ")[0] for note in found] == ["below target"] * 3 + ["not run"]
    met = [row("c", "ours", 0.010, target=2), row("c", "fast", 0.02)]
    assert list(table.notes(content(*met))) == []


def test_the_caption_owns_up_to_other_work():
    quiet = content(row("c", "ours", 0.010))
    assert "Other work" not in table.caption(quiet)
    quiet["machine"]["load"] = 3.2
    assert "Other work ran on the machine (load 3.2 before the run)" in table.caption(quiet)


def test_retargeting_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    files = {name: tmp_path / f"{name}.json" for name in ("cpu-old", "cpu-new", "gpu-a")}
    for k, path in enumerate(files.values(), 1):
        results.write(path, content(row("c", "ours", 0.01), row("c", "fast", 0.01 * k)))
    text = "".join(f"<!-- bench: {n}.json -->\n<!-- /bench -->\n" for n in ("cpu-old", "gpu-a"))
    assert "| 1.00 " in table.rewritten(text)
    moved = table.rewritten(text, files["cpu-new"])
    assert "<!-- bench: cpu-new.json -->" in moved
    assert "<!-- bench: gpu-a.json -->" in moved
    assert "| 2.00 " in moved and "| 3.00 " in moved and "| 1.00 " not in moved
    assert table.rewritten(moved) == moved


def test_results_round_trip_without_infinity(tmp_path):
    path = tmp_path / "cpu-x.json"
    written = content(row("c", "ours", 1 / 3, error=float("inf")))
    results.write(path, written)
    found = results.read(path)
    assert found["rows"][0]["error"] is None
    assert found["rows"][0]["p50"] == 0.333333
    assert found["machine"] == written["machine"]
    assert list(tmp_path.iterdir()) == [path]
