"""Shared by all tests: the repository, small notebooks made on the spot, and one papermill pass
over the real ones.
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

# Two cores shared by pytest, papermill and a kernel: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(ROOT / "tools"))


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
    try:
        summary = sequence.run_sequence(
            {"profile": "tiny", "output_dir": str(out)},
            extra_env=listener.environment() | {"HF_HOME": str(home)},
        )
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
