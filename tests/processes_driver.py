"""One of several processes that train one run (`qlora-nb train`), one of them hurt as asked.

HURT in the environment is `rank:how@step`: `kill` (SIGKILL when that step is logged), `int` (what
Ctrl-C sends), `nan` (the rank's loss becomes NaN in that step), `oom` (its memory runs out inside
that step), `slow` (it takes seconds to seal its adapter) or `shy` (it takes seconds to look at its
data).
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from qlora_nb import cli
from qlora_nb.model import data_report
from qlora_nb.record import seal
from qlora_nb.train import callbacks, run, trainer


def hurt(rank: int, how: str, at: int) -> None:
    """Change this process so that it is hurt."""
    if rank != int(os.environ["RANK"]):
        return
    signals = {"kill": signal.SIGKILL, "int": signal.SIGINT}
    on_log = callbacks.Watch.on_log
    loss = trainer.QLoRATrainer.compute_loss

    def log_and_signal(self, args, state, control, **options):
        if how in signals and state.global_step == at:
            os.kill(os.getpid(), signals[how])
        return on_log(self, args, state, control, **options)

    def no_loss(self, *args, **options):
        if self.state.global_step + 1 == at and how == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 …")
        found = loss(self, *args, **options)
        if self.state.global_step + 1 == at and how == "nan":
            found = found * float("nan")
        return found

    def late(function):
        def wait_and_call(*args, **options):
            time.sleep(at)
            return function(*args, **options)

        return wait_and_call

    if how == "slow":
        seal.write_seal = late(seal.write_seal)
    if how == "shy":
        data_report.check = late(data_report.check)
    callbacks.Watch.on_log = log_and_signal
    trainer.QLoRATrainer.compute_loss = no_loss


if __name__ == "__main__":
    run.LET_THE_FIRST_SPEAK_S = 1
    who, _, what = os.environ["HURT"].partition(":")
    how, _, step = what.partition("@")
    hurt(int(who), how, int(step))
    cli.app(["train", *sys.argv[1:]])
