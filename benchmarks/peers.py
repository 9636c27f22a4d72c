"""The kit's fine-tuning and two recipes that are often used, on the same model, rows, targets and
hardware.

*common*: `prepare_model_for_kbit_training` (float32 rest, checkpointing), rows in random order,
padded to the longest of a batch, whole logits, the best compute dtype for the hardware. *pasted*:
the same with every row padded to `max_length` and bfloat16, as it stands in many notebooks. Speeds
count tokens that are not padding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from random import Random

import datasets
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from provenance import open_cells
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qlora_nb.model import batching, chunked_loss, device, load
from qlora_nb.record import runs
from qlora_nb.settings import Settings

OPTIONS = {
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "max_steps",
    "seed",
}


class StepClock(TrainerCallback):
    """The seconds of all steps after the first `warm_up`: neither what comes before the first step
    nor what is saved after the last one.
    """

    def __init__(self, warm_up: int = 0):
        self.warm_up = warm_up
        self.started = 0.0
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == self.warm_up:
            self.started = now
        self.seconds = now - self.started


def kit(
    settings: Settings,
    rows: datasets.Dataset,
    tokenizer,
    warm_up: int = 0,
    watching: Sequence[TrainerCallback] = (),
) -> tuple[float, torch.nn.Module]:
    """Tokens a second of notebook 06 (with its record keeping), and the trained model.

    Args:
        warm_up: steps before the clock starts.
        watching: callbacks of the Trainer besides the clock.
    """
    model = open_cells.attach_adapter(load.load_base(settings), settings)
    clock = StepClock(warm_up)
    with tempfile.TemporaryDirectory() as folder:
        run = runs.Run(settings.replace(output_dir=folder), "peers")
        open_cells.finetune(
            model, tokenizer, rows, settings, run, lambda step: None, watching=(clock, *watching)
        )
    in_order = batching.in_training_order(rows, settings)["input_ids"]
    n_tokens = sum(len(ids) for ids in in_order[warm_up * settings.rows_in_a_step :])
    return n_tokens / clock.seconds, model


def recipe(
    settings: Settings,
    rows: datasets.Dataset,
    tokenizer,
    warm_up: int = 0,
    watching: Sequence[TrainerCallback] = (),
    pasted: bool = False,
) -> tuple[float, torch.nn.Module]:
    """As `kit`, of the common recipe, or of the one often pasted."""
    settings = settings.replace(compute_dtype="bfloat16") if pasted else settings
    dtype, on_gpu = device.compute_dtype(settings.compute_dtype), torch.cuda.is_available()
    how = {
        "dtype": dtype,
        "quantization_config": load.quantization_config(settings),
        "device_map": {"": device.compute_device()},
    }
    path = load.weights_of(settings)  # with `prequantized` the same weights, packed already
    base = AutoModelForCausalLM.from_pretrained(path, **how)
    model = prepare_model_for_kbit_training(
        base, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    lora = settings.model_dump(include={"r", "lora_alpha", "lora_dropout"})
    torch.manual_seed(settings.seed)
    model = get_peft_model(
        model, LoraConfig(**lora, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    how = {"padding": "max_length", "max_length": settings.max_length} if pasted else {}
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=chunked_loss.IGNORED, **how)
    clock = StepClock(warm_up)
    in_passes: list[int] = []  # tokens of each pass

    def collate(batch):
        in_passes.append(sum(len(row["input_ids"]) for row in batch))
        return pad(batch)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            **settings.model_dump(include=OPTIONS),
            per_device_train_batch_size=settings.per_device_train_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            bf16=dtype is torch.bfloat16,
            fp16=on_gpu and dtype is torch.float16,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not on_gpu,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock, *watching],
        ).train()
    first = warm_up * settings.gradient_accumulation_steps
    end = settings.max_steps * settings.gradient_accumulation_steps  # what was fetched ahead: left
    return sum(in_passes[first:end]) / clock.seconds, model


def common(*arguments) -> tuple[float, torch.nn.Module]:
    """The common recipe."""
    return recipe(*arguments)


def pasted(*arguments) -> tuple[float, torch.nn.Module]:
    """The recipe as often pasted."""
    return recipe(*arguments, pasted=True)


def random_rows(
    n: int, vocabulary: int, longest: int, middle: int = 85, seed: int = 0
) -> datasets.Dataset:
    """Rows of random tokens with the spread of lengths that instruction data has: log-normal around
    `middle` tokens.
    """
    random, rows = Random(seed), []
    for _ in range(n):
        length = min(longest, max(24, int(middle * random.lognormvariate(0, 0.6))))
        ids = [random.randrange(3, vocabulary - 1) for _ in range(length)]
        rows.append(
            {
                "input_ids": ids,
                "labels": [chunked_loss.IGNORED] * (length // 2) + ids[length // 2 :],
            }
        )
    return datasets.Dataset.from_list(rows)
