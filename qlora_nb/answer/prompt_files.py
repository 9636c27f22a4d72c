"""A file of prompts in, a file of answers out; a call that was stopped is resumed by the next one.

Prompts are lines of a text file or rows of any data file. Answers are JSON lines (n, by,
instruction, input, answer), written batch by batch, so that a killed call loses one batch. Called
again with the same file, only what is missing is answered. Two things could mix up answers, and
both are refused: answers to other rows or by another model, known by the hash in `by`, and somebody
else who writes into the file meanwhile, known by a lock and by the file's size.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import TextIO

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from qlora_nb import sources
from qlora_nb.answer import generate
from qlora_nb.errors import KitError, refusing
from qlora_nb.model import reading
from qlora_nb.record import files

DECIDES_ANSWERS = {
    "model_id",
    "quant_type",
    "double_quant",
    "head_4bit",
    "compute_dtype",
    "prompt_template",
    "max_new_tokens",
}
"""Parameters that change what a model answers."""


def read_rows(name: str, columns: dict[str, str], template: str = "alpaca") -> list[dict]:
    """Rows with instruction and input, or conversations: from a text file, a prompt a line, or from
    any data file (an answer is not needed).

    Raises:
        KitError: the file cannot be read, or no row of it can be asked.
    """
    with refusing(
        "the file of prompts cannot be read",
        name,
        "check the path; a text file in UTF-8 holds a prompt on each line, a data file an "
        "instruction, a prompt or a conversation in each row",
    ):
        path = sources.local_path(name)  # of a person who is not here, or no path at all
        if not path.is_file():
            raise FileNotFoundError("no file lies there")
        if name.endswith(".txt"):
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # and at no other sign
            rows = [generate.row_of(line, template) for line in lines if line.strip()]
        else:
            needed = {column: own for column, own in columns.items() if column != "output"}
            found = reading.read(name, needed, asking=True, as_chat=template == "chat")
            for line in found.remarks():
                print(line)
            rows = list(found.kept.remove_columns(["output", "number"]))
        if not rows:
            raise ValueError("no row of it can be asked")
    return rows


def answer_file(
    model,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    target: Path,
    settings,
    batch: int = 16,
) -> int:
    """Answer rows into a file of JSON lines, batch by batch; called again, only what is missing is
    answered. The record of a row that cannot be asked has no answer and says why (`left_out`).

    Returns:
        How many rows were answered now.

    Raises:
        KitError: the file holds answers to other rows or by another model, or is no file of answers
            at all; another process writes into it, or it was removed or changed in the meantime.
    """
    with files.writing(target, "name a file in a folder that you may write to"):
        target = target.resolve()  # a link stays a link
        if target.exists() and not target.is_file():
            raise ValueError("this is no file, and is left alone")
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = files.sole_writer(target)
    with lock:
        answered = _answers_in(target)
        by = _author(model, settings)
        asked = [{"n": n, "by": by, **row} for n, row in enumerate(rows)]
        for n, record in answered.items():
            if n not in range(len(asked)) or not asked[n].items() <= record.items():
                raise KitError(
                    "this file holds answers to other rows or by another model",
                    value=target.name,
                    remedy="name another file, or remove it",
                )
        left = [row for row in asked if row["n"] not in answered]
        left, refused = generate.askable(left, tokenizer, model, settings)
        lines = [json.dumps(record) + "\n" for record in (*answered.values(), *refused)]
        files.write_atomically(target, "".join(lines))
        with target.open("a", encoding="utf-8") as file:
            for found in generate.in_batches(model, tokenizer, left, settings, batch):
                _require_unchanged(target, file)
                for i, text in found.items():
                    file.write(json.dumps({**left[i], "answer": text}) + "\n")
                file.flush()
            _require_unchanged(target, file)
    return len(left)


def _answers_in(target: Path) -> dict[int, dict]:
    """The records of a file of answers by row; a last line that a killed call has cut short is left
    out.
    """
    if not target.exists():
        return {}
    with refusing(
        "this is no file of answers, and is left alone", target.name, "name another file"
    ):
        *lines, cut = target.read_text(encoding="utf-8").split("\n")
        if not '{"n": '.startswith(cut[:6]):
            raise ValueError("its last line is not one")
        records = [json.loads(line) for line in lines]
        return {record["n"]: record for record in records}


def _author(model, settings) -> str:
    """A hash of whatever decides the answers: the model's name, how it is rounded and asked, the
    adapter's numbers.
    """
    found = hashlib.sha256(settings.model_dump_json(include=DECIDES_ANSWERS).encode())
    if isinstance(model, PeftModel):
        for tensor in get_peft_model_state_dict(model, save_embedding_layers=False).values():
            found.update(tensor.cpu().float().numpy().tobytes())
    return found.hexdigest()[:12]


def _require_unchanged(target: Path, file: TextIO) -> None:
    """Refuse to go on with a file that somebody removed, replaced or wrote to: its answers would be
    lost or mixed.
    """
    opened = os.fstat(file.fileno())
    unchanged = (
        target.exists()
        and os.path.samestat(target.stat(), opened)
        and opened.st_size == file.tell()
    )
    if not unchanged:
        raise KitError(
            "the file of answers was removed or changed by somebody else "
            "while it was being written",
            value=target.name,
            remedy="call it again: what is missing is answered then",
        )
