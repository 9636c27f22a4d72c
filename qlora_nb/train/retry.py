"""What happens when memory runs out: the same step once more, in passes of fewer rows.

Gradient accumulation makes the same update from more and smaller passes, so that a step can be done
again with half as many rows in each pass and twice the passes: the peak memory falls, the result
differs only by the order of the sums. A step that broke off before its update is done again from
the weights as they are. One that broke off inside the update has changed some of them already: then
training is resumed after the newest checkpoint, or begins anew. With one row in a pass nothing
smaller is left, and the error becomes a refusal that says what would help.
"""

from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from qlora_nb import processes
from qlora_nb.memory import out_of_memory
from qlora_nb.train import optimizers


def with_fewer_rows(settings):
    """The same rows in a step, in more passes: half as many rows in each, or the next smaller
    number that divides them.

    >>> from qlora_nb.settings import validate
    >>> with_fewer_rows(validate({"per_device_train_batch_size": 15})).gradient_accumulation_steps
    3
    """
    rows = settings.per_device_train_batch_size
    fewer = next(n for n in range(rows // 2, 0, -1) if rows % n == 0)
    passes = settings.gradient_accumulation_steps * (rows // fewer)
    return settings.replace(per_device_train_batch_size=fewer, gradient_accumulation_steps=passes)


def train(trainer, checkpoint: Path | None) -> TrainOutput:
    """Train to the end, in passes of fewer rows each time memory runs out.

    Args:
        trainer: a `trainer.QLoRATrainer`; it is made anew for each size of a pass.
        checkpoint: where to begin; None at the first step.

    Raises:
        KitError: memory ran out with one row in a pass.
    """
    settings = trainer.settings
    watch = trainer.watch
    while True:
        try:
            start = str(checkpoint) if checkpoint else None
            return Trainer.train(trainer, resume_from_checkpoint=start)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.freed_memory_of(error):
                raise
            # of several processes the others wait inside the step; before it nothing is smaller
            can_save = watch.begun and processes.count() == 1
            if settings.per_device_train_batch_size == 1 or not can_save:
                refusal = out_of_memory.explain(error, settings, trainer.model, trainer.optimizer)
                if can_save and not watch.updating:
                    trainer.save_now()
                raise refusal from error
        finally:
            _end_autocast(trainer.model)
        settings = with_fewer_rows(settings)
        print(
            f"out of memory in step {trainer.state.global_step + 1}: it is done again in "
            f"{settings.gradient_accumulation_steps} passes of "
            f"{settings.per_device_train_batch_size}"
        )
        optimizer = _unwrapped(trainer.optimizer)
        if watch.updating:
            checkpoint = trainer.go_back()
            optimizers.begin_anew(optimizer)
        else:
            checkpoint = trainer.save_now()
        trainer.make(settings, optimizer)


def _end_autocast(model: torch.nn.Module) -> None:
    """Take off what accelerate put around the model's forward for float16, so that the model
    answers as a loaded one does.
    """
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def _unwrapped(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, without what a step that broke off left on it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    vars(inner).pop("step", None)
    return inner
