"""The loss in chunks of tokens against the plain one: value, gradient, and the memory it saves."""

import open_cells
import pytest
import torch
from torch.nn.functional import cross_entropy

from qlora_nb.memory import profiler
from qlora_nb.model import chunked_loss, data, load
from qlora_nb.record import runs
from qlora_nb.settings import validate


def plain(hidden, labels, head, n_items=None):
    logits = head(hidden)[:, :-1].float().flatten(0, 1)
    total = cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / (n_items or (labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_those_of_the_plain_loss(chunk, seed):
    torch.manual_seed(seed)
    head = torch.nn.Linear(24, 301).requires_grad_(False)
    labels = torch.where(torch.rand(3, 40) < 0.6, torch.randint(301, (3, 40)), -100)
    found = []
    for loss in (plain, lambda h, y, head: chunked_loss.chunked_cross_entropy(h, y, head, chunk)):
        hidden = torch.randn(
            3, 40, 24, generator=torch.Generator().manual_seed(seed)
        ).requires_grad_()
        value = loss(hidden, labels, head)
        value.backward()
        found.append((value.detach(), hidden.grad))
    (value, gradient), (chunked_value, chunked_gradient) = found
    assert abs(value - chunked_value) < 1e-5
    assert (gradient - chunked_gradient).abs().max() < 1e-5 * gradient.abs().max() + 1e-9


def test_sums_over_several_passes_divide_by_all_their_tokens():
    head, hidden = torch.nn.Linear(8, 50).requires_grad_(False), torch.randn(2, 9, 8)
    labels = torch.randint(50, (2, 9))
    labels[0, :6] = -100  # rows of unlike length: the mean of means would be wrong
    n = int((labels[:, 1:] != -100).sum())
    parts = [
        chunked_loss.chunked_cross_entropy(hidden[i : i + 1], labels[i : i + 1], head, 4, n_items=n)
        for i in range(2)
    ]
    assert sum(parts).item() == pytest.approx(plain(hidden, labels, head).item(), abs=1e-5)


def test_whole_model_and_the_head_comes_back():
    settings = validate({"lora_dropout": 0.0})
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    head = model.get_base_model().get_output_embeddings()
    ids = torch.randint(2, 1000, (2, 30))
    labels = ids.clone()
    labels[:, :20] = -100
    want = model(input_ids=ids, labels=labels).loss
    want.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with chunked_loss.chunked_head(model, 8) as loss:
        outputs = model(input_ids=ids)
        assert outputs.logits.shape[-1] == model.config.hidden_size
        found = loss(outputs, labels)
        found.backward()
    assert abs(want - found) < 1e-5
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(
                parameter.grad, wanted[name], atol=1e-5 * wanted[name].abs().max().item() + 1e-9
            ), name
    with pytest.raises(RuntimeError, match="stop"), chunked_loss.chunked_head(model, 8):
        raise RuntimeError("stop")
    assert "forward" not in vars(head)
    assert model(input_ids=ids).logits.shape[-1] == model.config.vocab_size


def test_memory_is_a_quarter_or_less_at_pythias_vocabulary():
    head = torch.nn.Linear(32, 50_688, bias=False).requires_grad_(False)
    peaks = []
    for chunk in (0, 128):
        hidden = torch.randn(1, 1024, 32, requires_grad=True)
        labels = torch.randint(50_688, (1, 1024))
        with profiler.measure_peak() as moved:
            loss = (
                chunked_loss.chunked_cross_entropy(hidden, labels, head, chunk)
                if chunk
                else plain(hidden, labels, head)
            )
            loss.backward()
        peaks.append(moved.peak_bytes)
    assert (
        peaks[0] > 2 * 4 * 1024 * 50_688
    )  # the plain loss holds at least two copies of all logits
    assert peaks[1] <= peaks[0] / 4


def test_training_in_chunks_ends_where_plain_training_ends(tmp_path):
    base = {"max_steps": 6, "output_dir": str(tmp_path), "train_rows": 200, "eval_rows": 1}
    losses = []
    for chunk in (0, 16):
        settings = validate({**base, "loss_chunk": chunk})
        tokenizer = load.load_tokenizer(settings)
        model = open_cells.attach_adapter(load.load_base(settings), settings)
        rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
        result = open_cells.finetune(
            model, tokenizer, rows, settings, runs.Run(settings, "06_test"), lambda step: None
        )
        losses.append(result["losses"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
