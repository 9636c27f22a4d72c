"""Merging, exporting, giving memory back, and answering a file of prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qlora_nb import cli
from qlora_nb.answer import adapters, generate, merge, prompt_files
from qlora_nb.errors import KitError
from qlora_nb.memory import ledger, live_bytes
from qlora_nb.model import data, load
from qlora_nb.model.linear_layers import linear_layers
from qlora_nb.pocket import ADAPTER_DIR
from qlora_nb.settings import validate

SETTINGS = validate({"eval_rows": 60})
INPUTS = [
    torch.randint(5, 1000, (1, n), generator=torch.Generator().manual_seed(n)) for n in (3, 20, 90)
]


@pytest.fixture(scope="module")
def tuned():
    tokenizer = load.load_tokenizer(SETTINGS)
    return tokenizer, adapters.load_adapter(load.load_base(SETTINGS), ADAPTER_DIR)


@pytest.fixture(scope="module")
def wanted(tuned):
    with torch.no_grad():
        return [tuned[1](input_ids=ids).logits for ids in INPUTS]


def test_only_the_dequantized_weights_give_the_model_that_was_trained(tuned, wanted):
    """Float32 sums in another order: 3.5e-5 of logits up to 26 was the most seen, a tenth of what
    is allowed.
    """
    apart = {
        way: merge.logit_difference(merge.merged(SETTINGS, ADAPTER_DIR, way), wanted, INPUTS)
        for way in merge.WAYS
    }
    assert apart["dequantized"] < 3.5e-4
    assert apart["packed"] > 0.1
    assert apart["original"] > 0.1


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_plain_model_is_what_the_4bit_layers_stand_for(quant_type, double_quant):
    """bitsandbytes' own functions on the original weights are the reference."""
    settings = validate({"quant_type": quant_type, "double_quant": double_quant})
    plain = linear_layers(merge.dequantized(settings))
    for name, layer in linear_layers(load.load_base(settings, four_bit=False)).items():
        codes, state = bnb.quantize_4bit(
            layer.weight.data,
            blocksize=64,
            quant_type=quant_type,
            compress_statistics=double_quant,
        )
        assert torch.equal(plain[name].weight, bnb.dequantize_4bit(codes, state))


def test_an_export_is_loaded_by_plain_transformers_in_a_fresh_process(tuned, wanted, tmp_path):
    model = merge.merged(SETTINGS, ADAPTER_DIR)
    folder = merge.export(
        model, tuned[0], tmp_path / "out", merge.card_facts(ADAPTER_DIR, SETTINGS, "dequantized")
    )
    torch.save([INPUTS, wanted], tmp_path / "wanted.pt")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "inputs, wanted = torch.load(sys.argv[2]); model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): apart = max((model(i).logits - w).abs().max().item() for i, w in zip(inputs, wanted))\n"
        "assert not any(name.startswith(('peft', 'bitsandbytes', 'qlora_nb')) for name in sys.modules); print(apart)"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "wanted.pt")]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert float(done.stdout.split()[-1]) < 3.5e-4
    assert not list(folder.glob("*.bin"))


def test_the_command_writes_a_plain_model(tuned, wanted, tmp_path):
    given = ["merge", "--out", str(tmp_path / "plain"), "-p", "adapter", "pocket"]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, done.output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert merge.logit_difference(plain, wanted, INPUTS) < 3.5e-4
    assert "dequantized" in (tmp_path / "plain" / "README.md").read_text()


@torch.no_grad()
def test_an_export_ends_where_a_turn_ends(tmp_path):
    """A model that closes its turn at once, asked by plain transformers: no token follows."""
    tokenizer = load.load_tokenizer(SETTINGS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role + '\n' + turn.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = load.load_base(SETTINGS, four_bit=False)
    assert tokenizer.eos_token_id != turn_end < model.config.vocab_size
    hidden = model.base_model(INPUTS[0]).last_hidden_state[0, -1]
    model.get_output_embeddings().weight[turn_end] = 10 * hidden
    card = merge.card_facts(ADAPTER_DIR, SETTINGS, "dequantized")
    folder = merge.export(model, tokenizer, tmp_path, card)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    made = plain.generate(INPUTS[0], max_new_tokens=5, do_sample=False)
    assert made[0, INPUTS[0].shape[1] :].tolist() == [turn_end]
    assert plain.generation_config.eos_token_id == [tokenizer.eos_token_id, turn_end]


def test_the_card_says_what_the_run_was(tuned, tmp_path):
    (tmp_path / "adapter").mkdir()
    for file in ADAPTER_DIR.iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    run = {
        "started": "2026-01-02T03:04:05",
        "versions": {"torch": "2.9"},
        "metrics": {"loss_after": 0.123456, "said": "x"},
    }
    manifest = run | {
        "parameters": SETTINGS.model_dump() | {"dataset": "someone/data", "max_steps": 77}
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    model = merge.merged(SETTINGS, ADAPTER_DIR)
    facts = merge.card_facts(tmp_path / "adapter", SETTINGS, "dequantized")
    card = (merge.export(model, tuned[0], tmp_path / "out", facts) / "README.md").read_text()
    for said in (
        "rank 8, alpha 16",
        "| max_steps | 77 |",
        "| dataset | data |",
        "| loss_after | 0.1235 |",
        "2026-01-02 with torch 2.9",
    ):
        assert said in card
    assert "on dense, dense_4h_to_h, dense_h_to_4h, query_key_value" in card
    assert "merged into its weights (dequantized)" in card
    merge.write_card(tmp_path / "adapter", merge.card_facts(tmp_path / "adapter", SETTINGS))
    own = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in own
    assert "A LoRA adapter for pocket." in own
    assert "merged" not in own
    assert own.partition("| what |")[2] == card.partition("| what |")[2]


def test_what_cannot_be_merged_or_exported_is_refused(tuned, tmp_path):
    with pytest.raises(KitError, match=r"way of merging.*dequantized, packed, original"):
        merge.merged(SETTINGS, ADAPTER_DIR, "sideways")
    packed = merge.merged(SETTINGS, ADAPTER_DIR, "packed")
    with pytest.raises(KitError, match="packed model is not exported"):
        merge.export(packed, tuned[0], tmp_path / "no", {})
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("four_bit", [True, False])
def test_release_gives_back_every_byte_although_the_name_is_still_held(four_bit):
    with live_bytes.LiveBytes(torch.nn.Module()) as live:
        model = load.load_base(SETTINGS, four_bit)
        model = model if four_bit else model.double()  # made under the counter's eyes
        held, before = ledger.measure(model).total_bytes, live.live
        merge.release(model)
        assert (
            before - live.live >= 0.98 * held
        )  # what was made outside torch's dispatcher is not seen
    assert ledger.measure(model).total_bytes == 0
    assert isinstance(
        load.load_base(SETTINGS, four_bit)(INPUTS[0]).logits, torch.Tensor
    )  # the next one is whole


# --- a file of prompts ---


def rows_of(n):
    return [
        {"instruction": row["instruction"], "input": row["input"]}
        for row in data.pocket.read("test")[:n]
    ]


N_PROMPTS = int(os.environ.get("QLORA_NB_PROMPTS", "50"))
"""`make verify` takes more."""


@pytest.mark.slow
def test_batched_answers_are_the_single_ones(tuned):
    tokenizer, model = tuned
    rows = rows_of(N_PROMPTS) + [
        {"instruction": "Where is Anna?", "input": "Anna walked to the river. " * n}
        for n in range(1, 11)
    ]
    together = generate.answer_all(model, tokenizer, rows, SETTINGS, batch=16)
    alone = [generate.answer_all(model, tokenizer, [row], SETTINGS)[0] for row in rows]
    assert together == alone
    assert len(set(together)) > 20


def test_a_file_is_answered_and_gone_on_with(tuned, tmp_path):
    tokenizer, model = tuned
    rows, target = rows_of(20), tmp_path / "answers.jsonl"
    assert prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS, batch=8) == 20
    whole = sorted(map(json.loads, target.read_text().splitlines()), key=lambda r: r["n"])
    assert [r["answer"] for r in whole] == generate.answer_all(model, tokenizer, rows, SETTINGS)
    assert [{k: r[k] for k in ("instruction", "input")} for r in whole] == rows
    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:9]) + lines[9][:20])  # as a kill leaves it
    assert prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS, batch=8) == 11
    assert sorted(map(json.loads, target.read_text().splitlines()), key=lambda r: r["n"]) == whole
    assert prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS) == 0


def test_a_file_with_answers_to_other_rows_is_left_alone(tuned, tmp_path):
    tokenizer, model = tuned
    target = tmp_path / "answers.jsonl"
    prompt_files.answer_file(model, tokenizer, rows_of(3), target, SETTINGS)
    before = target.read_text()
    for other in (rows_of(2), [*rows_of(2), {"instruction": "Other?", "input": ""}]):
        with pytest.raises(KitError, match="answers to other rows"):
            prompt_files.answer_file(model, tokenizer, other, target, SETTINGS)
    assert target.read_text() == before


@pytest.mark.parametrize(
    "content",
    [
        b"my notes, weeks of work\nline two\n",
        b"my notes",
        b'{"a": 1}\n',
        b"[1]\n",
        b"\xe9\n",
        b'{"n": "x"}\n',
        b'{"n": 0\n{"n": 1}\n',
    ],
)
def test_a_file_of_something_else_is_left_alone(tuned, tmp_path, content):
    tokenizer, model = tuned
    target = tmp_path / "notes.txt"
    target.write_bytes(content)
    with pytest.raises(
        KitError, match=r"is no file of answers|holds answers to other rows"
    ) as refused:
        prompt_files.answer_file(model, tokenizer, rows_of(2), target, SETTINGS)
    assert "name another file" in refused.value.remedy
    assert target.read_bytes() == content


def test_answers_of_another_model_are_not_mixed_in(tuned, tmp_path):
    tokenizer, model = tuned
    target = tmp_path / "not" / "there yet" / "answers.jsonl"
    with model.disable_adapter():
        prompt_files.answer_file(model.get_base_model(), tokenizer, rows_of(2), target, SETTINGS)
    before = target.read_text()
    for settings in (SETTINGS, SETTINGS.replace(max_new_tokens=3)):
        with pytest.raises(KitError, match="by another model"):
            prompt_files.answer_file(model, tokenizer, rows_of(2), target, settings)
    assert target.read_text() == before


def in_the_middle(monkeypatch, what):
    """Do something once, after the first batch was answered and before it is written."""
    whole, done = generate.in_batches, []

    def batches(*given):
        for found in whole(*given):
            if not done:
                done.append(1)
                what()
            yield found

    monkeypatch.setattr(generate, "in_batches", batches)


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    "name", ["answers.jsonl", "./folder/../answers.jsonl", "link.jsonl", "linked/answers.jsonl"]
)
def test_a_second_writer_is_refused_under_any_name_of_the_file(tuned, tmp_path, monkeypatch, name):
    tokenizer, model = tuned
    rows, target = rows_of(12), tmp_path / "answers.jsonl"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to(target)
    (tmp_path / "linked").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused = []

    def second():
        with pytest.raises(KitError, match="another process writes here") as error:
            prompt_files.answer_file(model, tokenizer, rows, Path(name), SETTINGS)
        refused.append(error.value)

    in_the_middle(monkeypatch, second)
    assert prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS, batch=5) == 12
    assert len(refused) == 1
    assert {json.loads(line)["n"] for line in target.read_text().splitlines()} == set(range(12))
    assert prompt_files.answer_file(model, tokenizer, rows, Path(name), SETTINGS) == 0
    assert (tmp_path / "link.jsonl").is_symlink()


@pytest.mark.fault(47)
@pytest.mark.parametrize("how", ["removed", "replaced", "written to", "emptied"])
def test_a_file_that_somebody_touches_meanwhile_is_said_and_answered_again(
    tuned, tmp_path, monkeypatch, how
):
    tokenizer, model = tuned
    rows, target, other = rows_of(12), tmp_path / "answers.jsonl", tmp_path / "other"
    other.write_text("")
    touch = {
        "removed": target.unlink,
        "replaced": lambda: other.replace(target),
        "emptied": lambda: target.write_text(""),
    }
    touch["written to"] = lambda: target.write_text(target.read_text()[:-1] + " \n")
    if how in ("emptied", "written to"):
        prompt_files.answer_file(model, tokenizer, rows[:1], target, SETTINGS)
    in_the_middle(monkeypatch, touch[how])
    with pytest.raises(KitError, match=r"removed or changed .*call it again"):
        prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS, batch=5)
    prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS)
    assert {json.loads(line)["n"] for line in target.read_text().splitlines()} == set(range(12))


@pytest.mark.fault(47)
def test_answers_into_a_folder_that_is_closed(tuned, closed_folder):
    tokenizer, model = tuned
    with pytest.raises(KitError, match=r"answers\.jsonl cannot be written") as refused:
        prompt_files.answer_file(
            model, tokenizer, rows_of(1), closed_folder / "answers.jsonl", SETTINGS
        )
    assert "that you may write to" in refused.value.remedy


def test_prompts_come_from_text_and_data_files(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffSay hi.\n\nSay bye.\n", encoding="utf-8")
    assert prompt_files.read_rows(str(tmp_path / "a.txt"), {}) == [
        {"instruction": "Say hi.", "input": ""},
        {"instruction": "Say bye.", "input": ""},
    ]
    (tmp_path / "b.jsonl").write_text(
        '{"q": "Say hi.", "output": ""}\n{"q": "Say bye.", "output": ""}\n'
    )
    rows = prompt_files.read_rows(str(tmp_path / "b.jsonl"), {"instruction": "q", "output": "none"})
    assert [row["instruction"] for row in rows] == ["Say hi.", "Say bye."]


@pytest.mark.parametrize(
    ("written", "prompts"),
    [
        ("One\u2028two.\nThree.\n", ["One\u2028two.", "Three."]),
        ("One\x0btwo\x0c.\nThree\x85four.", ["One\x0btwo\x0c.", "Three\x85four."]),
        ("\ufeffOne.\r\n\r\nTwo.\r\n", ["One.", "Two."]),
        ("One\x1ctwo\x1d.\n \t\n<|endoftext|>\n", ["One\x1ctwo\x1d.", "<|endoftext|>"]),
    ],
)
def test_lines_end_at_line_ends_only(tmp_path, written, prompts):
    (tmp_path / "a.txt").write_bytes(written.encode())
    rows = prompt_files.read_rows(str(tmp_path / "a.txt"), {})
    assert [row["instruction"] for row in rows] == prompts


def test_a_prompt_over_the_context_is_named_and_the_others_are_answered(tuned, tmp_path, capsys):
    tokenizer, model = tuned
    rows, target = rows_of(5), tmp_path / "answers.jsonl"
    rows[1] = {"instruction": "Where is Anna?", "input": "Anna went home. " * 400}
    rows[3] = {"instruction": "<|endoftext|><|endoftext|>", "input": ""}
    fit = [row for n, row in enumerate(rows) if n != 1]
    assert prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS, batch=2) == 4
    assert "row 1 is not answered: the prompt has" in capsys.readouterr().out
    records = {r["n"]: r for r in map(json.loads, target.read_text().splitlines())}
    assert sorted(records) == [0, 1, 2, 3, 4]
    assert records[1]["answer"] is None
    assert "over the model's" in records[1]["left_out"]
    said = [records[n]["answer"] for n in (0, 2, 3, 4)]
    assert said == generate.answer_all(model, tokenizer, fit, SETTINGS)
    before = target.read_bytes()
    assert prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS) == 0
    assert target.read_bytes() == before
    lines = before.splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:2]))  # as a kill leaves it
    prompt_files.answer_file(model, tokenizer, rows, target, SETTINGS)
    assert {json.loads(line)["n"] for line in target.read_text().splitlines()} == set(range(5))


@pytest.mark.slow
def test_the_command_line_answers(tmp_path, monkeypatch):
    """The first time in a process of its own, as from a shell; what it has written is gone on with
    from here.
    """
    (tmp_path / "a.txt").write_text("Where is Anna?\nWho is Ben?\n")
    monkeypatch.chdir(tmp_path)
    given = ["generate", "-p", "adapter", "pocket"]
    file = ["--prompts", "a.txt", "--out", "b.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_nb.cli", *given, *file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert "2 of 2 answered into b.jsonl" in done.stdout

    def run(*more: str):
        return CliRunner().invoke(cli.app, [*given, *more])

    assert "0 of 2 answered" in run(*file).stdout
    assert "Where is Anna?\n    '" in run().stdout
    base = run("--base")
    assert base.exit_code == 0
    assert "adapter" not in base.stdout
    assert run("--prompts", "none.txt").exit_code == 2


def test_answers_go_into_a_file_and_into_nothing_else(tuned, tmp_path):
    """A device such as /dev/null, a pipe, a socket is left as it is."""
    tokenizer, model = tuned
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = pipe.stat()
    with pytest.raises(KitError, match="this is no file"):
        prompt_files.answer_file(model, tokenizer, rows_of(2), pipe, SETTINGS)
    assert pipe.stat() == before
    assert os.listdir(tmp_path) == ["pipe"]
