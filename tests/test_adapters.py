"""Other people's adapters: whatever plain PEFT loads on a base computes the same here, switched on
and off, in batches and streamed; the rest is refused in a sentence.

The reference is transformers, PEFT and bitsandbytes without this kit.
"""

import contextlib
import json
import shutil

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_models import random_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qlora_nb.answer import adapters, evaluate, generate, merge
from qlora_nb.errors import KitError
from qlora_nb.model import data, load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.settings import validate

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = {  # linear layers, head, embedding, last norm, list of blocks
    "pocket": (["query_key_value", "dense"], "embed_out", "embed_in", "final_layer_norm", "layers"),
    "Llama": (["q_proj", "v_proj", "down_proj"], "lm_head", "embed_tokens", "norm", "layers"),
    "GPT2": (["c_attn", "c_fc"], "lm_head", "wte", "ln_f", "h"),
}
NAMES["tied"] = NAMES["Llama"]

IDS = torch.tensor([[3, 4, 500, 20, 30, 7, 8, 3, 90, 100]])

ROWS = [
    {"instruction": "Where is Anna?", "input": ""},
    {"instruction": "Who is Ben?", "input": "Ben walked to the river. Anna went home."},
    {"instruction": "Where did Anna go and why did she go there?", "input": ""},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models of some families, larger weights than usual so that answers differ."""
    made = {"pocket": "pocket"}
    for name, family, changes in (
        ("Llama", "Llama", {}),
        ("tied", "Llama", {"tie_word_embeddings": True}),
        ("GPT2", "GPT2", {}),
    ):
        folder = tmp_path_factory.mktemp("models") / name
        model = random_model(family, **changes)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data *= 4
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
        made[name] = str(folder)
    return made


def settings_of(model_id, **values):
    return validate({"model_id": model_id, "max_new_tokens": 6, **values})


def plain_base(model_id, four_bit=True, dtype=torch.float32):
    storage = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    folder = MODEL_DIR if model_id == "pocket" else model_id
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=storage if four_bit else None, dtype=dtype
    ).eval()
    for module in model.modules():  # some CPUs would repack the weights and compute in bfloat16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def trained(model_id, config, folder, four_bit=True, how=None, **saving):
    """Put an adapter on a plain base, move every number that trains, save it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(plain_base(model_id, four_bit), config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, **saving)
    if how:
        how(folder)
    return folder


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits[:, -10:]


def said_by(model, tokenizer, settings):
    """Greedy answers of plain `generate`, a row at a time."""
    said = []
    for row in ROWS:
        text = data.prompt_of(row, settings.prompt_template)
        encoded = tokenizer(text, return_tensors="pt")
        ids = model.generate(
            **encoded, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=1
        )
        new = ids[0, encoded["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        said.append(text.rstrip("\ufffd").strip())  # a last character may be cut off
    return said


def require_equal(model_id, folder):
    """Logits and answers with the adapter and without it are those of plain libraries."""
    settings = settings_of(model_id)
    tokenizer = load.load_tokenizer(settings)
    base = plain_base(model_id)
    wanted = {False: (logits_of(base), said_by(base, tokenizer, settings))}
    reference = PeftModel.from_pretrained(base, folder).eval()
    wanted[True] = (logits_of(reference), said_by(reference, tokenizer, settings))
    assert not torch.equal(wanted[True][0], wanted[False][0])
    model = adapters.load_adapter(load.load_base(settings), folder)
    for tuned in (True, False, True):
        logits, said = wanted[tuned]
        with adapters.base_or_tuned(model, tuned):
            assert torch.equal(logits_of(model), logits)
            assert generate.answer_all(model, tokenizer, ROWS, settings) == said
        streamed = [generate.answer(model, tokenizer, row, settings, tuned) for row in ROWS]
        assert [answer.text for answer in streamed] == said
    with model.disable_adapter(), model.disable_adapter():  # one in the other
        assert torch.equal(logits_of(model), wanted[False][0])
    assert torch.equal(logits_of(model), wanted[True][0])
    require_equal_losses(model, reference, tokenizer, settings)
    [(_, _, tuned_next, _)] = generate.next_tokens_along(model, tokenizer, ROWS[0], settings, "")
    text = data.prompt_of(ROWS[0], settings.prompt_template)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = reference(input_ids=ids).logits[0, -1].argmax()
    expected = tokenizer.decode([first])
    if "\ufffd" in expected:  # a part of a character is shown as its bytes
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        piece = tokenizer.convert_ids_to_tokens(first.item())
        expected = "".join(f"<0x{byte_of[character]:02X}>" for character in piece)
    assert tuned_next[0][0] == expected


def require_equal_losses(model, reference, tokenizer, settings):
    rows = Dataset.from_list([row | {"output": "To the river, said Ben."} for row in ROWS])
    encoded = data.tokenize_rows(rows, tokenizer, settings)
    found = evaluate.row_losses(model, tokenizer, encoded)[:, 0]
    for row, loss in zip(encoded, found, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = reference(input_ids=ids).logits[0, -len(labels) :]
        wanted = cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        assert loss.item() == pytest.approx(wanted, rel=1e-4)


def lora(**values):
    def config(layers, *names):
        chosen = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": layers} | values
        return LoraConfig(**chosen)

    return config


def ends(where, **values):
    """LoRA that also takes the head, the embedding or the last norm: `target` or `save`."""
    how, _, which = where.partition(" ")

    def config(layers, head, embedding, norm, blocks):
        there = {"head": head, "embedding": embedding, "norm": norm}
        names = [there[part] for part in which.split("+")]
        if how == "save":
            return lora(modules_to_save=names, **values)(layers)
        return lora(target_modules=[*layers, *names], **values)(layers)

    return config


LORA = {
    "a pattern": lambda layers, *_: lora(target_modules=rf".*\.({'|'.join(layers)})")(layers),
    "target head": ends("target head"),
    "target embedding": ends("target embedding"),
    "target both ends": ends("target embedding+head"),
    "save head": ends("save head"),
    "save embedding": ends("save embedding"),
    "save both ends": ends("save embedding+head"),
    "save norm": ends("save norm"),
    "trained tokens": lora(trainable_token_indices=[3, 4, 500]),
    "rank_pattern": lambda layers, *_: lora(
        rank_pattern={layers[0]: 2}, alpha_pattern={layers[0]: 3}
    )(layers),
    "layers_to_transform": lambda layers, *names: lora(
        layers_to_transform=[1], layers_pattern=names[-1]
    )(layers),
    "exclude_modules": lambda layers, *_: lora(exclude_modules=[layers[0]])(layers),
    "DoRA": lora(use_dora=True),
    "DoRA head": ends("target head", use_dora=True),
    "rsLoRA": lora(use_rslora=True),
    "lora_bias": lora(lora_bias=True),
    "bias lora_only": lora(bias="lora_only"),
    "bias all": lora(bias="all"),
    "aLoRA": lora(alora_invocation_tokens=[7, 8]),
    "gaussian": lora(init_lora_weights="gaussian"),
    "another task": lora(task_type="SEQ_CLS"),
    "no task": lora(task_type=None),
}

OTHERS = {
    "IA3": lambda layers, *_: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=layers, feedforward_modules=[layers[-1]]
    ),
    "prompt": lambda *_: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": lambda *_: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda *_: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "VeRA": lambda layers, *_: peft.VeraConfig(
        task_type="CAUSAL_LM", target_modules=layers[:1], r=4
    ),
    "OFT": lambda layers, *_: peft.OFTConfig(
        task_type="CAUSAL_LM", target_modules=layers, r=4, oft_block_size=0
    ),
    "AdaLoRA": lambda layers, *_: peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=layers, total_step=10, init_r=4, target_r=2
    ),
    "SHiRA": lambda layers, *_: peft.ShiraConfig(task_type="CAUSAL_LM", target_modules=layers, r=4),
    "norms": lambda layers, head, embedding, norm, blocks: peft.LNTuningConfig(
        task_type="CAUSAL_LM", target_modules=[norm]
    ),
    "tokens": lambda *_: peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", token_indices=[3, 4, 500]
    ),
}


ON_POCKET = ("target both ends", "save both ends", "trained tokens", "bias all", "prompt")
ON_TIED = ("target head", "save head", "save both ends", "trained tokens")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Llama", kind) for kind in LORA | OTHERS]
    + [("pocket", kind) for kind in ON_POCKET]
    + [("tied", kind) for kind in ON_TIED],
)
def test_what_peft_loads_computes_the_same_here(folders, tmp_path, kind, name):
    make = (LORA | OTHERS)[kind]
    folder = trained(folders[name], make(*NAMES[name]), tmp_path / "adapter")
    require_equal(folders[name], folder)


TAKEN_OFF = ("rsLoRA", "target both ends", "trained tokens", "DoRA")
LEFT_BEHIND = ("save both ends", "save norm", "bias all")


@pytest.mark.parametrize("kind", TAKEN_OFF)
def test_taken_off_it_leaves_the_base_and_loads_again(folders, tmp_path, kind):
    folder = trained(folders["pocket"], LORA[kind](*NAMES["pocket"]), tmp_path / "adapter")
    base = load.load_base(settings_of("pocket"))
    alone = logits_of(base)
    model = adapters.load_adapter(base, folder)
    tuned = logits_of(model)
    assert not torch.equal(tuned, alone)
    base = model.unload()
    assert torch.equal(logits_of(base), alone)
    assert torch.equal(logits_of(adapters.load_adapter(base, folder)), tuned)


@pytest.mark.parametrize("kind", LEFT_BEHIND)
def test_a_base_on_which_peft_leaves_numbers_behind_is_refused(folders, tmp_path, kind):
    """PEFT's `unload` keeps saved modules and trained biases: what is left is not the base."""
    folder = trained(folders["pocket"], LORA[kind](*NAMES["pocket"]), tmp_path / "adapter")
    base = load.load_base(settings_of("pocket"))
    alone = logits_of(base)
    base = adapters.load_adapter(base, folder).unload()
    assert not torch.equal(logits_of(base), alone)
    for _ in range(2):
        with pytest.raises(KitError, match=r"has changed it.*loads the base first"):
            adapters.load_adapter(base, folder)


def test_a_trained_prompt_leaves_the_base_as_it_is(folders, tmp_path):
    """It is not in the base's layers: there is nothing to take off."""
    folder = trained(folders["Llama"], OTHERS["prompt"](), tmp_path / "adapter")
    base = load.load_base(settings_of(folders["Llama"]))
    tuned = logits_of(adapters.load_adapter(base, folder))
    assert torch.equal(logits_of(adapters.load_adapter(base, folder)), tuned)


# --- files as people have them ---


def config_with(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def config_without(*names):
    def change(folder):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in names}))

    return change


def weights_with(change):
    """Every tensor as `change(name, tensor)` gives it: (name, tensor), or None."""

    def apply(folder):
        path = folder / "adapter_model.safetensors"
        changed = [change(name, tensor) for name, tensor in load_file(path).items()]
        save_file(dict(pair for pair in changed if pair), path, {"format": "pt"})

    return apply


OLD = (
    "lora_bias", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "layer_replication", "modules_to_save", "loftq_config", "megatron_config", "eva_config",
    "trainable_token_indices", "exclude_modules", "target_parameters", "peft_version", "revision",
)  # fmt: skip

FILES = {
    "float16": (lora(), {}, weights_with(lambda name, w: (name, w.half()))),
    "bfloat16": (lora(), {}, weights_with(lambda name, w: (name, w.bfloat16()))),
    "an old configuration": (lora(), {}, config_without(*OLD)),
    "keys of a newer PEFT": (lora(), {}, config_with(hyper_lora=None, ranks="auto")),
    "enable_lora": (lora(), {}, config_with(enable_lora=None, merge_weights=False)),
    "fan_in_fan_out": (lora(), {}, config_with(fan_in_fan_out=True)),
    "a base on the hub": (lora(), {}, config_with(base_model_name_or_path="someone/llama-7b")),
    "no base": (lora(), {}, config_with(base_model_name_or_path=None)),
    "bias without biases": (lora(), {}, config_with(bias="all")),
    "embeddings saved": (lora(), {"save_embedding_layers": True}, None),
    "embeddings saved in 16 bit": (
        lora(), {"save_embedding_layers": True}, weights_with(lambda name, w: (name, w.half())),
    ),
    "embeddings moved": (
        lora(),
        {"save_embedding_layers": True},
        weights_with(lambda name, w: (name, w if "lora" in name else w + 0.1)),
    ),
    "head targeted, in 16 bit": (
        ends("target head"), {}, weights_with(lambda name, w: (name, w.bfloat16())),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_peft_reads_are_read(folders, tmp_path, name):
    config, saving, change = FILES[name]
    folder = trained(
        folders["Llama"], config(*NAMES["Llama"]), tmp_path / "adapter", how=change, **saving
    )
    require_equal(folders["Llama"], folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_was_converted_to_lora(folders, tmp_path, init):
    """As PEFT documents it: what was split off the base is given back in twice the rank."""
    model = peft.get_peft_model(
        plain_base(folders["Llama"], four_bit=False),
        lora(init_lora_weights=init)(*NAMES["Llama"]),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    model.peft_config["default"].init_lora_weights = init
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "first"
    )
    require_equal(folders["Llama"], tmp_path / "adapter")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq"])
def test_raw_adapters_whose_base_was_changed(folders, tmp_path, init):
    """The rest of the base is not at hand: equal to plain PEFT, or refused with a reason."""
    folder = trained(folders["Llama"], lora()(*NAMES["Llama"]), tmp_path / "adapter")
    config_with(init_lora_weights=init)(folder)
    reference = plain_base(folders["Llama"])
    own = logits_of(reference)
    model = None
    with contextlib.suppress(KitError):
        model = adapters.load_adapter(load.load_base(settings_of(folders["Llama"])), folder)
    if model is None:
        return
    with model.disable_adapter():
        assert torch.equal(logits_of(model), own)
    reference = PeftModel.from_pretrained(reference, folder).eval()
    assert torch.equal(logits_of(model), logits_of(reference))


# --- merging ---

MERGED = {
    "a pattern": LORA["a pattern"],
    "target both ends": LORA["target both ends"],
    "target head": LORA["target head"],
    "save head": LORA["save head"],
    "save both ends": LORA["save both ends"],
    "trained tokens": LORA["trained tokens"],
    "DoRA": LORA["DoRA"],
    "IA3": OTHERS["IA3"],
}


@pytest.mark.parametrize("name", ["Llama", "tied"])
@pytest.mark.parametrize("kind", MERGED)
def test_merged_and_exported_it_computes_the_same(folders, tmp_path, kind, name):
    folder = trained(folders[name], MERGED[kind](*NAMES[name]), tmp_path / "adapter")
    wanted = logits_of(PeftModel.from_pretrained(plain_base(folders[name]), folder).eval())
    settings = settings_of(folders[name])
    card = merge.card_facts(folder, settings, "dequantized")
    model = merge.merged(settings, folder)
    assert torch.allclose(logits_of(model), wanted, atol=1e-4)
    out = merge.export(model, load.load_tokenizer(settings), tmp_path / "out", card)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.allclose(logits_of(again), wanted, atol=1e-4)
    assert "q_proj" in (out / "README.md").read_text()


def test_a_trained_prompt_is_not_merged_and_no_model_is_loaded(folders, tmp_path, monkeypatch):
    folder = trained(folders["Llama"], OTHERS["prompt"](), tmp_path / "adapter")
    monkeypatch.setattr(load, "load_base", None)
    with pytest.raises(KitError, match=r"cannot be merged: it is a trained prompt"):
        merge.merged(settings_of(folders["Llama"]), folder)


# --- where an adapter lies ---


def test_a_run_a_slash_and_a_relative_path(tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(ADAPTER_DIR, run / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("run", "run/", "run/adapter/", "./run", "~/run", str(run)):
        folder, _ = adapters.find_adapter(validate({"adapter": given}))
        assert folder == run / "adapter"
    shutil.copytree(ADAPTER_DIR, tmp_path / "out" / "checkpoint-100")
    for given, words in (("none", str(tmp_path / "none")), ("out", "checkpoint-100")):
        with pytest.raises(KitError, match="not an adapter folder") as refused:
            adapters.find_adapter(validate({"adapter": given}))
        assert words in str(refused.value)
