"""LoRA on a frozen base: attach an adapter, count what it trains, save it, compare it as saved.

LoRA (arXiv 2106.09685) leaves a layer's weight W as it is and adds a product of two thin matrices:
y = W x + (alpha / r) B A x, where A is (r, in) and B is (out, r). A begins random and B at zero, so
that the first step starts from the base itself. PEFT writes these layers; what is decided here is
which layers get them, in which datatype, and that the adapter alone is saved: a few MiB instead of
the whole model.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from qlora_nb.errors import KitError
from qlora_nb.model import load
from qlora_nb.model.linear_layers import adapted_names, linear_layers
from qlora_nb.record import files, seal


@load.without_checkpointing_warning()
def attach_adapter(model: PreTrainedModel, settings) -> PeftModel:
    """Freeze the base and put a LoRA adapter on the layers that `target_modules` names.

    `all-linear` adapts every linear layer of the blocks, the head excluded (QLoRA paper, figure 2;
    PEFT's own default for GPT-NeoX would be query_key_value alone). The rest keeps its dtype:
    nothing is upcast, which saves 1 GiB on pythia-12b. The adapter itself is float32.

    Raises:
        KitError: a target that is no linear layer of this model, or a rank above every layer's
            size.
    """
    if isinstance(model, PeftModel):
        model = model.unload()  # the cell was run before: begin anew
    targets = adapted_names(model, settings.target_modules)
    layers = linear_layers(model).values()
    smallest = min(min(layer.in_features, layer.out_features) for layer in layers)
    if settings.r > smallest:
        raise KitError(
            "r is larger than the layers it approximates",
            value=settings.r,
            allowed=f"1 to {smallest}",
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)  # lora_A is random
    if settings.gradient_checkpointing:
        load.enable_checkpointing(model)
    return get_peft_model(model, config)


def require_adapter(model: PeftModel) -> None:
    """Refuse a model that has no adapter yet, or one that was loaded to answer, not to train."""
    if not isinstance(model, PeftModel) or not trainable_parameters(model):
        raise KitError(
            "this model has no adapter that can be trained",
            value=type(model).__name__,
            remedy="run the cell with training.attach_adapter first, then this one",
        )


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """The adapter alone, as safetensors. Embeddings are frozen; asking whether they changed would
    ask the hub.
    """
    model.save_pretrained(folder, save_embedding_layers=False)


def save_sealed(model: PeftModel, folder: Path) -> Path:
    """The adapter with a seal (see `seal`), by which a later reader knows that it is whole."""
    with files.writing(folder):
        save_adapter(model, folder)
        seal.write_seal(folder)
    return folder


@torch.no_grad()
def saved_adapter_difference(model: PeftModel, folder: Path, input_ids: torch.Tensor) -> float:
    """Largest logit difference between the trained adapter and the one read back from `folder`.

    The saved adapter is loaded beside the trained one onto the same 4-bit base, so that no second
    model is held. Empty adapters of 443 bytes have been saved before; only zero is right.

    Raises:
        KitError: there is no trained adapter on this model.
    """
    require_adapter(model)
    active = model.active_adapter
    trained = model(input_ids=input_ids).logits
    model.load_adapter(str(folder), adapter_name="read_back")
    model.set_adapter("read_back")
    read_back = model(input_ids=input_ids).logits
    model.set_adapter(active)
    model.delete_adapter("read_back")
    return (trained - read_back).abs().max().item()
