"""What notebooks 06 and 07 say they show stands in their cells: the libraries' own calls, each
option by its name, each choice with its reason.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING, fields

import nbformat
import pytest
import transformers
from conftest import python_of
from peft import LoraConfig

from qlora_nb.train.trainer import QLoRATrainer

LOADING = {
    "BitsAndBytesConfig": {
        "load_in_4bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
    },
    "AutoModelForCausalLM.from_pretrained": {
        "quantization_config",
        "dtype",
        "device_map",
        "use_safetensors=True",
        "trust_remote_code=False",
        "output_loading_info=True",
    },
    "load.prepared": set(),
}
"""Call → the options that it must be given, with their values where only one will do."""

TRAINING = {
    **LOADING,
    "LoraConfig": {"r", "lora_alpha", "lora_dropout", "target_modules", "task_type"},
    "get_peft_model": set(),
    "TrainingArguments": {
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "seed",
        "save_steps",
    },
    "QLoRATrainer": {"model", "args", "train_dataset", "data_collator", "callbacks"},
    "trainer.train": {"resume_from_checkpoint"},
    "model.save_pretrained": {"save_embedding_layers=False"},
    "generate.answer_all": set(),
}

ANSWERING = {**LOADING, "PeftModel.from_pretrained": set(), ".generate": {"max_new_tokens"}}

NOTEBOOKS = {"06_finetune_pythia_12b": TRAINING, "07_inference": ANSWERING}

CONFIGURATIONS = {
    "BitsAndBytesConfig": transformers.BitsAndBytesConfig,
    "LoraConfig": LoraConfig,
    "TrainingArguments": transformers.TrainingArguments,
}


def defaults_of(configuration: type) -> dict[str, object]:
    """Option → its default. One that is made when it is needed is told apart from any value."""
    found = {}
    for name, parameter in inspect.signature(configuration).parameters.items():
        found[name] = parameter.default
    for field in fields(configuration):
        if field.default is not MISSING:
            found[field.name] = field.default
    return found


def code_cells(root, notebook: str) -> list[str]:
    cells = nbformat.read(root / "notebooks" / f"{notebook}.ipynb", 4).cells
    return [python_of(cell) for cell in cells if cell.cell_type == "code"]


def calls_in(cells: list[str], name: str) -> list[tuple[ast.Call, list[str]]]:
    """Calls of a function, each with the lines of its cell; a name that begins with a dot is a
    method of anything.
    """
    found = []
    for cell in cells:
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == name or (name.startswith(".") and called.endswith(name)):
                    found.append((node, cell.splitlines()))
    return found


def problems(cells: list[str], wanted: dict[str, set[str]]) -> list[str]:
    """Calls that are missing, options that are missing or hidden in `**`, choices without a
    reason.
    """
    wrong = []
    for name, options in wanted.items():
        found = calls_in(cells, name)
        if not found:
            wrong.append(f"{name} is not called")
        given = set()
        for call, lines in found:
            for keyword in call.keywords:
                value = ast.unparse(keyword.value)
                given |= {keyword.arg, f"{keyword.arg}={value}"}
                if keyword.arg is None:
                    wrong.append(f"{name}: ** hides options")
                elif unexplained(name, keyword, lines[keyword.end_lineno - 1]):
                    wrong.append(f"{name}: {keyword.arg} has no reason")
        if found:
            missing = sorted(options - given)
            wrong += [f"{name}: {option} is not given" for option in missing]
    return wrong


def unexplained(call: str, keyword: ast.keyword, line: str) -> bool:
    """Whether an option of a configuration may differ from the library's default, and its line
    carries no remark.

    Options that say themselves what they are (`PLAIN`) need none.
    """
    if call not in CONFIGURATIONS or keyword.arg in PLAIN:
        return False
    default = defaults_of(CONFIGURATIONS[call])[keyword.arg]
    if isinstance(keyword.value, ast.Constant) and keyword.value.value == default:
        return False
    return len(line.partition("  # ")[2].split()) < 2


PLAIN = {"load_in_4bit", "task_type"}
"""What the notebook is about: 4 bit, a causal language model."""


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_cells_call_the_libraries(root, notebook):
    assert problems(code_cells(root, notebook), NOTEBOOKS[notebook]) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_loading_hides_in_no_function_of_the_kit(root, notebook):
    """Further on a second model may be loaded by a call of the kit."""
    for call, _ in calls_in(code_cells(root, notebook), "load.load_base"):
        assert ast.unparse(call) != "load.load_base(settings)"


def test_the_trainer_is_transformers_own():
    assert issubclass(QLoRATrainer, transformers.Trainer)
    assert "_inner_training_loop" not in vars(QLoRATrainer)
    assert "training_step" not in vars(QLoRATrainer)


PLANTED = [
    (
        "device_map={",
        "**options, device_map={",
        "AutoModelForCausalLM.from_pretrained: ** hides options",
    ),
    ("lora = LoraConfig(", "lora = LoraConfig(**more, ", "LoraConfig: ** hides options"),
    ("args = TrainingArguments(", "args = TrainingArguments(**given, ", "TrainingArguments: **"),
    ("load.prepared(", "guarded(", "load.prepared is not called"),
    ("get_peft_model(model", "adapted(model", "get_peft_model is not called"),
    ("QLoRATrainer(", "train_somehow(", "QLoRATrainer is not called"),
    ("trainer.train(resume", "trainer.train_it(resume", "trainer.train is not called"),
    ("resume_from_checkpoint=", "", "trainer.train: resume_from_checkpoint is not given"),
    ("use_safetensors=True", "use_safetensors=False", "use_safetensors=True is not given"),
    ("trust_remote_code=False", "trust_remote_code=True", "trust_remote_code=False is not given"),
    ("    r=settings.r,  # default 8\n", "    r=settings.r,\n", "LoraConfig: r has no reason"),
    ("    r=settings.r,  # default 8\n", "", "LoraConfig: r is not given"),
    ("  # default 5e-5: an adapter bears more", "", "TrainingArguments: learning_rate has no"),
    ("  # default fp4: nf4 loses less (notebook 3)", "", "bnb_4bit_quant_type has no reason"),
]


@pytest.mark.parametrize(("old", "new", "said"), PLANTED, ids=[said for *_, said in PLANTED])
def test_a_planted_wrong_cell_is_found(root, old, new, said):
    cells = code_cells(root, "06_finetune_pythia_12b")
    changed = [cell.replace(old, new) for cell in cells]
    assert changed != cells
    [problem] = problems(changed, TRAINING)
    assert said in problem
