"""What a reader really sees: JupyterLab in headless Chromium opens notebook 03, runs it, and a slider changes its figure.

A widget that shows nothing passes every check without a browser; this one it does not pass. Where there is no Chromium the
test is skipped by name, unless QLORA_NB_REQUIRE_BROWSER=1 makes that a failure.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FEATURES = ("quic", "gpu", "background-networking", "component-update", "sync")
QUIET = ["--no-sandbox", "--no-first-run", *(f"--disable-{feature}" for feature in FEATURES)]


@pytest.fixture(scope="module")
def chromium() -> str:
    if CHROMIUM is None:
        if os.environ.get("QLORA_NB_REQUIRE_BROWSER") == "1":
            pytest.fail("QLORA_NB_REQUIRE_BROWSER=1 and there is no Chromium: apt-get install chromium")
        pytest.skip("browser tests: there is no Chromium here (Debian: apt-get install chromium)")
    return CHROMIUM


class Lab:
    """JupyterLab on loopback with settings, workspaces and a root folder of its own."""

    def __init__(self, base: Path):
        self.root = base / "root"
        for sub, name, value in (
            ("apputils-extension", "notification", {"fetchNews": "false", "checkForUpdates": False}),
            ("notebook-extension", "tracker", {"windowingMode": "none"}),  # every cell is in the page, seen or not
        ):
            folder = base / "settings" / "@jupyterlab" / sub
            folder.mkdir(parents=True)
            (folder / f"{name}.jupyterlab-settings").write_text(json.dumps(value))
        # a repository in small: the folders by which a notebook finds its root
        (self.root / "notebooks").mkdir(parents=True)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        names = {"CONFIG_DIR": "config", "RUNTIME_DIR": "rt", "DATA_DIR": "data"}
        env = os.environ | {f"JUPYTER_{k}": str(base / v) for k, v in names.items()} | {"IPYTHONDIR": str(base / "ipy")}
        env |= {"JUPYTERLAB_SETTINGS_DIR": str(base / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(base / "ws")}
        command = [
            sys.executable,
            "-m",
            "jupyter",
            "lab",
            "--allow-root",
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={self.port}",
        ]
        command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=look", f"--ServerApp.root_dir={self.root}"]
        self.log = open(base / "lab.log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=subprocess.STDOUT)
        self.wait(lambda: self.ask("/api/status"), 90)

    def ask(self, path: str):
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}?token=look", timeout=3))

    def idle(self) -> bool:
        """True if there is a kernel and it rests. Before that, Run All would meet a Select Kernel dialog."""
        sessions = self.ask("/api/sessions")
        return bool(sessions) and all(s["kernel"] and s["kernel"]["execution_state"] == "idle" for s in sessions)

    def wait(self, probe, seconds: float):
        end, last = time.time() + seconds, None
        while time.time() < end:
            try:
                if value := probe():
                    return value
            except OSError as error:
                last = error
            time.sleep(0.3)
        raise TimeoutError(f"nothing after {seconds} s: {last}")

    def close(self) -> None:
        from qlora_nb.engine.batch import stop_tree

        stop_tree(self.process.pid)
        self.process.wait(10)
        self.log.close()


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture
def open_and_run(lab, chromium):
    """`open_and_run(path)` → the page after Run All; keeps what it asked for from elsewhere and its script errors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)

        def run(path: Path, timeout: float = 300):
            notebook = nbformat.read(path, 4)
            for cell in notebook.cells:
                if cell.cell_type == "code":  # nothing on the page may come from the committed outputs
                    cell.outputs, cell.execution_count = [], None
            nbformat.write(notebook, lab.root / "notebooks" / path.name)
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.elsewhere, page.script_errors = [], []
            own = (f"http://127.0.0.1:{lab.port}", f"ws://127.0.0.1:{lab.port}", "data:", "blob:")
            page.on("request", lambda r: None if r.url.startswith(own) else page.elsewhere.append(r.url))
            page.on("pageerror", lambda e: page.script_errors.append(str(e)))
            page.goto(f"http://127.0.0.1:{lab.port}/lab/tree/notebooks/{path.name}?token=look&reset")
            page.locator(".jp-NotebookPanel .jp-Notebook").wait_for(timeout=60_000)
            lab.wait(lab.idle, 90)
            page.get_by_text(re.compile(r"\| Idle")).first.wait_for(timeout=60_000)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.locator(".lm-Menu-itemLabel", has_text=re.compile(r"^Run All Cells$")).click()
            page.wait_for_timeout(1500)
            shown = [c for c in notebook.cells if not c.metadata.get("jupyter", {}).get("source_hidden")]  # others have no number
            n_code = sum(c.cell_type == "code" and bool(c.source.strip()) for c in shown)
            numbered = page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"\[\d+\]"))
            lab.wait(lambda: page.wait_for_timeout(300) or numbered.count() >= n_code, timeout)
            lab.wait(lab.idle, 60)
            page.wait_for_timeout(1000)
            return page

        yield run
        browser.close()


ERROR = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'


@pytest.mark.slow
def test_a_slider_moved_by_keyboard_changes_the_figure(open_and_run, lab):
    page = open_and_run(NOTEBOOKS / "03_nf4_explained.ipynb")
    assert page.locator(ERROR).all_inner_texts() == []
    assert page.elsewhere == []
    cell = page.locator(".jp-CodeCell", has=page.locator(".widget-slider")).first
    picture = cell.locator(".jp-OutputArea .widget-output img, .jp-OutputArea .jp-RenderedImage img").first
    picture.wait_for(timeout=30_000)
    assert picture.bounding_box()["height"] > 50, "an empty box"
    before = picture.get_attribute("src")
    handle = cell.locator(".widget-slider .noUi-handle").first
    handle.focus()
    page.keyboard.press("ArrowRight")

    def changed():
        page.wait_for_timeout(200)
        return (
            cell.locator(".jp-OutputArea img").count() and cell.locator(".jp-OutputArea img").first.get_attribute("src") != before
        )

    try:
        lab.wait(changed, 30)
    except TimeoutError:
        pytest.fail("the slider moved and the figure stayed the same")
    assert page.locator(ERROR).count() == 0
    assert page.script_errors == []
