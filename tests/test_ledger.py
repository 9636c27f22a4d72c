"""The ledger against the published table, against PEFT, and against live objects, to the byte."""

import warnings
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_nb.errors import KitError
from qlora_nb.memory import ledger, step_sizes
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs, load
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import validate

FROZEN = (*ledger.QUANTIZED, ledger.LINEARS, ledger.EMBEDDINGS, ledger.SMALL)
"""The lines that the published table adds up."""
FACTS = {  # reference/facts.md: total parameters, share in 4-bit linears (%), GiB: all fp16, NF4+DQ, NF4+DQ with the rest in fp32
    "14m": (14_067_712, 8.4, None, None, None),
    "70m": (70_426_624, 26.8, 0.131, 0.105, 0.201),
    "160m": (162_322_944, 52.3, 0.302, 0.185, 0.329),
    "410m": (405_334_016, 74.5, 0.755, 0.338, 0.530),
    "1b": (1_011_781_632, 79.6, 1.885, 0.771, 1.156),
    "1.4b": (1_414_647_808, 85.4, 2.635, 0.965, 1.350),
    "2.8b": (2_775_208_960, 90.7, 5.169, 1.691, 2.173),
    "6.9b": (6_857_302_016, 94.0, 12.773, 3.868, 4.641),
    "12b": (11_846_072_320, 95.6, 22.065, 6.412, 7.383),
}
OPTIMIZERS = {
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "adamw_torch": torch.optim.AdamW,
}


class MostBytes(TorchDispatchMode):
    """The size of the largest tensor with memory of its own that was made inside."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.most = max(self.most, tensor.nbytes)
        return result


@pytest.mark.parametrize("size", FACTS)
def test_every_pythia_equals_the_table(size):
    total, share, all_16, nf4_dq, upcast = FACTS[size]
    config = configs.pythia_config(size)
    with MostBytes() as made:
        plain = ledger.predict(Plan(config, four_bit=False))
        small = ledger.predict(Plan(config))
        large_rest = ledger.predict(Plan(config, rest_dtype=torch.float32))
    assert made.most < 2**20, "nothing as large as the smallest weight is made for a prediction"
    assert plain.sum(FROZEN) == 2 * total == 2 * PYTHIA[size].n_parameters
    assert plain["linear weights"] == 4 * small["4-bit codes"]
    assert round(100 * plain["linear weights"] / plain.sum(FROZEN), 1) == share
    if all_16:
        got = [round(found.sum(FROZEN) / 2**30, 3) for found in (plain, small, large_rest)]
        assert got == [all_16, nf4_dq, upcast]


def test_pythia_12b_to_the_byte():
    config = configs.pythia_config("12b")
    assert ledger.predict(Plan(config, double_quant=False)).sum(ledger.QUANTIZED) == 6_370_099_200
    assert ledger.predict(Plan(config)).sum(ledger.QUANTIZED) == 5_842_022_400
    model = configs.meta_model(config)
    assert 2 * ledger.predict(Plan(config))["4-bit codes"] == 11_324_620_800
    assert sum(ledger.lora_numels(model, 16)) == 47_185_920
    assert sum(ledger.lora_numels(model, 64)) == 188_743_680
    assert {ledger.lora_numels(model, 16)[0], ledger.lora_numels(model, 16)[2]} == {81_920}


def test_neox_20b_and_a_tied_llama():
    from transformers import GPTNeoXConfig, LlamaConfig

    neox = GPTNeoXConfig(
        hidden_size=6144,
        num_hidden_layers=44,
        num_attention_heads=64,
        intermediate_size=24576,
        vocab_size=50432,
    )
    sizes = [
        ledger.predict(Plan(neox, **k)).sum(FROZEN) / 2**30
        for k in ({"four_bit": False}, {}, {"rest_dtype": torch.float32})
    ]
    assert [round(s, 3) for s in sizes] == [38.286, 10.737, 11.898]
    tied = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    assert ledger.predict(Plan(tied, four_bit=False))["embedding and head"] == 2 * 6400
    meta = configs.meta_model(tied)  # the meta model measured is the float32 prediction
    assert (
        ledger.measure(meta).total_bytes
        == ledger.predict(Plan(tied, four_bit=False, rest_dtype=torch.float32)).total_bytes
    )


def step(model, optim):
    """One real training step; returns the optimizer with its states."""
    model.train()  # in eval mode bitsandbytes repacks the weights on a CPU with AVX512-BF16
    optimizer = OPTIMIZERS[optim]([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.arange(12).reshape(1, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Paged optimizers are not supported on CPU"
        optimizer.step()
    return optimizer


CASES = [
    (True, "paged_adamw_32bit", ["all-linear"]),
    (False, "paged_adamw_8bit", ["all-linear"]),
    (True, "adamw_torch", ["query_key_value"]),
]


@pytest.mark.parametrize(("double_quant", "optim", "targets"), CASES)
def test_predicted_is_measured_on_the_pocket_model(double_quant, optim, targets):
    settings = validate(
        {"double_quant": double_quant, "optim": optim, "target_modules": targets, "r": 8}
    )
    base = load.load_base(settings)
    bare = ledger.measure(base)
    predicted_bare = ledger.predict(replace(plan_of(settings), r=0))
    assert {line.name: line.bytes for line in bare.lines} == {
        line.name: line.bytes for line in predicted_bare.lines
    }
    peft_targets = "all-linear" if targets == ["all-linear"] else targets
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=peft_targets, task_type="CAUSAL_LM")
    )
    measured, predicted = (
        ledger.measure(model, step(model, optim)),
        ledger.predict(plan_of(settings)),
    )
    assert {line.name: line.bytes for line in measured.lines} == {
        line.name: line.bytes for line in predicted.lines
    }
    assert measured.total_bytes == predicted.total_bytes
    trainable, _ = model.get_nb_trainable_parameters()
    assert predicted["LoRA weights"] == 4 * trainable


def test_unquantized_pocket_model():
    settings = validate({})
    predicted = ledger.predict(replace(plan_of(settings), four_bit=False, r=0))
    assert (
        predicted.total_bytes
        == ledger.measure(load.load_base(settings, four_bit=False)).total_bytes
    )


def test_targets_names_and_refusals():
    model = configs.meta_model(configs.pythia_config("70m"))
    assert len(ledger.lora_numels(model, 1)) == 2 * 24
    assert ledger.lora_numels(model, 1, ["query_key_value"]) == 6 * [512, 1536]
    for wrong in ("q_proj", "embed_out"):  # the head is not adapted
        with pytest.raises(KitError, match=rf"target_modules.*{wrong}.*query_key_value"):
            ledger.lora_numels(model, 1, [wrong])
    with pytest.raises(KitError, match="13b"):
        configs.pythia_config("13b")
    assert configs.config_of("EleutherAI/pythia-1b-deduped").hidden_size == 2048


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizer_bytes_are_those_of_real_optimizers(optim):
    numels = [10, 4095, 4096, 4097, 100_000]
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in numels]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = OPTIMIZERS[optim](parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for s in optimizer.state.values()
        for t in s.values()
        if torch.is_tensor(t)
    }
    assert sum(storages.values()) == ledger.optimizer_bytes(numels, optim)


def test_what_the_reader_sees():
    found = ledger.Ledger("a <b>title</b>", (ledger.Line("x<script>", 2**30, "1 & 2"),))
    assert "<script>" not in found._repr_html_()
    assert "x&lt;script&gt;" in found._repr_html_()
    assert "1.000 GiB" in repr(found)
    assert found.total_gib == 1
    assert found["nothing"] == 0


def test_step_sizes_and_the_longest_pass():
    sizes = step_sizes.step_sizes("12b", 16, 512)
    predicted = ledger.predict(Plan(configs.pythia_config("12b"), r=16))
    assert sizes.adapter == sizes.gradients == predicted["LoRA weights"] == 4 * 47_185_920
    assert sizes.paged + sizes.fixed == predicted["optimizer states"]
    assert sizes.weights + 2 * sizes.adapter + sizes.paged + sizes.fixed == predicted.total_bytes
    assert sizes.kept * sizes.n_layers == 180 * 2**20
    plain, paged = (step_sizes.longest_pass("12b", 64, 24 * 2**30, paged=p) for p in (False, True))
    assert 0 < plain < paged
    assert step_sizes.longest_pass("12b", 64, 5 * 2**30, paged=True) == 0
    same = {step_sizes.longest_pass("410m", 16, 8 * 2**30, paged=p) for p in (False, True)}
    assert len(same) == 1  # nothing is paged
