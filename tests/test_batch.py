"""The batch run tells the truth: it believes a notebook's results and outputs, not papermill's
word.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from html.parser import HTMLParser

import nbformat
import psutil
import pytest
from test_browser import QUIET

from qlora_nb.batch import one_notebook, report, sequence
from qlora_nb.errors import KitError
from qlora_nb.record import runs

DIES = (
    "import os, signal\nfrom qlora_nb.record import runs\nfrom qlora_nb.settings import validate\n"
    "run = runs.Run(validate({'output_dir': output_dir}), '02_dies')\nos.kill(os.getpid(), signal.SIGKILL)"
)
WIDGET_FAILS = "import ipywidgets as W\nout = W.Output()\nwith out:\n    1 / 0\nout"
PICTURE = "import matplotlib.pyplot as plt\n_ = plt.plot([0, 1])"


def run(folder, tmp_path, **more):
    given = {"output_dir": str(tmp_path / "out")}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        summary = sequence.run_sequence(given, notebooks=folder, **more)
    return summary, said.getvalue().splitlines()


@pytest.fixture
def outcomes(toy, tmp_path):
    """One sequence of six toys, each with its own fate."""
    toy("01_good", PICTURE, "print('profile', profile)")
    toy("02_dies", DIES)
    toy("03_widget", WIDGET_FAILS)
    toy("04_no_results", "1 + 1", results=False)
    toy(
        "05_raises",
        "from qlora_nb.errors import KitError\nraise KitError('r is too small', value=0, allowed='1 or more')",
    )
    folder = toy(
        "06_secret",
        "import os\nprint(os.environ['MY_API_TOKEN'], 'hf_' + 'a' * 20)",
        "print('<script>alert(1)</script>')",
    )
    os.environ["MY_API_TOKEN"] = "very-secret-value"
    try:
        summary, lines = run(folder, tmp_path)
    finally:
        del os.environ["MY_API_TOKEN"]
    return {o["notebook"]: o for o in summary["notebooks"]}, summary, lines


@pytest.mark.fault(33, 34)
@pytest.mark.slow
def test_each_fate_is_told(outcomes, tmp_path):
    found, summary, lines = outcomes
    assert found["01_good"]["status"] == "done", found["01_good"]
    assert found["01_good"]["results"] == {"answer": 42}
    assert found["01_good"]["peak_bytes"] > 20 * 2**20
    assert found["02_dies"]["exit_code"] != 0
    assert found["02_dies"]["status"] == "died"
    (run,) = (tmp_path / "out" / "tiny").glob("02_dies-*")
    assert runs.status_of(run) == "died", "the run's own record was never closed"
    assert any("kernel died" in p and "memory" in p for p in found["02_dies"]["problems"])
    assert any(
        "needs 190 MiB" in p and "per_device_train_batch_size=1" in p
        for p in found["02_dies"]["problems"]
    )
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
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("tr") == 7
    assert "script" not in page.tags
    [source] = page.found["src"]
    assert source.startswith("data:image/png;base64,"), "the figure of the first toy"
    assert "2 of 6 notebooks done" in page.text["h1"]
    # contents, then the executed notebooks and the folder of the one run; each leads somewhere
    anchors = [link for link in page.found["href"] if link.startswith("#")]
    assert [link.removeprefix("#") for link in anchors] == page.found["id"]
    assert len(anchors) == 6
    files = [link for link in page.found["href"] if not link.startswith("#")]
    (of_the_run,) = (tmp_path / "out" / "tiny").glob("02_dies-*")
    of_the_run = f"./../{of_the_run.name}"
    executed = [f"./{name}.ipynb" for name in found]
    assert files == [*executed[:2], f"{of_the_run}/", f"{of_the_run}/manifest.json", *executed[2:]]
    assert all((folder / link).exists() for link in files)


class Page(HTMLParser):
    """The tags of a page in their order, the attributes that lead somewhere, texts by tag."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.found: dict[str, list] = {"src": [], "href": [], "id": []}
        self.text: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.add(name)
            if name in self.found:
                self.found[name].append(value)

    def handle_data(self, data):
        for tag in self.tags[-3:]:
            self.text[tag] = self.text.get(tag, "") + data


def told(name: str, **more) -> dict:
    """What a summary says of a notebook."""
    outcome = {"notebook": name, "status": "done", "wall_s": 1.0, "peak_bytes": 2**20}
    return {**outcome, "problems": [], "results": {}, **more}


def a_summary(*outcomes: dict, **more) -> dict:
    whole = {"status": "done", "started": "2026-01-02T03:04:05+00:00", "wall_s": 253.0}
    whole |= {"profile": "tiny", "parameters": {}, "versions": {}, "notebooks": list(outcomes)}
    return whole | {"chosen": [outcome["notebook"] for outcome in outcomes]} | more


def a_run(folder, notebook: str, started: str, **record) -> None:
    folder.mkdir(parents=True)
    whole = {"notebook": notebook, "started": started, **record}
    (folder / "manifest.json").write_text(json.dumps(whole))
    (folder / "train.py").touch()


def test_a_report_opens_with_what_matters(tmp_path):
    score = {"exact_match_before": {"all": 0.004}, "exact_match_after": {"all": 0.958}}
    a_run(tmp_path / "06_x-2", "06_x", "2026-01-02T03:05:00+00:00", metrics=score)
    old = {"exact_match_before": {"all": 0.5}, "exact_match_after": {"all": 0.5}}
    a_run(tmp_path / "06_x-1", "06_x", "2026-01-02T03:00:00+00:00", metrics=old)
    a_run(tmp_path / "08_y-2", "08_y", "2026-01-02T03:05:00+00:00")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    folder = tmp_path / "sequence"
    folder.mkdir()
    text = report.page(a_summary(told("06_x"), told("07_z")), folder)
    assert "2 of 2 notebooks done" in text
    assert "4 min 13 s" in text
    assert "2026-01-02 03:04 UTC" in text
    said = " ".join(text.split())
    assert "<b>0.4 %</b> before tuning, <b>95.8 %</b> after" in said
    # an older run, another notebook's, and what is not there are not linked
    files = [link for link in Page(text).found["href"] if not link.startswith("#")]
    assert files == [f"./../06_x-2/{name}" for name in ("", "train.py", "manifest.json")]


def test_a_report_of_a_part_says_how_much_is_done(tmp_path):
    stopped = a_summary(told("01_a"), told("02_b", status="interrupted"), status="interrupted")
    stopped["chosen"] = ["01_a", "02_b", "03_c"]
    page = Page(report.page(stopped, tmp_path))
    assert "1 of 3 notebooks done" in page.text["h1"]
    assert "exactly" not in page.text["p"], "no notebook tells how many answers are right"
    assert "interrupted" in page.text["b"]


def test_links_of_a_report_are_paths_and_nothing_else(tmp_path):
    """Names of folders that a link would read as something else."""
    folder = tmp_path / "sequence"
    folder.mkdir()
    names = ["javascript:alert(1)", 'a"onclick="x', "b#c?d=e", "f g%20"]
    for n, name in enumerate(names):
        a_run(tmp_path / name, "06_x", f"2026-01-02T03:05:0{n}+00:00")
    nbformat.write(nbformat.v4.new_notebook(), folder / "06_x.ipynb")
    text = report.page(a_summary(told("06_x")), folder)
    assert "onclick" not in Page(text).attributes
    links = [link for link in Page(text).found["href"] if not link.startswith("#")]
    assert len(links) == 1 + 3 * len(names)
    for link in links:
        assert link.startswith("./")
        assert (folder / urllib.parse.unquote(link)).exists()


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1200])
def test_a_report_fits_a_phone(tmp_path, chromium, width):
    from playwright.sync_api import sync_playwright

    long = "a_very_long_name_without_any_space_in_it_" * 3
    results = {long: 12_345_678_901, "x": [0.1] * 40}
    a_run(tmp_path / long, "06_x", "2026-01-02T03:05:00+00:00")
    folder = tmp_path / "sequence"
    folder.mkdir()
    outcome = told("06_x", results=results, problems=[long * 2], status="failed")
    whole = a_summary(outcome, told(long), profile=long)
    (folder / "report.html").write_text(report.page(whole, folder))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(f"file://{folder}/report.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("td a").first.click()
        assert page.url.endswith("report.html#n1")
        browser.close()


def test_report_escapes_everything(tmp_path):
    evil = "<script>alert(1)</script>\"'"
    outcome = {
        "notebook": evil,
        "status": "done",
        "wall_s": 1.0,
        "peak_bytes": 1,
        "problems": [evil],
        "results": {evil: evil},
    }
    summary = {
        "status": evil,
        "started": evil,
        "parameters": {evil: evil},
        "versions": {evil: evil},
        "notebooks": [outcome],
    }
    cell = nbformat.v4.new_code_cell(
        "1",
        outputs=[
            nbformat.v4.new_output(
                "display_data",
                data={"image/png": 'x" onerror="alert(1)'},
                metadata={"image/png": {"alt": f"A curve {evil}"}},
            )
        ],
    )
    (tmp_path / "x").mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {evil}"), cell])
    summary["notebooks"].append({**outcome, "notebook": "n"})
    nbformat.write(notebook, tmp_path / "n.ipynb")
    page = report.page(summary, tmp_path)
    assert "<script" not in page
    assert 'onerror="' not in page
    assert 'alt="A curve ' in page


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            nbformat.v4.new_output("error", ename="ValueError", evalue="no"),
            ["cell 0: ValueError: no"],
        ),
        (
            nbformat.v4.new_output(
                "stream", name="stderr", text="Traceback (most recent call last):\nOops"
            ),
            ["a traceback was printed: Oops"],
        ),
        (nbformat.v4.new_output("stream", name="stdout", text="fine"), []),
        (
            nbformat.v4.new_output(
                "stream", name="stdout", text="asked: Traceback (most recent call last):\nOops"
            ),
            [],
        ),
    ],
)
def test_stored_errors(output, expected):
    plain = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    assert [e in f for e, f in zip(expected, one_notebook.stored_errors(plain), strict=True)] == [
        True
    ] * len(expected)
    state = {
        "application/vnd.jupyter.widget-state+json": {
            "state": {"id": {"state": {"outputs": [output]}}}
        }
    }
    hidden = nbformat.v4.new_notebook(metadata={"widgets": state})
    assert len(one_notebook.stored_errors(hidden)) == len(expected)
    allowed = nbformat.v4.new_code_cell(
        "x", outputs=[output], metadata={"tags": ["raises-exception"]}
    )
    assert one_notebook.stored_errors(nbformat.v4.new_notebook(cells=[allowed])) == []


@pytest.mark.fault(17)
def test_refusals_come_before_any_process(toy, tmp_path, monkeypatch):
    folder = toy("01_good", "1")
    monkeypatch.setattr(
        one_notebook.subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started")
    )
    (tmp_path / "a file").write_text("")
    for parameters, only, expected in (
        ({"max_stepz": 3}, None, "did you mean max_steps"),
        ({"r": "0"}, None, "greater than or equal to 1"),
        ({"profile": "huge"}, None, "unknown profile"),
        ({}, ["09"], "no such notebook"),
        ({}, [""], "no such notebook"),
        ({"output_dir": str(tmp_path / "a file")}, None, "cannot be written to"),
    ):
        with pytest.raises(KitError, match=expected):
            sequence.run_sequence(parameters, only=only, notebooks=folder)
    with pytest.raises(KitError, match="no notebooks found"):
        sequence.run_sequence({"output_dir": str(tmp_path)}, notebooks=tmp_path)


@pytest.mark.parametrize(
    "record", ["[]", "null", '{"status": "running"}', '{"parameters": 7}', "{", ""]
)
def test_a_summary_that_is_none_is_no_unfinished_sequence(toy, tmp_path, record):
    folder = tmp_path / "out" / "tiny" / "sequence-20260101-000000"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(record)
    for resume in ("latest", str(folder)):
        with pytest.raises(KitError, match="no unfinished sequence"):
            sequence.run_sequence(
                {"output_dir": str(tmp_path / "out")}, notebooks=toy("01_good", "1"), resume=resume
            )
    with pytest.raises(KitError, match="resumes with the notebooks it began with"):
        sequence.run_sequence(
            {"output_dir": str(tmp_path / "out")},
            ["01"],
            notebooks=toy("01_good", "1"),
            resume="latest",
        )


@pytest.mark.fault(35)
def test_a_notebook_that_cannot_be_read_stops_nothing_but_is_told(toy, tmp_path):
    """Before the run it is refused; one that papermill left cut off counts as failed."""
    folder = toy("01_good", "1")
    (folder / "02_broken.ipynb").write_text('{"cells": [')
    with pytest.raises(KitError, match="this is no notebook"):
        sequence.run_sequence({"output_dir": str(tmp_path)}, notebooks=folder)
    outcome = one_notebook.Outcome("01_good", exit_code=-15)
    cut = tmp_path / "cut.ipynb"
    cut.write_text('{"cells": [')
    one_notebook.take_out_secrets(cut)
    one_notebook.judge(outcome, cut, tmp_path / "none", [])
    assert outcome.status == "failed"
    assert "cut.ipynb is cut off: papermill was ended while it wrote" in outcome.problems


def test_a_path_means_the_folder_the_user_is_in(toy, tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 9))
    monkeypatch.chdir(tmp_path)
    given = {"output_dir": str(tmp_path / "out"), "dataset": "rows.json", "model_id": "pocket"}
    summary = sequence.run_sequence(given, notebooks=toy("01_good", "1"))
    assert summary["parameters"]["dataset"] == str(tmp_path / "rows.json")
    assert summary["parameters"].get("model_id", "pocket") == "pocket"


def test_a_foreign_kernel_is_refused(tmp_path, monkeypatch):
    one_notebook.require_own_kernel()
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/elsewhere/python", "-f", "{connection_file}"], "display_name": "x"})
    )
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(KitError, match="another Python"):
        one_notebook.require_own_kernel()


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.1)
    return condition()


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def long(toy, tmp_path):
    """A sequence in a process of its own: 01 is done, 02 sleeps until it is hurt (or until a file
    `go` is there).

    `long()` → (that process, the pid of 02's kernel, the folder of the notebooks).
    """
    pid = tmp_path / "pid"
    toy("01_short", "1 + 1")
    sleep = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\nprint('before the sleep')"
    folder = toy(
        "02_long",
        sleep,
        f"while not pathlib.Path({str(tmp_path / 'go')!r}).exists():\n    time.sleep(0.1)",
    )
    program = (
        "from pathlib import Path; from qlora_nb.batch import sequence\n"
        f"sequence.run_sequence({{'output_dir': {str(tmp_path / 'out')!r}}}, notebooks=Path({str(folder)!r}))"
    )

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert wait_for(lambda: pid.is_file() and pid.read_text())
        time.sleep(0.5)  # papermill writes the notebook down before each cell
        return process, int(pid.read_text()), folder

    return start


def record_of(tmp_path):
    (summary,) = (tmp_path / "out").glob("tiny/sequence-*/summary.json")
    return json.loads(summary.read_text())


@pytest.mark.fault(23)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT] * 3, 130)],
    ids=["once", "term", "thrice"],
)
def test_interrupt_leaves_no_kernel(long, tmp_path, signals, code):
    process, kernel, _ = long()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    assert process.wait(60) in (code, -signals[0])
    assert is_gone(kernel)
    record = record_of(tmp_path)
    assert record["status"] == "interrupted"
    assert [(o["notebook"], o["status"]) for o in record["notebooks"]] == [
        ("01_short", "done"),
        ("02_long", "interrupted"),
    ]


@pytest.mark.fault(24)
@pytest.mark.slow
def test_a_killed_sequence_leaves_no_kernel_and_is_gone_on_with(long, tmp_path, capsys):
    process, kernel, folder = long()
    given = {"output_dir": str(tmp_path / "out")}
    with pytest.raises(KitError, match="another process writes"):  # two never mix
        sequence.run_sequence(given, notebooks=folder, resume="latest")
    process.kill()
    process.wait(60)
    assert wait_for(lambda: is_gone(kernel), 30), (
        "papermill and its kernel outlive a batch that was killed"
    )
    (written,) = (tmp_path / "out").glob("tiny/sequence-*")
    partial = nbformat.read(written / "02_long.ipynb", 4)
    assert "before the sleep" in str([c.get("outputs") for c in partial.cells]), (
        "what was done can be read"
    )
    record = record_of(tmp_path)
    assert (record["status"], [o["status"] for o in record["notebooks"]]) == ("running", ["done"])
    kept = (written / "01_short.ipynb").stat().st_mtime_ns
    with pytest.raises(KitError, match="seed was None, is 3"):
        sequence.run_sequence({**given, "seed": 3}, notebooks=folder, resume="latest")
    with pytest.raises(KitError, match="no unfinished sequence"):
        sequence.run_sequence(given, notebooks=folder, resume=str(tmp_path))
    (tmp_path / "go").touch()
    capsys.readouterr()
    summary = sequence.run_sequence(given, notebooks=folder, resume="latest")
    lines = capsys.readouterr().out.splitlines()
    assert summary["folder"] == str(written)
    assert (summary["status"], [o["status"] for o in summary["notebooks"]]) == (
        "done",
        ["done", "done"],
    )
    assert (written / "01_short.ipynb").stat().st_mtime_ns == kept, (
        "what was done is not done again"
    )
    assert any("01_short" in line and "is done already" in line for line in lines)
    with pytest.raises(KitError, match="no unfinished sequence"):
        sequence.run_sequence(given, notebooks=folder, resume="latest")


@pytest.mark.fault(35)
@pytest.mark.slow
def test_papermill_killed_is_told_and_leaves_no_kernel(long, tmp_path):
    process, kernel, _ = long()
    (papermill,) = [p for p in psutil.Process(process.pid).children() if "papermill" in p.cmdline()]
    papermill.kill()
    process.wait(60)
    assert wait_for(lambda: is_gone(kernel), 30)
    record = record_of(tmp_path)
    assert (record["status"], record["notebooks"][1]["status"]) == ("failed", "died")
    assert "memory" in record["notebooks"][1]["problems"][0]
    assert "Next option: " in record["notebooks"][1]["problems"][-1]
    assert "[" not in record["notebooks"][1]["problems"][-1], "a sentence, not a list"


@pytest.mark.fault(35)
@pytest.mark.slow
def test_a_cell_that_takes_too_long_leaves_a_readable_notebook_and_no_kernel(toy, tmp_path):
    pid = tmp_path / "pid"
    first = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\nprint('so far')"
    source = toy("01_slow", first, "time.sleep(300)") / "01_slow.ipynb"
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(source),
        str(tmp_path / "out.ipynb"),
        "--execution-timeout",
        "5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "Timeout" in done.stderr
    assert "so far" in str(
        [c.get("outputs") for c in nbformat.read(tmp_path / "out.ipynb", 4).cells]
    )
    assert wait_for(lambda: is_gone(int(pid.read_text())), 30)


def test_a_changed_notebook_is_not_kept(toy, tmp_path):
    folder = toy("01_a", "print(1)")
    toy("02_b", "1 / 0")
    given = {"output_dir": str(tmp_path / "out")}
    first = sequence.run_sequence(given, notebooks=folder)
    assert [o["status"] for o in first["notebooks"]] == ["done", "failed"]
    (folder / "01_a.ipynb").write_text(
        (folder / "01_a.ipynb").read_text().replace("print(1)", "print(2)")
    )
    again = sequence.run_sequence(given, notebooks=folder, resume=first["folder"])
    assert [o["status"] for o in again["notebooks"]] == ["done", "failed"]
    assert (
        "2\\n"
        in (tmp_path / "out" / "tiny" / first["folder"].rsplit("/")[-1] / "01_a.ipynb").read_text()
    )


@pytest.mark.fault(2)
def test_parameters_reach_the_notebook_as_numbers(toy, tmp_path):
    folder = toy("01_types", "print(repr(learning_rate), repr(double_quant), repr(prompts))")
    given = {
        "output_dir": str(tmp_path / "ö ut"),
        "learning_rate": "2e-4",
        "double_quant": "false",
        "prompts": "ünï: #x",
    }
    summary = sequence.run_sequence(given, notebooks=folder)
    assert summary["status"] == "done", summary["notebooks"]
    (executed,) = (tmp_path / "ö ut").glob("tiny/sequence-*/01_types.ipynb")
    assert "0.0002 False ['ünï: #x']" in executed.read_text(encoding="utf-8")
