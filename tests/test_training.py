"""Training, saving, answering: the engine of notebooks 06 and 07 on the pocket model."""

import json
import math
import os
import signal
import threading

import open_cells
import pytest
import torch
import transformers
from accelerate import PartialState
from peft import PeftModel

from qlora_nb.answer import adapters, evaluate, generate
from qlora_nb.errors import KitError
from qlora_nb.memory import ledger, preflight
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import batching, chunked_loss, data, device, fetch, load, probes
from qlora_nb.model.linear_layers import linear_layers
from qlora_nb.record import files, runs, seal
from qlora_nb.settings import validate
from qlora_nb.train import attach, callbacks, checkpoints, trainer

SHORT = {"max_steps": 6, "train_rows": 96, "eval_rows": 24, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run: settings, tokenizer, model, encoded rows, run, result, and the steps that were
    reported.
    """
    settings = validate({**SHORT, "output_dir": str(tmp_path_factory.mktemp("runs"))})
    tokenizer, model = load.load_tokenizer(settings), load.load_base(settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    model = open_cells.attach_adapter(model, settings)
    steps = []
    run = runs.Run(settings, "06_finetune_pythia_12b")
    result = open_cells.finetune(model, tokenizer, rows, settings, run, steps.append)
    return settings, tokenizer, model, rows, run, result, steps


def test_only_the_adapter_trains_and_it_covers_every_linear_layer(trained):
    _, _, model, *_ = trained
    training_names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in training_names)
    assert len(training_names) == 2 * len(linear_layers(load.load_base(validate({}))))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_loss_falls_and_every_step_is_reported(trained):
    _, _, _, _, run, result, steps = trained
    assert len(steps) == len(result["losses"]) == SHORT["max_steps"]
    assert result["losses"][-1] < result["losses"][0]
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [s["loss"] for s in logged] == result["losses"]
    assert steps[-1]["seconds_left"] == 0


def test_manifest_says_done_and_names_everything(trained):
    manifest = json.loads((trained[4].folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["parameters"]["max_steps"] == SHORT["max_steps"]
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["hardware"]["n_cores"] >= 1


def test_adapter_on_disk_is_the_trained_one_and_plain_peft_loads_it(trained):
    settings, _, model, rows, _, result, _ = trained
    ids = torch.tensor([rows[0]["input_ids"]])
    assert attach.saved_adapter_difference(model, result["adapter"], ids) == 0
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        theirs = (
            PeftModel.from_pretrained(load.load_base(settings), str(result["adapter"]))
            .eval()(input_ids=ids)
            .logits
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_changed_file_is_noticed(trained, tmp_path):
    _, _, model, rows, _, result, _ = trained
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(result["adapter"], tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, folder / "adapter_model.safetensors")
    assert (
        attach.saved_adapter_difference(model, folder, torch.tensor([rows[0]["input_ids"]])) > 1e-4
    )


def test_response_loss_is_cross_entropy_over_labelled_tokens(trained):
    _, tokenizer, model, rows, *_ = trained
    total, n = 0.0, 0
    with torch.no_grad():
        for row in rows.select(range(12)):  # one by one, without padding, by the definition
            log = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for at, label in enumerate(row["labels"]):
                if label != chunked_loss.IGNORED:
                    total, n = total - log[at - 1, label].item(), n + 1
    assert evaluate.response_loss(model, tokenizer, rows.select(range(12))) == pytest.approx(
        total / n, rel=1e-4
    )


@pytest.mark.fault(7, 8)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": "query_key_value,q_proj"}, "q_proj.*query_key_value"),
        ({"target_modules": "lm_head"}, "lm_head"),
        ({"target_modules": "all-linear,dense"}, "all-linear alone"),
        ({"r": 500}, "1 to 192"),
    ],
)
def test_wrong_targets_and_ranks_are_refused(values, message):
    settings = validate(values)
    with pytest.raises(KitError, match=message):
        open_cells.attach_adapter(load.load_base(settings), settings)


def fresh(tmp_path, **values):
    settings = validate({**SHORT, "output_dir": str(tmp_path), **values})
    tokenizer = load.load_tokenizer(settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    return settings, tokenizer, open_cells.attach_adapter(load.load_base(settings), settings), rows


@pytest.mark.fault(25)
def test_nan_stops_at_once_and_is_named(tmp_path):
    settings, tokenizer, model, rows = fresh(tmp_path)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    steps = []
    run = runs.Run(settings, "nan")
    with pytest.raises(KitError, match="became nan at step 1"):
        open_cells.finetune(model, tokenizer, rows, settings, run, steps.append)
    assert len(steps) == 1
    assert runs.status_of(run.folder) == "failed"
    assert not list(run.folder.rglob("checkpoint-*"))


@pytest.mark.fault(25)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_leaves_the_last_good_checkpoint(tmp_path, bad):
    """It comes in the backward pass of step 3 alone, whose checkpoint is due: what is resumed is
    step 2.
    """
    settings, tokenizer, model, rows = fresh(tmp_path, save_steps=1, gradient_accumulation_steps=1)
    weight, calls = next(p for n, p in model.named_parameters() if "lora_B" in n), []

    def spoil(gradient):
        calls.append(1)
        return gradient * bad if len(calls) == 3 else gradient

    weight.register_hook(spoil)
    run = runs.Run(settings, "06_bad")
    with pytest.raises(KitError, match=r"grad_norm became (nan|inf) at step 3"):
        open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)
    assert runs.status_of(run.folder) == "failed"
    assert seal.newest_checkpoint(run.folder).name == "checkpoint-2"
    resumed = checkpoints.start(settings.replace(resume="latest"), "06_bad")
    result = open_cells.finetune(model, tokenizer, rows, settings, resumed, lambda step: None)
    assert len(result["losses"]) == settings.max_steps
    assert all(map(math.isfinite, result["losses"]))


@pytest.mark.fault(22, 36)
def test_a_cell_that_was_stopped_goes_on_when_run_again(tmp_path, capsys):
    """■ and the same cell once more, in one kernel: the same bits as never stopped. A run that is
    done is not gone on with.
    """
    ended = {}
    for stops in (False, True):
        settings, tokenizer, model, rows = fresh(tmp_path / str(stops), lora_dropout=0.1)

        def asked(step):
            return os.kill(os.getpid(), signal.SIGINT) if step["step"] == 2 and stops else None  # noqa: B023

        run = checkpoints.start(settings, "06_cell")
        result = open_cells.finetune(model, tokenizer, rows, settings, run, asked)
        if stops:
            written = run.folder / "manifest.json"
            manifest = json.loads(written.read_text())
            # as another process of the same number has left it, and a copy with today's date
            written.write_text(json.dumps(manifest | {"started": "2001-09-09T01:46:40Z"}))
            assert not checkpoints._stopped_here(run.folder, settings)
            written.write_text(json.dumps(manifest))
            assert not checkpoints._stopped_here(run.folder, settings.replace(r=4))
            again = checkpoints.start(settings, "06_cell")
            assert again.folder == run.folder
            assert "resuming" in capsys.readouterr().out
            run, result = (
                again,
                open_cells.finetune(model, tokenizer, rows, settings, again, lambda step: None),
            )
        run.finish("done")
        weights = [p.detach() for n, p in sorted(model.named_parameters()) if p.requires_grad]
        ended[stops] = result["losses"], weights
    assert ended[True][0] == ended[False][0]
    assert all(map(torch.equal, ended[True][1], ended[False][1]))
    other = checkpoints.start(settings, "06_cell")
    assert other.folder != run.folder
    with pytest.raises(KitError, match="trained before") as refused:
        open_cells.finetune(model, tokenizer, rows, settings, other, lambda step: None)
    assert "get_peft_model once more" in refused.value.remedy
    once_more = open_cells.attach_adapter(model, settings)
    assert once_more.get_nb_trainable_parameters()[0] == sum(w.numel() for w in weights)
    first = open_cells.finetune(
        once_more, tokenizer, rows, settings, runs.Run(settings, "06_cell"), lambda step: None
    )
    assert first["losses"] == ended[False][0]


@pytest.mark.fault(22)
def test_interrupt_finishes_the_step_and_saves(tmp_path):
    settings, tokenizer, model, rows = fresh(tmp_path)
    run = runs.Run(settings, "stop")

    def stop_at_two(step):
        return os.kill(os.getpid(), signal.SIGINT) if step["step"] == 2 else None

    result = open_cells.finetune(model, tokenizer, rows, settings, run, stop_at_two)
    assert result["stopped"]
    assert 2 <= len(result["losses"]) <= 3
    assert (result["adapter"] / "adapter_model.safetensors").stat().st_size > 10_000


def test_same_seed_same_losses(tmp_path):
    losses = []
    for _ in range(2):
        settings, tokenizer, model, rows = fresh(tmp_path, max_steps=3, lora_dropout=0.1)
        losses.append(
            open_cells.finetune(
                model, tokenizer, rows, settings, runs.Run(settings, "seed"), lambda s: None
            )["losses"]
        )
    assert losses[0] == losses[1]


def test_baselines_know_nothing():
    train, test = (list(rows) for rows in data.load(validate({})))
    assert evaluate.exact_match([r["output"] for r in test], test)["all"] == 1.0
    for baseline in (evaluate.majority_baseline, evaluate.copy_baseline):
        assert evaluate.exact_match(baseline(train, test), test)["all"] <= 0.20


# --- what is refused leaves everything as it was ---

QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def everything_in(folder):
    """Every file's bytes by name; a lock holds nothing."""
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.fault(43)
def test_a_refusal_changes_no_record_and_the_run_that_trained_is_done(tmp_path, monkeypatch):
    settings, tokenizer, model, rows = fresh(tmp_path, **QUICK)

    def begin():
        return checkpoints.start(settings, "06_finetune_pythia_12b")

    def train(model, run):
        return open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)

    result = train(model, begin())
    [folder] = (tmp_path / "tiny").iterdir()
    assert runs.status_of(folder) == "done"
    assert result["run"].folder == folder
    before = everything_in(tmp_path)

    refused = {
        "was trained before": lambda: train(model, begin()),
        "this run is over": lambda: train(model, result["run"]),
    }
    refused["has no adapter"] = lambda: attach.saved_adapter_difference(
        load.load_base(settings), folder / "adapter", None
    )
    for said, cell in refused.items():
        with pytest.raises(KitError, match=said):
            cell()
        assert everything_in(tmp_path) == before
        assert list((tmp_path / "tiny").iterdir()) == [folder]
    loaded = adapters.load_adapter(load.load_base(settings), folder / "adapter")
    for wrong in (load.load_base(settings), loaded, None):
        with pytest.raises(KitError, match=r"no adapter that can be trained.*get_peft_model first"):
            train(wrong, begin())
        assert list((tmp_path / "tiny").iterdir()) == [folder]

    model = open_cells.attach_adapter(model, settings)

    def no_room(*given):
        raise KitError("no room")

    for module, name in ((fetch, "require_room"), (probes, "before_training")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, no_room)
            with pytest.raises(KitError, match="no room"):
                train(model, begin())
    assert everything_in(tmp_path) == before
    assert runs.latest_done(settings, "06_finetune_pythia_12b") == folder
    result["run"].add(loss_after=1.5)
    again = json.loads((folder / "manifest.json").read_text())
    assert (again["status"], again["metrics"]["loss_after"]) == ("done", 1.5)
    assert again["ended"] == json.loads(before[folder / "manifest.json"])["ended"]


@pytest.mark.fault(43)
def test_a_refused_resume_leaves_the_stopped_run_as_it_is(tmp_path):
    settings, tokenizer, model, rows = fresh(tmp_path, **QUICK | {"max_steps": 4})

    def stop(step):
        return os.kill(os.getpid(), signal.SIGINT) if step["step"] == 2 else None

    run = checkpoints.start(settings, "06_stopped")
    assert open_cells.finetune(model, tokenizer, rows, settings, run, stop)["stopped"]
    before = everything_in(tmp_path)
    with pytest.raises(KitError, match="training rows was"):
        open_cells.finetune(
            model,
            tokenizer,
            rows.select(range(4)),
            settings,
            checkpoints.start(settings, "06_stopped"),
            lambda step: None,
        )
    assert everything_in(tmp_path) == before
    assert runs.status_of(run.folder) == "interrupted"
    latest = settings.replace(resume="latest")
    with files.sole_writer(run.folder), pytest.raises(KitError, match="another process writes"):
        open_cells.finetune(
            model,
            tokenizer,
            rows,
            latest,
            checkpoints.start(latest, "06_stopped"),
            lambda step: None,
        )
    assert everything_in(tmp_path) == before
    result = open_cells.finetune(
        model,
        tokenizer,
        rows,
        settings,
        checkpoints.start(settings, "06_stopped"),
        lambda step: None,
    )
    assert len(result["losses"]) == 4
    assert runs.status_of(run.folder) == "done"
    run.add(late=1)  # by what was left of the stopped run's cell
    assert runs.status_of(run.folder) == "done"


@pytest.mark.fault(43)
def test_a_run_without_checkpoints_is_not_gone_on_with_by_a_trained_adapter(tmp_path):
    settings, tokenizer, model, rows = fresh(tmp_path, **QUICK, resume="latest", warmup_steps=0)

    def fail(step):
        raise RuntimeError("in the midst of it")

    with pytest.raises(RuntimeError):
        open_cells.finetune(
            model, tokenizer, rows, settings, checkpoints.start(settings, "06_x"), fail
        )
    assert not model.training
    [folder] = (tmp_path / "tiny").iterdir()
    (folder / "checkpoints").mkdir(exist_ok=True)
    with pytest.raises(KitError, match="trained before"):
        open_cells.finetune(
            model, tokenizer, rows, settings, checkpoints.start(settings, "06_x"), lambda step: None
        )
    assert runs.status_of(folder) == "failed"


@pytest.mark.fault(56)
def test_a_launcher_of_one_process_changes_nothing(tmp_path, monkeypatch):
    """As torchrun starts a process alone, with an address that nobody answers at: no process group
    is set up.
    """
    plain, *_ = finetuned(tmp_path, **QUICK)
    launched = {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "192.0.2.1",
        "MASTER_PORT": "29511",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    PartialState._reset_state()
    preflight.refuse_many_processes()
    assert finetuned(tmp_path, **QUICK)[0] == plain
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    folders = sorted((tmp_path / "tiny").iterdir())
    with pytest.raises(KitError, match="one of several processes"):
        preflight.refuse_what_cannot_run(validate({}))
    assert sorted((tmp_path / "tiny").iterdir()) == folders


@pytest.mark.fault(44)
def test_before_is_the_base_whether_or_not_an_adapter_is_on_it(trained):
    """Against transformers' own loss on the base as it was loaded."""
    settings, tokenizer, model, rows, *_ = trained
    some, plain = rows.select(range(8)), load.load_base(settings)
    total = n = 0.0
    with torch.no_grad():
        for row in some:
            labels = torch.tensor([row["labels"]])
            found = (labels[:, 1:] != chunked_loss.IGNORED).sum().item()
            total += (
                plain(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item() * found
            )
            n += found
    tuned = evaluate.response_loss(model, tokenizer, some)
    for measured in (plain, model, open_cells.attach_adapter(load.load_base(settings), settings)):
        with adapters.base_or_tuned(measured, tuned=False):
            assert evaluate.response_loss(measured, tokenizer, some) == pytest.approx(
                total / n, rel=1e-5
            )
    assert tuned < 0.99 * total / n
    assert evaluate.response_loss(model, tokenizer, some) == tuned, "the adapter is on again"
    with pytest.raises(KitError, match=r"no adapter .*attaches or loads the adapter first"):
        adapters.base_or_tuned(plain, tuned=True)


# --- answering ---------------------------------------------------------------


def test_batched_answers_equal_single_ones(trained):
    settings, tokenizer, model, *_ = trained
    rows = list(data.load(settings)[1])
    together = generate.answer_all(model, tokenizer, rows, settings, batch=7)
    assert together == [
        generate.answer(model, tokenizer, row, settings, tuned=True).text for row in rows
    ]


def test_base_is_the_model_without_adapter(trained):
    settings, tokenizer, model, *_ = trained
    row = dict(data.load(settings)[1][0])
    plain = generate.answer_all(load.load_base(settings), tokenizer, [row], settings)[0]
    assert generate.answer(model, tokenizer, row, settings, tuned=False).text == plain
    [first] = generate.next_tokens_along(model, tokenizer, row, settings, "")
    _, base_top, tuned_top, divergence = first
    assert divergence > 0
    assert base_top != tuned_top


def test_along_an_answer_the_first_position_is_the_next_token(trained):
    settings, tokenizer, model, *_ = trained
    row = dict(data.load(settings)[1][0])
    found = generate.next_tokens_along(model, tokenizer, row, settings, "By the river.")
    [first] = generate.next_tokens_along(model, tokenizer, row, settings, "", k=5)
    _, base, tuned, bits = first
    assert found[0][3] == pytest.approx(bits, abs=1e-3)
    assert [t for t, _ in found[0][1]] == [t for t, _ in base[:3]]
    assert [p for _, p in found[0][2]] == pytest.approx([p for _, p in tuned[:3]], abs=1e-4)
    assert found[-1][0] == "(end)"
    assert len(found) >= 2
    assert all(step[3] >= -1e-4 for step in found)


def test_stop_ends_an_answer(trained):
    settings, tokenizer, model, *_ = trained
    stop = threading.Event()
    long = settings.replace(max_new_tokens=300)
    seen = 0
    for _ in generate.stream(
        model, tokenizer, {"instruction": "Go on.", "input": ""}, long, tuned=False, stop=stop
    ):
        seen += 1
        if seen == 3:
            stop.set()
    assert seen < 30


@pytest.mark.fault(31)
def test_sampling_needs_temperature_and_repeats_with_the_seed(trained):
    settings, tokenizer, model, *_ = trained
    hot = settings.replace(temperature=1.5, top_p=1.0)
    row = {"instruction": "Where is Anna?", "input": "Anna went to the park."}
    said = {
        generate.answer(model, tokenizer, row, hot.replace(seed=s), tuned=False).text
        for s in (1, 1, 2, 3)
    }
    assert 2 <= len(said) <= 3


@pytest.mark.fault(29)
def test_prompts(trained):
    settings, tokenizer, model, *_ = trained
    assert generate.row_of("Do it.") == {"instruction": "Do it.", "input": ""}
    with pytest.raises(KitError, match="prompt is empty"):
        generate.row_of("  \n ")
    with pytest.raises(KitError, match="shorten the prompt"):
        generate.answer(
            model, tokenizer, {"instruction": "word " * 600, "input": ""}, settings, tuned=True
        )
    odd = generate.row_of("<script>alert(1)</script> 😀 \x1b[31m\nnaïve")
    assert isinstance(generate.answer(model, tokenizer, odd, settings, tuned=True).text, str)


def test_finding_adapters(trained, tmp_path):
    settings, *_, run, result, _ = trained
    assert adapters.find_adapter(settings)[0] == result["adapter"]
    empty = validate({"output_dir": str(tmp_path)})
    folder, where_from = adapters.find_adapter(empty)
    assert "shipped with the pocket model" in where_from
    with pytest.raises(KitError, match="not an adapter folder"):
        adapters.find_adapter(validate({"adapter": str(tmp_path)}))
    (run.folder / "manifest.json").write_text(json.dumps({"status": "failed"}))
    assert adapters.find_adapter(settings)[0] == folder


@pytest.mark.fault(32)
def test_adapter_for_another_model_is_refused(trained, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    other = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=1088,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
        )
    )
    with pytest.raises(KitError, match="does not fit"):
        adapters.load_adapter(other, trained[5]["adapter"])


@pytest.mark.fault(14)
def test_damaged_model_folder_is_refused(tmp_path):
    import shutil

    from qlora_nb.pocket import MODEL_DIR

    folder = shutil.copytree(MODEL_DIR, tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(KitError, match="fetch the model again"):
        load.load_base(validate({"model_id": str(folder)}))


# --- the same run in other ways ---


def finetuned(tmp_path, before=lambda model: None, held_out=None, **values):
    """Losses and adapter of a short run, and what `finetune` gave back; `before` may hurt the model
    first.
    """
    settings, tokenizer, model, rows = fresh(tmp_path, **values)
    before(model)
    result = open_cells.finetune(
        model, tokenizer, rows, settings, runs.Run(settings, "ways"), lambda step: None, held_out
    )
    return (
        result["losses"],
        torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]),
        result,
    )


def test_four_passes_of_one_row_are_one_pass_of_four(tmp_path):
    """The whole training, up to the order in which float32 numbers are added."""
    one_by_four = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    four_by_one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    losses, adapters, _ = zip(
        *(finetuned(tmp_path, **way) for way in (one_by_four, four_by_one)), strict=True
    )
    assert losses[0] == pytest.approx(
        losses[1], rel=2e-6
    )  # ten times the largest difference of seeds 0 to 4
    assert (adapters[0] - adapters[1]).norm() < 2.5e-5 * adapters[0].norm()  # likewise


def out_of_memory_in_pass(numbers):
    def hurt(model):
        forward, calls = model.get_base_model().forward, []

        def hurt_inside(*args, **kwargs):
            training_now = torch.is_grad_enabled()  # not a probe before the first step
            calls.extend([1] * training_now)
            if training_now and len(calls) in numbers:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 …"
                )
            return forward(*args, **kwargs)

        model.get_base_model().forward = hurt_inside

    return hurt


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    "passes", [{1}, {4}, {4, 5}], ids=["in the first step", "in the fourth", "twice"]
)
def test_out_of_memory_halves_a_pass_and_keeps_the_step(tmp_path, passes, capsys):
    way = {"per_device_train_batch_size": 4, "max_steps": 6}
    losses, adapter, _ = finetuned(tmp_path / "whole", **way)
    again, other, _ = finetuned(tmp_path / "hurt", out_of_memory_in_pass(passes), **way)
    assert again == pytest.approx(losses, rel=2e-6)  # as above: the same rows in every step
    assert (adapter - other).norm() < 2.5e-5 * adapter.norm()
    said = capsys.readouterr().out
    assert "done again in 2 passes of 2" in said
    assert ("done again in 4 passes of 1" in said) == (len(passes) == 2)
    [run] = (tmp_path / "hurt" / "tiny").iterdir()
    assert [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault(12)
def test_out_of_memory_with_one_row_stops_with_a_lever(tmp_path):
    with pytest.raises(KitError, match=r"memory ran out.*held at that moment"):
        finetuned(tmp_path, out_of_memory_in_pass({3}), per_device_train_batch_size=1)
    [run] = (tmp_path / "tiny").iterdir()
    assert runs.status_of(run) == "failed"


def test_samples_are_printed_and_change_nothing(tmp_path, capsys):
    plain, adapter, _ = finetuned(tmp_path, max_steps=4, lora_dropout=0.1)
    assert "asked" not in capsys.readouterr().out
    watched, same, _ = finetuned(tmp_path, max_steps=4, lora_dropout=0.1, sample_steps=2)
    said = capsys.readouterr().out
    assert watched == plain
    assert torch.equal(adapter, same)
    assert "step 2, asked 'Where is Anna?': '" in said
    assert "step 4, asked" in said
    assert "step 3" not in said


@pytest.mark.parametrize("loss_chunk", [0, 64])
def test_held_out_loss_on_the_way_is_the_models_own_and_changes_nothing(tmp_path, loss_chunk):
    way = {"max_steps": 4, "lora_dropout": 0.1, "loss_chunk": loss_chunk}
    settings = validate({**way, "eval_rows": 12})
    tokenizer = load.load_tokenizer(settings)
    held_out = data.tokenize_rows(data.load(settings)[1], tokenizer, settings)
    plain, adapter, without = finetuned(tmp_path / "plain", **way)
    assert without["held_out"] == {}
    watched, same, result = finetuned(
        tmp_path / "watched", held_out=held_out, sample_steps=2, **way
    )
    assert watched == plain
    assert torch.equal(adapter, same)
    assert list(result["held_out"]) == [2, 4]
    [run] = (tmp_path / "watched" / "tiny").iterdir()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["held_out_loss"]) for r in logged if "held_out_loss" in r] == list(
        result["held_out"].items()
    )
    model = adapters.load_adapter(load.load_base(settings), result["adapter"])
    assert evaluate.response_loss(model, tokenizer, held_out) == pytest.approx(
        result["held_out"][4], rel=1e-6
    )


def test_what_was_logged_up_to_a_step_stays(tmp_path):
    run = runs.Run(validate({"output_dir": str(tmp_path)}), "06_test")
    kept = [{"step": 1, "loss": 2.0}, {"step": 2, "held_out_loss": 1.5}, {"step": 2, "loss": 1.0}]
    for record in [*kept, {"step": 3, "loss": 0.5}, {"step": 3, "held_out_loss": 0.4}]:
        run.log(record)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # killed while writing
    assert run.truncate_log(2) == run.truncate_log(2) == kept


def test_packed_rows_train(tmp_path):
    losses, _, result = finetuned(
        tmp_path, packing=True, per_device_train_batch_size=2, max_steps=8, warmup_steps=0
    )
    assert sum(losses[4:]) < sum(losses[:4])
    rows, tokens, _ = result["shape"]
    assert rows == 2
    assert 150 < tokens <= 192


def test_levers_at_both_ends_train_and_answer(tmp_path):
    way = {
        "head_4bit": True,
        "embedding_on_cpu": True,
        "max_steps": 8,
        "sample_steps": 8,
        "warmup_steps": 0,
    }
    losses, _, result = finetuned(tmp_path, **way)
    assert sum(losses[4:]) < sum(losses[:4])
    assert ledger.predict(plan_of(validate(way)))["4-bit codes"] == result["held"]["4-bit codes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_arithmetic_by_hardware(monkeypatch, dtype):
    """A scaler for float16 on a GPU alone, and no second copy of the adapter with it."""
    settings, seen = validate({"compute_dtype": dtype}), {}

    def note(**given):
        seen.update(given)

    monkeypatch.setattr(transformers, "TrainingArguments", note)
    monkeypatch.setattr(device, "compute_dtype", lambda choice: getattr(torch, dtype))
    for cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        open_cells.arguments(settings)
        assert seen["fp16"] == (cuda and dtype == "float16")
        assert seen["use_cpu"] == (not cuda)
        assert "bf16" not in seen
    assert not torch.is_autocast_cache_enabled()


def test_rows_are_trained_in_the_order_in_which_they_come(tmp_path):
    settings, tokenizer, model, rows = fresh(tmp_path)
    collate = batching.collator(tokenizer)
    batches = callbacks.CountingCollator(tokenizer)
    run = runs.Run(settings, "06_order")
    watched = [
        callbacks.Watch(print, batches),
        callbacks.MeasureOneStep(batches),
        callbacks.Sample(tokenizer, settings, None),
    ]
    made = trainer.QLoRATrainer(
        run,
        settings,
        model=model,
        args=open_cells.arguments(settings),
        train_dataset=rows,
        data_collator=collate,
        callbacks=watched,
    )
    n = settings.per_device_train_batch_size
    assert len(rows) > n
    for number, batch in enumerate(made.get_train_dataloader()):
        expected = collate([rows[i] for i in range(number * n, min(len(rows), (number + 1) * n))])
        assert torch.equal(batch["input_ids"], expected["input_ids"])


def test_tensorboard_is_asked_for_and_named_if_it_is_not_there(monkeypatch):
    settings = validate({"tensorboard": True})
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(KitError, match="tensorboard is not installed"):
        preflight.refuse_what_cannot_run(settings)
    monkeypatch.setattr(preflight, "find_spec", lambda name: True)
    preflight.refuse_what_cannot_run(settings)
    assert open_cells.arguments(settings).report_to == ["tensorboard"]
    assert open_cells.arguments(validate({})).report_to == []
