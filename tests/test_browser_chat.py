"""The side-by-side chat as its reader has it: typed, asked, streamed, stopped, and inert whatever is in the text."""

import time

import nbformat
import pytest
from test_browser import ERROR, browser, chromium, lab, open_and_run  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PAYLOAD = "<script>window.hurt = 1</script><img src=x onerror='window.hurt=2'> **bold** \x1b[31mred"
SOURCE = """import time
from qlora_nb.engine import generation, models
from qlora_nb.engine.profiles import validate
from qlora_nb.ui import panels
settings = validate({"adapter": "pocket", "max_new_tokens": 80})
tokenizer = models.load_tokenizer(settings)
tokenizer.eos_token_id = None  # answers as long as max_new_tokens, so that there is something to stop
model = generation.load_adapter(models.load_base(settings), generation.ADAPTER_DIR)
slow = model.get_base_model().register_forward_pre_hook(lambda *_: time.sleep(0.15))  # as slow as a larger model
chat = panels.SideBySide(model, tokenizer, settings)
chat.box"""


def test_ask_stream_stop_and_payloads_stay_inert(lab, browser):  # noqa: F811
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SOURCE)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    page = open_and_run(lab, browser, notebook, "chat")
    boxes = page.locator(".jp-OutputArea textarea")
    boxes.first.wait_for(timeout=60_000)
    prompt, base, tuned = boxes.nth(0), boxes.nth(1), boxes.nth(2)
    ask, stop = page.get_by_role("button", name="Ask both"), page.get_by_role("button", name="Stop")
    prompt.fill(f"Where is Anna?\n{PAYLOAD} Anna walked to the river.")
    prompt.press("Tab")
    ask.click()
    until = lambda probe, seconds: lab.wait(lambda: page.wait_for_timeout(50) or probe(), seconds)
    until(lambda: len(base.input_value()) > 5, 60)
    early = base.input_value()
    until(lambda: len(base.input_value()) > len(early), 60)  # it grows: streamed, not delivered
    until(lambda: len(tuned.input_value()) > 5, 120)
    began = time.perf_counter()
    stop.click()
    until(ask.is_enabled, 30)
    took = time.perf_counter() - began
    print(f"stopped after {took:.2f} s")
    assert tuned.input_value()
    for box in (boxes.nth(3), boxes.nth(4)):
        assert box.input_value()
    assert PAYLOAD[:8] in boxes.nth(4).input_value(), "the history shows the prompt as it was typed"
    assert page.evaluate("window.hurt") is None
    assert page.locator(".jp-OutputArea script, .jp-OutputArea img[src=x], .jp-OutputArea strong").count() == 0
    assert page.locator(ERROR).count() == 0
    assert page.script_errors == []
    assert took < 10, "a busy machine is slow; an idle one takes under a second"
