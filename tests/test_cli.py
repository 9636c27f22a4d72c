"""The command line answers at once, refuses in one sentence, and never overwrites a learner's
copy.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import nbformat
import pytest
from typer.testing import CliRunner

from qlora_nb import cli
from qlora_nb.errors import KitError


def qlora_nb(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlora_nb.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def test_import_is_fast_and_without_torch():
    program = "import sys, time; t = time.perf_counter(); import qlora_nb; print(time.perf_counter() - t, 'torch' in sys.modules)"
    best = min(_import_time(program) for _ in range(3))
    assert best < 0.2
    omp = "import os, qlora_nb; print(os.environ['OMP_WAIT_POLICY'])"
    assert (
        subprocess.run(
            [sys.executable, "-c", omp], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "PASSIVE"
    )


def _import_time(program: str) -> float:
    seconds, torch = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch == "False"
    return float(seconds)


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "settings",
        "machine",
        "batch.sequence",
        "batch.report",
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
def test_refusals_are_one_sentence_and_exit_2(arguments, expected, root):
    done = qlora_nb(*arguments, cwd=root)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
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
        cli.copy_for_learning(folder, tmp_path / "taken")
    with pytest.raises(KitError, match="no notebooks found"):
        cli.copy_for_learning(tmp_path / "none", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    (folder / "02_b.ipynb").write_text("{")
    with pytest.raises(KitError, match="this is no notebook"):
        cli.copy_for_learning(folder, tmp_path / "mine")


def test_full_profile_is_refused_fast_without_a_gpu(root):
    from qlora_nb import machine

    if machine.gpus():
        pytest.skip("this machine has a GPU")
    started = time.time()
    done = qlora_nb("run", "--profile", "full", cwd=root)
    assert done.returncode == 2
    assert "EleutherAI/pythia-12b needs a GPU" in done.stderr
    assert "GiB" in done.stderr
    assert time.time() - started < 10, "it must come before any download or heavy import"


def test_doctor_lists_every_dependency():
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("torch", "bitsandbytes", "take this profile"))


def test_doctor_exits_with_1_on_a_wrong_version(monkeypatch):
    from qlora_nb import machine

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
    from qlora_nb.batch import sequence

    for status, code in (("done", 0), ("failed", 1)):
        monkeypatch.setattr(
            sequence, "run_sequence", lambda *_, status=status, **__: {"status": status}
        )
        assert CliRunner().invoke(cli.app, ["run", "-p", "r", "8"]).exit_code == code


def test_parameters_are_collected(monkeypatch, tmp_path):
    from qlora_nb.batch import sequence

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
    assert seen == [
        (
            {"profile": "tiny", "output_dir": str(tmp_path), "r": "8", "learning_rate": "-1"},
            ["03", "04"],
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
    assert [p.name for p in cli.copy_for_learning(folder, mine)] == ["01_a.ipynb", "02_b.ipynb"]
    copy = nbformat.read(mine / "01_a.ipynb", 4)
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in copy.cells)
    (mine / "01_a.ipynb").write_text("my own work")
    assert cli.copy_for_learning(folder, mine) == []
    assert (mine / "01_a.ipynb").read_text() == "my own work"
    assert "kept your 01_a.ipynb" in capsys.readouterr().out


def test_interrupt_exits_130(monkeypatch):
    from qlora_nb.batch import sequence

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sequence, "run_sequence", stop)
    assert CliRunner().invoke(cli.app, ["run"]).exit_code == 130


def test_only_the_kits_own_error_is_softened(monkeypatch):
    from qlora_nb.batch import sequence

    monkeypatch.setattr(sequence, "run_sequence", lambda *_, **__: 1 / 0)
    assert isinstance(CliRunner().invoke(cli.app, ["run"]).exception, ZeroDivisionError)
    with pytest.raises(KitError):
        cli._parameters(["x"])
