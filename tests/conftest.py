"""Shared by all tests: the repository, small notebooks made on the spot, one papermill pass over
the real ones, the fault matrix, and which files begin.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

# Before torch is imported. Each of several workers has a core of its own; a single process and its
# children have two. More threads only wait for each other, and those that wait shall sleep.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(ROOT / "tools"))


def python_of(cell: nbformat.NotebookNode) -> str:
    """A code cell as plain Python: what IPython alone understands, as the first cell's %pip, is a
    call then.
    """
    return TransformerManager().transform_cell(cell.source)


# ---- the fault matrix
# ------------------------------------------------------------------------------------------------

COLLECTED: pytest.StashKey[list[pytest.Item]] = pytest.StashKey()
"""All tests that were collected, before -k and -m leave some out."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = list(items)
    longest_first(items)


@pytest.fixture
def fault_tests(request) -> dict[int, set[str]]:
    """Row of the fault matrix → the tests that carry its number. Skipped where not all files were
    collected.
    """
    collected = request.config.stash[COLLECTED]
    left_out = {path.name for path in ROOT.glob("tests/test_*.py")} - {
        item.path.name for item in collected
    }
    if left_out or any("::" in argument for argument in request.config.args):
        pytest.skip("only a run of all tests knows whether each row of the fault matrix has one")
    found: dict[int, set[str]] = {}
    for item in collected:
        for mark in item.iter_markers("fault"):
            for row in mark.args:
                found.setdefault(row, set()).add(item.nodeid)
    return found


# ---- several workers (pytest -n 2 --dist loadfile)
# -------------------------------------------------------------------

LONGEST = (
    "test_browser",
    "test_notebooks",
    "test_resume",
    "test_faults",
    "test_training",
    "test_rehearsal_training",
)
"""Files that take minutes, the longest first. A file stays in one process, so that what its tests
share is made once.
"""


def longest_first(items: list[pytest.Item]) -> None:
    """With several workers the longest files begin, so that none is left alone with one of them at
    the end.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# ---- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def toy(tmp_path):
    """Write a small notebook: `toy("01_name", "code", …)` makes one with a parameters cell before
    the code cells.
    """
    folder = tmp_path / "toys"
    folder.mkdir()

    def write(name: str, *code: str, results: bool = True) -> Path:
        parameters = nbformat.v4.new_code_cell(
            'profile: str = "tiny"  # world', metadata={"tags": ["parameters"]}
        )
        cells = [
            nbformat.v4.new_markdown_cell(f"# Toy {name}"),
            parameters,
            *map(nbformat.v4.new_code_cell, code),
        ]
        if results:
            source = "from qlora_nb.record.runs import key_results\nkey_results({'answer': 42})"
            cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": ["key-results"]}))
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        nbformat.write(notebook, folder / f"{name}.ipynb")
        return folder

    return write


class Listener:
    """A hub on loopback that answers nothing and writes down who called."""

    def __init__(self):
        self.calls: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(1)
                try:
                    self.calls.append(connection.recv(200))
                except OSError:
                    self.calls.append(b"")

    def environment(self) -> dict[str, str]:
        """Every way out leads here: the hub and all proxies. Nothing says that the hub is
        offline.
        """
        ways = (
            "HF_ENDPOINT",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
            "http_proxy",
            "https_proxy",
            "all_proxy",
        )
        return dict.fromkeys(ways, self.url) | {
            "NO_PROXY": "",
            "no_proxy": "",
            "HF_HUB_OFFLINE": "0",
        }

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener():
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture(scope="session")
def papermill_pass(tmp_path_factory):
    """All notebooks once, in order, in profile tiny, with every way to a network leading to a
    listener: what all checks share.
    """
    from qlora_nb.batch import sequence

    listener = Listener()
    out = tmp_path_factory.mktemp("pass")
    home = out / "hub"  # an empty cache: nothing that was fetched earlier can help
    environment = listener.environment() | {"HF_HOME": str(home)}
    try:
        with pytest.MonkeyPatch.context() as inherited:
            for name, value in environment.items():
                inherited.setenv(name, value)
            summary = sequence.run_sequence({"profile": "tiny", "output_dir": str(out)})
    finally:
        listener.close()
    summary["calls"] = listener.calls
    print(
        json.dumps(
            {
                o["notebook"]: [o["status"], o["wall_s"], o["peak_bytes"] >> 20]
                for o in summary["notebooks"]
            }
        )
    )
    yield summary
    shutil.rmtree(out, ignore_errors=True)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program. Where there is none its tests are skipped, unless
    QLORA_NB_REQUIRE_BROWSER=1.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        if os.environ.get("QLORA_NB_REQUIRE_BROWSER") == "1":
            pytest.fail(
                "QLORA_NB_REQUIRE_BROWSER=1 and there is no Chromium: apt-get install chromium"
            )
        pytest.skip("browser tests: there is no Chromium here (Debian: apt-get install chromium)")
    return program


@pytest.fixture(scope="session")
def lab(chromium, tmp_path_factory):
    """One JupyterLab for all tests with a browser."""
    from test_browser import Lab

    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB of its own: a disk that can really be filled. Skipped where this user
    may not mount one.
    """
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("a small file system cannot be mounted here (it needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def closed_folder(tmp_path):
    """A folder into which nobody may write, root neither."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):  # root: only a mount that is read-only stops it
        command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
        if (
            not shutil.which("mount")
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("root may write everywhere here and cannot mount a read-only file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
