"""The shipped model and adapter: what they are, what they know, and what 4 bit costs them."""

import json
import re

import build_pocket as build
import micro_world
import pytest
from safetensors import safe_open

from qlora_nb.answer import adapters, evaluate, generate
from qlora_nb.model import chunked_loss, configs, data, load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.settings import validate


@pytest.fixture(scope="module")
def settings():
    return validate({"adapter": "pocket"})


@pytest.fixture(scope="module")
def tokenizer(settings):
    return load.load_tokenizer(settings)


@pytest.fixture(scope="module")
def tuned(settings):
    return adapters.load_adapter(load.load_base(settings), ADAPTER_DIR)


def test_files_are_small_safe_and_name_no_machine():
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 12_000_000
    assert (ADAPTER_DIR / "adapter_model.safetensors").stat().st_size <= 1_000_000
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(k).dtype) for k in sorted(file.keys())} == {"torch.float16"}
    for folder in (MODEL_DIR, ADAPTER_DIR):
        for path in folder.iterdir():
            assert path.suffix in {".json", ".safetensors"}
            if path.suffix == ".json":
                assert not re.search(r'"/(home|root|work|tmp|Users)', path.read_text())


def test_it_is_a_pythia_in_small():
    config = configs.config_of("pocket")
    twin = configs.pythia_config("70m")
    for name in (
        "model_type",
        "use_parallel_residual",
        "hidden_act",
        "tie_word_embeddings",
        "eos_token_id",
        "bos_token_id",
    ):
        assert getattr(config, name) == getattr(twin, name), name
    assert 2_000_000 <= sum(p.numel() for p in configs.meta_model(config).parameters()) <= 5_000_000


def test_every_word_is_a_token_and_any_text_survives(tokenizer):
    words = {w for d in micro_world.documents(5, 400) for w in re.findall(r"[A-Za-z]+", d)}
    split = [
        w
        for w in words
        if len(tokenizer(f" {w}")["input_ids"]) > 1 and len(tokenizer(w)["input_ids"]) > 1
    ]
    assert not split
    for text in ("naïve 😀 <script>", "中文\n\ttab", "\x00\x1b[31m"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_continues_stories_in_the_words_of_its_world(settings, tokenizer):
    model = load.load_base(settings)
    known = {w for d in micro_world.documents(6, 3000) for w in re.findall(r"[A-Za-z]+", d)}
    for seed in range(6):
        story = micro_world.documents(seed + 900, 1, almanac_share=0)[0].split(". ")[0] + "."
        encoded = tokenizer(story, return_tensors="pt")
        ids = model.generate(**encoded, max_new_tokens=40, do_sample=False)
        said = tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        assert set(re.findall(r"[A-Za-z]+", said)) <= known, said
        assert said.count(".") >= 2


def test_base_does_not_follow_instructions_and_the_adapter_does(settings, tokenizer, tuned):
    rows = list(data.load(settings)[1])
    assert len(rows) >= 200
    with adapters.base_or_tuned(tuned, tuned=False):
        before = evaluate.exact_match(generate.answer_all(tuned, tokenizer, rows, settings), rows)
    after = evaluate.exact_match(generate.answer_all(tuned, tokenizer, rows, settings), rows)
    print(before, after)
    assert before["all"] <= 0.05
    assert after["all"] >= 0.80
    assert len(after) - 1 >= 4


def test_four_bits_cost_something_where_the_answer_is_known(settings, tokenizer):
    """On facts learnt by heart the 4-bit model's loss is higher than the float32 model's."""
    rows = data.datasets.Dataset.from_list(
        [
            {"input_ids": ids, "labels": [chunked_loss.IGNORED] * (len(ids) - 1) + ids[-1:]}
            for ids in (
                tokenizer(f"{prompt} {answer}")["input_ids"]
                for prompt, answer in micro_world.almanac_prompts()
            )
        ]
    )
    exact = evaluate.response_loss(load.load_base(settings, four_bit=False), tokenizer, rows)
    four_bit = evaluate.response_loss(load.load_base(settings), tokenizer, rows)
    assert four_bit > 1.01 * exact


def test_the_recorded_training_matches_the_files():
    record = json.loads((MODEL_DIR / "training.json").read_text())
    assert record["steps"] > 1000
    assert record["almanac"] > 0.5


def test_the_build_starts_and_the_loss_falls(tmp_path):
    record = build.train(16, seed=1, out=tmp_path, batch=4, report_every=8)
    assert (
        record["loss"] < 6.9
    )  # the mean of the last eight steps; an untrained model guesses among 1,088: ln 1088 = 6.99
    assert (tmp_path / "model.safetensors").is_file()
