"""Fuzzing of what is well formed and odd: chats of many shapes, tables of many dialects, and other
people's tokenizer and generation settings.

Whatever comes in is used or refused by the kit's own error, and no row is changed in silence: what
is read is compared with what was written. QLORA_NB_FUZZ says how many inputs there are in the other
file of this kind; here there are half as many again, with fixed seeds.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import string
from pathlib import Path
from random import Random

import pytest
from test_chats import TEMPLATES, with_template
from test_fuzz import COUNTS, N, counted, tried  # noqa: F401  counted: a fixture of the module

from qlora_nb.answer import adapters, generate
from qlora_nb.model import data, data_report, load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.settings import validate

SHARES = {"chats": 0.25, "tables": 0.2, "configurations": 0.05}


def share(kind: str) -> int:
    return max(1, round(N * SHARES[kind]))


TEXTS = ["Far?", "3 km.", "你好", "{{ eos }}", "a\nb", "<think>hm</think>So.", "<|endoftext|>",
         "[1, 2]", "### Response:\nno", "é\u2028ü", "😀", "  blank ends  ", "user: I"]  # fmt: skip
SPELLINGS = {
    "system": ["system", "System", "developer"],
    "user": ["user", "Human", "USER:", "prompter", "customer", "<|user|>"],
    "assistant": ["assistant", "gpt", "ChatGPT-4", "Bot", "model", "AI"],
    "": ["tool", "narrator", "", None, 3, "observation"],
}


def random_turn(random: Random, role: str) -> tuple[dict, str | None]:
    """A turn, and its text; None if it holds something other than text."""
    text = random.choice(TEXTS) + random.choice(["", " " + random.choice(TEXTS)])
    if random.random() < 0.04:
        text = random.choice(["", " \n"])
    content: object = text
    if random.random() < 0.15:
        at = random.randrange(len(text) + 1)
        content = [{"type": "text", "text": text[:at]}, {"type": "text", "text": text[at:]}]
    if random.random() < 0.02:
        content, text = random.choice([3, [{"type": "image"}], {"a": 1}]), None
    who, what = random.choice([("role", "content"), ("from", "value"), ("speaker", "text")])
    turn = {who: random.choice(SPELLINGS[role]), what: content}
    if random.random() < 0.1:
        turn |= random.choice([{"name": "x"}, {"weight": 1}, {"id": None}, {"tool_calls": None}])
    return turn, text


def random_chat(random: Random) -> tuple[list[dict], list[tuple[str, str | None]]]:
    """Turns as somebody writes them, and (role, text) of each."""
    turns, said = [], []
    roles = ["user", "assistant"] * random.randrange(1, 4)
    if random.random() < 0.3:
        roles.insert(0, "system")
    for _ in range(random.choice((0, 0, 0, 1, 2))):
        roles.insert(random.randrange(len(roles) + 1), random.choice(list(SPELLINGS)))
    for role in roles:
        turn, text = random_turn(random, role)
        turns.append(turn)
        said.append((role, text))
    return turns, said


def without_blanks(text: str) -> str:
    return re.sub(r"\s", "", text)


def bare(text: str) -> str:
    """Without blanks and marks."""
    return without_blanks(re.sub(r"<\|im_end\|>|<\|endoftext\|>|</?think>", "", text))


def test_chats(tmp_path, capsys):
    random = Random(5)
    tokenizers = [with_template(name) for name in TEMPLATES]
    data.datasets.disable_progress_bars()
    for n in range(share("chats")):
        chats = [random_chat(random) for _ in range(random.randrange(4, 9))]
        column = random.choice(["messages", "conversations", "dialog"])
        path = tmp_path / f"chats.{random.choice(['json', 'jsonl'])}"
        rows = [{"id": i, column: turns} for i, (turns, _) in enumerate(chats)]
        text = json.dumps(rows)
        if path.suffix == ".jsonl":
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(text, encoding="utf-8")
        chosen = validate({"dataset": str(path), "eval_rows": 1, "max_length": 4096})
        tokenizer = random.choice(tokenizers)
        report = tried("chats", lambda c=chosen, t=tokenizer: data_report.check(c, t))
        if report:
            read_as_written(report, chats, tokenizer)
        if n % 50 == 49:
            capsys.readouterr()
    data.datasets.enable_progress_bars()


def read_as_written(report, chats: list, tokenizer) -> None:
    split = report.split
    left_out = [number for numbers in split.source.left_out.values() for number in numbers]
    kept = [*split.train, *split.held_out]
    assert sorted([*left_out, *(row["number"] for row in kept)]) == list(range(len(chats)))
    for row in kept:
        said = chats[row["number"]][1]
        last = max(place for place, (role, _) in enumerate(said) if role == "assistant")
        for role in ("system", "user", "assistant"):
            written = "".join(text for who, text in said[: last + 1] if who == role)
            read = "".join(m["content"] for m in row["messages"] if m["role"] == role)
            assert without_blanks(read) == without_blanks(written)
    for row in report.encoded:
        trained = bare(tokenizer.decode([label for label in row["labels"] if label != -100]))
        for message in split.train[row["row"]]["messages"]:
            if message["trains"]:
                whole = message["content"]
                _, _, from_thought = whole.rpartition("<think>")
                _, _, behind_thoughts = whole.rpartition("</think>")
                said = bare(whole)
                for rest in (from_thought, behind_thoughts):  # a template may take the others out
                    if not trained.startswith(said):
                        said = bare(rest)
                assert trained.startswith(said)
                trained = trained[len(said) :]
        assert trained == ""


CELLS = ["007", "NA", "", "a, b", "x;y", 'say "so"', "two\nlines", "null", "1e5", "tab\there", "é|"]


def test_tables(tmp_path, capsys):
    random = Random(6)
    data.datasets.disable_progress_bars()
    for n in range(share("tables")):
        names = ["instruction", "input", "output", *random.sample(string.ascii_lowercase, 2)]
        random.shuffle(names)
        if random.random() < 0.2:
            names.insert(0, "")  # pandas' index
        rows = [[random.choice(CELLS) for _ in names] for _ in range(random.randrange(3, 9))]
        path = tmp_path / random.choice(["a.csv", "a.tsv"])
        dialect = {
            "delimiter": random.choice(",;\t|"),
            "quoting": random.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
            "lineterminator": random.choice(["\n", "\r\n"]),
        }
        encoding = random.choice(["utf-8", "utf-8-sig"])
        with open(path, "w", encoding=encoding, newline="") as file:
            csv.writer(file, **dialect).writerows([names, *rows])
        chosen = validate({"dataset": str(path), "eval_rows": 1})
        split = tried("tables", lambda c=chosen: data.split(c))
        if split:
            for row in [*split.train, *split.held_out]:
                written = dict(zip(names, rows[row["number"]], strict=True))
                for name in ("instruction", "input", "output"):
                    assert row[name] == written[name].replace("\r\n", "\n") or "\n" in row[name]
                    assert row[name] == written[name]
            usable = [r for r in rows if dict(zip(names, r))["instruction"].strip()
                      and dict(zip(names, r))["output"].strip()]  # fmt: skip
            assert len(split.train) + 1 == len(usable)
        if n % 50 == 49:
            capsys.readouterr()
    data.datasets.enable_progress_bars()


VALUES = [None, True, False, 0, 1, -1, 3.7, 10**9, "", "x", "<|endoftext|>", "<nothing>", [], [0],
          {}, {"a": 1}, "{{ x", "{% for %}"]  # fmt: skip
KEYS = {
    "tokenizer_config.json": ["eos_token", "bos_token", "pad_token", "unk_token", "chat_template",
                              "add_eos_token", "padding_side", "model_max_length",
                              "clean_up_tokenization_spaces", "added_tokens_decoder"],
    "generation_config.json": ["do_sample", "temperature", "top_p", "top_k", "repetition_penalty",
                               "eos_token_id", "pad_token_id", "max_length", "max_new_tokens",
                               "num_beams", "suppress_tokens", "forced_eos_token_id",
                               "no_repeat_ngram_size", "stop_strings", "min_new_tokens"],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_configurations(tmp_path, capsys):
    random = Random(7)
    folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    for file in folder.iterdir():
        file.chmod(0o644)
    whole = {}
    for name in KEYS:
        path = folder / name
        whole[name] = json.loads(path.read_text()) if path.exists() else {}
    row = generate.row_of("Where is Anna?\nAnna went to the park.")
    for _ in range(share("configurations")):
        for name, keys in KEYS.items():
            changed = dict(whole[name])
            for key in random.sample(keys, random.choice((1, 1, 2, 3))):
                changed[key] = random.choice(VALUES)
            (folder / name).write_text(json.dumps(changed))
        chosen = validate({"model_id": str(folder), "max_new_tokens": 3})

        def answered(chosen=chosen):
            tokenizer = load.load_tokenizer(chosen)
            model = adapters.load_adapter(load.load_base(chosen), ADAPTER_DIR)
            return generate.answer_all(model, tokenizer, [row, row], chosen)

        said = tried("configurations", answered)
        assert said is None or said[0] == said[1]
        capsys.readouterr()


def test_the_inputs_were_as_many_as_asked_for():
    """Runs last."""
    found = {kind: sum(COUNTS[f"{kind}: {end}"] for end in ("used", "refused")) for kind in SHARES}
    if all(found.values()):
        assert found == {kind: share(kind) for kind in SHARES}
        for kind in ("chats", "tables"):
            assert COUNTS[f"{kind}: used"] > share(kind) / 4, "nearly everything was refused"
