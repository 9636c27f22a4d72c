"""The adapter as a plug-in: found, checked, put on a base model, switched on and off."""

import json
from contextlib import nullcontext, suppress
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from qlora_nb import sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.record import runs, seal


def find_adapter(settings) -> tuple[Path, str]:
    """The folder that `adapter` stands for and a sentence that says where it comes from.

    "latest" is the newest finished run of notebook 06 in this profile, else the adapter shipped
    with the pocket model.

    Raises:
        KitError: there is none, or the folder is not an adapter.
    """
    if settings.adapter == "latest":
        if folder := runs.latest_done(settings, "06_finetune_pythia_12b"):
            return folder / "adapter", f"the adapter of your run {folder.name}"
        if settings.model_id != "pocket":
            remedy = "run notebook 06 first, or give adapter a folder"
            raise KitError("there is no finished run of notebook 06 in this profile", remedy=remedy)
        return (
            ADAPTER_DIR,
            "no finished run of notebook 06 yet: the adapter shipped with the pocket model",
        )
    if settings.adapter == "pocket":
        return ADAPTER_DIR, "the adapter shipped with the pocket model"
    folder = sources.local_path(settings.adapter)
    if not all(
        (folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")
    ):
        allowed = "a folder with adapter_config.json and adapter_model.safetensors"
        remedy = 'use adapter="latest", "pocket", or the adapter/ folder of a run'
        raise KitError(
            "this is not an adapter folder", value=settings.adapter, allowed=allowed, remedy=remedy
        )
    return folder, f"the adapter in {folder.name}"


@load.without_checkpointing_warning()
def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on a base model.

    Raises:
        KitError: it was made for a model of another shape, or its files are damaged.
    """
    seal.require_whole(folder)
    own, made_for = _base_name(model.config.name_or_path), "another model"
    with suppress(ValueError, AttributeError, OSError):
        made_for = _base_name(
            str(
                json.loads((folder / "adapter_config.json").read_text()).get(
                    "base_model_name_or_path"
                )
            )
        )
    what = f"the adapter does not fit: it was made for {made_for}, the model here is {own}"
    with refusing(
        what,
        folder.name,
        "load the base the adapter was trained on, or take another copy of the adapter",
    ):
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=False).eval()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            if set(file.keys()) != set(
                get_peft_model_state_dict(tuned, save_embedding_layers=False)
            ):
                raise ValueError("its configuration and its weights name other layers")
            if whole := [
                name
                for name in file.keys()
                if not file.get_slice(name).get_dtype().startswith(("F", "BF"))
            ]:  # noqa: SIM118
                raise ValueError(f"{whole[0]} holds whole numbers")
        for config in tuned.peft_config.values():
            if getattr(config, "bias", "none") != "none":
                raise ValueError(
                    "it trained biases too, which cannot be switched off to ask the base"
                )
            if getattr(config, "layer_replication", None):
                raise ValueError(
                    "it repeats layers (layer_replication), which cannot be undone to ask the base"
                )
        if not load.computes(tuned):
            raise ValueError("with it the model computes NaN or infinity")
    if made_for != own:
        print(
            f"the adapter was made for {made_for}, the model here is {own}: if these are two models, its answers mean nothing"
        )
    return tuned


def _base_name(path: str) -> str:
    return "pocket" if Path(path).parts[-2:] == MODEL_DIR.parts[-2:] else Path(path).name


def base_or_tuned(model: PreTrainedModel | PeftModel, tuned: bool):
    """Context in which the model answers with its adapter (`tuned`) or without; a base that has
    none yet is the base.

    Raises:
        KitError: the tuned model is asked for, and no adapter is on it.
    """
    adapted = isinstance(model, PeftModel)
    if tuned and not adapted:
        remedy = "run the cell that attaches or loads the adapter first, then this one"
        raise KitError("this model has no adapter", value=type(model).__name__, remedy=remedy)
    if tuned or not adapted:
        return nullcontext()
    return model.disable_adapter()
