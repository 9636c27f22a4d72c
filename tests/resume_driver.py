"""Training runs of twelve steps, each in a process of its own, hurt as asked.

What takes longest in a short run is importing torch. So this program does it once and forks for
every line that it reads, `{"folder": …, "resume": …, "hurt": …, "out": …, "err": …}`; the new
process is one like any other, ends as it may, and its exit code is answered. `out` and `err` are
files for what it prints.

`hurt` is `none`, `int@7` (what ■ does, in step 7), `term@7`, `kill@7` (SIGKILL after step 7),
`kill-in@7` (inside step 7), `kill-save@8` (half-way through writing the checkpoint of step 8),
`fill@6` (the disk is really filled to the last byte then), `quota@6` (no file may grow beyond 100
kB from then on) or `oom@7`. A run that comes to its end prints the losses and a hash of the adapter
as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
import open_cells

from qlora_nb.model import data, load
from qlora_nb.settings import validate
from qlora_nb.train import checkpoints, trainer

SMALL = {
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_rows": 48,
    "max_length": 96,
}


def main(folder: str, resume: str, hurt: str) -> None:
    how, _, at = hurt.partition("@")
    at = int(at or 0)
    settings = validate(
        {
            **SMALL,
            "lora_dropout": 0.1,
            "output_dir": folder,
            "save_steps": 4,
            "resume": resume,
            "eval_rows": 1,
        }
    )
    tokenizer, model = load.load_tokenizer(settings), load.load_base(settings)
    model = open_cells.attach_adapter(model, settings)
    rows = data.tokenize_rows(data.load(settings)[0], tokenizer, settings)
    run = checkpoints.start(settings, "06_resume")

    def report(step: dict) -> None:
        signals = {"int": signal.SIGINT, "term": signal.SIGTERM, "kill": signal.SIGKILL}
        if step["step"] == at and how in signals:
            os.kill(os.getpid(), signals[how])
        if step["step"] == at and how == "quota":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        if step["step"] == at and how == "fill":
            with suppress(OSError), open(f"{folder}/filler", "wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass

    calls = []
    forward = model.get_base_model().forward

    def hurt_inside(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)  # the model is tried before the first step
        calls.append(1)
        if len(calls) == 2 * at and how == "kill-in":  # the second of the two passes of that step
            os.kill(os.getpid(), signal.SIGKILL)
        if (
            len(calls) in (2 * at, 2 * at + 3) and how == "oom"
        ):  # and again when it is done in four passes
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 …")
        return forward(*args, **kwargs)

    model.get_base_model().forward = hurt_inside
    save = trainer.QLoRATrainer._save_rng_state

    def save_and_hurt(self, output_dir):
        if self.state.global_step == at and how == "kill-save":
            os.kill(os.getpid(), signal.SIGKILL)
        return save(self, output_dir)

    trainer.QLoRATrainer._save_rng_state = save_and_hurt
    result = open_cells.finetune(model, tokenizer, rows, settings, run, report)
    weights = b"".join(
        p.detach().numpy().tobytes() for n, p in sorted(model.named_parameters()) if p.requires_grad
    )
    run.finish("interrupted" if result["stopped"] else "done")
    print(
        json.dumps(
            {
                "losses": result["losses"],
                "adapter": hashlib.sha256(weights).hexdigest(),
                "folder": str(run.folder),
            }
        )
    )


def next_run() -> dict[str, str]:
    """Fork for every line; returns what the line asks for in the new process alone, whose output
    goes into files.
    """
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            signal.alarm(300)  # one that hangs is ended
            for name, number in (("out", 1), ("err", 2)):
                file = os.open(asked.pop(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
                os.close(file)
            return asked
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


if __name__ == "__main__":
    main(**next_run())
