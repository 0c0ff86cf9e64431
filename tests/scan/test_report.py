"""Strict JSON and files that are whole or not there."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from deaddir_fast.scan.report import Staged, plain, to_json


def _strict(text):
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_strict_json_with_the_stated_conventions():
    content = {
        "a": [math.inf, -math.inf, math.nan, 1e-300, 0.1],
        "b": Fraction(9, 2),
        "c": (1, None, True, "ν"),
        "d": torch.tensor([1.5, math.inf], dtype=torch.float64),
        "e": np.float64(0.25),
    }
    assert _strict(to_json(content)) == {
        "a": ["inf", "-inf", "nan", 1e-300, 0.1],
        "b": {"exact": "9/2", "value": 4.5},
        "c": [1, None, True, "ν"],
        "d": [1.5, "inf"],
        "e": 0.25,
    }


def test_what_has_no_json_form_is_refused():
    with pytest.raises(TypeError, match="set"):
        plain({"a": {1, 2}})


def test_files_appear_together(tmp_path):
    out = tmp_path / "a" / "b"
    with Staged(out) as folder:
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")
        assert not (out / "one").exists()
    assert sorted(p.name for p in out.iterdir()) == ["one", "two"]


def test_an_error_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError), Staged(tmp_path / "a" / "b") as folder:
        (folder / "one").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
