"""Model folders and tokenizers as people bring them: used rightly, or refused in one sentence by
`plan`, by `script` and before the weights are read.
"""

import json
import shutil
from dataclasses import replace

import families
import open_cells
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4MoeConfig,
    MiniCPM3Config,
    PreTrainedTokenizerFast,
    Zamba2Config,
)
from typer.testing import CliRunner

from qlora_nb import cli
from qlora_nb.answer import adapters, generate
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, ledger, preflight
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import data, load, probes, reading
from qlora_nb.pocket import MODEL_DIR


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    families.save("llama", folder)
    return folder


@pytest.fixture
def model(base, tmp_path):
    """A folder of one's own, to be changed."""
    return shutil.copytree(base, tmp_path / "own")


def become(folder, name):
    """The weights under another name."""
    (folder / "model.safetensors").rename(folder / name)


def only(folder, **contents):
    """Nothing but these files."""
    for file in folder.iterdir():
        file.unlink()
    for name, text in contents.items():
        (folder / name.replace("_json", ".json")).write_text(text)


def configured(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def of_type(folder, model_type, **values):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **values}))


def in_shards(folder, *names):
    become(folder, names[0])
    index = {"metadata": {}, "weight_map": dict(zip("abc", names, strict=False))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


PICKLES = "pickles, which can run code and are not loaded.*save_pretrained"
CODE = r"code that comes with a model \(auto_map\) is not run"
GUESS = "not made to write a text on from its beginning"

FOLDERS = {
    "pickle": (lambda m: become(m, "pytorch_model.bin"), PICKLES),
    "pickle in parts": (lambda m: become(m, "pytorch_model-00001-of-00002.bin"), PICKLES),
    "consolidated": (lambda m: only(m, **{"consolidated.00.pth": ""}), PICKLES),
    "checkpoint": (lambda m: become(m, "last.ckpt"), PICKLES),
    "gguf beside a configuration": (lambda m: become(m, "model.Q4_K_M.gguf"), "GGUF.*gguf_file"),
    "gguf alone": (lambda m: only(m, **{"model.gguf": ""}), "GGUF.*gguf_file"),
    "adapter": (
        lambda m: only(m, adapter_config_json="{}", **{"adapter_model.safetensors": ""}),
        "holds an adapter.*its base as model_id",
    ),
    "adapter as a pickle": (
        lambda m: only(m, adapter_config_json="{}", **{"adapter_model.bin": ""}),
        "holds an adapter.*its base as model_id",
    ),
    "adapter beside its base": (
        lambda m: (m / "adapter_config.json").write_text("{}"),
        "holds an adapter",
    ),
    "diffusers": (lambda m: only(m, model_index_json="{}"), "diffusion pipeline"),
    "empty folder": (only, "no config.json"),
    "unknown model_type": (lambda m: configured(m, model_type="grok9"), CODE),
    "own code": (
        lambda m: configured(m, model_type="x", auto_map={"AutoConfig": "configuration_x.X"}),
        CODE,
    ),
    "no model_type": (lambda m: only(m, config_json="{}"), CODE),
    "configuration is a list": (lambda m: only(m, config_json="[]"), CODE),
    "bert": (lambda m: of_type(m, "bert"), "a token sees those behind it"),
    "modernbert": (lambda m: of_type(m, "modernbert"), GUESS),
    "t5": (lambda m: of_type(m, "t5"), GUESS),
    "bart": (lambda m: of_type(m, "bart", is_encoder_decoder=True), GUESS),
    "llava": (lambda m: of_type(m, "llava"), "images or sound"),
    "gemma 3 with images": (lambda m: of_type(m, "gemma3"), "images or sound"),
    "rwkv": (lambda m: of_type(m, "rwkv"), "it has no attention"),
    "sizes that do not fit": (lambda m: configured(m, num_attention_heads=5), "hidden"),
    "gptq": (
        lambda m: configured(m, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized already",
    ),
    "mxfp4": (
        lambda m: configured(m, quantization_config={"quant_method": "mxfp4"}),
        "quantized already",
    ),
}


@pytest.mark.fault(53)
@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_model_is_refused_by_plan_by_script_and_at_load(model, name):
    change, sentence = FOLDERS[name]
    change(model)
    if (model / "model.safetensors").exists():
        (model / "model.safetensors").write_bytes(b"")  # nobody gets as far as to read them
    settings = families.settings_for(model)
    with pytest.raises(KitError, match=sentence):
        load.load_base(settings)
    for command in ("plan", "script"):
        said = CliRunner().invoke(cli.app, [command, "-p", "model_id", str(model)])
        assert (said.exit_code, said.stderr.count("\n")) == (2, 1)
        with pytest.raises(KitError, match=sentence):
            raise KitError(said.stderr)


def test_a_missing_shard_is_named_before_a_model_is_made_of_the_others(model):
    in_shards(model, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    with pytest.raises(KitError, match=r"cannot be loaded.*model-00002-of-00002"):
        load.load_base(families.settings_for(model))


def test_an_adapter_saved_as_a_pickle_is_refused_with_a_way_to_convert_it(model):
    only(model, adapter_config_json="{}", **{"adapter_model.bin": ""})
    settings = families.settings_for(model, adapter=str(model)).replace(model_id="pocket")
    with pytest.raises(KitError, match=r"are a pickle.*convert it, if you trust"):
        adapters.find_adapter(settings)


def test_files_of_other_formats_beside_safetensors_are_left_alone(model):
    for name in ("training_args.bin", "optimizer.pt", "model.gguf", "pytorch_model.bin"):
        (model / name).write_bytes(b"")
    assert load.load_base(families.settings_for(model))


def test_a_file_in_place_of_a_folder_is_refused(model):
    for name in ("model.safetensors", "config.json"):
        settings = families.settings_for(model).replace(model_id=str(model / name))
        with pytest.raises(KitError, match="model_id is a file"):
            load.load_base(settings)
        with pytest.raises(KitError, match="model_id is a file"):
            preflight.require_model_and_data(settings)


def test_a_configuration_alone_is_enough_to_plan(model):
    only(model, config_json=(model / "config.json").read_text())
    said = CliRunner().invoke(cli.app, ["plan", "-p", "model_id", str(model)])
    assert said.exit_code == 0
    with pytest.raises(KitError, match="cannot be loaded"):
        load.load_base(families.settings_for(model))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "mpt"])
def test_plan_and_load_agree_on_too_few_positions(family, tmp_path):
    families.save(family, tmp_path / "model")
    settings = families.settings_for(tmp_path / "model", max_length=200)
    for command in ("plan", "script"):
        said = CliRunner().invoke(
            cli.app, [command, "-p", "model_id", settings.model_id, "-p", "max_length", "200"]
        )
        assert said.exit_code == 2
        assert "128 or less" in said.stderr
    loaded = load.load_base(settings)
    with pytest.raises(KitError, match="128 or less"):
        probes.before_training(loaded, settings)
    with pytest.raises((IndexError, RuntimeError)):
        loaded(input_ids=torch.full((1, 140), 7))
    row = {"instruction": "no " * 140, "input": ""}
    with pytest.raises(KitError, match="over the model's 128"):
        generate.answer_all(loaded, load.load_tokenizer(settings), [row], settings)


@pytest.fixture
def made(tmp_path):
    """Write a random model of a configuration; returns its folder."""

    def write(config):
        torch.manual_seed(0)
        folder = tmp_path / config.model_type
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
        return folder

    return write


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_experts_that_peft_would_adapt_unasked_are_refused_and_left_alone_on_request(made):
    """Of some families PEFT takes `up_proj` for the name of a tensor that holds all experts."""
    config = Glm4MoeConfig(
        **families.EXPERTS, n_routed_experts=4, first_k_dense_replace=1, head_dim=16
    )
    settings = families.settings_for(made(config))
    for command in ("plan", "script"):
        said = CliRunner().invoke(cli.app, [command, "-p", "model_id", settings.model_id])
        assert said.exit_code == 2
        assert "PEFT would adapt the experts of this model too" in said.stderr
    settings = settings.replace(target_modules=ATTENTION)
    loaded = open_cells.attach_adapter(load.load_base(settings), settings)
    predicted = ledger.predict(plan_of(settings))[ledger.LORA]
    assert budget.peak(plan_of(settings)).total_bytes
    assert predicted == ledger.measure(loaded)[ledger.LORA] > 0


def test_layers_that_share_weights_are_refused():
    """Zamba's: counted as often as they are used there would be more weights than there are."""
    with pytest.raises(KitError, match="layers of this model share their weights"):
        budget.peak(Plan(Zamba2Config(), length=8))


def test_values_of_another_width_than_the_keys_are_planned():
    """As in DeepSeek's attention and in MiniCPM's."""
    config = MiniCPM3Config(
        **families.SHAPE,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=24,
    )
    plan = Plan(config, length=32, r=4, rest_dtype=torch.float32)
    kept = budget.peak(replace(plan, checkpointing=False))[budget.KEPT]
    assert kept > budget.peak(plan)[budget.KEPT] > 0


# --- the tokenizer against the model ---


def words(n_words, **special):
    """A tokenizer of whole words with the special tokens that are named, in this order."""
    vocabulary = {f"w{i}": i for i in range(n_words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def pocket(model):
    return AutoTokenizer.from_pretrained(model)


def with_pad(tokenizer, token):
    tokenizer.add_special_tokens({"pad_token": token})
    return tokenizer


def with_added(tokenizer, *tokens, special=False):
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return tokenizer


UNFIT = {
    "end token beyond": lambda m: words(1088, eos_token="</s>"),
    "begin token beyond": lambda m: words(1087, eos_token="</s>", bos_token="<s>"),
    "more words than rows": lambda m: words(1500, eos_token="w1"),
    "another model's tokenizer": lambda m: words(50_000, eos_token="w1"),
}
PADS = {
    "none, like GPT-2": (lambda m: words(900, eos_token="</s>"), "</s>"),
    "the end token itself": (lambda m: words(900, eos_token="</s>", pad_token="</s>"), "</s>"),
    "the end token, and there is a spare one": (
        lambda m: with_added(
            words(900, eos_token="</s>", pad_token="</s>"),
            "<|im_start|>",
            "<|fim_pad|>",
            special=True,
        ),
        "<|fim_pad|>",
    ),
    "none, like Llama 3": (
        lambda m: with_added(
            words(900, eos_token="</s>", bos_token="<s>"), "<|right_pad_id|>", special=True
        ),
        "<|right_pad_id|>",
    ),
    "one added without a row": (
        lambda m: with_pad(words(1087, eos_token="</s>"), "[PAD]"),
        "</s>",
    ),
    "its own": (pocket, "<|padding|>"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_tokenizer_that_does_not_fit_is_refused_before_the_weights_are_read(model, name):
    UNFIT[name](model).save_pretrained(model)
    (model / "model.safetensors").write_bytes(b"")
    settings = families.settings_for(model)
    with pytest.raises(KitError, match=r"tokenizer and the model do not fit.*1088 rows"):
        load.load_base(settings)
    said = CliRunner().invoke(cli.app, ["script", "-p", "model_id", str(model)])
    assert said.exit_code == 2
    assert "do not fit" in said.stderr


@pytest.mark.parametrize("name", PADS)
def test_what_is_padded_with_has_a_row_and_changes_no_answer(model, name):
    make, wanted = PADS[name]
    make(model).save_pretrained(model)
    settings = families.settings_for(model)
    tokenizer = load.load_tokenizer(settings)
    assert tokenizer.pad_token == wanted
    assert tokenizer.pad_token_id < 1088
    loaded = load.load_base(settings)
    rows = [{"instruction": "w1 " * n, "input": ""} for n in (1, 9, 4)]
    alone = [generate.answer_all(loaded, tokenizer, [row], settings)[0] for row in rows]
    assert generate.answer_all(loaded, tokenizer, rows, settings) == alone


def test_a_token_for_images_without_a_row_is_no_reason_to_refuse(model):
    """Gemma 3 of 1B has one: no text uses it."""
    own = words(1086, eos_token="</s>", pad_token="<pad>")
    with_added(own, "<image_soft_token>", special=True).save_pretrained(model)
    tokenizer = load.load_tokenizer(families.settings_for(model))
    assert (len(tokenizer), tokenizer.pad_token) == (1089, "<pad>")


@pytest.mark.parametrize("longest", ["x", "", [512], {"tokens": 512}, "512"])
def test_a_tokenizer_whose_configuration_fails_only_in_use_is_refused(model, longest):
    """`model_max_length` is compared with a text's length, and nowhere before."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"model_max_length": longest}
    path.write_text(json.dumps(config))
    with pytest.raises(KitError, match="the tokenizer cannot be loaded"):
        load.load_tokenizer(families.settings_for(model))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_a_text_with_a_token_that_has_no_row_is_left_out(model, special, chat, capsys):
    """Somebody has added tokens and not resized the embedding."""
    tokenizer = with_added(pocket(model), *(f"<new{i}>" for i in range(20)), special=special)
    assert len(tokenizer) > 1088
    tokenizer.save_pretrained(model)
    words = ["Anna", "<new19>", "Ben"]
    path = model.parent / "rows.json"
    if chat:
        rows = [
            {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]}
            for w in words
        ]
    else:
        rows = [{"instruction": w, "output": w} for w in words]
    path.write_text(json.dumps(rows))
    settings = families.settings_for(model, dataset=str(path), eval_rows=1, train_rows=2)
    loaded = load.load_tokenizer(settings)
    found = reading.read(str(path), {}).kept
    usable = data.tokenize_rows(found, loaded, settings)
    assert list(usable["row"]) == [0, 2]
    assert "its text holds '<new19>', which the model's embedding has no row for" in (
        capsys.readouterr().out
    )
    base = load.load_base(settings)
    asked = [generate.row_of(word, settings.prompt_template) for word in words]
    assert generate.askable(asked, loaded, base, settings)[0] == [*asked[:1], *asked[2:]]


def test_a_tokenizer_with_far_fewer_tokens_than_rows_is_said(model, capsys):
    words(300, eos_token="w1").save_pretrained(model)
    load.load_tokenizer(families.settings_for(model))
    assert "300 tokens, the model's embedding 1,088 rows" in capsys.readouterr().out
