"""One schema for every parameter: what papermill passes, a notebook types, a widget sets and the
command line takes.

`Settings` is the contract: a pydantic model whose fields carry PEFT's, transformers' and
bitsandbytes' own names, their types and bounds, and a docstring that refusals quote. Its values
come from `profiles.toml`, a table for each profile with a reason beside each value.

`validate` turns loose values into a `Settings` record. `None` means "the profile's value"; text is
coerced to the field's type ("false" is False, "2e-4" is 0.0002; `spellings` has the types that more
can be written for); a name that is not in the schema is refused with a suggestion. `resolve` does
the same for the globals of a notebook or of a script made from one. No torch is imported, so a
wrong value costs half a second and no download.
"""

import difflib
import html
import json
import re
import shlex
import symtable
import sys
import tomllib
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field, ValidationError

from qlora_nb import progress
from qlora_nb.errors import KitError, explain_missing_names, show_refusals_alone
from qlora_nb.pythia import PYTHIA
from qlora_nb.spellings import (
    NUMBER,
    Float,
    Int,
    Mapping,
    Name,
    Names,
    Prompts,
    parameters,
)

ELSEWHERE = ("pythia", "gpu_gib", "blocksize", "fetch_ahead")
"""Parameters of the notebooks before the sixth."""

ANSWERING = ("adapter", "prompts", "temperature", "top_p", "repetition_penalty")
"""Parameters of the notebook after it."""


class Settings(
    BaseModel,
    extra="forbid",
    frozen=True,
    allow_inf_nan=False,
    coerce_numbers_to_str=True,
    protected_namespaces=(),
    use_attribute_docstrings=True,
):
    """Every parameter of the kit, resolved. The text under a field is its description."""

    profile: Literal["tiny", "smollm2", "t4", "full"]
    """which model the notebook runs, and on what machine"""
    model_id: Name
    """pocket, smollm2, a hub name or a local folder"""
    dataset: Name
    """pocket, a hub name, or a file or folder of JSON, CSV, Parquet or Arrow"""
    seed: Int = Field(ge=0, le=2**31)
    """seed of everything random"""
    quant_type: Literal["nf4", "fp4"]
    """4-bit datatype of the frozen weights"""
    double_quant: bool
    """quantize the scales too"""
    blocksize: Annotated[Literal[32, 64, 128, 256, 512, 1024, 2048, 4096], NUMBER]
    """weights that share one scale (03, 04)"""
    compute_dtype: Literal["auto", "float32", "float16", "bfloat16"]
    """dtype of the arithmetic"""
    r: Int = Field(ge=1, le=1024)
    """LoRA rank"""
    lora_alpha: Float = Field(gt=0)
    """LoRA scale is lora_alpha / r"""
    lora_dropout: Float = Field(ge=0, lt=1)
    """dropout before lora_A"""
    target_modules: Names
    """all-linear, or names of linear layers"""
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch"]
    """Trainer's optimizer"""
    learning_rate: Float = Field(gt=0, le=1)
    """peak learning rate"""
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    """learning-rate schedule"""
    warmup_steps: Int = Field(ge=0)
    """steps until the peak learning rate"""
    max_grad_norm: Float = Field(gt=0)
    """gradients are clipped to this norm"""
    max_steps: Int = Field(ge=1)
    """optimizer steps"""
    per_device_train_batch_size: Int = Field(ge=1, le=4096)
    """rows in one forward pass"""
    gradient_accumulation_steps: Int = Field(ge=1)
    """forward passes in one optimizer step"""
    max_length: Int = Field(ge=8, le=8192)
    """tokens of prompt and answer kept"""
    loss_chunk: Int = Field(ge=0, le=65536)
    """tokens in one slice of the loss, 0: all logits at once"""
    head_4bit: bool
    """store the head in 4 bit too, in slices of the vocabulary"""
    embedding_on_cpu: bool
    """keep the input embedding in the host's memory"""
    prequantized: bool
    """keep a 4-bit copy of the base and load that the next time"""
    allow_slow: bool
    """without a GPU, train more than 1.5 billion parameters all the same; minutes a step"""
    packing: bool
    """several rows in one sequence of max_length tokens (06)"""
    gradient_checkpointing: bool
    """recompute activations to save memory"""
    columns: Mapping
    """columns of the data, as instruction=question,output=answer"""
    prompt_template: Literal["alpaca", "alpaca_short", "chat"]
    """how instruction and input become a prompt; chat: by the tokenizer's chat template"""
    train_on: Literal["all", "last"]
    """which answers of a conversation train"""
    train_rows: Int = Field(ge=1)
    """rows to train on at most"""
    eval_rows: Int = Field(ge=1)
    """held-out rows to measure on"""
    adapter: Name
    """latest, pocket, or an adapter folder (07)"""
    prompts: Prompts
    """instructions for the models to answer (07)"""
    max_new_tokens: Int = Field(ge=1, le=4096)
    """tokens to generate at most"""
    temperature: Float = Field(ge=0, le=10)
    """0 is greedy"""
    top_p: Float = Field(gt=0, le=1)
    """nucleus sampling"""
    repetition_penalty: Float = Field(ge=1, le=10)
    """lowers the logits of tokens already there, 1: not (07)"""
    pythia: Literal[tuple(PYTHIA)]
    """Pythia size that 02 and 05 do arithmetic for"""
    gpu_gib: Float = Field(gt=0, le=10_000)
    """card size that 05 does arithmetic for (GiB)"""
    fetch_ahead: bool
    """download model and data now (01)"""
    sample_steps: Int = Field(ge=0)
    """optimizer steps between looks at an answer and the held-out loss, 0: none (06)"""
    tensorboard: bool
    """write TensorBoard's files into the run folder (06)"""
    save_steps: Int = Field(ge=0)
    """optimizer steps between checkpoints, 0: only when stopped (06)"""
    resume: Name
    """no, latest, or the folder of an unfinished run (06)"""
    output_dir: Name
    """where run folders go"""
    _used: Collection[str] = ()
    """what the notebook uses and shows; empty where there is no notebook: everything"""

    def replace(self, **changes: object) -> "Settings":
        """The same settings but for these: what if `max_length` were 256? The changes are not
        validated.
        """
        return self.model_copy(update=changes)

    @property
    def rows_in_a_step(self) -> int:
        """Rows in one optimizer step: those of a forward pass, times passes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def table(self) -> list[tuple[str, object, str]]:
        """(name, value, where the value comes from) for every parameter."""
        rows = []
        for name, default in PROFILES[self.profile].items():
            value = getattr(self, name)
            reason = default.reason if value == default.value else "set by you"
            rows.append((name, value, reason))
        return rows

    def changed(self) -> dict:
        """The parameters that differ from the profile's defaults, in schema order."""
        return {name: value for name, value, reason in self.table() if reason == "set by you"}

    def shown(self) -> list[tuple[str, object, str]]:
        """The rows of `table` that the notebook uses."""
        return [row for row in self.table() if row[0] in (self._used or PROFILES[self.profile])]

    def papermill_line(self, notebook: str = "06_finetune_pythia_12b") -> str:
        """The shell command that repeats a run with these settings: only what differs from the
        profile is named.
        """
        words = ["papermill", f"notebooks/{notebook}.ipynb", "out.ipynb"]
        words += ["-p", "profile", self.profile]
        for name, value in self.changed().items():
            if name in ELSEWHERE:
                continue
            if isinstance(value, str):
                words += ["-r", name, value]  # of -p model_id 007 papermill makes a number
            else:
                words += ["-p", name, json.dumps(value, ensure_ascii=False)]
        return shlex.join(words)

    def __repr__(self) -> str:
        lines = [f"{'profile':28} {self.profile:28} "]
        for name, value, reason in self.shown():
            lines.append(f"{name:28} {value!s:28} {reason}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import pandas

        own = ", ".join(f"{name} = {value}" for name, value in self.changed().items())
        names = html.escape(f"{self.model_id} · {own or 'nothing overridden'}")
        rows = pandas.DataFrame(self.shown(), columns=["parameter", "value", "why"])
        with pandas.option_context("display.max_colwidth", None):
            table = rows.to_html(index=False, justify="left")
        return (
            f"<div><b>profile</b> {self.profile} on {names}<details>"
            f"<summary>{len(rows)} parameters</summary>{table}</details></div>"
        )


@dataclass(frozen=True)
class Default:
    """A profile's value for one parameter and the reason for it."""

    value: object
    reason: str


def _read_profiles() -> dict[str, dict[str, Default]]:
    """The profiles of `profiles.toml`, each on top of the tables it starts from, in the schema's
    order of parameters.
    """
    tables = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
    read = {}
    for profile in get_args(Settings.model_fields["profile"].annotation):
        merged = {}
        for table in (*tables[profile].pop("from"), profile):
            merged.update(tables[table])
        read[profile] = {
            name: Default(*merged[name]) for name in Settings.model_fields if name in merged
        }
    return read


PROFILES = _read_profiles()
"""Profile → parameter → its value there and the reason for it."""


def resolve(values: dict) -> Settings:
    """Validate a notebook's parameters and fill in the profile's values, before anything heavy is
    imported.

    Two things more happen, because every notebook begins here: from now on progress bars are lines
    of text (`progress.use_text_bars`), and a name that no cell has set yet is told in one sentence
    (`errors.explain_missing_names`). A notebook that was exported as a script (`jupyter nbconvert
    --to script`) takes parameters from its command line, as papermill does: -p NAME VALUE.

    Args:
        values: the `globals()` of a notebook or script, or a plain dictionary of parameters. `None`
            means the profile's value. Of globals what has a parameter's name is taken.

    Returns:
        The frozen `Settings`, which show what the notebook's own cells of parameters assign.

    Raises:
        KitError: a bad value or an unknown name; among globals, one that the parameters cell sets
            and does not use itself, or no `profile` because that cell has not run.
    """
    progress.use_text_bars()
    if "__builtins__" not in values:
        return validate(values)
    if "get_ipython" in values:
        explain_missing_names(values["get_ipython"]())
    given = {}
    if "In" in values:
        if "profile" not in values:
            remedy = "run the cell of parameters first (profile = …)"
            raise KitError("profile is not there yet", remedy=remedy)
    elif "__file__" in values and values.get("__name__") == "__main__":
        show_refusals_alone()
        given = parameters(sys.argv[1:])
    own = _set_in_parameters_cells(_cells(values))
    for name, value in values.items():
        is_plain = not (isinstance(value, ModuleType) or callable(value))
        if name in own or (name in Settings.model_fields and is_plain):
            given.setdefault(name, value)
    settings = validate(given)
    settings._used = own
    if "learning_rate" in own:  # who trains uses most of them
        settings._used = set(Settings.model_fields) - {*ELSEWHERE, *ANSWERING}
    return settings


def validate(values: dict) -> Settings:
    """As `resolve`, for a plain dictionary and nothing more: what the command line and the tests
    use.
    """
    given = {}
    for name, value in values.items():
        if name not in Settings.model_fields:
            remedy = _suggest(name, Settings.model_fields)
            raise KitError(f"unknown parameter {name!r:.80}", remedy=remedy)
        # a number or a list of NumPy, pandas or torch
        plain = value.tolist() if hasattr(value, "tolist") else value
        is_none = isinstance(plain, str) and plain in ("None", "null") and name != "prompts"
        if plain is not None and not is_none:
            given[name] = plain
    profile = str(given.get("profile", "tiny"))
    given["profile"] = profile
    if profile not in PROFILES:
        raise KitError("unknown profile", value=profile, remedy=_suggest(profile, PROFILES))
    defaults = {name: default.value for name, default in PROFILES[profile].items()}
    try:
        return Settings(**{**defaults, **given})
    except ValidationError as error:
        raise _explain(error, PROFILES[profile]) from None


def _cells(values: dict) -> list[str]:
    """The cells of a notebook that have run, as they were typed (%%time, not what IPython makes of
    it); of a script its paragraphs.
    """
    if "In" in values:
        return [values.get(f"_i{number}", cell) for number, cell in enumerate(values["In"])]
    if "__file__" in values:
        return Path(values["__file__"]).read_text(encoding="utf-8").split("\n\n")
    return []


def _set_in_parameters_cells(cells: Iterable[str]) -> set[str]:
    """What the newest parameters cell (it sets `profile`, mostly with others) and the cell that
    papermill puts under it set, whether it is in the schema or not: `validate` can refuse a
    misspelt one.
    """
    own = set()
    injected = set()
    for source in cells:
        names = _set_in(source)
        if own and source.lstrip().startswith("# Parameters\n"):
            injected = names
        elif names == {"profile"}:
            own.add("profile")
        elif "profile" in names:
            own = names
            injected = set()
    return own | injected


def _set_in(source: str) -> set[str]:
    """The parameters that a cell sets, and what else it sets and neither uses itself nor imports or
    defines.
    """
    names = set()
    code = re.sub("^[%!].*$", "", source, flags=re.MULTILINE)  # magics
    with suppress(SyntaxError, ValueError):
        for symbol in symtable.symtable(code, "cell", "exec").get_symbols():
            is_own = symbol.is_referenced() or symbol.is_imported() or symbol.is_namespace()
            name = symbol.get_name()
            is_own = is_own or name.startswith("_")
            if symbol.is_assigned() and (name in Settings.model_fields or not is_own):
                names.add(name)
    return names


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"use one of {', '.join(known)}"


def _explain(error: ValidationError, defaults: dict[str, Default]) -> KitError:
    """The first bad value in full, with pydantic's sentence on what is allowed; the others by
    name.
    """
    first, *more = error.errors(include_url=False)
    name = str(first["loc"][0])
    description = Settings.model_fields[name].description
    what = f"{name} ({description}): {first['msg'].lower()}"
    others = sorted({str(problem["loc"][0]) for problem in more} - {name})
    if others:
        what += f"; also bad: {', '.join(others)}"
    remedy = f"leave it None for this profile's value ({defaults[name].value})"
    if name == "optim":
        remedy += "; other optimizers, Sophia among them, are raced in notebook 08"
    return KitError(what, value=first["input"], remedy=remedy)
