"""Fast decoding says what plain `generate` says, holds little more, and leaves the model as it was."""

import json
import threading

import bitsandbytes as bnb
import pytest
import torch
from conftest import NOTEBOOKS
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompileConfig,
    GenerationConfig,
    GPTNeoXConfig,
    StaticCache,
)

from qlora_nb.engine import data, decoding, generation, ledger, models, training
from qlora_nb.engine.profiles import validate

FETCHED = (models.SMOLLM2_DIR / "config.json").is_file()
SMOLLM2 = pytest.param("smollm2", marks=[pytest.mark.slow, pytest.mark.skipif(not FETCHED, reason="SmolLM2 is not fetched")])


@pytest.fixture(scope="module", params=["tiny", SMOLLM2])
def world(request):
    settings = validate({"profile": request.param, "adapter": "pocket", "max_new_tokens": 24 if request.param == "tiny" else 3})
    base = models.load_base(settings)
    if request.param == "tiny":
        return settings, models.load_tokenizer(settings), generation.load_adapter(base, generation.ADAPTER_DIR)
    model = training.attach_adapter(base, settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return settings, models.load_tokenizer(settings), model


def plain(world, row, tuned):
    settings, tokenizer, model = world
    encoded = generation.encode([row], tokenizer, model, settings)
    config = generation._config(tokenizer, settings.max_new_tokens)
    with generation.base_or_tuned(model, tuned), torch.no_grad():
        out = model.generate(**encoded, generation_config=config)
    return tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("tuned", [False, True])
def test_the_tokens_are_those_of_plain_generate(world, tuned):
    settings, tokenizer, model = world
    for row in data.pocket.read("test")[:240:12]:
        assert generation.answer(model, tokenizer, row, settings, tuned).text == plain(world, row, tuned)


def test_the_weights_stay_packed_and_little_is_added(world, monkeypatch):
    settings, _, model = world
    made, empty, unpacked = [], torch.empty, bnb.functional.dequantize_blockwise
    monkeypatch.setattr(decoding.torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    monkeypatch.setattr(bnb.functional, "dequantize_blockwise", lambda *a: made.append(unpacked(*a)) or made[-1])
    before = ledger.measure(model).total_bytes
    with decoding.fast(model):
        own = [tensor for tensor in made if tensor.dtype == torch.float32 or tensor.nbytes > 2**16]
        held = ledger.measure(model).total_bytes + sum(tensor.nbytes for tensor in own)
    predicted = ledger.predict(settings, r=model.peft_config["default"].r)
    assert before < held <= 1.1 * (predicted.total_bytes - predicted.sum((ledger.GRADIENTS, ledger.STATES)))
    assert not [module for module in model.modules() if "forward" in vars(module)], "everything is as it was"


def test_another_thread_goes_the_plain_way_meanwhile(world):
    _, _, model = world
    ids, found, threads = torch.arange(5, 25)[None], [], torch.get_num_threads()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        # one thread adds in another order than two: SmolLM2's logits then differ by about 1e-5 of their size
        off = lambda logits: ((logits - wanted).norm() / wanted.norm()).item()

        def work():
            with torch.no_grad(), decoding.fast(model):
                found.append(model(input_ids=ids).logits)

        with decoding.fast(model):
            layer = next(m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
            assert "forward" in vars(layer) or torch.cuda.is_available()
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert "forward" in vars(layer) or torch.cuda.is_available(), "the other one's end is not ours"
            assert off(model(input_ids=ids).logits) < 1e-4
    assert off(found[0]) < 1e-4
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("values", [{"quant_type": "fp4", "double_quant": False}, {"compute_dtype": "bfloat16"}], ids=str)
def test_other_datatypes_give_the_same_logits(values):
    model, ids = models.load_base(validate(values)), torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with decoding.fast(model):
            assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-4 if wanted.dtype is torch.float32 else 0.2)


def tiny_model(folder, **how):
    """A random GPT-NeoX from disk, as transformers loads it; `how` may quantize it."""
    config = GPTNeoXConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@pytest.mark.parametrize("four_bit", [False, True])
def test_transformers_compiles_no_step_of_a_model_that_bitsandbytes_quantized(four_bit, tmp_path):
    """Transformers' own criterion, with a static cache and the CPU allowed for once, as a GPU is."""
    how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")} if four_bit else {}
    model, compiling = tiny_model(tmp_path, **how), CompileConfig()
    compiling._compile_all_devices = True
    cache = {"past_key_values": StaticCache(config=model.config, max_cache_len=16)}
    found = model._valid_auto_compile_criteria(cache, GenerationConfig(compile_config=compiling))
    assert found is not four_bit


def test_on_a_gpu_nothing_is_changed_and_no_other_cache_is_asked_for(world, monkeypatch):
    settings, tokenizer, model = world
    asked, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **given: asked.append(given["generation_config"]) or generate(**given))
    monkeypatch.setattr(decoding.torch.cuda, "is_available", lambda: True)
    with decoding.fast(model) as given:
        assert given is None
        assert not [module for module in model.modules() if "forward" in vars(module)]
    row = data.pocket.read("test")[0]
    said = generation.answer(model, tokenizer, row, settings, True).text
    assert asked[0].cache_implementation is None
    monkeypatch.undo()
    assert said == plain(world, row, True)


def test_the_docstring_has_the_recorded_shares_of_time():
    record = json.loads((NOTEBOOKS / "recorded" / "decoding.json").read_text())["models"]
    parts = ("unpacking codes", "unpacking scales", "products")
    found = {name: sum(model["shares_of_plain"][part] for part in parts) for name, model in record.items()}
    assert found["pocket"] == pytest.approx(1 / 2, abs=0.05)
    assert found["smollm2"] == pytest.approx(3 / 4, abs=0.05)
    said = " ".join(decoding.__doc__.split())
    assert "half of the time of plain `generate` goes there for the pocket model, three quarters for SmolLM2" in said


def test_along_an_answer_the_first_position_is_the_next_token(world):
    settings, tokenizer, model = world
    row = data.pocket.read("test")[0]
    found = generation.along(model, tokenizer, row, settings, "By the river.")
    base, tuned, bits = generation.next_tokens(model, tokenizer, row, settings, k=3)
    assert found[0][3] == pytest.approx(bits, abs=1e-3)
    assert [t for t, _ in found[0][1]] == [t for t, _ in base]
    assert [p for _, p in found[0][2]] == pytest.approx([p for _, p in tuned], abs=1e-4)
    assert found[-1][0] == "(end)"
    assert len(found) >= 2
    assert all(step[3] >= -1e-4 for step in found)
