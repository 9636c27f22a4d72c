"""The adapter as a plug-in: found, checked, put on a base model, switched on and off.

An adapter is a folder with `adapter_config.json` (which layers, which rank, for which base) and
`adapter_model.safetensors` (the two thin matrices of each layer). PEFT loads it and adds its
products in the forward pass; without them the same model is the base again, so that base and tuned
model are compared with one set of weights in memory. Whatever PEFT loads is used as PEFT uses it.
What PEFT accepts and this kit refuses: an adapter that is used in part only, holds no real numbers,
or after which the base is not the same any more when the adapter is switched off. An adapter whose
file also replaces numbers of the base (trained biases, a whole embedding) can be switched off,
because the base's own are kept. Source: PEFT, `peft_model.py`.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from qlora_nb import sources
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import data, load
from qlora_nb.pocket import ADAPTER_DIR, MODEL_DIR
from qlora_nb.record import files, runs, seal

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def find_adapter(settings) -> tuple[Path, str]:
    """The folder that `adapter` stands for and a sentence that says where it comes from.

    "latest" is the newest finished run of notebook 06 in this profile, else the adapter shipped
    with the pocket model. The folder of a run stands for the adapter in it. Of an adapter that
    nobody sealed the first digits of its file's SHA-256 are said.

    Raises:
        KitError: there is none, or the folder is not an adapter.
    """
    shipped = "the adapter shipped with the pocket model"
    if settings.adapter == "pocket":
        return ADAPTER_DIR, shipped
    if settings.adapter == "latest":
        run_folder = runs.latest_done(settings, runs.FINE_TUNING)
        if run_folder:
            return run_folder / "adapter", f"the adapter of your run {run_folder.name}"
        if settings.model_id == "pocket":
            return ADAPTER_DIR, f"no finished run of notebook 06 yet: {shipped}"
        raise KitError(
            "there is no finished run of notebook 06 in this profile",
            remedy="run notebook 06 first, or give adapter a folder",
        )
    folder = sources.local_path(settings.adapter).absolute()
    if (folder / "adapter" / CONFIG).is_file():
        folder = folder / "adapter"
    _require_files(folder)
    where_from = f"the adapter in {folder.name}"
    if not (folder / seal.SEAL).exists():
        where_from += f", sha256 {files.sha256(folder / WEIGHTS)[:12]}"
    return folder, where_from


def _require_files(folder: Path) -> None:
    """Refuse a folder that is no adapter, and say where in it one lies."""
    has_config = (folder / CONFIG).is_file()
    if has_config and (folder / WEIGHTS).is_file():
        return
    if has_config and (folder / PICKLE).is_file():
        raise KitError(
            f"the weights of this adapter are a pickle ({PICKLE}), which is not loaded: "
            "it can run code",
            value=str(folder),
            remedy="convert it, if you trust who made it: "
            f'safetensors.torch.save_file(torch.load("{PICKLE}", weights_only=True), "{WEIGHTS}")',
        )
    remedy = 'use adapter="latest", "pocket", or the folder of a run; hf download fetches others'
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if inside:
        remedy = f"name one of the adapters in it: {', '.join(inside)}"
    raise KitError(
        "this is not an adapter folder",
        value=str(folder),
        allowed=f"a folder with {CONFIG} and {WEIGHTS}",
        remedy=remedy,
    )


def asked_as_trained(settings, folder: Path):
    """The settings with the base and the prompt template that an adapter of this kit was trained
    with, as its run's record says it; a change is printed. On another base its numbers mean
    nothing, and a model that is asked in another form than it was trained in answers worse. A base
    that is set to another than the profile's stays.
    """
    manifest, _ = runs.manifest_of(folder.parent)
    trained = manifest.get("parameters", {})
    base = str(trained.get("model_id", settings.model_id))
    if base != settings.model_id and "model_id" not in settings.changed():
        print(f"this adapter was trained on model_id={base}, which is taken")
        settings = settings.replace(model_id=base)
    template = trained.get("prompt_template", settings.prompt_template)
    if template == settings.prompt_template or template not in ("chat", *data.TEMPLATES):
        return settings
    print(f"this adapter was trained with prompt_template={template}, and is asked so")
    return settings.replace(prompt_template=template)


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

    What `checked` needs of the base before it is changed is kept: its logits, and the numbers that
    the adapter's file is about to replace.

    Raises:
        KitError: an adapter is on the model already, or was on it and left its numbers behind; this
            one was made for a model of another shape, its configuration and its weights name other
            layers, or its files are not those that were sealed.
    """
    seal.require_whole(folder)
    anew = "run the cell that loads the base first, then this one"
    if hasattr(model, "peft_config"):
        what = "an adapter is on this model already"
        raise KitError(what, value=type(model).__name__, remedy=anew)
    with _fitting(model, folder), warnings.catch_warnings():
        # what PEFT warns of is a layer that would stay as it was
        warnings.filterwarnings("error", "Found missing adapter keys")
        logits = _logits(model)
        if not _is_close(logits, getattr(model, "logits_before", logits)):
            raise KitError("an adapter that was on this model has changed it", remedy=anew)
        model.logits_before = logits
        model.kept_numbers = _to_be_replaced(model, folder / WEIGHTS)
        yield


def _fitting(model: PreTrainedModel, folder: Path) -> AbstractContextManager:
    own = _base_name(model.config.name_or_path)
    made_for = _made_for(folder)
    what = "the adapter does not fit"
    remedy = "take another copy of the adapter"
    if made_for != own:
        what += f": it was made for {made_for}, the model here is {own}"
        remedy = f"load the base the adapter was trained on, or {remedy}"
    return refusing(what, folder.name, remedy)


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    """The logits after the first tokens of the vocabulary, (tokens, vocabulary)."""
    ids = torch.arange(8, device=model.device)[None]
    return model(input_ids=ids).logits[0, -8:]


def _is_close(logits: torch.Tensor, others: torch.Tensor) -> bool:
    return torch.allclose(logits, others, rtol=1e-3, atol=1e-3)


def _to_be_replaced(
    model: PreTrainedModel, weights: Path
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Copies of the base's own numbers whose places an adapter's file names too."""
    own = dict(model.named_parameters())
    kept = {}
    with safe_open(weights, "pt") as file:
        for name in list(file.keys()):
            place = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if place in own:
                kept[own[place]] = own[place].detach().clone()
    return kept


def checked(tuned: PeftModel, folder: Path) -> PeftModel:
    """A model with its adapter, in eval mode, guarded against what PEFT accepts without a word.

    - Every tensor of the adapter's file is used, and holds real numbers.
    - With the adapter the model computes numbers, and switched off it computes what it did before.
    - An adapter that was made for a base of another name is said to be.

    Raises:
        KitError: one of these does not hold.
    """
    tuned.eval()
    base = tuned.get_base_model()
    replaced = {}
    for parameter, numbers in base.kept_numbers.items():
        if not torch.equal(parameter, numbers):
            replaced[parameter] = numbers
    if replaced:
        _keep_switchable(tuned, replaced)
    with _fitting(tuned, folder):
        _require_whole_use(tuned, folder)
        with refusing("PEFT cannot compute with it here", folder.name, "merge it elsewhere"):
            computes = load.computes(tuned)
        if not computes:
            raise ValueError("with it the model computes NaN or infinity")
        with tuned.disable_adapter():
            is_base = _is_close(_logits(tuned), base.logits_before)
        if not is_base:
            raise ValueError(
                "switched off, it leaves another model than the base: it changes the base's own "
                "weights (raw OLoRA or PiSSA) or layers (layer_replication), so convert it to a "
                "plain LoRA as PEFT's documentation says"
            )
    tuned.requires_grad_(False)  # PEFT lets an adapter train that is switched on again
    del base.kept_numbers
    own = _base_name(tuned.config.name_or_path)
    if _made_for(folder) != own:
        print(
            f"the adapter was made for {_made_for(folder)}, the model here is {own}: "
            "if these are two models, its answers mean nothing"
        )
    return tuned


def _keep_switchable(tuned: PeftModel, own: dict[torch.nn.Parameter, torch.Tensor]) -> None:
    """Let `disable_adapter` put back the base's own numbers too, which PEFT has replaced."""
    switched_off = tuned.disable_adapter

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers")
            with switched_off(), replaced_numbers(own):
                yield

    tuned.disable_adapter = disable_adapter


@contextmanager
def replaced_numbers(numbers: dict[torch.nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Inside, these parameters hold other numbers of the same shape; afterwards their own again."""
    before = {parameter: parameter.data for parameter in numbers}
    try:
        for parameter, values in numbers.items():
            parameter.data = values
        yield
    finally:
        for parameter, values in before.items():
            parameter.data = values


def _made_for(folder: Path) -> str:
    """The name of the base an adapter was trained on, as its configuration says."""
    with suppress(ValueError, AttributeError, OSError):
        config = json.loads((folder / CONFIG).read_text())
        return _base_name(str(config.get("base_model_name_or_path")))
    return "another model"


def _require_whole_use(tuned: PeftModel, folder: Path) -> None:
    """Raise a ValueError that says what of an adapter's file was not used, or is no real number."""
    if not adds_tokens(tuned):
        unused = tuned.load_adapter(str(folder), tuned.active_adapter).unexpected_keys
        if unused:
            raise ValueError(
                f"its configuration and its weights name other layers: {unused[0]} has no place"
            )
    loaded = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in list(file.keys()):
            is_real = file.get_slice(name).get_dtype().startswith(("F", "BF"))
            if not is_real and name in loaded and loaded[name].is_floating_point():
                raise ValueError(f"{name} holds whole numbers")


def _base_name(path: str) -> str:
    """The last part of a model's path; the shipped model is "pocket", wherever it is installed."""
    is_pocket = Path(path).parts[-2:] == MODEL_DIR.parts[-2:]
    return "pocket" if is_pocket else Path(path).name


def adds_tokens(model: PreTrainedModel | PeftModel) -> bool:
    """Whether an adapter is a trained prompt: tokens before those of the text, or a prefix."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


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
