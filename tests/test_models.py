"""Other people's models: what the kit takes for granted of a model, on tiny random models of families that do not grant it."""

import pytest
import torch
import transformers
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_nb.engine import activations, data, evaluation, models, objective, probes, runs, training
from qlora_nb.engine.profiles import validate
from qlora_nb.errors import KitError
from qlora_nb.pocket import MODEL_DIR

SHAPE = {"vocab_size": 1088, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SHAPE |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 128}
GPT = {"vocab_size": 1088, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
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
    "Gemma2": {**SHAPE, "num_key_value_heads": 2, "head_dim": 16},
    "NanoChat": {**SHAPE, "num_key_value_heads": 2},
    "Cohere": {**SHAPE, "num_key_value_heads": 2},
    "Granite": {**SHAPE, "num_key_value_heads": 2, "logits_scaling": 4.0},
}


def random_model(family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def saved(tmp_path):
    """Write a random model of a family, with the pocket tokenizer; returns its folder."""

    def write(family, change=None, **changes):
        model = random_model(family, **changes)
        if change:
            change(model)
        folder = tmp_path / family
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
        return str(folder)

    return write


def rows_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ids])


def finetuned(folder, rows, **values):
    settings = validate({"model_id": folder, "max_steps": 1, "lora_dropout": 0.0, **values})
    model = training.attach_adapter(models.load_base(settings), settings)
    run = runs.Run(settings, "06_test")
    return training.finetune(model, models.load_tokenizer(settings), rows, settings, run, lambda step: None)


@torch.no_grad()
def isolated(model, rows):
    """Whether every row of a pack made by `data.pack` has the logits it has alone."""
    pack = data.pack(rows, 128)[0]
    packed = model(
        input_ids=torch.tensor([pack["input_ids"]]), position_ids=torch.tensor([pack["position_ids"]]), use_cache=False
    )
    alone = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in rows["input_ids"]]
    return (packed.logits[0] - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["Falcon", "GPT2", "GPTJ", "GPTNeoX", "Gemma2", "Llama", "Mamba", "Mistral", "Mixtral", "OPT"])
def test_packing_is_kept_to_models_that_keep_rows_apart(family):
    model = random_model(family)
    assert probes.keeps_rows_apart(model) == isolated(model, rows_of(12, 20))


@pytest.mark.parametrize("family", ["Bloom", "Mpt"])
def test_models_that_take_no_positions_do_not_pack(family):
    assert not probes.keeps_rows_apart(random_model(family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "apart"), [("GPT2", True), ("Llama", True), ("OPT", False), ("Falcon", False)])
def test_packing_in_16_bit(family, apart, dtype):
    assert probes.keeps_rows_apart(random_model(family).to(dtype)) == apart


def test_packed_rows_that_would_see_each_other_are_refused_before_training(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, rows = saved("OPT"), rows_of(20, 30, 25)
    with pytest.raises(KitError, match=r"packing.*set packing=False"):
        finetuned(folder, rows, packing=True, max_length=100)
    assert finetuned(folder, rows, max_length=100)["losses"]


def test_a_probe_leaves_modes_and_random_state_as_they_were():
    model = random_model("Llama").train()
    model.lm_head.eval()
    before, modes = torch.random.get_rng_state(), [m.training for m in model.modules()]
    probes.keeps_rows_apart(model)
    probes.head_is_last(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is True
    assert all(p.grad is None for p in model.parameters())


def larger_head(model):
    """Random heads give logits near 0, which no cap touches."""
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 300


def own_loss(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss.item()


def hooked(model):
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits.clamp(min=-1))
    return model


def with_bias(model):
    """A head whose bias comes before the scale that follows it."""
    model.lm_head = torch.nn.Linear(64, 1088)
    return model


ENDS = {
    "Gemma2": lambda: random_model("Gemma2"),
    "NanoChat": lambda: random_model("NanoChat"),
    "Llama": lambda: random_model("Llama"),
    "Cohere": lambda: random_model("Cohere"),
    "Granite": lambda: random_model("Granite"),
    "a hook": lambda: hooked(random_model("GPTNeoX")),
    "bias and scale": lambda: with_bias(random_model("Granite")),
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
        with objective.sliced_head(model, 8) as loss:
            sliced = loss(model(input_ids=ids), labels).item()
    assert probes.head_is_last(model) == (abs(own - sliced) < 1e-3 * own)


@pytest.mark.parametrize("family", ["Gemma2", "NanoChat", "Cohere", "Llama"])
def test_held_out_loss_is_that_of_the_models_own_logits(family):
    model, tokenizer = random_model(family), AutoTokenizer.from_pretrained(MODEL_DIR)
    larger_head(model)
    rows = rows_of(40, 30, 25, 33)
    wanted = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        wanted.append(cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"))
    found = evaluation.row_losses(model, tokenizer, list(rows))
    assert torch.allclose(found[:, 0].float(), torch.stack(wanted), rtol=1e-4)


def test_a_model_with_a_cap_trains_on_its_own_loss(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, rows = saved("Gemma2", larger_head, tie_word_embeddings=False), rows_of(30, 30)
    result = finetuned(folder, rows, per_device_train_batch_size=2, gradient_accumulation_steps=1, loss_chunk=8, sample_steps=1)
    assert capsys.readouterr().out.count("as with loss_chunk=0") == 1
    ids, labels = torch.tensor(rows["input_ids"]), torch.tensor(rows["labels"])
    with torch.no_grad():
        own = own_loss(models.load_base(validate({"model_id": folder})), ids, labels)
    assert result["losses"] == [pytest.approx(own, rel=1e-4)]


@pytest.mark.parametrize(("family", "plain"), [("Gemma2", True), ("NanoChat", True), ("Llama", False), ("Cohere", False)])
def test_the_prediction_follows_the_loss_that_is_used(family, plain):
    config = random_model(family).config
    steps = [activations.Step(2, 64, r=8, dtype=torch.float32, loss_chunk=chunk) for chunk in (0, 16)]
    whole, sliced = (activations.dry_run(config, step).loss for step in steps)
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
