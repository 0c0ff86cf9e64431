"""A quick demo from end to end: its report against mathematics."""

import json
import xml.etree.ElementTree
from fractions import Fraction

import pytest
import torch
from typer.testing import CliRunner

from deaddir_fast.scan import demo_exact
from deaddir_fast.scan.cli import app
from deaddir_fast.scan.demo_digits import causes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return out, json.loads((out / "report.json").read_text()), result.output


def test_triples_equal_their_closed_forms(run):
    (reduced, deep) = run[1]["exact"]
    # 4-3-3 of rank 1 where the fibre is smooth: B A near rank 1 and A, B of rank 2 moves in
    # 2·3 + 2·4 - 2·2 = 10 directions; 4-3-2-3 of rank 2: matrices of that rank, 2(4 + 3 - 2) = 10.
    for case in (reduced, deep):
        assert case["verdict"] == "resolved"
        assert case["rlct"] == case["local"]["rlct"] == {"exact": "5", "value": 5.0}
        assert case["multiplicity"] == case["local"]["multiplicity"] == 1
        assert case["forwards"] > 0 and case["samples"] >= 4
    assert reduced["deepest"]["rlct"]["exact"] == "5" and reduced["deepest"]["multiplicity"] == 2


def test_chain_orders_are_their_depths(run):
    chains = run[1]["chains"]
    assert len(chains) == 2
    for depth, chain in enumerate(chains, 2):
        assert chain["jet"] == depth
        assert chain["fit"]["verdict"] == "resolved"
        assert abs(chain["fit"]["order"] - depth) < 1e-6
        assert abs(chain["identity"] - depth) < 1e-6
        # Nothing but the product of `depth` weights moves: F = k² E|c|² t^(2k-2) at every t.
        t, f = (
            torch.tensor(chain[name], dtype=torch.float64).log() for name in ("radii", "fisher")
        )
        slopes = f.diff() / t.diff()
        assert float((slopes - 2 * (depth - 1)).abs().max()) < 1e-9


def test_digits_dead_space_is_accounted_for(run):
    digits = run[1]["digits"]
    assert digits["accuracy"] > 0.85
    assert digits["dead"] + digits["rank"] == digits["parameters"]
    assert sum(c["dimensions"] for c in digits["causes"]) == digits["dead"]
    assert sum(group[3] for group in digits["groups"]) == digits["dead"]
    assert digits["gauge_curvature"] <= 1e-12 * digits["random_curvature"]
    orders = {ray["kind"]: ray["fit"]["order"] for ray in digits["rays"]}
    assert orders["live"] == pytest.approx(1, abs=0.05)
    assert orders["gauge line"] == pytest.approx(2, abs=0.05)


def test_digits_triple_is_what_a_flat_dead_space_means(run):
    digits = run[1]["digits"]
    half = Fraction(digits["rank"], 2)
    # Dead units stay dead nearby and gauges are orbits: only live directions count, 1/2 each. That
    # is right, or flagged with bounds that hold: the fibre is curved and kinks are near.
    if digits["verdict"] == "resolved":
        assert Fraction(digits["rlct"]["exact"]) == half
        assert digits["multiplicity"] == 1
    else:
        assert "no fibre is found at a distance" in digits["verdict"]
        assert Fraction(digits["lower"]["exact"]) == half
        assert half < Fraction(digits["upper"]["exact"])


def test_every_verdict_is_a_sentence_and_in_the_terminal(run):
    _, found, printed = run
    readings = [*found["exact"], found["digits"], *(c["fit"] for c in found["chains"])]
    for reading in readings:
        assert reading["verdict"] == "resolved" or reading["verdict"].startswith("unresolved: ")
    assert "more images" in " ".join(printed.split()) or (
        found["digits"]["rank_half"] == found["digits"]["rank"]
    )


def test_pictures_are_there(run):
    out = run[0]
    assert sorted(p.name for p in out.iterdir()) == [
        "curvature.png",
        "curvature.svg",
        "report.json",
    ]
    image = (out / "curvature.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000
    assert xml.etree.ElementTree.parse(out / "curvature.svg").getroot().tag.endswith("svg")


def test_causes_of_a_network_counted_by_hand():
    # Pixel 0 is always blank, pixels 1 and 2 always equal; unit 0 fires everywhere, unit 1 on the
    # first image only, unit 2 never.
    images = torch.tensor(
        [[0, 1, 1, 2], [0, 2, 2, 1], [0, 3, 3, 5], [0, 1, 1, 7]], dtype=torch.float64
    )
    active = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
    found = {c.name: c.dimensions for c in causes(images, active)}
    assert found == {
        "always-blank pixels": 2,
        # unit 0: pixels 1 and 2 tied, 1; unit 1: one image of 5 numbers leaves 4, 1 of them blank
        "pixels unseen while a unit fires": 1 + 3,
        "dead units": 4 + 1 + 10,
        "ReLU rescaling (gauge)": 2,
        "class shift (gauge)": 3,
    }


def test_deep_linear_points_without_closed_form_are_refused():
    with pytest.raises(ValueError, match="no closed form"):
        demo_exact.deep_linear((3, 3, 3, 3), (2, 1, 2), "somewhere", 0)
