"""Training as on a card, rehearsed on the CPU: 16 bit, resuming, two cards, overflow, memory that
runs out, pages.
"""

from __future__ import annotations

import gc
import json
import math
import weakref

import open_cells
import pytest
import rehearsal
import torch
import transformers
from transformers import TrainerCallback

from qlora_nb.answer import adapters, evaluate, generate
from qlora_nb.errors import KitError
from qlora_nb.memory import ledger
from qlora_nb.model import data, load
from qlora_nb.model.linear_layers import linear_layers
from qlora_nb.record import runs, seal
from qlora_nb.settings import validate
from qlora_nb.train import checkpoints, retry, trainer

SHORT = {
    "max_steps": 3,
    "train_rows": 48,
    "eval_rows": 6,
    "max_length": 96,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 0,
    "max_new_tokens": 4,
}
T4, AMPERE = (7, 5), (8, 6)
OFF = {T4: 0.007, AMPERE: 0.21}
"""Nats by which a step's loss may differ from float32's: twice the largest seen with seeds 0 to 2
(0.0035, 0.106).
"""


def finetuned(tmp_path, hurt=lambda model: None, settings=None, **values):
    """A run: settings, tokenizer, model, run, result."""
    settings = settings or validate({**SHORT, "output_dir": str(tmp_path), **values})
    tokenizer, base = load.load_tokenizer(settings), load.load_base(settings)
    train, held_out = (
        data.tokenize_rows(rows, tokenizer, settings) for rows in data.load(settings)
    )
    model = open_cells.attach_adapter(base, settings)
    hurt(model)
    run = checkpoints.start(settings, "06_rehearsed")
    result = open_cells.finetune(
        model, tokenizer, train, settings, run, lambda step: None, held_out
    )
    run.finish("interrupted" if result["stopped"] else "done")
    return settings, tokenizer, model, run, result


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    """Losses of the same steps in float32 without any card: the reference, by packing and by the
    head's rounding.
    """

    def losses(packing: bool, head_4bit: bool) -> list[float]:
        folder = tmp_path_factory.mktemp("float32")
        return finetuned(folder, packing=packing, head_4bit=head_4bit)[-1]["losses"]

    known = {}

    def reference(values: dict) -> list[float]:
        key = values.get("packing", False), values.get("head_4bit", False)
        if key not in known:
            known[key] = losses(*key)
        return known[key]

    return reference


CASES = [(T4, name) for name in open_cells.OPTIONS] + [
    (AMPERE, name) for name in ("plain", "packed", "all logits", "every option")
]


@pytest.mark.parametrize(
    ("capability", "name"),
    CASES,
    ids=[f"{'float16' if c == T4 else 'bfloat16'}, {n}" for c, n in CASES],
)
def test_rehearsal_of_a_run_in_16_bit(tmp_path, monkeypatch, in_float32, capability, name):
    """The losses are float32's, to within the rounding of 16 bits (`OFF`)."""
    expected = in_float32(open_cells.OPTIONS[name])
    seen = rehearsal.card(monkeypatch, capability)
    settings, tokenizer, model, run, result = finetuned(
        tmp_path, sample_steps=3, **open_cells.OPTIONS[name]
    )
    assert model.get_base_model().dtype == (torch.float16 if capability == T4 else torch.bfloat16)
    assert seen.scalers == (capability == T4)
    off = max(abs(a - b) for a, b in zip(result["losses"], expected, strict=True))
    print(f"largest difference from float32: {off:.4f} nats")
    assert off < OFF[capability]
    assert runs.status_of(run.folder) == "done"
    # what is measured and asked after training is what a freshly loaded model says
    held_out = data.tokenize_rows(data.load(settings)[1], tokenizer, settings)
    fresh = adapters.load_adapter(load.load_base(settings), result["adapter"])
    assert evaluate.response_loss(model, tokenizer, held_out) == evaluate.response_loss(
        fresh, tokenizer, held_out
    )
    row = generate.row_of(settings.prompts[0])
    answers = [
        generate.answer(some, tokenizer, row, settings, tuned=True).text for some in (model, fresh)
    ]
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("name", ["plain", "every option"])
def test_rehearsal_of_a_float16_run_that_is_stopped_and_resumed(tmp_path, monkeypatch, name):
    rehearsal.card(monkeypatch, T4)
    way = {**open_cells.OPTIONS[name], "max_steps": 5, "save_steps": 2, "lora_dropout": 0.1}
    *_, whole, _, expected = finetuned(tmp_path / "whole", **way)

    def break_off(model):
        _raise_in_pass(model, {4}, KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        finetuned(tmp_path / "cut", break_off, **way)
    capped = torch.amp.GradScaler("cpu").get_scale()
    settings = validate({**SHORT, "output_dir": str(tmp_path / "cut"), **way, "resume": "latest"})
    *_, model, run, result = finetuned(tmp_path, settings=settings)
    assert result["losses"] == expected["losses"]
    resumed = adapter_of(model)
    assert all(torch.equal(resumed[key], value) for key, value in adapter_of(whole).items())
    scaler = torch.load(
        run.folder / "checkpoints" / "checkpoint-4" / "scaler.pt", weights_only=True
    )
    assert scaler["scale"] == capped
    assert scaler["_growth_tracker"] == 4, "the scaler was resumed too"


def test_rehearsal_of_two_visible_cards(tmp_path, monkeypatch):
    """One card trains: rows in a pass, loss and gradient are those of one."""
    rehearsal.card(monkeypatch, T4)
    *_, one, _, expected = finetuned(tmp_path / "one")
    monkeypatch.undo()
    rehearsal.card(monkeypatch, T4, n_cards=2)
    *_, two, _, result = finetuned(tmp_path / "two")
    assert result["losses"] == expected["losses"]
    assert all(torch.equal(adapter_of(two)[key], value) for key, value in adapter_of(one).items())


# ---- the gradient scaler
# ---------------------------------------------------------------------------------------------


def _spoil_gradients(at: set[int], value: float):
    """A hook on one weight of the adapter that makes its gradient `value` in these backward passes
    (1 is the first).
    """

    def hurt(model):
        weight, calls = next(p for n, p in model.named_parameters() if "lora_B" in n), []

        def spoil(gradient):
            calls.append(1)
            return torch.full_like(gradient, value) if len(calls) in at else gradient

        weight.register_hook(spoil)

    return hurt


@pytest.mark.parametrize(
    ("at", "value"), [({1}, math.inf), ({2}, math.nan), ({1, 2}, math.inf)], ids=str
)
def test_rehearsal_of_an_overflow_that_skips_a_step(tmp_path, monkeypatch, capsys, at, value):
    """The scaler halves its scale and leaves the update out: no end of the run, and what is
    measured waits for an update.
    """
    rehearsal.card(monkeypatch, T4)
    _, _, _, run, result = finetuned(
        tmp_path, _spoil_gradients(at, value), max_steps=5, save_steps=5
    )
    assert len(result["losses"]) == 5
    assert runs.status_of(run.folder) == "done"
    assert capsys.readouterr().out.count("the update is skipped") == len(at)
    logged = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["grad_norm"] is None for record in logged] == [
        step in at for step in range(1, 6)
    ]
    scaler = torch.load(
        run.folder / "checkpoints" / "checkpoint-5" / "scaler.pt", weights_only=True
    )
    assert scaler["scale"] == 65536 / 2 ** len(at)
    assert result["held"]["optimizer states"] > 0


def test_rehearsal_of_gradients_that_are_never_finite(tmp_path, monkeypatch):
    rehearsal.card(monkeypatch, T4)
    with pytest.raises(KitError, match=r"grad_norm became inf at step 16"):
        finetuned(
            tmp_path,
            _spoil_gradients(set(range(1, 40)), math.inf),
            max_steps=30,
            per_device_train_batch_size=1,
        )


def test_rehearsal_of_a_float16_loss_that_is_no_number(tmp_path, monkeypatch):
    rehearsal.card(monkeypatch, T4)

    def hurt(model):
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(math.nan)

    with pytest.raises(KitError, match=r"loss.* became nan at step 1"):
        finetuned(tmp_path, hurt)


# ---- memory that runs out
# --------------------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 14.57 GiB"
)


def _raise_in_pass(model, passes: set[int], error: BaseException) -> list[weakref.ref]:
    """Raise in these forward passes of the base (1 is the first); returns weak references to
    activations alive then.
    """
    calls, alive = [], []
    last = list(linear_layers(model.get_base_model()).values())[-1]

    def hurt(module, args, output):
        if not torch.is_grad_enabled():
            return  # the model is tried before the first step
        calls.append(1)
        alive.append(weakref.ref(output))
        if len(calls) in passes:
            raise error

    last.register_forward_hook(hurt)
    return alive


def _raise_in_backward(model, passes: set[int], error: BaseException) -> list[weakref.ref]:
    calls, alive = [], []
    weight = next(
        p for n, p in model.named_parameters() if "lora_A" in n
    )  # the first layer: the end of the backward pass

    def hurt(gradient):
        calls.append(1)
        if len(calls) in passes:
            raise error

    weight.register_hook(hurt)
    last = list(linear_layers(model.get_base_model()).values())[-1]

    def look(module, args, output):
        if torch.is_grad_enabled():
            alive.append(weakref.ref(output))

    last.register_forward_hook(look)
    return alive


def _raise_in_update(monkeypatch, updates: set[int], error: BaseException, after: int = 5) -> None:
    """Raise inside the optimizer's step, when `after` weights have been updated already."""
    from bitsandbytes.optim.optimizer import Optimizer2State

    update, begun, count = Optimizer2State.update_step, [], []

    def hurt(self, group, p, gindex, pindex):
        if not pindex and not gindex:
            begun.append(1)
            count.clear()
        count.append(1)
        if len(begun) in updates and len(count) == after:
            raise error
        return update(self, group, p, gindex, pindex)

    monkeypatch.setattr(Optimizer2State, "update_step", hurt)


def _hurt(monkeypatch, place: str, at: set[int], error: BaseException, alive: list):
    def hurt(model):
        if place == "forward":
            alive.append(_raise_in_pass(model, at, error))
        elif place == "backward":
            alive.append(_raise_in_backward(model, at, error))
        else:
            _raise_in_update(monkeypatch, at, error)

    return hurt


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses and adapter of four steps in float32 that nothing befell."""
    *_, model, _, result = finetuned(
        tmp_path_factory.mktemp("undisturbed"), max_steps=4, compute_dtype="float32"
    )
    return result["losses"], adapter_of(model)


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("place", "at", "save_steps"),
    [
        ("forward", {1}, 0),
        ("forward", {2, 3}, 1),
        ("backward", {3}, 0),
        ("update", {1}, 0),
        ("update", {2, 3}, 0),
        ("update", {3}, 1),
    ],
    ids=str,
)
def test_rehearsal_of_memory_that_runs_out_with_many_rows(
    tmp_path, monkeypatch, undisturbed, place, at, save_steps
):
    """The same rows are trained, no update counts half, no step is recorded twice; sums in another
    order differ a little.
    """
    rehearsal.card(monkeypatch, AMPERE)
    way = {"max_steps": 4, "compute_dtype": "float32", "save_steps": save_steps}
    alive, still = [], []
    fewer = retry.with_fewer_rows

    def look(settings):
        """Called when a step is to be done again: what it held must be gone by then."""
        still.extend(
            reference for references in alive for reference in references if reference() is not None
        )
        return fewer(settings)

    monkeypatch.setattr(retry, "with_fewer_rows", look)
    hurt = _hurt(monkeypatch, place, at, torch.OutOfMemoryError(OUT_OF_MEMORY), alive)
    _, _, model, run, result = finetuned(tmp_path / "hurt", hurt, **way)
    assert not still
    losses, expected_adapter = undisturbed
    assert result["losses"] == pytest.approx(losses, rel=1e-4)
    found = adapter_of(model)
    far = sum((found[k] - v).square().sum() for k, v in expected_adapter.items()).sqrt()
    assert far < 1e-3 * sum(v.square().sum() for v in expected_adapter.values()).sqrt()
    logged = [
        json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert logged == [1, 2, 3, 4]


def test_rehearsal_of_memory_that_runs_out_in_an_update_with_one_row(tmp_path, monkeypatch):
    """Nothing of the half update is kept: the run is resumed from the step before and ends as if
    nothing had happened.
    """
    rehearsal.card(monkeypatch, AMPERE)
    way = {
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "compute_dtype": "float32",
        "save_steps": 1,
    }
    *_, whole, _, expected = finetuned(tmp_path / "whole", **way)
    with monkeypatch.context() as hurt:
        _raise_in_update(hurt, {3}, torch.OutOfMemoryError(OUT_OF_MEMORY))
        with pytest.raises(KitError, match="memory ran out"):
            finetuned(tmp_path / "cut", **way)
    [run] = (tmp_path / "cut" / "tiny").iterdir()
    assert seal.newest_checkpoint(run).name == "checkpoint-2"
    settings = validate({**SHORT, "output_dir": str(tmp_path / "cut"), **way, "resume": "latest"})
    *_, model, _, result = finetuned(tmp_path, settings=settings)
    assert result["losses"] == expected["losses"]
    assert all(
        torch.equal(adapter_of(model)[key], value) for key, value in adapter_of(whole).items()
    )


ALLOCATORS = {
    "torch": torch.OutOfMemoryError(OUT_OF_MEMORY),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "driver": RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    ),
    "host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory."
    ),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("place", "who"),
    [
        ("forward", "torch"),
        ("backward", "torch"),
        ("forward", "cuBLAS"),
        ("backward", "driver"),
        ("forward", "host"),
    ],
)
def test_rehearsal_of_memory_that_runs_out_with_one_row(tmp_path, monkeypatch, place, who):
    """The refusal names an option; although a notebook keeps the error, the step's activations and
    gradients are free.
    """
    seen = rehearsal.card(monkeypatch, AMPERE)
    alive, kept, error = [], [], ALLOCATORS[who]

    def hurt(model):
        kept.append(model)
        _hurt(monkeypatch, place, {2}, error, alive)(model)

    with pytest.raises(KitError, match=r"memory ran out.*held at that moment") as caught:
        finetuned(tmp_path, hurt, per_device_train_batch_size=1, compute_dtype="float32")
    gc.collect()
    [activations] = alive
    assert len(activations) == 2
    assert all(reference() is None for reference in activations)
    assert all(p.grad is None for p in kept[0].parameters())
    assert caught.value.__cause__ is error
    assert seen.emptied


def test_rehearsal_another_error_is_no_lack_of_memory(tmp_path, monkeypatch):
    rehearsal.card(monkeypatch, AMPERE)

    def hurt(model):
        _raise_in_pass(model, {1}, RuntimeError("expected m1 and m2 to have the same dtype"))

    with pytest.raises(RuntimeError, match="same dtype"):
        finetuned(tmp_path, hurt)


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_rehearsal_states_are_paged_again_after_a_resume_and_a_retry(tmp_path, monkeypatch, optim):
    """bitsandbytes pages from 100,000 numbers on: r=192 on this model has such. No page is asked
    for twice in one process.
    """
    rehearsal.card(monkeypatch, AMPERE)
    pages = rehearsal.PageManager(monkeypatch)
    way = {"r": 192, "optim": optim, "save_steps": 2, "max_steps": 4, "compute_dtype": "float32"}
    counted = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            counted.append(rehearsal.paged_states(optimizer))

    make = trainer.QLoRATrainer.make

    def make_counting(self, *args, **options):
        make(self, *args, **options)
        self.add_callback(Count())

    monkeypatch.setattr(trainer.QLoRATrainer, "make", make_counting)
    *_, whole, _, expected = finetuned(tmp_path / "whole", **way)
    should = counted[0][1]
    assert should
    assert counted == [(should, should)] * 4
    assert len(pages.asked) == should

    counted.clear()
    pages.asked.clear()

    def hurt(model):
        return _raise_in_pass(model, {3}, torch.OutOfMemoryError(OUT_OF_MEMORY))

    *_, again = finetuned(tmp_path / "retry", hurt, **way)
    assert counted == [(should, should)] * 4
    assert len(pages.asked) == should, "the pages of before are used again"
    assert again["losses"] == pytest.approx(expected["losses"], rel=1e-4)

    counted.clear()
    pages.asked.clear()
    with pytest.raises(KeyboardInterrupt):
        finetuned(
            tmp_path / "cut", lambda model: _raise_in_pass(model, {4}, KeyboardInterrupt()), **way
        )
    counted.clear()
    pages.asked.clear()
    settings = validate({**SHORT, "output_dir": str(tmp_path / "cut"), **way, "resume": "latest"})
    *_, resumed, _, result = finetuned(tmp_path, settings=settings)
    assert counted == [(should, should)] * 2
    assert len(pages.asked) == should
    assert result["losses"] == expected["losses"]
    assert all(
        torch.equal(adapter_of(resumed)[key], value) for key, value in adapter_of(whole).items()
    )


@pytest.mark.parametrize("place", ["answer_all", "response_loss"])
def test_rehearsal_of_memory_that_runs_out_in_a_look_at_the_model(
    tmp_path, monkeypatch, capsys, place
):
    """The look is left out; no step is done again, lost from the record or counted twice, and the
    next look comes.
    """
    rehearsal.card(monkeypatch, AMPERE)
    way = {"max_steps": 4, "compute_dtype": "float32", "lora_dropout": 0.1}
    *_, whole, _, expected = finetuned(tmp_path / "whole", **way)
    module = generate if place == "answer_all" else evaluate
    look, calls = getattr(module, place), []

    def hurt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return look(*args, **kwargs)

    monkeypatch.setattr(module, place, hurt)
    _, _, model, _, result = finetuned(tmp_path / "hurt", sample_steps=1, **way)
    assert result["losses"] == expected["losses"]
    assert all(
        torch.equal(adapter_of(model)[key], value) for key, value in adapter_of(whole).items()
    )
    assert list(result["held_out"]) == [1, 3, 4]
    said = capsys.readouterr().out
    assert said.count("the look is left out") == 1
    assert "done again" not in said


@pytest.mark.parametrize("rows", [4, 1])
def test_rehearsal_of_memory_that_runs_out_before_the_first_step(tmp_path, monkeypatch, rows):
    """As while a checkpoint's states are read: nothing smaller can be tried, and it is said."""
    rehearsal.card(monkeypatch, AMPERE)

    def hurt(*args, **options):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(transformers.Trainer, "train", hurt)
    with pytest.raises(KitError, match=r"memory ran out .*held at that moment"):
        finetuned(tmp_path, per_device_train_batch_size=rows)


def test_rehearsal_of_memory_that_runs_out_after_the_update(tmp_path, monkeypatch):
    """All weights are updated but the step is not counted yet: it is not done twice."""
    rehearsal.card(monkeypatch, AMPERE)
    way = {"max_steps": 4, "compute_dtype": "float32", "save_steps": 1}
    *_, expected = finetuned(tmp_path / "whole", **way)
    measure, calls = ledger.measure, []

    def hurt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return measure(*args, **kwargs)

    monkeypatch.setattr(ledger, "measure", hurt)
    *_, result = finetuned(tmp_path / "hurt", **way)
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_rehearsal_of_memory_that_runs_out_keeps_the_finished_steps(tmp_path, monkeypatch):
    """With one row there is no smaller pass; what was finished is saved, and the optimizer is not
    kept alive by the refusal.
    """
    rehearsal.card(monkeypatch, AMPERE)
    made = []
    create = trainer.QLoRATrainer.create_optimizer

    def create_noting(self, model=None):
        optimizer = create(self, model)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(trainer.QLoRATrainer, "create_optimizer", create_noting)

    def hurt(model):
        _raise_in_pass(model, {4}, torch.OutOfMemoryError(OUT_OF_MEMORY))

    with pytest.raises(KitError, match="memory ran out") as kept:
        finetuned(
            tmp_path,
            hurt,
            per_device_train_batch_size=1,
            max_steps=5,
            save_steps=50,
            compute_dtype="float32",
        )
    gc.collect()
    assert kept.value.__traceback__
    assert made[0]() is None
    [run] = (tmp_path / "tiny").iterdir()
    assert seal.newest_checkpoint(run).name == "checkpoint-3"
