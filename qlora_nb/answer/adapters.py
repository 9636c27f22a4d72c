"""The adapter as a plug-in: found, checked, put on a base model, switched on and off.

An adapter is a folder with `adapter_config.json` (which layers, which rank, for which base) and
`adapter_model.safetensors` (the two thin matrices of each layer). PEFT loads it and adds its
products in the forward pass; without them the same model is the base again, so that base and tuned
model are compared with one set of weights in memory. What PEFT accepts and this kit refuses: an
adapter that does not fit its configuration, holds no real numbers, or cannot be switched off
completely (trained biases, repeated layers). Source: PEFT, `peft_model.py`.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from qlora_nb import sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.record import runs, seal

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def find_adapter(settings) -> tuple[Path, str]:
    """The folder that `adapter` stands for and a sentence that says where it comes from.

    "latest" is the newest finished run of notebook 06 in this profile, else the adapter shipped
    with the pocket model.

    Raises:
        KitError: there is none, or the folder is not an adapter.
    """
    shipped = "the adapter shipped with the pocket model"
    if settings.adapter == "pocket":
        return ADAPTER_DIR, shipped
    if settings.adapter == "latest":
        run_folder = runs.latest_done(settings, "06_finetune_pythia_12b")
        if run_folder:
            return run_folder / "adapter", f"the adapter of your run {run_folder.name}"
        if settings.model_id == "pocket":
            return ADAPTER_DIR, f"no finished run of notebook 06 yet: {shipped}"
        raise KitError(
            "there is no finished run of notebook 06 in this profile",
            remedy="run notebook 06 first, or give adapter a folder",
        )
    folder = sources.local_path(settings.adapter)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise KitError(
            "this is not an adapter folder",
            value=settings.adapter,
            allowed=f"a folder with {CONFIG} and {WEIGHTS} (a .bin is a pickle, which can run code "
            "and is not loaded: PEFT's from_pretrained and save_pretrained convert one you trust)",
            remedy='use adapter="latest", "pocket", or the adapter/ folder of a run',
        )
    return folder, f"the adapter in {folder.name}"


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a saved adapter on a base model, as notebook 07 does it in view.

    Raises:
        KitError: see `loading` and `checked`.
    """
    with loading(model, folder):
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    return checked(tuned, folder)


@contextmanager
def loading(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Context in which whatever an adapter that does not fit makes a library say becomes a refusal.

    Raises:
        KitError: it was made for a model of another shape, or its files are not those that were
            sealed.
    """
    seal.require_whole(folder)
    with _fitting(model, folder):
        yield


def _fitting(model: PreTrainedModel, folder: Path) -> AbstractContextManager:
    own = _base_name(model.config.name_or_path)
    return refusing(
        f"the adapter does not fit: it was made for {_made_for(folder)}, the model here is {own}",
        folder.name,
        "load the base the adapter was trained on, or take another copy of the adapter",
    )


def checked(tuned: PeftModel, folder: Path) -> PeftModel:
    """A model with its adapter, in eval mode, guarded against what PEFT accepts without a word.

    - Configuration and weights of the adapter name the same layers, and the weights are real
      numbers.
    - Nothing of it stays on when it is switched off (trained biases, repeated layers).
    - With it the model computes numbers.
    - An adapter that was made for a base of another name is said to be.

    Raises:
        KitError: one of these does not hold.
    """
    tuned.eval()
    with _fitting(tuned, folder):
        _require_usable(tuned, folder / WEIGHTS)
    own = _base_name(tuned.config.name_or_path)
    if _made_for(folder) != own:
        print(
            f"the adapter was made for {_made_for(folder)}, the model here is {own}: "
            "if these are two models, its answers mean nothing"
        )
    return tuned


def _made_for(folder: Path) -> str:
    """The name of the base an adapter was trained on, as its configuration says."""
    with suppress(ValueError, AttributeError, OSError):
        config = json.loads((folder / CONFIG).read_text())
        return _base_name(str(config.get("base_model_name_or_path")))
    return "another model"


def _require_usable(tuned: PeftModel, weights: Path) -> None:
    """Raise a ValueError that says why a loaded adapter is not the one that its files describe, or
    cannot be switched off.
    """
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
        if set(names) != set(get_peft_model_state_dict(tuned, save_embedding_layers=False)):
            raise ValueError("its configuration and its weights name other layers")
        for name in names:
            if not file.get_slice(name).get_dtype().startswith(("F", "BF")):
                raise ValueError(f"{name} holds whole numbers")
    for config in tuned.peft_config.values():
        has_biases = getattr(config, "bias", "none") != "none"
        if has_biases or getattr(config, "layer_replication", None):
            raise ValueError(
                "it trained biases too or repeats layers (layer_replication), "
                "which cannot be switched off to ask the base"
            )
    if not load.computes(tuned):
        raise ValueError("with it the model computes NaN or infinity")


def _base_name(path: str) -> str:
    """The last part of a model's path; the shipped model is "pocket", wherever it is installed."""
    is_pocket = Path(path).parts[-2:] == MODEL_DIR.parts[-2:]
    return "pocket" if is_pocket else Path(path).name


def base_or_tuned(model: PreTrainedModel | PeftModel, tuned: bool) -> AbstractContextManager:
    """Context in which the model answers with its adapter (`tuned`) or with the adapter switched
    off. A model without an adapter is taken as it is.

    Raises:
        KitError: the tuned model is asked for, and no adapter is on it.
    """
    adapted = isinstance(model, PeftModel)
    if tuned and not adapted:
        raise KitError(
            "this model has no adapter",
            value=type(model).__name__,
            remedy="run the cell that attaches or loads the adapter first, then this one",
        )
    if tuned or not adapted:
        return nullcontext()
    return model.disable_adapter()
