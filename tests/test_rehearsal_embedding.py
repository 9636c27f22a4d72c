"""`embedding_on_cpu` as on a card: *meta* stands for the card, the table lies in the host's memory,
and both must never meet.
"""

from __future__ import annotations

import copy

import pytest
import rehearsal
import torch
import torch.fx.experimental._config
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)
from transformers.generation import GenerationMixin

from qlora_nb.answer import evaluate, generate
from qlora_nb.model import data, embeddings, load
from qlora_nb.settings import validate

SIZES = {
    "vocab_size": 1088,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "max_position_embeddings": 256,
}
WIDE = {"intermediate_size": 128}
FEW_HEADS = {"head_dim": 16, "num_key_value_heads": 2}
FAMILIES = {
    "gpt_neox": GPTNeoXConfig(**SIZES, **WIDE),
    "llama": LlamaConfig(**SIZES, **WIDE, num_key_value_heads=2),
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    "gemma": GemmaConfig(**SIZES, **WIDE, **FEW_HEADS, tie_word_embeddings=False),
    "gemma3, whose embedding scales": Gemma3TextConfig(
        **SIZES, **WIDE, **FEW_HEADS, tie_word_embeddings=False
    ),
}
SETTINGS = validate({"max_new_tokens": 3})


@pytest.fixture(params=FAMILIES)
def on_card(request):
    """A model on the card but for its input embedding, as `load_base` leaves it with
    embedding_on_cpu.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    table = copy.deepcopy(model.get_input_embeddings())
    model.to(rehearsal.Meta.CARD)
    model.set_input_embeddings(table)
    embeddings.keep_embedding_on_cpu(model)
    assert not table.weight.is_meta
    return model


def test_rehearsal_the_stand_in_refuses_what_a_card_refuses():
    here, there = torch.ones(3), torch.ones(3, device=rehearsal.Meta.CARD)
    with rehearsal.Meta():
        with pytest.raises(RuntimeError, match="same device, found cpu, meta"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, 3) @ there
        assert (torch.tensor(2.0) * there).is_meta, "a single number may come from the host"
        assert there.cpu().tolist() == [0, 0, 0]


def test_rehearsal_the_whole_model_says_it_is_on_the_card(on_card):
    assert on_card.device == rehearsal.Meta.CARD
    assert not any(
        "embed_tokens" in name or "embed_in" in name for name, _ in on_card.named_parameters()
    )


@pytest.fixture
def three_tokens(monkeypatch):
    """Every answer ends after three tokens: which ones were written cannot be read from tensors
    without values.
    """
    calls = []

    def unfinished(*args, **kwargs) -> bool:
        calls.append(1)
        return len(calls) % 4 != 0

    monkeypatch.setattr(GenerationMixin, "_has_unfinished_sequences", unfinished)
    return calls


def test_rehearsal_of_answers_with_the_embedding_in_the_hosts_memory(on_card, three_tokens):
    tokenizer, row = (
        load.load_tokenizer(SETTINGS),
        generate.row_of("Where is Anna?\nAnna went home."),
    )
    with rehearsal.Meta(), torch.no_grad():
        encoded = generate.tokenize_prompts([row, row], tokenizer, on_card, SETTINGS)
        assert on_card(**encoded).logits.shape[:2] == encoded["input_ids"].shape
        assert generate.answer_all(on_card, tokenizer, [row, row], SETTINGS) == [
            "",
            "",
        ]  # token 0, three times: the end token
    assert len(three_tokens) == 4


def test_rehearsal_of_the_held_out_loss_with_the_embedding_in_the_hosts_memory(on_card):
    tokenizer = load.load_tokenizer(SETTINGS)
    held_out = data.tokenize_rows(data.load(SETTINGS)[1].take(3), tokenizer, SETTINGS)
    every_token_counts = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)
    with rehearsal.Meta(), every_token_counts:
        assert evaluate.row_losses(on_card, tokenizer, held_out).shape == (3, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rehearsal_of_a_step_with_the_embedding_in_the_hosts_memory(on_card, checkpointing):
    model = on_card
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    ids = torch.ones(2, 7, dtype=torch.long, device=rehearsal.Meta.CARD)
    with rehearsal.Meta():
        model.train()(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids
        ).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.is_meta for p in trained)
