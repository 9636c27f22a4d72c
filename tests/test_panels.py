"""Panels and figures of notebooks 01, 06 and 07, driven as a reader would, without a browser."""

import json
import re

import nbformat
import pytest
import recorded_tables
import spelled
import torch
from conftest import NOTEBOOKS
from matplotlib.figure import Figure
from peft.tuners.lora.bnb import Linear4bit
from transformers import GPTNeoXForCausalLM

from qlora_nb import cards, machine, recorded, sources
from qlora_nb.answer import adapters, generate
from qlora_nb.lessons import n01, n06, n07
from qlora_nb.memory import ledger
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs, data, load
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import validate
from qlora_nb.ui import charts, panels, widgets


def both_ends(widget):
    if hasattr(widget, "options"):
        values = [o[1] if isinstance(o, tuple) else o for o in widget.options]
        return values
    return [widget.min, widget.max]


@pytest.mark.parametrize(("profile", "gpu_gib"), [("tiny", None), ("full", 12.0)])
def test_planner_redraws_at_every_end_and_prints_a_line_that_validates(profile, gpu_gib):
    planner = panels.planner(validate({"profile": profile}), gpu_gib)
    titles = set()
    for name, control in planner.controls.items():
        for value in both_ends(control):
            control.value = value
            said, line = planner.advice.value.split("\n")
            assert line.startswith("papermill notebooks/06_finetune_pythia_12b.ipynb ")
            words = line.split()
            given = {words[i + 1]: words[i + 2] for i, w in enumerate(words) if w in ("-p", "-r")}
            if name != "gpu_gib":
                assert getattr(validate(given), name) == value
            assert said.startswith("Fine-tuning")
        assert isinstance(planner.result, Figure)
        assert planner.children[-1].value.startswith("<img ")
        titles.add(planner.result.axes[0].get_title(loc="left"))
    assert len(titles) > 1


def test_planner_answers_the_question_of_notebook_01():
    planner = panels.planner(validate({"profile": "full"}), 12.0)
    assert "fits: 11.00 of 12 GiB" in planner.advice.value
    planner.controls["gpu_gib"].value = 8.0
    assert "does not fit" in planner.advice.value
    assert "Change first: optim='paged_adamw_8bit' saves" in planner.advice.value
    planner.controls["optim"].value, planner.controls["r"].value = "paged_adamw_8bit", 16
    assert "embedding_on_cpu=True saves" in planner.advice.value
    planner.controls["embedding_on_cpu"].value = True
    assert "Fine-tuning fits" in planner.advice.value


def test_what_fits_names_a_size_for_every_card():
    rows = recorded_tables.what_fits(validate({"profile": "full"}))
    shown = recorded.FOLDER / "cards_table.json"
    assert json.loads(shown.read_text(encoding="utf-8")) == rows
    assert [row["card"] for row in rows] == ["8 GiB", "12 GiB", "16 GiB", "24 GiB", "48 GiB"]
    assert rows[0]["fine-tuning"].startswith("6.9b")
    assert rows[-1]["fine-tuning"].startswith("12b")
    assert rows[-1]["options"] == "none needed"
    cells = nbformat.read(NOTEBOOKS / "01_setup.ipynb", 4).cells
    (answer,) = [cell.source for cell in cells if "<summary>Answer</summary>" in cell.source]
    folded = answer.partition("</details>")[0].replace('"', "")
    assert re.findall("<code>(.*?)</code>", folded) == rows[0]["options"].split("; ")


@pytest.fixture(scope="module")
def chat():
    settings = validate({"adapter": "pocket", "max_new_tokens": 8})
    model = adapters.load_adapter(load.load_base(settings), adapters.find_adapter(settings)[0])
    return panels.SideBySide(model, load.load_tokenizer(settings), settings)


def ask(chat, prompt):
    chat.prompt.value = prompt
    chat.ask.click()
    chat.worker.join(60)
    assert not chat.worker.is_alive()
    return {name: box.value for name, box in chat.answers.items()}


def test_side_by_side_answers_twice(chat):
    said = ask(chat, "Where is Anna?\nAnna went to the park.")
    assert all(said.values())
    assert chat.note.value == "done"
    assert "tokens/s" in chat.costs["tuned"].value
    lines = chat.positions.value.splitlines()
    assert lines[-1].startswith("'(end)' · ")
    assert all(" bits apart · base: " in line and " · tuned: " in line for line in lines)
    assert not chat.ask.disabled
    assert chat.stop_button.disabled


def test_stopped_before_the_tuned_model_is_asked_nothing_old_is_left(chat, monkeypatch):
    chat = panels.SideBySide(chat.model, chat.tokenizer, chat.settings)
    before = ask(chat, "Where is Anna?\nAnna went to the park.")
    history = chat.history.value
    stream = generate.stream

    def stopped(*args):
        for said in stream(*args):
            yield said
            chat.stopping.set()

    monkeypatch.setattr(generate, "stream", stopped)
    after = ask(chat, "Who is happy?\nTom is happy.")
    assert chat.note.value == "stopped"
    assert before["tuned"]
    assert after["tuned"] == chat.costs["tuned"].value == chat.positions.value == ""
    assert after["base"]
    newest = chat.history.value.removesuffix(history).splitlines()
    assert newest[:2] == ["Who is happy?", "Tom is happy."]
    assert [line.split(":")[0] for line in newest[3:] if line] == ["  base"]


def test_a_word_that_is_clicked_goes_into_the_prompt(chat):
    chat = panels.SideBySide(chat.model, chat.tokenizer, chat.settings, ["Anna", "river"])
    assert [chip.description for chip in chat.chips] == ["Anna", "river"]
    chat.prompt.value = "Where is\n"
    for chip in chat.chips:
        chip.click()
    assert chat.prompt.value == "Where is Anna river"


def test_side_by_side_refuses_in_words(chat):
    ask(chat, "   ")
    assert "prompt is empty" in chat.note.value
    ask(chat, "word " * 2000)
    assert "shorten the prompt" in chat.note.value
    ask(chat, "Where is Anna?\nAnna went to the park.")
    assert chat.note.value == "done"


def test_each_control_does_what_it_says(chat):
    question = "Tell a story.\nAnna went to the park."
    start = {name: control.value for name, control in chat.controls.items()}
    assert set(start) == {"temperature", "top_p", "repetition_penalty", "seed"}
    greedy = ask(chat, question)
    assert greedy == ask(chat, question)
    assert "1.0 tokens to choose from\n0 choices turned" in chat.costs["tuned"].value
    chat.controls["repetition_penalty"].value = 2.0
    ask(chat, question)
    assert "\n0 choices turned" not in chat.costs["base"].value
    chat.controls["repetition_penalty"].value = 1.0
    left, said = {}, {}
    chat.controls["temperature"].value = 1.5
    for top_p in (0.5, 1.0):
        chat.controls["top_p"].value = top_p
        said[top_p] = ask(chat, question)
        left[top_p] = float(chat.costs["base"].value.split(" tokens to choose")[0].split("\n")[-1])
    vocabulary = chat.model.config.vocab_size
    assert 1 <= left[0.5] < left[1.0] == vocabulary, (
        "no hidden top_k: all tokens are left where nothing cuts"
    )
    assert ask(chat, question) == said[1.0], "the same seed, the same answer"
    chat.controls["seed"].value = 7
    assert ask(chat, question) != said[1.0]
    assert chat.history.value.count(question) == 7
    assert chat.history.value.index("'seed': 7") < chat.history.value.index("'seed': 0"), (
        "the newest stands first"
    )


def test_counted_tokens_are_those_that_were_made(chat):
    row = generate.row_of("Where is Anna?\nAnna went to the park.")
    last = generate.answer(chat.model, chat.tokenizer, row, chat.settings, tuned=True)
    encoded = chat.tokenizer(
        data.prompt_of(row, chat.settings.prompt_template),
        return_tensors="pt",
        return_token_type_ids=False,
    )
    made = chat.model.generate(
        **encoded, max_new_tokens=chat.settings.max_new_tokens, do_sample=False
    )
    assert last.n_tokens == made.shape[1] - encoded["input_ids"].shape[1]


def test_a_conversation_is_gone_on_with(chat):
    """The second question is asked behind the first and each model's own answer to it, as the
    tokenizer's own chat template writes it.
    """
    chat = panels.SideBySide(chat.model, chat.tokenizer, chat.settings)
    chat.goes_on.value = True
    first = ask(chat, "Where is Anna?\nAnna went to the park.")
    second = ask(chat, "Where is Ben?")
    chat.goes_on.value = False
    for name, tuned in (("base", False), ("tuned", True)):
        messages = [
            {"role": "user", "content": "Where is Anna?\nAnna went to the park."},
            {"role": "assistant", "content": first[name]},
            {"role": "user", "content": "Where is Ben?"},
        ]
        ids = chat.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        asked = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
        with adapters.base_or_tuned(chat.model, tuned):
            made = chat.model.generate(**asked)[0, ids.shape[1] :]
        assert chat.tokenizer.decode(made, skip_special_tokens=True).strip() == second[name]
    assert ask(chat, "Where is Anna?\nAnna went to the park.")["tuned"] == first["tuned"]


@pytest.mark.fault(30)
def test_model_text_is_never_html(chat):
    import ipywidgets

    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    chat.prompt.value = "Where is <b>Anna</b>?"
    chat.start()
    chat.worker.join(60)
    assert "<b>Anna</b>" in chat.history.value
    html = [
        w
        for w in walk(chat.box)
        if isinstance(w, (ipywidgets.HTML, ipywidgets.HTMLMath, ipywidgets.Output))
    ]
    assert [w.value for w in html] == [widgets.naming().value], (
        "one that names the sliders, and says nothing of the model's"
    )


def test_label_mask_is_escaped_and_marked_twice():
    texts = ["<script>alert(1)</script>", "yes"]
    shown = n06.label_mask([0, 1], [False, True], spelled.Spelled(*texts))
    assert "<script>" not in shown
    assert "border-bottom" in shown
    assert "background" in shown


def test_settings_table_is_escaped():
    assert "<img" not in validate({"model_id": "<img src=x>", "dataset": "pocket"})._repr_html_()


def test_live_view_counts_and_draws(capsys):
    view = panels.LiveTraining(4)
    for i in range(1, 5):
        step = {
            "step": i,
            "max_steps": 4,
            "loss": 5 / i,
            "learning_rate": 1e-3,
            "tokens_per_s": 100.0,
            "seconds_left": 4 - i,
        }
        step["memory_bytes"] = 3 * 2**29
        view(step)
    assert view.bar.value == 4
    assert "1.50 GiB" in view.text.value
    assert "step 4/4" in view.text.value
    assert 'alt="Training loss of each step' in view.curve.value
    assert "data:image/png;base64,iVBOR" in view.curve.value
    assert capsys.readouterr().out.count("step") == 4


def test_figures_for_small_and_large_models():
    small, large = (
        ledger.predict(plan_of(validate({}))),
        ledger.predict(Plan(configs.pythia_config("12b"))),
    )
    for one in (small, large):
        assert isinstance(charts.memory_bars({"model": one}, limit_gib=24.0), Figure)
    assert isinstance(charts.loss_curve([3.0], None, None), Figure)
    assert isinstance(n06.lengths([5, 5, 5], 64), Figure)
    assert isinstance(n07.next_tokens([("<b>$x$", 0.5)], [("\n", 0.5)], 1.0), Figure)
    steps = [("<b>$x$", [("a", 0.5)], [("b", 0.5)], 3.0), ("(end)", [], [], 0.0)]
    assert (
        n07.along(steps).axes[0].get_title(loc="left")
        == "The models differ by 3.0 bits at most, 1.5 on average"
    )
    assert isinstance(
        n07.sampled({"T = 1": {"probability": {"$x": 9}, "drawn": {"$x": 8}}}), Figure
    )
    scores = {"majority": {"all": 0.1, "who": 0.2}, "QLoRA": {"all": 0.9, "who": 0.8}}
    assert isinstance(n06.scores(scores), Figure)


def test_profiles_are_judged_on_the_machine_given():
    big = cards.Gpu("H100", 80 * 2**30, 79 * 2**30, (9, 0))
    here = machine.this_machine()
    from dataclasses import replace

    runs_here = {
        row["profile"]: row["runs here"] for row in n01.profiles_here(replace(here, gpus=(big,)))
    }
    fetched = (sources.SMOLLM2_DIR / "config.json").is_file()
    assert runs_here.pop("smollm2") == (
        "yes" if fetched else "no: SmolLM2 is not on this machine yet"
    )
    assert set(runs_here.values()) == {"yes"}
    without = {
        row["profile"]: row["runs here"] for row in n01.profiles_here(replace(here, gpus=()))
    }
    assert without["tiny"] == "yes"
    assert without["full"].startswith("no")


def test_shapes_agree_with_the_real_modules():
    for size in ("70m", "1b", "12b"):
        model = configs.meta_model(configs.pythia_config(size))
        assert sum(p.numel() for p in model.parameters()) == PYTHIA[size].n_parameters
    assert ledger.kv_cache_bytes(configs.pythia_config("12b")) == 737_280


def test_the_layers_of_the_exercise_are_packed_and_adapted():
    """What the reader's function is compared with is PEFT's layer on bitsandbytes' packed W."""
    inputs = n06.check_qlora_forward.inputs()
    has_bias = [layer.base_layer.bias is not None for _, layer in inputs]
    assert has_bias == [True, False], "as Pythia's, as Llama's"
    for x, layer in inputs:
        assert type(layer) is Linear4bit
        assert layer.base_layer.weight.dtype == torch.uint8
        assert layer.base_layer.weight.quant_state.quant_type == "nf4"
        assert layer.lora_B["default"].weight.abs().min() > 0, "no way is closed"
        assert layer.scaling["default"] == 3
        y, *gradients = n06.check_qlora_forward.call(lambda x, layer: layer(x), x, layer)
        assert y.shape[-1] == layer.out_features
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        assert layer.base_layer.weight.grad is None


def test_the_labels_of_the_exercise_are_those_that_train():
    """The same as the kit's own rows, and a model's loss on them is that of answer and end token."""
    settings = validate({"train_rows": 8, "eval_rows": 8})
    tokenizer = load.load_tokenizer(settings)
    rows, _ = data.load(settings)
    model = GPTNeoXForCausalLM(configs.config_of("pocket")).eval()
    for row, encoded in zip(rows, data.tokenize_rows(rows, tokenizer, settings), strict=True):
        prompt = tokenizer(data.prompt_of(row, settings.prompt_template))["input_ids"]
        answer = tokenizer(row["output"])["input_ids"]
        ids, labels = n06.check_mask_labels.reference(prompt, answer, tokenizer.eos_token_id)
        assert (ids, labels) == (encoded["input_ids"], encoded["labels"])
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            said = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        likely = said.logits[0].log_softmax(-1)
        wanted = [likely[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))]
        assert said.loss.item() == pytest.approx(-sum(wanted) / len(wanted), rel=1e-5)
