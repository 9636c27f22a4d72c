"""Loading: one call for the pocket model, SmolLM2 and every Pythia, in 4 bit or in full precision.

transformers loads and bitsandbytes quantizes; what is ours is the choice of datatypes by hardware
and the refusal of anything that is not safetensors. No code from a model's repository is ever run.
"""

import warnings

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_nb import sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import device, embeddings, generation_defaults, quantized, quantized_copy

# PEFT asks transformers for gradient checkpointing by a name that is going away: nothing a reader
# could mend.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


def load_tokenizer(settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token that is not the end-of-text token.

    If both were the same, masking the padding would mask the end of every answer and the model
    would never learn to stop.
    The embedding is never resized: Pythia has 411 spare rows (12b), and id 1 is already
        `<|padding|>`.
    """
    path = sources.model_path(settings.model_id)
    with loading("tokenizer", settings.model_id):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if len(tokenizer) <= len(
            tokenizer.all_special_ids
        ):  # transformers makes an empty one where there is none
            raise ValueError("it is not there")
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end token: a model trained with it would never learn to stop"
        raise KitError(
            what,
            value=settings.model_id,
            remedy="name one in its tokenizer_config.json, or choose another model",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        known = tokenizer.get_vocab()
        spare = [
            t
            for t in ("<|padding|>", "<|endoftext|>", tokenizer.unk_token)
            if t in known and t != tokenizer.eos_token
        ]
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
    """What transformers passes on to bitsandbytes. Its own defaults would be fp4, float32 compute,
    no double quantization.
    """
    how = {
        "bnb_4bit_quant_type": settings.quant_type,
        "bnb_4bit_use_double_quant": settings.double_quant,
    }
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=device.compute_dtype(settings.compute_dtype),
        **how,
    )


def load_base(settings, four_bit: bool = True) -> PreTrainedModel:
    """Load the base model, frozen weights in 4 bit or everything in the compute dtype.

    Args:
        settings: the resolved parameters (`model_id`, `quant_type`, `double_quant`,
            `compute_dtype`).
        four_bit: False loads every weight in the compute dtype (float32 on a CPU).

    Returns:
        The model in eval mode on the first GPU or on the CPU.

    Raises:
        KitError: the weights are missing, damaged, or not safetensors; none of them can be stored
            in 4 bit; or the model is saved
            quantized: in 4 bit by bitsandbytes it is taken as it is, but has no other weights, and
                other ways are not known here.
    """
    path, dtype = (
        sources.model_path(settings.model_id),
        device.compute_dtype(settings.compute_dtype),
    )
    config = own_config(settings, dtype, four_bit)
    keep_copy = four_bit and settings.prequantized and not quantized.own_quantization(config)
    copy = quantized_copy.find(path, settings, dtype) if keep_copy else None
    how = {
        "dtype": dtype,
        "device_map": {"": device.compute_device()},
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if quantized.own_quantization(config):
        how["config"] = config
    elif four_bit and not copy:
        how["quantization_config"] = quantization_config(settings)
    with loading("model", settings.model_id):
        model, told = AutoModelForCausalLM.from_pretrained(
            copy or path, output_loading_info=True, **how
        )
        if lost := sorted(told["missing_keys"]) or sorted(told["mismatched_keys"]):
            raise ValueError(f"{len(lost)} of its weights are not in the files, such as {lost[0]}")
    for module in model.modules():
        # On CPUs with bfloat16 units bitsandbytes repacks the weights at the first inference and
        # computes in bfloat16 from then on; training after that fails, and the bytes are no longer
        # those of the paper. One layout everywhere.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not computes(model):
        remedy = "its weights are damaged, or too large for float16: fetch it again, or set another compute_dtype"
        raise KitError("the model computes NaN or infinity", value=settings.model_id, remedy=remedy)
    model.name_or_path = model.config.name_or_path = path
    if four_bit:
        quantized.require_four_bit(model)
    generation_defaults.plain_generation(model, path)
    if keep_copy and not copy:
        quantized_copy.keep(model, path, settings, dtype)
    levers = four_bit and (settings.head_4bit or settings.embedding_on_cpu)
    if levers and embeddings.are_tied(model):
        print(
            "embedding and head are one tensor in this model: head_4bit and embedding_on_cpu leave it as it is"
        )
    elif levers:
        if settings.head_4bit:
            embeddings.quantize_head(model, settings.quant_type, settings.double_quant, dtype)
        if settings.embedding_on_cpu and device.on_gpu():  # without a card it lies there anyway
            embeddings.keep_embedding_on_cpu(model, device.compute_device())
    return model.eval()


def own_config(settings, dtype: torch.dtype, four_bit: bool = True):
    """The model's configuration; one of a model saved in 4 bit says so, and that it is to be
    computed in `dtype`.

    Raises:
        KitError: it is quantized in a way that is not trained here, or in 4 bit where unquantized
            weights are asked for.
    """
    with loading("configuration", settings.model_id):
        config = AutoConfig.from_pretrained(
            sources.model_path(settings.model_id), trust_remote_code=False
        )
    own = quantized.own_quantization(config)
    if not own:
        return config
    if not four_bit:
        remedy = 'load it in 4 bit; an adapter can be merged with way="dequantized"'
        raise KitError(
            "the model is saved in 4 bit, its original weights are not there",
            value=settings.model_id,
            remedy=remedy,
        )
    found = quantized.described(own.bnb_4bit_quant_type, own.bnb_4bit_use_double_quant)
    asked = quantized.described(settings.quant_type, settings.double_quant)
    instead = "" if found == asked else f" ({asked} was asked for)"
    print(f"the model is saved in 4 bit and stays as it is: {found}{instead}")
    own.bnb_4bit_compute_dtype = dtype
    config.quantization_config = own.to_dict()
    return config


@torch.no_grad()
def computes(model: torch.nn.Module) -> bool:
    """Whether every logit after one token is a number."""
    return bool(
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
        .logits.isfinite()
        .all()
    )
