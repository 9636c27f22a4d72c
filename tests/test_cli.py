"""The command line answers at once, refuses in one sentence, and never overwrites a learner's
copy.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import nbformat
import open_lab as lab
import pytest
from typer.testing import CliRunner

from qlora_nb import __version__ as qlora_nb_version
from qlora_nb import cli, machine, sources, spellings
from qlora_nb.batch import sequence
from qlora_nb.errors import KitError


def qlora_nb(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlora_nb.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def test_import_brings_nothing_but_the_standard_library():
    program = """
        import os, sys
        before = set(sys.modules)
        import qlora_nb
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - set(sys.stdlib_module_names)), os.environ["OMP_WAIT_POLICY"])
    """
    given = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['qlora_nb'] PASSIVE"


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "settings",
        "machine",
        "memory.preflight",
        "batch.sequence",
        "batch.report",
        "batch.sweep",
        "batch.leaderboard",
        "model.fetch",
    ],
)
def test_no_torch_on_the_way_to_a_refusal(module):
    program = f"import sys, qlora_nb.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_help_names_every_command():
    done = qlora_nb("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("doctor", "fetch", "plan", "run", "lab"))


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "-p", "max_stepz", "3"], "did you mean max_steps"),
        (["run", "-p", "learning_rate", "-1"], "learning_rate"),
        (["run", "--only", "99"], "no such notebook"),
        (["run", "--only", ","], "no such notebook"),
        (["run", "--only", "03", "--resume", "latest"], "leave --only or --resume out"),
        (["run", "-p", "seed", "1", "-p", "r", "4", "-p", "seed", "2"], "given twice (got 'seed')"),
        (["run", "-p", "seed"], "not understood"),
        (["run", "--profil", "tiny"], "not understood"),
        (["plan", "--profile", "large"], "tiny, smollm2, t4, full"),
        (["fetch", "pythia"], "not a hub repository"),
    ],
)
def test_refusals_are_one_sentence_and_exit_2(arguments, expected):
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert "Traceback" not in done.output
    assert done.output.count("\n") == 1


@pytest.mark.fault(1)
def test_a_refusal_of_the_command_itself_is_the_same(root):
    """In a process of its own: what a shell gets."""
    done = qlora_nb("run", "-p", "max_stepz", "3", cwd=root)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean max_steps" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["run", "-p", "model_id", "modèle"]]
)
def test_a_terminal_that_knows_ascii_alone(arguments, root):
    done = qlora_nb(*arguments, cwd=root, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr


def test_lab_says_why_it_cannot_copy(toy, tmp_path):
    folder = toy("01_a", "1")
    (tmp_path / "taken").write_text("")
    with pytest.raises(KitError, match=r"cannot be written.*remove what is in the way"):
        lab.copy_for_learning(folder, tmp_path / "taken")
    with pytest.raises(KitError, match="no notebooks found"):
        lab.copy_for_learning(tmp_path / "none", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    (folder / "02_b.ipynb").write_text("{")
    with pytest.raises(KitError, match="this is no notebook"):
        lab.copy_for_learning(folder, tmp_path / "mine")


@pytest.mark.fault(11)
def test_full_profile_is_refused_without_a_gpu_before_any_download_or_heavy_import(root):
    if machine.gpus():
        pytest.skip("this machine has a GPU")
    program = """
        import socket, sys
        from qlora_nb import cli
        def connect(*given, **options):
            print("a connection was tried")
        socket.socket.connect = socket.create_connection = connect
        try:
            cli.app(["run", "--profile", "full"])
        finally:
            print([name for name in ("torch", "transformers", "datasets", "huggingface_hub") if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "EleutherAI/pythia-12b needs a GPU" in done.stderr
    assert "GiB" in done.stderr
    assert done.stdout == "[]\n"


def test_doctor_lists_every_dependency():
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("torch", "bitsandbytes", "take this profile"))


def test_doctor_as_json_says_the_same_and_names_nobody():
    """What an issue asks for: no name of a person's folder or machine, no endpoint's password."""
    said = CliRunner().invoke(cli.app, ["doctor"]).output
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["qlora-nb"] == qlora_nb_version
    for what, how_much in found["machine"].items():
        if what not in ("memory", "disk"):  # they change meanwhile
            assert f"{what:10} {how_much}" in said
    for package, (installed, verdict) in found["packages"].items():
        assert re.search(rf"{package} +{re.escape(installed)} +{re.escape(verdict)}", said)
    assert f"hub: {found['hub']}" in said
    assert f"take this profile: {found['profile']}" in said
    for private in (str(Path.home()), platform.node(), str(Path(cli.__file__).parent)):
        assert private not in result.output


def test_the_version_is_that_of_the_project(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert qlora_nb_version == project["version"]
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"qlora-nb {project['version']}\n"
    assert machine.installed("qlora-nb") == project["version"]  # what a run's record carries


@pytest.mark.fault(38)
def test_doctor_exits_with_1_on_a_wrong_version(monkeypatch):
    wrong = machine.Version("peft", "0.1", ">=0.19", None)
    monkeypatch.setattr(machine, "versions", lambda: [wrong])
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "pip install 'peft>=0.19'" in result.output


def test_plan_adds_up():
    result = CliRunner().invoke(cli.app, ["plan", "--profile", "full", "--gpu-gib", "24"])
    assert result.exit_code == 0, result.output
    for part in result.output.split("\n\n")[:2]:  # fine-tuning, answering
        rows = [
            line.split(" B ")[0].rsplit(maxsplit=1) for line in part.splitlines() if " B " in line
        ]
        sizes = {name.strip(): int(size.replace(",", "")) for name, size in rows}
        assert sizes.pop("total") == sum(sizes.values())
        assert sizes["4-bit codes"] * 2 == 11_324_620_800
    small = CliRunner().invoke(cli.app, ["plan", "--profile", "full", "--gpu-gib", "4"])
    assert small.exit_code == 1
    assert "missing" in small.output


def test_run_exits_with_1_if_a_notebook_failed(monkeypatch):
    for status, code in (("done", 0), ("failed", 1)):
        monkeypatch.setattr(
            sequence, "run_sequence", lambda *_, status=status, **__: {"status": status}
        )
        assert CliRunner().invoke(cli.app, ["run", "-p", "r", "8"]).exit_code == code


def test_parameters_are_collected(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        sequence, "run_sequence", lambda *a, **more: seen.append((*a, more)) or {"status": "done"}
    )
    arguments = [
        "run",
        "--only",
        "03, 04",
        "--resume",
        "latest",
        "--out",
        str(tmp_path),
        "-p",
        "r",
        "8",
        "-p",
        "learning_rate",
        "-1",
    ]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    cli_notebooks = sources.project_root() / "notebooks"
    assert seen == [
        (
            {"profile": "tiny", "output_dir": str(tmp_path), "r": "8", "learning_rate": "-1"},
            ["03", "04"],
            cli_notebooks,
            {"resume": "latest"},
        )
    ]


def test_a_learners_copy_is_kept(toy, tmp_path, capsys):
    folder = toy("01_a", "guess = None")
    toy("02_b", "1")
    notebook = nbformat.read(folder / "01_a.ipynb", 4)
    notebook.cells[1].outputs, notebook.cells[1].execution_count = (
        [nbformat.v4.new_output("stream", text="answer")],
        7,
    )
    nbformat.write(notebook, folder / "01_a.ipynb")
    mine = tmp_path / "my_notebooks"
    assert [p.name for p in lab.copy_for_learning(folder, mine)] == ["01_a.ipynb", "02_b.ipynb"]
    copy = nbformat.read(mine / "01_a.ipynb", 4)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in copy.cells)
    (mine / "01_a.ipynb").write_text("my own work")
    assert lab.copy_for_learning(folder, mine) == []
    assert (mine / "01_a.ipynb").read_text() == "my own work"
    assert "kept your 01_a.ipynb" in capsys.readouterr().out


def test_interrupt_exits_130(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sequence, "run_sequence", stop)
    assert CliRunner().invoke(cli.app, ["run"]).exit_code == 130


def test_only_the_kits_own_error_is_softened(monkeypatch):
    monkeypatch.setattr(sequence, "run_sequence", lambda *_, **__: 1 / 0)
    assert isinstance(CliRunner().invoke(cli.app, ["run"]).exception, ZeroDivisionError)
    with pytest.raises(KitError):
        spellings.parameters(["x"])
