"""What is installed, and what a build puts into a wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from deaddir_fast import _native

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere() -> None:
    assert importlib.metadata.version("deaddir_fast") == PROJECT["version"]
    assert importlib.import_module("deaddir_fast").__version__ == PROJECT["version"]
    if _native.extension is not None:
        # a mismatch is a stale build: run `make setup`
        assert _native.extension.build_info()["version"] == PROJECT["version"]


def test_the_command_exists() -> None:
    (entry,) = [
        point
        for point in importlib.metadata.entry_points(group="console_scripts")
        if point.name == "deaddir"
    ]
    assert callable(entry.load())


def test_kernels_are_part_of_the_package() -> None:
    kernels = importlib.import_module("deaddir_fast.kernels")
    sources = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"}
    assert sources
    for name in sources:
        module = importlib.import_module(f"deaddir_fast.kernels.{name}")
        assert module.__name__ == f"{kernels.__name__}.{name}"


def test_import_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    code = "import deaddir_fast, deaddir_fast.kernels; print(deaddir_fast.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().endswith("__init__.py")


def test_pins_agree_with_the_requirements() -> None:
    pins = dict(
        re.fullmatch(r"([\w.-]+)==(\S+)", line).groups()  # type: ignore[union-attr]  # no match fails
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    for requirement in PROJECT["dependencies"] + extras:
        name, minimum = re.match(r"([\w.-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?", requirement).groups()
        if name == PROJECT["name"]:
            continue
        assert minimum, requirement
        pinned = pins[name.lower().replace("_", "-")]
        assert _release(pinned) >= _release(minimum), (requirement, pinned)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


# ---------------------------------------------------------------------------------------- builds


def _wheel(folder: Path, **env: str) -> tuple[str, set[str]]:
    """Build a wheel of the working tree; its name and its files."""
    built = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
            *("-q", "-Cbuild-dir=" + str(folder / "build"), "-w", str(folder / "wheel"), str(ROOT)),
        ],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (folder / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


def _sources() -> set[str]:
    def under(folder: str, prefix: str) -> set[str]:
        return {
            prefix + path.relative_to(ROOT / folder).as_posix()
            for path in (ROOT / folder).rglob("*.py")
        }

    return under("deaddir_fast", "deaddir_fast/") | under("kernels", "deaddir_fast/kernels/")


def _extensions(files: set[str]) -> list[str]:
    return [name for name in files if name.endswith((".so", ".pyd", ".dylib"))]


def _check_python_files(files: set[str]) -> None:
    assert _sources() <= files
    assert "deaddir_fast/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)
    top = {name.split("/")[0] for name in files}
    assert top == {"deaddir_fast", f"deaddir_fast-{PROJECT['version']}.dist-info"}


@pytest.mark.slow
@pytest.mark.skipif(_native.extension is None, reason=str(_native.why_not))
def test_a_wheel_holds_everything_and_nothing_else(tmp_path: Path) -> None:
    name, files = _wheel(tmp_path)
    _check_python_files(files)
    (extension,) = _extensions(files)
    assert extension.startswith("deaddir_fast/_C.")
    if sys.version_info >= (3, 12):
        assert "-cp312-abi3-" in name


@pytest.mark.slow
def test_a_source_archive_holds_the_project_and_nothing_else(tmp_path: Path) -> None:
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("deaddir_fast/**/*.py")}
    assert expected | {"pyproject.toml", "LICENSE", "constraints.txt"} <= names
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders <= {"csrc", "deaddir_fast", "kernels", "tests", "docs", "examples"}


@pytest.mark.slow
def test_without_the_extension_by_choice(tmp_path: Path) -> None:
    name, files = _wheel(tmp_path, DDF_NO_EXT="true")
    assert name.endswith("-py3-none-any.whl")
    _check_python_files(files)
    assert not _extensions(files)


@pytest.mark.slow
def test_without_a_working_compiler(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    name, files = _wheel(tmp_path, CXX=str(broken))
    assert name.endswith("-py3-none-any.whl")
    _check_python_files(files)
    assert not _extensions(files)
