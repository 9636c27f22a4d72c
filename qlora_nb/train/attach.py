"""LoRA on a frozen base: which layers are adapted, what trains, and whether what was saved is what
was trained.

LoRA (arXiv 2106.09685) leaves a layer's weight W as it is and adds a product of two thin matrices:
y = W x + (alpha / r) B A x, where A is (r, in) and B is (out, r). A begins random and B at zero, so
that the first step starts from the base itself. PEFT writes these layers, in a cell of notebook 06.
"""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_nb.errors import KitError
from qlora_nb.model.linear_layers import adapted_names, linear_layers


def layers_to_adapt(model: PreTrainedModel, settings) -> list[str]:
    """The layers that `target_modules` names, for `LoraConfig`.

    `all-linear` is every linear layer of the blocks, the head excluded (QLoRA paper, figure 2;
    PEFT's own default for GPT-NeoX would be query_key_value alone).

    Raises:
        KitError: a target that is no linear layer of this model, or a rank above every layer's
            size.
    """
    names = adapted_names(model, settings.target_modules)
    layers = linear_layers(model).values()
    largest = max(min(layer.in_features, layer.out_features) for layer in layers)
    if settings.r > largest:
        raise KitError(
            "r is larger than the layers it approximates",
            value=settings.r,
            allowed=f"1 to {largest}",
        )
    return names


def require_adapter(model: PeftModel) -> None:
    """Refuse a model that has no adapter yet, or one that was loaded to answer, not to train."""
    if not isinstance(model, PeftModel) or not model.get_nb_trainable_parameters()[0]:
        raise KitError(
            "this model has no adapter that can be trained",
            value=type(model).__name__,
            remedy="run the cell with get_peft_model first, then this one",
        )


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
