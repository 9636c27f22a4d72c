"""Will it fit: the peak's lines, options, cards, refusals before a download, the doctor, and the
published figures.
"""

import itertools
import weakref

import nbformat
import open_cells
import pandas
import published_table
import pytest
import torch
from conftest import NOTEBOOKS, ROOT
from peft import LoraConfig, get_peft_model
from test_activations import layers_run
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig
from typer.testing import CliRunner

from qlora_nb import cards, machine
from qlora_nb.cli import app
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, dry_run, estimates, ledger, out_of_memory, preflight
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs, load
from qlora_nb.pythia import PYTHIA
from qlora_nb.record import runs
from qlora_nb.settings import PROFILES, validate

FULL = validate({"profile": "full"})


def machine_with(gib):
    return machine.Machine(
        "cpu",
        2,
        32 * cards.GIB,
        16 * cards.GIB,
        100 * cards.GIB,
        (cards.Gpu(f"card {gib}", gib * cards.GIB, gib * cards.GIB, (8, 6)),),
        "3.12",
        "Linux",
    )


@pytest.fixture(scope="module")
def config():
    return configs.pythia_config("12b")


def test_12b_line_by_line_by_hand(config):
    found = budget.peak(plan_of(FULL, True, config, on_gpu=True))
    assert found.sum(ledger.QUANTIZED) == 5_842_022_400
    assert (
        found[ledger.LORA] == found[ledger.GRADIENTS] == 4 * 188_743_680
    )  # accumulation keeps gradients all through
    assert found[ledger.STATES] == 8 * 188_743_680
    assert found[budget.KEPT] == 36 * 512 * 5120 * 2
    moving = found.sum((ledger.GRADIENTS, budget.KEPT, budget.WORK))
    ends_of_pages = 36 * 2 * 6 * 2**20  # of 1.25 MiB five times .75, of 3.75 .25, of 5 twice 1
    own = 718_077_952 + 2 * 32 * 2**20  # context and kernels, workspaces
    assert found[budget.CUDA] == own + ends_of_pages + int(0.1 * moving)
    assert 10.9 < found.total_gib < 11.1  # an H100: 11.02 (test_on_a_card.py)
    assert all(line.source for line in found.lines)
    answering = budget.peak(plan_of(FULL.replace(max_length=960), False, config, on_gpu=True))
    assert answering[ledger.STATES] == answering[ledger.GRADIENTS] == 0
    assert answering[budget.CACHE] in (960 * 737_280, 1024 * 737_280)


def test_the_ranges_of_the_reference_for_12b(config):
    """Ranges calculated elsewhere for 12b (GiB, batch 1) end where ours do or up to half a GiB
    higher: fewer temporaries here.
    """

    def gib(**changes):
        return budget.peak(
            plan_of(validate({"profile": "full", **changes}), True, config, on_gpu=True)
        ).total_gib

    upcast = plan_of(
        validate({"profile": "full", "max_length": 1280, "loss_chunk": 0}),
        True,
        config,
        on_gpu=True,
    )
    how = {"rest_dtype": torch.float32, "dtype": torch.bfloat16, "accumulation": 16}
    whole = budget.peak(Plan(config, length=1280, r=64, **how)).total_gib
    assert 12.8 - 0.5 < whole < 13.4
    assert budget.peak(upcast).total_gib < whole - 0.9
    assert 8.1 - 0.5 < gib(r=16, optim="paged_adamw_8bit") < 8.7


def test_every_size_is_predicted_with_one_layer_and_no_memory():
    """A prediction of the largest model takes no longer than one of the smallest."""
    for size in PYTHIA:
        dry_run._dry_run.cache_clear()
        with layers_run() as worked:
            found = budget.peak(plan_of(FULL, True, configs.pythia_config(size), on_gpu=True))
        assert found.total_bytes > cards.CONTEXT_BYTES
        assert worked == [torch.device("meta")]


def test_an_option_saves_what_it_says(config):
    found = budget.options(FULL, config, on_gpu=True)
    now = budget.peak(plan_of(FULL, True, config, on_gpu=True)).total_bytes
    assert found
    for option in found:
        changed = FULL.replace(**option.changes)
        assert (
            now - budget.peak(plan_of(changed, True, config, on_gpu=True)).total_bytes
            == option.saves
            > 0
        )
    assert found[0].changes == {
        "optim": "paged_adamw_8bit"
    }  # free options first, then those that change the result
    assert {"r": 16} in [option.changes for option in found[1:]]
    greedy = validate(
        {
            "profile": "full",
            "loss_chunk": 0,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
        }
    )
    first = budget.options(greedy, config, on_gpu=True)[0]
    assert (
        "gradient_checkpointing" in first.changes or "per_device_train_batch_size" in first.changes
    )


def test_the_largest_pythia_for_a_card_and_its_options():
    assert budget.largest_pythia(FULL, 8 * cards.GIB, train=True)[0] == "6.9b"
    size, found, taken = budget.largest_pythia(FULL, 8 * cards.GIB, train=True, with_options=True)
    assert size == "12b"
    assert {"r": 16} in [option.changes for option in taken]
    assert found.total_gib <= 8
    assert budget.largest_pythia(FULL, 0.1 * cards.GIB, train=False) is None
    assert budget.largest_pythia(FULL, 12 * cards.GIB, train=True)[0] == "12b"


def test_a_run_that_cannot_fit_is_refused_with_the_options_that_help():
    preflight.require_fit(FULL, machine_with(24))
    with pytest.raises(
        KitError,
        match=r"pythia-12b does not fit this GPU: fine-tuning is predicted to need 11\.\d\d GiB",
    ) as refused:
        preflight.require_fit(FULL, machine_with(8))
    assert "r=16" in refused.value.remedy
    assert "GiB" in refused.value.remedy
    with pytest.raises(KitError, match=r"does not fit this GPU: answering") as refused:
        preflight.require_fit(FULL, machine_with(6), train=False)
    assert 'model_id="EleutherAI/pythia-' in refused.value.remedy


def test_an_out_of_memory_error_becomes_a_ledger_and_an_option(tmp_path, monkeypatch):
    settings = validate(
        {"max_steps": 3, "output_dir": str(tmp_path), "per_device_train_batch_size": 4}
    )
    tokenizer = load.load_tokenizer(settings)
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    from qlora_nb.model import data

    rows, calls = data.tokenize_rows(data.load(settings)[0], tokenizer, settings), []
    base = model.get_base_model()
    forward = base.forward

    def runs_out(*args, **kwargs):
        training_now = torch.is_grad_enabled()  # not a probe before the first step
        calls.extend([1] * training_now)
        if training_now and len(calls) >= 3:  # with four rows, then with two, then with one
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …"
            )
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", runs_out)
    run = runs.Run(settings, "06_finetune_pythia_12b")
    with pytest.raises(
        KitError, match=r"memory ran out.*Tried to allocate 2.00 GiB.*held at that moment"
    ) as refused:
        open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)
    assert "per_device_train_batch_size" not in refused.value.remedy  # that was done already
    assert "saves" in refused.value.remedy
    assert isinstance(refused.value.__cause__, torch.OutOfMemoryError)
    assert (
        len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2
    )  # both finished steps are kept
    assert runs.status_of(run.folder) == "failed"
    monkeypatch.undo()
    assert (
        model(input_ids=torch.tensor([[5, 6]])).logits.shape[-1] == model.config.vocab_size
    )  # the head is back


class Large:
    """Stands for the activations of a step: unlike a list it can be referred to weakly."""


def test_what_a_step_that_ran_out_of_memory_held_is_freed():
    held = []

    def step():
        large = Large()
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        step()
    assert held[0]() is not None, "its traceback keeps it"
    assert out_of_memory.freed_memory_of(caught.value)
    assert held[0]() is None
    assert not out_of_memory.freed_memory_of(RuntimeError("shapes do not fit"))


def test_memory_that_runs_out_is_explained():
    model = configs.meta_model(configs.pythia_config("1b"))
    error = MemoryError("2.00 GiB")
    with (
        pytest.raises(KitError, match=r"memory ran out \(2\.00 GiB\); held at") as refused,
        out_of_memory.explained(validate({}), model),
    ):
        raise error
    assert refused.value.__cause__ is error
    # float32 on meta, 12 · hidden² weights in each of 16 layers: 16 · 12 · 2048² · 4 bytes = 3 GiB
    assert "linear weights 3.00" in str(refused.value)
    assert "saves" in refused.value.remedy
    with (
        pytest.raises(KitError, match=r"memory ran out \(MemoryError\)"),
        out_of_memory.explained(validate({}), model),
    ):
        raise MemoryError


def test_predicted_is_measured_after_two_steps(tmp_path):
    from qlora_nb.model import data

    settings = validate(
        {
            "max_steps": 2,
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "optim": "adamw_8bit",
        }
    )
    tokenizer = load.load_tokenizer(settings)
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    result = open_cells.finetune(
        model, tokenizer, rows, settings, runs.Run(settings, "06_test"), lambda step: None
    )
    n_rows, tokens, answers = result["shape"]
    changes = {"per_device_train_batch_size": n_rows, "max_length": tokens, "loss_chunk": answers}
    predicted = budget.peak(plan_of(settings.replace(**changes), on_gpu=False))
    *still, moves, peak = budget.reconcile(predicted, result["held"], result["moved"])
    assert [(p, m) for _, p, m in still if p != m] == []
    assert abs(peak[1] / peak[2] - 1) < 0.15
    assert moves[2] > 0
    assert budget.reconcile(predicted, None, None) == []


def test_published_figures_follow_from_their_configurations():
    found = {row["figure"].split(" (")[0]: row for row in published_table.published_figures()}
    off = {name: row["predicted"] / row["published"] - 1 for name, row in found.items()}
    assert len(found) == 26
    for name in ("pythia-12b, plain", "LLaMA-65B, full fine-tuning"):
        assert abs(off[name]) < 0.02
    for name in (
        "LLaMA-7B, QLoRA",
        "LLaMA-13B, QLoRA",
        "LLaMA-33B, QLoRA",
        "LLaMA-65B, QLoRA",
        "pythia-12b, answering",
    ):
        assert abs(off[name]) < 0.08
    assert found["gpt-neox-20b, answering"]["predicted"] < 16
    assert (
        found["pythia-12b, fine-tuning"]["predicted"] < 0.7 * 23
    )  # the difference the notebook speaks of
    assert all(row["remark"] and row["source"] for row in found.values())


def test_plan_prints_the_ledger_the_options_and_the_line():
    said = CliRunner().invoke(app, ["plan", "--profile", "full", "--gpu-gib", "8"])
    assert said.exit_code == 1
    for words in (
        "4-bit codes",
        "5.273 GiB",
        "does not fit",
        "Change first: optim='paged_adamw_8bit'",
        "23.7 GB",
        "papermill notebooks/06",
    ):
        assert words in said.output, words
    assert "gpu_gib" not in said.output.splitlines()[-1]
    fits = CliRunner().invoke(
        app, ["plan", "--profile", "full", "--gpu-gib", "12", "-p", "r", "16"]
    )
    assert fits.exit_code == 0
    assert "-p r 16" in fits.output


def test_8_gb_are_enough_with_the_settings_that_the_readme_names():
    """A card sold with 8 GB offers about 7.6 GiB: no three of the settings are enough."""

    def gib(*some):
        chosen = validate({"profile": "full", **dict(some)})
        return budget.peak(plan_of(chosen, on_gpu=True)).total_gib

    settings = [
        ("optim", "paged_adamw_8bit"),
        ("embedding_on_cpu", True),
        ("head_4bit", True),
        ("r", 16),
    ]
    assert min(gib(*three) for three in itertools.combinations(settings, 3)) > 7.6
    fits, taken = budget.make_fit(FULL, 7.6 * cards.GIB)
    assert len(taken) == 4
    assert (fits.optim, fits.embedding_on_cpu, fits.r) == ("paged_adamw_8bit", True, 16)
    assert fits.head_4bit
    [row] = [
        line
        for line in (ROOT / "docs" / "usage.md").read_text().splitlines()
        if line.startswith("| `full` |")
    ]
    assert "four settings changed: 8-bit states, the embedding on the CPU, r = 16, the head" in row
    assert f"({gib(*settings):.1f} GiB)" in row
    assert f"({gib():.1f} GiB)" in row


def test_the_recipe_of_06_says_what_each_setting_saves_alone():
    cells = nbformat.read(NOTEBOOKS / "06_finetune_pythia_12b.ipynb", 4).cells
    i = next(i for i, cell in enumerate(cells) if cell.source.startswith("recipe = {"))
    names = {"budget": budget, "plan_of": plan_of, "validate": validate, "pandas": pandas}
    exec(cells[i].source, names)
    numbers = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six"}
    n_settings = len(names["recipe"]) - 1  # without the profile as it is
    said = f"{numbers[n_settings - 1]} settings and the rank take memory off"
    assert said in cells[i - 1].source
    rows = names["needed"]
    first = rows["profile full"]
    alone = {name: row["saves alone (GiB)"] for name, row in rows.items() if row is not first}
    n_rank_64, n_rank_16, embedding = 188_743_680, 47_185_920, 50_688 * 5120
    mib = 36 * 2 * 2**20  # layers, states; of pages: 2, 4, 6 MiB or a power of two
    ends = {(64, 32): 6 * mib, (64, 8): 2.5 * mib, (16, 32): 1.5625 * mib}
    by_hand = {
        "8-bit states": n_rank_64 * (8 - 2 - 2 * 4 / 256) + ends[64, 32] - ends[64, 8],
        "embedding on the CPU": 2 * embedding,
        "head in 4 bit": embedding * (2 - 4.127 / 8),
        "r = 16": (n_rank_64 - n_rank_16) * (16 + 4 * budget.SLACK) + ends[64, 32] - ends[16, 32],
    }
    assert alone == pytest.approx(
        {name: size / cards.GIB for name, size in by_hand.items()}, abs=0.02
    )
    assert first["saves alone (GiB)"] == first["saved together (GiB)"] == 0
    for row in rows.values():
        together = first["512 tokens (GiB)"] - row["512 tokens (GiB)"]
        assert row["saved together (GiB)"] == pytest.approx(together)
    assert max(alone, key=alone.get) == "r = 16", "a smaller rank saves most alone, it says"
    steps = [
        before["512 tokens (GiB)"] - row["512 tokens (GiB)"]
        for before, row in itertools.pairwise(rows.values())
    ]
    assert sum(alone.values()) > sum(steps) + 0.5, "they do not add up, as the text says"


def test_checkpointing_costs_half_as_many_operations_again():
    """Counted by torch while transformers and PEFT work: a frozen weight has no gradient, so a pass
    more is a half, no third.
    """
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
    )
    counts = []
    for checkpointing in (False, True):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config), LoraConfig(r=1, target_modules="all-linear")
        )
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        ids = torch.arange(32)[None]
        with FlopCounterMode(display=False) as counter:
            model.train()(input_ids=ids, labels=ids).loss.backward()
        counts.append(counter.get_total_flops())
    assert 1.4 < counts[1] / counts[0] <= 1.5
    plain = validate({"profile": "full", "gradient_checkpointing": False})
    option = next(
        option
        for option in budget.options(plain, on_gpu=True)
        if "gradient_checkpointing" in option.changes
    )
    assert option.costs == "up to half as many operations again"
    said = PROFILES["full"]["gradient_checkpointing"].reason
    without, with_it = (
        budget.peak(plan_of(chosen, on_gpu=True)).total_gib for chosen in (plain, FULL)
    )
    assert f"{without:.0f} GiB instead of {with_it:.0f}" in said


def test_flops_by_hand():
    config = configs.pythia_config("12b")
    plan = Plan(config, length=512, r=16)
    assert estimates.step_flops(plan) == 2 * 512 * (3 * 11_324_620_800 + 2 * 50_688 * 5120)
