"""The dry run against torch's own allocator: real steps on real models, weighed by torch's
profiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import open_cells
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from qlora_nb.memory import budget, dry_run, ledger, live_bytes, profiler
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import chunked_loss, configs, load
from qlora_nb.settings import validate

SETTINGS = [  # rows, tokens, checkpointing, loss_chunk
    (1, 64, True, 0),
    (4, 128, True, 0),
    (4, 128, False, 0),
    (4, 128, True, 64),
    (2, 256, False, 64),
    (1, 512, True, 0),
    (1, 512, False, 128),
    (8, 64, False, 0),
]


@pytest.fixture(scope="module")
def pythia_70m(tmp_path_factory):
    """A folder of pythia-70m's true shape with random weights."""
    folder = tmp_path_factory.mktemp("pythia-70m")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        configs.pythia_config("70m"), dtype=torch.float16
    ).save_pretrained(folder)
    return str(folder)


def weigh_a_step(model, rows, tokens, loss_chunk):
    ids = torch.randint(
        5, model.config.vocab_size - 1, (rows, tokens), generator=torch.Generator().manual_seed(1)
    )
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, -3:] = 0  # a padded batch: the mask is a tensor then

    def step():
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with chunked_loss.chunked_head(model, loss_chunk) if loss_chunk else nullcontext() as loss:
            (
                loss(model(**inputs), ids) if loss_chunk else model(**inputs, labels=ids).loss
            ).backward()
        model.zero_grad(set_to_none=True)

    step()
    with profiler.measure_peak() as moved:
        step()
    return moved.peak_bytes


def predicted_peak(settings, rows, tokens):
    settings = settings.replace(per_device_train_batch_size=rows, max_length=tokens)
    lines = budget.peak(plan_of(settings, on_gpu=False))
    return lines.sum((ledger.GRADIENTS, budget.KEPT, budget.WORK))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_predicted_peak_of_the_pocket_model(setting):
    check("pocket", setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS[:1] + SETTINGS[2:5] + SETTINGS[6:], ids=str)
def test_predicted_peak_of_a_pythia_70m(pythia_70m, setting):
    check(pythia_70m, setting)


def check(model_id, setting):
    rows, tokens, checkpointing, loss_chunk = setting
    settings = validate(
        {"model_id": model_id, "gradient_checkpointing": checkpointing, "loss_chunk": loss_chunk}
    )
    model = open_cells.attach_adapter(load.load_base(settings), settings).train()
    measured = weigh_a_step(model, rows, tokens, loss_chunk)
    # the issue allows 15 %; on pocket, SmolLM2, 70m and 410m the largest miss over these settings
    # was 5.5 %
    assert abs(predicted_peak(settings, rows, tokens) / measured - 1) < 0.08


@contextmanager
def layers_run() -> Iterator[list[torch.device]]:
    """The device on which a layer of GPT-NeoX works inside, one entry for every layer that a
    forward pass goes through.
    """
    worked = []

    def note(module, args, output):
        if isinstance(module, GPTNeoXLayer):
            worked.append(args[0].device)

    hook = register_module_forward_hook(note)
    yield worked
    hook.remove()


def test_kept_is_a_layers_input_by_hand_and_takes_no_time():
    """Of 36 layers one works, without memory."""
    config = configs.pythia_config("12b")
    dry_run._dry_run.cache_clear()
    with layers_run() as worked:
        found = dry_run.dry_run(Plan(config, length=512, r=16))
    assert worked == [torch.device("meta")]
    assert found.kept == 512 * 5120 * 2
    assert 36 * found.kept == 180 * 2**20
    plain = dry_run.dry_run(Plan(config, length=512, r=16, checkpointing=False))
    assert plain.kept > 20 * found.kept
    assert found.loss >= 3 * 512 * 50_688 * 4  # three float32 copies of the logits
    sliced = dry_run.dry_run(Plan(config, length=512, r=16, loss_chunk=128))
    assert sliced.loss < found.loss / 3
    largest_matrix = 4 * 5120**2 * 2
    assert dry_run.dry_run(Plan(config, train=False)).forward >= largest_matrix == 200 * 2**20


@pytest.mark.parametrize("checkpointing", [True, False])
def test_each_further_layer_keeps_the_same(checkpointing):
    """What one layer, or the difference of two and one, says holds for more of them."""
    config = configs.config_of("pocket")
    how = {"dtype": torch.float32, "rest_dtype": torch.float32, "checkpointing": checkpointing}
    plan = Plan(config, batch=2, length=96, r=8, **how)
    kept = dry_run.dry_run(plan).kept
    counts = [dry_run._count(n, plan).kept for n in (1, 2, 4, 8)]
    assert [b - a for a, b in pairwise(counts)] == [kept, 2 * kept, 4 * kept]


def test_live_bytes_counts_views_once_and_forgets():
    with live_bytes.LiveBytes(torch.nn.Module()) as count:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        assert count.live == 4000
        del a
        assert count.live == 4000  # the view keeps it
        del b
        assert (count.live, count.peak) == (0, 4000)
        count.peak = count.live
    assert count.peak == 0


def test_weigh_sees_what_a_kernel_frees_again():
    with profiler.measure_peak() as moved:
        x = torch.zeros(1 << 20)
        y = x + 1
        del x, y
        torch.zeros(1 << 10)
    assert moved.peak_bytes == pytest.approx(2 * 4 * (1 << 20), rel=1e-3)
