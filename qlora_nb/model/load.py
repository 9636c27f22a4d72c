"""Loading: one call for the pocket model, SmolLM2 and every Pythia, in 4 bit or in full precision.

transformers reads the files and bitsandbytes quantizes every linear layer of the blocks on the way
(QLoRA paper, section 3: storage in NF4, arithmetic in 16 bit). What is ours is the choice of the
datatypes by hardware, and everything that would otherwise go wrong silently: weights that are
missing from the files, a model that is quantized already, logits that are NaN, generation defaults
that decide in place of the parameters. Only safetensors are read, and no code from a model's
repository is ever run.
"""

import warnings
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.model import (
    chat_templates,
    device,
    embeddings,
    generation_defaults,
    quantized_copy,
)
from qlora_nb.model.configs import config_of, loading, meta_model
from qlora_nb.model.linear_layers import (
    adapted_names,
    described,
    own_quantization,
    require_four_bit,
)
from qlora_nb.record import seal


def ignore_checkpointing_warning() -> None:
    """PEFT 0.21 asks for gradient checkpointing by a name that goes away in transformers 6. From
    here on nobody is told: only PEFT could change it.
    """
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* deprecated", FutureWarning)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Let a frozen model recompute activations in the backward pass; its inputs then ask for
    gradients, because none of its own weights does.

    transformers 6 calls it `activation_checkpointing_enable`; 5.15, which Colab has, knows the
    older name alone.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


def load_tokenizer(settings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template, its own or the kit's, and with a padding token
    that is not the end-of-text token if it has any.

    If both are the same (GPT-2 has one special token), a collator that masks padding by its id
    masks the end of every answer, and the model never learns to stop; ours masks by position. The
    embedding is never resized: Pythia has 411 spare rows (12b), and id 1 is already `<|padding|>`.

    Raises:
        KitError: it cannot be read, has no end token, or does not fit the model.
    """
    path = sources.model_path(settings.model_id)
    with loading("tokenizer", settings.model_id):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # transformers makes an empty one where there is none
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("it is not there")
        tokenizer("")  # some of what its configuration has wrong shows only in use
        chat_templates.give_template(tokenizer)
    if tokenizer.eos_token_id is None:
        raise KitError(
            "the tokenizer has no end token: a model trained with it would never learn to stop",
            value=settings.model_id,
            remedy="name one in its tokenizer_config.json, or choose another model",
        )
    n_rows = config_of(settings.model_id).vocab_size
    _require_known_ids(tokenizer, n_rows, settings.model_id)
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id or pad >= n_rows:
        tokenizer.pad_token = _spare_token(tokenizer, n_rows)
    return tokenizer


def _require_known_ids(tokenizer, n_rows: int, model_id: str) -> None:
    """Compare a tokenizer's ids with the rows of the model's embedding. Those of added tokens may
    be beyond them, as long as no text uses them (Gemma 3 has one for images).

    Raises:
        KitError: texts would get ids that have no row.
    """
    known = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab()
    beyond = [token for token, number in known.items() if number >= n_rows]
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    without = [token for token in beyond if token in used or token not in added]
    if without:
        raise KitError(
            f"the tokenizer and the model do not fit: {len(without)} tokens, such as "
            f"{without[0]!r}, have ids beyond the {n_rows} rows of the model's embedding",
            value=model_id,
            remedy="take the tokenizer that the model was saved with",
        )
    if len(known) < n_rows / 2:
        print(
            f"the tokenizer has {len(known):,} tokens, the model's embedding {n_rows:,} rows: "
            "if it is another model's, its answers mean nothing"
        )


def _spare_token(tokenizer, n_rows: int) -> str:
    """A special token to pad with: one made for it if there is one, the end token if there is no
    other.
    """
    spare = []
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.special and number < n_rows and number != tokenizer.eos_token_id:
            spare.append(token.content)
    return max(spare, key=lambda token: "pad" in token, default=tokenizer.eos_token)


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
    """The base model as notebooks 06 and 07 load it in view: frozen weights in 4 bit, or everything
    in the compute dtype.

    Args:
        settings: the resolved parameters.
        four_bit: False loads every weight in the compute dtype (float32 on a CPU).

    Returns:
        The model in eval mode on the first GPU or on the CPU.

    Raises:
        KitError: see `weights_of` and `prepared`.
    """
    with loading("model", settings.model_id):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            weights_of(settings, four_bit),
            quantization_config=quantization_config(settings) if four_bit else None,
            dtype=device.compute_dtype(settings.compute_dtype),
            device_map={"": device.compute_device()},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    return prepared(model, settings, loading_info)


def weights_of(settings, four_bit: bool = True) -> str:
    """What `from_pretrained` reads the weights of `model_id` from: a folder, a name on the hub, or
    the 4-bit copy that an earlier run has kept (`quantized_copy`).

    Raises:
        KitError: the model is saved quantized in a way that is not trained here, or in 4 bit where
            unquantized weights are asked for, nothing of it could be stored in 4 bit, or it is not
            the one that was shipped or sealed.
    """
    path = sources.model_path(settings.model_id)
    folder = Path(path)
    seal.require_whole(folder, "model")
    config = config_of(settings.model_id)
    if not folder.is_dir() or any(folder.glob("*token*")):
        load_tokenizer(settings)  # one that does not fit is refused before the weights are fetched
    own = own_quantization(config)
    if own and not four_bit:
        raise KitError(
            "the model is saved in 4 bit, its original weights are not there",
            value=settings.model_id,
            remedy='load it in 4 bit; an adapter can be merged with way="dequantized"',
        )
    if four_bit:
        adapted_names(meta_model(config), ["all-linear"])
    if own:
        found = described(own.bnb_4bit_quant_type, own.bnb_4bit_use_double_quant)
        asked = described(settings.quant_type, settings.double_quant)
        instead = "" if found == asked else f" ({asked} was asked for)"
        print(f"the model is saved in 4 bit and stays as it is: {found}{instead}")
        return path
    if four_bit and settings.prequantized:
        dtype = device.compute_dtype(settings.compute_dtype)
        path = str(quantized_copy.find(path, settings, dtype) or path)
    return path


def prepared(model: PreTrainedModel, settings, loading_info: dict) -> PreTrainedModel:
    """A loaded model, guarded against what would go wrong without a word.

    - Every weight came from the files: transformers would fill in random numbers.
    - bitsandbytes keeps the layout of the paper. On CPUs with bfloat16 units it would repack the
      weights at the first inference and compute in bfloat16 from then on, after which training
      fails.
    - A model that was saved in 4 bit computes in the dtype asked for.
    - The model computes numbers, and something of it is in 4 bit (`require_four_bit`).
    - Its own generation defaults do not decide (`generation_defaults`).
    - The 4-bit weights are kept for the next time, where `prequantized` says so.
    - `head_4bit` and `embedding_on_cpu` are carried out, and left alone where embedding and head
      are one tensor (`embeddings`).
    - A warning that PEFT is about to set off is switched off (`ignore_checkpointing_warning`).

    Args:
        model: from `from_pretrained`, in 4 bit or not.
        settings: the resolved parameters.
        loading_info: what `from_pretrained` found out while it read (`output_loading_info=True`).

    Returns:
        The same model, in eval mode.

    Raises:
        KitError: weights are missing or damaged, or nothing of the model can be stored in 4 bit.
    """
    ignore_checkpointing_warning()
    lost = sorted(loading_info["missing_keys"]) or sorted(loading_info["mismatched_keys"])
    if lost:
        with loading("model", settings.model_id):
            raise ValueError(f"{len(lost)} of its weights are not in the files, such as {lost[0]}")
    dtype = device.compute_dtype(settings.compute_dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
    if not computes(model):
        raise KitError(
            "the model computes NaN or infinity",
            value=settings.model_id,
            remedy="its weights are damaged, or too large for float16: "
            "fetch it again, or set another compute_dtype",
        )
    path = sources.model_path(settings.model_id)
    came_from = model.name_or_path
    model.name_or_path = path
    model.config.name_or_path = path
    generation_defaults.set_aside(model)
    if getattr(model, "is_loaded_in_4bit", False):
        require_four_bit(model)
        if settings.prequantized and came_from == path and not was_quantized(settings):
            quantized_copy.save(model, settings, dtype)
        _place_ends(model, settings, dtype)
    return model.eval()


def was_quantized(settings) -> bool:
    """Whether the model is saved in 4 bit by its makers."""
    return own_quantization(config_of(settings.model_id)) is not None


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
        embeddings.keep_embedding_on_cpu(model)
