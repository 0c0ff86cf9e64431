"""The command line: help, version, doctor, and what happens when something is missing or breaks."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import deaddir_fast
from deaddir_fast._backend import ROUTES, backend
from deaddir_fast.scan import demo_digits, demo_exact, doctor, report
from deaddir_fast.scan.cli import app

RUN = CliRunner()


@pytest.fixture
def nothing_exact(monkeypatch):
    """Leave the first stage out: these tests are about what comes after it."""
    monkeypatch.setattr(demo_exact, "exact_cases", lambda seed, quick: iter(()))
    monkeypatch.setattr(
        demo_exact, "chains", lambda seed, quick, all_of=demo_exact.chains: [
            next(iter(all_of(seed, quick)))
        ]
    )  # fmt: skip


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_lists_the_commands_there_are():
    result = RUN.invoke(app, ["--help"])
    assert result.exit_code == 0
    commands = {command.callback.__name__ for command in app.registered_commands}
    assert commands == {"compare", "demo", "doctor", "predict", "scan"}
    assert all(name in plain(result.output) for name in commands)
    for name in commands:
        assert RUN.invoke(app, [name, "--help"]).exit_code == 0


def test_version():
    result = RUN.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.split() == ["deaddir_fast", deaddir_fast.__version__]


@pytest.mark.parametrize(
    "arguments", [["demo", "--seed", "-1"], ["demo", "--seed", "x"], ["nonsense"], ["demo", "--no"]]
)
def test_bad_arguments_are_refused(arguments, tmp_path):
    result = RUN.invoke(app, [*arguments, "--out", str(tmp_path / "r")])
    assert result.exit_code == 2
    assert not (tmp_path / "r").exists()


def test_doctor_json_says_what_backend_does():
    result = RUN.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert set(found["operations"]) == set(deaddir_fast.ops.__all__)
    for row in found["operations"].values():
        assert set(row) == set(ROUTES) and row["reference"] is None
    for route, reason in found["unavailable"].items():
        if reason is None:
            with backend(route) as name:
                assert name == route
        else:
            with pytest.raises(RuntimeError, match=re.escape(reason[:40])):
                backend(route)


def test_doctor_tables_name_every_operation_and_reason():
    result = RUN.invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    text = " ".join(plain(result.output).split())
    found = doctor.examine()
    for name, row in found["operations"].items():
        assert name in text
        for reason in row.values():
            assert reason is None or reason.startswith("no kernel") or reason in text


def test_cli_module_itself_imports_nothing_heavy():
    code = (
        "import sys, types\n"
        f"pkg = types.ModuleType('deaddir_fast'); pkg.__path__ = [{str(_package())!r}]\n"
        "sys.modules['deaddir_fast'] = pkg\n"
        "import deaddir_fast.scan.cli\n"
        "assert not {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _package():
    return Path(deaddir_fast.__file__).parent


def test_out_that_is_a_file(tmp_path):
    file = tmp_path / "report"
    file.write_text("mine")
    result = RUN.invoke(app, ["demo", "--quick", "--out", str(file)])
    assert result.exit_code == 1
    assert "cannot write" in result.output and "Traceback" not in result.output
    assert file.read_text() == "mine"


def test_missing_extras_are_named_and_the_rest_goes_on(tmp_path, monkeypatch, nothing_exact):
    for name in ("sklearn", "sklearn.datasets", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "deaddir_fast.scan.plots", raising=False)
    out = tmp_path / "r"
    result = RUN.invoke(app, ["demo", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    text = " ".join(plain(result.output).split())
    assert "deaddir_fast[demo]" in text and "deaddir_fast[plot]" in text
    assert [p.name for p in out.iterdir()] == ["report.json"]
    found = json.loads((out / "report.json").read_text())
    assert found["digits"] is None and set(found["skipped"]) == {"digits", "picture"}


@pytest.mark.parametrize(
    "error, code, says",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("where", [(demo_digits, "read_digits"), (report, "to_json")])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, nothing_exact, where, error, code, says):
    def fail(*arguments):
        raise error

    if where[1] != "read_digits":
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(*where, fail)
    out = tmp_path / "deep" / "r"
    result = RUN.invoke(app, ["demo", "--quick", "--out", str(out)])
    assert result.exit_code == code
    assert says in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_report_that_was_there(tmp_path, monkeypatch, nothing_exact):
    (tmp_path / "report.json").write_text("earlier")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(report, "to_json", lambda found: 1 / 0)
    result = RUN.invoke(app, ["demo", "--quick", "--out", str(tmp_path)])
    assert isinstance(result.exception, ZeroDivisionError)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "earlier"
