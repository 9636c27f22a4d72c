"""LoRA on the layers of a frozen base: attached, counted, saved, and read back as it was
trained.
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
    model = (
        model.unload() if isinstance(model, PeftModel) else model
    )  # the cell was run before: begin anew
    targets = adapted_names(model, settings.target_modules)
    smallest = min(min(m.in_features, m.out_features) for m in linear_layers(model).values())
    if settings.r > smallest:
        raise KitError(
            "r is larger than the layers it approximates",
            value=settings.r,
            allowed=f"1 to {smallest}",
        )
    own = settings.model_dump(include={"r", "lora_alpha", "lora_dropout"})
    config = LoraConfig(**own, target_modules=targets, bias="none", task_type="CAUSAL_LM")
    torch.manual_seed(settings.seed)  # lora_A is random
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, config)


def require_adapter(model: PeftModel) -> None:
    """Refuse a model whose cell with `attach_adapter` has not been run yet, or that was loaded to
    answer, not to train.
    """
    if not isinstance(model, PeftModel) or not trainable_parameters(model):
        what = "this model has no adapter that can be trained"
        remedy = "run the cell with training.attach_adapter first, then this one"
        raise KitError(what, value=type(model).__name__, remedy=remedy)


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """The adapter alone, as safetensors; embeddings are frozen, and asking whether they changed
    would ask the hub.
    """
    model.save_pretrained(folder, save_embedding_layers=False)


def save_sealed(model: PeftModel, folder: Path) -> Path:
    with files.writing(folder):
        save_adapter(model, folder)
        seal.write_seal(folder)
    return folder


@torch.no_grad()
def saved_adapter_difference(model: PeftModel, folder: Path, input_ids: torch.Tensor) -> float:
    """Largest logit difference between the trained adapter and the one read back from `folder`.

    The saved adapter is loaded beside the trained one onto the same 4-bit base, so that no second
    model is held. Adapters of 443 bytes have been saved before; zero is the answer that counts.

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
