"""Tiny random models of causal families, trained and asked twice: by the kit, and by plain
transformers, PEFT and bitsandbytes written out here.

`measured` gives one row of `docs/models.md`; `test_families.py` asks whether it is right, and
`tools/models_table.py` writes the table.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import open_cells
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qlora_nb.answer import generate
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import batching, data, load, probes
from qlora_nb.pocket import MODEL_DIR
from qlora_nb.record import runs
from qlora_nb.settings import validate

IDS = {"vocab_size": 1088, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SHAPE = IDS | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
GPT = IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FALCON = SHAPE | {"ffn_hidden_size": 128}
GEMMA = GROUPED | {"head_dim": 16}
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, tuple[str, dict]] = {
    "gpt_neox": ("GPTNeoX", SHAPE),
    "gpt2": ("GPT2", GPT),
    "gpt_neo": (
        "GPTNeo",
        SHAPE | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 16}),
    "opt": ("OPT", SHAPE | {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "bloom": ("Bloom", IDS | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon, multi-query": ("Falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon, new decoder": (
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon, alibi": (
        "Falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("Mpt", IDS | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "phi": ("Phi", SHAPE),
    "phi3": ("Phi3", GROUPED),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 8}),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3": ("Qwen3", GEMMA),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA | {"sliding_window": 8}),
    "gemma3_text": ("Gemma3Text", GEMMA | {"sliding_window": 8}),
    "granite": ("Granite", GROUPED | {"logits_scaling": 4.0, "embedding_multiplier": 6.0}),
    "cohere": ("Cohere", GROUPED | {"logit_scale": 0.25}),
    "stablelm": ("StableLm", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "smollm3": ("SmolLM3", GROUPED),
    "mamba": ("Mamba", IDS | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
}

ROWS = [
    {"instruction": "Where is Anna?", "input": "", "output": "Anna is in the garden."},
    {"instruction": "Who has it?", "input": "Ben took the ball. Ben went home.", "output": "Ben."},
    {"instruction": "Count.", "input": "One dog, two cats and a bird.", "output": "Four animals."},
    {"instruction": "Say no.", "input": "", "output": "No, I will not do that today."},
]
STEPS = 2
RATE = 5e-3
NEW_TOKENS = 6


def save(family: str, folder: Path) -> None:
    """A random model of a family, with the pocket model's tokenizer."""
    name, values = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # else the answers are one token again and again
        if parameter.dim() > 1:
            parameter.data *= 4
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)


def settings_for(folder: Path, **values):
    return validate(
        {
            "model_id": str(folder),
            "output_dir": str(folder / "runs"),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_length": 64,
            "max_new_tokens": NEW_TOKENS,
            "r": 4,
            "optim": "adamw_torch",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "save_steps": 0,
            "gradient_checkpointing": True,
            **values,
        }
    )


# --- plain transformers, PEFT and bitsandbytes ---


def plain_model(folder: Path):
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def held_bytes(model) -> int:
    """Bytes of every tensor of a model, whatever bitsandbytes has packed into it."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def share_of_blocks(model) -> float:
    """Of the weights outside embeddings and head: how many are in 4 bit."""
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    packed = 0
    others = 0
    for parameter in model.parameters():
        if any(parameter is end for end in ends):
            continue
        state = getattr(parameter, "quant_state", None)
        if state is None:
            others += parameter.numel()
        else:
            packed += state.shape.numel()
    return packed / (packed + others)


def plain_answers(model, tokenizer, settings) -> list[str]:
    """Greedy answers, one row at a time."""
    texts = []
    for row in ROWS:
        text = data.prompt_of(row, settings.prompt_template)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        said = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        texts.append(said.rstrip("\ufffd").strip())  # a last character may be cut off
    return texts


def plain_training(model, rows: list[dict], settings):
    """Some steps of AdamW on an adapter of every 4-bit layer of the blocks: (the tuned model, its
    losses).
    """
    names = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    lora = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=sorted(names),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for start in range(0, 2 * STEPS, 2):
        pair = rows[start : start + 2]
        width = max(len(row["input_ids"]) for row in pair)
        ids = torch.full((2, width), 1)
        labels = torch.full((2, width), -100)
        mask = torch.zeros(2, width, dtype=torch.long)
        for i, row in enumerate(pair):
            n = len(row["input_ids"])
            ids[i, :n] = torch.tensor(row["input_ids"])
            labels[i, :n] = torch.tensor(row["labels"])
            mask[i, :n] = 1
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@torch.no_grad()
def rows_apart(model, rows: list[dict]) -> bool:
    """Whether the rows of a pack have the logits that each has alone."""
    pack = batching.pack(Dataset.from_list(rows), 128)[0]
    try:
        packed = model(
            input_ids=torch.tensor([pack["input_ids"]]),
            position_ids=torch.tensor([pack["position_ids"]]),
            use_cache=False,
        ).logits[0]
    except TypeError:  # it takes no position_ids
        return False
    alone = []
    for row in rows:
        alone.append(model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0])
    alone = torch.cat(alone)
    return bool((packed - alone).abs().max() < 1e-4 * alone.abs().max())


# --- the kit beside it ---


def refusal_of(action: Callable[[], object]) -> str:
    """The sentence with which the kit refuses, or nothing."""
    try:
        action()
    except KitError as error:
        return str(error)
    return ""


def measured(family: str, folder: Path) -> dict[str, object]:
    """What becomes of a family: one row of the table, and the numbers that are to be equal.

    Args:
        folder: what `save` has written.
    """
    name, _ = FAMILIES[family]
    row: dict[str, object] = {"family": family, "class": class_of(name)}
    settings = settings_for(folder)
    row["refusal"] = refusal_of(lambda: budget.peak(plan_of(settings)))
    if row["refusal"]:
        return row
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load.load_base(settings)
        row["said"] = heard.getvalue()
        tokenizer = load.load_tokenizer(settings)
        plain = plain_model(folder)
        rows = data.tokenize_rows(Dataset.from_list(ROWS), tokenizer, settings)
        in_order = list(batching.in_training_order(rows, settings))
        row["share"] = share_of_blocks(plain)
        row["bytes"] = {
            "predicted": ledger.predict(plan_of(settings.replace(r=0))).total_bytes,
            "measured": ledger.measure(model).total_bytes,
            "plain": held_bytes(plain),
        }
        row["apart"] = rows_apart(plain, list(rows))
        row["packing refused"] = refusal_of(
            lambda: probes.before_training(model, settings.replace(packing=True, loss_chunk=0))
        )
        heard.truncate(0)
        row["too long refused"] = refusal_of(lambda: probes.require_positions(model, 10_000))
        row["too long said"] = heard.getvalue()
        model = open_cells.attach_adapter(model, settings)
        run = runs.Run(settings, "06_test")
        trained = open_cells.finetune(model, tokenizer, rows, settings, run, lambda step: None)
        tuned, losses = plain_training(plain, in_order, settings)
        row["losses"] = {"kit": trained["losses"], "plain": losses}
        row["answers"] = {
            "kit": generate.answer_all(model.eval(), tokenizer, ROWS, settings),
            "plain": plain_answers(tuned, tokenizer, settings),
        }
    row["equal"] = is_equal(row)
    return row


def is_equal(row: dict[str, object]) -> bool:
    """Whether everything that is to be equal is: bytes, losses, answers."""
    sizes = set(row["bytes"].values())
    pairs = zip(row["losses"]["kit"], row["losses"]["plain"], strict=True)
    same_losses = all(math.isclose(kit, plain, rel_tol=1e-5) for kit, plain in pairs)
    return len(sizes) == 1 and same_losses and row["answers"]["kit"] == row["answers"]["plain"]


def class_of(name: str) -> str:
    """The class that transformers makes of a configuration's name."""
    config = getattr(transformers, f"{name}Config")
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config].__name__
