"""What untrusted text does in a real browser: nothing. In the side-by-side chat (typed, streamed,
stopped, and said by a model that says nothing else), in the report of a batch run and in an HTML
export.
"""

import nbformat
import pytest
import spelled
from nbconvert import HTMLExporter
from test_browser import browser, errors, open_and_run  # noqa: F401  (a fixture)
from test_security import PAYLOADS

from qlora_nb.batch import report
from qlora_nb.lessons import n06
from qlora_nb.model import load
from qlora_nb.settings import validate

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PAYLOAD = "<script>window.hurt = 1</script><img src=x onerror='window.hurt=2'> **bold** \x1b[31mred"
SOURCE = """import time
from qlora_nb.answer import adapters
from qlora_nb.model import load
from qlora_nb.pocket import ADAPTER_DIR
from qlora_nb.settings import validate
from qlora_nb.ui import panels
settings = validate({"adapter": "pocket", "max_new_tokens": 80})
tokenizer = load.load_tokenizer(settings)
tokenizer.eos_token_id = None  # answers as long as max_new_tokens, so that there is something to stop
model = adapters.load_adapter(load.load_base(settings), ADAPTER_DIR)
slow = model.get_base_model().register_forward_pre_hook(lambda *_: time.sleep(0.15))  # as slow as a larger model
chat = panels.SideBySide(model, tokenizer, settings, ["Anna", "river", *80 * ["park"]])
chat.box"""


def test_ask_stream_stop_and_payloads_stay_inert(lab, browser):  # noqa: F811
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    page = open_and_run(lab, browser, notebook, "chat")
    boxes = page.locator(".jp-OutputArea textarea")
    boxes.first.wait_for(timeout=60_000)
    prompt, base, tuned = boxes.nth(0), boxes.nth(1), boxes.nth(3)
    ask, stop = page.get_by_role("button", name="Ask both"), page.get_by_role("button", name="Stop")

    def until(probe, seconds):
        return lab.wait(lambda: page.wait_for_timeout(50) or probe(), seconds)

    prompt.fill(f"Where is Anna?\n{PAYLOAD} Anna walked to the")
    prompt.press("Tab")
    river = page.get_by_role("button", name="river", exact=True)
    page.get_by_role("button", name="Anna", exact=True).focus()
    page.keyboard.press("Tab")
    assert river.evaluate("chip => chip === document.activeElement"), "a chip is a tab stop"
    page.keyboard.press("Enter")
    until(lambda: prompt.input_value().endswith("Anna walked to the river"), 30)
    ask.click()

    until(lambda: len(base.input_value()) > 5, 60)
    early = base.input_value()
    until(lambda: len(base.input_value()) > len(early), 60)  # it grows: streamed, not delivered
    until(lambda: len(tuned.input_value()) > 5, 120)
    stop.click()
    until(ask.is_enabled, 30)
    assert tuned.input_value()
    tokens = load.load_tokenizer(validate({}))(tuned.input_value(), add_special_tokens=False)[
        "input_ids"
    ]
    assert len(tokens) < 80, "it was stopped; by itself it ends after max_new_tokens"
    for box in (boxes.nth(5), boxes.nth(6)):
        assert box.input_value()
    page.evaluate("jupyterapp.shell.collapseLeft()")
    for width in (500, 800, 1280):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(300)
        for cost in (boxes.nth(2), boxes.nth(4)):
            assert cost.evaluate("box => box.scrollHeight <= box.clientHeight"), "not cropped"
    assert PAYLOAD[:8] in boxes.nth(6).input_value(), "the history shows the prompt as it was typed"
    assert page.evaluate("window.hurt") is None
    assert (
        page.locator(
            ".jp-OutputArea script, .jp-OutputArea img[src=x], .jp-OutputArea strong"
        ).count()
        == 0
    )
    assert errors(page) == []
    assert page.script_errors == []


SAYS = """
text = {payload!r}
ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], 0]
tokenizer.eos_token_id, at = 0, [0]
slow.remove()
model.config.max_position_embeddings = 4096


def say(module, args, kwargs, output):  # whatever is asked, the next token of the text is the most probable one
    at[0] = 0 if kwargs["input_ids"].shape[1] > 1 else at[0] + 1
    output.logits[:, -1] = -100.0
    output.logits[:, -1, ids[min(at[0], len(ids) - 1)]] = 100.0
    return output


model.get_base_model().register_forward_hook(say, with_kwargs=True)
chat.prompt.value = "Say it."
"""


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "payload",
    [PAYLOAD, "".join(text for text in PAYLOADS if "$$$" not in text)],
    ids=["one", "battery"],
)
def test_what_a_model_answers_stays_inert(lab, browser, payload):  # noqa: F811
    source = SOURCE.replace("chat.box", "").replace('"max_new_tokens": 80', '"max_new_tokens": 900')
    cells = [
        nbformat.v4.new_code_cell(source + SAYS.format(payload=payload)),
        nbformat.v4.new_code_cell("chat.box"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    page = open_and_run(lab, browser, notebook, f"answers{len(payload)}")
    dialogs = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message) or dialog.dismiss())
    boxes = page.locator(".jp-OutputArea textarea")
    page.get_by_role("button", name="Ask both").click()
    history = page.get_by_label("history", exact=True)
    lab.wait(lambda: page.wait_for_timeout(100) or history.input_value(), 180)
    shown = [box.input_value() for box in boxes.all()]
    assert len(shown) == 7, "the prompt, two answers and their costs, token by token, the history"
    for answer in (shown[1], shown[3]):
        assert answer[:40] == payload.strip()[:40].replace("\x00", "\ufffd"), (
            "it is shown as it was said"
        )
    assert "bits apart" in shown[5], "token by token"
    assert payload[:8] in shown[6], "the history"
    page.wait_for_timeout(500)
    assert page.evaluate("window.hurt") is None
    assert dialogs == []
    assert (
        page.locator(
            ".jupyter-widgets :is(script, iframe, svg, a, img[src=x], strong, style)"
        ).count()
        == 0
    )
    assert (page.elsewhere, page.script_errors) == ([], [])
    assert errors(page) == []


@pytest.mark.fault(30)
def test_the_report_and_an_export_stay_inert(tmp_path, browser):  # noqa: F811
    """Every payload in every place a page has for text: answers printed, tables, masks, problems,
    results, names.
    """
    settings = [validate({"prompts": [text], "model_id": "pocket"}) for text in PAYLOADS]
    pages = [
        part
        for s, text in zip(settings, PAYLOADS)
        for part in (s._repr_html_(), n06.label_mask([0], [True], spelled.Spelled(text)))
    ]
    outputs = [nbformat.v4.new_output("stream", text="\n".join(PAYLOADS))]
    outputs += [
        nbformat.v4.new_output("display_data", data={"text/html": page, "text/plain": "x"})
        for page in pages
    ]
    outputs += [
        nbformat.v4.new_output("error", ename="KitError", evalue=text, traceback=[text])
        for text in PAYLOADS
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print(answer)", outputs=outputs)]
    )
    nbformat.write(notebook, tmp_path / "n.ipynb")
    outcome = {"wall_s": 1.0, "peak_bytes": 1, "notebook": "n"}
    rows = [
        {**outcome, "status": text, "problems": [text], "results": {text: text}}
        for text in PAYLOADS
    ]
    machine = {"cpu": PAYLOADS[0], "n_cores": 1, "ram_bytes": 1, "gpus": [], "python": PAYLOADS[1]}
    summary = {
        "status": PAYLOADS[2],
        "started": "",
        "wall_s": 1,
        "parameters": dict(zip(PAYLOADS, PAYLOADS)),
        "versions": {},
    }
    (tmp_path / "report.html").write_text(
        report.page(summary | {"hardware": machine, "notebooks": rows}, tmp_path), "utf-8"
    )
    (tmp_path / "export.html").write_text(HTMLExporter().from_notebook_node(notebook)[0], "utf-8")
    for name in ("report", "export"):
        page, dialogs, asked = browser.new_page(), [], []
        page.on(
            "dialog",
            lambda dialog, dialogs=dialogs: dialogs.append(dialog.message) or dialog.dismiss(),
        )
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.route(
            "https://**", lambda route: route.abort()
        )  # nbconvert's own page asks for its libraries
        page.goto((tmp_path / f"{name}.html").as_uri(), wait_until="domcontentloaded")
        elements = page.locator("body *").all()[:200]
        assert len(elements) > len(PAYLOADS), "there is something to move the mouse over"
        for anything in elements:
            anything.dispatch_event("mouseover")
        page.wait_for_timeout(500)
        assert dialogs == [], name
        assert not [url for url in asked if "evil" in url], name
        assert name == "export" or len(asked) == 1, "the report asks nobody"
        assert PAYLOADS[0] in page.locator("body").inner_text()
        page.close()
