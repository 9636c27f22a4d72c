"""A run as plain files: `train.py`, its rows, and `ask.py`, which need torch, transformers, peft,
bitsandbytes, datasets and accelerate, and nothing of this kit.

The two programs are templates (`train.py.j2`, `ask.py.j2`) that are filled in by Jinja. Names,
paths and texts are put in by Python's `repr`, so that none of them can become code. `rows.jsonl`
holds the rows as text, in the order in which they are trained; with packing a line holds all rows
of a sequence. On a CPU the program ends with the adapter of notebook 06, bit for bit, unless packed
sequences share a pass: there they stand one after another, and dropout draws other masks.
"""

import json
from contextlib import suppress
from pathlib import Path

from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedTokenizerBase

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.memory import budget, dry_run
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import batching, chat_templates, configs, data, device, load, probes
from qlora_nb.record import files, runs, seal
from qlora_nb.train import attach

OF_THE_KIT = ("head_4bit", "embedding_on_cpu")
"""Options that need code of this kit."""


MARK = "A QLoRA run, written down by qlora-nb"
"""How `train.py` begins."""

FILES = ("rows.jsonl", "train.py", "ask.py")


def require_plain(settings) -> None:
    """Refuse options that plain libraries do not have.

    Raises:
        KitError: names them.
    """
    used = [name for name in OF_THE_KIT if getattr(settings, name)]
    if used:
        raise KitError(
            "a script of plain libraries cannot do this",
            value=", ".join(used),
            remedy=f"set {used[0]}=False",
        )


def write_untrained(settings, out: str = "", torchrun: bool = False) -> list[Path]:
    """As `write`, of a run that nobody has made: no weight is loaded, so that any machine can do
    it.

    Args:
        out: a folder, made if it is not there; without one a new run's folder.
        torchrun: see `write`.

    Raises:
        KitError: see `write`, `data.load` and `attach.layers_to_adapt`.
    """
    require_plain(settings)
    load.weights_of(settings)
    tokenizer = load.load_tokenizer(settings)
    texts, _ = data.load(settings)
    rows = data.tokenize_rows(texts, tokenizer, settings)
    model = configs.meta_model(configs.config_of(settings.model_id))
    probes.require_positions(model, settings.max_length)
    budget.peak(plan_of(settings))  # what cannot be planned is refused
    targets = attach.layers_to_adapt(model, settings)
    if settings.packing:
        rows = batching.pack(rows, settings.max_length)
    rows = batching.in_training_order(rows, settings)
    if out:
        folder = sources.local_path(out)
        with files.writing(folder, "name a folder you may write to"):
            folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = runs.new_folder(settings, "script")
    return write(folder, settings, tokenizer, rows, texts, targets, torchrun)


def write(
    folder: Path,
    settings,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    texts: Dataset,
    targets: list[str],
    torchrun: bool = False,
) -> list[Path]:
    """Write `train.py`, `ask.py` and `rows.jsonl` into a folder; returns the three paths.

    Args:
        folder: a run's folder, or any other one that exists.
        settings: the resolved parameters.
        tokenizer: what `load.load_tokenizer` returned.
        rows: tokenized, in the order of training: what the Trainer is given.
        texts: what they were tokenized from (instruction, input, output).
        targets: the names of the layers that are adapted.
        torchrun: train.py may also be started in several processes, which share every step (DDP).

    Raises:
        KitError: an option that needs code of this kit, files of somebody else, or a disk that is
            full.
    """
    require_plain(settings)
    _require_own(folder)
    is_chat = "messages" in texts.column_names
    loss_chunk = settings.loss_chunk
    if not dry_run.head_is_last(configs.config_of(settings.model_id)):
        loss_chunk = 0
    has_run = (folder / "adapter" / seal.SEAL).is_file()  # its adapter is not written over
    facts = {
        "s": settings,
        "tokenizer": tokenizer,
        "is_chat": is_chat,
        "prompts": data.TEMPLATES.get(settings.prompt_template),
        "dtype": device.compute_dtype(settings.compute_dtype),
        "loss_chunk": loss_chunk,
        "model": sources.seen_from_anywhere(sources.model_path(settings.model_id)),
        "saved_in_4_bit": load.was_quantized(settings),
        "targets": sorted(targets),
        "turn_end": chat_templates.turn_end(tokenizer),
        "ends_texts": tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id,
        "mark": MARK,
        "torchrun": torchrun,
        "out": "adapter_by_script" if has_run else "adapter",
    }
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["repr"] = repr
    templates.filters["named"] = _named
    if is_chat:
        written = [_chat_as_text(row["messages"], tokenizer, settings) for row in texts]
    else:
        written = texts.select_columns(["instruction", "input", "output"]).to_list()
    files.write_atomically(folder / "rows.jsonl", _in_order(rows, written))
    for name in ("train.py", "ask.py"):
        program = templates.get_template(f"{name}.j2").render(facts)
        files.write_atomically(folder / name, program)
    return [folder / name for name in FILES]


def _require_own(folder: Path) -> None:
    """Refuse a folder that holds files of these names which this kit has not written."""
    program = folder / "train.py"
    if program.is_file() and MARK in program.read_text(encoding="utf-8", errors="replace")[:99]:
        return
    for name in FILES:
        if (folder / name).exists():
            raise KitError(
                f"{name} is there already, and not of this kit",
                value=str(folder),
                remedy="name another folder",
            )


def _named(value: object, name: str) -> str:
    """The line that gives a value its name."""
    line = f"{name} = {value!r}"
    if len(line) > 100:
        line += "  # noqa: E501"
    return line


def _chat_as_text(messages: list[dict], tokenizer, settings) -> dict | None:
    """A conversation as the chat template writes it, and which stretches of it train; None if the
    template refuses it.
    """
    with suppress(ValueError):
        text, spans = chat_templates.text_and_spans(messages, tokenizer, settings.train_on)
        return {"text": text, "trains": spans}


def _in_order(rows: Dataset, written: list[dict]) -> str:
    """A JSON line for each row of training, for each packed sequence a list of its rows."""
    lines = []
    for number in rows["row"]:
        found = [written[i] for i in number] if isinstance(number, list) else written[number]
        lines.append(json.dumps(found) + "\n")
    return "".join(lines)
