"""Options at both ends of a model: a 4-bit head in slices, an embedding in the host's memory."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import open_cells
import pytest
import rehearsal
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from test_activations import predicted_peak, weigh_a_step
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import chunked_loss, configs, device, embeddings, load
from qlora_nb.settings import validate

IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two layers of GPT-NeoX under pythia-70m's vocabulary: seven slices."""
    folder = tmp_path_factory.mktemp("wide")
    config = configs.pythia_config("70m")
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_slice_is_bitsandbytes_own_rounding(wide, double_quant):
    plain = load.load_base(validate({"model_id": wide}))
    sliced = load.load_base(
        validate({"model_id": wide, "head_4bit": True, "double_quant": double_quant})
    )
    hidden = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    rounded = []
    for rows in plain.get_output_embeddings().weight.data.split(embeddings.SLICE):
        codes, state = bnb.quantize_4bit(
            rows, blocksize=64, quant_type="nf4", compress_statistics=double_quant
        )
        rounded.append(bnb.dequantize_4bit(codes, state))
    assert len(rounded) == 7
    expected = hidden @ torch.cat(rounded).T
    assert torch.allclose(sliced.get_output_embeddings()(hidden), expected, atol=1e-5)
    assert not torch.allclose(plain.get_output_embeddings()(hidden), expected, atol=1e-5)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """Phi, whose head has a bias, with a vocabulary of two slices."""
    folder = tmp_path_factory.mktemp("biased")
    config = PhiConfig(
        vocab_size=embeddings.SLICE + 64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_the_heads_bias_is_added_to_what_the_slices_give(biased):
    plain = load.load_base(validate({"model_id": biased}))
    settings = validate({"model_id": biased, "head_4bit": True})
    sliced = load.load_base(settings)
    head = plain.get_output_embeddings()
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for rows in head.weight.data.split(embeddings.SLICE):
        layer = Linear4bit(64, len(rows), bias=False, quant_type="nf4", device="meta")
        layer.weight = Params4bit(rows, quant_type="nf4", requires_grad=False).to("cpu")
        layer.support_avx512bf16_for_cpu = False
        found.append(layer(hidden))
    expected = torch.cat(found, dim=-1) + head.bias
    assert len(found) == 2
    assert torch.allclose(sliced.get_output_embeddings()(hidden), expected, atol=1e-5)
    apart = sliced(IDS).logits - plain(IDS).logits
    assert apart.std() < 0.05 * head.bias.std(), "rounded, and no bias less"
    adapted = open_cells.attach_adapter(sliced, settings)
    assert not adapted.get_base_model().lm_head.bias.requires_grad


@pytest.mark.parametrize("loss_chunk", [0, 64])
def test_a_bias_at_the_head_is_predicted(biased, loss_chunk):
    settings = validate({"model_id": biased, "head_4bit": True, "loss_chunk": loss_chunk})
    model = open_cells.attach_adapter(load.load_base(settings), settings).train()
    measured, predicted = ledger.measure(model), ledger.predict(plan_of(settings))
    for name in (ledger.CODES, ledger.SCALES, ledger.EMBEDDINGS, ledger.SMALL):
        assert measured[name] == predicted[name]
    assert predicted[ledger.SMALL] > 4 * (embeddings.SLICE + 64)
    ratio = predicted_peak(settings, 2, 128) / weigh_a_step(model, 2, 128, loss_chunk)
    assert abs(ratio - 1) < 0.08  # as test_activations


@pytest.mark.parametrize(
    "values", [{}, {"double_quant": False}, {"quant_type": "fp4", "optim": "adamw_torch"}], ids=str
)
def test_predicted_bytes_are_the_measured_ones(wide, values):
    settings = validate({"model_id": wide, "head_4bit": True, **values})
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    measured, predicted = ledger.measure(model), ledger.predict(plan_of(settings))
    still = [name for name in ledger.ORDER if name not in (ledger.GRADIENTS, ledger.STATES)]
    assert {name: measured[name] for name in still} == {name: predicted[name] for name in still}
    whole = ledger.predict(plan_of(settings.replace(head_4bit=False)))
    assert predicted[ledger.EMBEDDINGS] == whole[ledger.EMBEDDINGS] // 2
    assert predicted.total_bytes < whole.total_bytes


@pytest.mark.parametrize("loss_chunk", [0, 64])
def test_predicted_peak_with_a_4bit_head(wide, loss_chunk):
    settings = validate({"model_id": wide, "head_4bit": True, "loss_chunk": loss_chunk})
    model = open_cells.attach_adapter(load.load_base(settings), settings).train()
    assert (
        abs(predicted_peak(settings, 2, 128) / weigh_a_step(model, 2, 128, loss_chunk) - 1) < 0.08
    )  # as test_activations


def test_no_slice_is_adapted_and_the_loss_hardly_moves():
    plain, sliced = (validate({"head_4bit": on}) for on in (False, True))
    losses = []
    for settings in (plain, sliced):
        model = open_cells.attach_adapter(load.load_base(settings), settings)
        adapted = {
            name.split(".lora_")[0].rsplit(".", 1)[-1]
            for name, _ in model.named_parameters()
            if "lora_" in name
        }
        assert adapted == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
        with torch.no_grad(), chunked_loss.chunked_head(model, 8) as loss:
            losses.append(loss(model(input_ids=IDS), IDS).item())
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]


def test_embedding_on_the_cpu_sends_ids_there_and_vectors_back():
    settings = validate({})
    model, other = load.load_base(settings), load.load_base(settings.replace(embedding_on_cpu=True))
    assert torch.equal(model(IDS).logits, other(IDS).logits)  # one device: nothing changes
    embeddings.keep_embedding_on_cpu(model)
    assert model.get_input_embeddings().weight.device.type == "cpu"
    with rehearsal.Meta():  # a device that is not the host's
        assert model.get_input_embeddings()(IDS.to("meta")).is_meta


def test_embedding_on_the_cpu_leaves_the_cards_ledger():
    settings = validate({"profile": "full"})
    table = 50_688 * 5120 * 2
    for train in (True, False):
        plain, moved = (
            budget.peak(plan_of(settings.replace(embedding_on_cpu=on), train, on_gpu=True))
            for on in (False, True)
        )
        assert (
            plain[ledger.EMBEDDINGS] - moved[ledger.EMBEDDINGS]
            == table
            == plain.total_bytes - moved.total_bytes
        )
    here = budget.peak(plan_of(settings.replace(embedding_on_cpu=True), on_gpu=False))
    assert here[ledger.EMBEDDINGS] == 2 * table * (
        2 if device.compute_dtype() is torch.float32 else 1
    )


def test_tied_ends_stay_as_they_are(tmp_path, capsys):
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(**sizes, tie_word_embeddings=True, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = validate({"model_id": str(tmp_path), "head_4bit": True, "embedding_on_cpu": True})
    model = load.load_base(settings)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "one tensor" in capsys.readouterr().out
    assert (
        ledger.predict(replace(plan_of(settings), r=0)).total_bytes
        == ledger.measure(model).total_bytes
    )
