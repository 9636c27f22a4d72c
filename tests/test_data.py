"""Data: what trains in a row, what is held out, and what is refused."""

import gzip
import json
import types
from copy import deepcopy

import micro_world
import pytest
import torch

from qlora_nb import pocket
from qlora_nb.answer import evaluate, generate, prompt_files
from qlora_nb.errors import KitError
from qlora_nb.model import batching, chunked_loss, data, load
from qlora_nb.settings import validate


@pytest.fixture(scope="module")
def tokenizer():
    return load.load_tokenizer(validate({}))


def settings_for(path, **values):
    return validate({"dataset": str(path), "eval_rows": 2, "train_rows": 10, **values})


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(8)]


def test_only_answer_and_end_token_train(tokenizer):
    settings = validate({"train_rows": 5})
    rows = data.load(settings)[0]
    for row, encoded in zip(rows, data.tokenize_rows(rows, tokenizer, settings), strict=True):
        trained = [
            i
            for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True)
            if label != chunked_loss.IGNORED
        ]
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(trained[:-1]) == row["output"]
        assert all(
            label in (chunked_loss.IGNORED, i)
            for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True)
        )
        assert tokenizer.decode(encoded["input_ids"][: -len(trained)]) == data.prompt_of(
            row, settings.prompt_template
        )


def test_padding_never_trains_and_is_not_the_end_token(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    encoded = data.tokenize_rows(
        data.load(validate({"train_rows": 20}))[0], tokenizer, validate({})
    )
    batch = batching.collator(tokenizer)([encoded[i] for i in range(20)])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == chunked_loss.IGNORED).all()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()


def padded_by_hand(rows, tokenizer):
    """The batch that the collator must make, by plain loops."""
    n = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    if "position_ids" in rows[0]:
        fill["position_ids"] = 0
    else:
        fill["attention_mask"] = 0
        rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (n - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["pads on the right", "pads on the left", "wants no mask"])
def test_the_collator_pads_on_the_right_whatever_the_tokenizer_does(tokenizer, packed, kind):
    own = deepcopy(tokenizer)
    own.padding_side = "left" if kind == "pads on the left" else "right"
    if kind == "wants no mask":
        own.model_input_names = ["input_ids"]
    rows = encoded_rows([7, 3, 9, 4, 12])
    if packed:
        rows = batching.pack(rows, 16)
    rows = list(rows)
    batch = batching.collator(own)(rows)
    wanted = padded_by_hand(rows, own)
    assert batch.keys() == wanted.keys()
    for name, values in wanted.items():
        assert batch[name].dtype == values.dtype
        assert torch.equal(batch[name], values), name
    assert (own.padding_side == "left") == (kind == "pads on the left"), "it is left as it was"


@pytest.mark.fault(27)
def test_a_long_answer_keeps_its_end_token(tokenizer, capsys):
    rows = data.datasets.Dataset.from_list(
        [{"instruction": "Tell.", "input": "", "output": "Anna went home. " * 40}]
    )
    encoded = data.tokenize_rows(rows, tokenizer, validate({"max_length": 80}))[0]
    assert len(encoded["input_ids"]) == 80
    assert encoded["labels"][-1] == tokenizer.eos_token_id
    assert "1 of 1 rows cut to max_length, " in capsys.readouterr().out


def test_no_row_left_is_refused(tokenizer):
    rows = data.datasets.Dataset.from_list(ROWS)
    with pytest.raises(KitError, match="raise max_length"):
        data.tokenize_rows(rows, tokenizer, validate({"max_length": 10}))


def test_local_file_splits_the_same_way_for_every_seed(tmp_path):
    path = write(tmp_path / "rows.json", ROWS)
    splits = [data.load(settings_for(path, seed=seed)) for seed in (0, 1)]
    held = [{r["instruction"] for r in test} for _, test in splits]
    assert held[0] == held[1]
    for train, _ in splits:
        assert not held[0] & {r["instruction"] for r in train}
        assert len(train) == 6


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_other_formats(tmp_path, suffix):
    path, rows = tmp_path / f"rows{suffix}", data.datasets.Dataset.from_list(ROWS)
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](str(path))
    train, test = data.load(settings_for(path))
    assert {r["output"] for r in [*train, *test]} == {r["output"] for r in ROWS}


@pytest.mark.fault(26)
def test_rows_without_an_answer_are_named_and_left_out(tmp_path, capsys):
    path = write(tmp_path / "rows.json", [*ROWS, {"instruction": "x", "input": "", "output": "  "}])
    train, test = data.load(settings_for(path))
    assert len(train) + len(test) == len(ROWS)
    assert "1 of 9 rows are left out (no output): rows 8" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_half_a_character_is_left_out(tmp_path, capsys, column, template):
    path = write(tmp_path / "a.json", [*ROWS, {**ROWS[0], column: "so \ud83d"}, ROWS[1]])
    train, test = data.load(settings_for(path, prompt_template=template))
    assert len(train) + len(test) == len(ROWS) + 1
    said = "1 of 10 rows are left out (half a character, a surrogate alone): rows 8"
    assert said in capsys.readouterr().out


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}] * 5, "no column instruction and output"),
        ([{"instruction": "a", "input": "", "output": 3}] * 5, "column output is not text"),
        (ROWS[:2], "too few"),
    ],
)
def test_unusable_rows_are_refused(tmp_path, rows, message):
    with pytest.raises(KitError, match=message):
        data.load(settings_for(write(tmp_path / "rows.json", rows)))


@pytest.mark.fault(26)
def test_what_a_csv_file_says_stays_as_it_is(tmp_path):
    said = ["007", "1.70", "NA", "1e3", "True", "", "2024-01-01", "-0"]
    path = tmp_path / "rows.CSV"
    path.write_text(
        "instruction,input,output\n"
        + "".join(f"Say {n}.,{text},{text or '-'}\n" for n, text in enumerate(said))
    )
    rows = [row for split in data.load(settings_for(path)) for row in split]
    assert sorted(row["output"] for row in rows) == sorted(text or "-" for text in said)
    assert sorted(row["input"] for row in rows) == sorted(said)


def test_a_csv_file_with_the_index_that_pandas_writes(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text(",instruction,output\n" + "".join(f"{n},Say {n}.,{n}\n" for n in range(9)))
    rows = first_rows(path)
    assert [row["output"] for row in rows] == [str(n) for n in range(9)]
    assert "columns that are not used: 'column 1'" in capsys.readouterr().out


@pytest.mark.parametrize("n", [0, 1])
def test_no_remedy_is_named_that_does_not_help(tmp_path, n):
    with pytest.raises(KitError, match="too few") as refused:
        data.load(
            settings_for(
                write(tmp_path / "rows.json", [*ROWS[:n], {"instruction": "x", "output": ""}])
            )
        )
    assert refused.value.remedy == "bring more rows"


def test_one_column_for_two_is_refused(tmp_path):
    path = write(tmp_path / "rows.json", [{"q": "a"}] * 9)
    settings = settings_for(path).replace(columns={"instruction": "q", "output": "q"})
    with pytest.raises(KitError, match="one column of the data twice"):
        data.load(settings)


def test_broken_and_unknown_files_are_refused(tmp_path):
    broken = tmp_path / "rows.json"
    broken.write_text('[{"instruction": "a", ')
    with pytest.raises(KitError, match="cannot be read"):
        data.load(settings_for(broken))
    other = tmp_path / "rows.txt"
    other.write_text("a")
    with pytest.raises(KitError, match=r"cannot be read: its ending .*\.json"):
        data.load(settings_for(other))


def test_no_held_out_pair_occurs_in_any_training_text():
    pairs = {
        (p, n)
        for p in micro_world.PEOPLE
        for n in [*micro_world.PLACES, *micro_world.OBJECTS, *micro_world.THINGS]
        if micro_world.held_out(p, n)
    }
    assert len(pairs) > 50
    asked = {(r["instruction"], r["input"]) for r in pocket.read("test")}
    train = pocket.read("train")
    assert not asked & {(r["instruction"], r["input"]) for r in train}
    sentences = [s for r in train for s in r["input"].split(". ")]
    sentences += [
        s
        for d in micro_world.documents(3, 2000, almanac_share=0)
        for s in d.split('"')[0].split(". ")
    ]
    for sentence in sentences:
        words = sentence.rstrip(".").split()
        person = next((w for w in words if w in micro_world.PEOPLE), None)
        assert not any((person, w) in pairs for w in words), sentence


def test_every_held_out_row_asks_about_a_held_out_pair():
    nouns = {*micro_world.PLACES, *micro_world.OBJECTS, *micro_world.THINGS}
    for row in pocket.read("test")[:240]:
        words = [s.rstrip(".").split() for s in row["input"].split(". ")]
        asked = [
            " ".join(w)
            for w in words
            if any(n in nouns and micro_world.held_out(w[0], n) for n in w)
            and w[0] in micro_world.PEOPLE
        ]
        assert len(asked) == 1, row
        assert row["output"].rstrip(".").lower().split()[-1] in asked[0].lower(), row


def test_the_kinds_take_turns():
    rows = pocket.read("test")[:240]
    assert {k: sum(r["kind"] == k for r in rows) for k in micro_world.KINDS} == dict.fromkeys(
        micro_world.KINDS, 40
    )


def test_the_shipped_data_is_what_the_micro_world_makes(tmp_path):
    import build_pocket

    build_pocket.build_data(tmp_path)
    for path in tmp_path.iterdir():
        made, shipped = (
            gzip.decompress((folder / path.name).read_bytes())
            for folder in (tmp_path, pocket.DATA_DIR)
        )
        assert made == shipped, path.name
    assert len(pocket.read("train")) == 12_480
    assert len(pocket.read("almanac")) == 720


def test_another_seed_takes_other_rows_and_the_held_out_ones_stay():
    first, again, other = (
        data.load(validate({"seed": seed, "train_rows": 50})) for seed in (0, 0, 1)
    )
    assert first[0]["input"] == again[0]["input"] != other[0]["input"]
    assert first[1]["input"] == other[1]["input"]


# --- other people's columns ---


def first_rows(path, **values):
    train, held_out = data.load(settings_for(path, **values))
    rows = sorted([*train, *held_out], key=lambda row: row["instruction"])
    return [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]


def test_a_mapping_takes_the_columns_it_names(tmp_path):
    rows = [
        {"question": f"Q{i}?", "answer": f"A{i}.", "context": f"C{i}", "instruction": "no", "n": i}
        for i in range(4)
    ]
    path = write(tmp_path / "a.json", rows)
    got = first_rows(path, columns="instruction=question, output=answer, input=context")
    assert got == [
        {"instruction": f"Q{i}?", "input": f"C{i}", "output": f"A{i}."} for i in range(4)
    ]
    assert sorted(row["output"] for row in first_rows(path, columns={"output": "answer"})) == [
        "A0.",
        "A1.",
        "A2.",
        "A3.",
    ]


@pytest.mark.parametrize("columns", ["instruction=questoin,output=answer", {"output": "nowhere"}])
def test_a_column_that_is_not_there_is_named(tmp_path, columns):
    path = write(tmp_path / "a.json", [{"question": "Q", "answer": "A"}] * 4)
    with pytest.raises(data.KitError, match=r"does not have.*(questoin|nowhere).*question, answer"):
        data.load(settings_for(path, columns=columns))


def test_a_mapping_of_an_unknown_column_is_refused_by_the_schema():
    with pytest.raises(data.KitError, match="columns"):
        validate({"columns": "prompt=question"})


def test_columns_that_are_not_used_are_named(tmp_path, capsys):
    rows = [row | {"source": "web", "id": 3} for row in ROWS]
    data.load(settings_for(write(tmp_path / "a.json", rows)))
    assert "columns that are not used: 'id', 'source'" in capsys.readouterr().out


# --- values that are not there ---


def nothing_in_json(path, nothing):
    lines = [json.dumps({"instruction": f"Say {i}.", "output": f"It is {i}."}) for i in range(8)]
    if nothing != "missing":
        lines[:4] = [line[:-1] + f', "input": {nothing}}}' for line in lines[:4]]
    path.write_text("\n".join([*lines, json.dumps(ROWS[0] | {"input": "So."})]))


def nothing_in_parquet(path, value):
    import pandas

    pandas.DataFrame([row | {"input": value} for row in ROWS]).to_parquet(path)


@pytest.mark.parametrize("nothing", ["missing", "null", "NaN", "all null", "all NaN"])
def test_nothing_in_an_optional_column_is_the_empty_text(tmp_path, tokenizer, nothing):
    path = tmp_path / ("a.parquet" if nothing.startswith("all") else "a.jsonl")
    if nothing.startswith("all"):
        nothing_in_parquet(path, None if nothing == "all null" else float("nan"))
    else:
        nothing_in_json(path, nothing)
    settings = settings_for(path)
    train, held_out = data.load(settings)
    for row in [*train, *held_out]:
        assert row["input"] in ("", "So.")
    evaluate.exact_match(evaluate.copy_baseline(list(train), list(held_out)), list(held_out))
    assert len(data.tokenize_rows(train, tokenizer, settings)) == len(train)
    assert {row["input"] for row in prompt_files.read_rows(str(path), {})} <= {"", "So."}


def test_an_answer_that_is_nothing_is_left_out_of_any_type(tmp_path):
    import pandas

    path = tmp_path / "a.parquet"
    pandas.DataFrame([row | {"output": float("nan")} for row in ROWS]).to_parquet(path)
    with pytest.raises(KitError, match=r"too few.*8 of 8 rows are left out \(no output\)"):
        data.load(settings_for(path))


# --- what is counted and said ---


def test_the_same_row_in_both_halves_is_counted(tmp_path, capsys):
    data.load(settings_for(write(tmp_path / "same.json", [ROWS[0]] * 12)))
    assert "2 of 2 held-out rows are training rows too" in capsys.readouterr().out
    data.load(settings_for(write(tmp_path / "other.json", ROWS)))
    assert "training rows too" not in capsys.readouterr().out


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
@pytest.mark.parametrize("begins", [False, True])
def test_a_special_token_in_the_text_is_counted(tokenizer, capsys, column, begins):
    """Also with a tokenizer that begins every prompt with a special token of its own."""
    from tokenizers.processors import TemplateProcessing

    if begins:
        tokenizer, end = deepcopy(tokenizer), tokenizer.eos_token
        beginning = TemplateProcessing(
            single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
        )
        tokenizer.backend_tokenizer.post_processor = beginning
        assert tokenizer("a")["input_ids"][0] == tokenizer.eos_token_id
    rows = [*ROWS, ROWS[0] | {column: f"It is{tokenizer.pad_token}so."}]
    data.tokenize_rows(data.datasets.Dataset.from_list(rows), tokenizer, validate({}))
    assert (
        f"1 of 9 rows write a special token in their text, as '{tokenizer.pad_token}'"
        in capsys.readouterr().out
    )
    data.tokenize_rows(data.datasets.Dataset.from_list(ROWS), tokenizer, validate({}))
    assert "special token" not in capsys.readouterr().out


# --- the order in which rows are trained ---


def encoded_rows(lengths, prompt=2):
    rows = [
        {
            "input_ids": [10 + i] * n,
            "labels": [chunked_loss.IGNORED] * prompt + [10 + i] * (n - prompt),
            "row": i,
        }
        for i, n in enumerate(lengths)
    ]
    return data.datasets.Dataset.from_list(rows)


LENGTHS = [5 + (37 * i) % 60 for i in range(100)]


@pytest.mark.parametrize(
    ("batch", "accumulation", "steps"), [(4, 1, 25), (2, 2, 60), (16, 1, 13), (3, 1, 7)]
)
def test_every_row_comes_once_in_each_pass_over_the_data(batch, accumulation, steps):
    sizes = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
    }
    rows = batching.in_training_order(encoded_rows(LENGTHS), validate(sizes))
    seen = [ids[0] for ids in rows["input_ids"]]
    assert len(seen) == batch * accumulation * steps
    for start in range(0, len(seen) - 99, 100):
        assert sorted(seen[start : start + 100]) == list(range(10, 110))


def test_order_and_packs_are_those_of_version_0_1():
    """Recorded then: a run begun with that version is resumed on the same rows."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 30}
    rows = batching.in_training_order(encoded_rows(LENGTHS), validate(sizes))
    first = [ids[0] - 10 for ids in rows["input_ids"]][:16]
    assert first == [75, 15, 88, 67, 3, 76, 89, 42, 31, 44, 57, 70, 60, 0, 73, 26]
    packs = batching.pack(encoded_rows(LENGTHS), 128)
    held = [sorted({i - 10 for i in ids}) for ids in packs["input_ids"]]
    assert len(held) == 28
    assert held[:4] == [[0, 1, 2, 3, 13], [4, 5, 6, 7, 18], [8, 9, 10, 26, 60], [11, 12, 14]]


def test_order_follows_from_the_seed_and_the_rows_in_a_step_alone():
    def order(**values):
        return batching.in_training_order(
            encoded_rows(LENGTHS), validate({"max_steps": 30, **values})
        )["input_ids"][:]

    four_by_one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    one_by_four = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert order(**four_by_one) == order(**four_by_one) == order(**one_by_four)
    assert order(**four_by_one) != order(**four_by_one, seed=1)


def test_hardly_any_padding_is_left_on_the_kits_own_rows(tokenizer):
    settings = validate({})
    encoded = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)

    def padding(rows):
        lengths = [len(ids) for ids in rows["input_ids"]]
        padded = sum(16 * max(lengths[i : i + 16]) for i in range(0, len(lengths), 16))
        return 1 - sum(lengths) / padded

    assert padding(encoded) > 0.10
    assert padding(batching.in_training_order(encoded, settings)) < 0.03


# --- packing ---


def test_packs_hold_every_row_whole_and_once():
    packs = batching.pack(encoded_rows(LENGTHS), 128)
    assert max(map(len, packs["input_ids"])) <= 128
    assert sum(map(len, packs["input_ids"])) > 0.9 * 128 * (len(packs) - 1)  # nearly full
    found = []
    for pack in packs:
        starts = [i for i, position in enumerate(pack["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(pack["input_ids"])], strict=True):
            ids, labels = pack["input_ids"][start:end], pack["labels"][start:end]
            assert pack["position_ids"][start:end] == list(range(end - start))
            assert labels == [chunked_loss.IGNORED] * 2 + ids[2:]
            found.append((ids[0] - 10, len(ids)))
    assert sorted(found) == list(enumerate(LENGTHS))


@pytest.mark.parametrize("packs_in_a_batch", [1, 3])
def test_a_packed_row_is_computed_as_if_it_were_alone(tokenizer, packs_in_a_batch):
    """Hidden states and loss of every row against the same row in a batch of its own."""
    import torch

    from qlora_nb.model import chunked_loss, load

    settings = validate({"train_rows": 24})
    model = load.load_base(settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    packs, collate = batching.pack(rows, 192), batching.collator(tokenizer)
    assert len(packs) < len(rows) / 2
    totals = {}
    with torch.no_grad(), chunked_loss.chunked_head(model, 64) as loss:
        for name, them, n in (("alone", rows, 1), ("packed", packs, packs_in_a_batch)):
            totals[name] = 0.0
            for start in range(0, len(them), n):
                batch = collate([them[i] for i in range(start, min(start + n, len(them)))])
                assert ("attention_mask" in batch) == (name == "alone")
                labels = batch.pop("labels")
                totals[name] += loss(model(**batch, use_cache=False), labels, 1).item()
    assert totals["packed"] == pytest.approx(totals["alone"], rel=1e-5)


# --- what a stranger's review found ---


def test_an_end_token_behind_every_text_does_not_stand_before_the_answer():
    """As with add_eos_token=true: the end token is the answer's, a prompt that is to go on has
    none.
    """
    from tokenizers.processors import TemplateProcessing

    settings = settings_for("pocket")
    plain, ending = load.load_tokenizer(settings), load.load_tokenizer(settings)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert ending("Anna")["input_ids"][-1] == ending.eos_token_id, "otherwise this tests nothing"
    rows = data.load(settings)[1].take(4)
    assert (
        data.tokenize_rows(rows, ending, settings)[:]
        == data.tokenize_rows(rows, plain, settings)[:]
    )
    prompts = list(rows)
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(max_position_embeddings=512, vocab_size=50_304),
        device="cpu",
    )
    with_end, without = (
        generate.tokenize_prompts(prompts, tokenizer, model, settings)
        for tokenizer in (ending, plain)
    )
    assert all(
        torch.equal(with_end[name], without[name]) for name in ("input_ids", "attention_mask")
    )
