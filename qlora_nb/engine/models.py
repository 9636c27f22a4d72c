"""Loading: one call for the pocket model, SmolLM2 and every Pythia, in 4 bit or in full precision.

transformers loads and bitsandbytes quantizes; what is ours is the choice of datatypes by hardware and the refusal of
anything that is not safetensors. No code from a model's repository is ever run.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_nb.engine import brought, cards, ends, environment, prequantized
from qlora_nb.errors import KitError, refusing
from qlora_nb.pocket import MODEL_DIR

# PEFT asks transformers for gradient checkpointing by a name that is going away: nothing a reader could mend.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)

SMOLLM2_DIR = prequantized.CACHE / "SmolLM2-135M-Instruct"
"""Where `qlora-nb fetch smollm2` puts the converted model."""


def model_path(model_id: str) -> str:
    """The folder or hub name that transformers is given for a `model_id`.

    Raises:
        KitError: smollm2 before `qlora-nb fetch smollm2`.
    """
    if model_id == "pocket":
        return str(MODEL_DIR)
    if model_id == "smollm2":
        if not (SMOLLM2_DIR / "config.json").is_file():
            raise KitError("SmolLM2 is not on this machine yet", remedy="run: qlora-nb fetch smollm2")
        return str(SMOLLM2_DIR)
    folder = Path(model_id).expanduser()
    return str(folder) if folder.is_dir() else model_id


def device() -> torch.device:
    """torch's first CUDA device if the kit computes on it, else the CPU."""
    if getattr(torch.cuda, "_is_in_bad_fork", bool)():
        what = "this process was forked from one that uses the GPU, and cannot use it"
        raise KitError(what, remedy="start processes with torchrun, or with the method spawn")
    return torch.device("cuda", 0) if on_gpu() else torch.device("cpu")


def on_gpu() -> bool:
    """Whether the kit computes on a card: torch sees one, and it and bitsandbytes have code for it."""
    return torch.cuda.is_available() and not cards.why_unusable(torch)


def compute_dtype(choice: str = "auto") -> torch.dtype:
    """The dtype of the arithmetic: bfloat16 where the GPU has it, float16 on older GPUs, float32 on a CPU.

    float32 on a CPU is no waste: without AVX512-BF16 units bfloat16 was measured 12 times slower there. bfloat16 asked
    for on a GPU that lacks it becomes float16, with a notice.
    """
    card = environment.card() if on_gpu() else None
    if choice == "auto" and card is None:
        return torch.float32
    if choice == "auto":
        return torch.bfloat16 if card.has_bf16 else torch.float16
    if choice == "bfloat16" and card is not None and not card.has_bf16:
        print(f"{card.name} has no bfloat16: computing in float16 instead")
        return torch.float16
    return getattr(torch, choice)


def load_tokenizer(settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token that is not the end-of-text token.

    If both were the same, masking the padding would mask the end of every answer and the model would never learn to stop.
    The embedding is never resized: Pythia has 411 spare rows (12b), and id 1 is already `<|padding|>`.
    """
    path = model_path(settings.model_id)
    with loading("tokenizer", settings.model_id):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where there is none
            raise ValueError("it is not there")
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end token: a model trained with it would never learn to stop"
        raise KitError(what, value=settings.model_id, remedy="name one in its tokenizer_config.json, or choose another model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        spare = [t for t in ("<|padding|>", "<|endoftext|>", tokenizer.unk_token) if t in known and t != tokenizer.eos_token]
        if not spare:
            what = "the tokenizer has no token to pad with besides its end token"
            raise KitError(what, value=settings.model_id, remedy="choose another model")
        tokenizer.pad_token = spare[0]
    return tokenizer


def loading(part: str, model_id: str):
    """Context in which whatever a broken file makes a library say becomes a refusal."""
    remedy = "needed are config.json, tokenizer and whole .safetensors files; fetch the model again if one was cut short"
    return refusing(f"the {part} cannot be loaded", model_id, remedy)


def quantization_config(settings) -> BitsAndBytesConfig:
    """What transformers passes on to bitsandbytes. Its own defaults would be fp4, float32 compute, no double quantization."""
    how = {"bnb_4bit_quant_type": settings.quant_type, "bnb_4bit_use_double_quant": settings.double_quant}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype(settings.compute_dtype), **how)


def load_base(settings, four_bit: bool = True) -> PreTrainedModel:
    """Load the base model, frozen weights in 4 bit or everything in the compute dtype.

    Args:
        settings: the resolved parameters (`model_id`, `quant_type`, `double_quant`, `compute_dtype`).
        four_bit: False loads every weight in the compute dtype (float32 on a CPU).

    Returns:
        The model in eval mode on the first GPU or on the CPU.

    Raises:
        KitError: the weights are missing, damaged, or not safetensors; none of them can be stored in 4 bit; or the model is saved
            quantized: in 4 bit by bitsandbytes it is taken as it is, but has no other weights, and other ways are not known here.
    """
    path, dtype = model_path(settings.model_id), compute_dtype(settings.compute_dtype)
    config = own_config(settings, dtype, four_bit)
    keep_copy = four_bit and settings.prequantized and not brought.own_quantization(config)
    copy = prequantized.find(path, settings, dtype) if keep_copy else None
    how = {"dtype": dtype, "device_map": {"": device()}, "use_safetensors": True, "trust_remote_code": False}
    if brought.own_quantization(config):
        how["config"] = config
    elif four_bit and not copy:
        how["quantization_config"] = quantization_config(settings)
    with loading("model", settings.model_id):
        model, told = AutoModelForCausalLM.from_pretrained(copy or path, output_loading_info=True, **how)
        if lost := sorted(told["missing_keys"]) or sorted(told["mismatched_keys"]):
            raise ValueError(f"{len(lost)} of its weights are not in the files, such as {lost[0]}")
    for module in model.modules():
        # On CPUs with bfloat16 units bitsandbytes repacks the weights at the first inference and computes in bfloat16 from
        # then on; training after that fails, and the bytes are no longer those of the paper. One layout everywhere.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not computes(model):
        remedy = "its weights are damaged, or too large for float16: fetch it again, or set another compute_dtype"
        raise KitError("the model computes NaN or infinity", value=settings.model_id, remedy=remedy)
    model.name_or_path = model.config.name_or_path = path
    if four_bit:
        brought.require_four_bit(model)
    brought.plain_generation(model, path)
    if keep_copy and not copy:
        prequantized.keep(model, path, settings, dtype)
    levers = four_bit and (settings.head_4bit or settings.embedding_on_cpu)
    if levers and ends.are_tied(model):
        print("embedding and head are one tensor in this model: head_4bit and embedding_on_cpu leave it as it is")
    elif levers:
        if settings.head_4bit:
            ends.quantize_head(model, settings.quant_type, settings.double_quant, dtype)
        if settings.embedding_on_cpu and on_gpu():  # without a card it lies there anyway
            ends.keep_embedding_on_cpu(model, device())
    return model.eval()


def own_config(settings, dtype: torch.dtype, four_bit: bool = True):
    """The model's configuration; one of a model saved in 4 bit says so, and that it is to be computed in `dtype`.

    Raises:
        KitError: it is quantized in a way that is not trained here, or in 4 bit where unquantized weights are asked for.
    """
    with loading("configuration", settings.model_id):
        config = AutoConfig.from_pretrained(model_path(settings.model_id), trust_remote_code=False)
    own = brought.own_quantization(config)
    if not own:
        return config
    if not four_bit:
        remedy = 'load it in 4 bit; an adapter can be merged with way="dequantized"'
        raise KitError("the model is saved in 4 bit, its original weights are not there", value=settings.model_id, remedy=remedy)
    found = brought.described(own.bnb_4bit_quant_type, own.bnb_4bit_use_double_quant)
    asked = brought.described(settings.quant_type, settings.double_quant)
    instead = "" if found == asked else f" ({asked} was asked for)"
    print(f"the model is saved in 4 bit and stays as it is: {found}{instead}")
    own.bnb_4bit_compute_dtype = dtype
    config.quantization_config = own.to_dict()
    return config


@torch.no_grad()
def computes(model: torch.nn.Module) -> bool:
    """Whether every logit after one token is a number."""
    return bool(model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits.isfinite().all())


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Name → module of every linear layer inside the blocks: the ones QLoRA quantizes and adapts (the head is not one)."""
    head = set(model.get_output_embeddings().modules())
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m not in head}
    return {n: m for n, m in linear.items() if "lora_" not in n}


def adapted_names(model: PreTrainedModel, target_modules: Sequence[str]) -> list[str]:
    """The last part of the names of the layers to adapt: `all-linear` spelt out for this model, anything else as it is.

    PEFT's own `all-linear` would take the slices of a 4-bit head for layers of the blocks.

    Raises:
        KitError: a name that no linear layer of the blocks has, or `all-linear` beside other names.
    """
    names = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    if list(target_modules) == ["all-linear"]:
        return names
    if wrong := [target for target in target_modules if target not in names]:
        allowed = f"all-linear alone, or any of {', '.join(names)}"
        raise KitError("target_modules names layers this model does not have", value=", ".join(wrong), allowed=allowed)
    return list(target_modules)


def dense_weight(module: torch.nn.Module) -> torch.Tensor:
    """A linear layer's weight as float32 (out, in), dequantized if it is stored in 4 bit."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()
