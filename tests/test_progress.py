"""Long work shows itself: one program with slowed work, in a terminal, in a file, in a notebook and
in papermill's log.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import nbformat
import pytest
from conftest import ROOT

LEFT = r"\[\d\d:\d\d<\d\d:\d\d,"  # time passed < time left
WORK = ("tokenizing", "Loading weights", "02_toy")
PROGRAM = """
import sys, time
from pathlib import Path
from qlora_nb.settings import resolve
settings = resolve({})
from qlora_nb.batch import sequence
from qlora_nb.model import data, load
import bitsandbytes.functional, datasets

def slowed(function, seconds):
    def slow(*args, **options):
        time.sleep(seconds)
        return function(*args, **options)
    return slow

tokenizer = load.load_tokenizer(settings)
rows = datasets.Dataset.from_list([{"instruction": "a", "input": "", "output": "b"}] * 60)
data.tokenize_rows(rows, tokenizer, settings)  # at once: shows nothing
print("so far nothing")
data._encode_row = slowed(data._encode_row, 0.08)
data.tokenize_rows(rows, tokenizer, settings)
bitsandbytes.functional.quantize_4bit = slowed(bitsandbytes.functional.quantize_4bit, 0.3)
load.load_base(settings)
if TOYS:
    sequence.run_sequence({"output_dir": OUT}, notebooks=Path(TOYS))
"""


def program(out, toys="") -> str:
    return f"OUT, TOYS = {str(out)!r}, {str(toys)!r}\n{PROGRAM}"


@pytest.fixture
def toys(toy):
    toy("01_toy", "import time\ntime.sleep(2)")
    return toy("02_toy", "import time\ntime.sleep(2)", "time.sleep(2)", "1")


def bars(text: str, work: tuple[str, ...] = WORK) -> dict[str, list[str]]:
    """Every state of each bar that says how much time is left; before the quick work is done there
    is none.
    """
    before, after = text.split("so far nothing")
    assert "%|" not in before, before
    states = re.split(r"[\r\n]+", after)
    return {
        name: [s for s in states if name in s and re.search(rf"{name}: +\d+%\|.*{LEFT}", s)]
        for name in work
    }


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
def test_in_a_terminal(toys, tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (30, 110))
    command = [sys.executable, "-c", program(tmp_path / "out", toys)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux says so at the end
            break
        if not block:
            break
        shown += block
    os.close(ours)
    assert process.wait(60) == 0, shown.decode()[-2000:]
    found = bars(shown.decode())
    assert all(found.values()), (found, shown.decode()[-2000:])
    assert "\rtokenizing" in shown.decode(), "one line that is overwritten"


@pytest.mark.slow
def test_in_a_file_each_state_is_a_line(tmp_path):
    command = [sys.executable, "-c", program(tmp_path / "out")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    shown = done.stdout.decode()
    assert done.returncode == 0, shown
    assert all(bars(shown, WORK[:2]).values()), shown
    assert "\r" not in shown


@pytest.mark.slow
def test_in_a_notebook_and_in_papermills_log(toys, tmp_path):
    cell = nbformat.v4.new_code_cell(program(tmp_path / "out", toys))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook, executed = tmp_path / "long.ipynb", tmp_path / "executed.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), notebook
    )
    command = [sys.executable, "-m", "papermill", str(notebook), str(executed), "--cwd", str(ROOT)]
    command += ["--log-output", "--no-progress-bar"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = nbformat.read(executed, 4).cells[0].outputs
    stored = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    assert all(bars(stored).values()), stored
    assert all(bars(done.stderr).values()), done.stderr
    # a widget would live only as long as the kernel, and a bar on stderr is painted red
    assert not [output for output in outputs if "data" in output]
    assert "%|" not in "".join(
        output.get("text", "") for output in outputs if output.get("name") == "stderr"
    )


def test_every_librarys_bar_is_this_one():
    """transformers, datasets, the hub's library and PEFT, whichever way they ask tqdm; and nothing
    before two seconds.
    """
    check = """
        import io
        from qlora_nb.progress import Bar
        from qlora_nb.settings import resolve
        resolve({})
        import datasets.utils, huggingface_hub.utils, peft.tuners.tuners_utils, transformers.utils.logging as transformers
        assert issubclass(datasets.utils.tqdm, Bar)
        assert issubclass(huggingface_hub.utils.tqdm, Bar)
        assert peft.tuners.tuners_utils.tqdm is Bar
        assert isinstance(transformers.tqdm([]), Bar)
        file = io.StringIO()
        assert list(Bar(range(1000), file=file)) == list(range(1000))
        assert file.getvalue() == ""
        assert 100 < len(list(Bar(range(1000), file=file, delay=0, mininterval=0, miniters=1))) and "100%|" in file.getvalue()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(check)], cwd=ROOT, check=True, env=environment()
    )
