"""tools/hosts.py without its hours: which Python is taken, what is skipped by name, and that nothing
is left behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import verify


def program(path: Path, *lines: str) -> Path:
    """A shell script that can be started."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return path


def python_that_says(path: Path, version: str) -> Path:
    return program(path, f"echo {version}")


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine without any other Python; returns the one folder of its PATH."""
    for name in ("QLORA_NB_PYTHON312", "QLORA_NB_PYTHON313", "PYENV_VERSION"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return folder


# ---- which Python ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["python312", "python313", "colab"])
def test_without_the_python_a_check_is_skipped_by_name(bare, monkeypatch, check):
    monkeypatch.setattr(hosts, "new_environment", lambda *_: pytest.fail("an environment is made"))
    result = verify.CHECKS[check]()
    version = {"python312": "3.12"}.get(check, "3.13")
    assert result["passed"] is None
    assert f"Python {version}" in result["skipped"]
    assert f"QLORA_NB_PYTHON{version.replace('.', '')}" in result["skipped"]


def test_a_python_is_found_by_its_variable_on_the_path_and_in_pyenvs_folder(
    bare, monkeypatch, tmp_path
):
    """In this order; a program of that name that cannot be started, or is another version, is passed
    over, as pyenv's stand-in is where no version is chosen.
    """
    assert hosts.python_of("3.13") is None
    kept = python_that_says(tmp_path / "pyenv/versions/3.13.0/bin/python3.13", "3.13")
    python_that_says(tmp_path / "pyenv/versions/3.12.1/bin/python3.12", "3.12")
    assert hosts.python_of("3.13") == str(kept)
    stand_in = program(bare / "python3.13", "exit 127")
    assert hosts.python_of("3.13") == str(kept)
    stand_in.write_text("no program at all")
    assert hosts.python_of("3.13") == str(kept)
    python_that_says(stand_in, "3.12")
    assert hosts.python_of("3.13") == str(kept)
    python_that_says(stand_in, "3.13")
    assert hosts.python_of("3.13") == str(stand_in)
    named = python_that_says(tmp_path / "mine", "3.13")
    monkeypatch.setenv("QLORA_NB_PYTHON313", str(named))
    assert hosts.python_of("3.13") == str(named)


@pytest.mark.parametrize("wrong", ["another version", "not there"])
def test_a_named_python_that_is_none_is_no_reason_to_skip(bare, monkeypatch, tmp_path, wrong):
    named = tmp_path / "mine"
    if wrong == "another version":
        python_that_says(named, "3.11")
    monkeypatch.setenv("QLORA_NB_PYTHON313", str(named))
    with pytest.raises(RuntimeError, match=r"QLORA_NB_PYTHON313=.*mine is not a Python 3\.13"):
        hosts.python313()


def test_this_python_is_recognized():
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert hosts.version_with_venv(sys.executable) == version
    assert hosts.full_version(sys.executable).startswith(f"{version}.")


# ---- the pinned versions on it ---------------------------------------------------------------------------------------


@pytest.fixture
def rehearsed(bare, monkeypatch, tmp_path):
    """A Python 3.13 whose every call is written down and goes well, unless `fails` is in it."""
    python_that_says(bare / "python3.13", "3.13")
    calls = []
    state = {"fails": "", "calls": calls, "folder": tmp_path / "temporary"}
    state["folder"].mkdir()
    monkeypatch.setattr(hosts.tempfile, "tempdir", str(state["folder"]))

    def copy_of_the_kit(folder: Path) -> Path:
        folder.mkdir()
        (folder / "constraints.txt").write_text("torch==2.13.0\n")
        (folder / "notebooks").mkdir()
        return folder

    def call(command: list, env=None, **options) -> subprocess.CompletedProcess:
        line = " ".join(map(str, command))
        calls.append(line)
        failed = bool(state["fails"]) and state["fails"] in line
        said = "3 passed in 0.1s\n" if " -m pytest" in line else "3.13\n"
        return subprocess.CompletedProcess(command, int(failed), said, "no room on the disk")

    def sequence(python: Path, cwd: Path, out: Path, **options) -> dict:
        calls.append(f"{python} runs the sequence in {cwd}")
        return {"passed": state["fails"] != "sequence", "peak_bytes": 1}

    monkeypatch.setattr(hosts, "call", call)
    monkeypatch.setattr(hosts, "copy_of_the_kit", copy_of_the_kit)
    monkeypatch.setattr(hosts, "sequence", sequence)
    versions = {"torch": "2.13.0", "numpy": "2.4.6", "ipywidgets": "8.1.9"}
    monkeypatch.setattr(hosts, "frozen", lambda python: versions)
    return state


def test_the_pinned_versions_are_installed_run_and_tested_on_the_other_python(rehearsed):
    result = hosts.python313()
    assert result["passed"] is True
    assert result["tests"] == "3 passed in 0.1s"
    assert (result["python"], result["torch"]) == ("3.13", "2.13.0")
    made, installed, ran, tested = rehearsed["calls"][-5:-1]
    assert made.split()[1:3] == ["-m", "venv"]
    assert "python3.13 " in made
    own = f"{made.split()[-1]}/bin/python"
    assert installed.startswith(f"{own} -m pip install")
    assert "-c " in installed
    assert "constraints.txt" in installed
    assert installed.endswith("[lab,smollm2,sweep,test]")
    assert ran.startswith(own)
    assert tested.startswith(f"{own} -m pytest")


def test_what_is_tested_on_another_python_is_there(root):
    for test in (*hosts.TESTS, *hosts.WIDGET_TESTS):
        assert (root / "tests" / f"{test}.py").is_file()
    metadata = (root / "pyproject.toml").read_text()
    for extra in hosts.EXTRAS.split(","):
        assert f"\n{extra} = [" in metadata


@pytest.mark.parametrize(
    ("fails", "raises"),
    [
        ("-m venv", True),
        ("pip install", True),
        ("sequence", False),
        ("-m pytest", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("check", ["python313", "colab"])
def test_no_environment_is_left_behind(rehearsed, check, fails, raises):
    rehearsed["fails"] = fails
    if raises:
        with pytest.raises(RuntimeError, match="no room on the disk"):
            verify.CHECKS[check]()
    else:
        assert verify.CHECKS[check]()["passed"] is (fails == "")
    assert list(rehearsed["folder"].iterdir()) == []


# ---- conda -----------------------------------------------------------------------------------------------------------


def test_without_conda_its_check_is_skipped_by_name(bare):
    result = hosts.conda()
    assert result["passed"] is None
    assert result["skipped"].startswith("not solved here: no ")


@pytest.mark.parametrize(("name", "how"), [("micromamba", "create"), ("conda", "env create")])
@pytest.mark.parametrize("fails", [False, True])
def test_conda_solves_both_files_and_installs_nothing(bare, root, name, how, fails):
    said = bare / "said"
    status = f'case "$*" in *binder*) exit {int(fails)};; esac'
    program(bare / name, f'echo "$@" >> "{said}"', status)
    result = hosts.conda()
    assert result["passed"] is not fails
    assert result["solver"] == name
    lines = said.read_text().splitlines()
    assert len(lines) == 2
    for line, file in zip(lines, ("environment.yml", "binder/environment.yml"), strict=True):
        assert line.startswith(how)
        assert "--dry-run" in line
        assert line.endswith(os.fspath(root / file))


# ---- the record ------------------------------------------------------------------------------------------------------


def test_an_earlier_check_of_the_day_keeps_the_versions_it_was_run_with(tmp_path):
    target = tmp_path / "2026-11-26.json"
    assert verify.earlier_today(target, {"torch": "2.13.0"}) == {}
    checks = {"seeds": {"date": "08:00", "passed": True}}
    for now, kept in (("2.13.0", None), ("2.14.1", "2.13.0"), ("2.15.0", "2.13.0")):
        found = verify.earlier_today(target, {"torch": now}) or checks
        assert found["seeds"].get("versions") == (kept and {"torch": kept})
        assert found["seeds"]["date"] == "08:00"
        target.write_text(json.dumps({"versions": {"torch": now}, "checks": found}))
