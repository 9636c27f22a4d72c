"""The adapter as a plug-in: its strength, a second one beside it, their sum, and what is recorded
of forgetting.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
import sys

import artists
import datasets
import drawn
import micro_world
import nbformat
import numpy as np
import pytest
import torch
from conftest import NOTEBOOKS, ROOT
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_nb import pocket, recorded
from qlora_nb.answer import adapters
from qlora_nb.errors import KitError
from qlora_nb.lessons import n07
from qlora_nb.model import batching, chunked_loss, data, load
from qlora_nb.record import seal
from qlora_nb.settings import validate

sys.path.insert(0, str(ROOT / "benchmarks"))

import forgetting

MEASURES = "questions right (%)", "facts known (%)", "story loss (nats)"
IDS = torch.arange(20, 60)[None]
VERBS = dict(micro_world._WORDS["getting"]) | dict(micro_world._WORDS["counting"])


def load_both() -> PeftModel:
    """The 4-bit base with both shipped adapters, "default" and "rewriter"."""
    model = adapters.load_adapter(load.load_base(validate({})), pocket.ADAPTER_DIR)
    model.load_adapter(str(pocket.REWRITER_DIR), adapter_name="rewriter")
    return model


@pytest.fixture(scope="module")
def both():
    return load_both()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


# ---- strength ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.5])
def test_a_strength_is_b_multiplied_by_it(both, strength):
    with rescale_adapter_scale(both, strength):
        turned = logits(both)
    by_hand = copy.deepcopy(both)
    for name, parameter in by_hand.named_parameters():
        if "lora_B.default" in name:
            parameter.data *= strength
    torch.testing.assert_close(turned, logits(by_hand), rtol=1e-5, atol=1e-4)
    assert (turned - logits(both)).abs().max() > 1, "another strength is another model"


def test_at_strength_0_it_is_the_base_bit_for_bit(both):
    with rescale_adapter_scale(both, 0.0):
        off = logits(both)
    with both.disable_adapter():
        assert torch.equal(off, logits(both))


# ---- the second adapter --------------------------------------------------------------------------


def question_of(sentence: str) -> str:
    """The question that a sentence answers, worked out from its words."""
    person, verb, *rest = sentence.rstrip(".").split()
    if rest[0] == "to":
        return f"Where did {person} go?"
    if rest[0] in ("a", "an"):
        return f"What did {person} {VERBS[verb]}?"
    return f"How many {rest[1]} did {person} {VERBS[verb]}?"


def test_plain_peft_loads_the_rewriter_and_it_asks():
    """On the unrounded base, by transformers and PEFT alone: sentences that it never read."""
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL_DIR)
    base = AutoModelForCausalLM.from_pretrained(pocket.MODEL_DIR, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, pocket.REWRITER_DIR).eval()
    rows = pocket.read("sentences")
    prompts = [data.prompt_of(row, "alpaca_short") for row in rows]
    given = tokenizer(
        prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
    )
    ids = model.generate(**given, max_new_tokens=16, do_sample=False, pad_token_id=1)
    said = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    wanted = [question_of(row["input"]) for row in rows]
    assert [row["output"] for row in rows] == wanted
    right = [text.strip() == question for text, question in zip(said, wanted, strict=True)]
    assert len(right) == 120
    assert sum(right) >= 117


def test_its_sentences_are_held_out():
    """Person and noun of each are a pair that no training row holds."""
    nouns = {*micro_world.PLACES, *micro_world.OBJECTS, *micro_world.THINGS}
    shipped = pocket.read("sentences")
    for rows, is_held_out in ((shipped, True), (micro_world.sentence_rows("train", 4160), False)):
        for row in rows:
            words = re.findall("[A-Za-z]+", row["input"])
            [noun] = nouns & set(words)
            assert micro_world.held_out(words[0], noun) == is_held_out
    assert len({row["input"] for row in shipped}) == 120


def test_it_is_small_and_under_the_seal(tmp_path, monkeypatch):
    files = sorted(path.name for path in pocket.REWRITER_DIR.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert sum(path.stat().st_size for path in pocket.REWRITER_DIR.iterdir()) <= 1_000_000
    package = (ROOT / "pyproject.toml").read_text()
    assert '"pocket/rewriter/*"' in package
    kit = shutil.copytree(pocket.HERE, tmp_path / "pocket")
    monkeypatch.setattr(pocket, "HERE", kit)
    seal.require_whole(kit / "rewriter")
    weights = kit / "rewriter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        KitError, match=r"rewriter/adapter_model\.safetensors is missing or damaged"
    ):
        seal.require_whole(kit / "rewriter")


# ---- both at once --------------------------------------------------------------------------------


def test_the_weighted_adapter_is_the_sum_of_both(both):
    """ "cat" gives the sum of both products, worked out in float64; "linear" does not."""
    largest = {"cat": 0.0, "linear": 0.0}
    for kind in largest:
        both.add_weighted_adapter(["default", "rewriter"], [0.75, 0.5], kind, kind)
    for layer in both.modules():
        if not isinstance(layer, LoraLayer):
            continue
        wanted = 0
        for name, weight in (("default", 0.75), ("rewriter", 0.5)):
            product = layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
            wanted = wanted + weight * layer.scaling[name] * product
        for kind, so_far in largest.items():
            apart = (layer.get_delta_weight(kind) - wanted).abs().max().item()
            largest[kind] = max(so_far, apart)
    for kind in largest:
        both.delete_adapter(kind)
    both.set_adapter("default")
    assert largest["cat"] < 1e-5
    assert largest["linear"] > 0.1


def test_a_second_adapter_is_not_loaded_onto_the_first(both):
    """The PeftModel, and the base inside it, whose layers it has replaced."""
    before = logits(both)
    for model in (both, both.get_base_model()):
        with pytest.raises(KitError, match=r"an adapter is on this model already.*loads the base"):
            adapters.load_adapter(model, pocket.ADAPTER_DIR)
    assert torch.equal(logits(both), before)


def test_taken_off_and_put_on_again_it_is_the_same():
    base = load.load_base(validate({}))
    alone = logits(base)
    model = adapters.load_adapter(base, pocket.ADAPTER_DIR)
    tuned = logits(model)
    base = model.unload()
    assert torch.equal(logits(base), alone)
    model = adapters.load_adapter(base, pocket.ADAPTER_DIR)
    assert torch.equal(logits(model), tuned)
    assert (tuned - alone).abs().max() > 1


def test_switching_loads_nothing_again(both):
    """The codes are the same tensors, and the first adapter answers as before."""
    before = logits(both)
    codes = {name: p.data_ptr() for name, p in both.named_parameters() if "base_layer" in name}
    both.set_adapter("rewriter")
    other = logits(both)
    assert codes == {n: p.data_ptr() for n, p in both.named_parameters() if "base_layer" in n}
    both.set_adapter("default")
    assert (other - before).abs().max() > 1
    assert torch.equal(logits(both), before)


# ---- the figure ----------------------------------------------------------------------------------


def test_the_figure_draws_the_numbers_it_is_given():
    curve = {s: {m: 10 * s + k for k, m in enumerate(MEASURES)} for s in (0.0, 0.5, 1.5)}
    figure = n07.strengths({"mine": curve}, "turned to", 0.75, ["By the river.", "Six."])
    artists.check_drawn(figure)
    assert figure.get_suptitle() == "turned to 0.75: By the river. · Six."
    for k, (ax, measure) in enumerate(zip(figure.axes, MEASURES, strict=True)):
        points, marked = artists.lines(ax)
        assert points.tolist() == [[0, k], [0.5, 5 + k], [1.5, 15 + k]]
        assert marked[:, 0].tolist() == [0.75, 0.75]
        assert artists.labels(ax) == ("strength", measure)
    assert drawn.legend(figure.axes[1]) == ["mine"]


def test_the_figure_draws_intervals():
    curves = {}
    for shift, label in enumerate(("alone", "mixed")):
        curves[label] = {}
        for strength in ("0", "0.5", "1"):
            by_measure = {}
            for k, measure in enumerate(MEASURES):
                mean = 20.0 * shift + 4 * k + float(strength)
                by_measure[measure] = {"n": 5, "mean": mean, "low": mean - 1.5, "high": mean + 1.5}
            curves[label][strength] = by_measure
    figure = n07.strengths(curves, "means")
    assert figure.get_suptitle() == "means"
    for k, ax in enumerate(figure.axes):
        artists.check_in_view(ax)
        for shift, (line, bars) in enumerate(zip(artists.lines(ax), ax.collections, strict=True)):
            means = [20 * shift + 4 * k + x for x in (0, 0.5, 1)]
            assert line.tolist() == [list(point) for point in zip((0, 0.5, 1), means)]
            ends = artists.segments(bars)
            assert ends[:, :, 0].tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
            assert ends[:, :, 1].tolist() == [[mean - 1.5, mean + 1.5] for mean in means]
        first, second = ax.lines
        assert (first.get_color(), first.get_marker()) != (second.get_color(), second.get_marker())
    assert drawn.legend(figure.axes[1]) == ["alone", "mixed"]


# ---- what is recorded ----------------------------------------------------------------------------


def quantile_4(p: float) -> float:
    """Student's t with 4 degrees of freedom has a quantile in closed form."""
    alpha = 4 * p * (1 - p)
    q = math.cos(math.acos(math.sqrt(alpha)) / 3) / math.sqrt(alpha)
    return 2 * math.sqrt(q - 1)


def check_interval(found: dict, values: list[float]) -> None:
    half = quantile_4(0.975) * np.std(values, ddof=1) / math.sqrt(5)
    assert found["n"] == len(values) == 5
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-4)
    allowed = 1e-4 + 2e-4 * half  # the benchmark's table of quantiles has four digits
    assert found["low"] == pytest.approx(np.mean(values) - half, abs=allowed)
    assert found["high"] == pytest.approx(np.mean(values) + half, abs=allowed)


@pytest.fixture(scope="module")
def record():
    return recorded.read("forgetting")[0]


def test_the_recorded_intervals(record):
    assert record["clean"]
    assert record["seeds"] == [0, 1, 2, 3, 4]
    seeds = list(record["by_seed"].values())
    assert list(record["by_strength"]) == ["rows alone", "with stories"]
    for way, curve in record["by_strength"].items():
        assert list(map(float, curve)) == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
        for strength, by_measure in curve.items():
            assert tuple(by_measure) == MEASURES
            for name, found in by_measure.items():
                check_interval(found, [seed[way]["by_strength"][strength][name] for seed in seeds])
    for name, found in record["difference"].items():
        apart = []
        for seed in seeds:
            at_1 = {way: by["by_strength"]["1"][name] for way, by in seed.items()}
            apart.append(at_1["with stories"] - at_1["rows alone"])
        check_interval(found, apart)


def test_what_is_measured_of_the_base_is_the_same_for_every_seed(record):
    """At strength 0 no training counts."""
    found = set()
    for seed in record["by_seed"].values():
        for way in seed.values():
            found.add(tuple(way["by_strength"]["0"].values()))
    [(right, known, _)] = found
    assert right == 0
    assert known > 99


def test_stories_join_every_step_and_hold_no_fact():
    settings = validate({"max_steps": 3, "per_device_train_batch_size": 6})
    tokenizer = load.load_tokenizer(settings)
    numbers = range(40)
    rows = datasets.Dataset.from_list([{"input_ids": [i] * 9, "labels": [i] * 9} for i in numbers])
    mixed = forgetting.with_stories(rows, settings)
    alone = settings.replace(per_device_train_batch_size=4)
    wanted = batching.in_training_order(rows, alone)["input_ids"]
    assert len(mixed) == 18
    surnames = set(micro_world._WORDS["surnames"])
    for step in range(3):
        own = mixed[6 * step : 6 * step + 6]
        assert own["input_ids"][:4] == wanted[4 * step : 4 * step + 4]
        assert own["labels"][4:] == own["input_ids"][4:]
        for ids in own["input_ids"][4:]:
            assert chunked_loss.IGNORED not in ids
            assert 0 < len(ids) <= forgetting.STORY_TOKENS
            words = set(re.findall("[A-Za-z]+", tokenizer.decode(ids)))
            assert words & set(micro_world.PEOPLE)
            assert not words & surnames, "a surname stands in the almanac alone"


def cell(name: str) -> str:
    [found] = [c for c in nbformat.read(NOTEBOOKS / "07_inference.ipynb", 4).cells if c.id == name]
    return found.source


def test_what_07_says_of_forgetting(record):
    """The paragraphs about five trainings, against the recorded numbers."""
    said = cell("plugin-end")
    right, known, loss = MEASURES
    alone, mixed = record["by_strength"].values()

    def percent(curve: dict, strength: str, name: str, digits: int = 1) -> str:
        return f"{curve[strength][name]['mean']:.{digits}f} %"

    def interval(name: str, digits: int) -> str:
        ends = [f"{record['difference'][name][end]:+.{digits}f}" for end in ("low", "high")]
        return " to ".join(ends).replace("-", "−")

    def change(name: str, digits: int) -> str:
        return f"{record['difference'][name]['mean']:+.{digits}f}".replace("-", "−")

    at_three_quarters = percent(alone, "0.75", right), percent(alone, "0.75", known)
    assert "they answer {} of the questions and leave {} of".format(*at_three_quarters) in said
    at_full = percent(alone, "1", right), percent(alone, "1", known)
    assert "at full strength {} and {}.".format(*at_full) in said
    assert f"the model knows\n{percent(mixed, '1', known)} of the facts" in said
    assert f"{change(known, 1)} points, 95 % interval of the paired difference" in said
    assert f"difference {interval(known, 1)}." in said
    assert f"changes by {change(loss, 2)} nats ({interval(loss, 2)})" in said
    assert (
        f"change by {change(right, 1)} points ({interval(right, 1)}): the interval holds 0" in said
    )
    assert record["difference"][right]["low"] < 0 < record["difference"][right]["high"]
    assert record["difference"][known]["low"] > 0
    assert mixed["1"][loss]["mean"] == pytest.approx(mixed["0"][loss]["mean"], abs=0.01)
    at_half = percent(mixed, "0.5", right, 0), percent(alone, "0.5", right, 0)
    assert "these adapters answer {} of the questions, the others {}.".format(*at_half) in said
    asked = cell("plugin-remedy")
    settings = record["settings"]
    assert settings["rows_in_a_step"] == 16
    assert settings["stories_in_a_step"] == 2
    assert f"({settings['story_tokens']} tokens each)" in asked
    assert f"all {settings['eval_rows']} held-out questions" in asked
    assert f"read {settings['read']} other stories" in asked


def test_what_07_says_of_the_curve_holds_for_the_shipped_adapter_and_for_a_run():
    """The paragraph under the live figure, for every recorded seed too: half the strength brings
    most answers and costs next to no fact.
    """
    for seed in recorded.read("forgetting")[0]["by_seed"].values():
        curve = seed["rows alone"]["by_strength"]
        half, full, most = curve["0.5"], curve["1"], curve["1.5"]
        assert half["questions right (%)"] > 0.7 * full["questions right (%)"]
        assert half["facts known (%)"] > 99.5
        assert 100 - full["facts known (%)"] > 5 * (100 - half["facts known (%)"])
        assert most["facts known (%)"] < full["facts known (%)"]
        assert half["story loss (nats)"] < full["story loss (nats)"] < most["story loss (nats)"]
