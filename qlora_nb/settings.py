"""One schema for every parameter: what papermill passes, a notebook types, a widget sets and the
command line takes.

`resolve` turns loose values into a `Settings` record: `None` means "the profile's value", text is
coerced to the field's type ("false" is False, "2e-4" is 0.0002), a name that is not in the schema
is refused with a suggestion. It imports no torch, so a wrong value costs half a second and no
download.
"""

import ast
import difflib
import html
import json
import os
import shlex
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from qlora_nb import progress, sources
from qlora_nb.errors import KitError, explain_missing_names
from qlora_nb.pythia import PYTHIA


def _not_bool(value: Any) -> Any:
    """Python counts True as 1; a person who writes max_steps=True has made a mistake. NumPy's
    numbers are as good as Python's.
    """
    if isinstance(value, bool):
        raise ValueError("a number is needed, not True or False")
    return value.item() if hasattr(value, "item") else value


def _json_or(value: str, otherwise: list[str]) -> list:
    try:
        return json.loads(value) if value.strip().startswith("[") else otherwise
    except RecursionError:
        raise ValueError("a list in so many lists") from None


def _names(value: Any) -> Any:
    """'q, k' or '["q", "k"]' or a list → a list of names."""
    value = (
        _json_or(value, [v.strip() for v in value.split(",")]) if isinstance(value, str) else value
    )
    return [v for v in value if v != ""] if isinstance(value, list) else value


def _prompts(value: Any) -> Any:
    """A single prompt, a JSON list of prompts, or a list → a list of prompts."""
    return _json_or(value, [value]) if isinstance(value, str) else value


def _mapping(value: Any) -> Any:
    """'instruction=question, output=answer' or a dictionary → a dictionary."""
    if not isinstance(value, str):
        return value
    return {
        name.strip(): own.strip()
        for name, _, own in (pair.partition("=") for pair in _names(value))
    }


def _text(value: Any) -> Any:
    """A path object is as good as its text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _possible(name: str) -> str:
    """A name may be a path: one that no file system can hold, or of a person who is not here, fails
    now and not later.
    """
    try:
        sources.local_path(name).exists()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"this is no possible path: {getattr(error, 'strerror', None) or error}"
        ) from None
    return name


Int = Annotated[int, BeforeValidator(_not_bool)]

Float = Annotated[float, BeforeValidator(_not_bool)]

Name = Annotated[str, BeforeValidator(_text), Field(min_length=1), AfterValidator(_possible)]

Names = Annotated[list[Name], BeforeValidator(_names), Field(min_length=1)]

Mapping = Annotated[
    dict[Literal["instruction", "input", "output"], Name], BeforeValidator(_mapping)
]

Prompts = Annotated[list[str], BeforeValidator(_prompts), Field(min_length=1)]

Optimizer = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch"]

ELSEWHERE = ("pythia", "gpu_gib", "blocksize", "fetch_ahead")
"""Parameters of the notebooks before the sixth."""


class Settings(
    BaseModel,
    extra="forbid",
    frozen=True,
    allow_inf_nan=False,
    coerce_numbers_to_str=True,
    protected_namespaces=(),
):
    """Every parameter of the kit, resolved. Names are PEFT's, transformers' and bitsandbytes'
    own.
    """

    profile: Literal["tiny", "smollm2", "t4", "full"] = Field(
        description="which world the notebook runs in"
    )
    model_id: Name = Field(description="pocket, smollm2, a hub name or a local folder")
    dataset: Name = Field(
        description="pocket, a hub name or a local .json, .jsonl, .csv or .parquet file"
    )
    seed: Int = Field(ge=0, le=2**31, description="seed of everything random")
    quant_type: Literal["nf4", "fp4"] = Field(description="4-bit datatype of the frozen weights")
    double_quant: bool = Field(description="quantize the scales too")
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        description="weights that share one scale (03, 04)"
    )
    compute_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        description="dtype of the arithmetic"
    )
    r: Int = Field(ge=1, le=1024, description="LoRA rank")
    lora_alpha: Float = Field(gt=0, description="LoRA scale is lora_alpha / r")
    lora_dropout: Float = Field(ge=0, lt=1, description="dropout before lora_A")
    target_modules: Names = Field(description="all-linear, or names of linear layers")
    optim: Optimizer = Field(description="Trainer's optimizer")
    learning_rate: Float = Field(gt=0, le=1, description="peak learning rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        description="learning-rate schedule"
    )
    warmup_steps: Int = Field(ge=0, description="steps until the peak learning rate")
    max_grad_norm: Float = Field(gt=0, description="gradients are clipped to this norm")
    max_steps: Int = Field(ge=1, description="optimizer steps")
    per_device_train_batch_size: Int = Field(ge=1, le=4096, description="rows in one forward pass")
    gradient_accumulation_steps: Int = Field(
        ge=1, description="forward passes in one optimizer step"
    )
    max_length: Int = Field(ge=8, le=8192, description="tokens of prompt and answer kept")
    loss_chunk: Int = Field(
        ge=0, le=65536, description="tokens in one slice of the loss, 0: all logits at once"
    )
    head_4bit: bool = Field(description="store the head in 4 bit too, in slices of the vocabulary")
    embedding_on_cpu: bool = Field(description="keep the input embedding in the host's memory")
    prequantized: bool = Field(
        description="keep a 4-bit copy of the base and load that the next time"
    )
    packing: bool = Field(description="several rows in one sequence of max_length tokens (06)")
    gradient_checkpointing: bool = Field(description="recompute activations to save memory")
    columns: Mapping = Field(
        description="columns of the data, as instruction=question,output=answer"
    )
    prompt_template: Literal["alpaca", "alpaca_short"] = Field(
        description="how instruction and input become a prompt"
    )
    train_rows: Int = Field(ge=1, description="rows to train on at most")
    eval_rows: Int = Field(ge=1, description="held-out rows to measure on")
    adapter: Name = Field(description="latest, pocket, or an adapter folder (07)")
    prompts: Prompts = Field(description="instructions for the models to answer (07)")
    max_new_tokens: Int = Field(ge=1, le=4096, description="tokens to generate at most")
    temperature: Float = Field(ge=0, le=10, description="0 is greedy")
    top_p: Float = Field(gt=0, le=1, description="nucleus sampling")
    repetition_penalty: Float = Field(
        ge=1, le=10, description="lowers the logits of tokens already there, 1: not (07)"
    )
    pythia: Literal[tuple(PYTHIA)] = Field(
        description="Pythia size that 02 and 05 do arithmetic for"
    )
    gpu_gib: Float = Field(
        gt=0, le=10_000, description="card size that 05 does arithmetic for (GiB)"
    )
    fetch_ahead: bool = Field(description="download model and data now (01)")
    sample_steps: Int = Field(
        ge=0,
        description="optimizer steps between looks at an answer and the held-out loss, 0: none (06)",
    )
    tensorboard: bool = Field(description="write TensorBoard's files into the run folder (06)")
    save_steps: Int = Field(
        ge=0, description="optimizer steps between checkpoints, 0: only when stopped (06)"
    )
    resume: Name = Field(description="no, latest, or the folder of an unfinished run (06)")
    output_dir: Name = Field(description="where run folders go")

    def replace(self, **changes: object) -> "Settings":
        """The same settings but for these: what if `max_length` were 256? The changes are not
        validated.
        """
        return self.model_copy(update=changes)

    def table(self) -> list[tuple[str, object, str]]:
        """(name, value, where the value comes from) for every parameter."""
        defaults = PROFILES[self.profile]
        return [
            (n, v, defaults[n].reason if v == defaults[n].value else "set by you")
            for n, v in self
            if n in defaults
        ]

    def changed(self) -> dict[str, object]:
        """The parameters that differ from the profile's defaults, in schema order."""
        return {name: value for name, value, why in self.table() if why == "set by you"}

    def papermill_line(self, notebook: str = "06_finetune_pythia_12b") -> str:
        """The shell command that repeats a run with these settings: only what differs from the
        profile is named.
        """
        given = {
            "profile": self.profile,
            **{k: v for k, v in self.changed().items() if k not in ELSEWHERE},
        }
        given |= (
            {"columns": [f"{k}={v}" for k, v in self.columns.items()]} if "columns" in given else {}
        )
        values = {k: ",".join(v) if isinstance(v, list) else v for k, v in given.items()}
        parameters = " ".join(f"-p {k} {shlex.quote(str(v))}" for k, v in values.items())
        return f"papermill notebooks/{notebook}.ipynb out.ipynb {parameters}"

    def __repr__(self) -> str:
        return "\n".join(
            f"{name:28} {value!s:28} {why}"
            for name, value, why in [("profile", self.profile, ""), *self.table()]
        )

    def _repr_html_(self) -> str:
        import pandas

        own = (
            ", ".join(f"{name} = {value}" for name, value in self.changed().items())
            or "nothing overridden"
        )
        head = f"<b>profile</b> {self.profile} on {html.escape(self.model_id)} · {html.escape(own)}"
        with pandas.option_context("display.max_colwidth", None):
            table = pandas.DataFrame(self.table(), columns=["parameter", "value", "why"]).to_html(
                index=False, justify="left"
            )
        return f"<div>{head}<details><summary>all {len(self.table())} parameters</summary>{table}</details></div>"


@dataclass(frozen=True)
class Default:
    """A profile's value for one parameter and the reason for it."""

    value: object
    reason: str


def _read_profiles() -> dict[str, dict[str, Default]]:
    """The profiles of `profiles.toml`, each on top of the tables it starts from."""
    tables = tomllib.loads((Path(__file__).parent / "profiles.toml").read_text(encoding="utf-8"))
    read = {}
    for name in get_args(Settings.model_fields["profile"].annotation):
        own = tables[name]
        merged = {k: v for table in own.pop("from") for k, v in tables[table].items()} | own
        read[name] = {k: Default(*v) for k, v in merged.items()}
    return read


PROFILES = _read_profiles()
"""Profile → parameter → its value there and the reason for it."""

_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))


def resolve(values: dict[str, object]) -> Settings:
    """Validate a notebook's parameters and fill in the profile's values, before anything heavy is
    imported.

    From then on progress bars are lines of text (`progress`), and a name that no cell has set yet
    is told in one sentence.

    Args:
        values: a notebook's `globals()`, or a plain dictionary of parameters. `None` means the
            profile's value.

    Returns:
        The frozen `Settings`.

    Raises:
        KitError: an unknown name or a bad value.
    """
    progress.use_text_bars()
    return validate(_parameters(values))


def validate(values: dict[str, object]) -> Settings:
    """As `resolve`, for a plain dictionary: what the command line and the tests use."""
    for name in values:
        if name not in Settings.model_fields:
            raise KitError(
                f"unknown parameter {name!r:.80}", remedy=_suggest(name, Settings.model_fields)
            )
    given = {k: v for k, v in values.items() if v is not None}
    profile = given.get("profile", "tiny")
    if not isinstance(profile, str) or profile not in PROFILES:
        remedy = _suggest(str(profile), PROFILES)
        raise KitError("unknown profile", value=profile, allowed=", ".join(PROFILES), remedy=remedy)
    defaults = {k: d.value for k, d in PROFILES[profile].items()}
    try:
        return Settings(**{**defaults, **given, "profile": profile})
    except ValidationError as error:
        raise _explain(error, PROFILES[profile]) from None


def _parameters(values: dict[str, object]) -> dict[str, object]:
    """The parameters among a notebook's globals; a misspelt one is among them, so that `validate`
    can refuse it.
    """
    cells = values.get("In")
    if not isinstance(cells, list):
        return dict(values)
    if "get_ipython" in values:
        explain_missing_names(values["get_ipython"]())
    first_time = not values.get("_qlora_nb_resolved")
    values["_qlora_nb_resolved"] = (
        True  # a cell run twice must not trip over the notebook's own variables
    )
    typed = _assigned_in_parameter_cells(cells)
    own = {
        k: v for k, v in values.items() if k in Settings.model_fields
    }  # of any type: a wrong one is refused, not left out
    plain = {
        k: v
        for k, v in values.items()
        if isinstance(v, _PLAIN) and not k.startswith("_") and k not in ("In", "Out")
    }
    return own | {k: v for k, v in plain.items() if k in typed or first_time}


def _assigned_in_parameter_cells(cells: list[str]) -> set[str]:
    """Names assigned at top level in the parameters cell (it assigns `profile`) or in papermill's
    injected one.
    """
    names: set[str] = set()
    for source in cells:
        with suppress(SyntaxError, ValueError):  # a magic, or not Python
            assignments = [
                n for n in ast.parse(source).body if isinstance(n, (ast.Assign, ast.AnnAssign))
            ]
            own = {
                t.id
                for n in assignments
                for t in ast.walk(n)
                if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)
            }
            if "profile" in own or source.lstrip().startswith("# Parameters"):
                names |= own
    return names


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def _explain(error: ValidationError, defaults: dict[str, Default]) -> KitError:
    """The first bad value in full, the others by name."""
    first, *more = error.errors(include_url=False)
    name = str(first["loc"][0])
    field = Settings.model_fields[name]
    choices = (
        get_args(field.annotation)
        if getattr(field.annotation, "__origin__", None) is Literal
        else ()
    )
    allowed = ", ".join(map(str, choices)) or _bounds(field)
    others = sorted({str(p["loc"][0]) for p in more} - {name})
    also = f"; also bad: {', '.join(others)}" if others else ""
    what = f"{name} ({field.description}): {first['msg'].lower()}{also}"
    remedy = (
        f"leave it None for this profile's value ({defaults[name].value})"
        if name in defaults
        else "choose one of these"
    )
    return KitError(what, value=first["input"], allowed=allowed, remedy=remedy)


def _bounds(field) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return " and ".join(
        f"{word} {getattr(m, key)}"
        for m in field.metadata
        for key, word in words.items()
        if hasattr(m, key)
    )
