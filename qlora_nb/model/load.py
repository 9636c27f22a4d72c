"""Loading: one call for the pocket model, SmolLM2 and every Pythia, in 4 bit or in full precision.

transformers reads the files and bitsandbytes quantizes every linear layer of the blocks on the way
(QLoRA paper, section 3: storage in NF4, arithmetic in 16 bit). What is ours is the choice of the
datatypes by hardware, and everything that would otherwise go wrong silently: weights that are
missing from the files, a model that is quantized already, logits that are NaN, generation defaults
that decide in place of the parameters. Only safetensors are read, and no code from a model's
repository is ever run.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def without_checkpointing_warning() -> Iterator[None]:
    """Inside, PEFT may ask transformers for gradient checkpointing by a name that is going away:
    nothing a reader could mend.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        yield


def loading(part: str, model_id: str):
    """Context in which whatever a broken file makes a library say becomes a refusal."""
    remedy = (
        "needed are config.json, tokenizer and whole .safetensors files; "
        "fetch the model again if one was cut short"
    )
    return refusing(f"the {part} cannot be loaded", model_id, remedy)


def saved_config(model_id: str):
    """transformers' configuration of a model, from its config.json."""
    path = sources.model_path(model_id)
    with loading("configuration", model_id):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Let a frozen model recompute activations in the backward pass; its inputs then ask for
    gradients, because none of its own weights does.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def load_tokenizer(settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token that is not the end-of-text token.

    If both were the same, masking the padding would mask the end of every answer and the model
    would never learn to stop. The embedding is never resized: Pythia has 411 spare rows (12b), and
    id 1 is already `<|padding|>`.

    Raises:
        KitError: it cannot be read, has no end token, or none that it could pad with.
    """
    path = sources.model_path(settings.model_id)
    with loading("tokenizer", settings.model_id):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # transformers makes an empty one where there is none
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("it is not there")
    if tokenizer.eos_token_id is None:
        raise KitError(
            "the tokenizer has no end token: a model trained with it would never learn to stop",
            value=settings.model_id,
            remedy="name one in its tokenizer_config.json, or choose another model",
        )
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    known = tokenizer.get_vocab()
    for token in ("<|padding|>", "<|endoftext|>", tokenizer.unk_token):
        if token in known and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return tokenizer
    raise KitError(
        "the tokenizer has no token to pad with besides its end token",
        value=settings.model_id,
        remedy="choose another model",
    )


def quantization_config(settings) -> BitsAndBytesConfig:
    """What transformers passes on to bitsandbytes. Its own defaults would be fp4, float32 compute,
    no double quantization.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=device.compute_dtype(settings.compute_dtype),
    )


def load_base(settings, four_bit: bool = True) -> PreTrainedModel:
    """Load the base model, frozen weights in 4 bit or everything in the compute dtype.

    Guarded on the way:

    - a model that is saved quantized keeps its own storage, if that is 4 bit (`_own_config`);
    - a 4-bit copy kept by an earlier run is used if it still holds (`quantized_copy`);
    - every weight comes from the files, and none is repacked later (`_read`);
    - the model computes numbers (`_require_finite`), and something is in 4 bit (`quantized`);
    - its own generation defaults do not decide (`generation_defaults`);
    - options for embedding and head are left alone where both are one tensor (`_place_ends`).

    Args:
        settings: the resolved parameters (`model_id`, `quant_type`, `double_quant`,
            `compute_dtype`, `prequantized`, `head_4bit`, `embedding_on_cpu`).
        four_bit: False loads every weight in the compute dtype (float32 on a CPU).

    Returns:
        The model in eval mode on the first GPU or on the CPU.

    Raises:
        KitError: the weights are missing, damaged, or not safetensors; none of them can be stored
            in 4 bit; or the model is saved quantized: in 4 bit by bitsandbytes it is taken as it
            is, but has no other weights, and other ways are not known here.
    """
    path = sources.model_path(settings.model_id)
    dtype = device.compute_dtype(settings.compute_dtype)
    config = _own_config(settings, dtype, four_bit)
    is_quantized = quantized.own_quantization(config) is not None
    keeps_copy = four_bit and settings.prequantized and not is_quantized
    copy = quantized_copy.find(path, settings, dtype) if keeps_copy else None
    options = {}
    if is_quantized:
        options["config"] = config
    elif four_bit and copy is None:
        options["quantization_config"] = quantization_config(settings)
    model = _read(copy or path, settings, dtype, options)
    _require_finite(model, settings)
    model.name_or_path = path
    model.config.name_or_path = path
    if four_bit:
        quantized.require_four_bit(model)
    generation_defaults.set_aside(model, path)
    if keeps_copy and copy is None:
        quantized_copy.save(model, path, settings, dtype)
    if four_bit:
        _place_ends(model, settings, dtype)
    return model.eval()


def _own_config(settings, dtype: torch.dtype, four_bit: bool):
    """The model's configuration; one of a model saved in 4 bit says so, and that it is to be
    computed in `dtype`.

    Raises:
        KitError: it is quantized in a way that is not trained here, or in 4 bit where unquantized
            weights are asked for.
    """
    config = saved_config(settings.model_id)
    own = quantized.own_quantization(config)
    if not own:
        return config
    if not four_bit:
        raise KitError(
            "the model is saved in 4 bit, its original weights are not there",
            value=settings.model_id,
            remedy='load it in 4 bit; an adapter can be merged with way="dequantized"',
        )
    found = quantized.described(own.bnb_4bit_quant_type, own.bnb_4bit_use_double_quant)
    asked = quantized.described(settings.quant_type, settings.double_quant)
    instead = "" if found == asked else f" ({asked} was asked for)"
    print(f"the model is saved in 4 bit and stays as it is: {found}{instead}")
    own.bnb_4bit_compute_dtype = dtype
    config.quantization_config = own.to_dict()
    return config


def _read(source, settings, dtype: torch.dtype, options: dict[str, object]) -> PreTrainedModel:
    """The model from its files: every weight is in them, and keeps its layout.

    On CPUs with bfloat16 units bitsandbytes repacks the weights at the first inference and computes
    in bfloat16 from then on; training after that fails, and the bytes are no longer those of the
    paper. That is switched off: one layout everywhere.
    """
    how = {
        "dtype": dtype,
        "device_map": {"": device.compute_device()},
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    with loading("model", settings.model_id):
        model, told = AutoModelForCausalLM.from_pretrained(source, **how, **options)
        lost = sorted(told["missing_keys"]) or sorted(told["mismatched_keys"])
        if lost:
            raise ValueError(f"{len(lost)} of its weights are not in the files, such as {lost[0]}")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _require_finite(model: PreTrainedModel, settings) -> None:
    if not computes(model):
        raise KitError(
            "the model computes NaN or infinity",
            value=settings.model_id,
            remedy="its weights are damaged, or too large for float16: "
            "fetch it again, or set another compute_dtype",
        )


@torch.no_grad()
def computes(model: torch.nn.Module) -> bool:
    """Whether every logit after one token is a number."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return bool(model(input_ids=token).logits.isfinite().all())


def _place_ends(model: PreTrainedModel, settings, dtype: torch.dtype) -> None:
    """Put the head in 4 bit and the embedding in the host's memory, where the settings say so."""
    if not (settings.head_4bit or settings.embedding_on_cpu):
        return
    if embeddings.are_tied(model):
        print(
            "embedding and head are one tensor in this model: "
            "head_4bit and embedding_on_cpu leave it as it is"
        )
        return
    if settings.head_4bit:
        embeddings.quantize_head(model, settings.quant_type, settings.double_quant, dtype)
    if settings.embedding_on_cpu and device.on_gpu():  # without a card it lies there anyway
        embeddings.keep_embedding_on_cpu(model, device.compute_device())
