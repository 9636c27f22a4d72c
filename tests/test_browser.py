"""What a reader really sees: JupyterLab in headless Chromium opens every notebook, runs it, and a
hand moves every control.

A widget that shows nothing passes every check without a browser; these it does not pass. Each
notebook is opened and run once, and all tests look at that page, in the order of this file. Where
there is no Chromium they are skipped by name, unless QLORA_NB_REQUIRE_BROWSER=1 makes that a
failure.
"""

from __future__ import annotations

import functools
import itertools
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
NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("[01]*.ipynb"))]
PANELS = {"01": 1, "02": 1, "03": 2, "04": 1, "05": 2, "06": 1, "07": 1, "08": 1, "09": 1, "10": 1}
"""Notebook → figures with controls over them. A check of such figures is made of the notebooks that
have some.
"""
WITH_PANELS = [name for name in NAMES if PANELS[name[:2]]]
WITH_A_CHAT = [name for name in NAMES if name.startswith("07")]
SMALLER = {
    "06": "max_steps, eval_rows, save_steps = 4, 6, 0",
    "07": "eval_rows, max_new_tokens = 4, 6",
}
"""Parameters under which training and measuring take seconds: what is seen is the same."""
FEATURES = ("quic", "gpu", "background-networking", "component-update", "sync")
QUIET = ["--no-sandbox", "--no-first-run", *(f"--disable-{feature}" for feature in FEATURES)]


class Lab:
    """JupyterLab on loopback with settings, workspaces and a root folder of its own."""

    def __init__(self, base: Path):
        self.root = base / "root"
        for sub, name, value in (
            (
                "apputils-extension",
                "notification",
                {"fetchNews": "false", "checkForUpdates": False},
            ),
            (
                "notebook-extension",
                "tracker",
                {"windowingMode": "none"},
            ),  # every cell is in the page, seen or not
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
        env = (
            os.environ
            | {f"JUPYTER_{k}": str(base / v) for k, v in names.items()}
            | {"IPYTHONDIR": str(base / "ipy")}
        )
        env |= {
            "JUPYTERLAB_SETTINGS_DIR": str(base / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(base / "ws"),
        }
        options = [
            "--allow-root",
            "--no-browser",
            "--expose-app-in-browser",
            "--ip=127.0.0.1",
            f"--port={self.port}",
        ]
        options += [
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=look",
            f"--ServerApp.root_dir={self.root}",
        ]
        command = [sys.executable, "-m", "jupyter", "lab", *options]
        self.log = open(base / "lab.log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=subprocess.STDOUT)
        self.wait(lambda: self.ask("/api/status"), 90)

    def ask(self, path: str, method: str = "GET"):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}?token=look", method=method
        )
        body = urllib.request.urlopen(request, timeout=10).read()
        return json.loads(body) if body else None

    def stop_kernels(self) -> None:
        for session in self.ask("/api/sessions"):
            self.ask(f"/api/sessions/{session['id']}", "DELETE")

    def idle(self) -> bool:
        """True if there is a kernel and it rests. Before that, Run All would meet a Select Kernel
        dialog.
        """
        sessions = self.ask("/api/sessions")
        return bool(sessions) and all(
            s["kernel"] and s["kernel"]["execution_state"] == "idle" for s in sessions
        )

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
        from qlora_nb.batch import one_notebook

        one_notebook.stop_tree(self.process.pid)
        self.process.wait(10)
        self.log.close()


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield browser
        browser.close()


def prepared(path: Path) -> nbformat.NotebookNode:
    """A notebook without outputs, so that nothing on the page comes from the committed ones; 06 and
    07 with less to do.
    """
    notebook = nbformat.read(path, 4)
    smaller = SMALLER.get(path.stem[:2])
    if smaller:
        at = next(
            i
            for i, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", [])
        )
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(smaller))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def open_and_run(lab: Lab, browser, notebook: nbformat.NotebookNode, name: str):
    """The notebook's page after Run All; keeps what it asked for from elsewhere and its script
    errors.
    """
    nbformat.write(notebook, lab.root / "notebooks" / f"{name}.ipynb")
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    page.number, page.elsewhere, page.script_errors = name[:2], [], []
    own = (f"http://127.0.0.1:{lab.port}", f"ws://127.0.0.1:{lab.port}", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else page.elsewhere.append(r.url))
    page.on("pageerror", lambda e: page.script_errors.append(str(e)))
    page.goto(f"http://127.0.0.1:{lab.port}/lab/tree/notebooks/{name}.ipynb?token=look&reset")
    page.locator(".jp-NotebookPanel .jp-Notebook").wait_for()
    lab.wait(lab.idle, 120)
    page.get_by_text(re.compile(r"\| Idle")).first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(r"^Run All Cells$")).click()
    shown = [
        c for c in notebook.cells if not c.metadata.get("jupyter", {}).get("source_hidden")
    ]  # others have no number
    n_code = sum(c.cell_type == "code" and bool(c.source.strip()) for c in shown)
    numbered = page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"\[\d+\]"))
    lab.wait(lambda: page.wait_for_timeout(300) or numbered.count() >= n_code or errors(page), 600)
    lab.wait(lab.idle, 120)
    page.wait_for_timeout(1000)
    return page


@pytest.fixture(scope="module", params=NAMES)
def page(request, lab, browser):
    """One notebook after the other, opened and run."""
    page = open_and_run(lab, browser, prepared(NOTEBOOKS / f"{request.param}.ipynb"), request.param)
    yield page
    page.close()
    lab.stop_kernels()


ERRORS = """() => jupyterapp.shell.currentWidget.content.model.toJSON().cells.flatMap(cell => cell.outputs ?? [])
    .filter(output => output.output_type === 'error').map(output => `${output.ename}: ${output.evalue}`)"""


def errors(page) -> list[str]:
    """What cells ended with. Asked of JupyterLab's own model: on the page a traceback looks as a
    progress bar does (stderr).
    """
    return page.evaluate(ERRORS)


def changes(page, state, act, seconds: float = 40) -> bool:
    """Whether `state()` becomes another one after `act()`."""
    before = state()
    act()
    end = time.time() + seconds
    while time.time() < end:
        if state() != before:
            return True
        page.wait_for_timeout(100)
    return False


PANEL = ".jp-Cell-outputArea .explore"
CONTROLS = ".noUi-handle, select"


def test_runs_clean(page):
    """No error, no box of no height, no broken picture, and nothing asked of another host; panels
    are where they belong.
    """
    assert errors(page) == []
    assert (page.elsewhere, page.script_errors) == ([], [])
    boxes = page.locator(
        ".jp-OutputArea .jupyter-widgets:visible, .jp-OutputArea img:visible"
    ).all()
    assert len(boxes) > 3
    assert [box.inner_html() for box in boxes if box.bounding_box()["height"] < 12] == []
    widths = page.locator(".jp-OutputArea img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert len(widths) > 0
    assert all(widths)
    assert page.locator(PANEL).count() == PANELS[page.number]
    asked = page.get_by_role("button", name="Ask both").count()
    assert page.locator(".chat").count() == asked == (page.number == "07")


@pytest.mark.parametrize("page", WITH_PANELS, indirect=True)
def test_a_widget_starts_as_its_static_twin(page):
    """The same picture, byte for byte, stands in a cell before it."""
    source = "all => all.map(i => i.src.replace(/\\s/g, ''))"
    in_widgets = page.locator(f"{PANEL} img").evaluate_all(source)
    everywhere = page.locator(".jp-OutputArea img").evaluate_all(source)
    assert len(in_widgets) == PANELS[page.number] > 0
    assert [everywhere.count(picture) for picture in in_widgets] == [2] * len(in_widgets)


KINDS = "slider|combobox|textbox|spinbutton|button|img"
VALUES = """sliders => sliders.map(slider => [slider.querySelector('[role=slider]').ariaValueText,
    slider.querySelector('.widget-readout').textContent])"""


def test_a_screen_reader_can_name_everything(page):
    """Chromium's accessibility tree of the widgets: each control and picture has a name, a slider
    tells its value in words.
    """
    panels = page.locator(f"{PANEL}, .chat").all()
    assert len(panels) > 0, "every notebook has a panel or the chat"
    for panel in panels:
        told = panel.aria_snapshot()
        assert re.findall(rf"- ({KINDS})\b(?! \")", told) == [], told
        named = re.findall(rf"- ({KINDS})\b \"", told)
        assert len(named) >= panel.locator(f"{CONTROLS}, button, textarea").count() > 0, told
        values = panel.locator(".widget-slider").evaluate_all(VALUES)
        assert len(values) > 0, "every panel has a slider"
        assert all(value == readout for value, readout in values), values
    labels = page.locator(".widget-slider .widget-label")
    assert labels.count() > 0
    assert page.locator(".widget-slider .widget-label[title=null]").count() == 0, (
        "the mouse would be told “null”"
    )


@pytest.mark.parametrize("page", WITH_PANELS, indirect=True)
def test_a_control_changes_the_figure_by_keyboard_and_by_mouse(page):
    """Every slider and list: Tab reaches it, its focus is visible, a key changes the figure, and so
    does the mouse.
    """
    n_reached = n_operated = 0
    for panel in page.locator(PANEL).all():
        controls = panel.locator(CONTROLS).all()
        controls[0].focus()
        page.keyboard.press("Shift+Tab")
        for before, after in itertools.pairwise([None, *controls]):
            if before is not None:
                before.focus()
            reached = [
                page.keyboard.press("Tab") or after.evaluate("e => e === document.activeElement")
                for _ in range(2)
            ]
            assert any(reached), (
                f"Tab does not come to {after.evaluate('e => e.outerHTML')[:200]}"
            )  # one stop may be a readout
            n_reached += 1
        for control in controls:
            operate(page, panel, control)
            n_operated += 1
    assert n_operated == n_reached == page.locator(PANEL).locator(CONTROLS).count() > 0
    assert errors(page) == []
    assert page.script_errors == []


def operate(page, panel, control) -> None:
    what = f"{page.number} {control.evaluate('e => e.ariaLabel || e.labels[0].textContent')}"
    style = "e => { const s = getComputedStyle(e); return s.outline + s.boxShadow + s.backgroundColor + s.borderColor }"
    texts = panel.locator("textarea")

    def shown():
        return [
            panel.locator("img").get_attribute("src"),
            *texts.evaluate_all("all => all.map(text => text.value)"),
        ]

    control.scroll_into_view_if_needed()
    page.mouse.move(0, 0)  # a control under the mouse looks as one that has the focus
    control.evaluate("e => e.blur()")
    page.wait_for_timeout(250)
    plain = control.evaluate(style)
    page.keyboard.press("Shift")  # a hand on the keyboard: browsers show the focus to it
    control.focus()
    page.wait_for_timeout(250)
    assert control.evaluate(style) != plain, f"{what}: focus is not visible"
    if control.evaluate("e => e.tagName") == "SELECT":
        assert changes(
            page, shown, lambda: choose(page, control, lambda: page.keyboard.press("Space"))
        ), f"{what}: no key does it"
        assert changes(page, shown, lambda: choose(page, control, control.click)), (
            f"{what}: the mouse changes nothing"
        )
        return
    now, low, high = control.evaluate(
        "e => [e.ariaValueNow, e.ariaValueMin, e.ariaValueMax].map(Number)"
    )
    key = "ArrowRight" if now < high else "ArrowLeft"
    handle, bar = (
        control.locator(f"xpath={path}").bounding_box()
        for path in (".", "ancestor::*[contains(@class, 'noUi-base')]")
    )
    left, right = bar["x"] + 2, bar["x"] + bar["width"] - 2
    y, start = (
        bar["y"] + bar["height"] / 2,
        min(max(handle["x"] + handle["width"] / 2, left), right),
    )
    far = left if now > (low + high) / 2 else right
    assert changes(page, shown, lambda: page.keyboard.press(key)), f"{what}: {key} changes nothing"
    assert changes(page, shown, lambda: page.mouse.click(far, y)), (
        f"{what}: the mouse changes nothing"
    )
    page.wait_for_timeout(400)  # a slider glides, and hears nothing while it does
    assert changes(page, shown, lambda: page.mouse.click(start, y)), (
        f"{what}: does not go back"
    )  # or others may have no effect


def choose(page, select, open_list) -> None:
    """Open a list and take the entry beside the chosen one: by key, as headless Chromium draws the
    open list outside the page.
    """
    first = select.evaluate("e => e.selectedIndex === 0")
    open_list()
    page.wait_for_timeout(200)
    page.keyboard.press("ArrowDown" if first else "ArrowUp")
    page.keyboard.press("Enter")


@pytest.mark.parametrize("page", WITH_A_CHAT, indirect=True)
def test_two_models_are_asked_by_keyboard_and_by_mouse(page):
    """Notebook 07's chat has no figure under its controls but two answers."""
    ask, prompt = (
        page.get_by_role("button", name="Ask both"),
        page.get_by_label("prompt", exact=True),
    )
    assert ask.count() == prompt.count() == 1
    answers, history = (
        page.get_by_placeholder("no answer yet"),
        page.get_by_label("history", exact=True),
    )
    assert answers.count() == 2
    ways = {
        "Where is Anna?\nAnna went to the park.": lambda: page.keyboard.press("Space"),
        "What does Ben have?\nBen took a red ball.": ask.click,
    }
    for question, act in ways.items():
        prompt.fill(question)
        ask.focus()
        assert changes(page, history.input_value, act), (
            f"no answer: {page.locator('.widget-label').all_inner_texts()}"
        )
        assert history.input_value().startswith(question)
        assert all(answers.evaluate_all("all => all.map(answer => answer.value)"))
    sliders = page.locator(".jp-OutputArea .chat .widget-slider").all()
    assert len(sliders) == 3, "temperature, top_p, repetition_penalty"
    for slider in sliders:
        readout = slider.locator(".widget-readout")
        slider.locator(".noUi-handle").focus()
        at_the_end = slider.locator(".noUi-handle").evaluate(
            "e => e.ariaValueNow === e.ariaValueMax"
        )
        key = "ArrowLeft" if at_the_end else "ArrowRight"
        press = functools.partial(page.keyboard.press, key)
        assert changes(page, readout.inner_text, press), slider.inner_text()
    assert errors(page) == []


WHOLE = "img, .widget-slider, .widget-readout, select, textarea, button, label"
CUT_OFF = """(areas, whole) => areas.flatMap(area => {
    const edge = area.getBoundingClientRect().right + 1;
    const outside = e => e.getBoundingClientRect().right > edge;
    const cut = e => e.tagName === 'LABEL' && e.scrollWidth > e.clientWidth + 1;
    return [...area.querySelectorAll(whole)]
        .filter(e => outside(e) || cut(e)).map(e => e.outerHTML.slice(0, 120));
})"""


@pytest.mark.parametrize("width", [800, 1280])
def test_nothing_is_cut_off(page, width):
    """Controls and pictures lie inside the output area, labels are read in full."""
    page.set_viewport_size({"width": width, "height": 1000})
    page.wait_for_timeout(500)
    areas = page.locator(".jp-Cell-outputArea")
    assert areas.locator(WHOLE).count() > 3
    assert areas.evaluate_all(CUT_OFF, WHOLE) == []


CONTRAST = """() => {
    const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
    const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const over = (top, below) => [0, 1, 2].map(i => top[i] * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
    const ground = e => { const c = e ? parse(getComputedStyle(e).backgroundColor) : [255, 255, 255];
        return c.length === 4 && c[3] < 1 ? over(c, ground(e.parentElement)) : c };
    const bad = [];
    let looked = 0;
    for (const area of document.querySelectorAll('.jp-Cell-outputArea')) {
        const walk = document.createTreeWalker(area, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) {
            const e = walk.currentNode.parentElement;
            if (!walk.currentNode.textContent.trim() || !e.offsetParent || e.closest('.jp-OutputPrompt, :disabled')) continue;
            looked += 1;
            const below = ground(e);
            const ink = parse(getComputedStyle(e).color);
            ink[3] = (ink[3] ?? 1) * Number(getComputedStyle(e).opacity);
            const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(e.className + ': ' + walk.currentNode.textContent.slice(0, 60));
        }
    }
    return [looked, [...new Set(bad)]];
}"""
"""How many texts are in outputs, and those whose contrast with what lies under them is below 4.5,
the least of WCAG 2 (AA).
"""


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_texts_are_readable(page, theme):
    page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
    page.wait_for_function(
        "dark => document.body.dataset.jpThemeLight === String(!dark)", arg=theme.endswith("Dark")
    )
    page.wait_for_timeout(500)
    looked, bad = page.evaluate(CONTRAST)
    assert looked > 10
    assert bad == []


WRONG = """from IPython.display import HTML, display
display(HTML("<p style='color:#bbb;background:#fff'>pale text</p><img style='max-width:none;width:3000px;height:9px'>"))
1 / 0"""


def test_the_checks_see_what_is_wrong(lab, browser):
    """An error, a pale text and a picture that is too wide: the checks above find them, so finding
    none means something.
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WRONG)])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    page = open_and_run(lab, browser, notebook, "wrong")
    assert errors(page) == ["ZeroDivisionError: division by zero"]
    _, bad = page.evaluate(CONTRAST)
    assert any("pale text" in text for text in bad)
    [cut] = page.locator(".jp-Cell-outputArea").evaluate_all(CUT_OFF, WHOLE)
    assert cut.startswith("<img")
    page.close()
    lab.stop_kernels()
