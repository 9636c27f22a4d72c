"""One schema for every parameter: what papermill passes, a notebook types, a widget sets and the command line takes.

`resolve` turns loose values into a `Settings` record: `None` means "the profile's value", text is coerced to the field's
type ("false" is False, "2e-4" is 0.0002), a name that is not in the schema is refused with a suggestion. It imports no
torch, so a wrong value costs half a second and no download.
"""

from __future__ import annotations

import ast
import difflib
import html
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qlora_nb.errors import KitError


def _not_bool(value: Any) -> Any:
    """Python counts True as 1; a person who writes max_steps=True has made a mistake."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not True or False")
    return value


def _names(value: Any) -> Any:
    """'q, k' or '["q", "k"]' or a list → a list of names."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip().startswith("[") else [v.strip() for v in value.split(",")]
    return [v for v in value if v != ""] if isinstance(value, list) else value


def _prompts(value: Any) -> Any:
    """A single prompt, a JSON list of prompts, or a list → a list of prompts."""
    if isinstance(value, str):
        value = json.loads(value) if value.strip().startswith("[") else [value]
    return value


Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], BeforeValidator(_names), Field(min_length=1)]
Prompts = Annotated[list[str], BeforeValidator(_prompts), Field(min_length=1)]

PYTHIA_SIZES = ("14m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")


class Settings(BaseModel):
    """Every parameter of the kit, resolved. Names are PEFT's, transformers' and bitsandbytes' own."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True, protected_namespaces=()
    )

    profile: Literal["tiny", "smollm2", "t4", "full"] = Field(description="which world the notebook runs in")
    model_id: Name = Field(description="pocket, smollm2, a hub name or a local folder")
    dataset: Name = Field(description="pocket, a hub name or a local .json/.jsonl file")
    seed: Int = Field(ge=0, le=2**31, description="seed of everything random")
    quant_type: Literal["nf4", "fp4"] = Field(description="4-bit datatype of the frozen weights")
    double_quant: bool = Field(description="quantize the scales too")
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(description="weights that share one scale (02-05)")
    compute_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(description="dtype of the arithmetic")
    r: Int = Field(ge=1, le=1024, description="LoRA rank")
    lora_alpha: Float = Field(gt=0, description="LoRA scale is lora_alpha / r")
    lora_dropout: Float = Field(ge=0, lt=1, description="dropout before lora_A")
    target_modules: Names = Field(description="all-linear, or names of linear layers")
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = Field(
        description="Trainer's optimizer"
    )
    learning_rate: Float = Field(gt=0, le=1, description="peak learning rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(description="learning-rate schedule")
    warmup_steps: Int = Field(ge=0, description="steps until the peak learning rate")
    max_grad_norm: Float = Field(gt=0, description="gradients are clipped to this norm")
    max_steps: Int = Field(ge=1, description="optimizer steps")
    per_device_train_batch_size: Int = Field(ge=1, le=4096, description="rows in one forward pass")
    gradient_accumulation_steps: Int = Field(ge=1, description="forward passes in one optimizer step")
    max_length: Int = Field(ge=8, le=8192, description="tokens of prompt and answer kept")
    gradient_checkpointing: bool = Field(description="recompute activations to save memory")
    prompt_template: Literal["alpaca"] = Field(description="how instruction and input become a prompt")
    train_rows: Int = Field(ge=1, description="rows to train on at most")
    eval_rows: Int = Field(ge=1, description="held-out rows to measure on")
    adapter: Name = Field(description="latest, pocket, or an adapter folder (07)")
    prompts: Prompts = Field(description="instructions for the models to answer (07)")
    max_new_tokens: Int = Field(ge=1, le=4096, description="tokens to generate at most")
    temperature: Float = Field(ge=0, le=10, description="0 is greedy")
    top_p: Float = Field(gt=0, le=1, description="nucleus sampling")
    pythia: Literal[PYTHIA_SIZES] = Field(description="Pythia size that 02 and 05 do arithmetic for")
    gpu_gib: Float = Field(gt=0, le=10_000, description="card size that 05 does arithmetic for (GiB)")
    fetch_ahead: bool = Field(description="download model and data now (01)")
    output_dir: Name = Field(description="where run folders go")

    def table(self) -> list[tuple[str, object, str]]:
        """(name, value, where the value comes from) for every parameter."""
        defaults = PROFILES[self.profile]
        return [
            (name, value, defaults[name].reason if value == defaults[name].value else "set by you")
            for name, value in self
            if name in defaults
        ]

    def changed(self) -> dict[str, object]:
        """The parameters that differ from the profile's defaults, in schema order."""
        return {name: value for name, value, why in self.table() if why == "set by you"}

    def __repr__(self) -> str:
        rows = [("profile", self.profile, ""), *self.table()]
        return "\n".join(f"{name:28} {value!s:28} {why}" for name, value, why in rows)

    def _repr_html_(self) -> str:
        set_by_you = "".join(
            f"<tr><td><code>{n}</code></td><td><code>{html.escape(str(v))}</code></td></tr>" for n, v in self.changed().items()
        )
        head = f"<b>profile</b> <code>{self.profile}</code> on <code>{html.escape(self.model_id)}</code>"
        cell = "<td style='text-align:left'>{}</td>".format
        body = "".join(
            f"<tr>{cell(f'<code>{n}</code>')}{cell(f'<code>{html.escape(str(v))}</code>')}{cell(html.escape(why))}</tr>"
            for n, v, why in self.table()
        )
        own = f"<table><tr><th colspan=2>set by you</th></tr>{set_by_you}</table>" if set_by_you else " · nothing overridden"
        return (
            f"<div>{head}{own}<details><summary>all {len(self.table())} parameters</summary><table>{body}</table></details></div>"
        )


@dataclass(frozen=True)
class Default:
    """A profile's value for one parameter and the reason for it."""

    value: object
    reason: str


_COMMON = {
    "seed": Default(0, "any number; results over several seeds are in the README"),
    "quant_type": Default("nf4", "QLoRA paper, section 3"),
    "double_quant": Default(True, "QLoRA paper, section 3: 0.37 bits per weight less"),
    "blocksize": Default(64, "QLoRA paper, section 3; what bitsandbytes loads"),
    "compute_dtype": Default("auto", "bfloat16 where the GPU has it, else float16 on a GPU, float32 on a CPU"),
    "r": Default(16, "enough for these tasks; the paper finds rank unimportant once all layers are adapted"),
    "lora_alpha": Default(16, "QLoRA paper, appendix B: fixed, the learning rate is tuned instead"),
    "lora_dropout": Default(0.05, "QLoRA paper, table 9 (small models)"),
    "target_modules": Default(["all-linear"], "QLoRA paper, figure 2: every linear layer must be adapted"),
    "optim": Default("paged_adamw_32bit", "qlora.py's default"),
    "learning_rate": Default(2e-4, "qlora.py's default"),
    "lr_scheduler_type": Default("constant", "qlora.py's default"),
    "warmup_steps": Default(5, "a short start"),
    "max_grad_norm": Default(0.3, "qlora.py's default"),
    "max_length": Default(512, "nearly all Alpaca rows are shorter"),
    "gradient_checkpointing": Default(True, "activations would not fit otherwise"),
    "prompt_template": Default("alpaca", "the template Alpaca was published with"),
    "adapter": Default("latest", "the newest finished run, else the adapter shipped with the pocket model"),
    "temperature": Default(0.0, "greedy: the same answer every time"),
    "top_p": Default(0.9, "scripts/generate.sh of the original repository"),
    "pythia": Default("12b", "the model of the last two notebooks"),
    "gpu_gib": Default(24.0, "an RTX 3090"),
    "fetch_ahead": Default(False, "24 GB are not downloaded by surprise"),
    "output_dir": Default("runs", "beside the notebooks' folder"),
}
_ENGLISH_PROMPTS = [
    "Give three tips for staying healthy.",
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
]
_POCKET_PROMPTS = [
    "Where is Anna?\nAnna walked to the river. Ben found a red kite. Rosa bought six eggs.",
    "What did Ben find?\nAnna walked to the river. Ben found a red kite. Rosa bought six eggs.",
    "How many eggs did Rosa buy?\nAnna walked to the river. Ben found a red kite. Rosa bought six eggs.",
]
_SMALL = {
    "learning_rate": Default(2e-3, "a small model stands and needs a larger one"),
    "lr_scheduler_type": Default("linear", "a short run should end gently"),
    "warmup_steps": Default(10, "a short start"),
    "max_grad_norm": Default(1.0, "few steps: do not clip away the signal"),
    "lora_dropout": Default(0.0, "too few steps to overfit"),
    "gradient_checkpointing": Default(False, "activations are small; recomputing them only costs time"),
}

PROFILES: dict[str, dict[str, Default]] = {
    "tiny": _COMMON
    | _SMALL
    | {
        "model_id": Default("pocket", "ships with the kit: 3 million parameters, no network"),
        "dataset": Default("pocket", "made by the kit: questions about little stories"),
        "r": Default(8, "enough for six kinds of question; the shipped adapter stays under 1 MB"),
        "max_steps": Default(200, "about a minute on two cores"),
        "per_device_train_batch_size": Default(16, "two cores"),
        "gradient_accumulation_steps": Default(1, "no need"),
        "max_length": Default(192, "the longest micro-world row is shorter"),
        "train_rows": Default(3200, "each row is seen once"),
        "eval_rows": Default(240, "forty for each of six kinds of question"),
        "prompts": Default(_POCKET_PROMPTS, "first line the instruction, the rest the input"),
        "max_new_tokens": Default(16, "answers are short"),
    },
    "smollm2": _COMMON
    | _SMALL
    | {
        "model_id": Default("smollm2", "SmolLM2-135M-Instruct; `qlora-nb fetch smollm2` brings it"),
        "dataset": Default("pocket", "offline; give a local Alpaca file for real data"),
        "learning_rate": Default(1e-3, "a small model stands and needs a larger one"),
        "max_steps": Default(30, "a few minutes on two cores"),
        "per_device_train_batch_size": Default(4, "two cores"),
        "gradient_accumulation_steps": Default(2, "effective batch 8"),
        "max_length": Default(256, "most Alpaca rows are shorter"),
        "train_rows": Default(1000, "more than thirty steps need"),
        "eval_rows": Default(32, "half a minute on two cores"),
        "prompts": Default(_ENGLISH_PROMPTS, "everyday instructions"),
        "max_new_tokens": Default(48, "a short answer"),
    },
    "t4": _COMMON
    | {
        "model_id": Default("EleutherAI/pythia-2.8b", "comfortable on a free 16 GB card"),
        "dataset": Default("tatsu-lab/alpaca", "52,002 instructions"),
        "max_steps": Default(200, "an evening, not a night"),
        "per_device_train_batch_size": Default(4, "fits 16 GB"),
        "gradient_accumulation_steps": Default(4, "effective batch 16, as qlora.py"),
        "train_rows": Default(51_000, "the rest is held out"),
        "eval_rows": Default(128, "a minute on a T4"),
        "prompts": Default(_ENGLISH_PROMPTS, "everyday instructions"),
        "max_new_tokens": Default(64, "scripts/generate.sh of the original repository"),
    },
    "full": _COMMON
    | {
        "model_id": Default("EleutherAI/pythia-12b", "the model of the 2023 write-up"),
        "dataset": Default("tatsu-lab/alpaca", "the data of the 2023 write-up"),
        "r": Default(64, "qlora.py's default"),
        "max_steps": Default(1875, "qlora.py's 10,000 for Alpaca is three epochs; this is a bit over half of one"),
        "per_device_train_batch_size": Default(1, "qlora.py's default"),
        "gradient_accumulation_steps": Default(16, "qlora.py's default"),
        "train_rows": Default(51_000, "the rest is held out"),
        "eval_rows": Default(128, "a minute on one GPU"),
        "prompts": Default(_ENGLISH_PROMPTS, "everyday instructions"),
        "max_new_tokens": Default(64, "scripts/generate.sh of the original repository"),
    },
}

_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))
_NOT_PARAMETERS = {"In", "Out"}  # IPython's own


def resolve(values: dict[str, object]) -> Settings:
    """Validate parameters and fill in the profile's values; then refuse what this machine cannot run.

    Args:
        values: a notebook's `globals()`, or a plain dictionary of parameters. `None` means the profile's value.

    Returns:
        The frozen `Settings`.

    Raises:
        KitError: an unknown name, a bad value, or a model that does not fit this machine or cannot be reached.
    """
    from qlora_nb.engine.environment import refuse_what_cannot_run

    settings = validate(_parameters(values))
    refuse_what_cannot_run(settings)
    return settings


def validate(values: dict[str, object]) -> Settings:
    """As `resolve`, without looking at the machine: what the command line and the tests use."""
    for name in values:
        if name not in Settings.model_fields:
            raise KitError(f"unknown parameter {name!r}", remedy=_suggest(name))
    given = {k: v for k, v in values.items() if v is not None}
    profile = given.get("profile", "tiny")
    if not isinstance(profile, str) or profile not in PROFILES:
        raise KitError(
            "unknown profile", value=profile, allowed=", ".join(PROFILES), remedy=_suggest(str(profile), list(PROFILES))
        )
    defaults = {k: d.value for k, d in PROFILES[profile].items()}
    try:
        return Settings(**{**defaults, **given, "profile": profile})
    except ValidationError as error:
        raise _explain(error, PROFILES[profile]) from None


def _parameters(values: dict[str, object]) -> dict[str, object]:
    """The parameters among a notebook's globals; a misspelt one is among them, so that `validate` can refuse it."""
    cells = values.get("In")
    if not isinstance(cells, list):
        return dict(values)
    first_time = not values.get("_qlora_nb_resolved")
    values["_qlora_nb_resolved"] = True  # a cell run twice must not trip over the notebook's own variables
    typed = _assigned_in_parameter_cells(cells)
    return {
        k: v
        for k, v in values.items()
        if not k.startswith("_")
        and k not in _NOT_PARAMETERS
        and isinstance(v, _PLAIN)
        and (k in Settings.model_fields or k in typed or first_time)
    }


def _assigned_in_parameter_cells(cells: list[str]) -> set[str]:
    """Names assigned at top level in the parameters cell (it assigns `profile`) or in papermill's injected one."""
    names: set[str] = set()
    for source in cells:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a magic, or not Python
            continue
        targets = [
            t for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in getattr(n, "targets", None) or [n.target]
        ]
        own = {t.id for t in targets if isinstance(t, ast.Name)}
        if "profile" in own or source.lstrip().startswith("# Parameters"):
            names |= own
    return names


def _suggest(name: str, known: list[str] | None = None) -> str:
    known = known or list(Settings.model_fields)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def _explain(error: ValidationError, defaults: dict[str, Default]) -> KitError:
    """The first bad value in full, the others by name."""
    problems = error.errors(include_url=False)
    first = problems[0]
    name = str(first["loc"][0])
    field = Settings.model_fields[name]
    choices = get_args(field.annotation) if getattr(field.annotation, "__origin__", None) is Literal else ()
    allowed = ", ".join(map(str, choices)) or _bounds(field)
    others = sorted({str(p["loc"][0]) for p in problems} - {name})
    remedy = f"leave it None for this profile's value ({defaults[name].value})" if name in defaults else "choose one of these"
    also = f"; also bad: {', '.join(others)}" if others else ""
    return KitError(
        f"{name} ({field.description}): {first['msg'].lower()}{also}", value=first["input"], allowed=allowed, remedy=remedy
    )


def _bounds(field) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{word} {getattr(m, key)}" for m in field.metadata for key, word in words.items() if hasattr(m, key))
