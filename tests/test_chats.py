"""Chats: every turn is kept and belongs to who spoke, the assistant's answers train and nothing
else does, and the model is asked in the form that it was trained in.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner

from qlora_nb import cli
from qlora_nb.answer import adapters, generate, prompt_files
from qlora_nb.errors import KitError
from qlora_nb.model import chat_templates, conversations, data, data_report, load
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.settings import validate


@pytest.fixture(scope="module")
def tokenizer():
    return load.load_tokenizer(validate({}))


def write(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def settings_for(path, **values):
    return validate({"dataset": str(path), "eval_rows": 1, **values})


def talk(*turns: str) -> dict:
    """A conversation whose turns are written "role: text"."""
    messages = []
    for turn in turns:
        role, _, text = turn.partition(": ")
        messages.append({"role": role, "content": text})
    return {"messages": messages}


def written(row: dict) -> list[str]:
    """The same the other way round; what trains has a star."""
    turns = []
    for message in row["messages"]:
        star = "*" if message["trains"] else ""
        turns.append(f"{message['role']}{star}: {message['content']}")
    return turns


def rows_of(path: Path, rows: list) -> list[list[str]]:
    """The conversations that a file is read as, in any order."""
    train, held_out = data.load(settings_for(write(path, rows)))
    return sorted(written(row) for row in [*train, *held_out])


WHOLE = [talk(f"user: Q{i}?", f"assistant: A{i}.") for i in range(3)]


def read_as(path, row, capsys, others=WHOLE) -> tuple[list[str] | None, str]:
    """What one conversation is read as (None: left out), beside three others, and what was said."""
    found = rows_of(path, [*others, row])
    plain = [written(conversations.conversation(row["messages"], False)) for row in WHOLE]
    for other in plain:
        found.remove(other)
    return (found[0] if found else None), capsys.readouterr().out


# --- shapes ---

TURNS = [("user", "Far?"), ("assistant", "3 km."), ("user", "And then?"), ("assistant", "Home.")]
READ = ["user: Far?", "assistant*: 3 km.", "user: And then?", "assistant*: Home."]


def turns(who="role", what="content", names=("user", "assistant")):
    by = dict(zip(("user", "assistant"), names, strict=True))
    return [{who: by[role], what: text} for role, text in TURNS]


SHAPES = {
    "OpenAI": {"messages": turns()},
    "ShareGPT": {"conversations": turns("from", "value", ("human", "gpt"))},
    "one column of another name": {"dialog": turns("speaker", "text", ("Customer", "Agent"))},
    "roles in capitals, with marks": {"chat": turns(names=("<|USER|>", "ChatGPT-4:"))},
    "an author in a record": {
        "conversation": [
            {"author": {"role": role}, "content": [{"type": "text", "text": text}]}
            for role, text in TURNS
        ]
    },
    "JSON in a column of text": {"messages": json.dumps(turns())},
    "a Python list in a column of text": {"messages": str(turns())},
    "Magpie: its first exchange beside it": {
        "instruction": "Far?",
        "response": "3 km.",
        "conversations": turns("from", "value", ("human", "gpt")),
    },
    "the first exchange as an instruction row beside it": {
        "instruction": "Far?",
        "output": "3 km.",
        "messages": json.dumps(turns()),
    },
    "prompt and completion": {"prompt": turns()[:3], "completion": turns()[3:]},
    "prompt of turns, completion of text": {"prompt": turns()[:3], "completion": "Home."},
    "an instruction with a history": {
        "instruction": "And then?",
        "input": None,
        "output": "Home.",
        "history": [["Far?", "3 km."]],
    },
    "a history written as JSON": {
        "instruction": "And then?",
        "output": "Home.",
        "history": json.dumps([["Far?", "3 km."]]),
    },
    "a history as Python writes it": {
        "instruction": "And then?",
        "output": "Home.",
        "history": str([("Far?", "3 km.")]),
    },
    "Guanaco": {
        "text": "### Human: Far?### Assistant: 3 km.### Human: And then?### Assistant: Home."
    },
    "one more question, unanswered": {"messages": [*turns(), {"role": "user", "content": "So?"}]},
    "a prompt as an extract beside it": {"prompt": "Far?", "messages": turns()},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_read_whole_in_every_shape(tmp_path, name):
    assert rows_of(tmp_path / "a.json", [SHAPES[name]] * 3) == [READ] * 3


def test_chats_in_a_table_with_commas(tmp_path):
    path = tmp_path / "a.csv"
    cell = json.dumps(turns()).replace('"', '""')
    path.write_text("id,messages\n" + "".join(f'{i},"{cell}"\n' for i in range(3)))
    train, _ = data.load(settings_for(path))
    assert [written(row) for row in train] == [READ] * 2


def test_chats_that_pandas_wrote_to_csv(tmp_path):
    import pandas

    path = tmp_path / "a.csv"
    said = [*TURNS[:3], ("assistant", 'It\'s "home".\n')]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    pandas.DataFrame([row] * 3).to_csv(path, index=False)
    train, _ = data.load(settings_for(path))
    assert [written(row) for row in train] == [
        [f"{w}{'*' * (w != 'user')}: {t}" for w, t in said]
    ] * 2


def test_a_csv_with_empty_histories_holds_instruction_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output,history\n" + "Far?,3 km.,[]\nSure?,Yes.,\nQ,A,[ ]\n")
    train, held_out = data.load(settings_for(path))
    assert "messages" not in train.column_names
    asked = [row["instruction"] for row in [*train, *held_out]]
    assert sorted(asked) == ["Far?", "Q", "Sure?"]


@pytest.mark.parametrize("beside", [3, "short", [], ["short"], None])
def test_a_column_that_is_called_like_turns_and_holds_none_is_not_read(tmp_path, beside):
    rows = [{"instruction": f"Q{i}", "output": f"A{i}", "turns": beside} for i in range(3)]
    train, held_out = data.load(settings_for(write(tmp_path / "a.json", rows)))
    assert sorted(row["output"] for row in [*train, *held_out]) == ["A0", "A1", "A2"]


def test_columns_that_somebody_names_are_taken_where_turns_stand_beside_them(tmp_path):
    path = write(tmp_path / "a.json", [SHAPES["Magpie: its first exchange beside it"]] * 3)
    names = {"instruction": "instruction", "output": "response"}
    train, _ = data.load(settings_for(path, columns=names))
    assert [(row["instruction"], row["output"]) for row in train] == [("Far?", "3 km.")] * 2


def test_turns_of_parquet(tmp_path):
    import pandas

    path = tmp_path / "a.parquet"
    pandas.DataFrame([SHAPES["ShareGPT"]] * 3).to_parquet(path)
    train, _ = data.load(settings_for(path))
    assert [written(row) for row in train] == [READ] * 2


# --- who spoke ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            talk("human: Hello.", "human: How far?", "gpt: 3 km."),
            ["user: Hello.\n\nHow far?", "assistant*: 3 km."],
        ),
        (
            talk("prompter: Far?", "bot: Yes.", "model: Very."),
            ["user: Far?", "assistant*: Yes.\n\nVery."],
        ),
        (
            talk("developer: Be short.", "user: Far?", "assistant: Yes."),
            ["system: Be short.", "user: Far?", "assistant*: Yes."],
        ),
        (
            talk("assistant: Welcome!", "user: Far?", "assistant: Yes."),
            ["assistant: Welcome!", "user: Far?", "assistant*: Yes."],
        ),
        (
            talk("user: Far?", "assistant: Yes.", "narrator: They left."),
            ["user: Far?", "assistant*: Yes."],
        ),
        (talk("用户: 多远?", "助手: 三公里。"), ["user: 多远?", "assistant*: 三公里。"]),
        (
            {"messages": talk("user: Far?", "assistant: Yes.")["messages"], "system": "Be short."},
            ["system: Be short.", "user: Far?", "assistant*: Yes."],
        ),
        (
            {"messages": talk("system: A.", "user: B", "assistant: C")["messages"], "system": "D"},
            ["system: A.", "user: B", "assistant*: C"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "no", "weight": 0},
                    {"role": "user", "content": "Q2"},
                    {"role": "assistant", "content": "yes", "weight": 1},
                ]
            },
            ["user: Q", "assistant: no", "user: Q2", "assistant*: yes"],
        ),
    ],
)
def test_every_turn_belongs_to_who_spoke(tmp_path, capsys, row, expected):
    found, _ = read_as(tmp_path / "a.json", row, capsys)
    assert found == expected


def thinking(content: object, **beside: object) -> dict:
    question = {"role": "user", "content": "Far?"}
    return {"messages": [question, {"role": "assistant", "content": content, **beside}]}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (thinking("3 km.", reasoning_content="Hm.\n"), "<think>\nHm.\n</think>\n\n3 km."),
        (thinking("\n3 km.", thinking="Hm."), "<think>\nHm.\n</think>\n\n3 km."),
        (thinking("3 km.", reasoning="Hm."), "<think>\nHm.\n</think>\n\n3 km."),
        (thinking("3 km.", thinking="", reasoning="Hm."), "<think>\nHm.\n</think>\n\n3 km."),
        (thinking("<think>So.</think>3 km.", thinking="Hm."), "<think>So.</think>3 km."),
        (thinking("3 km.", reasoning_content=" ", thinking=None), "3 km."),
        (thinking("3 km.", reasoning={"effort": "low"}), "3 km."),
        (thinking(" ", reasoning_content="Hm."), None),
    ],
)
def test_thoughts_kept_beside_an_answer_stand_before_it(tmp_path, capsys, row, answer):
    row["messages"][0]["reasoning_content"] = "never a user's"
    found, said = read_as(tmp_path / "a.json", row, capsys)
    if answer is None:
        assert "turn is empty" in said
        assert found is None
    else:
        assert found == ["user: Far?", f"assistant*: {answer}"]


def test_thoughts_beside_an_answer_are_written_as_the_template_writes_them():
    tokenizer = with_template("opens a thought and writes the last answer's alone")
    chat = thinking("3 km.", reasoning_content="\nHm.\n\nSo.\n")["messages"]
    row = conversations.conversation(chat, False)
    text, _ = chat_templates.text_and_spans(row["messages"], tokenizer, "all")
    assert text == tokenizer.apply_chat_template(chat, tokenize=False)
    assert "Hm." in text, "otherwise this tests nothing"


CALL = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (talk("user: Q", "user: Q")["messages"], "no turn by an assistant"),
        (talk("assistant: A")["messages"], "no turn by a user"),
        (talk("user: Q", "narrator: A")["messages"], "the role 'narrator'"),
        (talk("user: Q", "tool: 3", "assistant: A")["messages"], "the role 'tool'"),
        (
            [
                *talk("user: Q")["messages"],
                {"role": "assistant", "content": "", "tool_calls": CALL},
            ],
            "calls a tool",
        ),
        (
            [*talk("user: Q")["messages"], {"role": "assistant", "content": "A", "weight": 0}],
            "weight 0",
        ),
        ([*talk("user: Q")["messages"], {"content": "A"}], "the role 'none'"),
        ([*talk("user: Q")["messages"], {"role": "assistant", "content": None}], "turn is empty"),
        (talk("user: Q", "assistant:  ", "user: Q", "assistant: A")["messages"], "turn is empty"),
        (
            [{"role": "user", "content": None}, {"role": "assistant", "content": "A"}],
            "no turn by a user",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}, *talk("assistant: A")["messages"]],
            "other than text",
        ),
        ([{"role": "user", "content": 3}, *talk("assistant: A")["messages"]], "other than text"),
        (["Q", "A"], "the role 'none'"),
        (talk("system: \ude00", "user: Q", "assistant: A")["messages"], "half a character"),
        (talk("user: Q", "assistant: A\ud83d")["messages"], "half a character"),
        ("Q", "no turn by an assistant"),
        ("[{'role': 'user', 'content': nan}]", "a list that cannot be read"),
        (' [{"role": "user", "content": "Q"', "a list that cannot be read"),
        (
            "[{'role': 'user', 'content': 'Q'}\n {'role': 'bot', 'content': 'A'}]",
            "be read",
        ),  # numpy
        ("[1], [2]", "no turn by an assistant"),
        ([], "no turn by a user"),
        (None, "no turn by a user"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_the_reason_said(tmp_path, capsys, messages, reason):
    row, said = read_as(tmp_path / "a.json", {"messages": messages}, capsys)
    assert row is None
    assert "1 of 4 rows are left out (" in said
    assert reason in said
    assert "): rows 3" in said


def test_reasons_are_counted_each_and_are_no_more_than_a_screen(tmp_path, capsys):
    rows = [
        *WHOLE,
        *[talk("user: Q", f"speaker {'x' * i}: A") for i in range(20)],
        talk("user: Q"),
        talk("user: Q", "speaker : A"),
    ]
    data.load(settings_for(write(tmp_path / "a.json", rows)))
    said = capsys.readouterr().out
    assert "2 of 25 rows are left out (the role 'speaker'" in said
    assert "rows 3, 24" in said
    assert "13 more rows are left out for 13 other reasons" in said
    assert len(said.splitlines()) <= 10


def test_turns_that_nobody_answers_are_counted(tmp_path, capsys):
    rows = [talk("user: Q1?", "assistant: A1.", "user: Bye.", "user: Bye!"), *WHOLE]
    data.load(settings_for(write(tmp_path / "a.json", rows)))
    assert "2 turns behind a last answer are not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    "history",
    [
        [["only a question"]],
        [["Q", "A", "a third"]],
        ["QA"],
        "said before",
        "[[1, 2",
        '[["only a question"]]',
        [{"role": "user", "content": "Q"}],
        3,
    ],
)
def test_a_history_that_is_none_leaves_its_row_out(tmp_path, capsys, history):
    row = {"instruction": "Q", "output": "A", "history": history}
    whole = [{"instruction": f"Q{i}?", "output": f"A{i}."} for i in range(3)]
    found, said = read_as(tmp_path / "a.json", row, capsys, whole)
    assert found is None
    assert "its history is no list of pairs of question and answer): rows 3" in said


def test_a_shape_that_nobody_foresaw_is_refused_in_a_sentence(tmp_path):
    row = {"prompt": talk("user: Q")["messages"], "completion": 3}
    path = write(tmp_path / "a.json", [row] * 3)
    with pytest.raises(KitError, match=r"a\.json cannot be used: .*own_data"):
        data.load(settings_for(path))


def test_any_other_text_is_not_a_conversation(tmp_path):
    path = write(tmp_path / "a.json", [{"text": "Once upon a time."}] * 4)
    with pytest.raises(KitError, match=r"no column instruction and output.*text"):
        data.load(settings_for(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "### System: Be short.### Human: Far?### Assistant: Yes.",
            ["system: Be short.", "user: Far?", "assistant*: Yes."],
        ),
        (
            "### Human: Hello.### Human: Far?### Assistant: Yes.",
            ["user: Hello.\n\nFar?", "assistant*: Yes."],
        ),
        ("### User:\nFar?\n\n### Assistant:\nYes.", ["user: Far?", "assistant*: Yes."]),
        ("### Human: Far?### Assistant:", None),
        ("### Human: Far?", None),
        ("### Assistant: Hello!### Human: Far?", None),
        (None, None),
    ],
)
def test_guanaco_texts_keep_who_spoke(tmp_path, capsys, text, expected):
    others = [{"text": f"### Human: Q{i}?### Assistant: A{i}."} for i in range(3)]
    found, said = read_as(tmp_path / "a.json", {"text": text}, capsys, others)
    assert found == expected
    assert ("): rows 3" in said) == (expected is None)


def message(name, parent, role, text, rank=None, deleted=False):
    names = {"message_id": name, "parent_id": parent, "role": role, "text": text}
    return names | {"rank": rank, "deleted": deleted}


def tree(i):
    return [
        message(f"q{i}", None, "prompter", f"Q{i}?"),
        message(f"b{i}", f"q{i}", "assistant", "second best", 1.0),
        message(f"a{i}", f"q{i}", "assistant", f"A{i}.", 0.0),
    ]


TREES = [row for i in range(3) for row in tree(i)]


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (
            [
                message("b", "a", "assistant", "Yes.", 0.0),
                message("c", "b", "prompter", "Sure?"),
                message("d", "c", "assistant", "Quite."),
            ],
            ["user: Far?", "assistant*: Yes.", "user: Sure?", "assistant*: Quite."],
        ),
        (
            [
                message("b", "a", "prompter", "I mean it.", 0.0),
                message("c", "a", "assistant", "Yes.", 1.0),
            ],
            ["user: Far?", "assistant*: Yes."],
        ),
        (
            [
                message("b", "a", "assistant", "unranked"),
                message("c", "a", "assistant", "Yes.", 1.0),
            ],
            ["user: Far?", "assistant*: Yes."],
        ),
        (
            [
                message("b", "a", "assistant", "x", 0.0, True),
                message("c", "a", "assistant", "Yes.", 1.0),
            ],
            ["user: Far?", "assistant*: Yes."],
        ),
        ([message("b", "a", "prompter", "I mean it.", 0.0)], None),
        ([message("b", "a", "assistant", "x", 0.0, True)], None),
        ([], None),
    ],
)
def test_the_best_reply_in_a_tree_is_an_assistants(tmp_path, capsys, replies, expected):
    rows = [*TREES, message("a", None, "prompter", "Far?"), *replies]
    found = rows_of(tmp_path / "a.json", rows)
    assert [row for row in found if row[0] == "user: Far?"] == ([expected] if expected else [])
    assert len(found) == 3 + bool(expected)
    assert ("): rows 9" in capsys.readouterr().out) == (expected is None)


@pytest.mark.parametrize(
    "root",
    [
        message("a", None, "assistant", "Hello."),
        message("a", None, "prompter", "Q", None, True),
        message("a", "elsewhere", "prompter", "And?"),
    ],
)
def test_a_tree_begins_with_a_question_that_is_there(tmp_path, capsys, root):
    rows = [*TREES, root, message("b", "a", "assistant", "Yes.", 0.0)]
    assert len(rows_of(tmp_path / "a.json", rows)) == 3
    assert "1 of 4 rows" in capsys.readouterr().out


def test_a_tree_with_numbers_for_names(tmp_path):
    rows = []
    for n in range(4):
        rows.append(message(2 * n + 1, None, "prompter", f"Q{n}?"))
        rows.append(message(2 * n + 2, 2 * n + 1, "assistant", f"A{n}.", 0.0))
    assert rows_of(tmp_path / "a.json", rows) == [
        [f"user: Q{n}?", f"assistant*: A{n}."] for n in range(4)
    ]


# --- templates ---

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "the kit's own": None,
    "ChatML": CHATML,
    "ChatML that opens no answer": CHATML.split("{% if add", maxsplit=1)[0],
    "marks its answers": CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    ),
    "marks its answers without their end": CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}",
    ),
    "wants speakers to take turns, knows no system": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "leaves the system out": CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    ),
    "takes thoughts out of earlier answers": (
        "{% for m in messages %}{% set said = m['content'] %}"
        "{% if m['role'] == 'assistant' and not loop.last %}"
        "{% set said = said.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "ends the last answer alone with a blank thought before it": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% if loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
        "{% else %}{{ '<|im_start|>assistant\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "opens a thought and never writes one": (  # DeepSeek-R1-Distill
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' "
        "+ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
    "opens a thought and writes the last answer's alone": (  # Qwen3-Thinking-2507
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>') %}"
        "{% set thought = m['reasoning_content'] %}{% if '</think>' in m['content'] %}"
        "{% set thought = said[0].split('<think>')[-1] %}{% endif %}{% if loop.last %}"
        "{{ '<think>\n' + (thought or '').strip('\n') + '\n</think>\n\n' }}{% endif %}"
        "{{ said[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
    "no end of a turn but blank lines": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
CHAT = talk(
    "system: Answer in rhymes.",
    "user: 你好, how far?",
    "assistant: 三公里。 Not far.",
    "user: And then?",
    "assistant: Then home.",
)


def with_template(name: str):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES[name]
    chat_templates.give_template(tokenizer)
    return tokenizer


def trained_texts(row: dict, tokenizer, train_on="all") -> list[str]:
    """The stretches that train, decoded from their tokens."""
    text, spans = chat_templates.text_and_spans(row["messages"], tokenizer, train_on)
    ids, trains = chat_templates.encode(text, spans, tokenizer)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    found = data_report.pieces(ids, trains, tokenizer)
    return [text for text, is_trained in found if is_trained]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_train_with_their_ends_and_nothing_else(name):
    tokenizer = with_template(name)
    row = conversations.conversation(CHAT["messages"], False)
    end = "<|endoftext|>" if name == "the kit's own" else "<|im_end|>"
    ends = [end, end]
    if name.startswith("no end"):
        ends = ["", "\n\n<|endoftext|>"]
    answers = ["三公里。 Not far." + ends[0], "Then home." + ends[1]]
    found = trained_texts(row, tokenizer)
    if name.startswith("ends the last"):
        assert found == [answers[0], "<think>\n\n</think>\n\n" + answers[1]]
        answers = found
    if "the last answer's" in name:
        answers[1] = "</think>\n\n" + answers[1]  # the prompt has opened it
    assert [text.strip() for text in found] == answers
    assert trained_texts(row, tokenizer, "last") == found[1:]
    text, _ = chat_templates.text_and_spans(row["messages"], tokenizer, "all")
    for message in CHAT["messages"]:
        assert message["content"] in text  # the system prompt too


REWRITES = CHATML.replace(  # SmolLM3
    "{% for m in messages %}",
    "{{ '<|im_start|>system\nMode: ' + ('no' if '/no_think' in messages[0]['content'] else 'yes') }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'].replace('/no_think', '').rstrip() }}{% endif %}"
    "{% for m in messages if m['role'] != 'system' %}",
)


@pytest.mark.parametrize(
    ("turns", "questions"),
    [
        (("system: Be short. /no_think", "user: Far?", "assistant: No."), ["Far?"]),
        (("system: /no_think", "user: Far?", "assistant: No."), ["Far?"]),
        (
            ("user: Far?", "assistant: No.", "system: Rhyme.", "user: Sure?", "assistant: Yes."),
            ["Far?", "Rhyme.\n\nSure?"],
        ),
        (
            ("user: Be short?", "system: short", "user: Q", "assistant: A"),
            ["Be short?\n\nshort\n\nQ"],
        ),
    ],
)
def test_only_a_system_prompt_that_the_template_ignores_becomes_the_users(turns, questions):
    tokenizer = with_template("ChatML")
    tokenizer.chat_template = REWRITES
    row = conversations.conversation(talk(*turns)["messages"], False)
    text, _ = chat_templates.text_and_spans(row["messages"], tokenizer, "all")
    found = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]]
    assert found == questions
    rewritten = turns[0].startswith("system")
    assert text.startswith("<|im_start|>system\nMode: no") == rewritten


@pytest.mark.parametrize("name", ["marks its answers"])
def test_the_mask_is_the_tokenizers_own_where_it_has_one(name):
    tokenizer = with_template(name)
    row = conversations.conversation(CHAT["messages"], False)
    text, spans = chat_templates.text_and_spans(row["messages"], tokenizer, "all")
    own = tokenizer.apply_chat_template(
        CHAT["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trains = chat_templates.encode(text, spans, tokenizer)
    n = len(ids)  # the kit's row ends with the last answer
    assert own["input_ids"][:n] == ids
    assert [bool(mask) for mask in own["assistant_masks"]][:n] == trains
    assert not any(own["assistant_masks"][n:])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_is_asked_as_its_answer_was_trained(name):
    tokenizer = with_template(name)
    row = conversations.conversation(CHAT["messages"], False)
    text, spans = chat_templates.text_and_spans(row["messages"], tokenizer, "last")
    ids, trains = chat_templates.encode(text, spans, tokenizer)
    prompt = data.prompt_ids(row, tokenizer, "alpaca")
    if name.startswith("no end"):
        prompt.pop()  # the blank at its end belongs to the answer's first token
    if name == "opens a thought and never writes one":
        opened = tokenizer.decode(prompt)
        assert opened.endswith("<|im_start|>assistant\n<think>\n")
        prompt = tokenizer.encode(opened.removesuffix("<think>\n"), add_special_tokens=False)
    if name == "ChatML that opens no answer":
        prompt = tokenizer.encode(
            tokenizer.decode(prompt) + "<|im_start|>assistant\n", add_special_tokens=False
        )
    assert ids[: len(prompt)] == prompt
    assert trains.index(True) == len(prompt)
    answer = conversations.conversation(CHAT["messages"][:4], asking=True)
    assert data.prompt_ids(answer, tokenizer, "chat") == data.prompt_ids(row, tokenizer, "chat")


@pytest.mark.parametrize("name", ["the kit's own", "ChatML"])
def test_a_tokenizer_that_begins_every_text_adds_nothing_to_what_the_template_wrote(name):
    """As Llama's does: the template says whether a conversation begins with that token."""
    tokenizer = with_template(name)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATES[name]
    chat_templates.give_template(tokenizer)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "otherwise this tests nothing"
    row = conversations.conversation(CHAT["messages"], False)
    text, spans = chat_templates.text_and_spans(row["messages"], tokenizer, "all")
    ids, trains = chat_templates.encode(text, spans, tokenizer)
    assert tokenizer.decode(ids) == text
    assert len(trains) == len(ids)
    prompt = data.prompt_ids(row, tokenizer, "chat")
    assert ids[: len(prompt)] == prompt


def test_an_exchange_in_the_kits_own_template_is_alpacas_short_prompt(tokenizer):
    row = {"instruction": "Where is Anna?", "input": "", "output": "At the park."}
    chat = conversations.of_instruction(row)
    text, spans = chat_templates.text_and_spans(chat["messages"], tokenizer, "all")
    ids, trains = chat_templates.encode(text, spans, tokenizer)
    one = data.datasets.Dataset.from_list([row])
    [plain] = data.tokenize_rows(one, tokenizer, validate({"prompt_template": "alpaca_short"}))
    assert ids == plain["input_ids"]
    assert [i if train else -100 for i, train in zip(ids, trains)] == plain["labels"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Nobody may speak') }}", "refuses it: Nobody may speak"),
        ("{{ messages[0]['content'] + 3 }}", "refuses it"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "what the user says"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "answer"),
    ],
)
def test_a_chat_that_the_template_cannot_write_is_left_out_by_reason(
    tokenizer, tmp_path, capsys, template, reason
):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template
    settings = settings_for(write(tmp_path / "a.json", WHOLE))
    with pytest.raises(KitError, match=reason):
        data_report.check(settings, tokenizer)
    assert chat_templates.turn_end(tokenizer) is None


def test_max_length_is_named_where_it_is_the_reason_and_nowhere_else(tokenizer, tmp_path):
    path = write(tmp_path / "a.json", WHOLE)
    with pytest.raises(KitError, match="no row is left: the prompt is longer") as caught:
        data_report.check(settings_for(path, max_length=8), tokenizer)
    assert (caught.value.value, caught.value.remedy) == ("max_length=8", "raise max_length")
    refusing = deepcopy(tokenizer)
    refusing.chat_template = "{{ raise_exception('Nobody may speak') }}"
    with pytest.raises(KitError, match=r"no row is left: .*Nobody may speak") as caught:
        data_report.check(settings_for(path), refusing)
    assert (caught.value.value, caught.value.remedy) == (str(path), "look at the data")


@pytest.mark.parametrize("max_length", [40, 47, 60])
def test_a_long_chat_is_cut_and_ends_where_an_answer_is_cut(tokenizer, max_length):
    row = conversations.conversation(CHAT["messages"], False)
    rows = data.datasets.Dataset.from_list([row])
    settings = validate({"max_length": max_length})
    [whole] = data.encode_rows(rows, tokenizer, validate({}))
    [cut] = data.encode_rows(rows, tokenizer, settings)
    assert len(cut["input_ids"]) == max_length
    assert cut["n_lost"] == len(whole["input_ids"]) - max_length
    assert cut["input_ids"][:-1] == whole["input_ids"][: max_length - 1]
    if whole["labels"][max_length - 1] != -100:
        assert cut["labels"][-1] == tokenizer.eos_token_id


# --- the report ---


def test_the_report_counts_what_pandas_counts(tmp_path, tokenizer):
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(10)]
    rows += [rows[0]] * 2 + [{"instruction": "Say.", "output": ""}]
    rows += [{"instruction": "Say more.", "output": "so " * 300}]
    rows += [{"instruction": "Say less.", "output": "a<|endoftext|>b"}]
    settings = settings_for(write(tmp_path / "a.json", rows), max_length=60, eval_rows=3)
    report = data_report.check(settings, tokenizer)
    counts = report.counts
    assert counts["rows read"] == 15
    assert counts["rows left out"] == 1
    assert counts["duplicate rows"] == 2
    assert counts["rows held out"] == 3
    assert counts["rows to train on"] == 11
    train = list(report.split.train)
    trained = [(row["instruction"], row["output"]) for row in train]
    held = [(row["instruction"], row["output"]) for row in report.split.held_out]
    assert counts["held-out rows also trained"] == sum(row in trained for row in held)
    lengths = []
    for row in train:
        prompt = tokenizer(data.prompt_of(row, settings.prompt_template))["input_ids"]
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        lengths.append((len(prompt), len(answer) + 1))
    assert counts["tokens of the longest row"] == min(60, max(sum(n) for n in lengths))
    assert counts["tokens lost by that"] == sum(max(0, sum(n) - 60) for n in lengths)
    assert counts["rows cut to max_length"] == sum(sum(n) > 60 for n in lengths)
    assert counts["tokens that train"] == sum(min(b, 60 - a) for a, b in lengths)
    special = sum("<|endoftext|>" in row["output"] for row in train)
    assert counts["rows with a special token in text"] == special
    assert "1 of 15 rows are left out (no output): rows 12" in str(report)


def test_the_first_row_is_shown_as_the_model_sees_it(tmp_path, tokenizer):
    chat = talk("user: 你好 <b>&</b>\x1b[31m?", "assistant: 很<i>好</i>。")
    report = data_report.check(settings_for(write(tmp_path / "a.json", [chat] * 3)), tokenizer)
    assert [trains for _, trains in report.first_row] == [False, True]
    assert report.first_row[1][0] == "很<i>好</i>。<|endoftext|>"
    page = report._repr_html_()
    assert "很&lt;i&gt;好&lt;/i&gt;。" in page
    assert "<b>" not in page
    assert "\x1b" not in str(report)
    assert "⟦很<i>好</i>。<|endoftext|>⟧" in str(report)
    assert report.settings.prompt_template == "chat"


def test_the_command_says_the_same_and_loads_no_weights(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    def never(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    path = write(tmp_path / "a.json", [*WHOLE, talk("user: Q", "narrator: A")] * 20)
    done = CliRunner().invoke(cli.app, ["data", str(path), "-p", "eval_rows", "5"])
    assert done.exit_code == 0, done.output
    assert "20 of 80 rows are left out (the role 'narrator'" in done.output
    assert "rows to train on" in done.output
    assert "⟦" in done.output
    few = write(tmp_path / "b.json", [talk("user: Q", "narrator: A")] * 3)
    done = CliRunner().invoke(cli.app, ["data", str(few)])
    assert done.exit_code == 2
    assert "3 of 3 rows are left out (the role 'narrator'" in done.output


# --- asking ---


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        (talk("user: Far?"), ["user: Far?"]),
        (talk("system: Be short.", "user: Far?"), ["system: Be short.", "user: Far?"]),
        (
            talk("user: Far?", "assistant: Yes.", "user: How far?"),
            ["user: Far?", "assistant: Yes.", "user: How far?"],
        ),
        (talk("user: Far?", "assistant: Yes."), ["user: Far?"]),
        ({"prompt": talk("user: Far?")["messages"]}, ["user: Far?"]),
        ({"text": "### Human: Far?### Assistant:"}, ["user: Far?"]),
        ({"text": "### Human: Far?"}, ["user: Far?"]),
        (message("a", None, "prompter", "Far?"), ["user: Far?"]),
        (
            {"prompt": "Far?", "input": "It is near.", "system": "Be short."},
            ["system: Be short.", "user: Far?\n\nIt is near."],
        ),
    ],
)
def test_a_conversation_without_an_answer_is_asked(tmp_path, row, asked):
    [found] = prompt_files.read_rows(str(write(tmp_path / "a.json", [row])), {})
    turns = [f"{m['role']}: {m['content']}" for m in found["messages"]]
    assert turns == asked


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Far?"},
        {"instruction": "Far?", "input": None, "output": None},
        {"instruction": "Far?", "output": 3},
    ],
)
def test_a_row_without_an_answer_is_asked(tmp_path, row):
    path = str(write(tmp_path / "a.json", [row]))
    assert prompt_files.read_rows(path, {}) == [{"instruction": "Far?", "input": ""}]
    [chat] = prompt_files.read_rows(path, {}, "chat")
    assert [m["content"] for m in chat["messages"]] == ["Far?"]


def test_rows_that_cannot_be_asked_are_named_and_the_others_are_asked(tmp_path, capsys):
    path = write(tmp_path / "a.json", [{"prompt": " "}, {"prompt": "Far?"}, {"prompt": None}])
    assert prompt_files.read_rows(str(path), {}) == [{"instruction": "Far?", "input": ""}]
    assert "2 of 3 rows are left out (no instruction): rows 0, 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [{"prompt": None}, {"instruction": "", "output": "A"}, talk("assistant: A"), talk("x: A")],
)
def test_a_file_without_a_single_question_is_refused(tmp_path, row):
    path = write(tmp_path / "a.json", [row] * 2)
    with pytest.raises(KitError, match="no row of it can be asked"):
        prompt_files.read_rows(str(path), {})
    command = ["generate", "--prompts", str(path), "-p", "adapter", "pocket"]
    assert CliRunner().invoke(cli.app, command).exit_code == 2


def test_chat_prompts_are_answered_in_the_chat_template(tmp_path):
    """Against transformers' own chat template and greedy generate."""
    import torch

    chats = [talk("user: Where is Anna?"), talk("system: Be short.", "user: What did Ben find?")]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    out = tmp_path / "answers.jsonl"
    command = ["generate", "--prompts", str(path), "--out", str(out), "-p", "adapter", "pocket"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "2 of 2 answered" in done.output
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    settings = validate({})
    model = adapters.load_adapter(load.load_base(settings), adapters.ADAPTER_DIR)
    tokenizer = load.load_tokenizer(settings)
    for chat, answer in zip(chats, sorted(answers, key=lambda one: one["n"]), strict=True):
        ids = tokenizer.apply_chat_template(
            chat["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=0,
        )[0, ids.shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answer["answer"]


def test_an_adapter_is_asked_in_the_form_that_it_was_trained_in(tmp_path, capsys):
    settings = validate({})
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    assert adapters.asked_as_trained(settings, folder) == settings
    for template, asked in (("chat", "chat"), ("nonsense", settings.prompt_template)):
        manifest = {"parameters": {"prompt_template": template}, "pid": 1}
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
        assert adapters.asked_as_trained(settings, folder).prompt_template == asked
    assert "trained with prompt_template=chat" in capsys.readouterr().out
    for given, taken in (({}, "mine"), ({"model_id": "smollm2"}, "smollm2")):
        manifest = {"parameters": {"model_id": "mine"}, "pid": 1}
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
        assert adapters.asked_as_trained(validate(given), folder).model_id == taken
    assert capsys.readouterr().out.count("trained on model_id=mine, which is taken") == 1
    row = generate.row_of("Where is Anna?\nShe left.", "chat")
    assert [m["content"] for m in row["messages"]] == ["Where is Anna?\nShe left."]
