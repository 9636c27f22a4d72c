"""The published table of exact shapes, to the last digit printed, and what notebooks and claims say
in words and numbers.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import statistics

import nbformat
import pytest
import torch
from conftest import NOTEBOOKS, ROOT, python_of
from transformers import GPTNeoXConfig, RepetitionPenaltyLogitsProcessor

from qlora_nb import recorded
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs, load
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import Settings, validate
from qlora_nb.theory import lora

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))

GIB = 2**30
FROZEN = (*ledger.QUANTIZED, ledger.LINEARS, ledger.EMBEDDINGS, ledger.SMALL)
"""The lines that the published table adds up."""
TABLE = {  # layers, hidden, heads, vocabulary, total, share in 4-bit linears (%), GiB: fp16, NF4+DQ, NF4+DQ with the rest in fp32
    "14m": (6, 128, 4, 50304, 14_067_712, 8.4, None),
    "70m": (6, 512, 8, 50304, 70_426_624, 26.8, (0.131, 0.105, 0.201)),
    "160m": (12, 768, 12, 50304, 162_322_944, 52.3, (0.302, 0.185, 0.329)),
    "410m": (24, 1024, 16, 50304, 405_334_016, 74.5, (0.755, 0.338, 0.530)),
    "1b": (16, 2048, 8, 50304, 1_011_781_632, 79.6, (1.885, 0.771, 1.156)),
    "1.4b": (24, 2048, 16, 50304, 1_414_647_808, 85.4, (2.635, 0.965, 1.350)),
    "2.8b": (32, 2560, 32, 50304, 2_775_208_960, 90.7, (5.169, 1.691, 2.173)),
    "6.9b": (32, 4096, 32, 50432, 6_857_302_016, 94.0, (12.773, 3.868, 4.641)),
    "12b": (36, 5120, 40, 50688, 11_846_072_320, 95.6, (22.065, 6.412, 7.383)),
    "neox-20b": (44, 6144, 64, 50432, 20_554_567_680, 97.0, (38.286, 10.737, 11.898)),
}


def config(layers: int, hidden: int, heads: int, vocab: int) -> GPTNeoXConfig:
    """From the table's own columns, not from the kit's."""
    return GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2048,
    )


@pytest.mark.parametrize("size", TABLE)
def test_parameters_and_bytes(size):
    *shape, total, share, gib = TABLE[size]
    made = config(*shape)
    model = configs.meta_model(made)
    assert sum(p.numel() for p in model.parameters()) == total
    plain = ledger.predict(Plan(made, four_bit=False))
    assert plain.sum(FROZEN) == 2 * total
    assert round(100 * plain["linear weights"] / plain.sum(FROZEN), 1) == share
    if gib:
        small, upcast = (
            ledger.predict(Plan(made)),
            ledger.predict(Plan(made, rest_dtype=torch.float32)),
        )
        assert tuple(round(found.sum(FROZEN) / GIB, 3) for found in (plain, small, upcast)) == gib


@pytest.mark.parametrize("size", [s for s in TABLE if s in PYTHIA])
def test_the_kits_shapes_are_those_of_the_table(size):
    layers, hidden, heads, vocab, total, share, _ = TABLE[size]
    found, made = PYTHIA[size], configs.pythia_config(size)
    assert (found.n_layers, found.hidden, found.vocab, found.n_parameters) == (
        layers,
        hidden,
        vocab,
        total,
    )
    assert made.num_attention_heads == heads
    assert round(100 * found.n_linear / found.n_parameters, 1) == share
    by_hand = 16 * found.hidden * layers * 16  # sides of a block: 4 + 2 + 5 + 5 times hidden
    assert sum(ledger.lora_numels(configs.meta_model(made), 16)) == by_hand
    assert layers * lora.n_parameters(16, found.linears) == by_hand


def test_every_pythia_of_the_kit_is_in_the_table():
    assert set(PYTHIA) == set(TABLE) - {"neox-20b"}


# ---- sentences with a number or a direction
# ---------------------------------------------------------------------------

EMBEDDED = {size: 2 * row[3] * row[1] / row[4] for size, row in TABLE.items() if size in PYTHIA}
"""Share of a Pythia's numbers that is embedding or head, from the table's own columns."""


def text_of(name: str) -> str:
    """All markdown of a notebook in one line."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    return " ".join(" ".join(cell.source for cell in cells if cell.cell_type == "markdown").split())


def test_which_pythias_grow_with_the_rest_in_float32():
    growing = []
    for size in PYTHIA:
        layers, hidden, heads, vocab = TABLE[size][:4]
        made = config(layers, hidden, heads, vocab)
        upcast = ledger.predict(Plan(made, rest_dtype=torch.float32)).sum(FROZEN)
        if upcast > 2 * TABLE[size][4]:
            growing.append(size)
    assert growing == ["14m", "70m", "160m"]
    assert 0.45 < EMBEDDED["160m"] < 0.5 < EMBEDDED["70m"] < EMBEDDED["14m"]
    said = "pythia-14m, 70m and 160m grow: nearly half of 160m, and more of the other two, is embedding"
    assert said in text_of("01_setup")


def test_how_much_of_small_pythias_is_embedding():
    assert EMBEDDED["14m"] == pytest.approx(0.9, abs=0.03)
    assert EMBEDDED["410m"] == pytest.approx(0.25, abs=0.03)
    assert "nine tenths of pythia-14m and still a quarter of 410m are embeddings" in text_of(
        "01_setup"
    )
    assert [size for size, share in EMBEDDED.items() if share > 0.5] == ["14m", "70m"]
    assert "embeddings, which get no adapter and are most of 14m and 70m" in text_of("02_lora")


def test_from_which_pythia_on_the_trained_share_falls():
    shares = {}
    for size in PYTHIA:
        layers, hidden, _, _, total, *_ = TABLE[size]
        shares[size] = (
            layers * 16 * hidden * 8 / total
        )  # sides of a block: 1 + 3, 1 + 1, 1 + 4, 4 + 1 times hidden; rank 8
        counted = PYTHIA[size].n_layers * lora.n_parameters(8, PYTHIA[size].linears)
        assert shares[size] == pytest.approx(counted / total)
    sizes = list(shares)
    falls = [
        later for earlier, later in itertools.pairwise(sizes) if shares[later] < shares[earlier]
    ]
    assert sizes[sizes.index("1.4b") + 1 :] == [
        size for size in falls if sizes.index(size) > sizes.index("1.4b")
    ]
    assert shares["1.4b"] > shares["1b"], "not from the first large one on"
    assert "From 1.4b on the share falls" in text_of("02_lora")


@pytest.mark.parametrize("name", ["01_setup", "02_lora"])
def test_a_title_asks_and_answers_no_guess(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    titles = [line for line in text.split("\n") if re.match("##? .*·", line)]
    assert len(titles) >= 7
    for title in titles:
        said = re.sub(r"^##? (Step )?\d · |pythia-12b", "", title)
        assert not re.search(r"\d", said)
        assert title.endswith("?")


def test_a_count_over_packed_tensors_is_smaller_than_the_models():
    loaded = load.load_base(validate({}))
    counted = sum(p.numel() for p in loaded.parameters())
    assert counted < sum(p.numel() for p in configs.meta_model(loaded.config).parameters())
    assert (
        "A count over the loaded tensors looks smaller only because two codes share a byte"
        in text_of("06_finetune_pythia_12b")
    )


def test_what_06_says_of_the_recorded_intervals():
    found = {}
    for name in ("pocket", "smollm2"):
        record = json.loads((recorded.FOLDER / f"sixteen_bit_{name}.json").read_text())
        found[name] = record["difference"]
    assert all(interval["low"] < 0 < interval["high"] for interval in found["pocket"].values())
    assert found["smollm2"]["loss"]["low"] > 0
    quality = json.loads((recorded.FOLDER / "quality_smollm2.json").read_text())["models"][
        "smollm2, real answers"
    ]
    means = {q["name"]: sum(q["losses"]) / len(q["losses"]) for q in quality["qualities"]}
    assert (
        found["smollm2"]["loss"]["mean"] < means["NF4+DQ"] - means["unquantized"]
    )  # smaller than at first


BROKEN = json.loads((recorded.FOLDER / "break_it.json").read_text())


def test_what_06_says_of_the_mistakes():
    """Worked out from the single runs: paired differences, Student's t for three seeds."""
    runs = list(BROKEN["by_seed"].values())
    assert len(runs) == 3

    def apart(name, measure):
        differences = [run[name][measure] - run["the kit's setting"][measure] for run in runs]
        half = 4.303 * statistics.stdev(differences) / math.sqrt(3)
        return statistics.mean(differences) - half, statistics.mean(differences) + half

    for name, measures in BROKEN["summary"].items():
        for measure, found in measures.items():
            mean = statistics.mean(run[name][measure] for run in runs)
            assert found["mean"] == pytest.approx(mean, abs=1e-5)
            both = found["difference"]["low"], found["difference"]["high"]
            assert both == pytest.approx(apart(name, measure), abs=2e-5)
            column = {"exact_match": "exact match (%)", "stops": "answers that stop (%)"}
            if measure in column:
                text = BROKEN["table"][name][column[measure]]
                assert text.startswith(f"{100 * mean:.1f}")
                low, high = both
                if name != "the kit's setting":
                    assert text.endswith(f" ({100 * low:+.1f} to {100 * high:+.1f})")
    _, *others, large = BROKEN["summary"]
    assert all(apart(name, "exact_match")[1] < 0 for name in others), "fewer are right"
    assert all(apart(name, "held_out_loss")[0] > 0 for name in (*others, large)), "higher"
    assert apart(large, "exact_match")[1] > 0, "no difference that three seeds can tell"
    endless = [run["no end token"] for run in runs]
    assert all(run["stops"] < 0.05 and run["exact_match"] < 0.05 for run in endless)
    assert all(run[name]["stops"] > 0.9 for run in runs for name in (*others[1:], large))
    numbers = {name: run["trained_numbers"] for run in runs for name, run in run.items()}
    assert numbers["the kit's setting"] == numbers["query_key_value alone, r = 32"]
    assert numbers["the kit's setting"] == 4 * numbers["query_key_value alone"]


def test_what_06_says_of_learning_by_heart():
    curve = BROKEN["by_heart"]
    assert curve["losses"][-1] < 0.05, "the grey line goes to zero"
    marks = list(curve["held_out"].values())
    lowest = marks.index(min(marks))
    assert lowest < len(marks) - 2, "the blue marks are lowest long before the end"
    assert curve["after"] > 1.05 * min(marks)


def test_which_settings_lower_the_peak_most():
    """The answer beside the planner of notebook 06."""
    small = [option.changes for option in budget.options(validate({}), on_gpu=False)]
    assert small[0] == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    assert small[1] == {"gradient_checkpointing": True}
    large = budget.options(validate({"profile": "full"}), on_gpu=True)
    by_size = sorted(large, key=lambda option: -option.saves)
    assert {"r": 16} in [option.changes for option in by_size[:2]]
    assert large[0].changes == {"optim": "paged_adamw_8bit"}


def test_a_repetition_penalty_lowers_and_does_not_always_divide():
    processor = RepetitionPenaltyLogitsProcessor(2.0)
    lowered = processor(torch.tensor([[0, 1]]), torch.tensor([[-3.0, 3.0, 5.0]]))
    assert lowered.tolist() == [[-6.0, 1.5, 5.0]]
    said = Settings.model_fields["repetition_penalty"].description
    assert "lowers" in said
    assert "divides" not in said


def test_what_07_says_of_the_bytes_pythia_12b_reads_for_a_token(capsys):
    """The cell's own output against the table's columns: twelve times hidden² weights a layer, and
    a head.
    """
    (source,) = [
        cell.source
        for cell in nbformat.read(NOTEBOOKS / "07_inference.ipynb", 4).cells
        if "936e9" in cell.source
    ]
    names = {"ledger": ledger, "Plan": Plan, "torch": torch, "configs": configs}
    exec(source, {**names, "recorded": recorded})
    layers, hidden, _, vocab, total, *_ = TABLE["12b"]
    packed = 12 * layers * hidden**2
    weights = (
        packed // 2
        + packed // 64
        + 4 * packed // (64 * 256)
        + 2 * (total - packed - vocab * hidden)
    )
    *lines, base, tuned, _, plain, optioned, where = capsys.readouterr().out.splitlines()
    assert "H100" in where
    for line, found in zip((plain, optioned), recorded.read("gpu")[0]["answers"].values()):
        assert f"{found['tokens_per_s']} tokens/s" in line
        assert f"{found['share_of_limit']:.0%} of what" in line
        assert f"{found['process'] / 1e9:.2f} GB at the peak" in line
    answered = recorded.read("true_size")[0]["cases"]["12b, r 16"]["answer"]
    for who, line in (("base", base), ("tuned", tuned)):
        assert line == f"on a CPU, {who}: 8 tokens in {answered['seconds_of_an_answer'][who]:.0f} s"
    for n, line in zip((0, 1024, 2048), lines, strict=True):
        read = weights + n * 4 * layers * hidden
        assert f"{n:,} tokens in the cache: {read / 1e9:.2f} GB" in line
        assert f"at most {936e9 / read:.0f} tokens/s" in line


@pytest.mark.parametrize("name", NAMES)
def test_not_measured_is_said_under_a_condition_only(name):
    """Once a record lies beside the notebooks, no cell and no text may go on saying that there is
    none.
    """
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells:
        if cell.cell_type == "markdown":
            assert "not measured" not in cell.source
            assert "not been measured" not in cell.source
            continue
        tree = ast.parse(python_of(cell))
        inside = {
            id(part)
            for choice in ast.walk(tree)
            if isinstance(choice, (ast.IfExp, ast.If))
            for part in ast.walk(choice)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and "not measured" in node.value
            ):
                assert id(node) in inside, cell.source


RETIRED = (
    "hence the gap",
    "layer by layer, under the dashed line",
    "Five settings",
    "most of them is embedding",
    "only on CUDA",
    "two settings changed",
    "compiles the step by itself",
    "no answer is ever matched",
    "one value in sixteen",
    "Everything in this kit",
    "removes the needle",
    "a third more time",
    "count of step 5 looks smaller",
    "4-bit path is tried here on CPUs and written for NVIDIA cards",
    "neither PEFT nor bitsandbytes",
)
"""Sentences that were false; what is true now is computed above and in the tests of each
subject.
"""


def test_what_is_claimed_of_three_recordings():
    claims = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")

    def row_about(name: str) -> str:
        [row] = [line for line in claims.splitlines() if f"recorded/{name}.json" in line]
        return row

    mistakes = json.loads((recorded.FOLDER / "break_it.json").read_text())["summary"]
    for found in mistakes.values():
        assert f"{100 * found['exact_match']['mean']:.1f} %" in row_about("break_it")
    stop = f"{100 * mistakes['no end token']['stops']['mean']:.1f} % of the answers stop"
    assert stop in row_about("break_it")
    bits = json.loads((recorded.FOLDER / "bits_smollm2.json").read_text())["models"]
    for found in bits["smollm2, real answers"]["qualities"]:
        digits = 1 if found["name"] == "2 bit" else 2
        loss = statistics.mean(found["losses"])
        assert f"{found['name']} {loss:.{digits}f}" in row_about("bits_smollm2")
    ranks = json.loads((recorded.FOLDER / "merge_ranks.json").read_text())["by_rank"]
    for way in ("not merged", "original", "packed"):
        losses = [found["ways"][way]["held-out loss (nats)"] for found in ranks.values()]
        said = ", ".join(f"{loss:.3f}".lstrip("0") for loss in losses)
        assert said in row_about("merge_ranks"), way


def test_06_compares_ranks_at_one_factor_and_sees_the_few_rows_overfit():
    record = json.loads((recorded.FOLDER / "break_it.json").read_text())
    assert min(record["by_heart"]["held_out"].values()) < record["by_heart"]["after"]
    assert record["by_heart"]["train_rows"] == 64
    assert len(record["seeds"]) == 3
    text = text_of("06_finetune_pythia_12b")
    assert "The same training on 64 rows only" in text
    assert "Means of three seeds" in text
    assert "steps and α/r are the kit's in every row" in text


def test_retired_sentences_stay_away():
    texts = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "qlora_nb").rglob("*.py")
    }
    texts |= {name: text_of(name) for name in NAMES}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        texts[path.name] = path.read_text(encoding="utf-8")
    for where, text in texts.items():
        found = [words for words in RETIRED if words in " ".join(text.split())]
        assert not found, (where, found)
