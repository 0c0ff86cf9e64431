"""``deaddir predict``: tables, JSON, modules from the command line, and bad specifications."""

import json
import re
import sys

import pytest
from typer.testing import CliRunner

from deaddir_fast.scan.cli import app

RUN = CliRunner()

MODULE = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))

def number():
    return 3
"""


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_table_of_primitives():
    result = RUN.invoke(app, ["predict", "swiglu*2"])
    assert result.exit_code == 0
    text = plain(result.output)
    assert "rates do not add" in text
    assert "2·k + 3" in text


def test_json_is_the_calculus():
    result = RUN.invoke(app, ["predict", "linear*3", "--json", "--unit", "1"])
    found = json.loads(result.output)
    assert [x["forward"] for x in found["layers"]] == [0, 1, 2]
    assert [x["backward"] for x in found["layers"]] == [2, 1, 0]
    assert found["additive"] is True
    assert found["unit"] == 1


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = RUN.invoke(app, ["predict", "my_networks:build", "--unit", "2"])
    assert result.exit_code == 0, result.output
    assert "rates add" in plain(result.output)
    wrong = RUN.invoke(app, ["predict", "my_networks:number"])
    assert wrong.exit_code == 2
    assert "nn.Module" in wrong.output
    assert RUN.invoke(app, ["predict", "my_networks:missing"]).exit_code == 2


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["linear", "--unit", "9"], ["linear", "--bias", "x"], ["no_such:f"]]
)
def test_bad_specifications(arguments):
    result = RUN.invoke(app, ["predict", *arguments])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
