"""`qlora-nb lab`: real servers, which say where to click, take another port where one is taken,
open the start page as a page, and change nothing of the user's own Jupyter.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import open_lab as lab
import pytest
from conftest import NOTEBOOKS, ROOT
from test_browser import QUIET
from typer.testing import CliRunner

from qlora_nb import cli
from qlora_nb.batch import one_notebook
from qlora_nb.errors import KitError

PLACES = ("SSH_CONNECTION", "WSL_DISTRO_NAME", "container", "KUBERNETES_SERVICE_HOST", "DISPLAY")


@pytest.fixture
def at_the_machine(monkeypatch):
    """As if the user sat here, whatever the tests run in."""
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    there = lab.Path.exists
    monkeypatch.setattr(lab.Path, "exists", lambda path: str(path) != "/.dockerenv" and there(path))
    return monkeypatch


def test_who_sits_at_the_machine_is_told_nothing_more(at_the_machine):
    assert lab.where_the_user_sits(8888) == ""


def test_over_ssh_the_very_line_to_type_is_said(at_the_machine):
    at_the_machine.setenv("SSH_CONNECTION", "192.0.2.7 50123 198.51.100.4 2222")
    at_the_machine.setenv("USER", "ada")
    said = lab.where_the_user_sits(8890)
    assert "\n  ssh -N -L 8890:localhost:8890 -p 2222 ada@198.51.100.4" in said
    at_the_machine.setenv("SSH_CONNECTION", "what a shell may set")
    assert lab.where_the_user_sits(8890) != said


def test_in_wsl_the_browser_is_windows_own(at_the_machine):
    at_the_machine.setenv("WSL_DISTRO_NAME", "Debian")
    assert "browser of Windows" in lab.where_the_user_sits(8888)


@pytest.mark.parametrize("mark", ["container", "KUBERNETES_SERVICE_HOST", "/.dockerenv"])
def test_in_a_container_the_port_has_to_be_published(at_the_machine, mark):
    if mark.startswith("/"):
        at_the_machine.setattr(lab.Path, "exists", lambda path: str(path) == mark)
    else:
        at_the_machine.setenv(mark, "podman")
    said = lab.where_the_user_sits(8891)
    assert "-p 8891:8891" in said
    assert "--ip=0.0.0.0" in said


def test_without_jupyterlab_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    with pytest.raises(KitError, match=r"JupyterLab is missing.*qlora-nb\[lab\]"):
        lab.serve(tmp_path, [])


def test_without_the_repository_one_sentence(monkeypatch, tmp_path):
    """An installed wheel has no notebooks."""
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "qlora_nb" / "cli.py"))
    done = CliRunner().invoke(cli.app, ["lab"])
    assert done.exit_code == 2
    assert "run it in the kit's repository" in done.output


class Server:
    """`qlora-nb lab` in a repository in small, with a Jupyter of its own; what it has printed."""

    def __init__(self, folder, *options: str, **environment: str):
        self.folder = folder
        self.root = folder / "kit"
        if not self.root.exists():
            (self.root / "notebooks").mkdir(parents=True)
            shutil.copy(ROOT / "pyproject.toml", self.root)
            for name in ("start.md", "01_setup.ipynb"):
                shutil.copy(NOTEBOOKS / name, self.root / "notebooks")
        env = {name: value for name, value in os.environ.items() if name not in PLACES}
        for kind in ("CONFIG", "DATA", "RUNTIME"):
            env[f"JUPYTER_{kind}_DIR"] = str(folder / "jupyter" / kind)
        env |= {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qlora_nb.cli", "lab", "--no-browser", *options],
            cwd=self.root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,  # where it asks whether to stop, and hears nothing
            text=True,
        )
        self.said: list[str] = []
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        while not self.said or not self.said[-1].startswith("To stop it"):
            self.said.append(self.lines.get(timeout=90))
        while not self._answers():  # it says so just before it listens
            assert self.process.poll() is None
            time.sleep(0.2)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.get("/api"))
        return False

    def interrupted(self) -> int:
        """Its exit code after Ctrl-C, pressed again every other second: at the first it asks. One
        that comes when all is stopped ends Python itself.
        """
        for n_pressed in range(15):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(2)
                return 0 if n_pressed and code == -signal.SIGINT else code
        raise AssertionError("Ctrl-C did not stop it")

    @property
    def address(self) -> str:
        [line] = [line for line in self.said if line.startswith("open this: ")]
        return line.removeprefix("open this: ")

    def get(self, path: str) -> str:
        """What the server answers at a path, with the token that it has printed."""
        parts = urllib.parse.urlsplit(self.address)
        address = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read().decode()

    def close(self) -> None:
        one_notebook.stop_tree(self.process.pid)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One whose wanted port is taken."""
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        server = Server(tmp_path_factory.mktemp("lab"), f"--port={port}")
        server.taken = port
        yield server
        server.close()


def test_one_line_says_what_to_open_and_it_opens(server):
    assert re.fullmatch(
        r"http://localhost:\d+/lab/tree/my_notebooks/start\.md\?token=\w{40,}", server.address
    )
    assert str(server.taken) not in server.address
    assert any(line.startswith(f"port {server.taken} is taken") for line in server.said)
    address = urllib.parse.urlsplit(server.address)
    page = server.get(address.path)
    assert "jupyter-config-data" in page  # and no page that asks for a password or token
    settings = json.loads(re.search(r'<script id="jupyter-config-data"[^>]*>(.*?)<', page, re.S)[1])
    assert settings["buildCheck"] is False
    assert settings["treePath"] == "my_notebooks/start.md"


def test_jupyters_own_lines_do_not_bury_it(server):
    assert [line for line in server.said if re.match(r"\[[IW] ", line)] == []


def test_markdown_opens_as_a_page_and_no_news_are_asked_for(server):
    def default(plugin: str, name: str):
        found = json.loads(server.get(f"/lab/api/settings/@jupyterlab/{plugin}"))
        assert found["raw"] == "{}"  # nothing is written down as if the user had chosen it
        return found["schema"]["properties"][name]["default"]

    viewers = default("docmanager-extension:plugin", "defaultViewers")
    assert viewers == {"markdown": "Markdown Preview"}
    assert default("apputils-extension:notification", "fetchNews") == "false"


def test_pages_of_the_docs_can_be_opened_from_it(server):
    """The links of the start page lead out of the learner's folder."""
    (server.root / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "teaching.md", server.root / "docs")
    assert "Teaching" in server.get("/files/docs/teaching.md")
    assert "Start here" in server.get("/files/my_notebooks/start.md")


def test_nothing_of_the_users_own_jupyter_is_changed(server):
    """Only the server's own cookie and the files by which it is found lie there."""
    written = {path.name for path in (server.folder / "jupyter").rglob("*") if path.is_file()}
    known = r"jupyter_cookie_secret|jpserver-\d+(-open)?\.(json|html)|migrated|nbsignatures.*"
    assert [name for name in written if not re.fullmatch(known, name)] == []


def test_over_ssh_in_wsl_and_with_the_users_own_settings(tmp_path):
    """A folder of the user's own for settings keeps its word against the kit's defaults."""
    own = tmp_path / "own" / "labconfig"
    own.mkdir(parents=True)
    viewers = {"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"csv": "Editor"}}}
    (own / "default_setting_overrides.json").write_text(json.dumps(viewers))
    server = Server(
        tmp_path,
        "--port=0",
        SSH_CONNECTION="192.0.2.7 50123 198.51.100.4 22",
        USER="ada",
        JUPYTER_CONFIG_PATH=str(own.parent),
    )
    try:
        port = urllib.parse.urlsplit(server.address).port
        assert f"  ssh -N -L {port}:localhost:{port} -p 22 ada@198.51.100.4" in server.said
        assert not any("is taken" in line for line in server.said)
        path = "/lab/api/settings/@jupyterlab/docmanager-extension:plugin"
        found = json.loads(server.get(path))["schema"]["properties"]["defaultViewers"]["default"]
        assert found == {"csv": "Editor", "markdown": "Markdown Preview"}
        assert server.interrupted() == 0
    finally:
        server.close()


@pytest.mark.browser
def test_the_start_page_in_a_browser(server, chromium):
    """A page, not its source; no dialog, no notice; and its first link opens notebook 1."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        elsewhere = []

        def note(request) -> None:
            if not re.match(r"(http|ws)://localhost|data:|blob:", request.url):
                elsewhere.append(request.url)

        page.on("request", note)
        page.goto(server.address)
        page.locator(".jp-MarkdownViewer h1", has_text="Start here").wait_for(timeout=60_000)
        page.wait_for_timeout(2000)
        assert page.locator(".jp-FileEditor").count() == 0
        assert page.locator(".jp-Dialog, .jp-toastContainer .Toastify__toast").count() == 0
        page.locator(".jp-MarkdownViewer a", has_text="notebook 1").click()
        page.locator(".jp-NotebookPanel .jp-Notebook h1").first.wait_for(timeout=60_000)
        assert page.locator(".jp-Dialog").count() == 0
        assert elsewhere == []
        browser.close()


def test_binder_opens_the_start_page_too(tmp_path):
    """postBuild's own copying, with programs of the same names that do nothing else."""
    kit = tmp_path / "kit"
    shutil.copytree(ROOT / "tools/lab_defaults", kit / "tools/lab_defaults")
    programs = tmp_path / "env" / "bin"
    programs.mkdir(parents=True)
    config = tmp_path / "env" / "etc" / "jupyter"
    config.mkdir(parents=True)
    for name in ("python", "qlora-nb"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    env = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(ROOT / "binder" / "postBuild")], cwd=kit, env=env, check=True)
    lab_config = json.loads((config / "jupyter_lab_config.json").read_text())
    assert lab_config["LabApp"]["default_url"] == "/lab/tree/notebooks/start.md"
    assert (config / "labconfig" / "default_setting_overrides.json").is_file()
