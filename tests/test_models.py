"""Other people's models: what the kit takes for granted of a model, on tiny random models of
families that do not grant it.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import open_cells
import pytest
import tokenizers
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qlora_nb import sources
from qlora_nb.answer import adapters, evaluate, generate, merge
from qlora_nb.errors import KitError
from qlora_nb.memory import dry_run, ledger
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import (
    batching,
    chunked_loss,
    device,
    embeddings,
    generation_defaults,
    load,
    probes,
)
from qlora_nb.model.linear_layers import dense_weight, linear_layers
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.record import runs, seal
from qlora_nb.settings import validate

SHAPE = {
    "vocab_size": 1088,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 128}
GPT = {
    "vocab_size": 1088,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES = {
    "OPT": {**SHAPE, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "Bloom": {"vocab_size": 1088, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 1088, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "Falcon": {**SHAPE},
    "Mamba": {"vocab_size": 1088, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "GPT2": GPT,
    "GPTJ": {**GPT, "rotary_dim": 16},
    "GPTNeoX": SHAPE,
    "Llama": SHAPE,
    "Mistral": {**SHAPE, "num_key_value_heads": 2, "sliding_window": 8},
    "Mixtral": {**SHAPE, "num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen3Moe": {
        **SHAPE,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "Gemma2": {**SHAPE, "num_key_value_heads": 2, "head_dim": 16},
    "NanoChat": {**SHAPE, "num_key_value_heads": 2},
    "Cohere": {**SHAPE, "num_key_value_heads": 2},
    "Granite": {**SHAPE, "num_key_value_heads": 2, "logits_scaling": 4.0},
    "Phi": SHAPE,
    "Gemma": {**SHAPE, "num_key_value_heads": 2, "head_dim": 16},
    "MiniCPM3": {
        **SHAPE,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "dim_model_base": 16,
    },
}


def random_model(family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def saved(tmp_path):
    """Write a random model of a family, with the pocket tokenizer; returns its folder."""

    def write(family, change=None, generation=None, **changes):
        model = random_model(family, **changes)
        if change:
            change(model)
        folder = tmp_path / family
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
        defaults = json.loads((folder / "generation_config.json").read_text()) | (generation or {})
        (folder / "generation_config.json").write_text(json.dumps(defaults))
        return str(folder)

    return write


def rows_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in lengths]
    rows = []
    for number, row in enumerate(ids):
        rows.append({"input_ids": row, "labels": [-100] * 4 + row[4:], "row": number})
    return Dataset.from_list(rows)


def finetuned(folder, rows, **values):
    settings = validate({"model_id": folder, "max_steps": 1, "lora_dropout": 0.0, **values})
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    run = runs.Run(settings, "06_test")
    return open_cells.finetune(
        model, load.load_tokenizer(settings), rows, settings, run, lambda step: None
    )


@torch.no_grad()
def isolated(model, rows):
    """Whether every row of a pack made by `batching.pack` has the logits it has alone."""
    pack = batching.pack(rows, 128)[0]
    packed = model(
        input_ids=torch.tensor([pack["input_ids"]]),
        position_ids=torch.tensor([pack["position_ids"]]),
        use_cache=False,
    )
    alone = [
        model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in rows["input_ids"]
    ]
    return (packed.logits[0] - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "family",
    ["Falcon", "GPT2", "GPTJ", "GPTNeoX", "Gemma2", "Llama", "Mamba", "Mistral", "Mixtral", "OPT"],
)
def test_packing_is_kept_to_models_that_keep_rows_apart(family):
    model = random_model(family)
    assert probes.keeps_rows_apart(model) == isolated(model, rows_of(12, 20))


@pytest.mark.parametrize("family", ["Bloom", "Mpt"])
def test_models_that_take_no_positions_do_not_pack(family):
    assert not probes.keeps_rows_apart(random_model(family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "apart"), [("GPT2", True), ("Llama", True), ("OPT", False)])
def test_packing_in_16_bit(family, apart, dtype):
    assert probes.keeps_rows_apart(random_model(family).to(dtype)) == apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packing_in_16_bit_is_judged_as_in_32(dtype):
    """Falcon's rows see each other until transformers 5.23, and not from 5.24 on."""
    model = random_model("Falcon")
    apart = isolated(model, rows_of(12, 20))
    assert probes.keeps_rows_apart(model.to(dtype)) == apart


def test_packed_rows_that_would_see_each_other_are_refused_before_training(
    saved, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder, rows = saved("OPT"), rows_of(20, 30, 25)
    with pytest.raises(KitError, match=r"packing.*set packing=False"):
        finetuned(folder, rows, packing=True, max_length=100)
    assert finetuned(folder, rows, max_length=100)["losses"]


def test_a_probe_leaves_the_random_state_as_it_was():
    model = random_model("GPT2").train()  # dropout 0.1, until it is tried
    before = torch.random.get_rng_state()
    probes.before_training(model, validate({"packing": True, "max_length": 64}))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_memory_that_runs_out_in_a_probe_is_explained(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def runs_out(model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 …")

    monkeypatch.setattr(probes, "sees_no_future", runs_out)
    with pytest.raises(KitError, match=r"memory ran out.*held at that moment"):
        finetuned(saved("Llama"), rows_of(20, 30))


def larger_head(model):
    """Random heads give logits near 0, which no cap touches."""
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 300


def own_loss(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss.item()


ENDS = {
    "Gemma2": lambda: random_model("Gemma2"),
    "NanoChat": lambda: random_model("NanoChat"),
    "Llama": lambda: random_model("Llama"),
    "Cohere": lambda: random_model("Cohere"),
    "Granite": lambda: random_model("Granite"),
    "a bias in the head": lambda: random_model("Phi"),
    "a scale of the embedding": lambda: random_model("Gemma"),
    "a scale before the head": lambda: random_model("MiniCPM3"),
    "16 bit": lambda: random_model("Llama").bfloat16(),
    "Gemma2 in 16 bit": lambda: random_model("Gemma2").bfloat16(),
}


@pytest.mark.parametrize("name", ENDS)
def test_slices_are_used_only_where_they_give_the_models_own_loss(name):
    model = ENDS[name]()
    larger_head(model)
    labels = torch.tensor(rows_of(40)["labels"])
    ids = torch.tensor(rows_of(40)["input_ids"])
    with torch.no_grad():
        own = own_loss(model, ids, labels)
        with chunked_loss.chunked_head(model, 8) as loss:
            sliced = loss(model(input_ids=ids), labels).item()
    assert dry_run.head_is_last(model.config) == (abs(own - sliced) < 1e-3 * own)


@pytest.mark.parametrize("family", ["Gemma2", "NanoChat", "Cohere", "Llama"])
def test_held_out_loss_is_that_of_the_models_own_logits(family):
    model, tokenizer = random_model(family), AutoTokenizer.from_pretrained(MODEL_DIR)
    larger_head(model)
    rows = rows_of(40, 30, 25, 33)
    wanted = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        wanted.append(
            cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        )
    found = evaluate.row_losses(model, tokenizer, list(rows))
    assert torch.allclose(found[:, 0].float(), torch.stack(wanted), rtol=1e-4)


def test_a_model_with_a_cap_trains_on_its_own_loss(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, rows = saved("Gemma2", larger_head, tie_word_embeddings=False), rows_of(30, 30)
    result = finetuned(
        folder,
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        loss_chunk=8,
        sample_steps=1,
    )
    assert capsys.readouterr().out.count("as with loss_chunk=0") == 1
    ids, labels = torch.tensor(rows["input_ids"]), torch.tensor(rows["labels"])
    with torch.no_grad():
        own = own_loss(load.load_base(validate({"model_id": folder})), ids, labels)
    assert result["losses"] == [pytest.approx(own, rel=1e-4)]


@pytest.mark.parametrize(
    ("family", "plain"), [("Gemma2", True), ("NanoChat", True), ("Llama", False), ("Cohere", False)]
)
def test_the_prediction_follows_the_loss_that_is_used(family, plain):
    config = random_model(family).config
    plan = Plan(config, batch=2, length=64, r=8, dtype=torch.float32, rest_dtype=torch.float32)
    whole = dry_run.dry_run(plan).loss
    sliced = dry_run.dry_run(replace(plan, loss_chunk=16)).loss
    assert (whole == sliced) == plain


@pytest.mark.parametrize("family", ["GPT2", "GPTJ", "GPTNeoX", "Llama", "OPT"])
def test_more_tokens_than_positions(family, capsys):
    model = random_model(family)
    probes.require_positions(model, 128)
    assert not capsys.readouterr().out
    try:
        model(input_ids=torch.full((1, 140), 7))
    except (IndexError, RuntimeError):
        with pytest.raises(KitError, match=r"max_length.*128"):
            probes.require_positions(model, 140)
    else:
        probes.require_positions(model, 140)
        assert "128 positions" in capsys.readouterr().out


# --- layers that stay unquantized ---


def whole_and_packed(model):
    """Weights in 4 bit, counted from the quantization states alone."""
    return sum(p.quant_state.shape.numel() for p in model.parameters() if hasattr(p, "quant_state"))


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Llama"])
def test_blocks_in_4_bit_throughout_say_nothing(saved, family, capsys):
    model = load.load_base(validate({"model_id": saved(family)}))
    assert "in 4 bit" not in capsys.readouterr().out
    named = random_model(family).named_parameters()
    blocks = [p for n, p in named if p.dim() == 2 and (".h." in n or ".layers." in n)]
    assert whole_and_packed(model) == sum(p.numel() for p in blocks)


@pytest.mark.parametrize(
    ("family", "whose"), [("Mixtral", "MixtralExperts"), ("Qwen3Moe", "Qwen3MoeExperts")]
)
def test_what_stays_unquantized_is_said(saved, family, whose, capsys):
    folder = saved(family)
    model = load.load_base(validate({"model_id": folder}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("in 4 bit: ")]
    assert len(said) == 1
    assert whose in said[0]
    assert f"{whole_and_packed(model):,} weights" in said[0]


def test_layers_the_model_itself_leaves_out_are_said(saved, capsys, tmp_path):
    """A model saved in 4 bit whose feed-forward layers were left out."""
    skipped = ["lm_head", "gate_proj", "up_proj"]
    folder = in_4_bit(saved("Llama"), tmp_path, llm_int8_skip_modules=skipped)
    load.load_base(validate({"model_id": folder}))
    out = capsys.readouterr().out
    assert "gate_proj (left out by the model's own settings)" in out
    assert f"{2 * 2 * 64 * 128:,} are not" in out


def test_a_model_without_one_4bit_weight_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    folder = saved("Falcon")
    with pytest.raises(
        KitError, match=r"no weight of this model can be stored in 4 bit.*FalconLinear"
    ):
        load.load_base(validate({"model_id": folder, "prequantized": True}))
    assert not (tmp_path / "cache").exists()


def test_a_kept_copy_says_the_same(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    settings = validate(
        {"model_id": saved("Mixtral", generation={"temperature": 0.5}), "prequantized": True}
    )
    said = []
    for _ in range(2):
        load.load_base(settings)
        said.append(
            [
                line
                for line in capsys.readouterr().out.splitlines()
                if "in 4 bit: " in line or "not used" in line
            ]
        )
    assert said[0] == said[1]
    assert len(said[0]) == 2


# --- generation defaults ---


DEFAULTS = {
    "sampling": {"do_sample": True, "temperature": 5.0},
    "penalty": {"repetition_penalty": 8.0},
    "no repeats": {"no_repeat_ngram_size": 1},
    "beams": {"num_beams": 3},
    "suppressed": {"suppress_tokens": list(range(5, 1000, 2))},
    "suppressed at first": {"begin_suppress_tokens": list(range(5, 1000, 2))},
    "forced": {"forced_eos_token_id": 9, "forced_bos_token_id": 9},
    "shortest": {"min_new_tokens": 8},
    "bad words": {"bad_words_ids": [[n] for n in range(5, 500)]},
    "length": {"max_length": 3},
    "least length": {"min_length": 60},
    "stop strings": {"stop_strings": ["a", "e"]},
    "cache": {"cache_implementation": "static"},
    "a bias": {"sequence_bias": [[[n], 50.0] for n in range(5, 9)]},
    "looked up": {"prompt_lookup_num_tokens": 3},
    "watermark": {"watermarking_config": {"bias": 9.0}},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "temperature alone": {"temperature": 0.0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_greedy_is_greedy_whatever_the_model_brings(saved, name, capsys):
    settings = validate(
        {"model_id": saved("Llama", generation=DEFAULTS[name]), "max_new_tokens": 12}
    )
    model, tokenizer = load.load_base(settings), load.load_tokenizer(settings)
    assert f"{next(iter(DEFAULTS[name]))}=" in capsys.readouterr().out
    row = {"instruction": "Where is Anna?", "input": ""}
    ids = generate.tokenize_prompts([row], tokenizer, model, settings)["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            following = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following[None, None]], dim=1)
            if following == tokenizer.eos_token_id:
                break
        directly = model.generate(
            ids[:, :start], attention_mask=torch.ones(1, start), max_new_tokens=12, do_sample=False
        )
    wanted = tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert generate.answer_all(model, tokenizer, [row], settings) == [wanted]
    assert generate.answer(model, tokenizer, row, settings, tuned=False).text == wanted
    assert tokenizer.decode(directly[0, start:], skip_special_tokens=True).strip() == wanted


@pytest.mark.parametrize("text", ["{", '{"num_beams": "three"}', ""])
def test_broken_generation_defaults_decide_nothing(saved, text):
    folder = saved("Llama")
    settings = validate({"model_id": folder, "max_new_tokens": 4})
    row = {"instruction": "Where is Anna?", "input": ""}
    wanted = generate.answer_all(
        load.load_base(settings), load.load_tokenizer(settings), [row], settings
    )
    (Path(folder) / "generation_config.json").write_text(text)
    model = load.load_base(settings)
    assert generate.answer_all(model, load.load_tokenizer(settings), [row], settings) == wanted


@pytest.mark.parametrize("text", ["[]", '"greedy"'])
def test_generation_defaults_that_are_no_mapping_are_refused_in_a_sentence(saved, text):
    folder = saved("Llama")
    (Path(folder) / "generation_config.json").write_text(text)
    with pytest.raises(KitError, match=r"the model cannot be loaded: '.*' object is not a mapping"):
        load.load_base(validate({"model_id": folder}))


def test_the_models_own_end_tokens_end_an_answer():
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), random_model("Llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    own = tokenizer.convert_tokens_to_ids("<|eot|>")
    model.generation_config.eos_token_id = [own, 700, {"a": 1}, [2], "x"]  # 700 is a word
    assert generation_defaults.end_tokens(model, tokenizer) == [tokenizer.eos_token_id, own]


# --- a base that is saved in 4 bit ---


def in_4_bit(folder, tmp_path, **how):
    """The model in `folder`, quantized and saved by plain transformers."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **how)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path / "packed")
    return str(tmp_path / "packed")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_its_own_quantization_is_honoured_and_shown(
    saved, tmp_path, capsys, monkeypatch, kind, double
):
    monkeypatch.setattr(sources, "CACHE", tmp_path / "cache")
    how = {
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": torch.float16,
    }
    folder = in_4_bit(saved("Llama"), tmp_path, **how)
    settings = validate({"model_id": folder, "prequantized": True})
    model = load.load_base(settings)
    out = capsys.readouterr().out
    assert f"{kind} {'with' if double else 'without'} double quantization" in out
    assert ("was asked for" in out) == ((kind, double) != ("nf4", True))
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == (kind, double)
    assert layer.compute_dtype == device.compute_dtype()
    assert not (tmp_path / "cache").exists()
    assert (
        ledger.predict(replace(plan_of(settings), r=0)).total_bytes
        == ledger.measure(model).total_bytes
    )


def test_an_adapter_is_merged_onto_what_its_4bit_base_stands_for(saved, tmp_path):
    settings = validate({"model_id": in_4_bit(saved("Llama"), tmp_path, bnb_4bit_quant_type="fp4")})
    model = open_cells.attach_adapter(load.load_base(settings), settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        plain = merge.merged(settings, tmp_path / "adapter")
        assert torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-4)
        card = merge.card_facts(tmp_path / "adapter", settings, "dequantized")
        merge.export(plain, load.load_tokenizer(settings), tmp_path / "out", card)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-4)
    with pytest.raises(KitError, match="original weights are not there"):
        merge.merged(settings, tmp_path / "adapter", "original")
    assert "original" not in merge.ways_for(settings)


@pytest.mark.parametrize(
    "own",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "hqq"},
    ],
    ids=str,
)
@pytest.mark.parametrize("four_bit", [True, False])
def test_other_quantizations_are_refused_before_loading(saved, own, four_bit):
    folder = saved("Llama")
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(KitError, match="quantized already"):
        load.load_base(validate({"model_id": folder}), four_bit)


# --- adapters by other tools ---


def an_adapter(settings, folder, **how):
    """A random adapter of a kind that the kit does not train, made and saved by plain PEFT."""
    base = load.load_base(settings)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **how)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


KINDS = {
    "plain": {},
    "lora_bias": {"lora_bias": True},
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 64}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_peft_computes(saved, tmp_path, kind):
    settings = validate({"model_id": saved("Llama", mlp_bias=True, attention_bias=True)})
    theirs = an_adapter(settings, tmp_path / "adapter", **KINDS[kind])
    model = adapters.load_adapter(load.load_base(settings), tmp_path / "adapter")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        assert not torch.allclose(wanted, base, atol=1e-2)
        assert torch.allclose(
            merge.merged(settings, tmp_path / "adapter")(input_ids=ids).logits, wanted, atol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_made_by_the_librarys_own_layers(saved, tmp_path, monkeypatch, kind):
    """While `generate` runs, no layer is replaced and torch has its threads; the text is that of
    plain PEFT.
    """
    settings = validate({"model_id": saved("Llama"), "max_new_tokens": 8})
    theirs = an_adapter(settings, tmp_path / "adapter", **KINDS[kind])
    model, tokenizer = (
        adapters.load_adapter(load.load_base(settings), tmp_path / "adapter"),
        load.load_tokenizer(settings),
    )
    row, threads, seen = {"instruction": "Where is Anna?", "input": ""}, torch.get_num_threads(), []
    ids = generate.tokenize_prompts([row], tokenizer, model, settings)["input_ids"]
    with torch.no_grad():
        wanted = {True: theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False)}
        with theirs.disable_adapter():
            wanted[False] = theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    its_own = model.generate

    def watched(**given):
        seen.append(torch.get_num_threads())
        seen.extend(name for name, module in model.named_modules() if "forward" in vars(module))
        return its_own(**given)

    monkeypatch.setattr(model, "generate", watched)
    for tuned, out in wanted.items():
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert generate.answer(model, tokenizer, row, settings, tuned=tuned).text == text
    assert seen == [threads, threads]


class Reads(TorchDispatchMode):
    """Which storages operations take while it is on: data pointer → bytes. A table that is looked
    up is not gone through.
    """

    def __enter__(self):
        self.found = {}
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is not torch.ops.aten.embedding.default:
            for tensor in tree_leaves((args, kwargs)):
                if torch.is_tensor(tensor):
                    storage = tensor.untyped_storage()
                    self.found[storage.data_ptr()] = storage.nbytes()
        return operation(*args, **(kwargs or {}))


READ = {  # positions in a table or not, head and embedding one tensor or two, in 4 bit, in the host's memory
    "OPT": {},
    "GPT2": {},
    "Bloom": {},
    "Llama": {},
    "GPTNeoX": {},
    "GPTNeoX, tied": {"tie_word_embeddings": True},
    "GPTNeoX, head in 4 bit": {},
    "GPTNeoX, embedding on the CPU": {},
}


@torch.no_grad()
@pytest.mark.parametrize("name", READ)
def test_what_a_token_reads_is_what_the_operations_take(saved, name):
    """One token after a prompt, watched by torch's dispatcher; base, and with an adapter on it."""
    family, _, how = name.partition(", ")
    settings = validate(
        {"model_id": saved(family, **READ[name]), "head_4bit": how == "head in 4 bit"}
    )
    model = load.load_base(settings)
    if how == "embedding on the CPU":
        embeddings.keep_embedding_on_cpu(model)
    for step in ("base", "tuned"):
        if step == "tuned":
            model = open_cells.attach_adapter(model, settings).eval()
        cache = model(input_ids=torch.arange(5, 25)[None], use_cache=True).past_key_values
        with Reads() as reads:
            model(input_ids=torch.tensor([[25]]), past_key_values=cache)
        weights = list(model.parameters())
        for state in [weight.quant_state for weight in weights if hasattr(weight, "quant_state")]:
            weights += [state.absmax, state.state2.absmax]
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        found = ledger.read_for_a_token(model)
        assert found.total_bytes - found[ledger.TABLES] == sum(
            size for place, size in reads.found.items() if place in own
        )


def test_an_adapter_that_cannot_be_merged_is_refused_in_a_sentence(saved, tmp_path):
    settings = validate({"model_id": saved("Llama")})
    an_adapter(settings, tmp_path / "adapter", lora_bias=True)
    for way in merge.WAYS:
        # PEFT itself has no words for packed weights
        with pytest.raises(
            KitError, match=f"cannot be merged.*{'' if way == 'packed' else 'no bias'}"
        ):
            merge.merged(settings, tmp_path / "adapter", way)


def test_gpt2s_turned_weights_are_rounded_before_merging(saved, tmp_path):
    settings = validate({"model_id": saved("GPT2")})
    model = open_cells.attach_adapter(load.load_base(settings), settings).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        merged = merge.merged(settings, tmp_path / "adapter")(input_ids=ids).logits
        assert torch.allclose(merged, model(input_ids=ids).logits, atol=1e-4)


# --- what a stranger's review found ---


@pytest.mark.parametrize("family", ["Bert", "Electra"])
def test_a_model_that_sees_the_future_is_refused(saved, tmp_path, monkeypatch, family):
    """These families write from left to right only with is_decoder=True; without it transformers
    says so in a log at most.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FAMILIES, family, {**SHAPE, "embedding_size": 64})
    with pytest.raises(KitError, match="a token sees those behind it"):
        finetuned(saved(family, is_decoder=False), rows_of(20, 20), max_length=64)
    assert probes.sees_no_future(random_model(family, is_decoder=True))


@pytest.mark.parametrize("loss_chunk", [8, 128])
def test_the_next_token_is_learnt_also_where_a_familys_own_loss_is_of_the_same_token(
    saved, tmp_path, monkeypatch, loss_chunk
):
    """BART's own loss does not shift the labels: as a causal model it would learn to copy its
    input.
    """
    monkeypatch.chdir(tmp_path)
    bart = {
        "vocab_size": 1088,
        "d_model": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 128,
    }
    monkeypatch.setitem(
        FAMILIES,
        "Bart",
        {**bart, "dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1},
    )
    folder, rows = saved("Bart"), rows_of(30, 30)
    settings = validate({"model_id": folder})
    base = load.load_base(settings)
    with torch.no_grad():
        logits = base(input_ids=torch.tensor(rows["input_ids"])).logits[:, :-1]
    wanted = cross_entropy(
        logits.flatten(0, 1), torch.tensor(rows["labels"])[:, 1:].flatten(), ignore_index=-100
    ).item()
    result = finetuned(
        folder,
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        loss_chunk=loss_chunk,
    )
    assert result["losses"] == [pytest.approx(wanted, rel=1e-4)]


def test_an_adapter_that_repeats_layers_is_refused(saved, tmp_path):
    """Switched off, it would leave a model of four layers in place of the base's two."""
    settings = validate({"model_id": saved("Llama")})
    an_adapter(settings, tmp_path / "adapter", layer_replication=[[0, 2], [0, 2]])
    with pytest.raises(KitError, match="layer_replication"):
        adapters.load_adapter(load.load_base(settings), tmp_path / "adapter")


def test_an_out_of_memory_error_is_explained_for_any_family():
    """The options of a family whose activations cannot be counted are left out; the refusal still
    says what was held.
    """
    from qlora_nb.memory import out_of_memory

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    refusal = out_of_memory.explain(error, validate({}), random_model("Mamba"), None)
    assert "held at that moment" in str(refusal)
    assert "choose a smaller model" in refusal.remedy


def test_a_tokenizer_without_an_end_token_is_refused(saved):
    folder = saved("Llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(KitError, match="no end token"):
        load.load_tokenizer(validate({"model_id": folder}))


def test_gradient_checkpointing_warns_nobody_and_hides_no_other_warning(saved, tmp_path):
    """PEFT asks for it by a name that is going away: that one sentence is filtered, once."""
    settings = validate({"model_id": saved("Llama"), "gradient_checkpointing": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = open_cells.attach_adapter(load.load_base(settings), settings)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        seal.write_seal(tmp_path / "adapter")
        adapters.load_adapter(load.load_base(settings), tmp_path / "adapter")
        with pytest.raises(FutureWarning):
            warnings.warn("gradient_checkpointing goes", FutureWarning, stacklevel=1)
        patterns = [pattern.pattern for _, pattern, *_ in warnings.filters if pattern is not None]
        assert sum("gradient_checkpointing" in pattern for pattern in patterns) == 1


@pytest.mark.parametrize("values", [{}, {"double_quant": False}, {"quant_type": "fp4"}, None])
def test_a_dense_weight_is_what_bitsandbytes_unpacks(saved, values):
    """The weight read twice, and what the layer computes stays as it is."""
    four_bit = values is not None
    model = load.load_base(validate({"model_id": saved("Llama"), **(values or {})}), four_bit)
    layer = next(iter(linear_layers(model).values()))
    vectors = torch.randn(3, layer.in_features)
    before = layer(vectors)
    if four_bit:
        wanted = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    else:
        wanted = layer.weight.detach().float()
    for _ in range(2):
        found = dense_weight(layer)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert torch.equal(found, wanted)
    assert torch.equal(layer(vectors), before)


def test_the_end_trains_also_where_it_is_what_is_padded_with(saved):
    """As in GPT-2, which has one special token: padding is masked by its place, not by its id."""
    folder = saved("Llama")
    rows = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
    bare = PreTrainedTokenizerFast(tokenizer_object=rows, eos_token="</s>")
    bare.save_pretrained(folder)
    tokenizer = load.load_tokenizer(validate({"model_id": folder}))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    pair = [{"input_ids": [0, 1, 2], "labels": [-100, 1, 2]}, {"input_ids": [2], "labels": [2]}]
    batch = batching.collator(tokenizer)(pair)
    assert batch["labels"].tolist() == [[-100, 1, 2], [2, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# --- what `load.prepared` guards ---


def loaded(settings):
    """As the cell of notebook 06 loads it, not prepared yet."""
    return AutoModelForCausalLM.from_pretrained(
        load.weights_of(settings),
        quantization_config=load.quantization_config(settings),
        dtype=torch.float32,
        output_loading_info=True,
    )


def test_no_layer_is_repacked_on_a_cpu_with_bfloat16_units(saved):
    settings = validate({"model_id": saved("Llama")})
    model, loading_info = loaded(settings)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == len(linear_layers(model))
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes finds it on such a CPU
        layer.compute_dtype = torch.bfloat16
    codes = [layer.weight.data.clone() for layer in layers]
    load.prepared(model, settings, loading_info)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 25)[None])
    for layer, before in zip(layers, codes, strict=True):
        assert not layer.support_avx512bf16_for_cpu
        assert layer.compute_dtype == device.compute_dtype()
        assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("kind", ["missing_keys", "mismatched_keys"])
def test_weights_that_transformers_filled_in_are_refused(saved, kind):
    settings = validate({"model_id": saved("Llama")})
    model, loading_info = loaded(settings)
    with pytest.raises(KitError, match="1 of its weights are not in the files, such as lm_head"):
        load.prepared(model, settings, {**loading_info, kind: ["lm_head.weight"]})


def test_a_prepared_model_answers_under_its_own_name(saved):
    """In eval mode, with plain generation defaults and the name that an adapter will record."""
    folder = saved("Llama", generation={"repetition_penalty": 8.0})
    settings = validate({"model_id": folder})
    model, loading_info = loaded(settings)
    model.train()
    model.name_or_path = "a kept copy"
    assert load.prepared(model, settings, loading_info) is model
    assert not model.training
    assert model.name_or_path == model.config.name_or_path == folder
    assert model.generation_config.repetition_penalty != 8.0
