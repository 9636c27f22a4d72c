"""A run as plain files: `train.py`, its rows, and `ask.py`, which need torch, transformers, peft,
bitsandbytes, datasets and accelerate, and nothing of this kit.

The two programs are templates (`train.py.j2`, `ask.py.j2`) that are filled in by Jinja. Names,
paths and texts are put in by Python's `repr`, so that none of them can become code. `rows.jsonl`
holds the rows as text, in the order in which they are trained; with packing a line holds all rows
of a sequence. On a CPU the program ends with the adapter of notebook 06, bit for bit.
"""

import json
from pathlib import Path

import torch
from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedTokenizerBase

from qlora_nb import sources
from qlora_nb.errors import KitError
from qlora_nb.model import data, device
from qlora_nb.record import files

OF_THE_KIT = ("head_4bit", "embedding_on_cpu")
"""Options that need code of this kit."""


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


def write(
    folder: Path,
    settings,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    texts: Dataset,
    targets: list[str],
    adapter: str = "adapter",
) -> list[Path]:
    """Write `train.py`, `ask.py` and `rows.jsonl` into a folder; returns the three paths.

    Args:
        folder: a run's folder, or any other one that exists.
        settings: the resolved parameters.
        tokenizer: what `load.load_tokenizer` returned.
        rows: tokenized, in the order of training: what the Trainer is given.
        texts: what they were tokenized from (instruction, input, output).
        targets: the names of the layers that are adapted.
        adapter: where `ask.py` looks for the adapter.

    Raises:
        KitError: an option that needs code of this kit, or a disk that is full.
    """
    require_plain(settings)
    with_input, without_input = data.TEMPLATES[settings.prompt_template]
    dtype = device.compute_dtype(settings.compute_dtype)
    facts = {
        "s": settings,
        "dtype": dtype,
        "float16": dtype == torch.float16 and device.on_gpu(),
        "model": sources.model_path(settings.model_id),
        "targets": sorted(targets),
        "with_input": with_input,
        "without_input": without_input,
        "pad_token": str(tokenizer.pad_token),
        "ends_texts": tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id,
        "adapter": adapter,
        "out": "adapter_by_script" if (folder / "adapter").exists() else "adapter",
    }
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["repr"] = repr
    contents = {"rows.jsonl": _rows_as_text(rows, texts)}
    for name in ("train.py", "ask.py"):
        contents[name] = templates.get_template(f"{name}.j2").render(facts)
    for name, text in contents.items():
        files.write_atomically(folder / name, text)
    return [folder / name for name in contents]


def _rows_as_text(rows: Dataset, texts: Dataset) -> str:
    """A JSON line for each row of training, for each packed sequence a list of its rows."""
    texts = texts.select_columns(["instruction", "input", "output"])[:]
    lines = []
    for number in rows["row"]:
        numbers = number if isinstance(number, list) else [number]
        found = [{name: column[i] for name, column in texts.items()} for i in numbers]
        lines.append(json.dumps(found if isinstance(number, list) else found[0]) + "\n")
    return "".join(lines)
