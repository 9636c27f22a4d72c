"""The batch run tells the truth: it believes a notebook's results and outputs, not papermill's word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import nbformat
import psutil
import pytest

from qlora_nb.engine import batch, report
from qlora_nb.errors import KitError

DIES = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
WIDGET_FAILS = "import ipywidgets as W\nout = W.Output()\nwith out:\n    1 / 0\nout"
PICTURE = "import matplotlib.pyplot as plt\n_ = plt.plot([0, 1])"


def run(folder, tmp_path, **more):
    lines = []
    summary = batch.run_sequence({"output_dir": str(tmp_path / "out")}, notebooks=folder, say=lines.append, **more)
    return summary, lines


@pytest.fixture
def outcomes(toy, tmp_path):
    """One sequence of six toys, each with its own fate."""
    toy("01_good", PICTURE, "print('profile', profile)")
    toy("02_dies", DIES)
    toy("03_widget", WIDGET_FAILS)
    toy("04_no_results", "1 + 1", results=False)
    toy("05_raises", "from qlora_nb.errors import KitError\nraise KitError('r is too small', value=0, allowed='1 or more')")
    folder = toy(
        "06_secret", "import os\nprint(os.environ['MY_API_TOKEN'], 'hf_' + 'a' * 20)", "print('<script>alert(1)</script>')"
    )
    os.environ["MY_API_TOKEN"] = "very-secret-value"
    try:
        summary, lines = run(folder, tmp_path)
    finally:
        del os.environ["MY_API_TOKEN"]
    return {o["notebook"]: o for o in summary["notebooks"]}, summary, lines


@pytest.mark.slow
def test_each_fate_is_told(outcomes, tmp_path):
    found, summary, lines = outcomes
    assert found["01_good"]["status"] == "done", found["01_good"]
    assert found["01_good"]["results"] == {"answer": 42}
    assert found["01_good"]["peak_bytes"] > 20 * 2**20
    assert found["02_dies"]["exit_code"] != 0
    assert any("kernel died" in p and "memory" in p for p in found["02_dies"]["problems"])
    assert any("needs 190 MiB" in p and "per_device_train_batch_size=1" in p for p in found["02_dies"]["problems"])
    # papermill itself is content with this one
    assert found["03_widget"]["exit_code"] == 0
    assert found["03_widget"]["status"] == "failed"
    assert "inside a widget: ZeroDivisionError" in found["03_widget"]["problems"][0]
    assert found["04_no_results"]["problems"] == ["the notebook did not reach its key results"]
    assert "r is too small (got 0)" in found["05_raises"]["problems"][0]
    assert "Traceback" not in str(found["05_raises"]["problems"])
    assert found["06_secret"]["status"] == "done", "a later notebook runs after an earlier failure"
    assert summary["status"] == "failed"
    assert any("failed: 02_dies, 03_widget, 04_no_results, 05_raises" in line for line in lines)
    # what was written: everything, readable, and without the secret
    (folder,) = (tmp_path / "out" / "tiny").glob("sequence-*")
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert nbformat.read(folder / "06_secret.ipynb", 4)
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "very-secret-value" not in text, file
        assert "hf_aaaa" not in text, file
    _check_page((folder / "report.html").read_text(encoding="utf-8"))


def _check_page(page: str) -> None:
    sources, seen = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append(tag)
            sources.extend(v for k, v in attributes if k in ("src", "href"))

    Reader().feed(page)
    assert seen.count("tr") == 7
    assert "script" not in seen
    assert len(sources) == 1, "the figure of the first toy"
    assert sources[0].startswith("data:image/png;base64,")


def test_report_escapes_everything(tmp_path):
    evil = "<script>alert(1)</script>\"'"
    outcome = {"notebook": evil, "status": "done", "wall_s": 1.0, "peak_bytes": 1, "problems": [evil], "results": {evil: evil}}
    summary = {"status": evil, "started": evil, "parameters": {evil: evil}, "versions": {evil: evil}, "notebooks": [outcome]}
    cell = nbformat.v4.new_code_cell(
        "1", outputs=[nbformat.v4.new_output("display_data", data={"image/png": 'x" onerror="alert(1)'})]
    )
    caption = nbformat.v4.new_markdown_cell(f"**Figure 1.** A *curve* {evil}")
    (tmp_path / "x").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {evil}"), cell, caption])
    summary["notebooks"].append({**outcome, "notebook": "n"})
    nbformat.write(notebook, tmp_path / "n.ipynb")
    page = report.page(summary, tmp_path)
    assert "<script" not in page
    assert 'onerror="' not in page
    assert "Figure 1. A curve" in page


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (nbformat.v4.new_output("error", ename="ValueError", evalue="no"), ["cell 0: ValueError: no"]),
        (
            nbformat.v4.new_output("stream", name="stderr", text="Traceback (most recent call last):\nOops"),
            ["a traceback was printed: Oops"],
        ),
        (nbformat.v4.new_output("stream", name="stdout", text="fine"), []),
    ],
)
def test_stored_errors(output, expected):
    plain = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    assert [e in f for e, f in zip(expected, batch.stored_errors(plain), strict=True)] == [True] * len(expected)
    state = {"application/vnd.jupyter.widget-state+json": {"state": {"id": {"state": {"outputs": [output]}}}}}
    hidden = nbformat.v4.new_notebook(metadata={"widgets": state})
    assert len(batch.stored_errors(hidden)) == len(expected)
    allowed = nbformat.v4.new_code_cell("x", outputs=[output], metadata={"tags": ["raises-exception"]})
    assert batch.stored_errors(nbformat.v4.new_notebook(cells=[allowed])) == []


def test_refusals_come_before_any_process(toy, tmp_path, monkeypatch):
    folder = toy("01_good", "1")
    monkeypatch.setattr(batch.subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    (tmp_path / "a file").write_text("")
    for parameters, only, expected in (
        ({"max_stepz": 3}, None, "did you mean max_steps"),
        ({"r": "0"}, None, "at least 1"),
        ({"profile": "huge"}, None, "unknown profile"),
        ({}, ["09"], "no such notebook"),
        ({"output_dir": str(tmp_path / "a file")}, None, "cannot be written to"),
    ):
        with pytest.raises(KitError, match=expected):
            batch.run_sequence(parameters, only=only, notebooks=folder)
    with pytest.raises(KitError, match="no notebooks found"):
        batch.run_sequence({"output_dir": str(tmp_path)}, notebooks=tmp_path)


def test_a_foreign_kernel_is_refused(tmp_path, monkeypatch):
    batch.require_own_kernel()
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/elsewhere/python", "-f", "{connection_file}"], "display_name": "x"}))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(KitError, match="another Python"):
        batch.require_own_kernel()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_leaves_no_kernel(toy, tmp_path, number, code):
    folder = toy(
        "01_long",
        "import os, pathlib, time",
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(300)",
    )
    program = (
        "import sys; from pathlib import Path; from qlora_nb.engine import batch\n"
        f"batch.run_sequence({{'output_dir': {str(tmp_path / 'out')!r}}}, notebooks=Path({str(folder)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()) and time.time() < end:
        time.sleep(0.2)
    kernel = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    assert process.wait(30) in (code, -number)
    assert not psutil.pid_exists(kernel) or psutil.Process(kernel).status() == psutil.STATUS_ZOMBIE
    (summary,) = (tmp_path / "out").glob("tiny/sequence-*/summary.json")
    assert json.loads(summary.read_text())["status"] == "interrupted"


def test_parameters_reach_the_notebook_as_numbers(toy, tmp_path):
    folder = toy("01_types", "print(repr(learning_rate), repr(double_quant), repr(prompts))")
    given = {"output_dir": str(tmp_path / "ö ut"), "learning_rate": "2e-4", "double_quant": "false", "prompts": "ünï: #x"}
    summary = batch.run_sequence(given, notebooks=folder, say=lambda line: None)
    assert summary["status"] == "done", summary["notebooks"]
    (executed,) = (tmp_path / "ö ut").glob("tiny/sequence-*/01_types.ipynb")
    assert "0.0002 False ['ünï: #x']" in executed.read_text(encoding="utf-8")
