"""One schema for every parameter: what is coerced, what is refused and in which words, and who is
allowed to run here.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import papermill.cli
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.iorw import read_yaml_file
from papermill.parameterize import translate_parameters

from qlora_nb import cards, machine, recorded, sources
from qlora_nb.batch import sequence
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, estimates, preflight
from qlora_nb.memory.plan import plan_of
from qlora_nb.settings import PROFILES, Settings, resolve, validate


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("double_quant", "false", False),
        ("double_quant", "True", True),
        ("double_quant", 0, False),
        ("learning_rate", "2e-4", 2e-4),
        ("learning_rate", "2.0E-05", 2e-5),
        ("max_steps", "30", 30),
        ("max_steps", 30.0, 30),
        ("model_id", 123, "123"),
        ("target_modules", "query_key_value, dense", ["query_key_value", "dense"]),
        ("target_modules", '["dense"]', ["dense"]),
        ("prompts", "one prompt, with a comma", ["one prompt, with a comma"]),
        ("prompts", '["a", "b"]', ["a", "b"]),
        ("prompts", {"a"}, ["a"]),
        ("dataset", Path("a folder") / "rows.json", str(Path("a folder") / "rows.json")),
        ("r", np.int64(16), 16),
        ("learning_rate", np.float64(0.1), 0.1),
        ("learning_rate", Decimal("0.1"), 0.1),
        ("blocksize", 128, 128),
        ("r", None, PROFILES["tiny"]["r"].value),
        ("r", "None", PROFILES["tiny"]["r"].value),
        ("double_quant", "null", True),
        ("model_id", "None", "pocket"),
        ("resume", False, "no"),  # YAML's `resume: no`
        ("resume", "no", "no"),
        ("double_quant", "off", False),
        ("double_quant", np.bool_(False), False),
        ("max_steps", "1e3", 1000),
        ("max_steps", "1_000", 1000),
        ("max_steps", " 30 ", 30),
        ("learning_rate", "1e-3", 1e-3),
        ("blocksize", "128", 128),
        ("r", np.array(16), 16),
        ("prompts", 7, ["7"]),
        ("quant_type", np.str_("fp4"), "fp4"),
    ],
)
def test_values_are_coerced(name, value, expected):
    resolved = getattr(validate({name: value}), name)
    assert resolved == expected
    assert type(resolved) is type(expected)


MODULES = ["q_proj", "k_proj"]
COLUMNS = {"instruction": "question", "output": "answer"}


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    "value",
    [
        "q_proj, k_proj",
        "q_proj,k_proj,",
        "['q_proj','k_proj']",
        '["q_proj", "k_proj"]',
        "[q_proj, k_proj]",
        " [ q_proj, k_proj ]\n",
        "- q_proj\n- k_proj",
        "- 'q_proj'\n- \"k_proj\"\n",
        "q_proj\nk_proj",
        "('q_proj', 'k_proj')",
        "{'q_proj', 'k_proj'}",
        tuple(MODULES),
        dict.fromkeys(MODULES).keys(),
        np.array(MODULES),
        pd.Series(MODULES),
        pd.Index(MODULES),
        [np.str_(name) for name in MODULES],
    ],
    ids=repr,
)
def test_names_as_anybody_writes_a_list(value):
    assert validate({"target_modules": value}).target_modules == MODULES


@pytest.mark.fault(2)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"instruction": "question", "output": "answer"}', COLUMNS),
        ("{'instruction': 'question', 'output': 'answer'}", COLUMNS),
        ("{instruction: question, output: answer}", COLUMNS),
        ("instruction: question\noutput: answer\n", COLUMNS),
        ("instruction=question,output=answer", COLUMNS),
        (" instruction = question , output = answer ", COLUMNS),
        ("instruction='question'\noutput=\"answer\",", COLUMNS),
        (pd.Series(COLUMNS).to_dict(), COLUMNS),
        ("output=the answer, in full", {"output": "the answer, in full"}),
        ("instruction=a=b,output=c, d", {"instruction": "a=b", "output": "c, d"}),
        ('{"output": "a, b=c"}', {"output": "a, b=c"}),
        ('{"output": "\\ud83d\\ude00 \\u2028"}', {"output": "😀 \u2028"}),
        ("{output: 1}", {"output": "1"}),
        ("", {}),
        ("{}", {}),
    ],
)
def test_columns_as_anybody_writes_a_mapping(value, expected):
    assert validate({"columns": value}).columns == expected


@pytest.mark.fault(2, 29)
@pytest.mark.parametrize(
    "prompt",
    [
        "[INST] Where is Anna? [/INST]",
        "[INST]",
        "[1] first",
        "[]",
        "[",
        "[1, 2]",
        "[null]",
        '["a", 1]',
        '["a"] is a list of what?',
        "['a'] + ['b']",
        "[Where is Anna?, Who is Ben?]",
        '{"instruction": "q"}',
        "- milk\n- eggs",
        "('a', 'b')",
        "1e-3",
        "null",
        "no",
        "[" * 60_000,
    ],
)
def test_a_prompt_is_a_prompt_whatever_it_looks_like(prompt):
    assert validate({"prompts": prompt}).prompts == [prompt]
    assert validate({"prompts": json.dumps([prompt, "b"])}).prompts == [prompt, "b"]
    assert validate({"prompts": repr([prompt, "b"])}).prompts == [prompt, "b"]
    assert validate({"prompts": pd.Series([prompt, "b"])}).prompts == [prompt, "b"]


@pytest.mark.fault(3, 4, 5, 6, 9, 31)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("learning_rate", v) for v in (-1, 0, math.nan, math.inf, "abc", "nan", True, 2)],
        *[
            (n, v)
            for n in (
                "max_steps",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "max_length",
                "train_rows",
                "eval_rows",
            )
            for v in (0, -1, "x", 1.5, True)
        ],
        *[("quant_type", v) for v in ("nf5", "NF4", "", 4)],
        *[("compute_dtype", v) for v in ("int8", "bf16")],
        *[("blocksize", v) for v in (0, 63, 8192, "many")],
        *[("r", v) for v in (0, -1, 4096, "")],
        *[("lora_alpha", v) for v in (0, -1)],
        *[("lora_dropout", v) for v in (-0.1, 1, 1.5)],
        *[("target_modules", v) for v in ([], "", [""])],
        *[("temperature", v) for v in (-1, math.nan)],
        *[("top_p", v) for v in (0, 5)],
        ("max_new_tokens", 0),
        ("double_quant", "maybe"),
        ("profile", "large"),
        ("model_id", ""),
        ("optim", "adam"),
        ("prompts", []),
        ("prompts", pd.DataFrame({"a column": ["a prompt"]})),
        ("prompts", [["a"]]),
        ("prompts", {"a": "b"}),
        ("target_modules", "[" * 60_000),
        ("target_modules", 3),
        *[("columns", v) for v in ("instruction", "prompt=q", "{prompt: q}", "instruction=")],
        *[("columns", v) for v in ("[", "{" * 60_000, "{instruction: [a]}", [("output", "a")])],
        *[("max_steps", v) for v in ("1,000", "1.5", "0x10", "5 steps", "nan", "9" * 5000)],
        *[("learning_rate", v) for v in ("2,5e-4", "1/1000", pd.NA, np.nan, "-inf")],
        ("resume", True),
        ("double_quant", ""),
        ("model_id", object()),
        ("r", np.array([8, 16])),
        ("seed", -1),
        ("pythia", "13b"),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(KitError) as refused:
        validate({name: value})
    text = str(refused.value)
    assert name in text
    assert "Do this:" in text or "Allowed:" in text


@pytest.mark.parametrize("name", ["sophia", "SophiaG", "muon"])
def test_another_optimizer_is_refused_with_a_pointer(name):
    with pytest.raises(KitError, match="Sophia among them, are raced in notebook 08"):
        validate({"optim": name})


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_stepz", "max_steps"),
        ("lr_rate", "learning_rate"),
        ("Seed", "seed"),
        ("model", "model_id"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(wrong, right):
    with pytest.raises(KitError, match=f"unknown parameter '{wrong}'") as refused:
        validate({wrong: 1})
    assert right in str(refused.value)


def test_every_profile_is_complete_and_every_default_has_a_reason():
    for name, defaults in PROFILES.items():
        assert set(defaults) | {"profile"} == set(Settings.model_fields), name
        assert all(d.reason for d in defaults.values())
        assert validate({"profile": name}).changed() == {}


def test_settings_show_what_was_set_and_escape_it():
    shown = validate({"r": "12", "model_id": "<b>x</b>"})
    assert shown.changed() == {"model_id": "<b>x</b>", "r": 12}
    assert "<b>x</b>" not in shown._repr_html_()
    assert "set by you" in repr(shown)


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        ("r = None", ["r"]),
        ("seed = None\nr = 12", ["seed", "r"]),
        ("learning_rate = None", None),
    ],
)
def test_a_notebook_shows_the_parameters_that_it_uses(parameters, shown):
    """One that trains: all but those of the notebooks before and after it."""
    cells = [f"profile = 'tiny'\n{parameters}", "%matplotlib inline", "gpu_gib = 12.0"]
    names = {"In": cells}
    exec(f"{cells[0]}\n{cells[2]}", names)
    found = resolve(names)
    if shown is None:
        others = {"pythia", "gpu_gib", "blocksize", "fetch_ahead"}
        others |= {"adapter", "prompts", "temperature", "top_p", "repetition_penalty"}
        shown = [name for name in PROFILES["tiny"] if name not in others]
    assert [name for name, _, _ in found.shown()] == shown
    assert repr(found).count("\n") == len(shown)
    assert found._repr_html_().count("<tr") == len(shown) + 1
    assert "gpu_gib = 12.0" in found._repr_html_(), "what is set elsewhere is said all the same"
    assert found.replace(seed=3).shown()[-1][0] == shown[-1]
    everything = validate({})
    assert everything.shown() == everything.table()
    assert len(everything.table()) == len(Settings.model_fields) - 1


WRITTEN = {
    "prompts": ["one, with a comma", "another 'one'", "[INST] x [/INST]", "a\nb \u2028 😀 \\n"],
    "columns": {"instruction": "question, long", "output": "a=b", "input": '"c"'},
    "target_modules": ["dense", "query_key_value"],
    "model_id": "a folder",
    "double_quant": False,
    "learning_rate": 0.0002,
}
LIKE_NUMBERS = (
    "007",
    "1e5",
    "1_000",
    "nan",
    "True",
    "False",
    "-1",
    "null",
    "no",
    "~",
    "it's $HOME",
)


def through_papermill(line: str) -> dict[str, object]:
    """What a cell of the notebook gets: read by a shell, papermill's command line and Python."""
    words = shlex.split(line)
    assert words[0] == "papermill"
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(papermill.cli, "execute_notebook", lambda **given: seen.update(given))
        done = CliRunner().invoke(papermill.cli.papermill, words[1:])
    assert done.exit_code == 0, done.output
    given = seen["parameters"]
    exec(translate_parameters("python3", "python", given, "Parameters"), {}, names := {})
    return names


@pytest.mark.parametrize(
    "given",
    [
        WRITTEN,
        *({"model_id": name, "output_dir": name} for name in LIKE_NUMBERS if name != "null"),
        *({"prompts": [name]} for name in LIKE_NUMBERS),
        *({"columns": {"output": name}} for name in LIKE_NUMBERS),
        *({"target_modules": [name, "b"]} for name in ("1", "True", "h.0.attn", "all-linear")),
        {"profile": "full", "resume": "latest", "max_steps": 10**9, "learning_rate": 1e-05},
    ],
    ids=repr,
)
def test_the_papermill_line_repeats_the_settings(given):
    settings = validate(given)
    line = settings.papermill_line("06_x")
    assert line.startswith("papermill notebooks/06_x.ipynb out.ipynb -p profile ")
    assert validate(through_papermill(line)) == settings


@pytest.mark.parametrize(
    ("written", "of_yaml", "expected"),
    [
        ("resume: no", False, "no"),
        ("model_id: 7", 7, "7"),
        ("learning_rate: 1e-3", "1e-3", 1e-3),
        ("double_quant: off", False, False),
        ("target_modules: [q_proj, k_proj]", MODULES, MODULES),
        ("prompts: [1.5, a]", [1.5, "a"], ["1.5", "a"]),
        ("columns: {output: 1}", {"output": 1}, {"output": "1"}),
        ("r: ~", None, 8),
    ],
)
def test_what_yaml_makes_of_a_value_is_what_was_written(written, of_yaml, expected, tmp_path):
    """papermill's -y and -f, which read `no` as False and 1e-3 as text."""
    file = tmp_path / "parameters.yaml"
    file.write_text(written)
    given = read_yaml_file(str(file))
    (name,) = given
    assert given == {name: of_yaml}
    assert getattr(validate(given), name) == expected


def tried(*cells: str, names: dict | None = None) -> tuple[dict, dict]:
    """The cells of a kernel run one after the other; resolved → (changed parameters, the globals)."""
    names = {"In": [""]} if names is None else names
    for cell in cells:
        names[f"_i{len(names['In'])}"] = cell
        names["In"].append(f"get_ipython().run_cell({cell!r})" if cell[0] == "%" else cell)
        exec(re.sub("^[%!].*$", "", cell, flags=re.MULTILINE), names)
    return resolve(names).changed(), names


PARAMETERS = """from typing import Optional

profile: str = "tiny"  # which world
max_steps: Optional[int] = None  # optimizer steps
dataset: Optional[str] = None  # a file
"""
OWN = {
    "a constant and a loop": "DRIVE = '/content/drive'\nfor i in range(3):\n    pass",
    "an import, a function, a class": "import os as r\ndef seed(): pass\nclass Mine: pass",
    "a tuple, a walrus, an annotation": "a, (b, *c) = 1, (2, 3)\n(d := 4)\ne: int = 5",
    "underscores": "_ = 1\n__ = 2\n_mine = 3\n__file__ = 'x.ipynb'",
    "magics": "%%time\n!true\nfast = True",
    "no Python": "%%bash\n%%",
}


@pytest.mark.fault(55)
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_own_variables_are_not_refused_at_the_first_try_nor_at_the_second(own, above):
    cells = (own, PARAMETERS) if above else (PARAMETERS, own)
    changed, names = tried(*cells)
    assert changed == {}
    assert tried("max_steps = 5", own, names=names)[0] == {"max_steps": 5}
    assert tried(PARAMETERS, "later = 1", names=names)[0] == {}


def test_an_own_cell_with_papermills_comment_above_the_parameters():
    names = {"In": [""]}
    for _ in range(2):
        assert tried("# Parameters\nDRIVE = 3", PARAMETERS, names=names)[0] == {}


@pytest.mark.parametrize(
    "cells",
    [
        ('profile = "tiny"', "# Parameters\nsed = 3\n"),
        (PARAMETERS + "sed = 3", 'profile = "smollm2"'),
        ("# Parameters\nDRIVE = 3", PARAMETERS, "# Parameters\nsed = 3\n", "i = 3"),
    ],
    ids=["profile alone", "and a cell of the reader's", "among others"],
)
def test_profile_alone_in_a_cell(cells):
    names = {"In": [""]}
    for _ in range(2):
        with pytest.raises(KitError, match="unknown parameter 'sed'"):
            tried(*cells, names=names)


def test_the_parameters_cell_may_use_variables_of_its_own():
    """What it sets and uses is no misspelt parameter."""
    own = (
        "DRIVE = '/content'\nimport json as js\ndef here(x): return x\n"
        "dataset = here(f'{DRIVE}/rows.json')\nprompts = [f'{i}' for i in range(2)]\n"
    )
    changed, _ = tried("for i in range(3):\n    pass", PARAMETERS + own)
    assert changed == {"dataset": "/content/rows.json", "prompts": ["0", "1"]}


MISSPELT = {
    "assigned": PARAMETERS + "max_stepz = 3",
    "annotated": PARAMETERS + "max_stepz: Optional[int] = 3",
    "in a tuple": PARAMETERS + "seed, max_stepz = 0, 3",
    "walrus": PARAMETERS + "(max_stepz := 3)",
    "timed": "%%time\n" + PARAMETERS + "max_stepz = 3",
    "after a magic": "%load_ext x\n" + PARAMETERS + "max_stepz = 3",
}


@pytest.mark.fault(55)
@pytest.mark.parametrize("cell", MISSPELT.values(), ids=MISSPELT)
@pytest.mark.parametrize("injected", [False, True])
def test_a_misspelt_parameter_is_refused_until_it_is_put_right(cell, injected):
    cells = [cell]
    if injected:  # as papermill does with -p max_stepz 3
        cells = [
            PARAMETERS,
            translate_parameters("python3", "python", {"max_stepz": 3}, "Parameters"),
        ]
    names = {"In": [""]}
    for _ in range(2):
        with pytest.raises(
            KitError, match=r"unknown parameter 'max_stepz'.*did you mean max_steps"
        ):
            tried(*cells, names=names)
        cells = ["1 + 1"]
    right = "# Parameters\nmax_steps = 3\n" if injected else PARAMETERS + "max_steps = 3"
    assert tried(right, names=names)[0] == {"max_steps": 3}, "the name is still among the globals"


@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "oops"]), st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.lists(st.text(max_size=5), max_size=3),
    st.binary(max_size=5), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)), max_size=5))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_anything_is_either_settings_or_the_kits_own_refusal(values):
    try:
        resolved = validate(values)
    except KitError:
        return
    assert json.loads(resolved.model_dump_json())["profile"] == resolved.profile


# ---- what this machine may run
# ---------------------------------------------------------------------------------------


def here(monkeypatch, gpus=(), free_gib=16.0):
    pretended = machine.Machine(
        "cpu",
        2,
        32 * cards.GIB,
        int(free_gib * cards.GIB),
        100 * cards.GIB,
        tuple(gpus),
        "3.12",
        "Linux",
    )
    monkeypatch.setattr(machine, "this_machine", lambda folder=".": pretended)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)


T4 = cards.Gpu("Tesla T4", 15 * cards.GIB, 15 * cards.GIB, (7, 5))
CARD_24 = cards.Gpu("NVIDIA GeForce RTX 3090", 24 * cards.GIB, 24 * cards.GIB, (8, 6))
CARD_6 = cards.Gpu("small", 6 * cards.GIB, 6 * cards.GIB, (8, 6))


@pytest.mark.fault(11)
def test_the_12b_is_refused_without_a_gpu_before_any_download(monkeypatch):
    here(monkeypatch)
    with pytest.raises(
        KitError, match=r"pythia-12b needs a GPU.*11\.8 billion.*2 CPU cores"
    ) as refused:
        preflight.refuse_what_cannot_run(validate({"profile": "full"}))
    assert "tiny" in refused.value.remedy


SLOW = {"profile": "full", "allow_slow": True, "dataset": "pocket", "max_steps": 30}


@pytest.mark.fault(11)
def test_a_large_model_goes_on_without_a_gpu_where_that_is_asked_for(monkeypatch, capsys):
    here(monkeypatch)
    plan = plan_of(validate(SLOW), on_gpu=False)
    unpacked = 3 * 11_324_620_800 * plan.accumulation  # forward, again, backward
    monkeypatch.setattr(estimates, "operations_per_s", lambda dtype: 1e11)
    monkeypatch.setattr(estimates, "unpacked_per_s", lambda dtype: 1e9)
    seconds = estimates.step_flops(plan) / 1e11 + unpacked / 1e9
    preflight.refuse_what_cannot_run(validate(SLOW))
    said = capsys.readouterr().out
    assert f"about {seconds / 60:.1f} minutes a step of 16 rows of 512 tokens" in said
    assert f"{30 * seconds / 3600:.1f} hours for 30 steps" in said
    [loading, training] = map(float, re.findall(r"([\d.]+) GiB for", said))
    measured = recorded.read("true_size")[0]["cases"]["12b, r 16"]["load"]["anonymous_bytes"]
    assert measured / cards.GIB < loading < 1.25 * measured / cards.GIB
    assert training > budget.peak(plan).total_gib

    here(monkeypatch, free_gib=max(loading, training) - 1)
    with pytest.raises(KitError, match="does not fit this machine's memory"):
        preflight.refuse_what_cannot_run(validate(SLOW))
    here(monkeypatch)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
    with pytest.raises(KitError, match="cannot be reached"):
        preflight.refuse_what_cannot_run(validate(SLOW))


def test_a_model_that_a_cpu_bears_is_not_called_slow(monkeypatch, capsys):
    here(monkeypatch)
    preflight.refuse_what_cannot_run(validate({"allow_slow": True}))
    assert capsys.readouterr().out == ""


@pytest.mark.fault(11)
def test_a_card_too_small_names_what_would_fit(monkeypatch):
    here(monkeypatch, [CARD_6])
    with pytest.raises(KitError, match=r"does not fit this GPU.*6\.0 GiB") as refused:
        preflight.refuse_what_cannot_run(validate({"profile": "full"}))
    assert "EleutherAI/pythia-" in refused.value.remedy
    suggested = refused.value.remedy.split('"')[1]
    preflight.refuse_what_cannot_run(validate({"profile": "full", "model_id": suggested}))


def test_the_judgement_is_about_the_model_not_the_profiles_name(monkeypatch):
    here(monkeypatch, [CARD_24])
    preflight.refuse_what_cannot_run(validate({"profile": "full"}))
    here(monkeypatch)
    preflight.refuse_what_cannot_run(
        validate({"profile": "full", "model_id": "pocket", "dataset": "pocket"})
    )
    with pytest.raises(KitError, match="needs a GPU"):
        preflight.refuse_what_cannot_run(
            validate({"profile": "tiny", "model_id": "EleutherAI/pythia-12b"})
        )


@pytest.mark.fault(10)
def test_t4_profile_fits_a_t4_and_has_no_bf16(monkeypatch):
    here(monkeypatch, [T4])
    preflight.refuse_what_cannot_run(validate({"profile": "t4"}))
    assert not T4.has_bf16
    assert CARD_24.has_bf16


def test_too_little_memory_and_unreachable_hub(monkeypatch, tmp_path):
    here(monkeypatch, free_gib=0.1)
    with pytest.raises(KitError, match="does not fit this machine's memory"):
        preflight.refuse_what_cannot_run(validate({}))
    here(monkeypatch)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
    monkeypatch.setattr(sources, "in_hub_cache", lambda *a: False)
    preflight.refuse_what_cannot_run(validate({}))
    for values, words in (
        ({"model_id": "EleutherAI/pythia-70m"}, "cannot be reached"),
        ({"dataset": "tatsu-lab/alpaca"}, "cannot be reached"),
        ({"model_id": "./nothing"}, "not found"),
        ({"dataset": "nothing.jsonl"}, "not found"),
        ({"model_id": str(tmp_path)}, "config.json"),
    ):
        with pytest.raises(KitError, match=words):
            preflight.refuse_what_cannot_run(validate(values))


def test_a_run_to_resume_is_looked_for_before_anything_is_loaded(monkeypatch, tmp_path):
    """In the folder the user is in; the refusal shows the whole path that was tried."""
    here(monkeypatch)
    (tmp_path / "a run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "an adapter").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("no", "latest", "a run", "./a run/", str(tmp_path / "a run")):
        preflight.refuse_what_cannot_run(validate({"resume": name}))
    for name in ("an adapter", "yes", "a run/checkpoints", "../a run"):
        with pytest.raises(KitError, match="resume is no run folder") as refused:
            preflight.refuse_what_cannot_run(validate({"resume": name}))
        assert refused.value.value == str(tmp_path / name)
    given = sequence._for_the_notebooks(validate({"resume": "a run"}))
    assert given["resume"] == str(tmp_path / "a run")
    (tmp_path / "no").mkdir()
    assert "resume" not in sequence._for_the_notebooks(validate({"resume": "no"}))


def test_a_name_is_the_kits_own_or_a_path_or_the_hubs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("pocket", "latest", "mine", "a/b"):
        Path(folder).mkdir(parents=True)
    for name in ("pocket", "latest", "owner/model"):
        assert sources.seen_from_anywhere(name) == name
    for name in ("mine", "a/b"):
        assert sources.seen_from_anywhere(name) == str(tmp_path / name)
    assert [sources.is_here(n) for n in ("smollm2", "mine", "owner/model")] == [True, True, False]
    monkeypatch.setattr(sources, "in_hub_cache", lambda name, what: name == "cached/one")
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
    for name in ("pocket", "cached/one"):
        sources.require_reachable("model", name, "a model")
    for name, words in (
        ("owner/model", "cannot be reached"),
        ("mine", "config.json"),
        ("./nothing", "model not found"),
        ("owner/rows.json", "model not found"),
        ("nothing", "model not found"),
    ):
        with pytest.raises(KitError, match=words):
            sources.require_reachable("model", name, "a model")
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    sources.require_reachable("model", "owner/model", "a model")


@pytest.mark.fault(38)
def test_a_loaded_or_wrong_version_is_named_with_its_remedy():
    version = machine.Version
    assert "restart" in version("torch", "2.13.0", ">=2.6", "2.12.0").problem
    assert "pip install 'peft>=0.19'" in version("peft", "0.1", ">=0.19", None).problem
    assert "not installed" in version("peft", None, ">=0.19", None).problem
    assert version("torch", "2.13.0+cpu", ">=2.6", "2.13.0+cpu").problem == ""


def test_a_refusal_in_a_notebook_is_one_line():
    """As in a kernel: IPython asks the error how it wants to be shown."""
    program = (
        "from IPython.core.interactiveshell import InteractiveShell as S\n"
        "S.instance().run_cell(\"from qlora_nb.settings import resolve; resolve({'max_stepz': 3})\")"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    shown = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(shown) == 1
    assert "did you mean max_steps" in shown[0]


def test_smollm2_is_refused_until_it_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "SMOLLM2_DIR", tmp_path)
    with pytest.raises(KitError, match=r"not on this machine yet.*qlora-nb fetch smollm2"):
        sources.model_path("smollm2")
    (tmp_path / "config.json").write_text("{}")
    assert sources.model_path("smollm2") == str(tmp_path)
