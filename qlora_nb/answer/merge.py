"""From base and adapter to one model that can be taken elsewhere, in three ways that do not give
the same model.

An adapter was trained on top of what its 4-bit base computes. Merged into the *dequantized* weights
it gives the very model that was trained and measured, as a plain one. Merged into the *packed*
weights, the sum is rounded to 4 bits again, and the adapter's small numbers partly vanish. Merged
into the *original* weights it meets a base that it has never seen. How much each costs is measured
in notebook 07. Merging itself, W + (alpha / r) B A, is PEFT's `merge_and_unload`
(`tuners/tuners_utils.py`).
"""

import json
import logging
import re
import warnings
from pathlib import Path

import torch
from jinja2 import StrictUndefined, Template
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qlora_nb.answer import adapters
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import generation_defaults, load
from qlora_nb.record import files, runs

WAYS = ("dequantized", "packed", "original")
"""Onto what an adapter can be merged; what is saved in 4 bit has no original weights."""


def merged(settings, adapter: Path, way: str = "dequantized") -> PreTrainedModel:
    """A plain model (no PEFT) with the adapter's products added to its weights.

    Args:
        settings: the resolved parameters; the base is loaded anew, release yours first.
        adapter: the adapter's folder.
        way: "dequantized": onto what the 4-bit weights stand for, in the compute dtype; "packed":
            onto the 4-bit weights, which are rounded again (PEFT, `tuners/lora/bnb.py`,
            `Linear4bit.merge`); "original": onto the unrounded weights.

    Raises:
        KitError: another way, or an adapter that does not fit.
    """
    if way not in WAYS:
        raise KitError("unknown way of merging", value=way, allowed=", ".join(WAYS))
    remedy = "keep it beside its base, or merge it another way"
    what = "the adapter cannot be merged"
    with refusing(what, adapter.name, remedy):
        if PeftConfig.from_pretrained(str(adapter)).is_prompt_learning:
            raise ValueError("it is a trained prompt, nothing that is added to weights")
    if way == "dequantized":
        base = dequantized(settings)
    else:
        base = load.load_base(settings, four_bit=way == "packed")
    tuned = adapters.load_adapter(base, adapter)
    with warnings.catch_warnings(), refusing(what, adapter.name, remedy):
        # PEFT warns of the rounding, which is what "packed" is about
        warnings.filterwarnings("ignore", "Merge lora module to 4-bit")
        _separate_ends(tuned.get_base_model())
        return tuned.merge_and_unload(progressbar=True)


def _separate_ends(base: PreTrainedModel) -> None:
    """Make embedding and head two tensors where they are one and the adapter takes one of them:
    what is merged into this one must not change the other.
    """
    head = base.get_output_embeddings()
    taken = (BaseTunerLayer, ModulesToSaveWrapper)
    is_taken = isinstance(head, taken) or isinstance(base.get_input_embeddings(), taken)
    if not is_taken or not base.config.tie_word_embeddings:
        return
    base.config.tie_word_embeddings = False
    if not isinstance(head, ModulesToSaveWrapper):
        own = getattr(head, "base_layer", head)
        own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)


def ways_for(settings) -> tuple[str, ...]:
    """The ways of merging that a base allows: one that is saved in 4 bit has no original
    weights.
    """
    if load.was_quantized(settings):
        return WAYS[:2]
    return WAYS


def dequantized(settings) -> PreTrainedModel:
    """The plain model that the 4-bit one stands for, in the compute dtype.

    transformers' `dequantize` makes every layer an `nn.Linear`. GPT-2's layers, which keep their
    weights the other way round, are put back, as the model could not be loaded again.
    """
    plain = settings.replace(head_4bit=False, embedding_on_cpu=False)
    # transformers warns of the dtype, which the settings chose
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    base = load.load_base(plain).dequantize()
    # transformers leaves that it is in 4 bit; before 5.24 also how its files are unpacked, which
    # cannot be turned round to save
    base.is_loaded_in_4bit = False
    if hasattr(base, "_weight_conversions"):
        del base._weight_conversions
    with torch.device("meta"):
        family = AutoModelForCausalLM.from_config(base.config)
    for name, layer in family.named_modules():
        if isinstance(layer, Conv1D):
            linear = base.get_submodule(name)
            layer.weight = torch.nn.Parameter(linear.weight.T.contiguous())
            layer.bias = linear.bias
            base.set_submodule(name, layer)
    return base


@torch.no_grad()
def logit_difference(
    model: torch.nn.Module, wanted: list[torch.Tensor], inputs: list[torch.Tensor]
) -> float:
    """Largest absolute difference of a model's logits from the wanted ones, over inputs of shape
    (1, tokens).
    """
    differences = []
    for ids, logits in zip(inputs, wanted, strict=True):
        differences.append((model(input_ids=ids).logits - logits).abs().max().item())
    return max(differences)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: dict,
) -> Path:
    """Write safetensors, tokenizer and a model card; plain transformers loads the folder without a
    network, and its answers end with the tokens that they end with here.

    Args:
        model: a merged model that is not packed.
        tokenizer: its tokenizer.
        folder: where to; an earlier export there is replaced file by file.
        card: what `card_facts` returned.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        raise KitError(
            "a packed model is not exported: its layers are rounded twice",
            remedy='merge with way="dequantized"',
        )
    ends = generation_defaults.end_tokens(model, tokenizer)
    if ends:
        model.generation_config.eos_token_id = ends
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer.save_pretrained(folder)
    write_card(folder, card)
    return folder


def write_card(folder: Path, card: dict) -> None:
    """Write `README.md`, the card of a merged model or of an adapter, from `card_facts`."""
    source = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    template = Template(source, undefined=StrictUndefined, trim_blocks=True)
    files.write_atomically(folder / "README.md", template.render(card))


def card_facts(adapter: Path, settings, way: str = "") -> dict:
    """What the card of a model merged in this `way` says, or of the adapter itself: its
    configuration, and the manifest of its run if that lies beside it.
    """
    config = json.loads((adapter / adapters.CONFIG).read_text(encoding="utf-8"))
    run, _ = runs.manifest_of(adapter.parent)
    with safe_open(adapter / adapters.WEIGHTS, "pt") as file:
        names = file.keys()
    adapted = [re.split(r"\.(?:lora|ia3|vera|oft|ada)_", name)[0] for name in names]
    return {
        "base": Path(settings.model_id).name,
        "way": way,
        "lora": config,
        "layers": sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in adapted}),
        "run": run,
    }


def release(model: torch.nn.Module | PeftModel) -> None:
    """Give a model's memory back at once, whoever still holds a name for it; the model is empty
    afterwards.
    """
    # no parameter where it was kept in the host's memory
    embedding = model.get_input_embeddings().weight
    for tensor in (*model.parameters(), *model.buffers(), embedding):
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            state.absmax = state.code = state.offset = None
            state = state.state2
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    torch.cuda.empty_cache()
