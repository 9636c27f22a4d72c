"""Data: what trains in a row, what is held out, and what is refused."""

import gzip
import json

import micro_world
import pytest

from qlora_nb import pocket
from qlora_nb.engine import data, models
from qlora_nb.engine.profiles import validate
from qlora_nb.errors import KitError


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(validate({}))


def settings_for(path, **values):
    return validate({"dataset": str(path), "eval_rows": 2, "train_rows": 10, **values})


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(8)]


def test_only_answer_and_end_token_train(tokenizer):
    settings = validate({"train_rows": 5})
    rows = data.load(settings)[0]
    for row, encoded in zip(rows, data.encode(rows, tokenizer, settings), strict=True):
        trained = [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != data.IGNORED]
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(trained[:-1]) == row["output"]
        assert all(label in (data.IGNORED, i) for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True))
        assert tokenizer.decode(encoded["input_ids"][: -len(trained)]) == data.prompt_of(row, settings.prompt_template)


def test_padding_never_trains_and_is_not_the_end_token(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    encoded = data.encode(data.load(validate({"train_rows": 20}))[0], tokenizer, validate({}))
    batch = data.collator(tokenizer)([encoded[i] for i in range(20)])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == data.IGNORED).all()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()


def test_a_long_answer_keeps_its_end_token(tokenizer, capsys):
    rows = data.datasets.Dataset.from_list([{"instruction": "Tell.", "input": "", "output": "Anna went home. " * 40}])
    encoded = data.encode(rows, tokenizer, validate({"max_length": 80}))[0]
    assert len(encoded["input_ids"]) == 80
    assert encoded["labels"][-1] == tokenizer.eos_token_id
    assert "1 of 1 answers cut to max_length=80" in capsys.readouterr().out


def test_no_row_left_is_refused(tokenizer):
    rows = data.datasets.Dataset.from_list(ROWS)
    with pytest.raises(KitError, match="raise max_length"):
        data.encode(rows, tokenizer, validate({"max_length": 10}))


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


def test_rows_without_an_answer_are_named_and_left_out(tmp_path, capsys):
    path = write(tmp_path / "rows.json", [*ROWS, {"instruction": "x", "input": "", "output": "  "}])
    train, test = data.load(settings_for(path))
    assert len(train) + len(test) == len(ROWS)
    assert "1 of 9 rows have no instruction or no answer and are left out: rows 8" in capsys.readouterr().out


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


def test_broken_and_unknown_files_are_refused(tmp_path):
    broken = tmp_path / "rows.json"
    broken.write_text('[{"instruction": "a", ')
    with pytest.raises(KitError, match="cannot be read"):
        data.load(settings_for(broken))
    other = tmp_path / "rows.txt"
    other.write_text("a")
    with pytest.raises(KitError, match="unknown kind of data file"):
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
    sentences += [s for d in micro_world.documents(3, 2000, almanac_share=0) for s in d.split('"')[0].split(". ")]
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
            if any(n in nouns and micro_world.held_out(w[0], n) for n in w) and w[0] in micro_world.PEOPLE
        ]
        assert len(asked) == 1, row
        assert row["output"].rstrip(".").lower().split()[-1] in asked[0].lower(), row


def test_the_kinds_take_turns():
    rows = pocket.read("test")[:240]
    assert {k: sum(r["kind"] == k for r in rows) for k in micro_world.KINDS} == dict.fromkeys(micro_world.KINDS, 40)


def test_the_shipped_data_is_what_the_micro_world_makes(tmp_path):
    import build_pocket

    build_pocket.build_data(tmp_path)
    for path in tmp_path.iterdir():
        made, shipped = (gzip.decompress((folder / path.name).read_bytes()) for folder in (tmp_path, pocket.DATA_DIR))
        assert made == shipped, path.name
    assert len(pocket.read("train")) == 12_480
    assert len(pocket.read("almanac")) == 720


def test_another_seed_takes_other_rows_and_the_held_out_ones_stay():
    first, again, other = (data.load(validate({"seed": seed, "train_rows": 50})) for seed in (0, 0, 1))
    assert first[0]["input"] == again[0]["input"] != other[0]["input"]
    assert first[1]["input"] == other[1]["input"]
